"""The contraction in parts that one program takes side by side: more warps read the weights, and no second kernel adds
their sums.

Part p is the p-th stretch of the contraction. The words of all parts lie above each other as the left operand of the
product, [parts columns, 32], the activations as the right one, [rows parts, 32]. Of the result, `parts` times as large
as it has to be, the blocks of equal parts are added at the end: with few rows the tensor cores have the time.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Num

from pallas_kernels import masks, planes
from pallas_kernels.checks import fail
from pallas_kernels.launch import Tile


def fit(tile: Tile, k: int, step: int, block: int) -> bool:
    """Whether the parts of the tile, and those of its `split`, are equal numbers of steps; if there are several parts,
    of whole steps, and each of whole blocks of every field (`planes.step_length`), between which words can be cut."""
    return _equal(tile, k, step) and (tile.parts == 1 or k % (tile.parts * block) == 0)


def _equal(tile: Tile, k: int, step: int) -> bool:
    return -(-k // step) % (tile.split * tile.parts) == 0 and (tile.parts == 1 or k % step == 0)


def check(who: str, tile: Tile, k: int, step: int, block: int) -> None:
    """Raises: ValueError where they do not `fit`."""
    asked = f"tile.split={tile.split}" + (f" and tile.parts={tile.parts}" if tile.parts > 1 else "")
    if not _equal(tile, k, step):
        way_out = "Take a divisor of whole steps, or one part" if tile.parts > 1 else "Take a divisor of them"
        fail(who, f"got {asked}, but K={k} is {-(-k // step)} steps of {step}", way_out)
    if not fit(tile, k, step, block):
        seen = f"got {asked}, but a part of K={k} is no whole number of blocks of {block} codes"
        fail(who, seen, "Words are cut between blocks: take fewer parts, or one")


def leading(table: Num[Array, "n *s"], parts: int) -> Num[Array, "*parts_n_s"]:
    """The array cut along its first axis, with the parts in front: [parts, n / parts, ...]; as it is for one part."""
    return table if parts == 1 else table.reshape(parts, table.shape[0] // parts, *table.shape[1:])


def of_contraction(x: Num[Array, "m k"], parts: int) -> Num[Array, "*m_parts_k"]:
    """The activations as [M, parts, K / parts]; as they are for one part."""
    return x if parts == 1 else x.reshape(x.shape[0], parts, x.shape[1] // parts)


def column_block(array: Num[Array, "*s"], columns: int, axis: int) -> pl.BlockSpec:
    """All of `array` but along `axis`, where a program has its columns."""
    shape = tuple(columns if a == axis else size for a, size in enumerate(array.shape))
    return pl.BlockSpec(shape, lambda n, m, s: tuple(n if a == axis else 0 for a in range(len(shape))))


def row_block(array: Num[Array, "*s"], rows: int, axis: int, last: int | None = None) -> pl.BlockSpec:
    """All of `array` but along `axis`, where a program has its rows. last: length of the last axis, if not its own."""
    sizes = (*array.shape[:-1], array.shape[-1] if last is None else last)
    shape = tuple(rows if a == axis else size for a, size in enumerate(sizes))
    return pl.BlockSpec(shape, lambda n, m, s: tuple(m if a == axis else 0 for a in range(len(shape))))


def activations(ref: Any, start: Any, of_rows: Bool[Array, "rows"] | None, of_k: Bool[Array, "32"] | None) -> Array:
    """Inside a kernel, the right operand of 32 contraction indices from `start` on, of every part."""
    here = pl.ds(start, planes.COLUMNS)
    if len(ref.shape) == 2:
        return masks.load(ref.at[:, here], masks.outer(of_rows, of_k, (ref.shape[0], planes.COLUMNS)))
    rows, parts, _ = ref.shape
    mask = None if of_rows is None else jnp.broadcast_to(of_rows[:, None, None], (rows, parts, planes.COLUMNS))
    return masks.load(ref.at[:, :, here], mask).reshape(rows * parts, planes.COLUMNS)


def summed(total: Num[Array, "c r"], parts: int) -> Num[Array, "columns rows"]:
    """The sum over the parts of a product of all of them with all of them."""
    if parts == 1:
        return total
    blocks = total.reshape(parts, total.shape[0] // parts, total.shape[1] // parts, parts)
    of = [lax.broadcasted_iota(jnp.int32, blocks.shape, axis) for axis in (0, 3)]
    return jnp.where(of[0] == of[1], blocks, jnp.zeros_like(blocks)).sum(3, dtype=total.dtype).sum(0, dtype=total.dtype)
