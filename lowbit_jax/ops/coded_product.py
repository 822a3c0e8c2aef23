"""A product, and its gradients, whose forward multiplies grid values as int8 (`ops.int8`).

    y = s_x s_w sum_k e_x e_w      e on the grid, s one a row or one a tensor

What is kept are integers, scales and what the estimators need.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8

from lowbit_jax.estimators.base import no_cotangent
from lowbit_jax.formats.base import Format
from lowbit_jax.ops import int8
from lowbit_jax.ops.once import once_differentiable
from lowbit_jax.ops.product import Dims, Forward, plain_gradients, product_gradients
from lowbit_jax.ops.recipe import FORWARD, LinearRecipe
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer


def serves(recipe: LinearRecipe, forward: Forward, lhs: Array, rhs: Array, rotated: bool) -> bool:
    """Whether the operands' scales leave the sum and int8 is faster; the backward products read quantized operands."""
    quantizers = recipe.forward_quantizers
    reused = recipe.grad_lhs.rhs == FORWARD and recipe.grad_rhs.lhs == FORWARD
    if recipe.implementation != "auto" or recipe.rhs_ready or not reused:
        return False
    return all(int8.makes_int8(q, rotated) for q in quantizers) and _fits(forward, lhs, rhs, quantizers)


def serves_packed(recipe: LinearRecipe, forward: Forward, lhs: Array, rhs: QTensor, rotated: bool) -> bool:
    """The same for a weight that is packed already."""
    x, w = recipe.forward_quantizers[0], rhs.quantizer
    return int8.makes_int8(x, rotated) and int8.makes_int8(w, rotated) and _fits(forward, lhs, rhs, (x, w))


def packed_product(recipe: LinearRecipe, forward: Forward, lhs: Array, rhs: QTensor, key: Any) -> Array:
    """The product with a packed weight that `serves_packed` accepts, without gradients."""
    (x_format, fmt), dims = _formats(recipe.forward_quantizers[0], rhs.quantizer), forward.dims
    quantizer = recipe.forward_quantizers[0]
    assert quantizer is not None
    a, a_scale, _ = quantizer.factors(lhs, axis=dims.lhs, key=key)
    last = lambda x: jnp.moveaxis(x, dims.rhs, -1)  # as the codes lie
    b, b_scale = int8.to_int8(last(rhs.elements()), fmt), last(rhs.quantizer.scale_format.load(rhs.scales))
    turned = Dims(dims.lhs, rhs.ndim - 1, dims.lhs_batch, tuple(axis - (axis > dims.rhs) for axis in dims.rhs_batch))
    rows = dataclasses.replace(forward, dims=turned)
    return scaled_product(rows, (int8.to_int8(a, x_format), a_scale, x_format), (b, b_scale, fmt))


def _formats(*quantizers: Quantizer | None) -> tuple[Format, Format]:
    """The grids of what `factors` answers, of operands that int8 holds."""
    lhs, rhs = (q.element_format if q is not None else None for q in quantizers)
    assert lhs is not None and rhs is not None, "`int8.makes_int8` says so of others"
    return lhs, rhs


def _fits(forward: Forward, lhs: Array, rhs: Any, quantizers: tuple[Quantizer | None, Quantizer | None]) -> bool:
    formats = _formats(*quantizers)
    return forward.out_sharding is None and int8.multiplies(lhs.shape, rhs.shape, formats, forward.dims.numbers)


def coded_product(
    forward: Forward,
    recipe: LinearRecipe,
    lhs: Float[Array, "*lhs"],
    rhs: Float[Array, "*rhs"],
    keys: tuple[Any, Any, Any],
) -> Float[Array, "*out"]:
    """The product that `serves` accepts. keys: for the roundings of lhs, of rhs and of the backward."""
    q_lhs, q_rhs = recipe.forward_quantizers
    assert q_lhs is not None and q_rhs is not None
    a = cast(Any, _operand(q_lhs, forward.dims.lhs, lhs, keys[0]))  # `jax.custom_vjp` hides the type
    b = cast(Any, _operand(q_rhs, forward.dims.rhs, rhs, keys[1]))
    return cast(Array, _product(forward, recipe, jnp.dtype(lhs.dtype), a, b, keys[2]))


