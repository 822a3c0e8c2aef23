"""How long each kernel of a program runs on the GPU, by the driver's own clock (CUPTI, through JAX's profiler)."""

import collections
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax


def kernel_seconds(run: Callable[[], object], times: int = 3) -> dict[str, float]:
    """Kernel -> seconds in one call of `run`, the longest first; launch gaps are not in it.

    Raises: RuntimeError where the profiler saw no GPU."""
    jax.block_until_ready(run())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            for _ in range(times):
                jax.block_until_ready(run())
        finally:
            jax.profiler.stop_trace()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        found = summed(jax.profiler.ProfileData.from_file(str(path)))
    if not found:
        raise RuntimeError("benchmarks.gpu: the profiler saw no kernel on a GPU.")
    return {name: seconds / times for name, seconds in found.items()}


def summed(data: Any) -> dict[str, float]:
    """From `jax.profiler.ProfileData`, name of what ran on a GPU's streams -> seconds altogether, the longest first."""
    total: collections.Counter[str] = collections.Counter()
    for plane in data.planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        total[event.name] += event.duration_ns * 1e-9
    return dict(total.most_common())
