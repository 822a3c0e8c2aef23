"""How an array of an optimizer's state is stored in few bits: codecs, and the array in storage.

A codec is frozen data with `encode(x) -> parts` and `decode(parts, shape) -> float32`. Codes are packed bytes, in a
`QTensor` wherever scale times element is the value, so that they shard, donate and checkpoint like any array. Elements
that are not finite are stored as 0 (the smallest code where the grid has no zero) and touch no other element's scale.
"""

import dataclasses
import functools
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from lowbit_jax import coding, packing, rounding
from lowbit_jax.formats.base import Codebook, FloatFormat, Format
from lowbit_jax.formats.catalogue import DYNAMIC_TREE4, DYNAMIC_TREE8, E4M3
from lowbit_jax.optim.codebooks import LINEAR4_WITHOUT_ZERO, UNSIGNED_DYNAMIC_TREE8
from lowbit_jax.optim.dynamic_tree import is_tree, tree_code
from lowbit_jax.optim.nearest_code import nearest_code, value_of
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import Fit, Group, absmax, mean_abs
from lowbit_jax.scaling.fit import guard_zero_tiles, reciprocal


@runtime_checkable
class StateCodec(Protocol):
    def encode(self, x: Float[Array, "*s"]) -> Any: ...

    def decode(self, parts: Any, shape: tuple[int, ...]) -> Float[Array, "*s"]: ...

    @property
    def grid(self) -> Format: ...

    def describe(self) -> str: ...


