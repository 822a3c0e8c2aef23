"""How many microbatches a step needs to fit a device, read from the compiled program before anything runs."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax

from recipes import display

SHARE = 0.9  # of a device's memory, when no budget is given: the rest is for the runtime and fragmentation


@dataclasses.dataclass(frozen=True)
class Chosen:
    microbatches: int
    bytes: int
    compiled: Any


def budget(text: str | None) -> int:
    """Bytes from "2GB", "512MB" or "1e9"; None: 0.9 of what the device says it has.

    Raises: ValueError for other text, or None where the device does not say."""
    if text is None:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit is None:
            raise ValueError(
                "memory: this device does not tell how much memory it has. Pass --memory-budget, such as 2GB."
            )
        return int(SHARE * limit)
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kMGT]?)i?B?\s*", text, re.IGNORECASE)
    try:
        number = float(found[1]) * 1000 ** " kmgt".index(found[2].lower() or " ") if found else 0
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        raise ValueError(f"memory: {text!r:.40} is not an amount of memory, such as 2GB or 512MB.")
    return int(number)


def step_bytes(compiled: Any) -> int:
    """Bytes that one run of a compiled program takes on each device: arguments, results and temporaries; donated
    arguments count once, and what waits in the host's memory does not count."""
    sizes = compiled.memory_analysis()
    return (
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes + sizes.temp_size_in_bytes
    )


def choose(compile_cut: Callable[[int], Any], batch: int, limit: int,
           may_be: Callable[[int], bool] = lambda _: True) -> Chosen:  # fmt: skip
    """The fewest microbatches, a divisor of `batch` (sequences a device), whose compiled step takes at most `limit`.

    may_be: whether a divisor is one to try; `batch` itself, one sequence at a time, must be.
    Raises: ValueError when one sequence at a time takes more."""
    tried = []
    for microbatches in (n for n in range(1, batch + 1) if batch % n == 0 and may_be(n)):
        compiled = compile_cut(microbatches)
        tried.append((microbatches, step_bytes(compiled)))
        if tried[-1][1] <= limit:
            told = ", ".join(f"{n}: {display.size(size)}" for n, size in tried)
            print(f"microbatches: {microbatches} (compiled step of {told}; budget {display.size(limit)} a device)")
            return Chosen(microbatches, tried[-1][1], compiled)
    raise ValueError(
        f"memory: even {tried[-1][0]} microbatches of one sequence take {display.size(tried[-1][1])} a device, and the"
        f" budget is {display.size(limit)}. Lower --context, or use --remat full, --optimizer-bits 8,"
        " --offload-optimizer or a larger fsdp axis."
    )
