"""What layers note in variables of their own while `lb.calibrate` or `lb.nn.gptq` runs an NNX model, and whether a
transformation inside of it loses that; and the batches that they run it on."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.errors import TraceContextError
from jax import lax
from jaxtyping import Array, Float


def several(batches: Any, who: str) -> Iterable[Any]:
    """Raises: TypeError for one batch in place of several: an array, or a dict of arguments."""
    if isinstance(batches, Mapping) or hasattr(batches, "shape") or not isinstance(batches, Iterable):
        raise TypeError(f"{who} takes an iterable of batches, such as a list, and got a {type(batches).__name__}.")
    return batches


def call_arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    """Of one call, from a batch: an array, a tuple of the arguments, or a dict of them by name."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return batch if isinstance(batch, tuple) else (batch,), {}


def no_batches(who: str) -> str:
    return f"{who} got no batches. Give one or more, each an array, or a tuple or dict of the arguments of a call."


_runs: set[tuple] = set()  # of layers, as the programs of lb.calibrate or lb.nn.gptq run them
_traces = itertools.count()


def ran(path: str, numbers: int, mark: Float[Array, " 2"]) -> None:
    """Notes that the program runs the layer, which then adds 1 to so many numbers. mark: which layer of a stack, and
    how often it has added before; alike, and counted once, when a gradient inside of the model runs it anew."""
    trace = next(_traces)
    jax.debug.callback(lambda mark: _runs.add((path, numbers, trace, *np.asarray(mark).tolist())), mark)


def runs() -> dict[str, int]:
    """How many ones the runs of each layer had to add since this was last asked; more than were added where some were
    lost. (Not told apart: an inner function that JAX traced once, whose first run is lost and whose second is not.)"""
    jax.effects_barrier()
    counted = Counter()
    for path, numbers, *_ in _runs:
        counted[path] += numbers
    _runs.clear()
    return counted


def add_to(variable: nnx.Variable, part: Array, who: str, path: str) -> None:
    """Adds to what a variable holds; under `nnx.vmap` the sum over the batch, where that does not map the variable."""
    try:
        variable.set_value(_added(lax.stop_gradient(variable.get_value()), lax.stop_gradient(part)))
    except TraceContextError as error:
        raise closed_over(who, f"the layer {path!r}") from error


def closed_over(who: str, layer: str) -> ValueError:
    return ValueError(
        f"{who}: {layer} runs inside of a JAX transformation that closes over it (jax.vmap, jax.jit, jax.lax.scan,"
        " jax.checkpoint, jax.grad), where it cannot write what it met. Call it on the whole batch, or use Flax's"
        " transformation with the layer as an argument: nnx.jit, nnx.scan, nnx.remat, nnx.grad,"
        " nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, x)."
    )


LOSES = (
    "a transformation loses what a layer writes: a plain jax.lax.scan or jax.jit inside the model (nnx.scan and nnx.jit"
    " keep it), or an nnx.scan that gets the layer with the axis None (give it"
    " nnx.StateAxes({lowbit_jax.nn.nnx.Scale: nnx.Carry, ...: None}))"
)


@jax.custom_batching.custom_vmap
def _added(total: Array, part: Array) -> Array:
    return total + part


@_added.def_vmap
def _added_over_a_batch(size: int, batched: list[bool], total: Array, part: Array) -> tuple[Array, bool]:
    if batched[0]:
        return total + (part if batched[1] else part[None]), True
    return _added(total, jnp.sum(part, axis=0)), False
