"""Rotate, fit, round, pack: h = x blockdiag(H), s = alpha rms(x), codes of h/s, their sums, and the trust mask.

    c[m, k] = clip(round(h[m, k] / s[m] + half) - 2 half, -2^(b-1), 2^(b-1) - 1)        value = s (c + half)

half is 1/2 on a mid-rise grid and 0 on an integer one.

The kernel here treats all pieces of 256 indices alike, whatever their row, so a program with 16 pieces has matrix
products of 16 rows from one row of 4096 indices or two of 2048. It holds its rows in registers from the sum of squares
to the codes: x is read once. Where a row is too long for that, or runs down the columns of a weight, the program reads
its rows twice, the second time from the end, where the cache still has them; that is faster than holding longer rows.
Tiles of 128 columns ask for another one, `hadamard_rows`.
Source: Panferov et al. 2025, arXiv:2502.05003, algorithm 1.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int8, Int32

from pallas_kernels import chips, hadamard_rows, launch, masks, planes, tuning
from pallas_kernels.checks import check_bits, check_finite, check_matrix, check_number, fail
from pallas_kernels.hadamard import (
    CHUNK,
    MASK_BLOCK,
    PLANES,
    both,
    check_block,
    check_chunk,
    check_size,
    chunk_index,
    index,
    joined,
    pieces,
    rotated,
    signed_hadamard,
    spread,
    word_index,
)
from pallas_kernels.launch import Tile
from pallas_kernels.rounder import Rounder, inline, inverse, scale_of

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


class Quantized(NamedTuple):
    """Rows as codes.

    scales: a step of each row, in units of x. sums: of each row's codes. mask: trust bits as `planes.pack(mask, 1, 8)`
    without its padded rows, None without `trust`. words: `planes.pack(codes + 2^(bits-1), bits, 8)`, None unless asked
    for."""

    codes: Int8[Array, "m k"]
    scales: Float[Array, "m"]
    sums: Int32[Array, "m"]
    mask: Int8[Array, "blocks m 32"] | None = None
    words: tuple[Int8[Array, "blocks rows 32"], ...] | None = None


def hadamard_quantize(
    x: Float[Array, "m k"],
    *,
    bits: int,
    alpha: float,
    block: int | None = 128,
    midrise: bool = True,
    trust: float | None = None,
    axis: int = 1,
    packed: bool = False,
    tile: Tile | None = None,
    impl: str = "triton",
) -> Quantized:
    """int8 codes of the rotated rows, their scales and sums, the packed trust mask and the packed codes.

    alpha: the scale is alpha times the row's root mean square. block: rows of the Hadamard matrix, 32, 64 or 128, or
    None for no rotation. trust: elements with |h| <= trust * scale get mask bit 1. axis=0 takes x as [K, M] (a weight
    whose contraction axis leads) and answers as if it were transposed. tile.rows: pieces of 256 indices that a program
    holds at once; tile.columns: columns of x that it owns with axis=0. With axis=1 and 128 columns, for K up to 16384:
    chunks of 128 indices at once, whole rows of them, and `split` such groups of rows one after the other.

    A row of zeros has scale 0 and codes that its values do not see. A row with NaN or infinity, or whose squares
    overflow, has scale NaN; its codes and mask mean nothing, and other rows are as without it. float32 is taken as the
    sum of two bfloat16 numbers, 16 bits of mantissa.
    Reference: `impl="xla"`; equal but for codes at a decision point, where the order of sums decides.
    Raises: ValueError for bits, blocks, alpha or trust out of range and from 2^31 elements on, NoKernel for K that 128
    does not divide, TypeError for dtypes and for alpha or trust that is not a plain number."""
    who = "hadamard_quantize"
    launch.check_impl(who, impl)
    check_bits(who, bits)
    check_matrix(who, "x", x, _DTYPES)
    if axis not in (0, 1):
        fail(who, f"got axis={axis}", "The contraction axis of a matrix is 0 or 1")
    m, k = x.shape[1 - axis], x.shape[axis]
    check_block(who, block, k)
    check_size(who, planes.padded_n(m) if packed else m, k)
    launch.check_tile(who, tile, splits=_by_rows(tile, axis))
    if _by_rows(tile, axis) and k > hadamard_rows.LONGEST:
        fail(who, f"got tile.columns={CHUNK} for K={k}", f"Rows are taken whole up to {hadamard_rows.LONGEST} indices")
    if not check_finite(who, "alpha", alpha) > 0:
        fail(who, f"got alpha={alpha}", "It is a positive multiple of the root mean square")
    if trust is not None and not check_number(who, "trust", trust) > 0:
        fail(who, f"got trust={trust}", "It is a positive multiple of the scale, or None for no mask")
    options: Any = dict(bits=bits, alpha=float(alpha), block=block, midrise=midrise, trust=trust)
    if impl == "xla":
        return _reference(x if axis == 1 else x.T, packed=packed, **options)
    check_chunk(who, k)
    tile = default_tile(m, k, axis, x.dtype, packed) if tile is None else tile
    if _by_rows(tile, axis):
        return Quantized(*hadamard_rows.run(x, impl, tile, packed=packed, **options))
    return _run(x, axis, packed, impl, tile, **options)


def default_tile(m: int, k: int, axis: int, dtype: Any, packed: bool = False) -> Tile:
    """The tuned tile of this shape's bucket, or what was fastest at every K on an H100: programs of two warps and 16
    pieces, whole rows up to K of 4096, so small that many run at once and some read while others compute. With axis=0
    runs of 64 bytes."""
    if found := tuning.lookup(tuning_key(m, k, axis, dtype, packed)):
        tile = Tile(**found)
        if k <= hadamard_rows.LONGEST if _by_rows(tile, axis) else tile.split == 1:
            return tile
    wide = jnp.dtype(dtype).itemsize // 2
    if axis == 1:
        return Tile(rows=16, warps=2, stages=1)
    if packed and wide == 2 and (8, 0) <= chips.traced_capability() < (9, 0):  # 64 rows spill on Ampere
        return Tile(rows=16, columns=32 // wide, warps=4, stages=1)
    return Tile(rows=64, columns=32 // wide, warps=8, stages=1)


def _by_rows(tile: Any, axis: int) -> bool:
    """Whether the tile asks for `hadamard_rows`."""
    return isinstance(tile, Tile) and tile.columns == CHUNK and axis == 1


def tuning_key(m: int, k: int, axis: int, dtype: Any, packed: bool) -> str:
    """Of the tile table; all widths take one tile."""
    name = f"hadamard_quantize_axis{axis}_{jnp.dtype(dtype).name}{'_packed' if packed else ''}"
    return tuning.key(name, 8, m, 1, k)


def grid(bits: int, midrise: bool) -> tuple[int, int, float]:
    """(lowest code, highest code, what is added to a code to give its value)."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1, 0.5 if midrise else 0.0


