"""The number format of the scales themselves: what is stored, and so what training must already compute with.

A scale format stores float32 scales as a tuple of arrays (`store`) and gives them back (`load`); `load(store(s))` is
the rounding that a quantizer puts inside its forward. A positive scale below what the format holds is kept at its
smallest value, one above at its largest; one that is not finite is stored as NaN.
"""

import dataclasses
import functools
import math
import numbers
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax import rounding
from lowbit_jax.formats.base import FloatFormat, Format
from lowbit_jax.formats.catalogue import E4M3
from lowbit_jax.scaling.fit import SMALLEST_SCALE, largest_scale

Stored = tuple[Array, ...]


@runtime_checkable
class ScaleFormat(Protocol):
    def store(self, scale: Float[Array, "*s"], fmt: Format) -> Stored: ...

    def load(self, stored: Stored) -> Float[Array, "*s"]: ...

    def describe(self) -> str: ...


@dataclasses.dataclass(frozen=True, slots=True)
class CastScale:
    """Scales kept in a floating dtype of JAX: its name, or the dtype itself.

    Raises: ValueError for a dtype that is unknown, not floating, wider than float32 (in which scales are computed) or
    without a zero and a NaN."""

    dtype: str

    def __post_init__(self):
        object.__setattr__(self, "dtype", _scale_dtype(self.dtype))

    def store(self, scale, fmt):
        if self.dtype == "float32":
            return (scale,)
        low = max(float(ml_dtypes.finfo(self.dtype).smallest_subnormal), SMALLEST_SCALE)
        usable = jnp.clip(scale, low, _largest_kept(self.dtype, fmt)).astype(self.dtype)
        return (jnp.where(jnp.isfinite(scale), jnp.where(scale > 0, usable, jnp.zeros_like(usable)), jnp.nan),)

    def load(self, stored):
        return stored[0].astype(jnp.float32)

    def describe(self) -> str:
        return self.dtype


def _scale_dtype(dtype: Any) -> str:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is not None and jnp.issubdtype(found, jnp.floating) and found.itemsize <= 4:
        kept = np.asarray([0, np.nan], np.float32).astype(found).astype(np.float32)
        if kept[0] == 0 and np.isnan(kept[1]):
            return found.name
    raise ValueError(
        f"CastScale({dtype!r}): scales are kept in a floating dtype of at most 32 bits that has a zero and a NaN, such"
        " as 'float32', 'bfloat16', 'float16' or 'float8_e4m3fn'. For powers of two use PowerOfTwo()."
    )


FLOAT32 = CastScale("float32")
BFLOAT16 = CastScale("bfloat16")


@dataclasses.dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """E8M0: one byte, 2^(code - 127), the shared scale of the OCP MX formats.

    With amax = scale * reach (the largest level), `mode` is one of `rounding.power_of_two_scale`: floor (OCP MX v1.0
    section 6.3, the top of the grid may clip), ceil, rceil (the least power that clips nothing), even, all but for the
    rounding of that amax, up to two last places from the tile's own; or nearest, the power nearest to the fitted scale
    itself in the logarithm, for the rms fit; always one that keeps the largest level times it finite. A scale of 0 or
    below 2^-126 is stored as code 0, which XLA may flush to 0; NaN and inf as the NaN code 255. The scale is `times`
    the power: with floor and 4/3, elements come to at most 3/4 of the next power's range, so that on E2M1 (6 of 8) none
    is clipped and stochastic rounding stays unbiased (Tseng et al. 2025, arXiv:2502.20586).
    Raises: ValueError for another mode, and unless 1 <= times < 2."""

    mode: str = "floor"
    times: float = 1.0

    def __post_init__(self):
        if not isinstance(self.times, numbers.Real) or not 1 <= self.times < 2:
            raise ValueError(
                f"PowerOfTwo(times={self.times!r}): the factor beside the power lies from 1 up to, and without, 2."
            )
        if self.mode not in ("floor", "ceil", "rceil", "even", "nearest"):
            raise ValueError(f"PowerOfTwo(mode={self.mode!r}): the modes are floor, ceil, rceil, even and nearest.")

    def store(self, scale, fmt):
        if self.mode == "nearest":
            power = rounding.power_of_two(scale, "log")
        else:
            power = rounding.power_of_two_scale(scale * fmt.reach, fmt, self.mode)
        code = lax.bitcast_convert_type(power, jnp.int32) >> 23  # the exponent field, biased by 127 as in E8M0
        code = jnp.where(scale > 0, jnp.minimum(code, _largest_code(fmt) - (self.times > 1)), 0)
        return (jnp.where(jnp.isfinite(scale), code, 255).astype(jnp.uint8),)

    def load(self, stored):
        code = stored[0].astype(jnp.int32)
        power = lax.bitcast_convert_type(code << 23, jnp.float32)
        return jnp.where(code == 255, jnp.nan, power if self.times == 1 else power * self.times)

    def describe(self) -> str:
        return f"e8m0 {self.mode}" + ("" if self.times == 1 else f" x {self.times:.4g}")


