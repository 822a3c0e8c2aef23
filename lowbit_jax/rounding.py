"""Which grid point? Every rounding is a module-level function `(u, fmt, key=None)`.

`u` is in units of the grid and the answer is a value of the grid, in the shape and dtype of `u`. Values beyond the grid
saturate, infinities too; NaN stays NaN. Powers of two are taken from the exponent bits, because `log2` and `exp2` are
inexact on XLA's CPU backend. XLA flushes float32 denormals (below 2**-126) to zero; only E8M0 has a value among them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from lowbit_jax.formats.base import Codebook, FloatFormat, Format, IntFormat, MidRiseFormat


def nearest(u: Float[Array, "*s"], fmt: Format, key: PRNGKeyArray | None = None) -> Float[Array, "*s"]:
    """The nearest grid value; `key` is not used.

    Ties: to even integers and even mantissas (as ml_dtypes); of two mid-rise levels to the one of even `level + 1/2`
    (as `round(u + 1/2) - 1/2`, but exact next to a tie); of two codebook values to the one of even rank."""
    x = _working(u, fmt, "nearest")
    match fmt:
        case IntFormat():
            y = _clip(_round(x), fmt.low, fmt.high)
        case MidRiseFormat():
            x = _clip(x, fmt.min_finite, fmt.max_finite)
            above = lax.ceil(x)
            half = np.asarray(0.5, x.dtype)
            at_tie = _round(lax.add(x, half))  # the sum is exact at a tie, where it is used
            y = lax.sub(lax.select(lax.eq(x, above), at_tie, above), half)
        case FloatFormat(subnormals=False):
            y = _nearest_power(x, fmt)
        case FloatFormat():
            x = _clip(x, fmt.min_finite, fmt.max_finite)
            steps, step = _in_steps(x, fmt)
            y = _round(steps) * step
        case Codebook():
            y = _pick(x, fmt, _tie_to_even_thresholds(fmt, x.dtype))
    return y.astype(u.dtype)


def check_key(who: str, key: Any) -> None:
    """Raises: TypeError for what is no random key of JAX, of the new kind or the old."""
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        given, seed = (repr(int(key)),) * 2 if isinstance(key, int) else (f"a {type(key).__name__}", "0")
        raise TypeError(f"{who} got {given} for a key; it draws by a random key: pass jax.random.key({seed}).")


def stochastic(u: Float[Array, "*s"], fmt: Format, key: PRNGKeyArray | None = None) -> Float[Array, "*s"]:
    """One of the two grid values around `u`, the upper with probability `(u - lower) / (upper - lower)`.

    So the mean of many draws is `u`, to 2**-23 of the local step, within the range of the grid; beyond it the edge is
    certain. Grid values stay. The draw depends on `key`, the shape and nothing else.
    Raises: ValueError without a key, TypeError for a key that is none.
    Source: Gupta et al. 2015, arXiv:1502.02551, section 3."""
    if key is None:
        raise ValueError(
            f"stochastic rounding to {fmt.name} got no key. Every draw needs one: pass key=jax.random.key(...), or use"
            f" rounding.nearest."
        )
    check_key(f"stochastic rounding to {fmt.name}", key)
    x = _working(u, fmt, "stochastic")
    noise = jax.random.uniform(key, x.shape, x.dtype)
    match fmt:
        case IntFormat():
            y = _up_or_down(_clip(x, fmt.low, fmt.high), noise)
        case MidRiseFormat():
            y = _up_or_down(_clip(x, fmt.min_finite, fmt.max_finite) - 0.5, noise) + 0.5
        case FloatFormat(subnormals=False):
            lower, upper = _powers_around(x, fmt)
            y = jnp.where(noise < x / lower - 1, upper, lower)
        case FloatFormat():
            x = _clip(x, fmt.min_finite, fmt.max_finite)
            steps, step = _in_steps(x, fmt)
            y = _up_or_down(steps, noise) * step
        case Codebook():
            lower, upper = _values_around(x, fmt)
            x = _clip(x, lower, upper)
            y = jnp.where(noise * (upper - lower) < x - lower, upper, lower)
    return _keep_nan(y, x).astype(u.dtype)


def toward_zero(u: Float[Array, "*s"], fmt: Format, key: PRNGKeyArray | None = None) -> Float[Array, "*s"]:
    """The largest grid value not above `u` in magnitude, of the sign of `u`; `key` is not used.

    Where the grid has no such value (mid-rise inside ±1/2, a format without zero or sign), the smallest one of that
    sign, or the smallest of all; 0 counts as negative, as in `nearest` of mid-rise."""
    x = _working(u, fmt, "toward_zero")
    match fmt:
        case IntFormat():
            y = _clip(jnp.trunc(x), fmt.low, fmt.high)
        case MidRiseFormat():
            x = _clip(x, fmt.min_finite, fmt.max_finite)
            magnitude = jnp.maximum(jnp.floor(jnp.abs(x) + 0.5), 1) - 0.5
            y = _keep_nan(jnp.where(x > 0, magnitude, -magnitude), x)
        case FloatFormat(subnormals=False):
            y = _keep_nan(_powers_around(x, fmt)[0], x)
        case FloatFormat():
            x = _clip(x, fmt.min_finite, fmt.max_finite)
            steps, step = _in_steps(x, fmt)
            y = jnp.trunc(steps) * step
        case Codebook():
            lower, upper = _values_around(x, fmt)
            inward = jnp.where(x > 0, jnp.where(lower >= 0, lower, upper), jnp.where(upper <= 0, upper, lower))
            on_grid = jnp.where(x >= upper, upper, jnp.where(x <= lower, lower, inward))
            y = _keep_nan(on_grid, x)
    return y.astype(u.dtype)


POWER_OF_TWO_MODES = ("floor", "ceil", "nearest", "log")
SCALE_MODES = ("floor", "ceil", "rceil", "even", "nearest", "log")


def power_of_two(x: Float[Array, "*s"], mode: str = "nearest") -> Float[Array, "*s"]:
    """A power of two beside the magnitude of `x`, exactly, by `mode`.

    floor: the largest 2**k <= x; ceil: the smallest 2**k >= x; nearest: the nearest in value, 1.5 * 2**k goes up (as a
    cast to E8M0); log: the nearest in the logarithm, 2**floor(log2(x) + 1/2).
    From 2**-126 to 2**127: a smaller `x`, zero too, gives 2**-126, because XLA flushes the 2**-127 that E8M0 also
    has. NaN and infinity stay.
    Raises: ValueError for another mode."""
    if mode not in POWER_OF_TWO_MODES:
        raise ValueError(f"power_of_two got mode {mode!r}; pass one of {', '.join(POWER_OF_TWO_MODES)}.")
    return _shift_and_cut(x, _MANTISSA_SHIFT[mode], 0)


def power_of_two_scale(amax: Float[Array, "*s"], fmt: Format, mode: str = "floor") -> Float[Array, "*s"]:
    """The power-of-two scale of a block whose largest magnitude is `amax` and whose elements are `fmt`, exactly.

    With `emax = fmt.max_exponent`:
    floor: 2**(floor(log2(amax)) - emax), the OCP MX rule, under which up to half a binade saturates;
    ceil: 2**(ceil(log2(amax)) - emax), never larger than it needs to be for `amax = 2**k`, never saturates by more than
    the part of a binade above `reach`; rceil: the smallest 2**k with amax <= 2**k * reach, never saturates;
    even: floor, after `amax` was rounded half up to the mantissa bits of `fmt`; nearest, log: as in `power_of_two`,
    of amax / 2**emax.
    Range, zero, NaN and infinity as in `power_of_two`.
    Raises: ValueError for another mode, or for "even" with a format that has no mantissa bits to round to.
    Source: OCP MX v1.0, section 6.3 (floor); torchao `ScaleCalculationMode` (ceil, rceil, even)."""
    if mode not in SCALE_MODES:
        raise ValueError(f"power_of_two_scale got mode {mode!r}; pass one of {', '.join(SCALE_MODES)}.")
    return _shift_and_cut(amax, _scale_shift(fmt, mode), fmt.max_exponent)


_MANTISSA_ONES = (1 << 23) - 1  # of float32
_SQRT2_MANTISSA = 0x3504F3  # float32 mantissa of the largest value below the square root of 2
_MANTISSA_SHIFT = {"floor": 0, "ceil": _MANTISSA_ONES, "nearest": 1 << 22, "log": _MANTISSA_ONES - _SQRT2_MANTISSA}


def _scale_shift(fmt: Format, mode: str) -> int:
    if mode == "rceil":  # carry where the mantissa of amax is above that of max_finite
        return _MANTISSA_ONES - (int(np.float32(fmt.reach).view(np.int32)) & _MANTISSA_ONES)
    if mode == "even":
        return 1 << (22 - _mantissa_bits(fmt))
    return _MANTISSA_SHIFT[mode]


def _mantissa_bits(fmt: Format) -> int:
    if isinstance(fmt, FloatFormat):
        return fmt.mantissa_bits
    if isinstance(fmt, IntFormat):  # an integer of the top binade, as a float: 4..7 of INT4 are 1.00 to 1.11 times 4
        return fmt.max_exponent
    raise ValueError(
        f"power_of_two_scale rounds amax to the mantissa bits of the element in mode 'even', and {fmt.name} has none;"
        f" pass another mode: floor, ceil, rceil, nearest, log."
    )


def _shift_and_cut(x: Float[Array, "*s"], shift: int, lower_exponent: int) -> Float[Array, "*s"]:
    """Add `shift` to the mantissa, which may carry, cut the mantissa off, and lower the exponent."""
    magnitude = jnp.abs(x.astype(jnp.float32))
    field = ((lax.bitcast_convert_type(magnitude, jnp.int32) + shift) & _EXPONENT) - (lower_exponent << 23)
    power = lax.bitcast_convert_type(jnp.clip(field, 1 << 23, 254 << 23), jnp.float32)
    return jnp.where(jnp.isfinite(magnitude), power, magnitude).astype(x.dtype)


_EXPONENT = 0xFF << 23  # of float32


def _working(u: Float[Array, "*s"], fmt: Format, who: str) -> Float[Array, "*s"]:
    """`u` in a dtype that holds every value and midpoint of `fmt`."""
    if not isinstance(fmt, IntFormat | MidRiseFormat | FloatFormat | Codebook):
        raise TypeError(
            f"rounding.{who} got {fmt!r} for a format. It needs an IntFormat, MidRiseFormat, FloatFormat or Codebook: a"
            f" constant of lowbit_jax.formats, formats.get(name), or the `element` of a BlockFormat."
        )
    if not jnp.issubdtype(u.dtype, jnp.floating):
        raise TypeError(
            f"rounding.{who} got an array of {u.dtype}; it rounds real numbers: pass u.astype(jnp.float32)."
        )
    keep = u.dtype == jnp.float64 and not (isinstance(fmt, FloatFormat) and not fmt.subnormals)
    return u if keep else u.astype(jnp.float32)


def _clip(x: Float[Array, "*s"], low: ArrayLike, high: ArrayLike) -> Float[Array, "*s"]:
    low, high = (jnp.asarray(a, x.dtype) if isinstance(a, jax.Array) else np.asarray(a, x.dtype) for a in (low, high))
    return lax.clamp(low, x, high)  # NaN stays NaN


def _round(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


def _keep_nan(y: Float[Array, "*s"], x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    return jnp.where(jnp.isnan(x), x, y)


def _up_or_down(x: Float[Array, "*s"], noise: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The integer below `x`, or with probability `x - floor(x)` the next; an integer stays."""
    lower = jnp.floor(x)
    return lower + (noise < x - lower).astype(x.dtype)