def _reference(x, *, bits, alpha, block, midrise, trust, packed):
    low, high, half = grid(bits, midrise)
    x = x.astype(jnp.float32)
    scale = scale_of(jnp.sum(x * x, axis=1), x.shape[1], alpha)
    if block is None:
        h = x
    else:
        tiles = x.reshape(x.shape[0], -1, block)
        matrix = signed_hadamard(block) * np.float32(block**-0.5)
        h = lax.dot_general(tiles, matrix, (((2,), (0,)), ((), ())), lax.Precision.HIGHEST).reshape(x.shape)
    v = h * inverse(scale)[:, None]
    codes = jnp.clip(jnp.round(jnp.clip(v + half, low - 1, high + 2)) - 2 * half, low, high).astype(jnp.int8)
    mask, words = None, None
    if trust is not None:
        mask = planes.pack((jnp.abs(v) <= trust).astype(jnp.uint8), 1, 8)[0][:, : x.shape[0]]
    if packed:
        words = planes.pack((codes.astype(jnp.int32) - low).astype(jnp.uint8), bits, 8)
    return Quantized(codes, scale, jnp.sum(codes, axis=1, dtype=jnp.int32), mask, words)


def _squares(total, part, assembly):
    """total + part^2, in float32."""
    if not assembly:
        return total + part.astype(jnp.float32) ** 2
    if part.dtype == jnp.bfloat16:
        text = "shl.b32 t, $2, 16; and.b32 u, $2, 0xffff0000; fma.rn.f32 $0, t, t, $3; fma.rn.f32 $1, u, u, $4;"
        return inline(f"{{ .reg .b32 t, u; {text} }}", "=f,=f,r,f,f", jnp.float32, part, total, pack=2)
    return inline("fma.rn.f32 $0, $1, $1, $2;", "=f,f,f", jnp.float32, part.astype(jnp.float32), total)


def _beyond(word, h, limit, assembly):
    """2 word, + 1 where |h| is larger than the limit (the sign of what is left of it)."""
    if not assembly:
        left = lax.bitcast_convert_type(limit - jnp.abs(h), jnp.int32)
        return word << 1 | lax.shift_right_logical(left, jnp.int32(31))
    text = "abs.f32 t, $2; sub.f32 t, $3, t; mov.b32 u, t; shf.l.wrap.b32 $0, u, $1, 1;"
    text = f"{{ .reg .f32 t; .reg .b32 u; {text} }}"
    return inline(text, "=r,r,f,f", jnp.int32, word, h, jnp.broadcast_to(limit, h.shape))


