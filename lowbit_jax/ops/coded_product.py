"""A product, and its gradients, whose forward multiplies grid values as int8 (`ops.int8`).

    y = s_x s_w sum_k e_x e_w      e on the grid, s one a row or one a tensor

Both quantizers are inside: what is kept are integers, scales and what the estimators need.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int8

from lowbit_jax.formats.base import Format
from lowbit_jax.ops import int8
from lowbit_jax.ops.product import Dims, Forward, plain_gradients, product_gradients
from lowbit_jax.ops.recipe import FORWARD, LinearRecipe
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import PerRow, PerTensor


def serves(recipe: LinearRecipe, forward: Forward, lhs: Array, rhs: Array, rotated: bool) -> bool:
    """Whether the operands' scales leave the sum and int8 is faster; the backward products read quantized operands."""
    quantizers = recipe.forward_quantizers
    reused = recipe.grad_lhs.rhs == FORWARD and recipe.grad_rhs.lhs == FORWARD
    if recipe.implementation != "auto" or recipe.rhs_ready or not reused:
        return False
    return all(codes(q, rotated) for q in quantizers) and _fits(forward, lhs, rhs, quantizers)


def codes(quantizer: Quantizer | None, rotated: bool) -> bool:
    """Whether what this quantizer makes is int8 times a scale that leaves the sum. A learned scale stays finite where
    an element is NaN, which int8 cannot say."""
    if quantizer is None or quantizer.learned or (found := int8.grid(quantizer.format)) is None:
        return False
    own = type(quantizer).in_rotated_space is Quantizer.in_rotated_space  # a class with another one keeps it
    zero = quantizer.sparsity is None or found[1] == 0
    return own and zero and isinstance(quantizer.tiling, PerRow | PerTensor) and (rotated or not quantizer.rotation)


def serves_packed(recipe: LinearRecipe, forward: Forward, lhs: Array, rhs: QTensor, rotated: bool) -> bool:
    """The same for a weight that is packed already."""
    x, w = recipe.forward_quantizers[0], rhs.quantizer
    return codes(x, rotated) and codes(w, rotated) and _fits(forward, lhs, rhs, (x, w))


def packed_product(recipe: LinearRecipe, forward: Forward, lhs: Array, rhs: QTensor, key: Any) -> Array:
    """The product with a packed weight that `serves_packed` accepts, without gradients."""
    quantizer, fmt, dims = recipe.forward_quantizers[0], rhs.quantizer.format, forward.dims
    assert quantizer is not None
    a, a_scale, _ = quantizer.factors(lhs, axis=dims.lhs, key=key)
    last = lambda x: jnp.moveaxis(x, dims.rhs, -1)  # as the codes lie
    b, b_scale = int8.to_int8(last(rhs.elements()), fmt), last(rhs.quantizer.scale_format.load(rhs.scales))
    turned = Dims(dims.lhs, rhs.ndim - 1, dims.lhs_batch, tuple(axis - (axis > dims.rhs) for axis in dims.rhs_batch))
    rows = dataclasses.replace(forward, dims=turned)
    return scaled_product(rows, (int8.to_int8(a, quantizer.format), a_scale, quantizer.format), (b, b_scale, fmt))


