"""The number format of the scales themselves: what is stored, and so what training must already compute with.

A scale format stores float32 scales as a tuple of arrays (`store`) and gives them back (`load`); `load(store(s))` is
the rounding that a quantizer puts inside its forward. A scale below what the format holds is kept at its smallest
value.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax import rounding
from lowbit_jax.formats.base import FloatFormat, Format
from lowbit_jax.formats.catalogue import E4M3
from lowbit_jax.scaling.fit import reach

Stored = tuple[Array, ...]


@runtime_checkable
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

    With amax = scale * max_finite, `mode` is one of `rounding.power_of_two_scale`: floor (OCP MX v1.0 section 6.3,
    the top of the grid may clip), ceil, rceil (the least power that clips nothing), even; or nearest, the power
    nearest to the fitted scale itself in the logarithm, for the rms fit. A scale of 0 or below 2^-126 is stored as
    code 0, which XLA may flush to 0; NaN and inf as the NaN code 255. Raises: ValueError for another mode."""

    mode: str = "floor"

    def __post_init__(self):
        if self.mode not in ("floor", "ceil", "rceil", "even", "nearest"):
            raise ValueError(f"PowerOfTwo(mode={self.mode!r}): the modes are floor, ceil, rceil, even and nearest.")

    def store(self, scale, fmt):
        if self.mode == "nearest":
            power = rounding.power_of_two(scale, "log")
        else:
            power = rounding.power_of_two_scale(scale * reach(fmt), fmt, self.mode)
        code = lax.bitcast_convert_type(power, jnp.int32) >> 23  # the exponent field, biased by 127 as in E8M0
        code = jnp.where(scale > 0, code, 0)
        return (jnp.where(jnp.isfinite(scale), code, 255).astype(jnp.uint8),)

    def load(self, stored):
        code = stored[0].astype(jnp.int32)
        power = lax.bitcast_convert_type(code << 23, jnp.float32)
        return jnp.where(code == 255, jnp.nan, power)

    def describe(self) -> str:
        return f"e8m0 {self.mode}"


@dataclasses.dataclass(frozen=True, slots=True)
class TwoLevel:
    """A small-float scale a tile under one float32 scale a tensor, the NVFP4 scheme (arXiv:2509.25149, section 2).

    The tensor scale puts the largest tile scale on `cap` (448 for E4M3; 256 leaves headroom for four-over-six). A scale
    of 0, that of a tile of zeros, is stored as 0; one that is not finite as NaN, and does not touch the others."""

    format: FloatFormat = E4M3
    cap: float = 448.0

    def store(self, scale, fmt):
        largest = jnp.max(jnp.where(jnp.isfinite(scale), scale, 0), initial=0)
        tensor = jnp.where(largest > 0, largest * (1 / self.cap), 1.0)
        smallest = min(level for level in self.format.levels if level > 0)
        tile = rounding.nearest(scale / tensor, self.format)
        tile = jnp.where((scale > 0) & (tile == 0), smallest, tile)
        tile = jnp.where(jnp.isfinite(scale), tile, jnp.nan)
        return tile.astype(self.format.dtype), tensor

    def load(self, stored):
        tile, tensor = stored
        return tile.astype(jnp.float32) * tensor

    def describe(self) -> str:
        return f"{self.format.name} x float32"
