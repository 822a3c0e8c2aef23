"""The number format of the scales themselves: what is stored, and so what training must already compute with.

A scale format stores float32 scales as a tuple of arrays (`store`) and gives them back (`load`); `load(store(s))` is the
rounding that a quantizer puts inside its forward. A scale below what the format holds is kept at its smallest value.
"""

import dataclasses
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax import rounding
from lowbit_jax.formats.base import FloatFormat, Format
from lowbit_jax.formats.catalogue import E4M3
from lowbit_jax.scaling.fit import reach

Stored = tuple[Array, ...]


class ScaleFormat(Protocol):
    def store(self, scale: Float[Array, "*s"], fmt: Format) -> Stored: ...

    def load(self, stored: Stored) -> Float[Array, "*s"]: ...

    def describe(self) -> str: ...


@dataclasses.dataclass(frozen=True, slots=True)
class CastScale:
    """Scales kept in a floating dtype of JAX, by its name."""

    dtype: str

    def store(self, scale, fmt):
        return (scale.astype(self.dtype),)

    def load(self, stored):
        return stored[0].astype(jnp.float32)

    def describe(self) -> str:
        return self.dtype


FLOAT32 = CastScale("float32")
BFLOAT16 = CastScale("bfloat16")


@dataclasses.dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """E8M0: one byte, 2^(code - 127), the shared scale of the OCP MX formats.

    With amax = scale * max_finite and emax the exponent of the element's largest value, `mode` says which power:
      floor    2^(floor(log2 amax) - emax), OCP MX v1.0 section 6.3: the top of the grid may clip;
      ceil     2^(ceil(log2 amax) - emax);
      rceil    the least power that clips nothing: 2^ceil(log2(amax / max_finite));
      even     as floor, after rounding amax to the element's mantissa;
      nearest  the power nearest to the fitted scale, in the logarithm (for the rms fit).
    Exact: exponents are read from the bits, never from log2. Raises: ValueError for another mode."""

    mode: str = "floor"

    def __post_init__(self):
        if self.mode not in ("floor", "ceil", "rceil", "even", "nearest"):
            raise ValueError(f"PowerOfTwo(mode={self.mode!r}): the modes are floor, ceil, rceil, even and nearest.")

    def exponent(self, scale: Float[Array, "*s"], fmt: Format) -> Array:
        """The int32 exponent chosen for each scale."""
        top = reach(fmt)
        emax = int(np.frexp(top)[1]) - 1
        against_power = scale * (top / 2.0**emax)  # amax / 2^emax
        match self.mode:
            case "rceil":
                return _ceil_log2(scale)
            case "ceil":
                return _ceil_log2(against_power)
            case "nearest":
                fraction, exponent = jnp.frexp(scale)
                return exponent - 1 + (fraction > np.float32(0.5**0.5)).astype(exponent.dtype)
            case "even":
                mantissa_bits = fmt.mantissa_bits if isinstance(fmt, FloatFormat) else max(fmt.bits - 2, 0)
                fraction, exponent = jnp.frexp(against_power)
                return exponent - 1 + (fraction >= 1 - 2.0 ** -(mantissa_bits + 2)).astype(exponent.dtype)
            case _:
                return jnp.frexp(against_power)[1] - 1

    def store(self, scale, fmt):
        code = jnp.where(scale > 0, jnp.clip(self.exponent(scale, fmt) + 127, 0, 254), 0)
        return (jnp.where(jnp.isfinite(scale), code, 255).astype(jnp.uint8),)

    def load(self, stored):
        code = stored[0].astype(jnp.int32)
        power = jnp.ldexp(jnp.ones(code.shape, jnp.float32), jnp.maximum(code - 127, -126))
        power = jnp.where(code == 0, power / 2, power)
        return jnp.where(code == 255, jnp.nan, power)

    def describe(self) -> str:
        return f"e8m0 {self.mode}"


def _ceil_log2(x: Float[Array, "*s"]) -> Array:
    fraction, exponent = jnp.frexp(x)
    return jnp.where(fraction == 0.5, exponent - 1, exponent)


@dataclasses.dataclass(frozen=True, slots=True)
class TwoLevel:
    """A small-float scale a tile under one float32 scale a tensor, the NVFP4 scheme (arXiv:2509.25149, section 2).

    The tensor scale puts the largest tile scale on `cap` (448 for E4M3; 256 leaves headroom for four-over-six)."""

    format: FloatFormat = E4M3
    cap: float = 448.0

    def store(self, scale, fmt):
        largest = jnp.max(jnp.where(jnp.isfinite(scale), scale, 0), initial=0)
        tensor = jnp.where(largest > 0, largest * (1 / self.cap), 1.0)
        smallest = min(level for level in self.format.levels if level > 0)
        tile = rounding.nearest(scale / tensor, self.format)
        tile = jnp.where((scale > 0) & (tile == 0), smallest, tile)
        return tile.astype(self.format.dtype), tensor

    def load(self, stored):
        tile, tensor = stored
        return tile.astype(jnp.float32) * tensor

    def describe(self) -> str:
        return f"{self.format.name} x float32"
