"""Scale from the tile at hand. A fit is `fit(tiles, fmt, axes) -> scale`, in units of x per grid unit.

`tiles` is float32 and `axes` are its axes inside a tile; the answer keeps them with length 1. A tile of zeros fits the
scale 1 where the grid holds a zero and 0 where it does not (mid-rise), so that it comes back as zeros either way. NaN
and inf make the scale of their own tile NaN and touch no other. Where the scale of a finite tile would leave the range
in which itself, its reciprocal and the largest level times it are normal float32, it is the nearest inside (`settled`):
the tile saturates, or keeps a smallest step.
"""

import dataclasses
import numbers
from collections.abc import Callable, Iterable
from typing import NoReturn, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
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


def guard_zero_tiles(scale: Float[Array, "*s"], fmt: Format) -> Float[Array, "*s"]:
    """1 in place of a zero scale where the grid has a zero; the zero itself where it has none."""
    return jnp.where(scale == 0, jnp.ones_like(scale), scale) if fmt.has_zero else scale


SMALLEST_SCALE = 2.0**-126
"""The smallest normal float32; XLA flushes what is below to zero."""


def largest_scale(fmt: Format) -> float:
    """The largest scale whose reciprocal is a normal float32 and whose largest level is finite, rounded down."""
    furthest, most = max(abs(fmt.max_finite), abs(fmt.min_finite)), float(np.finfo(np.float32).max)
    limit = np.float32(min(2.0**126, most / furthest))
    return float(limit if float(limit) * furthest <= most else np.nextafter(limit, np.float32(0)))


def settled(scale: Float[Array, "*s"], size: Float[Array, "*s"], fmt: Format) -> Float[Array, "*s"]:
    """`scale` inside the range that a float32 scale can use, for tiles whose magnitude is `size`.

    Where size > 0 it is clamped to SMALLEST_SCALE .. largest_scale(fmt); where size is 0 it is that of a tile of zeros
    (`guard_zero_tiles`); where size is NaN or inf it is NaN."""
    usable = jnp.clip(scale, SMALLEST_SCALE, largest_scale(fmt))
    found = jnp.where(size > 0, usable, guard_zero_tiles(jnp.zeros_like(scale), fmt))
    return jnp.where(jnp.isfinite(size), found, jnp.nan)


def on_level(magnitude: Float[Array, "*s"], level: float) -> Float[Array, "*s"]:
    """The scale that puts `magnitude` on `level`. E8M0 has levels whose reciprocals XLA would flush to zero."""
    halves = 2 if 1 / level < SMALLEST_SCALE else 1
    for _ in range(halves):
        magnitude = magnitude * (1 / level ** (1 / halves))
    return magnitude


def absmax(tiles: Float[Array, "*tiles"], fmt: Format, axes: tuple[int, ...]) -> Float[Array, "*scales"]:
    """max|x| lies on the largest level: nothing is clipped, below the largest scale that float32 holds."""
    amax = largest_magnitude(tiles, axes)
    return settled(on_level(amax, fmt.reach), amax, fmt)


def absmax_edge(tiles: Float[Array, "*tiles"], fmt: Format, axes: tuple[int, ...]) -> Float[Array, "*scales"]:
    """max|x| lies half a gap beyond the largest level, where the last bucket of nearest rounding ends: finer steps than
    `absmax`, and the largest magnitude errs by up to half of one. On integers the default of AQT and Qwix (127.5 for
    INT8); on floats the last gap is wide."""
    amax = largest_magnitude(tiles, axes)
    return settled(on_level(amax, fmt.reach + fmt.top_gap / 2), amax, fmt)


@dataclasses.dataclass(frozen=True, slots=True)
class AbsmaxOn:
    """max|x| lies on `level`, in grid units: beyond the largest level it is clipped, and steps are finer.

    Raises: ValueError unless the level is positive and finite."""

    level: float

    def __post_init__(self):
        if not isinstance(self.level, numbers.Real) or not 0 < self.level < np.inf:
            raise ValueError(f"AbsmaxOn({self.level!r}): give a positive level of the grid, or one beyond its largest.")

    def __str__(self) -> str:
        return f"absmax on {self.level:.4g}"

    def __call__(self, tiles, fmt, axes):
        amax = largest_magnitude(tiles, axes)
        return settled(on_level(amax, self.level), amax, fmt)


def rms_optimal(tiles: Float[Array, "*tiles"], fmt: Format, axes: tuple[int, ...]) -> Float[Array, "*scales"]:
    """rms(x) times the scale of least squared error on a Gaussian (QuEST: step = 2 alpha*/(2^b - 1) rms).

    A sum of squares must be a normal float32: a tile whose rms is above about 2^63 gets the scale NaN, and one whose
    elements are all below 2^-63 counts as zeros. (A pass for the largest element first would cost a quantizer 5
    to 10% on a CPU.)
    Source: Panferov et al. 2025, arXiv:2502.05003, section 3; the constants are computed in `scaling.gaussian`."""
    return rms_scales(tiles, fmt, axes)[0]


