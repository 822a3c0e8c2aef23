"""The way back of `hadamard_quantize` for gradients: dx = (g masked) blockdiag(H), from the packed mask.

H is symmetric and orthonormal, so the transpose of the rotation is the rotation. Each plane of 32 indices is masked by
one bit of the same words. g is read once and the result written once, in the layout asked for.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import hadamard_chunks, launch, masks, planes, tuning
from pallas_kernels.checks import MATRIX_DTYPES, check_matrix, check_out_dtype, check_shape, fail
from pallas_kernels.hadamard import (
    CHUNK,
    MASK_BLOCK,
    PLANES,
    both,
    check_block,
    check_chunk,
    check_size,
    index,
    rotated,
    signed_hadamard,
    spread,
    word_index,
)  # fmt: skip
from pallas_kernels.launch import Tile


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
    answers [K, M], the layout of a weight whose contraction axis leads. tile: rows of g in a program, with 256 indices
    of each, or with tiles of 128 columns a part of all of them (`hadamard_chunks`). Reference: `impl="xla"`, equal to a
    rounding of the result.
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
    launch.check_tile(who, tile, splits=_by_chunks(tile))
    dtype = g.dtype if out_dtype is None else check_out_dtype(who, out_dtype)
    if impl == "xla":
        out = _reference(g, mask, block).astype(dtype)
        return out if axis == 1 else out.T
    check_chunk(who, k)
    tile = default_tile(m, k, axis, dtype) if tile is None else tile
    return (hadamard_chunks.run if _by_chunks(tile) else _run)(g, mask, block, dtype, axis, tile, impl)


def tuning_key(m: int, k: int, axis: int, dtype: Any) -> str:
    """Of the tile table."""
    return tuning.key(f"hadamard_backward_axis{axis}_{jnp.dtype(dtype).name}", 8, m, 1, k)


def default_tile(m: int, k: int, axis: int, dtype: Any) -> Tile:
    """The tuned tile of this shape's bucket, or 64 rows, which a warp group's product takes, if there are as many."""
    if found := tuning.lookup(tuning_key(m, k, axis, dtype)):
        tile = Tile(**found)
        if tile.split <= (k // CHUNK if _by_chunks(tile) else 1):
            return tile
    return Tile(rows=launch.power_of_two(m, 16, 64), stages=1)


def _by_chunks(tile: Any) -> bool:
    return isinstance(tile, Tile) and tile.columns == CHUNK


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
    return launch.call(
        functools.partial(_kernel, m=m, k=k, rows=tile.rows, block=block, axis=axis), "hadamard_backward", impl, tile,
        grid=(-(-m // tile.rows), -(-k // MASK_BLOCK)),
        out_shape=jax.ShapeDtypeStruct((m, k) if axis == 1 else (k, m), out_dtype),
    )(g, mask, jnp.asarray(signed_hadamard(planes.COLUMNS), g.dtype))  # fmt: skip


def _kernel(g_ref, mask_ref, matrix_ref, out_ref, *, m, k, rows, block, axis):
    row = pl.program_id(0) * rows + lax.iota(jnp.int32, rows)
    piece, matrix = jnp.full(rows, pl.program_id(1), jnp.int32), matrix_ref[...]
    norm, half = 1.0 if block is None else block**-0.5, PLANES // 2
    inside = None if m % rows == 0 else row < m
    chunks = [both(inside, None if k % MASK_BLOCK == 0 else piece * MASK_BLOCK + at < k) for at in (0, CHUNK)]
    word = masks.load(mask_ref.at[word_index(row, piece)], spread(inside)).astype(jnp.int32)
    parts = [masks.load(g_ref.at[index(row, piece, j, 1)], spread(chunks[j // half])) for j in range(PLANES)]
    kept = [jnp.where((word >> j) & 1 == 1, part, jnp.zeros_like(part)) for j, part in enumerate(parts)]
    for first in (0, half):
        for j, turned in enumerate(rotated(kept[first : first + half], matrix, block, False), first):
            masks.store(
                out_ref.at[index(row, piece, j, axis)], (turned * norm).astype(out_ref.dtype), spread(chunks[j // half])
            )
