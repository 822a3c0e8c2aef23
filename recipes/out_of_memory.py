"""What to tell when a device runs out of memory: what is needed, what there is, and which flags lower it."""

import contextlib
import os
from collections.abc import Callable, Iterator

import jax

from recipes import display


class OutOfMemory(RuntimeError):
    """A device had less memory than a step or a model takes."""


OF_A_STEP = (
    "Raise --microbatches (or take --microbatches auto), use --remat full, or lower --batch or --context;"
    " --optimizer-bits 8 and --mesh fsdp=N make the state smaller. What the last checkpoint holds is safe."
)
OF_A_MODEL = "Take a smaller --preset, a --tokenizer with fewer words, or --mesh fsdp=N."


@contextlib.contextmanager
def explained(what: str, estimate: Callable[[], int], way_out: str = OF_A_STEP) -> Iterator[None]:
    """Turns the runtime's RESOURCE_EXHAUSTED into one sentence. estimate: bytes that `what` takes on each device; it
    is asked only then, and may fail in the same way."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = " ".join(str(error).partition("RESOURCE_EXHAUSTED:")[2].strip().partition("\n")[0].split()).rstrip(".")
        raise OutOfMemory(
            f"out of memory: {what} needs {_needed(estimate)} on each device, and it has {_available()} ({said})."
            f" {way_out}"
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