def rms_scales(
    tiles: Float[Array, "*tiles"], fmt: Format, axes: tuple[int, ...]
) -> tuple[Float[Array, "*scales"], Float[Array, "*scales"]]:
    """The scale of `rms_optimal` and its reciprocal, finite where the scale is 0.

    Both are cheap in terms of one reciprocal square root, so that XLA's CPU compiler makes one small kernel of it where
    a square root, guards and a division make two and repeat the guards in every kernel that reads the scales. (A kernel
    costs a compilation about 15 ms, whatever it computes.)"""
    factor = np.float32(optimal_scale(fmt) / max(1, _tile_size(tiles, axes)) ** 0.5)
    square = lax.expand_dims(lax.reduce_sum(lax.square(tiles), axes), sorted(axes))
    # The sum is 0 or between 2^-126 and 2^128, so only a grid with extreme levels needs `settled`.
    if not (factor * 2.0**-63 > SMALLEST_SCALE and factor * 2.0**64 < largest_scale(fmt)):
        scale = settled(lax.sqrt(square) * factor, square, fmt)
        return scale, reciprocal(scale)
    root = lax.rsqrt(lax.max(square, np.float32(SMALLEST_SCALE)))
    scale, inv_scale = lax.mul(lax.mul(square, root), factor), lax.mul(root, np.float32(1) / factor)
    if fmt.has_zero:
        absent = lax.eq(square, np.float32(0))
        one = lax.full_like(square, 1)
        scale, inv_scale = lax.select(absent, one, scale), lax.select(absent, one, inv_scale)
    return scale, inv_scale


def mean_abs(tiles: Float[Array, "*tiles"], fmt: Format, axes: tuple[int, ...]) -> Float[Array, "*scales"]:
    """mean|x| lies on the smallest positive level (XNOR-Net on a 1-bit grid, BitNet b1.58 on a ternary one).

    Source: Rastegari et al. 2016, arXiv:1603.05279, eq. 6; Ma et al. 2024, arXiv:2402.17764, eq. 3."""
    smallest = min(level for level in (abs(v) for v in fmt.levels) if level > 0)
    mean = _mean_magnitude(tiles, axes)
    return settled(mean * (1 / smallest), mean, fmt)


@dataclasses.dataclass(frozen=True, slots=True)
class Percentile:
    """The `percent`-th percentile of |x| lies on the largest level; what is above is clipped. A tile with so many zeros
    that the percentile is 0 is fitted by absmax.

    Raises: ValueError unless 0 < percent <= 100."""

    percent: float = 99.9

    def __post_init__(self):
        if not isinstance(self.percent, numbers.Real) or not 0 < self.percent <= 100:
            raise ValueError(f"Percentile({self.percent!r}): give a percentage above 0 and up to 100 (100 is absmax).")

    def __call__(self, tiles, fmt, axes):
        if tiles.size == 0:
            return absmax(tiles, fmt, axes)
        top = jnp.quantile(jnp.abs(tiles), self.percent / 100, axis=axes, keepdims=True)
        amax = largest_magnitude(tiles, axes)
        top = jnp.where(top == 0, amax, top)
        return settled(on_level(top, fmt.reach), jnp.where(jnp.isfinite(amax), top, amax), fmt)


@dataclasses.dataclass(frozen=True, slots=True)
class CandidateSearch:
    """Of the scales `base * fraction`, the one of least squared error in each tile; ties go to the first.

    `(1.0, 1.5)` over absmax on E2M1 is "four over six", the largest magnitude on 6 or on 4; the choice is made before
    the scale is rounded to its own format.
    Raises: TypeError for fractions that are no sequence and a base that is no fit; ValueError without fractions, or
    with one that is not positive and finite."""

    fractions: tuple[float, ...] = tuple(1.0 - 0.05 * i for i in range(15))
    base: Fit = absmax

    def __post_init__(self):
        if not isinstance(self.fractions, Iterable) or not callable(self.base):
            raise TypeError(
                f"CandidateSearch(fractions={self.fractions!r}, base={self.base!r}): give a sequence of multiples, and"
                " a fit such as lb.scaling.absmax."
            )
        object.__setattr__(self, "fractions", tuple(self.fractions))
        if not self.fractions or not all(0 < fraction < np.inf for fraction in self.fractions):
            raise ValueError(f"CandidateSearch(fractions={self.fractions}): give one or more positive multiples.")

    def __str__(self) -> str:
        few = " or ".join(f"{fraction:g}" for fraction in self.fractions)
        told = few if len(self.fractions) <= 3 else f"the best of {len(self.fractions)}"
        return f"{getattr(self.base, '__name__', None) or self.base} x {told}"

    def __call__(self, tiles, fmt, axes):
        rounded = lambda scale: rounding.nearest(tiles * reciprocal(scale), fmt) * scale
        return self.best(self.base(tiles, fmt, axes), rounded, tiles, fmt, axes)

    def best(
        self, start: Float[Array, "*scales"], rounded: Callable[[Array], Array], tiles: Float[Array, "*tiles"],
        fmt: Format, axes: tuple[int, ...],
    ) -> Float[Array, "*scales"]:  # fmt: skip
        """Of the multiples of `start` the one for which `rounded(scale)` is nearest to the tiles."""
        best, least, unit = start, jnp.full_like(start, jnp.inf), reciprocal(start)  # squares stay inside float32
        for fraction in self.fractions:
            scale = jnp.minimum(start * fraction, largest_scale(fmt))
            error = (rounded(scale) - tiles) * unit
            loss = jnp.sum(error * error, axis=axes, keepdims=True)
            best, least = jnp.where(loss < least, scale, best), jnp.minimum(loss, least)
        return best


