"""Collectives that carry packed codes, for use inside `jax.shard_map`.

What travels is uint8 words and scales: dtypes below a byte kill the process in XLA's collectives. A shard is quantized
where it lies, its words and scales travel, and every device dequantizes what it received.
Sources: Wang et al. 2023, arXiv:2306.10209 (ZeRO++: quantized weights, and gradients by an all-to-all); Markov et al.
2023, arXiv:2302.02390 (QSDP).
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
from lowbit_jax.formats.catalogue import INT2, INT3, INT4, INT5, INT6, INT7, INT8
from lowbit_jax.ops import LinearRecipe
from lowbit_jax.ops.coder import keeps_scale
from lowbit_jax.ops.prepared import PreparedKernel
from lowbit_jax.parallel.packed import axis_of_view
from lowbit_jax.qtensor import NO_SEAL, QTensor
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import BFLOAT16, Group, TwoLevel, absmax
from lowbit_jax.scaling.tiling import normalized_axes

_INTEGERS = (INT2, INT3, INT4, INT5, INT6, INT7, INT8)


def wire_quantizer(bits: int = 8, *, block: int = 128, stochastic: bool = False) -> Quantizer:
    """Absmax integers in blocks of `block` with bfloat16 scales: `bits + 16 / block` bits an element travel.

    A device's part that is not whole blocks is cut into as many equal ones, a little shorter. An array that would take
    no fewer bytes so than in its own dtype travels as it is.

    The scale is one rounding to bfloat16 away from the fit, so the largest magnitude may saturate by 2^-9 of itself.
    NaN and infinity make their block not finite, so that a step that must be skipped still is.
    Raises: ValueError unless 2 <= bits <= 8."""
    if not 2 <= bits <= 8:
        raise ValueError(f"wire_quantizer(bits={bits}): integers of 2 to 8 bits travel; 1 bit needs error feedback.")
    how = rounding.stochastic if stochastic else rounding.nearest
    return Quantizer(format=_INTEGERS[bits - 2], tiling=Group(block), fit=absmax, scale_format=BFLOAT16, rounding=how)


@dataclasses.dataclass(frozen=True, slots=True)
class Reduction:
    """How gradients are summed over an axis of the mesh: in float, or as packed codes of `quantizer`."""

    quantizer: Quantizer | None = None

    def scatter(self, x: Float[Array, "*s"], axis_name: str, axis: int) -> Float[Array, "*part"]:
        """The sum over the devices, of which each keeps its part along `axis`."""
        if self.quantizer is None:
            at = _counted(axis, x.ndim, "Reduction.scatter")
            return lax.psum_scatter(x, axis_name, scatter_dimension=at, tiled=True)
        return reduce_scatter_packed(x, self.quantizer, axis_name, axis=axis)

    def everywhere(self, x: Float[Array, "*s"], axis_name: str) -> Float[Array, "*s"]:
        """The sum over the devices, whole on each."""
        return lax.psum(x, axis_name) if self.quantizer is None else all_reduce_packed(x, self.quantizer, axis_name)


FLOAT = Reduction()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def all_gather(
    x: Float[Array, "*shard"], axis_name: str, axis: int, reduction: Reduction = FLOAT
) -> Float[Array, "*whole"]:
    """The array whose shard along `axis` each device holds; its cotangent is summed over the devices by `reduction`,
    and each keeps its shard's part."""
    return lax.all_gather(x, axis_name, axis=_counted(axis, x.ndim, "all_gather"), tiled=True)


all_gather.defvjp(
    lambda x, axis_name, axis, reduction: (all_gather(x, axis_name, axis, reduction), None),
    lambda axis_name, axis, reduction, _, g: (reduction.scatter(g, axis_name, axis),),
)


