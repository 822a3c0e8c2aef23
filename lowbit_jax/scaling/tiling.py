"""Which elements share a scale. A tiling gives a view in which the members of a tile lie along known axes.

`split(x, axis)` answers `(tiles, axes)`: reducing `tiles` over `axes` with `keepdims` gives one scale a tile, in a
shape that broadcasts against `tiles`. `join(tiles, shape)` is the way back. `axis` is the contraction axis of the
product that the array will enter (several for a convolution: its window and its channels, the channel axis last).
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Shaped

from lowbit_jax.formats.base import settle_integers, whole_number

Axis = int | tuple[int, ...]


def normalized_axes(axis: Axis, ndim: int, who: str) -> tuple[int, ...]:
    """Non-negative axes, in the order given.

    Raises: TypeError for axes that are not integers; ValueError for none, for one twice, or out of range."""
    axes = tuple(axis) if isinstance(axis, tuple | list) else (axis,)
    if not axes:
        raise ValueError(f"{who}: axis={axis!r} names no axis. Give the contraction axis, such as -1.")
    axes = tuple(whole_number(a, f"{who}: axis") for a in axes)
    for a in axes:
        if not -ndim <= a < ndim:
            way_out = f"Give an axis from {-ndim} to {ndim - 1}" if ndim else "Reshape it to (1,)"
            raise ValueError(f"{who}: axis {a} of an array of {ndim} dimensions. {way_out}.")
    axes = tuple(a % ndim for a in axes)
    if len(set(axes)) < len(axes):
        raise ValueError(f"{who}: axis={axis!r} names an axis twice. Give each contraction axis once.")
    return axes


@runtime_checkable
class Tiling(Protocol):
    def split(self, x: Shaped[Array, "*s"], axis: Axis) -> tuple[Shaped[Array, "*tiles"], tuple[int, ...]]: ...

    def describe(self) -> str: ...


def join(tiles: Shaped[Array, "*tiles"], shape: tuple[int, ...]) -> Shaped[Array, "*s"]:
    """The array of `shape` whose view `tiles` is."""
    return tiles if tiles.shape == shape else tiles.reshape(shape)


@dataclasses.dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole array."""

    def split(self, x, axis):
        return x, tuple(range(x.ndim))

    def describe(self) -> str:
        return "tensor"


@dataclasses.dataclass(frozen=True, slots=True)
class PerRow:
    """One scale for each index outside the contraction axis: a token of an activation, an output channel of a
    weight."""

    def split(self, x, axis):
        return x, normalized_axes(axis, x.ndim, "PerRow")

    def describe(self) -> str:
        return "row"


class UnevenTiles(ValueError):
    """A tile does not divide the axis that it cuts."""


def _divided(length: int, size: int, who: str, axis: int) -> int:
    if length % size:
        legal = [d for d in range(1, length + 1) if length % d == 0 and d <= max(size, 1) * 2]
        raise UnevenTiles(
            f"{who} cuts axis {axis} of length {length} into tiles of {size}, which leaves {length % size}."
            f" Pad by {-length % size}, or choose a size that divides {length}: {legal[-8:]}."
        )
    return length // size


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """One scale for each run of `size` elements along the contraction axis (its last one, if there are several).

    Raises: UnevenTiles when `size` does not divide the axis."""

    size: int

    def __post_init__(self):
        settle_integers(self, "size")
        if self.size < 1:
            raise ValueError(f"Group(size={self.size}): a group has at least 1 element. Use PerRow() for whole rows.")

    def split(self, x, axis):
        at = normalized_axes(axis, x.ndim, "Group")[-1]
        count = _divided(x.shape[at], self.size, f"Group({self.size})", at)
        return x.reshape(*x.shape[:at], count, self.size, *x.shape[at + 1 :]), (at + 1,)

    def describe(self) -> str:
        return f"group {self.size}"


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """One scale for each rectangle of `size` along the contraction axis by `other` along the last other axis.

    The square form (128 x 128 of DeepSeek-V3, 32 x 32 of Jetfire) keeps its scales under transposition.
    Raises: UnevenTiles when a side does not divide its axis; ValueError when the array has no second axis."""

    size: int
    other: int

    def __post_init__(self):
        settle_integers(self, "size", "other")
        if min(self.size, self.other) < 1:
            raise ValueError(f"Block({self.size}, {self.other}): each side has at least 1 element.")

    def split(self, x, axis):
        at = normalized_axes(axis, x.ndim, "Block")[-1]
        free = [a for a in range(x.ndim) if a not in normalized_axes(axis, x.ndim, "Block")]
        if not free:
            raise ValueError(f"Block: an array of shape {x.shape} has no axis beside the contraction axis. Use Group.")
        sizes = {at: self.size, free[-1]: self.other}
        shape, inner = [], []
        for a, length in enumerate(x.shape):
            if a in sizes:
                shape += [_divided(length, sizes[a], f"Block({self.size}, {self.other})", a), sizes[a]]
                inner.append(len(shape) - 1)
            else:
                shape.append(length)
        return x.reshape(shape), tuple(inner)

    def describe(self) -> str:
        return f"block {self.size}x{self.other}"


def scale_count(tiles_shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """How many tiles the view holds."""
    return math.prod(n for a, n in enumerate(tiles_shape) if a not in axes)