def carries_nan(fit: Fit) -> bool:
    """Whether this fit is known to answer NaN for a tile that holds one: whether it is one of those above."""
    if isinstance(fit, CandidateSearch):
        return carries_nan(fit.base)
    return isinstance(fit, Percentile | AbsmaxOn) or any(
        fit is own for own in (absmax, absmax_edge, rms_optimal, mean_abs)
    )


def lsq_initial(tiles: Float[Array, "*tiles"], fmt: Format, axes: tuple[int, ...]) -> Float[Array, "*scales"]:
    """2 mean|x| / sqrt(max_finite). Source: Esser et al. 2019, arXiv:1902.08153, section 2.1."""
    mean = _mean_magnitude(tiles, axes)
    return settled(mean * (2 / fmt.reach**0.5), mean, fmt)


@dataclasses.dataclass(frozen=True, slots=True)
class Learned:
    """The scale is a parameter that the caller holds; `initial` fits its first value.

    Source: Esser et al. 2019, arXiv:1902.08153. Raises: ValueError when called, since no statistic replaces it."""

    initial: Callable = lsq_initial

    def __str__(self) -> str:
        return f"learned, from {getattr(self.initial, '__name__', None) or self.initial}"

    def __call__(self, tiles, fmt, axes) -> NoReturn:
        raise ValueError(
            "A quantizer with a Learned fit got no scale. Pass `scale=` (start from `quantizer.initial_scale(x)`),"
            " or let `lb.quantize` hold it as a parameter of the layer."
        )


def reciprocal(scale: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """1 / scale, and 0 for a scale of 0, so that a tile of zeros stays finite.

    The division stands last, so that XLA keeps its result instead of the guards' operands."""
    zero, one = lax.full_like(scale, 0), lax.full_like(scale, 1)
    absent = lax.eq(scale, zero)
    return lax.div(lax.select(absent, zero, one), lax.select(absent, one, scale))


def positive(scale: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """|scale|, at least SMALLEST_SCALE, for a scale that an optimizer may have pushed to zero or below.

    Its derivative is 1 for a scale >= 0 and -1 below, on the floor too, so that a gradient can lift it again."""
    magnitude = scale * lax.stop_gradient(jnp.where(scale < 0, -1.0, 1.0).astype(scale.dtype))
    return magnitude + lax.stop_gradient(jnp.maximum(SMALLEST_SCALE - magnitude, 0))


def largest_magnitude(tiles: Float[Array, "*tiles"], axes: tuple[int, ...]) -> Float[Array, "*scales"]:
    """max|x|, infinite or NaN where an element is.

    The maximum is of bit patterns, where infinity and NaN are above all numbers: XLA's CPU compiler drops NaN from the
    maximum of more than some thousands of floats (JAX 0.10 to 0.12)."""
    bits = lax.bitcast_convert_type(tiles, jnp.int32) & jnp.int32(0x7FFFFFFF)
    return lax.bitcast_convert_type(jnp.max(bits, axis=axes, keepdims=True, initial=0), jnp.float32)


def _mean_magnitude(tiles: Float[Array, "*tiles"], axes: tuple[int, ...]) -> Float[Array, "*scales"]:
    """mean|x|; a power of two is taken out of the sum first, which would else overflow."""
    count = max(1, _tile_size(tiles, axes))
    power = 2.0 ** (count - 1).bit_length()
    return jnp.sum(jnp.abs(tiles) * (1 / power), axis=axes, keepdims=True) * (power / count)


def _tile_size(tiles: Array, axes: tuple[int, ...]) -> int:
    size = 1
    for axis in axes:
        size *= tiles.shape[axis]
    return size
