"""The quantized array, packed: a pytree of storage words and scales that knows how to become an array again."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from lowbit_jax import coding, packing
from lowbit_jax.scaling.tiling import join
from lowbit_jax.sparsity import expand

if TYPE_CHECKING:
    from lowbit_jax.quantizer import Quantizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """`dequantized = element * scale`, elements packed at `format.bits` bits each along the contraction axis.

    words: uint8 [..., bytes], the array with its contraction axis moved last, each row a little-endian bit stream.
    scales: what the scale format stores, one a tile. marks: the support of a sparse quantizer, one bit a run of
    neighbors, packed likewise; only the kept elements have codes. axis: the contraction axis, counted from the end,
    so that leading axes may be added or sliced off (`vmap`, a `scan` over stacked layers). length: elements along
    that axis. Values live in the rotated space of `quantizer`; `dequantize` answers in the original one."""

    words: UInt8[Array, "*rows bytes"]
    scales: tuple[Array, ...]
    marks: UInt8[Array, "*rows mark_bytes"] | None
    quantizer: "Quantizer" = dataclasses.field(metadata=dict(static=True))
    axis: int = dataclasses.field(metadata=dict(static=True))
    length: int = dataclasses.field(metadata=dict(static=True))
    dtype: Any = dataclasses.field(metadata=dict(static=True))
    layout: str = dataclasses.field(default=packing.LAYOUT, metadata=dict(static=True))

    @property
    def ndim(self) -> int:
        return self.words.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it stands for."""
        rows = list(self.words.shape[:-1])
        rows.insert(self.ndim + self.axis, self.length)
        return tuple(rows)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed words, the stored scales and the marks."""
        leaves = jax.tree.leaves((self.words, self.scales, self.marks))
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)

    @property
    def bits_per_element(self) -> float:
        return 8 * self.nbytes / max(self.size, 1)

    def elements(self) -> Float[Array, "*s"]:
        """The grid value of each element, float32, in the array's shape; 0 off the support."""
        q = self.quantizer
        if q.sparsity is None:
            rows = coding.decode(packing.unpack(self.words, q.format.bits, self.length), q.format)
        else:
            kept = self.length // q.sparsity.group * q.sparsity.kept
            codes = packing.unpack(self.words, q.format.bits, kept)
            marks = packing.unpack(self.marks, 1, self.length // q.sparsity.run)
            codes, mask = expand(codes, marks, q.sparsity)
            rows = jnp.where(mask, coding.decode(codes, q.format), 0.0)
        return jnp.moveaxis(rows, -1, self.axis)

    def values(self, dtype: Any = None) -> Float[Array, "*s"]:
        """element * scale in the rotated space: the operand that a product with a rotated partner takes."""
        tiles, _ = self.quantizer.tiling.split(self.elements(), self.axis)
        answer = join(tiles * self.quantizer.scale_format.load(self.scales), self.shape)
        return answer.astype(self.dtype if dtype is None else dtype)

    def dequantize(self, dtype: Any = None) -> Float[Array, "*s"]:
        """The array of the original, un-rotated space, in `dtype` (default: that of the array quantized)."""
        dtype = self.dtype if dtype is None else dtype
        if self.quantizer.rotation is None:
            return self.values(dtype)
        return self.quantizer.rotation.undo(self.values(jnp.float32), self.axis).astype(dtype)

    def __repr__(self) -> str:
        return (
            f"QTensor({jnp.dtype(self.dtype).name}{list(self.shape)}, {self.quantizer.format.name},"
            f" {self.nbytes} bytes, {self.bits_per_element:.2f} bits per element)"
        )
