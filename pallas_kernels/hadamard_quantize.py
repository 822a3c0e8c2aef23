"""Rotate, fit, round, pack: h = x blockdiag(H), s = alpha rms(x), codes of h/s, and the trust mask.

    c[m, k] = clip(round(h[m, k] / s[m] + half) - half', -2^(b-1), 2^(b-1) - 1)        value = s (c + half)

half is 1/2 on a mid-rise grid and 0 on an integer one. A rotation keeps the length of a row, so the scales are a
reduction of x itself, by XLA, and the kernel is one pass in which every block of 256 columns goes its own way. Each 32
columns of H are a product of their own, whose result is a plane of the layout "planes/1": packing moves nothing between
threads.
Source: Panferov et al. 2025, arXiv:2502.05003, algorithm 1.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import launch, planes
from pallas_kernels.checks import NoKernel, check_bits, check_matrix, fail
from pallas_kernels.launch import Tile

CHUNK = 128  # K is a multiple of this: whole blocks of any rotation
MASK_BLOCK = planes.block_length(1, 8)  # contraction indices of a row of mask words
_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
_ROUND_BITS = 0x4B400000
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def hadamard_quantize(
    x: Float[Array, "m k"],
    *,
    bits: int,
    alpha: float,
    block: int | None = 128,
    midrise: bool = True,
    trust: float | None = None,
    axis: int = 1,
    tile: Tile | None = None,
    impl: str = "triton",
) -> tuple[Int[Array, "m k"], Float[Array, "m"], Int[Array, "blocks rows 32"] | None]:
    """int8 codes of the rotated rows, their scales, and the packed trust mask (None without `trust`).

    alpha: the scale is alpha times the row's root mean square. block: rows of the Hadamard matrix, 32, 64 or 128, or
    None for no rotation. trust: elements with |h| <= trust * scale get mask bit 1; words as `planes.pack(mask, 1, 8)`.
    axis=0 takes x as [K, M] (a weight whose contraction axis leads) and answers as if it were transposed. A row of
    zeros has scale 0 and codes that its values do not see. float32 is taken as the sum of two bfloat16 numbers, 16 bits
    of mantissa. Reference: `impl="xla"`; equal but for codes at a decision point, where the order of sums decides.
    Raises: ValueError for bits or blocks out of range, NoKernel for K that 128 does not divide, TypeError for
    dtypes."""
    who = "hadamard_quantize"
    launch.check_impl(who, impl)
    check_bits(who, bits)
    check_matrix(who, "x", x, _DTYPES)
    if axis not in (0, 1):
        fail(who, f"got axis={axis}", "The contraction axis of a matrix is 0 or 1")
    k = x.shape[axis]
    if block not in (None, 32, 64, 128) or (block is not None and k % block):
        fail(who, f"got block={block} for K={k}", "Blocks are 32, 64 or 128 and divide K, or None")
    if not (math.isfinite(alpha) and alpha > 0):
        fail(who, f"got alpha={alpha}", "It is a positive multiple of the root mean square")
    options = dict(bits=bits, alpha=float(alpha), block=block, midrise=midrise, trust=trust)
    if impl == "xla":
        return _reference(x if axis == 1 else x.T, **options)
    if k % CHUNK:
        raise NoKernel(f"{who} works on {CHUNK} columns at once, and K={k} leaves {k % CHUNK}. Use impl='xla'.")
    return _run(x, axis, impl, tile or default_tile(x.shape[1 - axis]), **options)


def default_tile(m: int) -> Tile:
    """64 rows, which a warp group's product takes, where there are as many."""
    return Tile(rows=launch.power_of_two(m, 16, 64), columns=128, warps=4, stages=2)