def _in_steps(x: Float[Array, "*s"], fmt: FloatFormat) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """`x` in units of the distance of grid values in its binade, and that distance, a power of two: both exact."""
    info = jnp.finfo(x.dtype)
    exponent = ((1 << info.nexp) - 1) << info.nmant
    bias = (1 << (info.nexp - 1)) - 1
    bits = lax.bitcast_convert_type(x, jnp.int32 if info.bits == 32 else jnp.int64)
    field = jnp.maximum(bits & exponent, (fmt.min_exponent + bias) << info.nmant)
    field = field - (fmt.mantissa_bits << info.nmant)
    step = lax.bitcast_convert_type(field, x.dtype)
    inverse = lax.bitcast_convert_type((2 * bias << info.nmant) - field, x.dtype)
    return x * inverse, step


def _nearest_power(x: Float[Array, "*s"], fmt: FloatFormat) -> Float[Array, "*s"]:
    """Nearest value of E8M0, in integers: its smallest value, 2**-127, is a denormal that XLA flushes.

    Denormals above 2**-127 go up to 2**-126, zero and negatives to 2**-127."""
    assert (fmt.bias, fmt.mantissa_bits, fmt.max_finite) == (127, 0, 2.0**127), fmt
    bits = lax.bitcast_convert_type(x, jnp.int32)
    normal = jnp.minimum((bits + (1 << 22)) & _EXPONENT, 254 << 23)
    power = jnp.where(bits <= 1 << 22, 1 << 22, jnp.where(bits < 1 << 23, 1 << 23, normal))
    return _keep_nan(lax.bitcast_convert_type(power, jnp.float32), x)


