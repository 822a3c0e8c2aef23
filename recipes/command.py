"""A recipe as a command: flags from its config's fields, errors as one message, exit statuses that schedulers know."""

import signal
import sys
from collections.abc import Callable
from typing import Any

import tyro

from recipes import display, train_loop


def run(
    name: str, config: type, main: Callable[[Any], Any], description: str | None, arguments: list[str] | None = None
) -> None:
    """Parses, runs and ends: 1 after an error, 143 or 130 after SIGTERM or Ctrl-C. `python -X dev` shows tracebacks."""
    parsed = tyro.cli(config, args=arguments, description=description)
    try:
        with display.plain_warnings():
            main(parsed)
    except train_loop.Stopped as stopped:
        print(stopped)
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        if sys.flags.dev_mode:
            raise
        print(f"{name}: interrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if sys.flags.dev_mode:
            raise
        words = _words(error).removeprefix(f"{name}: ")  # an error of the command's own names it already
        sys.exit(f"{name}: {words}\n(python -X dev -m recipes.{name} shows where it was raised.)")


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)
