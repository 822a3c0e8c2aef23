"""NNX: learned scales from one batch, those of activations and of weights that a norm makes at every call."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from jax import core
from jaxtyping import Array

from lowbit_jax.nn.met import LOSES, closed_over, runs
from lowbit_jax.nn.nnx import StatefulProduct, attribute_of, layer_type, modules, normed_layers

WHO = "lb.calibrate"


def calibrate(model: nnx.Module, *args: Any, **kwargs: Any) -> nnx.Module:
    """Sets the scales in place and returns the model; see `lb.calibrate`."""
    held = _held(model)
    if not held:
        raise ValueError(
            f"{WHO}: no activation scale is learned here. Quantize with a method that learns it, such as"
            " lb.methods.get('lsq', bits=4); the others read their scales off each batch."
        )
    refuse_traced(WHO, model, args, kwargs)
    runs()  # forgets those of a call that raised
    scales = _scales_of_call(model, args, kwargs)
    counted = runs()
    lost = sorted(
        path
        for path, sides in scales.items()
        if any(jnp.sum(calls) < counted.get(f"{path}/{side}", 0) for side, (_, calls) in sides.items())
    )
    if lost:
        raise ValueError(f"{WHO}: this call set no scale in {_named(lost)}, or not from all of its runs: {LOSES}.")
    unset = sorted(path for path, sides in scales.items() if any(jnp.any(jnp.isnan(s)) for s, _ in sides.values()))
    if unset:
        raise ValueError(
            f"{WHO}: this call set no scale in {_named(unset)}: it does not reach them, or they got NaN (find it"
            " by lb.check_finite). Pass inputs that run these layers, or leave them out by a rule."
        )
    for path, (product, sides) in held.items():
        for side in sides:
            scale = _scale(product, side)
            scale.set_value(scales[path][side][0].astype(scale.get_value().dtype))
    return model


def refuse_traced(who: str, model: nnx.Module, *inputs: Any) -> None:
    """Raises ValueError inside of a transformation of the model or the inputs."""
    if any(isinstance(leaf, core.Tracer) for leaf in jax.tree.leaves((nnx.state(model), inputs))):
        raise ValueError(
            f"{who} got a model or inputs that are being traced (by nnx.jit, jax.vmap, jax.grad), and looks at the"
            " numbers that it finds. Call it outside of the transformation; it compiles the calls of the model itself."
        )


def _named(paths: list[str]) -> str:
    return ", ".join(map(repr, paths[:4])) + (", ..." if len(paths) > 4 else "")


def _held(model: nnx.Module) -> dict[str, tuple[StatefulProduct, tuple[str, ...]]]:
    """Products that hold a scale to fit, with its sides, by path of the layer."""
    normed, held = normed_layers(model), {}
    for layer, paths in modules(model):
        product = getattr(layer, attribute_of(layer), None) if layer_type(layer) else None
        if isinstance(product, StatefulProduct):
            wanted = ("lhs", "rhs") if paths[0] in normed else ("lhs",)
            if sides := tuple(side for side in wanted if hasattr(product, f"{side}_scale")):
                held[paths[0]] = product, sides
    return held


def _scale(product: StatefulProduct, side: str) -> nnx.Variable:
    return vars(product)[f"{side}_scale"]


def _scales_of_call(
    model: nnx.Module, args: tuple, kwargs: dict[str, Any]
) -> dict[str, dict[str, tuple[Array, Array]]]:
    """What one compiled call of a copy sets and how often, so that statistics, keys and weights stay as they are; NaN
    where it sets nothing."""
    graph, state = nnx.split(model)
    arrays, call = split_arrays(WHO, args, kwargs)

    @jax.jit
    def run(state: Any, arrays: list) -> dict[str, dict[str, tuple[Array, Array]]]:
        copy = nnx.merge(graph, state)
        held = _held(copy)
        for path, (product, sides) in held.items():
            for side in sides:
                product.start_calibration(side, path)
        call(copy, arrays)
        return {path: {s: product.calibrated(s) for s in sides} for path, (product, sides) in held.items()}

    return run(state, arrays)


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A call of a model without its arrays, what else it is given staying as it is; hashable where that is.

    others: the leaves in the order of the tree, None for each array."""

    who: str
    tree: Any  # a PyTreeDef
    others: tuple[Any, ...]

    def __call__(self, model: Any, arrays: list) -> Any:
        rest = iter(arrays)
        args, kwargs = self.tree.unflatten([next(rest) if leaf is None else leaf for leaf in self.others])
        try:
            return model(*args, **kwargs)
        except TraceContextError as error:
            raise closed_over(self.who, "a layer") from error


def split_arrays(who: str, args: tuple, kwargs: dict[str, Any]) -> tuple[list, Call]:
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = lambda leaf: hasattr(leaf, "dtype") and hasattr(leaf, "shape")
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    return arrays, Call(who, tree, tuple(None if is_array(leaf) else leaf for leaf in leaves))
