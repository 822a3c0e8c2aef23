"""A packed weight as files have it: a matrix, one row an output, and the tiles of it that share a scale."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from lowbit_jax.ops import int8
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import Block, Group, PerRow, PerTensor
from lowbit_jax.scaling.tiling import normalized_axes


@dataclasses.dataclass(frozen=True, slots=True)
class Outputs:
    """Some outputs of a packed layer, from `start` up to `stop`, as a layer of their own: query, key and value of one
    that makes all three. They are counted with the axes beside the contraction merged."""

    packed: QTensor
    start: int
    stop: int

    def __post_init__(self):
        count = self.packed.size // max(self.packed.length, 1)
        if not 0 <= self.start < self.stop <= count:
            raise ValueError(
                f"lb.io.Outputs(start={self.start}, stop={self.stop}): the layer has {count} outputs; start lies below"
                " stop, and both among them."
            )

    def dequantize(self, dtype: Any = None) -> np.ndarray:
        """[outputs, inputs] in the original, un-rotated space."""
        whole = np.moveaxis(np.asarray(self.packed.dequantize(dtype)), self.packed.axis, -1)
        return whole.reshape(-1, self.packed.length)[self.start : self.stop]


def outputs_of(layer: QTensor | Outputs) -> Outputs:
    """All outputs of a layer, or those told."""
    if isinstance(layer, Outputs):
        return layer
    return Outputs(layer, 0, layer.size // max(layer.length, 1))


@dataclasses.dataclass(frozen=True, slots=True)
class Matrix:
    """elements: float32 [outputs, inputs], the grid values, each from the zero point of its tile."""

    name: str
    outputs: Outputs
    elements: np.ndarray

    @classmethod
    def of(cls, name: str, outputs: Outputs, who: str) -> "Matrix":
        """Raises: ValueError for a tiling of the user's own, and as `QTensor.validate`."""
        packed = outputs.packed
        packed.validate(f"{who}: {name}")
        if not isinstance(packed.quantizer.tiling, PerRow | PerTensor | Group | Block):
            raise ValueError(
                f"{who}: {name} has scales by {packed.quantizer.tiling.describe()}; files know those of rows, of the"
                " tensor, of groups and of blocks. Quantize it by one of these."
            )
        elements = np.moveaxis(np.asarray(packed.elements()), packed.axis, -1)
        own = elements.reshape(-1, packed.length)[outputs.start : outputs.stop]
        return cls(name, outputs, np.ascontiguousarray(own))

    @property
    def packed(self) -> QTensor:
        return self.outputs.packed

    @property
    def quantizer(self) -> Quantizer:
        return self.packed.quantizer

    @property
    def scales(self) -> np.ndarray:
        """float32 [outputs, tiles of inputs]: what an element is multiplied by."""
        return self.by_output(self.quantizer.scale_format.load(self.packed.scales))

    def by_output(self, values: Any) -> np.ndarray:
        """Values in the view of the tiling, one a tile, as [outputs, tiles of inputs]: repeated for each output of a
        tile."""
        tiles = self.by_tile(values)
        count = self.packed.size // self.packed.length
        return np.repeat(tiles, count // len(tiles), axis=0)[self.outputs.start : self.outputs.stop]

    def by_tile(self, values: Any) -> np.ndarray:
        """Values in the view of the tiling, one a tile, as [tiles of outputs, tiles of inputs], of the whole layer."""
        tiling, array = self.quantizer.tiling, np.asarray(values)
        (at,) = normalized_axes(self.packed.axis, self.packed.ndim, "io")
        if isinstance(tiling, Group):
            array = array.squeeze(at + 1)
        elif isinstance(tiling, Block):
            _, inner = tiling.split(np.empty(self.packed.shape, np.uint8), at)  # looks at the shape alone
            array = array.squeeze(inner)
        array = np.moveaxis(array, at, -1)
        return array.reshape(-1, array.shape[-1])

    @property
    def group(self) -> int:
        """Neighboring inputs that share a scale."""
        tiling = self.quantizer.tiling
        return tiling.size if isinstance(tiling, Group | Block) else self.packed.length


@dataclasses.dataclass(frozen=True, slots=True)
class Integers:
    """w = (values - zeros) * scales, values of `bits` bits in two's complement. values: int8 [outputs, inputs]; scales:
    float32 [outputs, groups]; zeros: int8 [outputs, groups], or None."""

    values: np.ndarray
    bits: int
    scales: np.ndarray
    zeros: np.ndarray | None

    @classmethod
    def of(cls, matrix: Matrix) -> "Integers | None":
        """None where no integers of 8 bits stand for the levels.

        Levels at odd halves, which two's complement does not have, are odd integers of one bit more and half the scale:
        the same numbers."""
        scales = matrix.scales
        if matrix.quantizer.zero_point:
            return cls(*_from_zero_points(matrix), scales, _zeros(matrix))
        found = int8.grid(matrix.quantizer.format)
        if found is None or found[1]:
            return None
        step, _ = found
        levels = [level / step for level in matrix.quantizer.format.levels]
        bits = next(b for b in range(1, 9) if -(2 ** (b - 1)) <= min(levels) and max(levels) < 2 ** (b - 1))
        return cls((matrix.elements / np.float32(step)).astype(np.int8), bits, scales * np.float32(step), None)


def _from_zero_points(matrix: Matrix) -> tuple[np.ndarray, int]:
    """Values in two's complement, and their bits."""
    fmt = matrix.quantizer.format
    zeros = np.repeat(_zeros(matrix).astype(np.float32), matrix.group, axis=1)
    return (matrix.elements + zeros).astype(np.int8), fmt.bits


def _zeros(matrix: Matrix) -> np.ndarray:
    """Zero points in two's complement: their codes count from 0, whatever the format's lowest level is."""
    codes = matrix.by_output(matrix.packed.zeros).astype(np.int16)
    return (codes - 2 ** (matrix.quantizer.format.bits - 1)).astype(np.int8)


def rounded_scales(scales: np.ndarray, dtype: str, rounded: bool) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """Scales in a dtype, and the index of the first that is not kept: exactly, or where `rounded`, to all of its bits,
    as those are that do not become 0, subnormal or infinite."""
    with np.errstate(over="ignore", under="ignore"):
        cast = scales.astype(dtype)
    back, info = cast.astype(np.float32), ml_dtypes.finfo(dtype)
    inside = (back >= float(info.smallest_normal)) & np.isfinite(back)
    lost = (back != scales) & ~(inside & rounded)
    return cast, tuple(int(i) for i in np.argwhere(lost)[0]) if lost.any() else None
