"""What a quantizer does to each tile: signal over error, and how far the largest element stands out."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit_jax.scaling.fit import largest_magnitude

OUTLIER_RATIO = 1e3
"""Ratio of the largest element to the rms of the rest above which a report flags a tile."""


@dataclasses.dataclass(frozen=True)
class TileReport:
    """Arrays with one entry a tile, in the shape of the tiling's scales.

    sqnr: 20 log10(|x| / |x - x_hat|) of the tile, in dB; inf where nothing is lost. rest: the same of its elements but
    the largest, which an absmax fit keeps at the cost of the others. outlier_ratio: the largest magnitude over the rms
    of the others; 0 for a tile of zeros, inf where the others are zeros. All are NaN where the tile holds a NaN or
    infinity."""

    sqnr: Float[Array, "*scales"]
    rest: Float[Array, "*scales"]
    outlier_ratio: Float[Array, "*scales"]

    @property
    def flagged(self) -> list[tuple[int, ...]]:
        """Indices of the tiles with an element above OUTLIER_RATIO times the rms of the others, or not finite."""
        ratio = np.asarray(self.outlier_ratio)
        return [tuple(map(int, index)) for index in np.argwhere((ratio > OUTLIER_RATIO) | np.isnan(ratio))]

    def __str__(self) -> str:
        if self.sqnr.size == 0:
            return "0 tiles"
        flagged = self.flagged
        middle = lambda values: f"{np.nanmedian(np.asarray(values)):.1f}" if np.isfinite(values).any() else "-"
        return (
            f"{self.sqnr.size} tiles: SQNR {middle(self.sqnr)} dB (median), {middle(self.rest)} dB without the largest"
            f" element; largest outlier ratio {np.nanmax(np.append(np.asarray(self.outlier_ratio), 0)):.3g};"
            f" {len(flagged)} flagged" + (f": {', '.join(map(str, flagged[:5]))}" if flagged else "")
        )


def tile_report(tiles: Float[Array, "*tiles"], near: Float[Array, "*tiles"], axes: tuple[int, ...]) -> TileReport:
    """The report on `tiles`, whose members lie along `axes`, and the values `near` that stand for them."""
    amax = largest_magnitude(tiles, axes)
    unit = jnp.where(amax > 0, amax, 1)  # squares are then finite, whatever the magnitude of the tile
    total = lambda values: jnp.sum(values, axis=axes, keepdims=True)
    largest = jnp.abs(tiles) == amax
    ties = total(largest.astype(jnp.float32))  # one of them is the largest, the others belong to the rest

    def without_largest(squares):
        return total(jnp.where(largest, 0.0, squares)) + total(jnp.where(largest, squares, 0.0)) * ((ties - 1) / ties)

    signal, noise = (tiles / unit) ** 2, ((near - tiles) / unit) ** 2
    count = max(1, math.prod(tiles.shape[a] for a in axes) - 1)
    decibels = lambda signal, noise: 10 * jnp.log10(signal / noise)
    settle = lambda values, of_zeros: jnp.where(jnp.isfinite(amax), jnp.where(amax == 0, of_zeros, values), jnp.nan)
    return TileReport(
        sqnr=settle(decibels(total(signal), total(noise)), jnp.inf),
        rest=settle(decibels(without_largest(signal), without_largest(noise)), jnp.inf),
        outlier_ratio=settle(1 / jnp.sqrt(without_largest(signal) / count), 0.0),
    )
