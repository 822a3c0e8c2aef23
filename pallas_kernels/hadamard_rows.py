"""The kernel of `hadamard_quantize` for matrices whose rows are contracted: a program takes whole rows, one group after
the other.

The chunks of 128 indices of its rows are the rows of one product with the whole matrix of the blocks, which a program
reads once; while one group is rounded and packed the next one is on its way. The four planes of a chunk are columns
32 apart of the product, which one thread holds, so that words are put together where the numbers are.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int32

from pallas_kernels import launch, masks, planes
from pallas_kernels.hadamard import CHUNK, MASK_BLOCK, both, halves, signed_blocks
from pallas_kernels.launch import Tile
from pallas_kernels.rounder import Rounder, inverse, scale_of

_PLANES = CHUNK // planes.COLUMNS
LONGEST = 128 * CHUNK  # contraction indices of a row, which a program holds


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of an [M, K] matrix a program owns: `turns` groups of `rows`, each of `wide` chunks, a power of two;
    those behind the end of a row are copies of its last one."""

    m: int
    k: int
    rows: int
    wide: int
    turns: int
    programs: int

    @classmethod
    def of(cls, m: int, k: int, tile: Tile, covered: int) -> "Rows":
        """tile.rows: chunks at once, `split`: groups of a program; covered: rows there are words for, m or more."""
        wide = launch.power_of_two(k // CHUNK, 2, LONGEST // CHUNK)
        rows = max(1, tile.rows // wide)
        return cls(m, k, rows, wide, tile.split, -(-covered // (rows * tile.split)))

    @property
    def count(self) -> int:
        return self.rows * self.wide

    @property
    def covered(self) -> int:
        return self.rows * self.turns * self.programs

    def by_row(self, values: Array) -> Array:
        """[rows], the sums of a number of each chunk."""
        return jnp.sum(values.reshape(self.rows, self.wide), axis=1, dtype=values.dtype)

    def of_row(self, values: Array) -> Array:
        """[chunks, 1], the number of each chunk's row; of one row [], which has no layout that would be moved."""
        if self.rows == 1:
            return jnp.sum(values)
        return jnp.broadcast_to(values[:, None], (self.rows, self.wide)).reshape(self.count)[:, None]


def run(
    x: Array,
    impl: str,
    tile: Tile,
    *,
    bits: int,
    alpha: float,
    block: int | None,
    midrise: bool,
    trust: float | None,
    packed: bool,
) -> tuple[Array, Array, Array, Array | None, tuple[Array, ...] | None]:
    """The fields of `Quantized`."""
    m, k = x.shape
    own = Rows.of(m, k, tile, planes.padded_n(m) if packed else m)
    out_shape = [jax.ShapeDtypeStruct(*of) for of in (((m, k), jnp.int8), ((m,), jnp.float32), ((m,), jnp.int32))]
    if trust is not None:
        out_shape.append(jax.ShapeDtypeStruct((-(-k // MASK_BLOCK), m, planes.COLUMNS), jnp.int8))
    if packed:
        out_shape += [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in planes.word_shapes(m, k, bits, 8)]
    rounder = Rounder(bits, midrise, launch.assembly(impl))
    kernel = functools.partial(_kernel, own=own, alpha=alpha, norm=(block or 1) ** -0.5, trust=trust, rounder=rounder)
    codes, scales, sums, *rest = launch.call(
        kernel, f"hadamard_quantize{bits}", impl, tile, grid=(own.programs,), out_shape=tuple(out_shape)
    )(x, jnp.asarray(signed_blocks(block), jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype))
    mask = None if trust is None else rest.pop(0)
    return codes, scales, sums, mask, tuple(rest) if packed else None


def _kernel(x_ref, matrix_ref, code_ref, scale_ref, sum_ref, *refs, own, alpha, norm, trust, rounder):
    mask_ref, word_refs = (refs[0], refs[1:]) if trust is not None else (None, refs)
    first, matrix, shape = pl.program_id(0) * own.turns, matrix_ref[...], (own.count, CHUNK)
    dot = lambda part: jnp.dot(part, matrix, preferred_element_type=jnp.float32)
    over = lambda values: jnp.broadcast_to(values[:, None], shape)
    whole = own.wide * CHUNK == own.k
    of_chunks = lambda chunk: over(chunk * CHUNK) + lax.broadcasted_iota(jnp.int32, shape, 1)

    def turn(i, _):
        start, index = (first + i) * own.rows, lax.iota(jnp.int32, own.count)
        row, chunk = start + lax.div(index, jnp.int32(own.wide)), lax.rem(index, jnp.int32(own.wide))
        original = None if whole else chunk < own.k // CHUNK  # not a copy
        inside = both(None if own.covered == own.m else row < own.m, original)
        column = of_chunks(chunk if whole else jnp.minimum(chunk, own.k // CHUNK - 1))
        place = over(row if own.covered == own.m else jnp.minimum(row, own.m - 1)), column
        x = x_ref.at[place][...]
        if x.dtype == jnp.float32:
            high, low = halves(x, rounder.assembly)
            h, squares = dot(high) + dot(low), jnp.sum(x * x, axis=1)
        else:  # the blocks are orthogonal
            h = dot(x)
            squares = jnp.sum(h * (h * np.float32(norm**2)), axis=1)
        counted = lambda values: values if original is None else jnp.where(original, values, jnp.zeros_like(values))
        scale = scale_of(own.by_row(counted(squares)), own.k, alpha)
        bits = rounder(h, own.of_row(inverse(scale) * np.float32(norm / rounder.top)))
        code_ref.at[place][...] = rounder.int8(bits)  # the copy of a chunk or row writes what the original does
        sums = rounder.sums(own.by_row(counted(jnp.sum(bits, axis=1, dtype=jnp.int32))), own.k, 0)
        rows = start + lax.iota(jnp.int32, own.rows)
        there = None if own.covered == own.m else rows < own.m
        masks.store(scale_ref.at[rows], scale, there)
        masks.store(sum_ref.at[rows], sums, there)
        above = rounder.bits
        for ref, field in zip(word_refs, planes.FIELDS[rounder.bits], strict=True) if word_refs else ():
            above -= field
            turned, ones = rounder.turned(bits), (1 << field) - 1
            part = (lax.shift_right_logical(turned, jnp.int32(above)) if above else turned) & ones
            _store_words(ref, part, field, own, row, chunk, inside)
        if mask_ref is not None:
            limit = own.of_row(jnp.where(scale == 0, 0.0, scale * np.float32(trust / norm)))
            _store_words(mask_ref, (jnp.abs(h) <= limit).astype(jnp.int32), 1, own, row, chunk, inside)
        return _

    launch.loop(own.turns, turn, np.int32(0))


def _store_words(
    ref: Any, part: Int32[Array, "c 128"], field: int, own: Rows, row: Int32[Array, "c"], chunk: Int32[Array, "c"],
    inside: Bool[Array, "c"] | None,
) -> None:  # fmt: skip
    """The words of a field, `part` its bits of every index: 0 where the matrix has no element, and written where the
    array has a word."""
    each = 8 // field  # planes of a word
    here = min(each, _PLANES)  # of them in one chunk
    shape = own.count, _PLANES // here, planes.COLUMNS
    word = part.reshape(*shape[:2], here, planes.COLUMNS)
    if here > 1:
        word = word << field * lax.broadcasted_iota(jnp.int32, (1, 1, here, 1), 2)
    word = jnp.sum(word, axis=2, dtype=jnp.int32)
    if inside is not None:
        word = jnp.where(inside[:, None, None], word, 0)
    at = chunk
    if each > here:  # of two chunks
        shape = own.count // 2, 1, planes.COLUMNS
        pairs = word.reshape(own.count // 2, 2, planes.COLUMNS)
        word = jnp.sum(pairs << _PLANES * lax.broadcasted_iota(jnp.int32, (1, 2, 1), 1), axis=1, dtype=jnp.int32)
        word, half = word[:, None, :], lax.iota(jnp.int32, own.count // 2)
        at = lax.rem(half, jnp.int32(own.wide // 2))
        row = jnp.max(row.reshape(own.count // 2, 2), axis=1)
    spread_over = lambda values: jnp.broadcast_to(values[:, None, None], shape)
    block = spread_over(at * shape[1]) + lax.broadcasted_iota(jnp.int32, shape, 1)
    column, rows = lax.broadcasted_iota(jnp.int32, shape, 2), spread_over(row)
    blocks = own.wide * CHUNK // planes.block_length(field, 8)
    stored = both(
        None if blocks == ref.shape[0] else block < ref.shape[0],
        None if own.covered == ref.shape[1] else rows < ref.shape[1],
    )
    masks.store(ref.at[block, rows, column], word.astype(jnp.int8), stored)
