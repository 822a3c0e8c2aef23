"""A matrix quantized to int8 along its rows and along its columns, each times weights of its own, as the two backward
products of an int8 layer read their cotangent.

    rows      c[m, n] = round(g[m, n] v[n] / s[m]),  s[m] = max_n |g v| / 127       [M, N]
    columns   d[n, m] = round(g[m, n] u[m] / t[n]),  t[n] = max_m |g u| / 127       [N, M]

Two kernels: the first owns rows, finds their maxima and the columns' maxima among them, and reads the rows again, from
the cache, to write their codes; the second writes the columns' codes transposed, as a product contracts them. g is read
twice from memory, where a pass for each maximum, for each set of codes and for the transposition takes twice the bytes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int8

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
    are as without it. tile: rows and columns of what a program of the first kernel holds at once.
    Reference: `impl="xla"`, equal but for codes at a tie where the chip divides inexactly.
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
    return Tile(rows=16, columns=256, stages=1)


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
    parts = -(-m // tile.rows)
    kernel = functools.partial(_rows_kernel, m=m, n=n, tile=tile)
    out = (jax.ShapeDtypeStruct((m, n), jnp.int8), jax.ShapeDtypeStruct((m,), jnp.float32),
           jax.ShapeDtypeStruct((parts, n), jnp.int32))  # fmt: skip
    rows, row_scales, maxima = launch.call(kernel, "quantize_both_ways_rows", impl, tile, grid=(parts,), out_shape=out)(
        g, along_columns, along_rows
    )
    column_scales = _settled(number_of(jnp.max(maxima, axis=0)))
    side = min(tile.columns, 64)
    square = Tile(rows=64, columns=side, warps=4, stages=1)
    columns = launch.call(
        functools.partial(_columns_kernel, m=m, n=n, tile=square), "quantize_both_ways_columns", impl, square,
        grid=(-(-m // square.rows), -(-n // square.columns)), out_shape=jax.ShapeDtypeStruct((n, m), jnp.int8),
    )(g, along_rows, 1 / column_scales)  # fmt: skip
    return BothWays(rows, row_scales, columns, column_scales)


def _rows_kernel(g_ref, v_ref, u_ref, code_ref, scale_ref, maxima_ref, *, m, n, tile):
    program = pl.program_id(0)
    row = program * tile.rows + lax.iota(jnp.int32, tile.rows)
    rows = None if m % tile.rows == 0 else row < m
    u = masks.load(u_ref.at[row], rows)
    turns, shape = -(-n // tile.columns), (tile.rows, tile.columns)
    place = lambda column: (jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[None, :], shape))

    def load(turn):
        column = turn * tile.columns + lax.iota(jnp.int32, tile.columns)
        columns = None if n % tile.columns == 0 else column < n
        inside = masks.outer(rows, columns, shape)
        return column, columns, inside, masks.load(g_ref.at[place(column)], inside).astype(jnp.float32)

    def largest(turn, found):
        column, columns, _, g = load(turn)
        v = masks.load(v_ref.at[column], columns)
        down = jnp.max(magnitude_bits(g * u[:, None]), axis=0)
        at = jnp.full(tile.columns, program, jnp.int32), column
        masks.store(maxima_ref.at[at], down, columns)
        return jnp.maximum(found, jnp.max(magnitude_bits(g * v[None, :]), axis=1))

    found = launch.loop(turns, largest, jnp.zeros(tile.rows, jnp.int32))
    scale = _settled(number_of(found))
    masks.store(scale_ref.at[row], scale, rows)
    gain = 1 / scale

    def write(turn, _):
        turn = turns - 1 - turn  # from the end, which the cache still has
        column, columns, inside, g = load(turn)
        v = masks.load(v_ref.at[column], columns)
        masks.store(code_ref.at[place(column)], _in_kernel(g * v[None, :] * gain[:, None]), inside)
        return _

    launch.loop(turns, write, np.int32(0))


def _columns_kernel(g_ref, u_ref, gain_ref, code_ref, *, m, n, tile):
    row = pl.program_id(0) * tile.rows + lax.iota(jnp.int32, tile.rows)
    column = pl.program_id(1) * tile.columns + lax.iota(jnp.int32, tile.columns)
    rows = None if m % tile.rows == 0 else row < m
    columns = None if n % tile.columns == 0 else column < n
    shape, inside = (tile.rows, tile.columns), masks.outer(rows, columns, (tile.rows, tile.columns))
    at = jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[None, :], shape)
    g = masks.load(g_ref.at[at], inside).astype(jnp.float32)
    u, gain = masks.load(u_ref.at[row], rows), masks.load(gain_ref.at[column], columns)
    codes = _in_kernel(g * u[:, None] * gain[None, :])
    masks.store(code_ref.at[at[1], at[0]], codes, inside)


def _in_kernel(v: Array) -> Array:
    """`_rounded`: Triton under Pallas has no rounding to even."""
    return nearest_integer(jnp.minimum(jnp.maximum(v, np.float32(-128)), np.float32(127))).astype(jnp.int8)
