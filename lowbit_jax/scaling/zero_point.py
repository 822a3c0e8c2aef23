"""Zero points: x ~ scale (q - z) on a grid of integers, z the level that stands for 0, one a tile.

A tile that lies unevenly about 0 uses all levels then, and 0 is a value of every tile. Source: Jacob et al. 2017,
arXiv:1712.05877, eq. 1.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from lowbit_jax import rounding
from lowbit_jax.formats.base import MAX_CODE_BITS, Codebook, IntFormat
from lowbit_jax.scaling.fit import CandidateSearch, Fit, Learned, Percentile, absmax_edge, mean_abs, rms_optimal
from lowbit_jax.scaling.scale_format import CastScale


def check(fmt: Any, fit: Any, how: Any, scale_format: Any, sparsity: Any) -> None:
    """Raises ValueError where the other slots of a quantizer have no place for zero points. how: the rounding."""
    way_out = None
    if not isinstance(fmt, IntFormat):
        way_out = f"format={fmt.name}): its levels are not integers. Use lb.formats.UINT1 to UINT8 or INT1 to INT8"
    elif isinstance(fit, Learned | Percentile) or fit in (rms_optimal, mean_abs, absmax_edge):
        told = getattr(fit, "__name__", None) or str(fit)
        way_out = f"fit={told}): it scales what lies about 0. Use absmax, or CandidateSearch() to clip"
    elif how is rounding.toward_zero:
        way_out = "rounding=toward_zero): that is toward the lowest levels here. Use nearest or stochastic"
    elif sparsity is not None:
        way_out = "sparsity=): what is off a support is 0 on the grid. Leave out one of them"
    elif not isinstance(scale_format, CastScale):
        told = scale_format.describe()
        way_out = f"scale_format={told}): it reckons with a grid about 0. Use FLOAT32, BFLOAT16 or another CastScale"
    if way_out is not None:
        raise ValueError(f"Quantizer(zero_point=True, {way_out}.")


def centers(tiles: Float[Array, "*tiles"], axes: tuple[int, ...]) -> Float[Array, "*scales"]:
    """The middle of what a tile spans, 0 included."""
    low = jnp.min(tiles, axis=axes, keepdims=True, initial=0)
    high = jnp.max(tiles, axis=axes, keepdims=True, initial=0)
    return low / 2 + high / 2


@functools.cache
def about_its_middle(fmt: IntFormat) -> Codebook:
    """As many levels, as far apart, evenly about 0."""
    values = tuple(level - _middle(fmt) for level in fmt.levels)
    return Codebook(name=f"{fmt.name}_centered", values=values, source="levels of a tile about its middle")


def _middle(fmt: IntFormat) -> float:
    return (fmt.low + fmt.high) / 2


def fitted(
    fit: Fit, tiles: Float[Array, "*tiles"], center: Float[Array, "*scales"], fmt: IntFormat, axes: tuple[int, ...],
    stochastic: bool = False,
) -> Float[Array, "*scales"]:  # fmt: skip
    """The scale that `fit` finds for the tiles moved evenly about 0; 1 for a tile of zeros. `CandidateSearch` judges
    each candidate with the zero point that goes with it.

    A zero point is a whole level, so that one end of the tile may lie up to half a step outside of the grid. Where
    rounding is stochastic, which that would bias, the tile is fitted to a step less (with 3 levels and more)."""
    evenly = about_its_middle(fmt)
    span = fmt.high - fmt.low
    most = np.nextafter(np.finfo(np.float32).max / np.float32(span), np.float32(0))  # times span, it is finite
    usable = lambda scale: jnp.where(scale == 0, jnp.ones_like(scale), jnp.minimum(scale, most))
    if not isinstance(fit, CandidateSearch):
        room = span / (span - 1) if stochastic and span > 1 else 1.0
        return usable(fit(tiles - center, evenly, axes) * room)

    def rounded(scale: Array) -> Array:
        zero = zero_points(center, scale, fmt)
        return (rounding.nearest(tiles / scale + zero, fmt) - zero) * scale

    return fit.best(usable(fit.base(tiles - center, evenly, axes)), rounded, tiles, evenly, axes)


@functools.cache
def distances(fmt: IntFormat) -> IntFormat | None:
    """The grid of q - z; None where it has more than 256 values."""
    span = fmt.high - fmt.low
    if (2 * span).bit_length() > MAX_CODE_BITS:
        return None
    return IntFormat(
        name=f"{fmt.name}_from_zero", low=-span, high=span, source=f"distances of the levels of {fmt.name}"
    )


def zero_points(
    center: Float[Array, "*scales"], scale: Float[Array, "*scales"], fmt: IntFormat
) -> Float[Array, "*scales"]:
    """The level that stands for 0, where the middle of the grid lies near `center`; `low` where the scale is NaN."""
    level = jnp.clip(jnp.round(_middle(fmt) - center / scale), fmt.low, fmt.high)
    return jnp.where(jnp.isnan(level), jnp.float32(fmt.low), level)


def stored(zero: Float[Array, "*scales"], fmt: IntFormat) -> UInt8[Array, "*scales"]:
    """The code of a zero point."""
    return (zero - fmt.low).astype(jnp.uint8)


def loaded(codes: UInt8[Array, "*scales"], fmt: IntFormat) -> Float[Array, "*scales"]:
    """The level of a stored zero point."""
    return codes.astype(jnp.float32) + fmt.low