@functools.cache
def _largest_kept(dtype: str, fmt: Format) -> float:
    """The largest scale of `fmt` that is a value of the dtype, or close below it."""
    info = ml_dtypes.finfo(dtype)
    limit = min(float(info.max), largest_scale(fmt))
    kept = float(np.asarray(limit, np.float32).astype(dtype))
    return kept if kept <= limit else float(np.asarray(limit * (1 - 2.0**-info.nmant), np.float32).astype(dtype))


@functools.cache
def _largest_code(fmt: Format) -> int:
    """The E8M0 code of the largest power of two that can scale `fmt`."""
    return math.frexp(largest_scale(fmt))[1] - 1 + 127


@dataclasses.dataclass(frozen=True, slots=True)
class TwoLevel:
    """A small-float scale a tile under one float32 scale a tensor, the NVFP4 scheme (arXiv:2509.25149, section 2).

    The tensor scale puts the largest tile scale on `cap` (448 for E4M3; 256 leaves headroom for four-over-six). A scale
    of 0, that of a tile of zeros, is stored as 0; one that is not finite as NaN, and does not touch the others.
    Raises: TypeError for a format that is no float with a NaN and a dtype; ValueError unless 0 < cap <= its largest
    value."""

    format: FloatFormat = E4M3
    cap: float = 448.0

    def __post_init__(self):
        if not isinstance(self.format, FloatFormat) or self.format.dtype is None or not self.format.has_nan:
            raise TypeError(
                f"TwoLevel(format={self.format!r}): the scale of a tile is a small float with a NaN that ml_dtypes"
                " knows, such as lb.formats.E4M3 or E5M2."
            )
        if not 0 < self.cap <= self.format.max_finite:
            raise ValueError(
                f"TwoLevel(cap={self.cap}): the largest tile scale is put on `cap`, which lies above 0 and up to"
                f" {self.format.max_finite:g}, the largest value of {self.format.name}."
            )

    def store(self, scale, fmt):
        largest = jnp.max(jnp.where(jnp.isfinite(scale), scale, 0), initial=0)
        most = largest_scale(fmt) / self.format.max_finite * (1 - 2.0**-22)  # times the largest tile, rounded
        tensor = jnp.where(largest > 0, jnp.clip(largest * (1 / self.cap), SMALLEST_SCALE, most), 1.0)
        smallest = min(level for level in self.format.levels if level > 0)
        tile = rounding.nearest(scale / tensor, self.format)
        tile = jnp.where((scale > 0) & (tile == 0), smallest, tile)
        tile = jnp.where(jnp.isfinite(scale), tile, jnp.nan)
        return tile.astype(self.format.dtype), tensor

    def load(self, stored):
        tile, tensor = stored  # a stack of arrays has a tensor scale for each
        return tile.astype(jnp.float32) * jnp.expand_dims(tensor, tuple(range(tensor.ndim, tile.ndim)))

    def describe(self) -> str:
        return f"{self.format.name} x float32"
