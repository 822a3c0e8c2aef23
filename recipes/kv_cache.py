"""Keys and values of the positions that a decoder has read, cached for the next ones, in few bits if asked for."""

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

import lowbit_jax as lb

INTEGERS = (
    lb.formats.INT2, lb.formats.INT3, lb.formats.INT4, lb.formats.INT5, lb.formats.INT6, lb.formats.INT7,
    lb.formats.INT8,
)  # fmt: skip
Positions = Any
"""An array [batch, positions, heads, dim], or a `QTensor` of that shape whose rows are heads."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class KVCache:
    """Keys, turned by their positions, and values; with a leading axis of layers in front of a scan."""

    keys: Positions
    values: Positions


def quantizer(bits: int | None, head_dim: int) -> lb.Quantizer | None:
    """Each head of each position by itself: rotated, so that no channel stands out, and scaled by its largest value.

    Raises: ValueError for bits outside 2 to 8."""
    if bits is None:
        return None
    if not isinstance(bits, numbers.Integral) or not 2 <= bits <= 8:
        raise ValueError(f"kv_cache: {bits!r} bits; keys and values take 2 to 8 bits, or None for floats.")
    rotation = lb.Hadamard(lb.rotation.largest_block(head_dim, 128))
    return lb.Quantizer(format=INTEGERS[bits - 2], scale_format=lb.scaling.BFLOAT16, rotation=rotation)


def empty(shape: tuple[int, ...], dtype: Any, rounded: lb.Quantizer | None) -> KVCache:
    """Room for `shape` [batch, positions, heads, dim]."""
    zeros = jnp.zeros(shape, dtype)
    zeros = zeros if rounded is None else rounded.quantize(zeros)
    return KVCache(zeros, zeros)


def written(cache: KVCache, keys: Array, values: Array, at: Int[Array, ""]) -> KVCache:
    """With the positions from `at` on."""

    def write(old: Positions, new: Array) -> Positions:
        cast = new.astype(old.dtype)
        part = old.quantizer.quantize(cast) if isinstance(old, lb.QTensor) else cast
        put = lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, at, axis=1)
        return jax.tree.map(put, old, part)

    return KVCache(write(cache.keys, keys), write(cache.values, values))


def attended(q: Float[Array, "batch time heads dim"], cache: KVCache, at: Int[Array, ""]) -> Array:
    """What the queries at the positions from `at` on read of those up to themselves."""
    read = lambda x: x.dequantize(q.dtype) if isinstance(x, lb.QTensor) else x.astype(q.dtype)
    keys, values = read(cache.keys), read(cache.values)
    seen = jnp.arange(keys.shape[1])[None, :] <= at + jnp.arange(q.shape[1])[:, None]
    exact = jnp.float32 if q.dtype == jnp.float16 and jax.default_backend() == "cpu" else q.dtype
    return jax.nn.dot_product_attention(
        q.astype(exact), keys.astype(exact), values.astype(exact), mask=seen[None, None]
    ).astype(q.dtype)
