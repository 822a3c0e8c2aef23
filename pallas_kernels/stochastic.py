"""Stochastic rounding of float32 to bfloat16, to FP8 and to codes of 1 to 8 bits.

    P(upper neighbor) = (u - lower) / (upper - lower),   so the mean of many draws is u

Grid values stay, values beyond the grid saturate (infinities too), NaN stays NaN where there is one. The random bits
are `threefry` words of the element's row and column under the key: the same for every tile, in the kernel and in XLA.
Source: Gupta et al. 2015, arXiv:1502.02551, section 3.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, UInt8, UInt32

from pallas_kernels import launch, threefry
from pallas_kernels.checks import check_bits, check_matrix, check_offsets, check_out_dtype, check_shape, fail
from pallas_kernels.launch import Tile
from pallas_kernels.minifloat import E4M3, E5M2, bits_of, encode, flush, up_or_down

_FP8 = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2}
_INFINITY, _LARGEST_BFLOAT16 = 0x7F800000, 0x7F7F0000
GRIDS = ("integer", "midrise")


def stochastic_round(
    x: Float[Array, "m k"],
    key: UInt32[Array, "2"],
    *,
    dtype=jnp.bfloat16,
    tile: Tile | None = None,
    impl: str = "triton",
) -> Float[Array, "m k"]:
    """float32 x in bfloat16 or an FP8 dtype, each element one of its two neighbors there.

    bfloat16 takes 16 random bits, which make it exactly unbiased; FP8 takes 32, unbiased to 2^-20 of a step. Denormals
    of float32 become zeros of their sign in FP8 and are rounded like any other number in bfloat16.
    Reference: `impl="xla"`, bit for bit. `key`: `jax.random.key_data(key)`.
    Raises: ValueError for shapes, TypeError for an x that is not float32, another dtype or key."""
    who = "stochastic_round"
    launch.check_impl(who, impl)
    launch.check_tile(who, tile)
    check_matrix(who, "x", x, (jnp.float32,))
    threefry.check_key(who, key)
    _check_offsets(who, x, tile, impl)
    name = check_out_dtype(who, dtype, "dtype", (jnp.bfloat16, *_FP8)).name
    if name == "bfloat16":
        return lax.bitcast_convert_type(
            _run(x, (), key, _bfloat16, jnp.uint16, f"{who}_{name}", tile, impl), jnp.bfloat16
        )
    codes = _run(x, (), key, functools.partial(_fp8, fmt=_FP8[name]), jnp.uint8, f"{who}_{name}", tile, impl)
    return lax.bitcast_convert_type(codes, jnp.dtype(dtype))


def stochastic_codes(
    x: Float[Array, "m k"],
    scales: Float[Array, "m"],
    key: UInt32[Array, "2"],
    *,
    bits: int,
    grid: str = "integer",
    tile: Tile | None = None,
    impl: str = "triton",
) -> UInt8[Array, "m k"]:
    """The codes of x / scale, one scale a row, on a grid of 2^bits levels.

    integer: levels -2^(bits-1) ... 2^(bits-1) - 1, code `level + 2^(bits-1)`. midrise: levels at the odd halves, code
    `level + (2^bits - 1)/2`. Unbiased to 2^-24 of a step. NaN gets code 0; a row of scale 0 is rounded as zeros.
    Reference: `impl="xla"`, bit for bit.
    Raises: ValueError for shapes, bits or grid, TypeError for dtypes."""
    who = "stochastic_codes"
    launch.check_impl(who, impl)
    launch.check_tile(who, tile)
    check_bits(who, bits)
    m, _ = check_matrix(who, "x", x, (jnp.float32,))
    threefry.check_key(who, key)
    _check_offsets(who, x, tile, impl)
    if grid not in GRIDS:
        fail(who, f"got grid={grid!r}", f"It is one of {', '.join(GRIDS)}")
    check_shape(who, "scales", scales, (m,), jnp.float32)
    inverse = jnp.where(scales == 0, 0.0, 1 / jnp.where(scales == 0, 1.0, scales))
    rounded = functools.partial(_codes, bits=bits, shift=0.5 if grid == "midrise" else 0.0)
    return _run(x, (inverse,), key, rounded, jnp.uint8, f"stochastic_{grid}{bits}", tile, impl)


def cases() -> list[tuple]:
    """For a compile test: (name, function, argument shapes, {chip: part of its tensor-core instruction, or None})."""
    x, key = jax.ShapeDtypeStruct((4096, 4096), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    scales = jax.ShapeDtypeStruct((4096,), jnp.float32)
    nothing = dict.fromkeys(("sm_80", "sm_90", "sm_100"))
    to = lambda dtype: functools.partial(stochastic_round, dtype=dtype)
    found: list[tuple] = [(f"stochastic_round_{dtype}", to(dtype), (x, key), nothing) for dtype in ("bfloat16", *_FP8)]
    for bits, grid in ((1, "midrise"), (4, "midrise"), (8, "integer")):
        call = functools.partial(stochastic_codes, bits=bits, grid=grid)
        found.append((f"stochastic_codes_{grid}{bits}", call, (x, scales, key), nothing))
    return found


def _padded(x: Array, tile: Tile) -> tuple[int, int]:
    (m, k), down, across = x.shape, tile.rows, tile.columns
    return -(-m // down) * down, -(-k // across) * across


def _check_offsets(who: str, x: Array, tile: Tile | None, impl: str) -> None:
    if impl != "xla":
        check_offsets(who, x=_padded(x, default_tile() if tile is None else tile))


def default_tile() -> Tile:
    return Tile(rows=32, columns=128, stages=1)


def _bfloat16(x, key, row, column):
    bits = bits_of(x)
    noise = threefry.halves(key, row, column, *x.shape).astype(jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    up = jnp.minimum(jnp.minimum(magnitude, _LARGEST_BFLOAT16) + noise, _LARGEST_BFLOAT16)
    up = jnp.where(magnitude > _INFINITY, magnitude | 0x00400000, up)  # NaN, quiet, keeps its upper bits
    return (lax.shift_right_logical(up | (bits ^ magnitude), jnp.int32(16)) & 0xFFFF).astype(jnp.uint16)


def _fp8(x, key, row, column, *, fmt):
    return encode(flush(x), fmt, threefry.words(key, row, column, *x.shape)).astype(jnp.uint8)


def _codes(x, key, row, column, inverse, *, bits, shift):
    half = 1 << (bits - 1)
    u = x * inverse[:, None]
    level = jnp.clip(u, shift - half, half - 1 + shift) - shift
    code = up_or_down(level, threefry.words(key, row, column, *x.shape)) + half
    return jnp.where(u == u, code, 0).astype(jnp.uint8)


def _run(x, rows_of, key, rounded, dtype, name, tile, impl):
    m, k = x.shape
    if impl == "xla":
        padded = jnp.pad(x, ((0, 0), (0, -k % 4)))
        return rounded(padded, (key[0], key[1]), 0, 0, *rows_of).astype(dtype)[:, :k]
    tile = default_tile() if tile is None else tile
    rows, columns = _padded(x, tile)
    block = pl.BlockSpec((tile.rows, tile.columns), lambda m, k: (m, k))
    out = launch.call(
        functools.partial(_kernel, rounded=rounded), name, impl, tile,
        grid=(rows // tile.rows, columns // tile.columns),
        in_specs=[
            block,
            pl.BlockSpec((2,), lambda m, k: (0,)),
            *[pl.BlockSpec((tile.rows,), lambda m, k: (m,)) for _ in rows_of],
        ],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
    )(jnp.pad(x, ((0, rows - m), (0, columns - k))), key, *[jnp.pad(a, (0, rows - m)) for a in rows_of])  # fmt: skip
    return out[:m, :k]


def _kernel(x_ref, key_ref, *refs, rounded):
    *row_refs, out_ref = refs
    rows, columns = out_ref.shape
    at = pl.program_id(0) * rows, pl.program_id(1) * columns
    key = key_ref[0], key_ref[1]
    out_ref[...] = rounded(x_ref[...], key, *at, *[ref[...] for ref in row_refs]).astype(out_ref.dtype)
