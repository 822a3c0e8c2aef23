"""NNX: learned scales from one batch, those of activations and of weights that a norm makes at every call."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lowbit_jax.nn.nnx import StatefulProduct, attribute_of, layer_type, modules, normed_layers


def calibrate(model: nnx.Module, *args: Any, **kwargs: Any) -> nnx.Module:
    """Sets the scales in place and returns the model; see `lb.calibrate`."""
    held = _held(model)
    if not held:
        raise ValueError(
            "lb.calibrate: no activation scale is learned here. Quantize with a method that learns it, such as"
            " lb.methods.get('lsq', bits=4); the others read their scales off each batch."
        )
    scales = _scales_of_call(model, args, kwargs)
    unset = lambda scale: bool(jnp.any(jnp.isnan(scale)))
    missed = sorted(path for path, new in scales.items() if any(map(unset, new.values())))
    if missed:
        raise ValueError(
            f"lb.calibrate: this call set no scale in {', '.join(map(repr, missed[:4]))}: it does not reach them, they"
            " got NaN, or a transformation loses what a layer writes: a plain jax.lax.scan or jax.jit inside the model"
            " (nnx.scan and nnx.jit keep it), or an nnx.scan that gets the layer with the axis None (give it"
            " nnx.StateAxes({lowbit_jax.nn.nnx.Scale: nnx.Carry, ...: None}))."
        )
    for path, (product, sides) in held.items():
        for side in sides:
            _scale(product, side).set_value(scales[path][side])
    return model


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


def _scales_of_call(model: nnx.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, dict[str, Array]]:
    """What one compiled call of a copy sets, so that statistics, keys and weights stay as they are; NaN where it sets
    nothing. What is no array is not traced."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [hasattr(leaf, "dtype") and hasattr(leaf, "shape") for leaf in leaves]
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: Any, given: list) -> dict[str, dict[str, Array]]:
        copy = nnx.merge(graph, state)
        held = _held(copy)
        for product, sides in held.values():
            for side in sides:
                product.start_calibration(side)
        filled = [g if a else leaf for g, a, leaf in zip(given, is_array, leaves, strict=True)]
        args, kwargs = tree.unflatten(filled)
        copy(*args, **kwargs)
        return {path: {s: product.calibrated(s) for s in sides} for path, (product, sides) in held.items()}

    return run(state, [leaf if a else None for leaf, a in zip(leaves, is_array, strict=True)])
