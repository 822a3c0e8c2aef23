"""Block Hadamard rotations as kernels do them: rows in pieces of 256 indices, a piece in eight planes of 32.

H of 128 is H_4 (x) H_32, so the planes of a block meet one 32x32 matrix of signs each and are then added and
subtracted among themselves: a quarter of the products of the whole matrix, and nothing moves between threads. A plane
of the result is a plane of the layout "planes/1".
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import launch, planes
from pallas_kernels.checks import NoKernel, check_integer, fail
from pallas_kernels.launch import Tile

CHUNK = 128  # K is a multiple of this: whole blocks of any rotation
MASK_BLOCK = planes.block_length(1, 8)  # contraction indices of a row of mask words, and of a piece
PLANES = MASK_BLOCK // planes.COLUMNS
_MOST = 2**31 - 1  # elements: offsets have 32 bits


def check_block(who: str, block: int | None, k: int) -> None:
    """Raises: ValueError for other blocks than 32, 64, 128 that divide k, or None, TypeError for no integer."""
    if block is not None:
        check_integer(who, "block", block)
    if block not in (None, 32, 64, 128) or (block is not None and k % block):
        fail(who, f"got block={block} for K={k}", "Blocks are 32, 64 or 128 and divide K, or None")


def check_size(who: str, m: int, k: int) -> None:
    """Raises: ValueError for more elements than 32-bit offsets reach, counted in whole pieces."""
    if m * -(-k // MASK_BLOCK) * MASK_BLOCK > _MOST:
        fail(who, f"got M={m} rows of K={k}: {m * k} elements, and offsets have 32 bits", "Cut the rows into parts")


def check_chunk(who: str, k: int) -> None:
    """Raises: NoKernel for K that 128 does not divide."""
    if k % CHUNK:
        raise NoKernel(f"{who} works on {CHUNK} columns at once, and K={k} leaves {k % CHUNK}. Use impl='xla'.")


def signed_hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix of +1 and -1, float32."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def signed_blocks(block: int | None) -> np.ndarray:
    """A chunk's matrix of blocks of +1 and -1, [128, 128] float32; None is the identity."""
    return np.kron(np.eye(CHUNK // (block or 1), dtype=np.float32), signed_hadamard(block or 1))


def rotated(
    parts: list[Float[Array, "p 32"]], matrix: Float[Array, "32 32"], block: int | None, assembly: bool
) -> list[Float[Array, "p 32"]]:
    """Four planes, the 128 indices of a chunk, times the signed matrix of the block, in float32; not yet times
    block^-1/2.

    float32 planes are taken as the sum of two bfloat16 ones, 16 bits of mantissa."""
    if block is None:
        return [part.astype(jnp.float32) for part in parts]
    dot = lambda part: jnp.dot(part, matrix, preferred_element_type=jnp.float32)
    turned = []
    for part in parts:
        high, low = halves(part, assembly) if part.dtype == jnp.float32 else (part, None)
        turned.append(dot(high) if low is None else dot(high) + dot(low))
    for stride in (1, 2)[: (block // planes.COLUMNS).bit_length() - 1]:
        turned = [
            turned[j] + turned[j + stride] if not j & stride else turned[j - stride] - turned[j] for j in range(4)
        ]
    return turned


def halves(x: Float[Array, "*s"], assembly: bool) -> tuple[Array, Array]:
    """Two bfloat16 numbers whose sum is the float32 one to 16 bits of mantissa."""
    if not assembly:
        high = x.astype(jnp.bfloat16)
        return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    high = "cvt.rn.bf16x2.f32 h, $2, $1; "
    low = "shl.b32 t, h, 16; and.b32 u, h, 0xffff0000; mov.b32 a, t; mov.b32 b, u; sub.f32 a, $1, a; sub.f32 b, $2, b; "
    return _pairs(high + "mov.b32 $0, h;", x), _pairs(high + low + "cvt.rn.bf16x2.f32 $0, b, a;", x)


def _pairs(text, x):
    [out] = plgpu.elementwise_inline_asm(
        f"{{ .reg .b32 h, t, u; .reg .f32 a, b; {text} }}", args=[x], constraints="=r,f,f", pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)],
    )  # fmt: skip
    return out


@dataclasses.dataclass(frozen=True, slots=True)
class Pieces:
    """Which pieces of an [M, K] matrix a program owns: of `rows` rows `steps` pieces at once, `turns` times.

    axis: where the contraction stands in the array that it reads in long runs: 1 puts the pieces of a row beside each
    other, 0 the rows of a piece."""

    m: int
    k: int
    axis: int
    rows: int
    steps: int
    turns: int
    programs: int

    @property
    def count(self) -> int:
        """Pieces held at once."""
        return self.rows * self.steps

    def places(self, program: Any, turn: Any) -> tuple[Int32[Array, "p"], Int32[Array, "p"]]:
        """(row, number of the piece in its row) of each piece."""
        p = lax.iota(jnp.int32, self.count)
        run = jnp.int32(self.steps if self.axis == 1 else self.rows)
        slow, fast = lax.div(p, run), lax.rem(p, run)  # `//` would hide from the compiler that neighbors are neighbors
        row, step = (slow, fast) if self.axis == 1 else (fast, slow)
        return program * self.rows + row, turn * self.steps + step

    def by_row(self, values: Array) -> Array:
        """[rows], the sums of a number of each piece."""
        return jnp.sum(values.reshape(self._shape), axis=self.axis, dtype=values.dtype)

    def of_row(self, values: Array) -> Array:
        """[pieces, 1], the number of each piece's row."""
        spread = values[:, None] if self.axis == 1 else values[None, :]
        return jnp.broadcast_to(spread, self._shape).reshape(self.count)[:, None]

    @property
    def _shape(self) -> tuple[int, int]:
        return (self.rows, self.steps) if self.axis == 1 else (self.steps, self.rows)

    def rows_inside(self, row: Int32[Array, "p"]) -> Bool[Array, "p"] | None:
        """Which rows are in the matrix; None for all."""
        return None if self.programs * self.rows == self.m else row < self.m

    def chunks_inside(
        self, row: Int32[Array, "p"], piece: Int32[Array, "p"]
    ) -> tuple[Bool[Array, "p"] | None, Bool[Array, "p"] | None]:
        """Whether the first and the second 128 indices of each piece are in the matrix; None for all of them."""
        rows = self.rows_inside(row)
        if self.steps * self.turns * MASK_BLOCK == self.k:
            return rows, rows
        first, second = (piece * MASK_BLOCK + at < self.k for at in (0, CHUNK))
        return (first, second) if rows is None else (first & rows, second & rows)


def pieces(m: int, k: int, axis: int, tile: Tile, rows: int | None = None) -> Pieces:
    """`tile.rows` pieces at once, whole rows where they fit; of `tile.columns` rows with axis 0. rows: how many are to
    be covered, m or more."""
    each = -(-k // MASK_BLOCK)
    steps = launch.power_of_two(each, 1, tile.rows)
    if axis == 0:
        steps = min(steps, max(1, tile.rows // tile.columns))
    own = tile.rows // steps
    return Pieces(m=m, k=k, axis=axis, rows=own, steps=steps, turns=-(-each // steps), programs=-(-(rows or m) // own))


def index(row: Int32[Array, "p"], piece: Int32[Array, "p"], plane: int, axis: int) -> tuple[Array, Array]:
    """Indices of a plane of each piece in an array [M, K] (axis 1) or [K, M] (axis 0), both [pieces, 32]."""
    shape = (row.shape[0], planes.COLUMNS)
    at = (piece * MASK_BLOCK + plane * planes.COLUMNS)[:, None] + lax.iota(jnp.int32, planes.COLUMNS)[None, :]
    rows = jnp.broadcast_to(row[:, None], shape)
    return (rows, at) if axis == 1 else (at, rows)


def joined(parts: list[Array]) -> Array:
    """[pieces, 32, 2, 2] of the four planes of a chunk, nothing moved; plane 2 b + a at [..., a, b]."""
    first, second = jnp.stack(parts[:2], -1), jnp.stack(parts[2:], -1)
    return jnp.stack([first, second], -1)


def chunk_index(row: Int32[Array, "p"], piece: Int32[Array, "p"], chunk: int) -> tuple[Array, Array]:
    """Indices of what `joined` joins in an array [M, K]."""
    shape = (row.shape[0], planes.COLUMNS, 2, 2)
    iota = lambda axis: lax.broadcasted_iota(jnp.int32, (1, *shape[1:]), axis)
    within = chunk * CHUNK + iota(1) + planes.COLUMNS * iota(2) + 2 * planes.COLUMNS * iota(3)
    at = jnp.broadcast_to((piece * MASK_BLOCK)[:, None, None, None] + within, shape)
    return jnp.broadcast_to(row[:, None, None, None], shape), at


def word_index(row: Int32[Array, "p"], block: Int32[Array, "p"]) -> tuple[Array, Array, Array]:
    """Indices of a block of each piece in an array of words [blocks, M, 32], all [pieces, 32]."""
    shape = (row.shape[0], planes.COLUMNS)
    columns = jnp.broadcast_to(lax.iota(jnp.int32, planes.COLUMNS)[None, :], shape)
    return jnp.broadcast_to(block[:, None], shape), jnp.broadcast_to(row[:, None], shape), columns


def spread(inside: Bool[Array, "p"] | None, shape: tuple[int, ...] | None = None) -> Bool[Array, "p ..."] | None:
    """The mask of something of each piece, a plane or what has the shape; None stays None."""
    if inside is None:
        return None
    shape = shape or (inside.shape[0], planes.COLUMNS)
    return jnp.broadcast_to(inside.reshape(-1, *[1] * (len(shape) - 1)), shape)


def both(a: Any, b: Any) -> Any:
    """Both masks; None counts as everywhere."""
    return b if a is None else a if b is None else a & b
