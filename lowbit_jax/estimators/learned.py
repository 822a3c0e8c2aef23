"""Estimators whose scale is a parameter: its gradient is part of the rule."""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, slots=True)
class LSQ:
    """Learned step size. With u = x / s and levels from Qn to Qp:

        dx = g where Qn < u < Qp, else 0
        ds = (N Qp)^-1/2 sum of g (q - u) where Qn < u < Qp, g Qn or g Qp outside;  N the elements that share s

    An element off a sparse support is 0 whatever the scale, and adds nothing to ds.
    Source: Esser et al. 2019, arXiv:1902.08153, eq. 3, 5 and section 2.2 (the gradient's scale)."""

    learns_scale: ClassVar[bool] = True

    def residuals(self, u, q, fmt, support):
        inside = (u > fmt.min_finite) & (u < fmt.max_finite)
        slope = jnp.where(inside, q - u, q)
        return inside, slope if support is None else jnp.where(support, slope, jnp.zeros_like(slope))

    def gradients(self, residuals, g, fmt, tile_size):
        inside, slope = residuals
        gain = 1 / math.sqrt(max(tile_size, 1) * fmt.reach)
        return jnp.where(inside, g, jnp.zeros_like(g)), g * (slope * gain)

    def describe(self) -> str:
        return "learned step"


@dataclasses.dataclass(frozen=True, slots=True)
class PACT:
    """Learned clipping level alpha = s Qp on an unsigned grid:

        dx = g where 0 <= x < alpha, else 0;      d alpha = sum of g where x >= alpha

    (so ds = Qp d alpha). A signed grid clips both ends, and the low end pulls with the opposite sign. An element off a
    sparse support adds nothing to d alpha.
    Source: Choi et al. 2018, arXiv:1805.06085, eq. 2 and 3. Its l2 penalty on alpha is the optimizer's weight decay."""

    learns_scale: ClassVar[bool] = True

    def residuals(self, u, q, fmt, support):
        above, below = u >= fmt.max_finite, u < fmt.min_finite
        return above, below, support

    def gradients(self, residuals, g, fmt, tile_size):
        above, below, support = residuals
        outside = jnp.where(above, g * fmt.max_finite, jnp.zeros_like(g))
        if fmt.min_finite < 0:
            outside = jnp.where(below, g * fmt.min_finite, outside)
        if support is not None:
            outside = jnp.where(support, outside, jnp.zeros_like(g))
        return jnp.where(above | below, jnp.zeros_like(g), g), outside

    def describe(self) -> str:
        return "pact"
