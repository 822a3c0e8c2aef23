"""The three matrix products themselves: the forward, and backward products with quantized operands of their own."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax.estimators.base import no_cotangent
from lowbit_jax.formats.base import Format
from lowbit_jax.ops import backend
from lowbit_jax.ops.coder import Coder
from lowbit_jax.ops.merged import merge
from lowbit_jax.ops.once import once_differentiable
from lowbit_jax.ops.recipe import Gemm, LinearRecipe, Side
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import PerRow, PerTensor, absmax
from lowbit_jax.scaling.fit import reciprocal


@dataclasses.dataclass(frozen=True, slots=True)
class Dims:
    """Dimension numbers with one contraction axis on each side, non-negative."""

    lhs: int
    rhs: int
    lhs_batch: tuple[int, ...]
    rhs_batch: tuple[int, ...]

    @property
    def numbers(self):
        return ((self.lhs,), (self.rhs,)), (self.lhs_batch, self.rhs_batch)

    def free(self, side: str, ndim: int) -> tuple[int, ...]:
        """Axes of an operand that are neither contracted nor batched."""
        contracted, batch = (self.lhs, self.lhs_batch) if side == "lhs" else (self.rhs, self.rhs_batch)
        return tuple(a for a in range(ndim) if a != contracted and a not in batch)


@dataclasses.dataclass(frozen=True, slots=True)
class Forward:
    """`lax.dot_general` with everything but its operands settled; hashable."""

    dims: Dims
    precision: Any
    out_dtype: Any
    out_sharding: Any = None

    def __call__(self, lhs: Float[Array, "*lhs"], rhs: Float[Array, "*rhs"]) -> Float[Array, "*out"]:
        extra = {} if self.out_sharding is None else {"out_sharding": self.out_sharding}
        return lax.dot_general(lhs, rhs, self.dims.numbers, self.precision, self.out_dtype, **extra)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def plain_product(forward: Forward, lhs: Float[Array, "*lhs"], rhs: Float[Array, "*rhs"]) -> Float[Array, "*out"]:
    """`forward(lhs, rhs)` with the gradients of autodiff; on a CPU the weight's one is computed in a faster form."""
    return forward(lhs, rhs)


def _plain_forward(forward, lhs, rhs):
    return forward(lhs, rhs), (lhs, rhs)


def _plain_backward(forward, saved, g):
    lhs, rhs = saved
    return plain_gradients(forward, lhs, rhs, g)


plain_product.defvjp(_plain_forward, _plain_backward)


def plain_gradients(
    forward: Forward, lhs: Float[Array, "*lhs"], rhs: Float[Array, "*rhs"], g: Float[Array, "*out"]
) -> tuple[Float[Array, "*lhs"], Float[Array, "*rhs"]]:
    """Cotangents of both operands of `plain_product`."""
    (dlhs,) = jax.linear_transpose(lambda lhs: forward(lhs, rhs), lhs)(g)
    by_rule = lambda lhs, rhs, g: jax.linear_transpose(lambda rhs: forward(lhs, rhs), rhs)(g)[0]
    dims = forward.dims
    simple = not dims.lhs_batch and dims.lhs == lhs.ndim - 1 and lhs.dtype == rhs.dtype == g.dtype == jnp.float32
    if not simple or lhs.size == 0 or g.size == 0:
        return dlhs, by_rule(lhs, rhs, g)

    def transposed_first(lhs, rhs, g):
        """XLA's CPU compiler runs a product that contracts the leading axis of both operands a third slower than a
        transposition and a plain product; the barrier keeps it from folding the two into one again."""
        rows = lax.optimization_barrier(lhs.reshape(-1, lhs.shape[-1]).T)
        drhs = lax.dot(rows, g.reshape(rows.shape[1], -1), precision=forward.precision)
        free = [rhs.shape[a] for a in dims.free("rhs", rhs.ndim)]
        return jnp.moveaxis(drhs.reshape(lhs.shape[-1], *free), 0, dims.rhs)

    if backend.platform() == "cpu":  # spares the choice below, which takes 4 ms to trace
        return dlhs, transposed_first(lhs, rhs, g)
    return dlhs, lax.platform_dependent(lhs, rhs, g, cpu=transposed_first, default=by_rule)


