"""The way back of `hadamard_quantize` for gradients: dx = (g masked) blockdiag(H), from the packed mask.

H is symmetric and orthonormal, so the transpose of the rotation is the rotation. A program takes some rows through
chunks of 128 indices, each a product with the whole matrix of the blocks, which it reads once; while one chunk is
multiplied the next ones are on their way. g is read once and the result written once, in the layout asked for.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import launch, masks, planes, tuning
from pallas_kernels.checks import MATRIX_DTYPES, check_matrix, check_out_dtype, check_shape, fail
from pallas_kernels.hadamard import (
    CHUNK,
    MASK_BLOCK,
    both,
    check_block,
    check_chunk,
    check_size,
    signed_blocks,
    signed_hadamard,
    spread,
)  # fmt: skip
from pallas_kernels.launch import Tile

_PLANES = CHUNK // planes.COLUMNS


def hadamard_backward(
    g: Float[Array, "m k"],
    mask: Int[Array, "blocks m 32"],
    *,
    block: int | None = 128,
    out_dtype=None,
    axis: int = 1,
    tile: Tile | None = None,
    impl: str = "triton",
) -> Float[Array, "m k"] | Float[Array, "k m"]:
    """(g * mask) rotated by blocks, sums in float32; g is bfloat16 or float16, and so is the result unless `out_dtype`
    says so.

    mask: the words that `hadamard_quantize(..., trust=)` gave. axis: where the rotated index stands in the result; 0
    answers [K, M], the layout of a weight whose contraction axis leads. tile: rows of g in a program, and into how many
    programs the chunks of a row are cut (`split`). Reference: `impl="xla"`, equal to a rounding of the result.
    Raises: ValueError for a mask of other sizes, blocks that do not divide K and from 2^31 elements on, NoKernel for K
    that 128 does not divide, TypeError for dtypes."""
    who = "hadamard_backward"
    launch.check_impl(who, impl)
    m, k = check_matrix(who, "g", g, MATRIX_DTYPES)
    check_shape(who, "mask", mask, (-(-k // MASK_BLOCK), m, planes.COLUMNS), jnp.int8)
    if axis not in (0, 1):
        fail(who, f"got axis={axis}", "The rotated axis of the result is 0 or 1")
    check_block(who, block, k)
    check_size(who, m, k)
    launch.check_tile(who, tile, splits=True)
    dtype = g.dtype if out_dtype is None else check_out_dtype(who, out_dtype)
    if impl == "xla":
        out = _reference(g, mask, block).astype(dtype)
        return out if axis == 1 else out.T
    check_chunk(who, k)
    tile = default_tile(m, k, axis, dtype) if tile is None else tile
    return _run(g, mask, block, dtype, axis, tile, impl)


def tuning_key(m: int, k: int, axis: int, dtype: Any) -> str:
    """Of the tile table."""
    return tuning.key(f"hadamard_backward_axis{axis}_{jnp.dtype(dtype).name}", 8, m, 1, k)


def default_tile(m: int, k: int, axis: int, dtype: Any) -> Tile:
    """The tuned tile of this shape's bucket, or 64 rows, which a warp group's product takes, if there are as many, and
    about four chunks of 128 indices of each."""
    chunks = k // CHUNK
    if (found := tuning.lookup(tuning_key(m, k, axis, dtype))) and found.get("split", 1) <= chunks:
        return Tile(**found)
    split = max(s for s in (1, 2, 4, 8, 16) if s == 1 or chunks >= 4 * s)
    return Tile(rows=launch.power_of_two(m, 16, 64), stages=2, split=split)


def _reference(g, mask, block):
    rows = planes.padded_n(g.shape[0])
    words = jnp.pad(mask, ((0, 0), (0, rows - g.shape[0]), (0, 0)))
    kept = g.astype(jnp.float32) * planes.unpack((words,), 1, *g.shape).astype(jnp.float32)
    if block is None:
        return kept
    tiles = kept.reshape(g.shape[0], -1, block)
    turned = lax.dot_general(tiles, signed_hadamard(block), (((2,), (0,)), ((), ())), lax.Precision.HIGHEST)
    return turned.reshape(g.shape) * block**-0.5


def _run(g, mask, block, out_dtype, axis, tile, impl):
    m, k = g.shape
    turns = -(-(k // CHUNK) // tile.split)
    kernel = functools.partial(
        _kernel, m=m, chunks=k // CHUNK, turns=turns, rows=tile.rows, norm=(block or 1) ** -0.5, axis=axis
    )
    return launch.call(
        kernel, "hadamard_backward", impl, tile,
        grid=(-(-m // tile.rows), tile.split),
        out_shape=jax.ShapeDtypeStruct((m, k) if axis == 1 else (k, m), out_dtype),
    )(g, mask, jnp.asarray(signed_blocks(block), g.dtype))  # fmt: skip


def _kernel(g_ref, mask_ref, matrix_ref, out_ref, *, m, chunks, turns, rows, norm, axis):
    row, matrix = pl.program_id(0) * rows + lax.iota(jnp.int32, rows), matrix_ref[...]
    first = pl.program_id(1) * turns
    inside, shape = None if m % rows == 0 else row < m, (rows, CHUNK)
    of_rows = lambda size: jnp.broadcast_to(row[:, None], (rows, size))
    of_columns = lambda column: jnp.broadcast_to(column[None, :], (rows, column.size))

    def turn(i, _):
        chunk = first + i
        there = both(inside, None if chunks % turns == 0 else jnp.broadcast_to(chunk < chunks, (rows,)))
        column = of_columns(chunk * CHUNK + lax.iota(jnp.int32, CHUNK))
        g = masks.load(g_ref.at[of_rows(CHUNK), column], spread(there, shape))
        words = jnp.full((rows, planes.COLUMNS), lax.div(chunk, jnp.int32(MASK_BLOCK // CHUNK)), jnp.int32)
        at = words, of_rows(planes.COLUMNS), of_columns(lax.iota(jnp.int32, planes.COLUMNS))
        word = masks.load(mask_ref.at[at], spread(there)).astype(jnp.int32)
        plane = lax.rem(chunk, jnp.int32(MASK_BLOCK // CHUNK)) * _PLANES + lax.iota(jnp.int32, _PLANES)
        trusted = ((word[:, None, :] >> plane[None, :, None]) & 1).reshape(shape)
        kept = jnp.where(trusted == 1, g, jnp.zeros_like(g))
        turned = jnp.dot(kept, matrix, preferred_element_type=jnp.float32) * np.float32(norm)
        place = (of_rows(CHUNK), column) if axis == 1 else (column, of_rows(CHUNK))
        masks.store(out_ref.at[place], turned.astype(out_ref.dtype), spread(there, shape))
        return _

    launch.loop(turns, turn, np.int32(0))
