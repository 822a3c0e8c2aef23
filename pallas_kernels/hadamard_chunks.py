"""The kernel of `hadamard_backward` by whole chunks: a program takes some rows through chunks of 128 indices, each a
product with the whole matrix of the blocks, which it reads once; while one chunk is multiplied the next ones are on
their way.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels import launch, masks, planes
from pallas_kernels.hadamard import CHUNK, MASK_BLOCK, both, signed_blocks, spread
from pallas_kernels.launch import Tile

_PLANES = CHUNK // planes.COLUMNS


def run(g: Array, mask: Array, block: int | None, out_dtype: Any, axis: int, tile: Tile, impl: str) -> Array:
    """As `hadamard_backward`; tile: rows of g in a program, and into how many programs the chunks of a row are cut."""
    m, k = g.shape
    kernel, grid = work(m, k, block, axis, tile)
    out_shape = jax.ShapeDtypeStruct((m, k) if axis == 1 else (k, m), out_dtype)
    matrix = jnp.asarray(signed_blocks(block), g.dtype)
    return launch.call(kernel, "hadamard_backward", impl, tile, grid=grid, out_shape=out_shape)(g, mask, matrix)


def work(m: int, k: int, block: int | None, axis: int, tile: Tile) -> tuple[Callable, tuple[int, int]]:
    """The kernel for these sizes, and how many programs it takes along rows and along chunks."""
    chunks = k // CHUNK
    turns = -(-chunks // tile.split)
    whole = turns * tile.split == chunks
    norm = (block or 1) ** -0.5
    kernel = functools.partial(
        _kernel, m=m, chunks=chunks, turns=turns, whole=whole, rows=tile.rows, norm=norm, axis=axis
    )
    return kernel, (-(-m // tile.rows), tile.split)


def _kernel(g_ref, mask_ref, matrix_ref, out_ref, *, m, chunks, turns, whole, rows, norm, axis):
    row, matrix = pl.program_id(0) * rows + lax.iota(jnp.int32, rows), matrix_ref[...]
    first = pl.program_id(1) * turns
    inside, shape = None if m % rows == 0 else row < m, (rows, CHUNK)
    of_rows = lambda size: jnp.broadcast_to(row[:, None], (rows, size))
    of_columns = lambda column: jnp.broadcast_to(column[None, :], (rows, column.size))

    def turn(i, _):
        chunk = first + i
        there = both(inside, None if whole else jnp.broadcast_to(chunk < chunks, (rows,)))
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