# Operands have rules of their own, beside that of the product, so that under `jax.vmap` the gradient of a weight that
# all share is summed before it is masked and rotated.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _operand(quantizer: Quantizer, axis: int, x: Float[Array, "*s"], key: Any) -> tuple[Array, Array]:
    """Grid values and scales; the cotangent of the grid values is that of their product."""
    return quantizer.factors(x, axis=axis, key=key)[:2]


def _operand_forward(quantizer, axis, x, key):
    values, scale, kept = quantizer.factors(once_differentiable(x), axis=axis, key=key)
    return (values, scale), (kept, np.zeros((0,), x.dtype), key)


def _operand_backward(quantizer, axis, saved, g):
    kept, like, key = saved
    dx = quantizer.pull_back(kept, g[0], axis=axis)
    return lax.convert_element_type(dx, like.dtype), no_cotangent(key)


_operand.defvjp(_operand_forward, _operand_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(forward, recipe, dtype, a, b, key):
    return _kept_forward(forward, recipe, a, b, key)[0]


def _forward(forward, recipe, dtype, a, b, key):
    a, b = once_differentiable((a, b))
    return _kept_forward(forward, recipe, a, b, key)


def _kept_forward(forward, recipe, a, b, key):
    formats = _formats(*recipe.forward_quantizers)
    (a, a_scale), (b, b_scale) = ((int8.to_int8(x, fmt), s) for (x, s), fmt in zip((a, b), formats, strict=True))
    y = scaled_product(forward, (a, a_scale, formats[0]), (b, b_scale, formats[1]))
    return y, ((a, a_scale), (b, b_scale), key)


def _backward(forward, recipe, dtype, saved, g):
    a, b, key = saved
    formats = _formats(*recipe.forward_quantizers)
    a_hat, b_hat = (_value(x, scale, fmt, dtype) for (x, scale), fmt in zip((a, b), formats, strict=True))
    if recipe.plain_backward:
        found = plain_gradients(forward, a_hat, b_hat, g)
    else:
        found = product_gradients(forward, recipe, a_hat, b_hat, (a, b), key, g)
    da, db = (lax.convert_element_type(x, jnp.float32) for x in found)
    return (da, jnp.zeros_like(a[1])), (db, jnp.zeros_like(b[1])), no_cotangent(key)


def _value(integers: Array, scale: Array, fmt: Format, dtype: Any) -> Array:
    values = int8.from_int8(integers, fmt)
    spread = lax.broadcast_in_dim(scale, values.shape, range(values.ndim))
    return lax.convert_element_type(lax.mul(values, spread), dtype)


_product.defvjp(_forward, _backward)


Coded = tuple[Int8[Array, "*s"], Float[Array, "*#s"], Format]
"""Integers, scales and format of an operand."""


def scaled_product(forward: Forward, lhs: Coded, rhs: Coded) -> Float[Array, "*out"]:
    """The product of coded operands."""
    dims, (a, a_scale, a_format), (b, b_scale, b_format) = forward.dims, lhs, rhs
    y = int8.product(a, b, (a_format, b_format), dims.numbers)
    along = [
        lax.broadcast_in_dim(_squeezed(dims, side, scale), y.shape, _places(dims, side, a.ndim, b.ndim))
        for side, scale in (("lhs", a_scale), ("rhs", b_scale))
    ]
    scales = lax.mul(*along)  # first, as one operand may be as large as the other is small
    return lax.convert_element_type(lax.mul(y, scales), forward.out_dtype)


def _squeezed(dims: Dims, side: str, x: Array) -> Array:
    """Batch and free axes of an array with one entry along the contraction."""
    contracted, batch = (dims.lhs, dims.lhs_batch) if side == "lhs" else (dims.rhs, dims.rhs_batch)
    return lax.squeeze(lax.transpose(x, (*batch, *dims.free(side, x.ndim), contracted)), [x.ndim - 1])


def _places(dims: Dims, side: str, lhs_ndim: int, rhs_ndim: int) -> list[int]:
    """Where those axes lie in the product."""
    batch = len(dims.lhs_batch)
    free, skipped = (lhs_ndim - batch - 1, 0) if side == "lhs" else (rhs_ndim - batch - 1, lhs_ndim - batch - 1)
    return [*range(batch), *range(batch + skipped, batch + skipped + free)]