def _powers_around(x: Float[Array, "*s"], fmt: FloatFormat) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """The values of E8M0 below and above `x`; at and beyond the largest both are the largest."""
    assert (fmt.bias, fmt.mantissa_bits, fmt.max_finite) == (127, 0, 2.0**127), fmt
    bits = lax.bitcast_convert_type(x, jnp.int32)
    lower = jnp.where(bits < 1 << 23, 1 << 22, jnp.minimum(bits & _EXPONENT, 254 << 23))
    upper = jnp.where(bits < 1 << 23, 1 << 22, jnp.minimum(lower + (1 << 23), 254 << 23))
    return lax.bitcast_convert_type(lower, jnp.float32), lax.bitcast_convert_type(upper, jnp.float32)


def _pick(x: Float[Array, "*s"], fmt: Codebook, thresholds: np.ndarray) -> Float[Array, "*s"]:
    """The value of the rank that counts the thresholds at or below `x`.

    A chain of selects, which the compiler fuses and vectorizes: four times faster on a CPU at 256 values than a binary
    search, a hundred times at 16."""
    values = np.asarray(fmt.levels, x.dtype)
    y = jnp.full_like(x, values[0])
    for threshold, value in zip(thresholds, values[1:], strict=True):
        y = lax.select(x >= threshold, jnp.full_like(x, value), y)
    return _keep_nan(y, x)


def _tie_to_even_thresholds(fmt: Codebook, dtype) -> np.ndarray:
    """For each two neighbors the smallest number that rounds to the upper one."""
    values = np.asarray(fmt.levels, dtype).astype(np.float64)
    middles = (values[1:] + values[:-1]) / 2
    at = middles.astype(dtype)  # the threshold itself, or next to it
    lower_is_even = np.arange(len(at)) % 2 == 0
    above = np.nextafter(at, np.asarray(np.inf, dtype))
    return np.where((at > middles) | ((at == middles) & ~lower_is_even), at, above)


def _values_around(x: Float[Array, "*s"], fmt: Codebook) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """The neighbors of the codebook with lower <= x < upper; outside, the two at that end."""
    values = jnp.asarray(np.asarray(fmt.levels, x.dtype))
    rank = jnp.searchsorted(values[1:-1], x, side="right")
    return values[rank], values[rank + 1]