def backward_operands(
    lhs: Float[Array, "*lhs"],
    rhs: Float[Array, "*rhs"],
    dims: Dims,
    recipe: LinearRecipe,
    rotated: bool,
    keys: tuple[Any, Any] = (None, None),
    scales: Mapping[str, Array] | None = None,
    rhs_scale: Array | None = None,
) -> tuple[Any, Any]:
    """What the backward products of `recipe` read beside the quantized operands, in the space of the forward product:
    of each operand its high-precision form, or a pair (grid values, scales) where they fold its scales, or None.

    Raises: ValueError as `original_operands`."""
    originals = original_operands(lhs, rhs, dims, recipe, rotated)

    def operand(side: Side, x: Array, axis: int, gemm: Gemm, key: Any) -> Any:
        quantizer = getattr(recipe.out, side)
        if not gemm.fold:
            return originals[0 if side == "lhs" else 1]
        if side == "rhs" and recipe.rhs_ready:
            return _ready_elements(quantizer, x, axis, rhs_scale)
        values, scale = quantizer.elements(lax.stop_gradient(x), axis=axis, key=key, scale=(scales or {}).get(side))
        if quantizer.rotation is not None and not rotated:
            values = quantizer.unrotated(values, axis=axis, key=key)
        return values, scale

    return (
        operand("lhs", lhs, dims.lhs, recipe.grad_rhs, keys[0]),
        operand("rhs", rhs, dims.rhs, recipe.grad_lhs, keys[1]),
    )


def original_operands(
    lhs: Float[Array, "*lhs"], rhs: Float[Array, "*rhs"], dims: Dims, recipe: LinearRecipe, rotated: bool
) -> tuple[Any, Any]:
    """The operands in high precision, in the space of the forward product, each where a backward product reads it, else
    None.

    Raises: ValueError when the weight came quantized (`rhs_ready`) and a backward product wants the original."""
    if recipe.rhs_ready and not recipe.grad_lhs.reads_forward("rhs"):
        raise ValueError(
            "lb.dot_general: grad_lhs.rhs wants the original weight, but it came quantized (rhs_ready). Use FORWARD"
            " or Requantized there, or quantize the weight inside the product."
        )
    rotation = recipe.out.lhs.rotation if rotated and isinstance(recipe.out.lhs, Quantizer) else None
    turned = lambda x, axis: x if rotation is None else rotation.apply(x, axis)
    return (
        None if recipe.grad_rhs.reads_forward("lhs") else turned(lhs, dims.lhs),
        None if recipe.grad_lhs.reads_forward("rhs") else turned(rhs, dims.rhs),
    )


def _ready_elements(quantizer: Quantizer, x_hat: Array, axis: int, scale: Array | None) -> tuple[Array, Array]:
    """Grid values and scales of a weight that was quantized before. Where it brings no scales, a row's largest
    magnitude stands for the grid's largest level, which is its scale where the row reaches that level."""
    tiles, axes = quantizer.tiling.split(x_hat.astype(jnp.float32), axis)
    scale = absmax(tiles, quantizer.format, axes) if scale is None else scale
    return tiles * reciprocal(scale), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(
    forward: Forward,
    recipe: LinearRecipe,
    lhs_hat: Float[Array, "*lhs"],
    rhs_hat: Float[Array, "*rhs"],
    others: tuple[Any, Any],
    key: Array | None,
) -> Float[Array, "*out"]:
    """y = lhs_hat . rhs_hat;  d lhs_hat = Q(g) . Q(rhs),  d rhs_hat = Q(lhs) . Q(g)  as `recipe.grad_lhs`, `grad_rhs`
    say.

    Each backward operand is quantized along the axis that its own product contracts: output channels in grad_lhs,
    tokens in grad_rhs. others: `backward_operands`; they get no gradient. Second derivatives are those of the backward
    products, but where these fold scales there are none."""
    return forward(lhs_hat, rhs_hat)


def _product_forward(forward, recipe, lhs_hat, rhs_hat, others, key):
    if recipe.grad_lhs.fold or recipe.grad_rhs.fold:
        lhs_hat, rhs_hat = once_differentiable((lhs_hat, rhs_hat))
    return product(forward, recipe, lhs_hat, rhs_hat, others, key), (lhs_hat, rhs_hat, others, key)


def _product_backward(forward, recipe, saved, g):
    lhs_hat, rhs_hat, others, key = saved
    return *product_gradients(forward, recipe, lhs_hat, rhs_hat, others, key, g), None, no_cotangent(key)


