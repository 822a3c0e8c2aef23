"""A packed weight in the layout of the GPU kernels: a shift and a mask give whole slices of its contraction axis.

The layout "planes/1" is specified in `pallas_kernels/README.md`; `lb.convert(model, layout="planes/1")` makes such
weights.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from lowbit_jax import packing
from lowbit_jax.formats.base import Format, IntFormat, MidRiseFormat
from lowbit_jax.ops import backend
from lowbit_jax.qtensor import QTensor, check_concrete, register_packed
from lowbit_jax.scaling import CastScale, Group, PerRow, PerTensor

LAYOUT = "planes/1"
_VERSION = 1


@register_packed
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PlaneTensor(QTensor):
    """A `QTensor` whose words are arrays [blocks, rows, 32], one a field of its codes, for `pallas_kernels`.

    words: with leading axes of stacked layers in front. sums: int32 [rows], the sum of the codes of each row. stamp: an
    array whose shape is [version of the layout, bits of a code, bytes of a word], so that a checkpoint, which holds
    arrays alone, is not restored as weights of another layout. free: the axes beside the contraction axis and the
    stack, which are merged into rows. implementation: "auto" (the kernel on a CUDA GPU, else XLA), "kernel" (raise
    where it cannot run), "reference" (XLA) or "interpret" (the kernel, step by step)."""

    words: tuple[Array, ...]  # pyright: ignore[reportIncompatibleVariableOverride]
    sums: Any = None
    stamp: Any = None
    free: tuple[int, ...] = dataclasses.field(default=(), metadata=dict(static=True))
    implementation: str = dataclasses.field(default="auto", metadata=dict(static=True))

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of stacked layers."""
        return tuple(self.words[0].shape[:-3])

    @property
    def ndim(self) -> int:
        return len(self.stack) + len(self.free) + 1

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = [*self.stack, *self.free]
        sizes.insert(self.ndim + self.axis, self.length)
        return tuple(sizes)

    @property
    def rows(self) -> int:
        return math.prod(self.free)

    @property
    def groups(self) -> int:
        """Scales along the contraction axis."""
        tiling = self.quantizer.tiling
        return self.length // tiling.size if isinstance(tiling, Group) else 1

    @property
    def nbytes(self) -> int:
        """Bytes of the packed words, the stored scales and zero points, the code sums and the stamp."""
        leaves = jax.tree.leaves((self.words, self.scales, self.zeros, self.sums, self.stamp))
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)

    def check_layout(self) -> None:
        """Raises: ValueError when the words are of another layout, or another version of it, than is read here."""
        if self.layout != LAYOUT:
            raise ValueError(
                f"PlaneTensor has words of layout {self.layout!r}, and its readers know {LAYOUT!r}. Dequantize it with"
                " the version of lowbit_jax that wrote it, and convert again."
            )
        own = (_VERSION, self.quantizer.format.bits, jnp.dtype(self.words[0].dtype).itemsize)
        if self.stamp is not None and (told := tuple(self.stamp.shape[-3:])) != own:
            raise ValueError(
                f"PlaneTensor: its stamp says version {told[0]} of the layout, codes of {told[1]} bits in words of"
                f" {told[2]} bytes, and it is read as version {own[0]}, {own[1]} bits, words of {own[2]} bytes. Restore"
                " the checkpoint into a model that lb.convert made of the same recipe."
            )

    def validate(self, who: str = "PlaneTensor.validate") -> None:
        """As `QTensor.validate`; also the stamp, what pads the words, and the sums of the codes."""
        check_concrete((self.words, self.scales, self.sums, self.stamp), who)
        self.check_layout()
        bits, word_bits = self.quantizer.format.bits, 8 * jnp.dtype(self.words[0].dtype).itemsize
        unpack = lambda words: backend.unpack_planes(words, bits, self.rows, self.length)
        pack = lambda codes: backend.pack_planes(codes, bits, word_bits)
        for _ in self.stack:
            unpack, pack = jax.vmap(unpack), jax.vmap(pack)
        codes = unpack(self.words)
        if any(bool(jnp.any(new != old)) for new, old in zip(pack(codes), self.words, strict=True)):
            raise ValueError(f"{who}: the words hold codes behind the last row or the last of {self.length} columns.")
        sums = codes.astype(jnp.int32).sum(-1, dtype=jnp.int32)
        got = self.sums
        if got is None or got.dtype != jnp.int32 or got.shape != sums.shape or bool(jnp.any(got != sums)):
            told = "there are none" if got is None else f"{got.dtype}{list(got.shape)}"
            raise ValueError(
                f"{who}: the sums of the codes ({told}) are not those of the words, int32{list(sums.shape)}. The arrays"
                " belong to different weights, or one is damaged; convert again."
            )
        super().validate(who)

    def _codes(self) -> UInt8[Array, "*rows length"]:
        unpack = lambda words: backend.unpack_planes(words, self.quantizer.format.bits, self.rows, self.length)
        for _ in self.stack:
            unpack = jax.vmap(unpack)
        return unpack(self.words).reshape(*self.stack, *self.free, self.length)

    def scale_table(self) -> Float[Array, "groups rows"]:
        """The scales of one layer, [groups along the contraction, rows]: float32, or bfloat16 or float16 where they are
        stored so, which the kernels read too."""
        scale_format = self.quantizer.scale_format
        kept = isinstance(scale_format, CastScale) and scale_format.dtype in ("bfloat16", "float16")
        return self._table(self.scales[0] if kept else scale_format.load(self.scales).astype(jnp.float32))

    def zero_table(self) -> Float[Array, "groups rows"]:
        """The codes that stand for 0 in one layer, [groups along the contraction, rows], float32."""
        assert self.zeros is not None, "only a quantizer with zero points has them"
        return self._table(self.zeros.astype(jnp.float32))

    def _table(self, tiles: Array) -> Array:
        at = self.ndim + self.axis
        if isinstance(self.quantizer.tiling, Group):
            tiles = jnp.squeeze(tiles, at + 1)
        table = jnp.moveaxis(tiles, at, 0).reshape(tiles.shape[at], -1)
        return jnp.broadcast_to(table, (table.shape[0], self.rows))


