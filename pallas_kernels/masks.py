"""Blocks that reach over the end of an array: what lies behind is read as 0 and not written; nothing is padded."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool


def of_block(block: Any, size: int, length: int) -> Bool[Array, "size"] | None:
    """Which indices of block number `block` are below `length`; None (no mask) where `size` divides it."""
    return None if length % size == 0 else below(length, block * size, size)


def below(length: int, start: Any, size: int) -> Bool[Array, "size"]:
    """Which of the `size` indices from `start` on are below `length`."""
    return start + lax.iota(jnp.int32, size) < length


def outer(rows: Bool[Array, "r"] | None, columns: Bool[Array, "c"] | None, shape: tuple[int, int]) -> Any:
    """The mask of a matrix of this shape from those of its rows and columns; None when both are."""
    if rows is None and columns is None:
        return None
    mask = jnp.ones(shape, jnp.bool_) if rows is None else jnp.broadcast_to(rows[:, None], shape)
    return mask if columns is None else mask & columns[None, :]


def load(ref: Any, mask: Bool[Array, "*s"] | None) -> Array:
    """What is at `ref`, 0 off the mask."""
    if mask is None:
        return ref[...]
    return plgpu.load(ref, mask=mask, other=jnp.zeros(mask.shape, ref.dtype))


def store(ref: Any, value: Array, mask: Bool[Array, "*s"] | None) -> None:
    """Writes `value` at `ref` where the mask is set."""
    if mask is None:
        ref[...] = value
    else:
        plgpu.store(ref, value, mask=mask)


def lengthened(words: Array, blocks: int) -> Array:
    """Words with blocks of zeros behind, where a turn of the loop is longer than the blocks that were stored."""
    return words if words.shape[0] >= blocks else jnp.pad(words, ((0, blocks - words.shape[0]), (0, 0), (0, 0)))