_AN_ARRAY = jax.tree.structure(0)  # a tree and not None, which a tree cannot be compared with


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of an optimizer's state in few bits: what its codec made of it, and its shape.

    within: the tree of the variable that held the array (Flax NNX keeps arrays in variables), else that of an array."""

    parts: Any
    codec: StateCodec = dataclasses.field(metadata=dict(static=True))
    shape: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    within: Any = dataclasses.field(default=_AN_ARRAY, metadata=dict(static=True))

    @classmethod
    def of(cls, x: Array, codec: StateCodec) -> "Stored":
        return cls(codec.encode(x.astype(jnp.float32)), codec, tuple(x.shape))

    def dequantize(self) -> Float[Array, "*s"]:
        """The array, float32."""
        return self.codec.decode(self.parts, self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self.parts))

    def __repr__(self) -> str:
        return f"Stored({list(self.shape)}, {self.codec.describe()}, {self.nbytes} bytes)"


def blocked_shape(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """The shape in which blocks lie along the last axis: as few trailing axes merged as make it a multiple of `block`;
    all of them, padded, where none does. In memory order the blocks are those of the flattened array, as the peers have
    them, and leading axes keep their sharding."""
    length = 1
    for kept in range(len(shape) - 1, -1, -1):
        length *= shape[kept]
        if length % block == 0:
            return (*shape[:kept], length)
    return (-(-length // block) * block,)


def in_blocks(x: Float[Array, "*s"], block: int) -> Float[Array, "*rows length"]:
    """`x` in its blocked shape, zeros at the end where it was padded."""
    shape = blocked_shape(x.shape, block)
    missing = math.prod(shape) - x.size
    return jnp.pad(x.reshape(-1), (0, missing)) if missing else x.reshape(shape)


def tiled(rows: Float[Array, "*rows length"], block: int) -> Float[Array, "*tiles block"]:
    """Rows as blocks along the last axis, without an axis of length 1 where a row is a block: XLA's CPU compiler makes
    code of half the speed of three axes, one of which is 1."""
    return rows if rows.shape[-1] == block else rows.reshape(*rows.shape[:-1], -1, block)


def a_block(scale: Float[Array, "*tiles 1"], rows: Float[Array, "*rows length"]) -> Float[Array, "*rows blocks 1"]:
    """Scales of `tiled` rows as they are stored."""
    return scale.reshape(*rows.shape[:-1], -1, 1)


def out_of_blocks(rows: Float[Array, "*rows length"], shape: tuple[int, ...]) -> Float[Array, "*s"]:
    size = math.prod(shape)
    return (rows if rows.size == size else rows.reshape(-1)[:size]).reshape(shape)


def _folded(tiles: Float[Array, "*tiles size"], fit: Fit) -> Float[Array, "*tiles less"]:
    """Tiles with the same largest magnitudes, an eighth as long: a maximum of slices. XLA's CPU compiler vectorizes it
    together with what makes the tiles, and not so a reduction along the last axis (eight times slower)."""
    size = tiles.shape[-1]
    if fit is not absmax or size % 8:
        return tiles
    slices = [jnp.abs(tiles[..., i * size // 8 : (i + 1) * size // 8]) for i in range(8)]
    return functools.reduce(lambda a, b: jnp.where(a > b, a, b), slices)


def codes_of(u: Float[Array, "*s"], fmt: Format) -> Array:
    """Codes of the grid values nearest to `u`."""
    if isinstance(fmt, Codebook):
        return tree_code(u, fmt) if is_tree(fmt) else nearest_code(u, fmt)
    return coding.encode(rounding.nearest(u, fmt), fmt)


def values_of(codes: Array, fmt: Format) -> Float[Array, "*s"]:
    return value_of(codes, fmt) if isinstance(fmt, Codebook) else coding.decode(codes, fmt)


def words_of(u: Float[Array, "*rows length"], fmt: Format) -> UInt8[Array, "*rows bytes"]:
    """The codes of the grid values nearest to `u`, packed as `packing.pack` has them."""
    codes = _apart(codes_of(u, fmt)) if fmt.bits < 8 else codes_of(u, fmt)
    if fmt.bits != 4 or u.shape[-1] % 2:
        return packing.pack(codes, fmt.bits)
    pairs = codes.reshape(*u.shape[:-1], -1, 2)
    pair = lax.bitcast_convert_type(pairs, jnp.uint16)  # the first code is the low byte
    return (pair | lax.shift_right_logical(pair, jnp.uint16(4))).astype(jnp.uint8)


def values_of_words(words: UInt8[Array, "*rows bytes"], fmt: Format, length: int) -> Float[Array, "*rows length"]:
    """The grid values of packed codes, rows of `length`."""
    if fmt.bits != 4 or length % 2:
        return values_of(packing.unpack(words, fmt.bits, length), fmt)
    pair = words.astype(jnp.uint16)
    pair = (pair | lax.shift_left(pair, jnp.uint16(4))) & jnp.uint16(0x0F0F)
    codes = _apart(lax.bitcast_convert_type(pair, jnp.uint8).reshape(*words.shape[:-1], length))
    return values_of(codes, fmt)


def _apart(codes: Array) -> Array:
    """Codes that XLA's CPU compiler makes by themselves: together with what packs or unpacks them it makes them one by
    one, and some twice (six times slower)."""
    return lax.optimization_barrier(codes) if jax.default_backend() == "cpu" else codes


def finite(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def above_zero(u: Float[Array, "*s"], x: Float[Array, "*s"], fmt: Format) -> Float[Array, "*s"]:
    """`u`, at least the smallest positive value of the grid wherever `x` is positive."""
    least = min(v for v in fmt.levels if v > 0)
    return jnp.where(x > 0, jnp.maximum(u, least), u)


@dataclasses.dataclass(frozen=True, slots=True, weakref_slot=True)
class Blockwise:
    """Each run of `block` elements, in memory order, has a scale: by default its largest magnitude.

    positive_stays: what is above 0 is stored as the smallest positive value where it would round to 0, for second
    moments: beside one large gradient that of a rare feature would become 0 while its first moment does not, and
    m / (sqrt(0) + eps) is a step thousands of times too long. bitsandbytes and torchao round to 0 there; every other
    code is theirs.
    Source: Dettmers et al. 2022, arXiv:2110.02861, section 2.1. Raises: ValueError for a block below 1."""

    format: Format
    block: int = 256
    fit: Fit = absmax
    positive_stays: bool = False

    def __post_init__(self):
        if self.block < 1:
            raise ValueError(f"Blockwise(block={self.block}): a block has at least 1 element; the peers take 256.")

    @property
    def grid(self) -> Format:
        return self.format

    @property
    def quantizer(self) -> Quantizer:
        return Quantizer(format=self.format, tiling=Group(self.block), fit=self.fit)

    def encode(self, x: Float[Array, "*s"]) -> QTensor:
        rows = in_blocks(finite(x), self.block)
        tiles = tiled(rows, self.block)
        scale = self.fit(_folded(tiles, self.fit), self.format, (tiles.ndim - 1,))
        if self.fit is mean_abs and (padded := rows.size - x.size):  # zeros that are not there must not count
            scale = scale.at[-1].multiply(self.block / (self.block - padded))
        u = tiles * reciprocal(scale)
        u = above_zero(u, tiles, self.format) if self.positive_stays else u
        return QTensor(
            words=words_of(u.reshape(rows.shape), self.format),
            scales=(a_block(scale, rows),),
            marks=None,
            quantizer=self.quantizer,
            axis=-1,
            length=rows.shape[-1],
            dtype=jnp.dtype(jnp.float32),
        )

    def decode(self, parts: QTensor, shape: tuple[int, ...]) -> Float[Array, "*s"]:
        values = values_of_words(parts.words, self.format, parts.length)
        tiles = tiled(values, self.block)
        tiles = tiles * parts.scales[0].reshape(*tiles.shape[:-1], 1)
        return out_of_blocks(tiles.reshape(values.shape), shape)

    def describe(self) -> str:
        return f"{self.format.name} block {self.block}"


@dataclasses.dataclass(frozen=True, slots=True)
class PerElement:
    """A tiling in which nothing is shared; what stores so many scales in little space is the scale format."""

    def split(self, x, axis):
        return x, ()

    def describe(self) -> str:
        return "element"


def smaller_maximum(tiles: Float[Array, "*s"], fmt: Format, axes: tuple[int, ...]) -> Float[Array, "*s"]:
    """min(largest magnitude of the row, of the column), for each element of the matrices of the last two axes."""
    magnitude = jnp.abs(tiles)
    rows, columns = (jnp.max(magnitude, axis=axis, keepdims=True, initial=0) for axis in (-1, -2))
    return guard_zero_tiles(jnp.minimum(rows, columns) * (1 / fmt.reach), fmt)


@dataclasses.dataclass(frozen=True, slots=True)
class OuterMinimum:
    """A matrix of scales `min(row_i, column_j)`, stored as its rows and columns: they are its own row and column
    maxima."""

    def store(self, scale, fmt):
        return jnp.max(scale, axis=-1, keepdims=True), jnp.max(scale, axis=-2, keepdims=True)

    def load(self, stored):
        return jnp.minimum(*stored)

    def describe(self) -> str:
        return "min(row, column)"


@dataclasses.dataclass(frozen=True, slots=True, weakref_slot=True)
class RankOne:
    """Each element's scale is the smaller of the maxima of its row and its column, over the last two axes.

    An outlier spoils neither the rest of its row nor of its column. Arrays without two such axes, or too thin for the
    maxima to be small beside the codes, are stored in blocks of `block`.
    Source: Li et al. 2023, arXiv:2309.01507, section 4.2 (there over all axes; here leading axes, such as stacked
    layers, keep maxima of their own)."""

    format: Format
    block: int = 128

    @property
    def grid(self) -> Format:
        return self.format

    @property
    def quantizer(self) -> Quantizer:
        return Quantizer(format=self.format, tiling=PerElement(), fit=smaller_maximum, scale_format=OuterMinimum())

    def _fallback(self, shape: tuple[int, ...]) -> Blockwise | None:
        if len(shape) < 2 or math.prod(shape[-2:]) < 64 * sum(shape[-2:]):
            return Blockwise(self.format, self.block)
        return None

    def is_ranked(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape has scales of rows and columns (else blocks)."""
        return self._fallback(shape) is None

    def encode(self, x: Float[Array, "*s"]) -> QTensor:
        if blocks := self._fallback(x.shape):
            return blocks.encode(x)
        return self.encode_scaled(x, *(self.scales_of(x, axis) for axis in (-1, -2)))

    def scales_of(self, x: Float[Array, "*s"], axis: int) -> Float[Array, "*less"]:
        """Those of the rows (axis -1) or columns (axis -2), axes kept."""
        return jnp.max(jnp.abs(finite(x)), axis=axis, keepdims=True) * (1 / self.format.reach)

    def encode_scaled(self, x: Float[Array, "*s"], rows: Array, columns: Array) -> QTensor:
        """`x`, or some of its rows, by scales that are known."""
        # the scale of a row (or column) of zeros is never used beside one that is larger, but must not divide by zero
        scale = guard_zero_tiles(jnp.minimum(rows, columns), self.format)
        return QTensor(
            words=words_of(finite(x) * reciprocal(scale), self.format),
            scales=(rows, columns),
            marks=None,
            quantizer=self.quantizer,
            axis=-1,
            length=x.shape[-1],
            dtype=jnp.dtype(jnp.float32),
        )

    def decode(self, parts: QTensor, shape: tuple[int, ...]) -> Float[Array, "*s"]:
        if blocks := self._fallback(shape):
            return blocks.decode(parts, shape)
        return self.decode_scaled(parts)

    def decode_scaled(self, parts: QTensor) -> Float[Array, "*s"]:
        """The array, or the rows of it, whose scales of rows and columns are in `parts`."""
        values = values_of_words(parts.words, self.format, parts.length)
        return values * jnp.minimum(*parts.scales)

    def describe(self) -> str:
        return f"{self.format.name} rank-1"