def affine_zero(fmt: Format) -> float | None:
    """The code of value 0 in a uniform grid, where value = code - zero; None for other grids."""
    if isinstance(fmt, IntFormat):
        return float(-fmt.low)
    return fmt.max_finite if isinstance(fmt, MidRiseFormat) else None


def why_not(packed: QTensor) -> str | None:
    """Why the kernels cannot read this weight; None when they can."""
    q = packed.quantizer
    if affine_zero(q.format) is None:
        return f"the grid {q.format.name} is not uniform"
    if q.sparsity is not None:
        return f"the weight is sparse ({q.sparsity.describe()})"
    if isinstance(q.tiling, Group) and (q.tiling.size % 32 or packed.length % q.tiling.size):
        return f"groups of {q.tiling.size} are not a multiple of 32"
    if not isinstance(q.tiling, PerRow | PerTensor | Group):
        return f"the tiling {q.tiling.describe()} has no kernel"
    return None


def to_planes(packed: QTensor, word_bits: int, implementation: str = "auto") -> PlaneTensor:
    """The weight of one layer in the layout of the kernels; word_bits: 16 for 16-bit activations, 8 for int8 ones.

    Raises: ValueError when the kernels cannot read such a weight, and for an unknown implementation; TypeError for what
    is not packed, or in planes already."""
    if not isinstance(packed, QTensor) or isinstance(packed, PlaneTensor):
        seen = repr(packed) if isinstance(packed, QTensor) else f"a {type(packed).__name__}"
        raise TypeError(f"to_planes got {seen}; it takes a QTensor of layout {packing.LAYOUT!r}: pack_rhs makes one.")
    if implementation not in backend.IMPLEMENTATIONS:
        raise ValueError(
            f"to_planes: implementation {implementation!r} is none of {', '.join(backend.IMPLEMENTATIONS)}."
        )
    if reason := why_not(packed):
        raise ValueError(f"to_planes: no kernel reads this weight: {reason}. Keep layout {packing.LAYOUT!r} for it.")
    bits = packed.quantizer.format.bits
    codes = packing.unpack(packed.words, bits, packed.length)
    free = codes.shape[:-1]
    codes = codes.reshape(-1, packed.length)
    return PlaneTensor(
        words=backend.pack_planes(codes, bits, word_bits),
        scales=packed.scales,
        marks=None,
        quantizer=packed.quantizer,
        axis=packed.axis,
        length=packed.length,
        dtype=packed.dtype,
        layout=LAYOUT,
        zeros=packed.zeros,
        sums=codes.astype(jnp.int32).sum(-1, dtype=jnp.int32),
        stamp=jnp.zeros((_VERSION, bits, word_bits // 8), jnp.uint8),
        free=free,
        implementation=implementation,
    )
