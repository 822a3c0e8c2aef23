"""QuEST's trust estimator: a gradient passes where the quantizer is close to what it replaces."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax.formats.base import Format


@dataclasses.dataclass(frozen=True, slots=True)
class Trust:
    """dx = g where |x_hat - x| <= T, T half the gap of the two largest levels, else 0.

    For the mid-rise grid T = alpha* rms / (2^b - 1), half a step: everything inside the grid is trusted, and outside it
    what lies within half a step of the end. The test is written on u itself, |u| <= max + T, so that a float error at a
    tie inside the grid cannot flip it: that is the same for the nearest level of a grid whose inner gaps are no wider
    than the last. Where some are wider (NF4) the distance is looked at too; a rounding other than to nearest is not
    asked how far it went. An element off a sparse support is trusted where |u| <= T, its distance to 0.
    `outer` replaces the limit by |u| <= outer * max (QuEST's tuned clip_scale of 1-bit runs, 1.30).
    Source: Panferov et al. 2025, arXiv:2502.05003, section 3.3 and algorithm 1.
    Raises: ValueError unless `outer` is None or positive."""

    learns_scale: ClassVar[bool] = False
    outer: float | None = None

    def __post_init__(self):
        if self.outer is not None and not self.outer > 0:
            raise ValueError(
                f"Trust(outer={self.outer}): the limit is a positive multiple of the largest level, or None."
            )

    def limits(self, fmt: Format) -> tuple[float, float]:
        """The least and the largest trusted value, in units of the grid."""
        if self.outer is None:
            radius = fmt.top_gap / 2
            return fmt.min_finite - radius, fmt.max_finite + radius
        return self.outer * fmt.min_finite, self.outer * fmt.max_finite

    def residuals(self, u, q, fmt, support):
        low, high = self.limits(fmt)
        trusted = (u >= low) & (u <= high) if low != -high else lax.le(lax.abs(u), np.asarray(high, u.dtype))
        if self.outer is None and fmt.widest_gap > fmt.top_gap:
            trusted &= jnp.abs(q - u) <= fmt.top_gap / 2 * (1 + 2.0**-20)
        return trusted if support is None else jnp.where(support, trusted, jnp.abs(u) <= fmt.top_gap / 2)

    def gradients(self, residuals, g, fmt, tile_size):
        return lax.select(residuals, g, lax.full_like(g, 0)), None

    def describe(self) -> str:
        return "trust" if self.outer is None else f"trust (outer {self.outer:g})"
