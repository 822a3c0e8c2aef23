"""A matrix quantized to int8 along its rows and along its columns, each times weights of its own, as the two backward
products of an int8 layer read their cotangent.

    rows      c[m, n] = round(g[m, n] v[n] / s[m]),  s[m] = max_n |g v| / 127       [M, N]
    columns   d[n, m] = round(g[m, n] u[m] / t[n]),  t[n] = max_m |g u| / 127       [N, M]

Two kernels, each over tiles of g: the first finds the maxima of rows and of columns in a tile, the second writes both
codes of a tile, those of columns transposed, as a product contracts them. g is read twice and each code is written
once, 6 bytes an element of bfloat16, where a pass for each maximum, for each set of codes and for the transposition
takes twice that.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int, Int8

from pallas_kernels import launch, masks, tuning
from pallas_kernels.checks import check_matrix, check_offsets, check_shape
from pallas_kernels.launch import Tile
from pallas_kernels.minifloat import magnitude_bits, nearest_integer, number_of

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_TOP = 127.0
_LEAST, _MOST = 2.0**-126, 2.0**126  # scales: their reciprocals are normal float32


class BothWays(NamedTuple):
    """Codes of the rows, and of the columns as rows; scales in units of the weighted matrix."""

    rows: Int8[Array, "m n"]
    row_scales: Float[Array, "m"]
    columns: Int8[Array, "n m"]
    column_scales: Float[Array, "n"]


def quantize_both_ways(
    g: Float[Array, "m n"],
    along_columns: Float[Array, "n"],
    along_rows: Float[Array, "m"],
    *,
    tile: Tile | None = None,
    impl: str = "triton",
) -> BothWays:
    """int8 codes of `g * along_columns[None, :]`, one scale a row, and of `(g * along_rows[:, None]).T`, one scale a
    column of g; absmax scales, nearest even.

    A row or column of zeros has scale 1. One with NaN or infinity has scale NaN, its codes mean nothing, and the others
    are as without it. tile: rows and columns of what a program holds at once.
    Reference: `impl="xla"`, equal.
    Raises: ValueError for shapes and from 2^31 elements on, TypeError for dtypes."""
    who = "quantize_both_ways"
    launch.check_impl(who, impl)
    m, n = check_matrix(who, "g", g, _DTYPES)
    check_shape(who, "along_columns", along_columns, (n,), jnp.float32)
    check_shape(who, "along_rows", along_rows, (m,), jnp.float32)
    launch.check_tile(who, tile)
    if impl == "xla":
        return _reference(g, along_columns, along_rows)
    check_offsets(who, g=(m, n))
    return _run(g, along_columns, along_rows, default_tile(m, n, g.dtype) if tile is None else tile, impl)


def tuning_key(m: int, n: int, dtype: Any) -> str:
    """Of the tile table."""
    return tuning.key(f"quantize_both_ways_{jnp.dtype(dtype).name}", 8, m, n, 1)


def default_tile(m: int, n: int, dtype: Any) -> Tile:
    """The tuned tile of this shape's bucket, or one that compiles without spills."""
    if (found := tuning.lookup(tuning_key(m, n, dtype))) and found.get("split", 1) == 1:
        return Tile(**found)
    return Tile(rows=64, columns=64, stages=1)


def cases() -> list[tuple]:
    """For a compile test: (name, function, argument shapes, {chip: part of its tensor-core instruction, or None})."""
    shape = lambda *size, dtype=jnp.float32: jax.ShapeDtypeStruct(size, dtype)
    nothing = dict.fromkeys(("sm_80", "sm_90", "sm_100"))
    sizes = ((16384, 4096, jnp.bfloat16), (1000, 2000, jnp.float32))
    return [
        (f"quantize_both_ways {m}x{n} {jnp.dtype(dtype).name}", quantize_both_ways,
         (shape(m, n, dtype=dtype), shape(n), shape(m)), nothing)
        for m, n, dtype in sizes
    ]  # fmt: skip


def _settled(amax: Array) -> Array:
    """Scales of maxima, which are NaN where an element was not finite."""
    scale = jnp.clip(amax * np.float32(1 / _TOP), _LEAST, _MOST)
    return jnp.where(jnp.isfinite(amax), jnp.where(amax > 0, scale, 1.0), jnp.nan)


def _rounded(v: Array) -> Array:
    """To the nearest integers that int8 holds; those of NaN mean nothing."""
    return jnp.clip(jnp.round(v), -128, 127).astype(jnp.int8)


