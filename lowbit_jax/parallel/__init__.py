"""Training on many devices: a mesh, rules that say what is cut over it, collectives that carry packed codes."""

from lowbit_jax.parallel.collectives import (
    FLOAT,
    Reduction,
    all_gather,
    all_gather_packed,
    all_reduce_packed,
    gather_qtensor,
    reduce_scatter_packed,
    wire_quantizer,
)
from lowbit_jax.parallel.decoder import DECODER
from lowbit_jax.parallel.mesh import AXES, make_mesh, parse_mesh
from lowbit_jax.parallel.processes import Process, start
from lowbit_jax.parallel.rules import Rules, check_divides, leaf_path, shardings, table
from lowbit_jax.parallel.wire import Collective, Wire, bytes_on_the_wire

__all__ = [
    "AXES",
    "Collective",
    "DECODER",
    "FLOAT",
    "Process",
    "Reduction",
    "Rules",
    "Wire",
    "all_gather",
    "all_gather_packed",
    "all_reduce_packed",
    "bytes_on_the_wire",
    "check_divides",
    "gather_layers",  # pyright: ignore[reportUnsupportedDunderAll]  # by `__getattr__`
    "gather_qtensor",
    "leaf_path",
    "make_mesh",
    "parse_mesh",
    "reduce_scatter_packed",
    "shardings",
    "start",
    "table",
    "wire_quantizer",
]


def __getattr__(name: str):
    """`gather_layers` edits Flax modules, so Flax is imported when it is first asked for."""
    if name == "gather_layers":
        from lowbit_jax.parallel.gathered import gather_layers

        return gather_layers
    raise AttributeError(f"module 'lowbit_jax.parallel' has no attribute {name!r}")
