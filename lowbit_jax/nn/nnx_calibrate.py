"""NNX: learned activation scales from one batch."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit_jax.nn.nnx import StatefulProduct, attribute_of, layer_type, modules


def calibrate(model: nnx.Module, *args: Any, **kwargs: Any) -> nnx.Module:
    """Sets the scales in place and returns the model; see `lb.calibrate`."""
    held = {}
    for layer, paths in modules(model):
        product = getattr(layer, attribute_of(layer)) if layer_type(layer) else None
        if isinstance(product, StatefulProduct) and hasattr(product, "lhs_scale"):
            held[paths[0]] = product
    if not held:
        raise ValueError(
            "lb.calibrate: no activation scale is learned here. Quantize with a method that learns it, such as"
            " lb.methods.get('lsq', bits=4); the others read their scales off each batch."
        )
    before = {path: product.lhs_scale.get_value() for path, product in held.items()}
    for product in held.values():
        product.lhs_scale.set_value(jnp.full_like(product.lhs_scale.get_value(), jnp.nan))
        product.calibrating = True
    try:
        _call(model, args, kwargs)
    finally:
        for path, product in held.items():
            product.calibrating = False
            scale = product.lhs_scale.get_value()
            product.lhs_scale.set_value(jnp.where(jnp.isnan(scale), before[path], scale))
            before[path] = jnp.isnan(scale)
    missed = sorted(path for path, unset in before.items() if bool(jnp.any(unset)))
    if missed:
        raise ValueError(
            f"lb.calibrate: this call set no scale in {', '.join(map(repr, missed[:4]))}: it does not reach them,"
            " they got NaN,"
            " or a plain jax.lax.scan or jax.jit inside the model loses what a layer writes (nnx.scan and nnx.jit"
            " keep it)."
        )
    return model


def _call(model: nnx.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """One compiled call; what is no array is not traced."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [hasattr(leaf, "dtype") and hasattr(leaf, "shape") for leaf in leaves]

    @nnx.jit
    def run(model: nnx.Module, given: list) -> Any:
        filled = [g if a else leaf for g, a, leaf in zip(given, is_array, leaves, strict=True)]
        args, kwargs = tree.unflatten(filled)
        return model(*args, **kwargs)

    run(model, [leaf if a else None for leaf, a in zip(leaves, is_array, strict=True)])