@dataclasses.dataclass(frozen=True, slots=True, weakref_slot=True)
class Companded:
    """Each block is bent to the dynamic range of the format before it is rounded, and bent back after.

    With a, b the smallest (nonzero) and largest magnitude of a block and R the ratio of the largest to the smallest
    value of the format: k = floor(16 log R / log(b / a)) / 16, at most `largest_exponent`, and

        q = round(sign(x) (|x| / b)**k * max_finite),      x = sign(q) (|q| / max_finite)**(1 / k) b

    Stored beside the codes: b in float32 and 16 k in one byte, for each block. positive_stays: as in `Blockwise`.
    Source: Xi et al. 2024 (COAT), arXiv:2410.19313, section 4.1, dynamic range expansion; there |x| is taken relative
    to sqrt(a b), which the scale b that follows takes out again."""

    format: FloatFormat = E4M3
    block: int = 128
    largest_exponent: float = 15.0
    positive_stays: bool = False

    @property
    def grid(self) -> Format:
        return self.format

    def encode(self, x: Float[Array, "*s"]) -> dict[str, Array]:
        rows = in_blocks(finite(x), self.block)
        tiles = tiled(rows, self.block)
        magnitude = jnp.abs(tiles)
        largest = jnp.max(_folded(magnitude, absmax), axis=-1, keepdims=True)
        smallest = jnp.min(jnp.where(magnitude > 0, magnitude, jnp.inf), axis=-1, keepdims=True)
        exponent = self._exponent(largest, smallest)
        relative = magnitude * reciprocal(largest)
        bent = jnp.where(magnitude > 0, _power(jnp.log(relative), exponent.astype(jnp.float32) * (1 / 16)), 0.0)
        u = jnp.sign(tiles) * bent * self.format.max_finite
        u = above_zero(u, tiles, self.format) if self.positive_stays else u
        words = words_of(u.reshape(rows.shape), self.format)
        return {"words": words, "largest": a_block(largest, rows), "k": a_block(exponent, rows)}

    def _exponent(self, largest: Array, smallest: Array) -> Array:
        """16 k as a byte; 16 where the block has no range to bend (zeros, equal magnitudes)."""
        ratio = math.log(self.format.max_finite / min(v for v in self.format.levels if v > 0))
        spread = jnp.log(largest) - jnp.log(smallest)
        bendable = jnp.isfinite(spread) & (spread > 0)
        k = jnp.floor(16 * ratio / jnp.where(bendable, spread, 1.0))
        return jnp.where(bendable, jnp.clip(k, 1, 16 * self.largest_exponent), 16).astype(jnp.uint8)

    def decode(self, parts: dict[str, Array], shape: tuple[int, ...]) -> Float[Array, "*s"]:
        length = blocked_shape(shape, self.block)[-1]
        values = values_of_words(parts["words"], self.format, length)
        tiles = tiled(values, self.block) * (1 / self.format.max_finite)
        largest, k = (parts[name].reshape(*tiles.shape[:-1], 1) for name in ("largest", "k"))
        magnitude = jnp.abs(tiles)
        unbent = jnp.where(magnitude > 0, _power(jnp.log(magnitude), 16 / k.astype(jnp.float32)), 0.0)
        return out_of_blocks((jnp.sign(tiles) * unbent * largest).reshape(values.shape), shape)

    def describe(self) -> str:
        return f"{self.format.name} companded, block {self.block}"


