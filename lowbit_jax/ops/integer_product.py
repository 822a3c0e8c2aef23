"""QuEST's training product on the integer tensor cores: a fused kernel quantizes each operand, codes are multiplied.

    y = s_x s_w sum_k (c_x + o)(c_w + o) = s_x s_w ( sum c_x c_w + o sum c_x + o sum c_w + K o^2 )

o is 1/2 on mid-rise grids and 0 on integer ones.

The sums are exact. What is kept for the backward are the codes (packed when they have 4 bits or fewer), the scales and
one bit an element that says whether its gradient passes: a quarter to a half of what 16-bit operands take. The backward
products multiply the cotangent by the codes' values in 16 bits, mask, and rotate back.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax.estimators import Trust
from lowbit_jax.formats.base import MidRiseFormat
from lowbit_jax.ops import backend
from lowbit_jax.ops.packed_product import fused_options
from lowbit_jax.ops.product import Forward
from lowbit_jax.ops.recipe import LinearRecipe
from lowbit_jax.quantizer import Quantizer

_PACK_UP_TO = 4  # bits; wider codes are kept as int8


@dataclasses.dataclass(frozen=True, slots=True)
class IntegerProduct:
    """One training product by fused kernels; hashable."""

    forward: Forward
    recipe: LinearRecipe

    def __call__(self, lhs: Float[Array, "*lhs"], rhs: Float[Array, "*rhs"]) -> Float[Array, "*out"]:
        return _through(self, lhs, rhs)


def why_not(recipe: LinearRecipe, forward: Forward, lhs: Array, rhs: Array) -> str | None:
    """Why the fused kernels do not do this product; None when they do."""
    q_lhs, q_rhs = recipe.out.lhs, recipe.out.rhs
    if recipe.rhs_ready:
        return "the weight was quantized before"
    if not isinstance(q_lhs, Quantizer) or not isinstance(q_rhs, Quantizer):
        return "one operand is in high precision"
    if q_lhs.rotation != q_rhs.rotation:
        return "the operands are rotated differently"
    for q, x, axis in ((q_lhs, lhs, forward.dims.lhs), (q_rhs, rhs, forward.dims.rhs)):
        if fused_options(q, x.shape[axis]) is None:
            return f"the kernel quantizes to uniform grids by rms for rows of a multiple of 128, not {q.explain()}"
        if not isinstance(q.estimator, Trust) or q.estimator.limits(q.format)[0] != -q.estimator.limits(q.format)[1]:
            return "its gradients are not by the trust estimator with one limit for both signs"
    if not recipe.plain_backward:
        return "its backward products are quantized"
    if forward.dims.lhs_batch or forward.dims.rhs_batch:
        return "it has batch axes"
    if forward.out_sharding is not None:
        return "it asks for an output sharding"
    if lhs.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the activation is {lhs.dtype}, and integer products serve bfloat16 and float16"
    return "an operand is empty" if not lhs.size or not rhs.size else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(product, lhs, rhs):
    return _forward(product, lhs, rhs)[0]


def _forward(product, lhs, rhs):
    dims, out = product.forward.dims, product.recipe.out
    rows = jnp.moveaxis(lhs, dims.lhs, -1).reshape(-1, lhs.shape[dims.lhs])
    columns = jnp.moveaxis(rhs, dims.rhs, 0).reshape(rhs.shape[dims.rhs], -1)
    x, x_scale, x_mask = _quantized(product.recipe, out.lhs, rows, axis=1)
    w, w_scale, w_mask = _quantized(product.recipe, out.rhs, columns, axis=0)
    sums = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32).astype(jnp.float32)
    x_offset, w_offset = _offset(out.lhs), _offset(out.rhs)
    side = lambda codes, offset: codes.astype(jnp.int32).sum(-1).astype(jnp.float32) * offset
    sums += side(x, w_offset)[:, None] + side(w, x_offset)[None, :] + x.shape[1] * x_offset * w_offset
    y = (sums * x_scale[:, None] * w_scale[None, :]).astype(product.forward.out_dtype)
    free = [lhs.shape[a] for a in dims.free("lhs", lhs.ndim)] + [rhs.shape[a] for a in dims.free("rhs", rhs.ndim)]
    kept = (_kept(x, out.lhs.format.bits), x_scale, x_mask), (_kept(w, out.rhs.format.bits), w_scale, w_mask)
    like = jnp.zeros((0, *lhs.shape), lhs.dtype), jnp.zeros((0, *rhs.shape), rhs.dtype)  # shapes and dtypes, no bytes
    return y.reshape(free), (kept, like)


def _backward(product, saved, g):
    (x_kept, w_kept), (lhs, rhs) = saved
    dims, out = product.forward.dims, product.recipe.out
    lhs_shape, rhs_shape = lhs.shape[1:], rhs.shape[1:]
    length = lhs_shape[dims.lhs]
    m, n = _count(lhs_shape, dims.lhs), _count(rhs_shape, dims.rhs)
    g = g.reshape(m, n).astype(lhs.dtype)
    x = _values(x_kept, out.lhs, m, length, lhs.dtype)
    w = _values(w_kept, out.rhs, n, length, lhs.dtype)
    precision = product.forward.precision
    dx = _returned(product.recipe, out.lhs, lax.dot(g, w, precision=precision), x_kept[2], lhs.dtype)
    dw = lax.dot_general(g, x, (((0,), (0,)), ((), ())), precision)
    dw = _returned(product.recipe, out.rhs, dw, w_kept[2], rhs.dtype)
    lhs_free = [n for a, n in enumerate(lhs_shape) if a != dims.lhs]
    rhs_free = [n for a, n in enumerate(rhs_shape) if a != dims.rhs]
    dlhs = jnp.moveaxis(dx.reshape(*lhs_free, length), -1, dims.lhs)
    return dlhs, jnp.moveaxis(dw.reshape(*rhs_free, length), -1, dims.rhs)


_through.defvjp(_forward, _backward)


def _run(recipe: LinearRecipe, function: Any, *operands: Array) -> Any:
    return backend.choose(
        function, functools.partial(function, "xla"), *operands, implementation=recipe.implementation, why_not=None,
        who="lb.dot_general",
    )  # fmt: skip


def _quantized(recipe: LinearRecipe, quantizer: Quantizer, x: Array, axis: int) -> tuple[Array, Array, Array]:
    options = fused_options(quantizer, x.shape[axis])
    assert options is not None and isinstance(quantizer.estimator, Trust)
    trust = quantizer.estimator.limits(quantizer.format)[1]
    return _run(recipe, functools.partial(backend.hadamard_quantize, **options, trust=trust, axis=axis), x)


def _returned(recipe: LinearRecipe, quantizer: Quantizer, g: Array, mask: Array, dtype: Any) -> Array:
    options = fused_options(quantizer, g.shape[1])
    assert options is not None
    return _run(recipe, functools.partial(backend.hadamard_backward, block=options["block"], out_dtype=dtype), g, mask)


def _kept(codes: Array, bits: int) -> Any:
    """What the backward keeps of the codes: packed words, or int8."""
    if bits > _PACK_UP_TO:
        return codes
    return backend.pack_planes((codes + jnp.int8(1 << (bits - 1))).astype(jnp.uint8), bits, 8)


def _values(kept: tuple, quantizer: Quantizer, rows: int, length: int, dtype: Any) -> Array:
    codes, scale, _ = kept
    bits = quantizer.format.bits
    if bits <= _PACK_UP_TO:
        codes = backend.unpack_planes(codes, bits, rows, length).astype(jnp.int8) - jnp.int8(1 << (bits - 1))
    return ((codes.astype(jnp.float32) + _offset(quantizer)) * scale[:, None]).astype(dtype)


def _offset(quantizer: Quantizer) -> float:
    return 0.5 if isinstance(quantizer.format, MidRiseFormat) else 0.0


def _count(shape: tuple[int, ...], contracted: int) -> int:
    total = 1
    for axis, size in enumerate(shape):
        total *= 1 if axis == contracted else size
    return total