def all_gather_packed(
    x: Float[Array, "*shard"],
    quantizer: Quantizer,
    axis_name: str,
    *,
    axis: int,
    contract: int = -1,
    rotated: bool = False,
    scale: Array | None = None,
    key: Array | None = None,
    reduction: Reduction = FLOAT,
) -> Float[Array, "*whole"]:
    """The fake-quantized array whose shard along `axis` each device holds; its packed words and scales travel.

    Equals `quantizer(whole, axis=contract)` to the bit, or `in_rotated_space` of it when `rotated`, for every tiling
    whose tiles lie whole on one device. `scale`, of a learned fit, is that of the shard's tiles; a random `key` should
    differ between the devices. The cotangent is summed over the devices by `reduction`, each keeps its shard's part,
    and the quantizer's estimator takes it back to `x`.
    Raises: ValueError for a tiling whose tiles the shards cut (rows along `axis`, one tile a tensor), a rotation across
    shards, and scale formats with a scale a tensor; TypeError for integers."""
    return _gathered_with_scale(x, quantizer, axis_name, axis, contract, rotated, reduction, scale, key)[0]


def all_gather_kernel(
    x: Float[Array, "*shard"], recipe: LinearRecipe, axis_name: str, *, axis: int, contract: int,
    reduction: Reduction = FLOAT,
) -> PreparedKernel:  # fmt: skip
    """`all_gather_packed` of a weight for `recipe.with_rhs_ready()`: with its scales, so that codes are multiplied."""
    quantizer, rotated = recipe.forward_quantizers[1], recipe.shared_rotation
    assert quantizer is not None, "a layer that is gathered packed has a weight to quantize"
    values, scale = _gathered_with_scale(x, quantizer, axis_name, axis, contract, rotated, reduction, None, None)
    return PreparedKernel(values, scale if keeps_scale(recipe) else None)


def _gathered_with_scale(
    x, quantizer, axis_name, axis, contract, rotated, reduction, scale, key
) -> tuple[Float[Array, "*whole"], Float[Array, "*#whole"]]:
    _check_floating(x, "all_gather_packed", "lax.all_gather")
    at, along = (_counted(a, x.ndim, "all_gather_packed") - x.ndim for a in (axis, contract))
    answer = _gathered(_Gather(quantizer, axis_name, at, along, rotated, reduction), x, scale, key)
    return cast(Any, answer)  # `jax.custom_vjp` hides the type