def _fits(forward: Forward, lhs: Array, rhs: Any, quantizers: tuple[Quantizer | None, Quantizer | None]) -> bool:
    lhs_quantizer, rhs_quantizer = quantizers
    assert lhs_quantizer is not None and rhs_quantizer is not None
    formats = lhs_quantizer.format, rhs_quantizer.format
    return forward.out_sharding is None and int8.multiplies(lhs.shape, rhs.shape, formats, forward.dims.numbers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def coded_product(
    forward: Forward,
    recipe: LinearRecipe,
    lhs: Float[Array, "*lhs"],
    rhs: Float[Array, "*rhs"],
    keys: tuple[Any, Any, Any],
) -> Float[Array, "*out"]:
    """The product that `serves` accepts. keys: for the roundings of lhs, of rhs and of the backward."""
    return _forward(forward, recipe, lhs, rhs, keys)[0]


def _forward(forward, recipe, lhs, rhs, keys):
    (q_lhs, q_rhs), dims = recipe.forward_quantizers, forward.dims
    a, a_scale, a_kept = q_lhs.factors(lhs, axis=dims.lhs, key=keys[0])
    b, b_scale, b_kept = q_rhs.factors(rhs, axis=dims.rhs, key=keys[1])
    a, b = int8.to_int8(a, q_lhs.format), int8.to_int8(b, q_rhs.format)
    y = scaled_product(forward, (a, a_scale, q_lhs.format), (b, b_scale, q_rhs.format))
    like = np.zeros((0,), lhs.dtype), np.zeros((0,), rhs.dtype)
    return y, ((a, a_scale, a_kept), (b, b_scale, b_kept), like, keys)


Coded = tuple[Int8[Array, "*s"], Float[Array, "*#s"], Format]
"""Integers, scales and format of an operand."""


def scaled_product(forward: Forward, lhs: Coded, rhs: Coded) -> Float[Array, "*out"]:
    """The product of coded operands."""
    dims, (a, a_scale, a_format), (b, b_scale, b_format) = forward.dims, lhs, rhs
    y = int8.product(a, b, (a_format, b_format), dims.numbers)
    for side, scale in (("lhs", a_scale), ("rhs", b_scale)):
        along = lax.broadcast_in_dim(_squeezed(dims, side, scale), y.shape, _places(dims, side, a.ndim, b.ndim))
        y = lax.mul(y, along)
    return lax.convert_element_type(y, forward.out_dtype)


def _squeezed(dims: Dims, side: str, x: Array) -> Array:
    """Batch and free axes of an array with one entry along the contraction."""
    contracted, batch = (dims.lhs, dims.lhs_batch) if side == "lhs" else (dims.rhs, dims.rhs_batch)
    return lax.squeeze(lax.transpose(x, (*batch, *dims.free(side, x.ndim), contracted)), [x.ndim - 1])


def _places(dims: Dims, side: str, lhs_ndim: int, rhs_ndim: int) -> list[int]:
    """Where those axes lie in the product."""
    batch = len(dims.lhs_batch)
    free, skipped = (lhs_ndim - batch - 1, 0) if side == "lhs" else (rhs_ndim - batch - 1, lhs_ndim - batch - 1)
    return [*range(batch), *range(batch + skipped, batch + skipped + free)]


def _backward(forward, recipe, saved, g):
    (a, a_scale, a_kept), (b, b_scale, b_kept), (lhs, rhs), keys = saved
    (q_lhs, q_rhs), dims = recipe.forward_quantizers, forward.dims
    a_hat, b_hat = _value(a, a_scale, q_lhs.format, lhs.dtype), _value(b, b_scale, q_rhs.format, lhs.dtype)
    if recipe.plain_backward:
        da, db = plain_gradients(forward, a_hat, b_hat, g)
    else:
        others = (a, a_scale), (b, b_scale)
        da, db = product_gradients(forward, recipe, a_hat, b_hat, others, keys[2], g)
    no_keys = jax.tree.map(lambda key: np.zeros(key.shape, jax.dtypes.float0), keys)
    dlhs = q_lhs.pull_back(a_kept, da, axis=dims.lhs)
    drhs = q_rhs.pull_back(b_kept, db, axis=dims.rhs)
    return lax.convert_element_type(dlhs, lhs.dtype), lax.convert_element_type(drhs, rhs.dtype), no_keys


def _value(integers: Array, scale: Array, fmt: Format, dtype: Any) -> Array:
    values = int8.from_int8(integers, fmt)
    spread = lax.broadcast_in_dim(scale, values.shape, range(values.ndim))
    return lax.convert_element_type(lax.mul(values, spread), dtype)


coded_product.defvjp(_forward, _backward)
