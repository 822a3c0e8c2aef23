"""What to tell when a device runs out of memory: what the step needs, what there is, and which flags lower it."""

import contextlib
import os
from collections.abc import Callable, Iterator

import jax

from recipes import display


class OutOfMemory(RuntimeError):
    """A device had less memory than a step takes."""


@contextlib.contextmanager
def explained(step: str, estimate: Callable[[], int]) -> Iterator[None]:
    """Turns the runtime's RESOURCE_EXHAUSTED into one sentence. estimate: bytes that the step takes on each device; it
    is asked only then, and may fail in the same way."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = " ".join(str(error).partition("RESOURCE_EXHAUSTED:")[2].strip().partition("\n")[0].split()).rstrip(".")
        raise OutOfMemory(
            f"out of memory: {step} needs {_needed(estimate)} on each device, and it has {_available()} ({said}). Raise"
            " --microbatches (or take --microbatches auto), use --remat full, or lower --batch or --context;"
            " --optimizer-bits 8 and --mesh fsdp=N make the state smaller. What the last checkpoint holds is safe."
        ) from error


def _needed(estimate: Callable[[], int]) -> str:
    try:
        return f"an estimated {display.size(estimate())}"
    except (jax.errors.JaxRuntimeError, MemoryError):
        return "more than can be compiled"


def _available() -> str:
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu":
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "an unknown amount" if limit is None else display.size(limit)