@dataclasses.dataclass(frozen=True, slots=True)
class _Gather:
    quantizer: Quantizer
    axis_name: str
    axis: int
    contract: int
    rotated: bool
    reduction: Reduction

    def own(self, x: Array, scale: Array | None, key: Array | None) -> Array:
        """The differentiable fake quantization of this device's shard."""
        function = self.quantizer.in_rotated_space if self.rotated else self.quantizer
        return function(x, axis=self.contract, scale=scale, key=key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(how: _Gather, x: Array, scale: Array | None, key: Array | None) -> tuple[Array, Array]:
    """The whole array, and its scales in the view of the tiling."""
    q = how.quantizer
    if how.axis == how.contract and q.rotation is not None and x.shape[how.axis] % q.rotation.block:
        raise ValueError(
            f"all_gather_packed: shards of {x.shape[how.axis]} along the contraction axis cut the rotation's blocks of"
            f" {q.rotation.block}. Cut an output axis, or take a block that divides the shard."
        )
    packed = q.quantize(x, axis=how.contract, scale=scale, key=key)
    whole = gather_qtensor(packed, how.axis_name, axis=how.axis)
    values = whole.values(jnp.float32) if how.rotated else whole.dequantize(jnp.float32)
    return values.astype(x.dtype), q.scale_format.load(whole.scales)


def _gathered_forward(how, x, scale, key):
    _, back = jax.vjp(lambda x, scale: how.own(x, scale, key), x, scale)
    return _gathered(how, x, scale, key), (back, key)


def _gathered_backward(how, saved, g):
    back, key = saved
    part = how.reduction.scatter(g[0], how.axis_name, how.axis)
    dx, dscale = back(part.astype(jnp.float32) if how.rotated else part)
    if dscale is not None and how.quantizer.learned and dscale.ndim == 0:  # one scale for all shards
        dscale = lax.psum(dscale, how.axis_name)
    return dx, dscale, None if key is None else np.zeros(key.shape, jax.dtypes.float0)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def gather_qtensor(packed: QTensor, axis_name: str, *, axis: int) -> QTensor:
    """The QTensor of the whole array from those of its shards along `axis`: words, scales and marks travel.

    Raises: ValueError when a tile would lie in several shards."""
    at, contract = _counted(axis, packed.ndim, "gather_qtensor"), packed.ndim + packed.axis
    count = lax.axis_size(axis_name)
    q = packed.quantizer
    if isinstance(q.scale_format, TwoLevel):
        raise ValueError(
            f"gather_qtensor: {q.scale_format.describe()} has one scale for the tensor, which no shard knows. Use a"
            " scale format without it for the weights that travel."
        )
    of_words = packed.ndim - 1 if at == contract else at - (at > contract)
    of_scales = axis_of_view(packed, at)
    if of_scales is None and not q.learned and count > 1:
        raise ValueError(
            f"gather_qtensor: axis {at} is cut into {count} shards, and tiles of {q.tiling.describe()} lie across"
            " them. Cut an axis outside the tiles, as the outputs of a weight with a scale a row, or tile it by groups."
        )
    if at == contract and packed.length * q.format.bits % 8:
        raise ValueError(
            f"gather_qtensor: a shard of {packed.length} codes of {q.format.bits} bits ends inside a byte. Cut another"
            " axis."
        )

    def gather(x: Array, axis: int) -> Array:
        return _as_before(lax.all_gather(_as_words(x), axis_name, axis=axis, tiled=True), x)

    of_tiles = lambda x: x if of_scales is None else gather(x, of_scales)
    whole = dataclasses.replace(
        packed,
        words=gather(packed.words, of_words),
        scales=tuple(map(of_tiles, packed.scales)),
        zeros=None if packed.zeros is None else of_tiles(packed.zeros),
        marks=None if packed.marks is None else gather(packed.marks, of_words),
        length=packed.length * (count if at == contract else 1),
    )
    return whole if packed.seal is NO_SEAL or whole.length == packed.length else whole.sealed()


def reduce_scatter_packed(
    x: Float[Array, "*s"], quantizer: Quantizer, axis_name: str, *, axis: int, key: Array | None = None
) -> Float[Array, "*part"]:
    """The sum of the devices' `x`, of which each keeps its part along `axis`: packed codes by an all-to-all, then a
    local sum in float32. An array so small that packing it saves no bytes is summed as it is.

    Each term is rounded once and the sum is not; its error is at most half a step of each term. A stochastic rounding
    takes a `key`, into which the device's index is folded.
    Raises: ValueError for a scalar, and when the devices do not divide the axis; TypeError for integers."""
    _check_floating(x, "reduce_scatter_packed", "lax.psum_scatter")
    count = lax.axis_size(axis_name)
    if x.ndim == 0:
        raise ValueError(
            f"reduce_scatter_packed got a scalar, which has no axis to cut into {count} parts ({axis_name!r}). Sum it"
            " with lax.psum, or stack it with others."
        )
    at = _counted(axis, x.ndim, "reduce_scatter_packed")
    if x.shape[at] % count:
        raise ValueError(
            f"reduce_scatter_packed: axis {at} of length {x.shape[at]} cannot be cut into {count} parts"
            f" ({axis_name!r}), {x.shape[at] % count} are left over. Pad by {-x.shape[at] % count}."
        )
    parts = x.reshape(*x.shape[:at], count, x.shape[at] // count, *x.shape[at + 1 :])
    rows = jnp.moveaxis(parts, at, 0)
    if x.size == 0:
        return jnp.zeros(rows.shape[1:], x.dtype)
    packed = _packed_rows(rows.reshape(count, -1), quantizer, axis_name, key)
    if packed.nbytes >= x.nbytes:
        return lax.psum_scatter(x, axis_name, scatter_dimension=at, tiled=True)
    return _sum_of_rows(packed, x.size // count, axis_name).reshape(rows.shape[1:]).astype(x.dtype)


def all_reduce_packed(
    x: Float[Array, "*s"], quantizer: Quantizer, axis_name: str, *, key: Array | None = None
) -> Float[Array, "*s"]:
    """The sum of the devices' `x`, whole on each, in two hops: an all-to-all of packed codes with a local sum in
    float32, then an all-gather of the sums, packed again. Every device gets the same bits. An array so small that
    packing it saves no bytes is summed as it is.

    Raises: TypeError for integers."""
    _check_floating(x, "all_reduce_packed", "lax.psum")
    if x.size == 0:
        return x
    count = lax.axis_size(axis_name)
    flat = jnp.pad(x.reshape(-1), (0, -x.size % count))
    first, second = (None, None) if key is None else jax.random.split(key)
    packed = _packed_rows(flat.reshape(count, -1), quantizer, axis_name, first)
    if packed.nbytes >= x.nbytes:
        return lax.psum(x, axis_name)
    total = _sum_of_rows(packed, flat.size // count, axis_name)
    sums = gather_qtensor(_packed_rows(total[None], quantizer, axis_name, second), axis_name, axis=0)
    return sums.dequantize(jnp.float32)[:, : total.size].reshape(-1)[: x.size].reshape(x.shape).astype(x.dtype)


def _check_floating(x: Array, who: str, exact: str) -> None:
    """`exact`: the collective that takes other dtypes as they are."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{who} got {x.dtype}; it packs floating arrays, and would round any other. Use {exact}, which is exact, or"
            " cast to a floating dtype."
        )


def _counted(axis: int, ndim: int, who: str) -> int:
    """The axis counted from the first. Raises: ValueError for one that the array does not have."""
    return normalized_axes((axis,), ndim, who)[0]


def _sum_of_rows(packed: QTensor, n: int, axis_name: str) -> Float[Array, " n"]:
    """Row i goes to device i; the sum of the rows received, float32, of which the first `n` elements are no padding."""

    def exchange(x: Array) -> Array:
        return _as_before(lax.all_to_all(_as_words(x), axis_name, split_axis=0, concat_axis=0, tiled=True), x)

    return jnp.sum(jax.tree.map(exchange, packed).dequantize(jnp.float32), axis=0)[:n]


def _packed_rows(rows: Float[Array, "rows n"], quantizer: Quantizer, axis_name: str, key: Array | None) -> QTensor:
    quantizer = _in_equal_blocks(quantizer, rows.shape[1])
    block = getattr(quantizer.tiling, "size", 1)
    padded = jnp.pad(rows.astype(jnp.float32), ((0, 0), (0, -rows.shape[1] % block)))
    if key is not None:
        key = jax.random.fold_in(key, lax.axis_index(axis_name))
    return quantizer.quantize(padded, key=key)


def _in_equal_blocks(quantizer: Quantizer, length: int) -> Quantizer:
    """With the same number of blocks in a row of `length` elements, of equal lengths: padding would travel."""
    if not isinstance(quantizer.tiling, Group) or quantizer.rotation is not None or quantizer.sparsity is not None:
        return quantizer
    count = -(-length // quantizer.tiling.size)
    return dataclasses.replace(quantizer, tiling=Group(-(-length // count)))


def _as_words(x: Array) -> Array:
    """Unsigned integers of the same bits: some backends widen small floats to float32 on the wire."""
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") if jnp.issubdtype(x.dtype, jnp.floating) else x


def _as_before(words: Array, like: Array) -> Array:
    return words if words.dtype == like.dtype else lax.bitcast_convert_type(words, like.dtype)
