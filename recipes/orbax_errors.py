"""What a failed Orbax save or restore says: one reason, and no tracebacks of the threads that it leaves behind."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Inside, Orbax logs no tracebacks, and its threads do not report that their event loop is closed.

    After an error the threads stay silent, for some of them have yet to find their loop closed; all else is reported
    as before."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in ("absl", "asyncio")}
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    hook = sys.unraisablehook
    sys.unraisablehook = _but_closed_loops(hook)
    try:
        yield
        sys.unraisablehook = hook
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def reason(error: BaseException) -> str:
    """What the system said and of which file, where it is known; else the kind and the message of the error.

    TensorStore packs the system's answer into text: `... Failed to write 4 bytes [os_error_code='28' ...]`."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno) + (f" ({cause.filename})" if cause.filename else "")
        if code := re.search(r"os_error_code='(\d+)'", str(cause)):
            return os.strerror(int(code[1]))
        cause = cause.__cause__ or cause.__context__
    message = re.sub(r"\s*\[\w+='.*", "", str(error), flags=re.DOTALL)  # TensorStore's annotations
    return f"{type(error).__name__}: {' '.join(message.split())}".removesuffix(".")


def raise_if_not_the_disks(error: Exception) -> None:
    """Raises the error itself where no disk can be the cause: a mistake in the code, or memory."""
    if isinstance(error, (TypeError, NameError, AssertionError, MemoryError)):
        raise error


def _but_closed_loops(hook):
    if getattr(hook, "but_closed_loops", False):
        return hook

    def report(unraisable):
        closed = isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
        if not closed:
            hook(unraisable)

    report.but_closed_loops = True
    return report
