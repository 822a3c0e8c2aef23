"""Scale from the tile at hand. A fit is `fit(tiles, fmt, axes) -> scale`, in units of x per grid unit.

`tiles` is float32 and `axes` are its axes inside a tile; the answer keeps them with length 1. A tile of zeros fits the
scale 1 where the grid holds a zero and 0 where it does not (mid-rise), so that it comes back as zeros either way. NaN
and inf make the scale of their own tile NaN or inf and touch no other.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax import rounding
from lowbit_jax.formats.base import Format
from lowbit_jax.scaling.gaussian import optimal_scale


@runtime_checkable
class Fit(Protocol):
    def __call__(
        self, tiles: Float[Array, "*tiles"], fmt: Format, axes: tuple[int, ...]
    ) -> Float[Array, "*scales"]: ...


def reach(fmt: Format) -> float:
    """The level that absmax puts the largest magnitude on: `max_finite`, or the low end where nothing is positive."""
    return fmt.max_finite if fmt.max_finite > 0 else -fmt.min_finite


def guard_zero_tiles(scale: Float[Array, "*s"], fmt: Format) -> Float[Array, "*s"]:
    """1 in place of a zero scale where the grid has a zero; the zero itself where it has none."""
    return jnp.where(scale == 0, jnp.ones_like(scale), scale) if fmt.has_zero else scale


def absmax(tiles: Float[Array, "*tiles"], fmt: Format, axes: tuple[int, ...]) -> Float[Array, "*scales"]:
    """max|x| lies on the largest level: nothing is clipped."""
    amax = jnp.max(jnp.abs(tiles), axis=axes, keepdims=True, initial=0)
    return guard_zero_tiles(amax * (1 / reach(fmt)), fmt)


def rms_optimal(tiles: Float[Array, "*tiles"], fmt: Format, axes: tuple[int, ...]) -> Float[Array, "*scales"]:
    """rms(x) times the scale of least squared error on a Gaussian (QuEST: step = 2 alpha*/(2^b - 1) rms).

    Source: Panferov et al. 2025, arXiv:2502.05003, section 3; the constants are computed in `scaling.gaussian`."""
    count = max(1, _tile_size(tiles, axes))
    mean_square = jnp.sum(tiles * tiles, axis=axes, keepdims=True) * (1 / count)
    return guard_zero_tiles(jnp.sqrt(mean_square) * optimal_scale(fmt), fmt)


def mean_abs(tiles: Float[Array, "*tiles"], fmt: Format, axes: tuple[int, ...]) -> Float[Array, "*scales"]:
    """mean|x| lies on the smallest positive level (XNOR-Net on a 1-bit grid, BitNet b1.58 on a ternary one).

    Source: Rastegari et al. 2016, arXiv:1603.05279, eq. 6; Ma et al. 2024, arXiv:2402.17764, eq. 3."""
    count = max(1, _tile_size(tiles, axes))
    smallest = min(level for level in (abs(v) for v in fmt.levels) if level > 0)
    mean = jnp.sum(jnp.abs(tiles), axis=axes, keepdims=True) * (1 / count)
    return guard_zero_tiles(mean * (1 / smallest), fmt)


@dataclasses.dataclass(frozen=True, slots=True)
class Percentile:
    """The `percent`-th percentile of |x| lies on the largest level; what is above is clipped.

    Raises: ValueError unless 0 < percent <= 100."""

    percent: float = 99.9

    def __post_init__(self):
        if not 0 < self.percent <= 100:
            raise ValueError(f"Percentile({self.percent}): give a percentage above 0 and up to 100 (100 is absmax).")

    def __call__(self, tiles, fmt, axes):
        if tiles.size == 0:
            return absmax(tiles, fmt, axes)
        top = jnp.quantile(jnp.abs(tiles), self.percent / 100, axis=axes, keepdims=True)
        return guard_zero_tiles(top * (1 / reach(fmt)), fmt)


@dataclasses.dataclass(frozen=True, slots=True)
class CandidateSearch:
    """Of the scales `base * fraction`, the one of least squared error in each tile; ties go to the first.

    `(1.0, 1.5)` over absmax on E2M1 is "four over six", the largest magnitude on 6 or on 4; the choice is made before
    the scale is rounded to its own format.
    Raises: ValueError without fractions, or with one that is not positive."""

    fractions: tuple[float, ...] = tuple(1.0 - 0.05 * i for i in range(15))
    base: Fit = absmax

    def __post_init__(self):
        if not self.fractions or min(self.fractions) <= 0:
            raise ValueError(f"CandidateSearch(fractions={self.fractions}): give one or more positive multiples.")

    def __call__(self, tiles, fmt, axes):
        start = self.base(tiles, fmt, axes)
        best, least = start, jnp.full_like(start, jnp.inf)
        for fraction in self.fractions:
            scale = start * fraction
            error = rounding.nearest(tiles * reciprocal(scale), fmt) * scale - tiles
            loss = jnp.sum(error * error, axis=axes, keepdims=True)
            best, least = jnp.where(loss < least, scale, best), jnp.minimum(loss, least)
        return best


def lsq_initial(tiles: Float[Array, "*tiles"], fmt: Format, axes: tuple[int, ...]) -> Float[Array, "*scales"]:
    """2 mean|x| / sqrt(max_finite). Source: Esser et al. 2019, arXiv:1902.08153, section 2.1."""
    count = max(1, _tile_size(tiles, axes))
    mean = jnp.sum(jnp.abs(tiles), axis=axes, keepdims=True) * (1 / count)
    return guard_zero_tiles(mean * (2 / reach(fmt) ** 0.5), fmt)


@dataclasses.dataclass(frozen=True, slots=True)
class Learned:
    """The scale is a parameter that the caller holds; `initial` fits its first value.

    Source: Esser et al. 2019, arXiv:1902.08153. Raises: ValueError when called, since no statistic replaces it."""

    initial: Callable = lsq_initial

    def __str__(self) -> str:
        return f"learned, from {self.initial.__name__}"

    def __call__(self, tiles, fmt, axes):
        raise ValueError(
            "A quantizer with a Learned fit got no scale. Pass `scale=` (start from `quantizer.initial_scale(x)`),"
            " or let `lb.quantize` hold it as a parameter of the layer."
        )


def reciprocal(scale: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """1 / scale, and 0 for a scale of 0, so that a tile of zeros stays finite."""
    zero, one = lax.full_like(scale, 0), lax.full_like(scale, 1)
    absent = lax.eq(scale, zero)
    return lax.select(absent, zero, lax.div(one, lax.select(absent, one, scale)))


def _tile_size(tiles: Array, axes: tuple[int, ...]) -> int:
    size = 1
    for axis in axes:
        size *= tiles.shape[axis]
    return size