def signed_hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix of +1 and -1, float32."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def grid(bits: int, midrise: bool) -> tuple[int, int, float]:
    """(lowest code, highest code, what is added to a code to give its value)."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1, 0.5 if midrise else 0.0


def _reference(x, *, bits, alpha, block, midrise, trust):
    low, high, half = grid(bits, midrise)
    x = x.astype(jnp.float32)
    scale = _scale(x, 1, alpha)
    if block is None:
        h = x
    else:
        tiles = x.reshape(x.shape[0], -1, block)
        matrix = signed_hadamard(block) * np.float32(block**-0.5)
        h = lax.dot_general(tiles, matrix, (((2,), (0,)), ((), ())), lax.Precision.HIGHEST).reshape(x.shape)
    v = h * _inverse(scale)[:, None]
    codes = jnp.clip(jnp.round(jnp.clip(v + half, low - 1, high + 2)) - 2 * half, low, high).astype(jnp.int8)
    if trust is None:
        return codes, scale, None
    [mask] = planes.pack((jnp.abs(v) <= trust).astype(jnp.uint8), 1, 8)
    return codes, scale, mask[:, : x.shape[0]]


def _scale(x, axis, alpha):
    x = x.astype(jnp.float32)
    return jnp.sqrt(jnp.sum(x * x, axis=axis) * np.float32(1 / x.shape[axis])) * np.float32(alpha)


def _inverse(scale):
    return jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))


def _run(x, axis, impl, tile, *, bits, alpha, block, midrise, trust):
    m, k = x.shape[1 - axis], x.shape[axis]
    scale = _scale(x, axis, alpha)
    padded = [-(-m // tile.rows) * tile.rows, -(-k // MASK_BLOCK) * MASK_BLOCK]
    sides = padded if axis == 1 else padded[::-1]
    xp = jnp.pad(x, [(0, size - n) for size, n in zip(sides, x.shape, strict=True)])
    parts = _halves(xp) if x.dtype == jnp.float32 else (xp,)
    factor = jnp.pad(_inverse(scale) * np.float32(1.0 if block is None else block**-0.5), (0, padded[0] - m))
    matrix = jnp.asarray(signed_hadamard(block) if block else np.eye(32, dtype=np.float32), parts[0].dtype)
    kernel = functools.partial(
        _kernel, bits=bits, block=block or 32, midrise=midrise, trust=trust, axis=axis, parts=len(parts)
    )
    out_shape = [jax.ShapeDtypeStruct(tuple(padded), jnp.int8)]
    out_specs = [pl.BlockSpec((tile.rows, MASK_BLOCK), lambda i, j: (i, j))]
    if trust is not None:
        out_shape.append(jax.ShapeDtypeStruct((padded[1] // MASK_BLOCK, padded[0], planes.COLUMNS), jnp.int8))
        out_specs.append(pl.BlockSpec((1, tile.rows, planes.COLUMNS), lambda i, j: (j, i, 0)))
    if axis == 1:
        taken = pl.BlockSpec((tile.rows, MASK_BLOCK), lambda i, j: (i, j))
    else:
        taken = pl.BlockSpec((MASK_BLOCK, tile.rows), lambda i, j: (j, i))
    out = launch.call(
        kernel, f"hadamard_quantize{bits}", impl, tile, grid=(padded[0] // tile.rows, padded[1] // MASK_BLOCK),
        in_specs=[
            pl.BlockSpec((tile.rows,), lambda i, j: (i,)),
            pl.BlockSpec(matrix.shape, lambda i, j: (0, 0)),
            *[taken for _ in parts],
        ],
        out_specs=tuple(out_specs), out_shape=tuple(out_shape),
    )(factor, matrix, *parts)  # fmt: skip
    return out[0][:m, :k], scale, out[1][:, :m] if trust is not None else None


def _halves(x: Float[Array, "*s"]) -> tuple[Array, Array]:
    """Two bfloat16 numbers whose sum is the float32 one to 16 bits of mantissa."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _kernel(factor_ref, h_ref, *refs, bits, block, midrise, trust, axis, parts):
    x_refs, (code_ref, *mask_refs) = refs[:parts], refs[parts:]
    low, high, half = grid(bits, midrise)
    factor = factor_ref[...][:, None]
    word = jnp.zeros((factor_ref.shape[0], planes.COLUMNS), jnp.int32)
    for j in range(MASK_BLOCK // 32):
        start = 32 * j // block * block
        columns, v = h_ref[:, pl.ds(32 * j % block, 32)], 0.0
        for ref in x_refs:
            part = ref[:, pl.ds(start, block)] if axis == 1 else ref[pl.ds(start, block), :].T
            v = v + jnp.dot(part, columns, preferred_element_type=jnp.float32)
        v = v * factor
        # The clip stands between the two additions, which XLA would merge into one of 12582912.5, inexact.
        rounded = jnp.minimum(jnp.maximum(v + half, low - 1.0), high + 2.0) + _ROUND
        code = lax.bitcast_convert_type(rounded, jnp.int32) - (_ROUND_BITS + int(2 * half))
        code_ref[:, pl.ds(32 * j, 32)] = jnp.minimum(jnp.maximum(code, low), high).astype(jnp.int8)
        if trust is not None:
            word = word | jnp.where(jnp.abs(v) <= trust, 1 << j, 0)
    if trust is not None:
        mask_refs[0][0, :, :] = word.astype(jnp.int8)
