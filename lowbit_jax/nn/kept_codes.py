"""Quantized operands that a rematerialized layer keeps as packed codes instead of making them again.

Under `jax.checkpoint` with the policy `save_only_these_names(CODES)` each operand of a quantized product is kept as its
codes, its scales and what its estimator needs (for QuEST and clipped gradients a boolean an element): the backward
decodes them, and neither rotates, nor fits, nor rounds again.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from lowbit_jax.estimators.base import no_cotangent
from lowbit_jax.nn.nnx import PackedWeight, edited, hook, layer_type, modules, weight_of
from lowbit_jax.nn.product import Product
from lowbit_jax.nn.verbs import CODES
from lowbit_jax.ops import LinearRecipe
from lowbit_jax.ops.once import once_differentiable
from lowbit_jax.quantizer import Quantizer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KeptQuantizer(Quantizer):
    """The same values and gradients; what the backward pass reads has the name `CODES`."""

    @classmethod
    def of(cls, quantizer: Quantizer) -> "KeptQuantizer":
        return cls(**{f.name: getattr(quantizer, f.name) for f in dataclasses.fields(Quantizer)})

    @property
    def plain(self) -> Quantizer:
        return Quantizer(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Quantizer)})

    def in_rotated_space(self, x, *, axis=-1, key=None, scale=None):
        if not isinstance(axis, int):  # codes are packed along one axis
            return Quantizer.in_rotated_space(self, x, axis=axis, key=key, scale=scale)
        return _kept(self.plain, axis, x, scale, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kept(quantizer: Quantizer, axis: int, x: Array, scale: Array | None, key: Array | None) -> Array:
    return quantizer.in_rotated_space(x, axis=axis, key=key, scale=scale)


def _kept_forward(quantizer, axis, x, scale, key):
    x, scale = once_differentiable((x, scale))
    differentiable = lambda x, scale: quantizer.in_rotated_space(x, axis=axis, key=key, scale=scale)
    _, back = jax.vjp(differentiable, x, scale)
    packed = quantizer.quantize(x, axis=axis, key=key, scale=scale)
    packed, back = jax.tree.map(lambda leaf: checkpoint_name(leaf, CODES), (packed, back))
    return packed.values(jnp.float32), (back, key)


def _kept_backward(quantizer, axis, saved, g):
    back, key = saved
    return *back(g), no_cotangent(key)


_kept.defvjp(_kept_forward, _kept_backward)


def keep_codes(model: Any) -> Any:
    """See `lb.nn.keep_codes`."""
    found = {
        path: layer
        for layer, paths in modules(model)
        if layer_type(layer) is not None and not isinstance(weight_of(layer), PackedWeight)
        for path in paths
    }

    def change(layer: Any, _: Any) -> None:
        kind = layer_type(layer)
        assert kind is not None
        held: Any = getattr(layer, kind[1].attribute, None)
        if isinstance(held, Product):
            setattr(layer, kind[1].attribute, dataclasses.replace(held, recipe=kept_recipe(held.recipe)))
        elif hook(layer) is not None:  # beside its scales and keys
            held.product = dataclasses.replace(held.product, recipe=kept_recipe(held.product.recipe))
        elif isinstance(getattr(held, "product", None), Product):  # of a weight that it gathers itself
            product = dataclasses.replace(held.product, recipe=kept_recipe(held.product.recipe))
            setattr(layer, kind[1].attribute, dataclasses.replace(held, product=product))

    return edited(model, found, change)


def kept_recipe(recipe: LinearRecipe) -> LinearRecipe:
    change = lambda q: KeptQuantizer.of(q) if isinstance(q, Quantizer) else q
    out = dataclasses.replace(recipe.out, lhs=change(recipe.out.lhs), rhs=change(recipe.out.rhs))
    return dataclasses.replace(recipe, out=out)