def _power(log_of_base: Float[Array, "*s"], exponent: Float[Array, "*#s"]) -> Float[Array, "*s"]:
    """base**exponent, within |exponent log base| units of float32's precision. XLA's CPU compiler vectorizes `exp` and
    `log`, and calls a function of the C library for each `pow`."""
    return jnp.exp(exponent * log_of_base)


def for_second_moment(codec: StateCodec) -> StateCodec:
    """The codec, one that never rounds a positive value to 0 where the library can say so."""
    return dataclasses.replace(codec, positive_stays=True) if isinstance(codec, Blockwise | Companded) else codec


FIRST_MOMENT: dict[int | str, StateCodec] = {
    8: Blockwise(DYNAMIC_TREE8, 256),
    4: Blockwise(DYNAMIC_TREE4, 128),
    "e4m3": Blockwise(E4M3, 256),
    "coat": Companded(E4M3, 128),
}
SECOND_MOMENT: dict[int | str, StateCodec] = {
    8: for_second_moment(Blockwise(UNSIGNED_DYNAMIC_TREE8, 256)),
    4: RankOne(LINEAR4_WITHOUT_ZERO),
    "e4m3": for_second_moment(Blockwise(E4M3, 256)),
    "coat": for_second_moment(Companded(E4M3, 128)),
}
