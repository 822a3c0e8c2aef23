"""The identity, and the identity inside the grid."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

_EDGE = 1 + 2.0**-20  # an element that a fit puts on the edge is inside, whatever the last bits of its scale


@dataclasses.dataclass(frozen=True, slots=True)
class StraightThrough:
    """dx = g. Source: Bengio et al. 2013, arXiv:1308.3432."""

    learns_scale: ClassVar[bool] = False

    def residuals(self, u, q, fmt, support):
        return None

    def gradients(self, residuals, g, fmt, tile_size):
        return g, None

    def describe(self) -> str:
        return "straight-through"


@dataclasses.dataclass(frozen=True, slots=True)
class ClippedStraightThrough:
    """dx = g where the smallest level <= x / scale <= the largest, but for the rounding of the scale, else 0.

    Source: Hubara et al. 2016, arXiv:1602.02830, eq. 4."""

    learns_scale: ClassVar[bool] = False

    def residuals(self, u, q, fmt, support):
        return (u >= fmt.min_finite * _EDGE) & (u <= fmt.max_finite * _EDGE)

    def gradients(self, residuals, g, fmt, tile_size):
        return jnp.where(residuals, g, jnp.zeros_like(g)), None

    def describe(self) -> str:
        return "clipped"