def product_gradients(
    forward: Forward, recipe: LinearRecipe, lhs_hat: Array, rhs_hat: Array, others: tuple[Any, Any], key: Any, g: Array,
    coder: Coder | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Cotangents of both operands of `product`. With a coder, pairs in `others` are of its codes, and there is one for
    each operand that a backward product takes as the forward quantized it."""
    lhs, rhs = others
    keys = (None, None) if key is None else jax.random.split(key)
    dims = forward.dims
    batch = tuple(range(len(dims.lhs_batch)))
    lhs_free, rhs_free = dims.free("lhs", lhs_hat.ndim), dims.free("rhs", rhs_hat.ndim)
    g_lhs_free = tuple(range(len(batch), len(batch) + len(lhs_free)))
    g_rhs_free = tuple(range(g.ndim - len(rhs_free), g.ndim))

    numbers = ((g_rhs_free, rhs_free), (batch, dims.rhs_batch))
    if rhs_free and _on_codes(recipe, 0, coder, g, rhs, numbers):
        dlhs = _code_product(g, rhs, numbers, 0, recipe, forward.precision, lhs_hat.dtype, keys[0], coder)
    else:
        other = rhs_hat if recipe.grad_lhs.reads_forward("rhs") else rhs
        dlhs = _backward_product(g, other, numbers, recipe, recipe.grad_lhs, forward.precision, keys[0], lhs_hat.dtype)
    dlhs = jnp.transpose(dlhs, np.argsort((*dims.lhs_batch, *lhs_free, dims.lhs)).tolist())

    numbers = ((lhs_free, g_lhs_free), (dims.lhs_batch, batch))
    if lhs_free and _on_codes(recipe, 1, coder, g, lhs, numbers):
        drhs = _code_product(g, lhs, numbers, 1, recipe, forward.precision, lhs_hat.dtype, keys[1], coder)
    else:
        other = lhs_hat if recipe.grad_rhs.reads_forward("lhs") else lhs
        drhs = _backward_product(other, g, numbers, recipe, recipe.grad_rhs, forward.precision, keys[1], g.dtype)
    drhs = jnp.transpose(drhs, np.argsort((*dims.rhs_batch, dims.rhs, *rhs_free)).tolist())

    return dlhs.astype(lhs_hat.dtype), drhs.astype(rhs_hat.dtype)


product.defvjp(_product_forward, _product_backward)


def _backward_product(lhs, rhs, numbers, recipe: LinearRecipe, gemm: Gemm, precision, key, dtype):
    """One backward product: again a `dot_general` with a recipe, that of its own two operands. As there, the dtype is
    that of lhs, whatever an original weight was quantized from, but not less than `dtype` holds: that of the cotangent
    or of the activation, which differ where a product answers in another dtype."""
    from lowbit_jax.ops.dot_general import dot_general

    with jax.numpy_dtype_promotion("standard"):
        lhs = lhs.astype(jnp.promote_types(lhs.dtype, dtype))
    if not numbers[0][0]:  # an outer product: nothing is contracted, so nothing is quantized
        return lax.dot_general(lhs, rhs.astype(lhs.dtype), numbers, precision)
    own = LinearRecipe(
        out=Gemm(lhs=gemm.quantizer("lhs"), rhs=gemm.quantizer("rhs")), implementation=recipe.inherited_implementation
    )
    return dot_general(lhs, rhs, numbers, precision, recipe=own, key=key)


def _pair(recipe: LinearRecipe, side: int) -> tuple[Gemm, Quantizer]:
    """The backward product that reads the forward's rhs (side 0) or lhs (side 1), and what quantizes that there."""
    gemm, kept = (recipe.grad_lhs, recipe.out.rhs) if side == 0 else (recipe.grad_rhs, recipe.out.lhs)
    assert isinstance(kept, Quantizer)
    return gemm, kept


def _on_codes(recipe: LinearRecipe, side: int, coder: Coder | None, g: Array, other: Any, numbers: Any) -> bool:
    """Whether a backward product multiplies grid values and scales its result: where it folds the scales of the
    forward's operand, or where that has one, and a coder multiplies both operands' codes."""
    gemm = recipe.grad_lhs if side == 0 else recipe.grad_rhs
    if gemm.fold or coder is None or not isinstance(other, tuple):
        return gemm.fold
    gemm, kept = _pair(recipe, side)
    cotangent, (codes, scale) = gemm.folded, other
    if not isinstance(cotangent, Quantizer) or not coder.holds(cotangent, rotated=False) or cotangent.sparsity:
        return False
    fmt, other_fmt = cotangent.element_format, kept.element_format
    assert fmt is not None and other_fmt is not None, "`holds` says so of others"
    shapes, formats = (
        ((g.shape, codes.shape), (fmt, other_fmt)) if side == 0 else ((codes.shape, g.shape), (other_fmt, fmt))
    )
    return scale.size == 1 and coder.multiplies(*shapes, formats, numbers)


def _code_product(g, other, numbers, side, recipe: LinearRecipe, precision, dtype, key, coder):
    """Q(g s) . e, folded, or (Q(g) . e) s, or with `side` 1 their factors in the other order, for the forward's operand
    s e: on the codes' values, in 16 bits where these hold them exactly, then times the cotangent's own scales. other:
    (grid values or the coder's codes of them, scales)."""
    gemm, kept = _pair(recipe, side)
    quantizer = gemm.folded
    assert isinstance(quantizer, Quantizer)
    values, scales = other
    contracted, batch = numbers[0][side], numbers[1][side]
    if not gemm.fold and key is not None:  # as `dot_general` hands it on
        key = jax.random.split(key, 3)[side]
    order = (*numbers[1][1 - side], *numbers[0][1 - side])
    weighted = once_differentiable(g).astype(jnp.float32)
    if gemm.fold:
        along = [1] * g.ndim
        for axis, size in zip((*batch, *contracted), (scales.shape[a] for a in order), strict=True):
            along[axis] = size
        other_axes = [a for a in range(scales.ndim) if a not in order]
        assert all(scales.shape[a] == 1 for a in other_axes), "one scale a row or a tensor"
        weighted = weighted * jnp.transpose(scales, (*order, *other_axes)).reshape(along)
    whole_rows = isinstance(quantizer.tiling, PerRow | PerTensor)
    whole_rows &= quantizer.rotation is None and quantizer.sparsity is None
    if whole_rows:
        codes, own = quantizer.elements(weighted, axis=contracted, key=key)
    else:
        merged, axis, restore = merge(weighted, contracted)
        codes, own = restore(quantizer(merged, axis=axis, key=key)), None
    pair = (codes, values) if side == 0 else (values, codes)
    grids = [q.element_format or q.format for q in (quantizer, kept)]  # the latter is not read where it is no code
    formats = (grids[0], grids[1]) if side == 0 else (grids[1], grids[0])
    both = coder if own is not None and coder is not None and coder.holds(quantizer, rotated=False) else None
    narrow = whole_rows and all(_exact(fmt, jnp.dtype(dtype).name) for fmt in formats)
    out = _grid_product(pair, formats, numbers, precision, dtype if narrow else jnp.float32, coder, both)
    if not gemm.fold:
        out = out * scales.reshape(())
    if own is None:
        return out
    free = [1] * (values.ndim - len(order))
    sizes = [own.shape[a] for a in range(g.ndim) if a not in contracted]
    at = len(sizes) if side == 0 else len(batch)
    return out * own.reshape([*sizes[:at], *free, *sizes[at:]])


@functools.cache
def _exact(fmt: Format, dtype: str) -> bool:
    """Whether the dtype holds each level of the format."""
    levels = np.asarray(fmt.levels, np.float32)
    with np.errstate(over="ignore"):
        return bool(np.array_equal(levels.astype(jnp.dtype(dtype)).astype(np.float32), levels))


def _grid_product(
    pair: tuple[Array, Array], formats: Any, numbers: Any, precision: Any, dtype: Any, coder: Coder | None,
    both: Coder | None,
) -> Float[Array, "*out"]:  # fmt: skip
    """The product of two arrays of grid values, or of the coder's codes of them; both: it holds both."""
    coded = lambda x: coder is not None and x.dtype != jnp.float32
    if both is not None and both.multiplies(pair[0].shape, pair[1].shape, formats, numbers):
        a, b = (x if coded(x) else both.encode(x, fmt) for x, fmt in zip(pair, formats, strict=True))
        return both.product(a, b, formats, numbers, precision)
    if backend.platform() == "cpu" and max(x.ndim for x in pair) > 2:
        dtype = jnp.float32  # XLA's CPU compiler has no product of bfloat16 with a sum in float32 for some of these
    values = lambda x, fmt: (coder.decode(x, fmt) if coder is not None and coded(x) else x).astype(dtype)
    a, b = map(values, pair, formats)
    return lax.dot_general(a, b, numbers, precision, jnp.float32)