def _reference(g, along_columns, along_rows):
    g = g.astype(jnp.float32)
    by_row, by_column = g * along_columns[None, :], g * along_rows[:, None]
    s, t = (_settled(number_of(jnp.max(magnitude_bits(x), axis=axis))) for x, axis in ((by_row, 1), (by_column, 0)))
    rows, columns = _rounded(by_row * (1 / s)[:, None]), _rounded(by_column * (1 / t)[None, :])
    return BothWays(rows, s, columns.T, t)


def _run(g, along_columns, along_rows, tile, impl):
    m, n = g.shape
    grid = -(-m // tile.rows), -(-n // tile.columns)
    sizes, launched = dict(m=m, n=n, tile=tile), functools.partial(launch.call, impl=impl, tile=tile, grid=grid)
    of_rows, of_columns = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((grid[1], m), (grid[0], n)))
    maxima = launched(
        functools.partial(_maxima_kernel, **sizes), "quantize_both_ways_maxima", out_shape=(of_rows, of_columns)
    )(g, along_columns, along_rows)
    s, t = (_settled(number_of(jnp.max(found, axis=0))) for found in maxima)
    codes = jax.ShapeDtypeStruct((m, n), jnp.int8), jax.ShapeDtypeStruct((n, m), jnp.int8)
    rows, columns = launched(
        functools.partial(_codes_kernel, **sizes), "quantize_both_ways_codes", out_shape=codes
    )(g, along_columns, along_rows, 1 / s, 1 / t)  # fmt: skip
    return BothWays(rows, s, columns, t)


class _Block(NamedTuple):
    """A program's part of g: the indices of its rows and columns, and which of them are there."""

    row: Int[Array, "r"]
    column: Int[Array, "c"]
    rows: Bool[Array, "r"] | None
    columns: Bool[Array, "c"] | None

    @classmethod
    def of(cls, m: int, n: int, tile: Tile) -> "_Block":
        of_rows, of_columns = (pl.program_id(0), tile.rows, m), (pl.program_id(1), tile.columns, n)
        indices = (block * size + lax.iota(jnp.int32, size) for block, size, _ in (of_rows, of_columns))
        there = (masks.of_block(block, size, length) for block, size, length in (of_rows, of_columns))
        return cls(*indices, *there)

    @property
    def place(self) -> tuple[Int[Array, "r c"], Int[Array, "r c"]]:
        shape = self.row.size, self.column.size
        return jnp.broadcast_to(self.row[:, None], shape), jnp.broadcast_to(self.column[None, :], shape)

    @property
    def inside(self) -> Bool[Array, "r c"] | None:
        return masks.outer(self.rows, self.columns, (self.row.size, self.column.size))

    def matrix(self, ref: Any) -> Float[Array, "r c"]:
        return masks.load(ref.at[self.place], self.inside).astype(jnp.float32)

    def of_rows(self, ref: Any) -> Float[Array, "r 1"]:
        return masks.load(ref.at[self.row], self.rows)[:, None]

    def of_columns(self, ref: Any) -> Float[Array, "1 c"]:
        return masks.load(ref.at[self.column], self.columns)[None, :]


def _maxima_kernel(g_ref, v_ref, u_ref, row_ref, column_ref, *, m, n, tile):
    block = _Block.of(m, n, tile)
    g = block.matrix(g_ref)
    by_row, by_column = g * block.of_columns(v_ref), g * block.of_rows(u_ref)
    at = lambda axis, index: (jnp.full(index.size, pl.program_id(axis), jnp.int32), index)
    masks.store(row_ref.at[at(1, block.row)], jnp.max(magnitude_bits(by_row), axis=1), block.rows)
    masks.store(column_ref.at[at(0, block.column)], jnp.max(magnitude_bits(by_column), axis=0), block.columns)


def _codes_kernel(g_ref, v_ref, u_ref, row_gain_ref, column_gain_ref, row_ref, column_ref, *, m, n, tile):
    block = _Block.of(m, n, tile)
    g, (row, column) = block.matrix(g_ref), block.place
    by_row = g * block.of_columns(v_ref) * block.of_rows(row_gain_ref)
    by_column = g * block.of_rows(u_ref) * block.of_columns(column_gain_ref)
    masks.store(row_ref.at[row, column], _in_kernel(by_row), block.inside)
    masks.store(column_ref.at[column, row], _in_kernel(by_column), block.inside)


def _in_kernel(v: Array) -> Array:
    """`_rounded`: Triton under Pallas has no rounding to even."""
    return nearest_integer(jnp.minimum(jnp.maximum(v, np.float32(-128)), np.float32(127))).astype(jnp.int8)
