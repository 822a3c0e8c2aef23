"""QuEST's training product on the integer tensor cores: a fused kernel quantizes each operand, codes are multiplied.

    y = s_x s_w sum_k (c_x + o)(c_w + o)      o is 1/2 on mid-rise grids and 0 on integer ones

The sums are exact. What is kept for the backward are the codes (packed when they have 4 bits or fewer), the scales and
one bit an element that says whether its gradient passes: a quarter to a half of what 16-bit operands take. The backward
products multiply the cotangent by the codes' values in 16 bits or, where the recipe folds the codes' scales into a
quantized cotangent, codes by codes again; then mask and rotate back.

The codes of a weight that came quantized (`rhs_ready`) are its values over its scales; without these the activation
alone goes through the kernels, and the products are XLA's, in 16 bits.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int8

from lowbit_jax import rounding
from lowbit_jax.estimators import Trust
from lowbit_jax.formats.base import IntFormat, MidRiseFormat
from lowbit_jax.formats.catalogue import INT8
from lowbit_jax.ops import backend
from lowbit_jax.ops.once import once_differentiable
from lowbit_jax.ops.packed_product import fused_options
from lowbit_jax.ops.product import Forward
from lowbit_jax.ops.recipe import FORWARD, Gemm, LinearRecipe
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import FLOAT32, PerRow, absmax
from lowbit_jax.scaling.fit import reciprocal

_PACK_UP_TO = 4  # bits; wider codes are kept as int8
_TERMS = backend.LONGEST_INT8


@dataclasses.dataclass(frozen=True, slots=True)
class IntegerProduct:
    """One training product by fused kernels; hashable."""

    forward: Forward
    recipe: LinearRecipe

    def __call__(
        self, lhs: Float[Array, "*lhs"], rhs: Float[Array, "*rhs"], rhs_scale: Array | None = None
    ) -> Float[Array, "*out"]:
        """rhs_scale: of a weight that came quantized."""
        return _through(self, lhs, rhs, rhs_scale)


def why_not(
    recipe: LinearRecipe, forward: Forward, lhs: Array, rhs: Array, rhs_scale: Array | None = None
) -> str | None:
    """Why the fused kernels do not do this product; None when they do. rhs_scale: of a weight that came quantized."""
    in_floats = recipe.rhs_ready and rhs_scale is None
    q_lhs, q_rhs = recipe.out.lhs, recipe.out.rhs
    if not backend.available():
        return "the package pallas_kernels is not installed"
    if not isinstance(q_lhs, Quantizer) or not isinstance(q_rhs, Quantizer):
        return "one operand is in high precision"
    if q_lhs.rotation != q_rhs.rotation:
        return "the operands are rotated differently"
    sides = [(q_lhs, lhs, forward.dims.lhs), (q_rhs, rhs, forward.dims.rhs)]
    for q, x, axis in sides[:1] if in_floats else sides:
        if fused_options(q, x.shape[axis]) is None:
            return f"the kernel quantizes to uniform grids by rms for rows of a multiple of 128, not {q.explain()}"
        if not isinstance(q.estimator, Trust) or q.estimator.limits(q.format)[0] != -q.estimator.limits(q.format)[1]:
            return "its gradients are not by the trust estimator with one limit for both signs"
    if in_floats and not recipe.plain_backward:
        return "its backward products are quantized, and the weight was before, so that its codes are not at hand"
    for gemm, plain in ((recipe.grad_lhs, Gemm(rhs=FORWARD)), (recipe.grad_rhs, Gemm(lhs=FORWARD))):
        if gemm != plain and not (gemm.fold and _to_int8(gemm.folded)):
            return "its backward products are quantized, and not by rows of int8 with the other scales folded in"
    if forward.dims.lhs_batch or forward.dims.rhs_batch:
        return "it has batch axes"
    if forward.out_sharding is not None:
        return "it asks for an output sharding"
    if lhs.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the activation is {lhs.dtype}, and integer products serve bfloat16 and float16"
    if not in_floats and (reason := backend.why_not_dtype("the weight", rhs.dtype)):
        return reason
    if not in_floats and (reason := backend.why_not_dtype("the result", forward.out_dtype)):
        return reason
    if not lhs.size or not rhs.size:
        return "an operand is empty"
    return _too_large(lhs.shape[forward.dims.lhs], lhs, rhs)


def _too_large(length: int, lhs: Array, rhs: Array) -> str | None:
    rows, columns = lhs.size // length, rhs.size // length
    if length > _TERMS:
        return f"a sum of {length} products of int8 could overflow int32"
    most = max(rows * columns, max(rows, columns) * -(-length // 256) * 256)
    return (
        f"a matrix has {most} elements, and the kernels count up to {backend.MOST_ELEMENTS}"
        if most > backend.MOST_ELEMENTS
        else None
    )


def _to_int8(quantizer: Any) -> bool:
    """Whether a cotangent through this quantizer is int8 codes with one scale a row, decided without a key."""
    if not isinstance(quantizer, Quantizer) or not isinstance(quantizer.format, IntFormat):
        return False
    whole_rows = isinstance(quantizer.tiling, PerRow) and quantizer.rotation is None and quantizer.sparsity is None
    plain = quantizer.scale_format == FLOAT32 and quantizer.rounding is rounding.nearest and not quantizer.learned
    return whole_rows and plain and -128 <= quantizer.format.low and quantizer.format.high <= 127


class _Kept(NamedTuple):
    """An operand in the backward. codes: words up to 4 bits, else int8, as are those of a weight that came quantized;
    both [rows, length]. mask: trust bits, None for such a weight."""

    codes: Any
    scales: Float[Array, "rows"]
    mask: Int8[Array, "blocks rows 32"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(product, lhs, rhs, rhs_scale):
    return _kept_forward(product, lhs, rhs, rhs_scale)[0]


def _forward(product, lhs, rhs, rhs_scale):
    lhs, rhs = once_differentiable((lhs, rhs))
    y, kept = _kept_forward(product, lhs, rhs, rhs_scale)
    return y, (*kept, rhs_scale)


def _kept_forward(product, lhs, rhs, rhs_scale):
    dims, out, out_dtype = product.forward.dims, product.recipe.out, product.forward.out_dtype
    x, x_kept = _quantized(product.recipe, out.lhs, _rows(lhs, dims.lhs))
    if product.recipe.rhs_ready and rhs_scale is None:
        w_kept = rhs.astype(lhs.dtype)
        x_hat = _values(x_kept, out.lhs, x.codes.shape, lhs.dtype)
        lhs_hat = _array(x_hat, lhs.shape, dims.lhs, 1)
        y = product.forward(lhs_hat, w_kept)
    else:
        if rhs_scale is None:
            w, w_kept = _quantized(product.recipe, out.rhs, _rows(rhs, dims.rhs))
        else:
            w, w_kept = _coded(out.rhs, _rows(rhs, dims.rhs), jnp.moveaxis(rhs_scale, dims.rhs, -1).reshape(-1))
        multiply = functools.partial(
            backend.matmul_i8, x_offset=_offset(out.lhs), w_offset=_offset(out.rhs), out_dtype=out_dtype
        )
        y = _run(product.recipe, multiply, x.codes, w.codes, x.scales, w.scales, x.sums, w.sums)
    free = [lhs.shape[a] for a in dims.free("lhs", lhs.ndim)] + [rhs.shape[a] for a in dims.free("rhs", rhs.ndim)]
    like = jnp.zeros((0, *lhs.shape), lhs.dtype), jnp.zeros((0, *rhs.shape), rhs.dtype)  # shapes and dtypes, no bytes
    return y.reshape(free), (x_kept, w_kept, like)


def _backward(product, saved, g):
    x, w, (lhs, rhs), rhs_scale = saved
    dims, recipe, dtype = product.forward.dims, product.recipe, lhs.dtype
    lhs_shape, rhs_shape = lhs.shape[1:], rhs.shape[1:]
    length = lhs_shape[dims.lhs]
    m, n = math.prod(lhs_shape) // length, math.prod(rhs_shape) // length
    g = once_differentiable(g).reshape(m, n)
    exact = functools.partial(lax.dot_general, precision=product.forward.precision)
    both = _both_ways(recipe, g, x, w) if recipe.grad_lhs.fold and recipe.grad_rhs.fold else None
    if recipe.rhs_ready and rhs_scale is None:
        w_hat = jnp.moveaxis(w, dims.rhs, -1).reshape(n, length)
        dx = exact(g.astype(dtype), w_hat, (((1,), (0,)), ((), ())))
    elif recipe.grad_lhs.fold:
        codes, scales = both[0] if both else _int8(recipe.grad_lhs, g.astype(jnp.float32) * w.scales[None, :], axis=1)
        dx = _folded(recipe, codes, scales, w, recipe.out.rhs, (n, length), dtype)
    else:
        dx = exact(g.astype(dtype), _values(w, recipe.out.rhs, (n, length), dtype), (((1,), (0,)), ((), ())))
    if recipe.grad_rhs.fold:
        if both:
            codes, scales = both[1]
        else:
            codes, scales = _int8(recipe.grad_rhs, g.astype(jnp.float32) * x.scales[:, None], axis=0)
            codes = codes.T
        dw = _folded(recipe, codes, scales, x, recipe.out.lhs, (m, length), dtype)
    else:
        dw = exact(g.astype(dtype), _values(x, recipe.out.lhs, (m, length), dtype), (((0,), (0,)), ((), ())))
    at = _leads(lhs_shape, dims.lhs)
    dlhs = _array(_returned(recipe, recipe.out.lhs, dx, x.mask, dtype, at), lhs_shape, dims.lhs, at)
    none = None if rhs_scale is None else jnp.zeros_like(rhs_scale)
    if recipe.rhs_ready:
        return dlhs, _array(dw.astype(rhs.dtype), rhs_shape, dims.rhs, 1), none
    at = _leads(rhs_shape, dims.rhs)
    return dlhs, _array(_returned(recipe, recipe.out.rhs, dw, w.mask, rhs.dtype, at), rhs_shape, dims.rhs, at), none


_through.defvjp(_forward, _backward)


def _run(recipe: LinearRecipe, function: Any, *operands: Any) -> Any:
    return backend.choose(
        function, functools.partial(function, "xla"), *operands, implementation=recipe.implementation, why_not=None,
        who="lb.dot_general",
    )  # fmt: skip


def _quantized(recipe: LinearRecipe, quantizer: Quantizer, x: Float[Array, "m k"]) -> tuple[Any, _Kept]:
    """What the fused kernel makes of the rows of a matrix, and what of it is kept."""
    options = fused_options(quantizer, x.shape[1])
    assert options is not None and isinstance(quantizer.estimator, Trust)
    packed = options["bits"] <= _PACK_UP_TO
    trust = quantizer.estimator.limits(quantizer.format)[1]
    kernel = functools.partial(backend.hadamard_quantize, **options, trust=trust, packed=packed)
    made = _run(recipe, kernel, x)
    return made, _Kept(made.words if packed else made.codes, made.scales, made.mask)


class _Codes(NamedTuple):
    """What the fused kernel answers, as far as a product reads it."""

    codes: Int8[Array, "rows length"]
    scales: Float[Array, "rows"]
    sums: Any


def _coded(quantizer: Quantizer, w_hat: Float[Array, "n k"], scales: Float[Array, "n"]) -> tuple[_Codes, _Kept]:
    """The same of the rows of a weight that came quantized: its values over their scales are codes already."""
    codes = jnp.round(w_hat.astype(jnp.float32) * reciprocal(scales)[:, None] - _offset(quantizer)).astype(jnp.int8)
    return _Codes(codes, scales, jnp.sum(codes.astype(jnp.int32), axis=1)), _Kept(codes, scales, None)


def _returned(recipe: LinearRecipe, quantizer: Quantizer, g: Array, mask: Array, dtype: Any, axis: int) -> Array:
    options = fused_options(quantizer, g.shape[1])
    assert options is not None
    kernel = functools.partial(backend.hadamard_backward, block=options["block"], out_dtype=dtype, axis=axis)
    return _run(recipe, kernel, g, mask)


def _both_ways(recipe: LinearRecipe, g: Array, x: _Kept, w: _Kept) -> tuple[tuple, tuple] | None:
    """(codes, scales) of the cotangent's rows and of its columns, by the kernel that makes both, where both quantizers
    are its own; "auto" takes it where it was measured to be faster than XLA."""
    plain = Quantizer(format=INT8, tiling=PerRow(), fit=absmax)
    own = [dataclasses.replace(q, estimator=plain.estimator) == plain for q in
           (recipe.grad_lhs.folded, recipe.grad_rhs.folded) if isinstance(q, Quantizer)]  # fmt: skip
    asked = recipe.implementation != "auto" or backend.has_both_ways(g.shape[0], g.shape[1], g.dtype)
    if own != [True, True] or not asked:
        return None
    made = _run(recipe, backend.quantize_both_ways, g, w.scales, x.scales)
    return (made.rows, made.row_scales), (made.columns, made.column_scales)


def _int8(gemm: Gemm, g: Array, axis: int) -> tuple[Int8[Array, "m n"], Float[Array, "rows"]]:
    """Codes and scales of the cotangent. The codes lie as `g` does: XLA would rather transpose `g`, in float32."""
    assert isinstance(gemm.folded, Quantizer)
    values, scales = gemm.folded.elements(g, axis=axis)
    return with_layout_constraint(values.astype(jnp.int8), Layout(major_to_minor=(0, 1))), scales.reshape(-1)


def _folded(recipe, codes, scales, kept: _Kept, quantizer: Quantizer, shape: tuple[int, int], dtype: Any) -> Array:
    """scales[i] sum_j codes[i, j] e[j, k], e the grid values of the kept operand [J, K], in parts that int32 holds."""
    e, step, offset = _integers(kept, quantizer, shape)
    e = e.T  # the contraction is last on both sides, as the tensor cores take 8-bit operands
    steps = jnp.full((shape[1],), step, jnp.float32)
    multiply = functools.partial(backend.matmul_i8, x_offset=0.0, w_offset=offset)
    parts = -(-shape[0] // _TERMS)
    edges = np.linspace(0, shape[0], parts + 1).astype(int)
    total = None
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        c, part = codes[:, start:stop], functools.partial(multiply, out_dtype=dtype if parts == 1 else jnp.float32)
        sums = jnp.sum(c.astype(jnp.int32), axis=1) if offset else None
        y = _run(recipe, part, c, e[:, start:stop], scales, steps, sums, None)
        total = y if total is None else total + y
    assert total is not None
    return total.astype(dtype)


def _integers(kept: _Kept, quantizer: Quantizer, shape: tuple[int, int]) -> tuple[Array, float, float]:
    """(integers, step, offset) with step * (integer + offset) on the grid. Halves are doubled away where int8 has room,
    so that no sum of codes is needed."""
    codes, offset = _codes(kept, quantizer, shape), _offset(quantizer)
    if offset and quantizer.format.bits < 8:
        return codes * jnp.int8(2) + jnp.int8(1), 0.5, 0.0
    return codes, 1.0, offset


def _codes(kept: _Kept, quantizer: Quantizer, shape: tuple[int, int]) -> Int8[Array, "rows length"]:
    bits = quantizer.format.bits
    if not isinstance(kept.codes, tuple):
        return kept.codes
    return backend.unpack_planes(kept.codes, bits, *shape).astype(jnp.int8) - jnp.int8(1 << (bits - 1))


def _values(kept: _Kept, quantizer: Quantizer, shape: tuple[int, int], dtype: Any) -> Array:
    codes = _codes(kept, quantizer, shape).astype(jnp.float32)
    return ((codes + _offset(quantizer)) * kept.scales[:, None]).astype(dtype)


def _offset(quantizer: Quantizer) -> float:
    return 0.5 if isinstance(quantizer.format, MidRiseFormat) else 0.0


def _leads(shape: tuple[int, ...], axis: int) -> int:
    """Where a gradient's matrix has the contraction axis: 0 when it leads, so that nothing is moved, else 1."""
    return 0 if axis == 0 and len(shape) > 1 else 1


def _rows(x: Array, axis: int) -> Float[Array, "m k"]:
    """The array as a matrix whose contraction axis is last. A weight is transposed by XLA in the copy that takes it out
    of the stack of layers: the kernel then holds whole rows, where along columns it reads everything twice."""
    return jnp.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])


def _array(matrix: Array, shape: tuple[int, ...], axis: int, at: int) -> Array:
    """The way back from a matrix whose contraction axis is `at`."""
    if at == 0:
        return matrix.reshape(shape)
    free = [n for a, n in enumerate(shape) if a != axis]
    return jnp.moveaxis(matrix.reshape(*free, shape[axis]), -1, axis)
