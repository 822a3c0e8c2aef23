"""A product, and its gradients, that multiply grid values as codes: int8 (`ops.int8`, `ops.int8_kernel`) or FP8
(`ops.fp8`).

    y = s_x s_w sum_k e_x e_w      e on the grid, s one a row or one a tensor

What is kept are codes, scales and what the estimators need, and an operand itself where its backward product quantizes
it anew.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax import rounding
from lowbit_jax.estimators.base import no_cotangent
from lowbit_jax.formats.base import Format
from lowbit_jax.ops import backend, fp8, int8, int8_kernel
from lowbit_jax.ops.coder import Coder
from lowbit_jax.ops.once import once_differentiable
from lowbit_jax.ops.product import Dims, Forward, original_operands, plain_gradients, product_gradients
from lowbit_jax.ops.recipe import FORWARD, LinearRecipe
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling.fit import reciprocal

_CODERS: tuple[Coder, ...] = (int8, int8_kernel, fp8)


def coder_of(
    recipe: LinearRecipe, forward: Forward, lhs: Array, rhs: Array, rhs_scale: Array | None, rotated: bool
) -> Coder | None:
    """What multiplies the operands' codes here, if their scales leave the sum and it is faster; where the recipe asks
    for kernels by name, the one whose product is a kernel. rhs_scale: of a weight that came quantized."""
    if recipe.implementation == "reference" or (recipe.rhs_ready and rhs_scale is None):
        return None
    if recipe.implementation != "auto":
        quantizers, numbers = recipe.forward_quantizers, forward.dims.numbers
        held = forward.out_sharding is None and all(int8_kernel.holds(q, rotated) for q in quantizers)
        if held and int8_kernel.computes(lhs.shape, rhs.shape, _formats(*quantizers), numbers):
            return int8_kernel
        return None
    return _coder(recipe.forward_quantizers, forward, lhs.shape, rhs.shape, rotated)


def coder_of_packed(recipe: LinearRecipe, forward: Forward, lhs: Array, rhs: QTensor, rotated: bool) -> Coder | None:
    """The same for a weight that is packed already."""
    return _coder((recipe.forward_quantizers[0], rhs.quantizer), forward, lhs.shape, rhs.shape, rotated)


def _coder(quantizers, forward: Forward, lhs: tuple[int, ...], rhs: tuple[int, ...], rotated: bool) -> Coder | None:
    if forward.out_sharding is not None:
        return None
    for coder in _CODERS:
        if not all(coder.holds(q, rotated) for q in quantizers):
            continue
        if coder.multiplies(lhs, rhs, _formats(*quantizers), forward.dims.numbers):
            return coder
    return None


def packed_product(coder: Coder, recipe: LinearRecipe, forward: Forward, lhs: Array, rhs: QTensor, key: Any) -> Array:
    """The product with a packed weight that `coder_of_packed` has a coder for, without gradients."""
    (x_format, fmt), dims = _formats(recipe.forward_quantizers[0], rhs.quantizer), forward.dims
    quantizer = recipe.forward_quantizers[0]
    assert quantizer is not None
    a, a_scale, _ = quantizer.factors(lhs, axis=dims.lhs, key=key)
    last = lambda x: jnp.moveaxis(x, dims.rhs, -1)  # as the codes lie
    b, b_scale = coder.encode(last(rhs.elements()), fmt), last(rhs.quantizer.scale_format.load(rhs.scales))
    turned = Dims(dims.lhs, rhs.ndim - 1, dims.lhs_batch, tuple(axis - (axis > dims.rhs) for axis in dims.rhs_batch))
    rows = dataclasses.replace(forward, dims=turned)
    return scaled_product(coder, rows, (coder.encode(a, x_format), a_scale, x_format), (b, b_scale, fmt))


def _formats(*quantizers: Quantizer | None) -> tuple[Format, Format]:
    """The grids of what `factors` answers, of operands that a coder holds."""
    lhs, rhs = (q.element_format if q is not None else None for q in quantizers)
    assert lhs is not None and rhs is not None, "`Coder.holds` says so of others"
    return lhs, rhs


def coded_product(
    coder: Coder,
    forward: Forward,
    recipe: LinearRecipe,
    lhs: Float[Array, "*lhs"],
    rhs: Float[Array, "*rhs"],
    rhs_scale: Float[Array, "*#rhs"] | None,
    rotated: bool,
    keys: tuple[Any, Any, Any],
) -> Float[Array, "*out"]:
    """The product that `coder_of` has a coder for. keys: for the roundings of lhs, of rhs and of the backward."""
    q_lhs, q_rhs = recipe.forward_quantizers
    assert q_lhs is not None and q_rhs is not None
    a = cast(Any, _operand(q_lhs, forward.dims.lhs, lhs, keys[0]))  # `jax.custom_vjp` hides the type
    if rhs_scale is None:
        b = cast(Any, _operand(q_rhs, forward.dims.rhs, rhs, keys[1]))
    else:
        b = cast(Any, _ready(_formats(q_lhs, q_rhs)[1], rhs, rhs_scale))
    others = original_operands(lhs, rhs, forward.dims, recipe, rotated)
    return cast(Array, _product(coder, forward, recipe, jnp.dtype(lhs.dtype), a, b, others, keys[2]))


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ready(fmt: Format, x_hat: Float[Array, "*s"], scale: Array) -> tuple[Array, Array]:
    """Grid values and scales of an operand that came quantized, whose cotangent is that of their product."""
    return rounding.nearest(x_hat.astype(jnp.float32) * reciprocal(scale), fmt), scale


def _ready_forward(fmt, x_hat, scale):
    x_hat = once_differentiable(x_hat)
    return _ready(fmt, x_hat, scale), (np.zeros((0,), x_hat.dtype), scale)


def _ready_backward(fmt, saved, g):
    like, scale = saved
    return lax.convert_element_type(g[0], like.dtype), jnp.zeros_like(scale)


_ready.defvjp(_ready_forward, _ready_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _product(coder, forward, recipe, dtype, a, b, others, key):
    return _kept_forward(coder, forward, recipe, a, b)[0]


def _forward(coder, forward, recipe, dtype, a, b, others, key):
    y, kept = _kept_forward(coder, forward, recipe, *once_differentiable((a, b)))
    return y, (*kept, others, key)


def _kept_forward(coder, forward, recipe, a, b):
    formats = _formats(*recipe.forward_quantizers)
    (a, a_scale), (b, b_scale) = ((coder.encode(x, fmt), s) for (x, s), fmt in zip((a, b), formats, strict=True))
    sides = (a, a_scale, formats[0]), (b, b_scale, formats[1])
    y = scaled_product(coder, forward, *sides, recipe.implementation)
    return y, ((a, a_scale), (b, b_scale))


def _backward(coder, forward, recipe, dtype, saved, g):
    a, b, others, key = saved
    formats = _formats(*recipe.forward_quantizers)
    a_hat, b_hat = (_value(coder, x, scale, fmt, dtype) for (x, scale), fmt in zip((a, b), formats, strict=True))
    if recipe.plain_backward:
        found = plain_gradients(forward, a_hat, b_hat, g)
    else:
        others = tuple(
            coded if gemm_side == FORWARD else other
            for coded, other, gemm_side in zip((a, b), others, (recipe.grad_rhs.lhs, recipe.grad_lhs.rhs), strict=True)
        )
        found = product_gradients(forward, recipe, a_hat, b_hat, others, key, g, coder)
    da, db = (lax.convert_element_type(x, jnp.float32) for x in found)
    return (da, jnp.zeros_like(a[1])), (db, jnp.zeros_like(b[1])), None, no_cotangent(key)


def _value(coder: Coder, codes: Array, scale: Array, fmt: Format, dtype: Any) -> Array:
    values = coder.decode(codes, fmt)
    spread = lax.broadcast_in_dim(scale, values.shape, range(values.ndim))
    return lax.convert_element_type(lax.mul(values, spread), dtype)


_product.defvjp(_forward, _backward)


Coded = tuple[Array, Float[Array, "*#s"], Format]
"""Codes, scales and format of an operand."""


def scaled_product(
    coder: Coder, forward: Forward, lhs: Coded, rhs: Coded, implementation: str = "auto"
) -> Float[Array, "*out"]:
    """The product of coded operands. implementation: that of a kernel."""
    dims, (a, a_scale, a_format), (b, b_scale, b_format) = forward.dims, lhs, rhs
    if coder is int8_kernel:
        free = [x.shape[i] for x, side in ((a, "lhs"), (b, "rhs")) for i in dims.free(side, x.ndim)]
        y = int8_kernel.scaled_matrix(
            (a, a_scale),
            (b, b_scale),
            (a_format, b_format),
            dims.numbers,
            _kernel_dtype(forward.out_dtype),
            implementation,
        )
        return lax.convert_element_type(y.reshape(free), forward.out_dtype)
    y = coder.product(a, b, (a_format, b_format), dims.numbers, forward.precision)
    along = [
        lax.broadcast_in_dim(_squeezed(dims, side, scale), y.shape, _places(dims, side, a.ndim, b.ndim))
        for side, scale in (("lhs", a_scale), ("rhs", b_scale))
    ]
    # The smaller first: what lies between is then the result's magnitude or nearer to 1, however large or small both.
    y = lax.mul(lax.mul(y, lax.min(*along)), lax.max(*along))
    return lax.convert_element_type(y, forward.out_dtype)


def _kernel_dtype(out_dtype: Any) -> Any:
    """A dtype that kernels return."""
    return out_dtype if backend.why_not_dtype("the result", out_dtype) is None else jnp.float32


def _squeezed(dims: Dims, side: str, x: Array) -> Array:
    """Batch and free axes of an array with one entry along the contraction."""
    contracted, batch = (dims.lhs, dims.lhs_batch) if side == "lhs" else (dims.rhs, dims.rhs_batch)
    return lax.squeeze(lax.transpose(x, (*batch, *dims.free(side, x.ndim), contracted)), [x.ndim - 1])


def _places(dims: Dims, side: str, lhs_ndim: int, rhs_ndim: int) -> list[int]:
    """Where those axes lie in the product."""
    batch = len(dims.lhs_batch)
    free, skipped = (lhs_ndim - batch - 1, 0) if side == "lhs" else (rhs_ndim - batch - 1, lhs_ndim - batch - 1)
    return [*range(batch), *range(batch + skipped, batch + skipped + free)]