def _run(x, axis, packed, impl, tile, *, bits, alpha, block, midrise, trust):
    m, k = x.shape[1 - axis], x.shape[axis]
    own = pieces(m, k, axis, tile, planes.padded_n(m) if packed else m)
    out_shape = [jax.ShapeDtypeStruct(*of) for of in (((m, k), jnp.int8), ((m,), jnp.float32), ((m,), jnp.int32))]
    if trust is not None:
        out_shape.append(jax.ShapeDtypeStruct((-(-k // MASK_BLOCK), m, planes.COLUMNS), jnp.int8))
    if packed:
        out_shape += [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in planes.word_shapes(m, k, bits, 8)]
    kernel = functools.partial(
        _kernel, own=own, alpha=alpha, block=block, trust=trust, rounder=Rounder(bits, midrise, launch.assembly(impl))
    )
    codes, scales, sums, *rest = launch.call(
        kernel, f"hadamard_quantize{bits}", impl, tile, grid=(own.programs,), out_shape=tuple(out_shape)
    )(x, jnp.asarray(signed_hadamard(planes.COLUMNS), jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype))
    mask = None if trust is None else rest.pop(0)
    return Quantized(codes, scales, sums, mask, tuple(rest) if packed else None)


def _kernel(x_ref, matrix_ref, code_ref, scale_ref, sum_ref, *refs, own, alpha, block, trust, rounder):
    mask_ref, word_refs = (refs[0], refs[1:]) if trust is not None else (None, refs)
    program, matrix = pl.program_id(0), matrix_ref[...]
    shape, half = (own.count, planes.COLUMNS), PLANES // 2

    def load(turn):
        row, piece = own.places(program, turn)
        inside = own.chunks_inside(row, piece)
        return [masks.load(x_ref.at[index(row, piece, j, own.axis)], spread(inside[j // half])) for j in range(PLANES)]

    def squared(turn, total, parts=None):
        for part in load(turn) if parts is None else parts:
            total = _squares(total, part, rounder.assembly)
        return total

    parts = load(0) if own.turns == 1 else None  # held to the end
    nothing = jnp.zeros(shape, jnp.float32)
    squares = squared(0, nothing, parts) if parts else launch.loop(own.turns, squared, nothing)
    scale = scale_of(own.by_row(jnp.sum(squares, axis=1)), own.k, alpha)
    norm = 1.0 if block is None else block**-0.5
    gain = own.of_row(inverse(scale) * np.float32(norm / rounder.top))
    limit = None if trust is None else own.of_row(jnp.where(scale == 0, 0.0, scale * np.float32(trust / norm)))

    def finish(turn, total):
        turn = own.turns - 1 - turn
        row, piece = own.places(program, turn)
        inside, held = own.chunks_inside(row, piece), parts or load(turn)
        mask, low_words = jnp.zeros(shape, jnp.int32), {}
        for first in (half, 0):
            h = rotated(held[first : first + half], matrix, block, rounder.assembly)
            if mask_ref is not None:
                for each in reversed(h):
                    mask = _beyond(mask, each, limit, rounder.assembly)
            bits = [rounder(each, gain) for each in h]
            codes, at = joined([rounder.int8(each) for each in bits]), chunk_index(row, piece, first // half)
            masks.store(code_ref.at[at], codes, spread(inside[first // half], codes.shape))
            for each in bits:
                total = total + each
            above = rounder.bits
            for ref, field in zip(word_refs, planes.FIELDS[rounder.bits], strict=True) if word_refs else ():
                above -= field
                if field == 1:
                    low_words[above] = rounder.field(bits, first, 1, above) | low_words.get(above, 0)
                    if first == 0:
                        _store_words(ref, low_words[above], 0, 1, own, row, piece)
                    continue
                each = PLANES // field
                for b in range(0, half, each):
                    word = rounder.field(bits[b : b + each], 0, field, above)
                    _store_words(ref, word, (first + b) // each, field, own, row, piece)
        if mask_ref is not None:
            _store_words(mask_ref, ~mask, 0, 1, own, row, piece)
        return total

    none = jnp.zeros(shape, jnp.int32)
    total = finish(0, none) if parts else launch.loop(own.turns, finish, none)
    count = own.steps * own.turns * MASK_BLOCK
    sums = rounder.sums(own.by_row(jnp.sum(total, axis=1, dtype=jnp.int32)), count, count - own.k)
    rows = program * own.rows + lax.iota(jnp.int32, own.rows)
    inside = own.rows_inside(rows)
    masks.store(scale_ref.at[rows], scale, inside)
    masks.store(sum_ref.at[rows], sums, inside)


def _store_words(ref, word, b, field, own, row, piece):
    """Block b of a piece's `field`, zero where the matrix has no element, and written where the array has a word."""
    first, second = own.chunks_inside(row, piece)
    if first is not None and second is not None:
        chosen = lambda inside, ones: jnp.where(inside, ones, 0)[:, None]
        if field == 1:
            word = word & (chosen(first, 0x0F) | chosen(second, 0xF0))
        else:
            word = jnp.where((second if 2 * b >= field else first)[:, None], word, 0)
    at = piece * field + b
    inside = None if own.steps * own.turns * field == ref.shape[0] else at < ref.shape[0]
    rows = None if own.programs * own.rows == ref.shape[1] else row < ref.shape[1]
    masks.store(ref.at[word_index(row, at)], word.astype(jnp.int8), spread(both(inside, rows)))
