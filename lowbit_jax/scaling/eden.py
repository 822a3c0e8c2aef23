"""EDEN: scales that take the bias out of a nearest rounding, on average over random rotations.

    c = <x, x> / <x, x_hat>   for each block of the rotation,       x_hat = e s,  e the nearest elements for scales s
    x_hat' = e s',            s' = c s rounded stochastically to the format of the scales

So <x, x_hat'> is <x, x> on average over the draws of s', and x_hat' is x on average over rotations (Haar's; signs drawn
anew before a Hadamard matrix come close). The noise is that of a nearest rounding: chance is in the scales alone.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax import rounding
from lowbit_jax.formats.base import settle_integers
from lowbit_jax.scaling.scale_format import ScaleFormat, Stored, TwoLevel
from lowbit_jax.scaling.tiling import Group


@dataclasses.dataclass(frozen=True, slots=True)
class Eden:
    """MS-EDEN: the scales of groups, corrected for each `block` of the rotation and rounded stochastically.

    `block` is that of the rotation, and like it gives way to the largest power of two that divides the axis. A block
    whose elements are all 0 keeps its scales, and a tile that is NaN counts in no other's correction. A scale is at
    most the largest of its format: the cap of `TwoLevel` leaves the room.
    Source: Panferov et al. 2026, arXiv:2601.22813; EDEN: Vargaftik et al. 2022, arXiv:2108.08842. The authors' code of
    the former takes both sums in units of each tile's own scale, which leaves 0.04% of a Gaussian's length missing.
    Raises: ValueError unless `block` is a power of two; TypeError unless it is an integer."""

    block: int = 128

    def __post_init__(self):
        settle_integers(self, "block")
        if self.block < 1 or self.block & (self.block - 1):
            raise ValueError(f"Eden(block={self.block}): it is that of a Hadamard rotation, such as 32, 64 or 128.")

    def check(self, tiling: Any, how: Any, scale_format: Any, plain: bool) -> None:
        """Raises ValueError where the other slots of a quantizer have no place for the correction. how: the rounding;
        plain: no learned scale, support or zero points."""
        way_out = None
        if not isinstance(tiling, Group) or self.block % tiling.size:
            way_out = (
                f"tiling={tiling.describe()}): it corrects groups that lie in its blocks. Use Group(16) or another"
            )
            way_out += f" power of two up to {self.block}"
        elif not isinstance(scale_format, TwoLevel):
            told = scale_format.describe()
            way_out = f"scale_format={told}): it rounds the scales of tiles to a small float. Use TwoLevel(cap=256.0)"
        elif how is not rounding.nearest:
            way_out = "rounding=): chance is in the scales. Use rounding.nearest, or leave out the correction"
        elif not plain:
            way_out = "...): it has no place for learned scales, a support or zero points. Leave out one of them"
        if way_out is not None:
            raise ValueError(f"Quantizer(debias={self}, {way_out}.")

    def corrected(
        self, u: Float[Array, "*tiles"], values: Float[Array, "*tiles"], axes: tuple[int, ...], stored: Stored,
        scale_format: ScaleFormat, key: Array | None,
    ) -> Stored:  # fmt: skip
        """The scales for elements `values`, nearest to u = x / scale under the stored ones, in the view of `Group`.

        Raises: ValueError without a key, TypeError for a key that is none."""
        assert isinstance(scale_format, TwoLevel), "`check` says so of others"
        tile, tensor = stored
        scale = tile.astype(jnp.float32)  # x is u scale times that of the tensor, which cancels
        counts = jnp.isfinite(scale)
        over_tiles = lambda terms: jnp.where(counts, jnp.sum(terms, axes, keepdims=True) * scale * scale, 0)
        square, product = (self._over_blocks(over_tiles(u * other), u.shape, axes) for other in (u, values))
        factor = jnp.where(product > 0, square / jnp.where(product > 0, product, 1), 1)
        drawn = rounding.stochastic(scale * factor, scale_format.format, key)
        return drawn.astype(tile.dtype), tensor

    def _over_blocks(
        self, sums: Float[Array, "*scales"], tiles_shape: tuple[int, ...], axes: tuple[int, ...]
    ) -> Float[Array, "*scales"]:
        """For each tile the sum over all tiles of its block."""
        (inner,) = axes
        count, size = tiles_shape[inner - 1], tiles_shape[inner]
        run = max(1, math.gcd(count * size, self.block) // size)
        split = (*sums.shape[: inner - 1], count // run, run, *sums.shape[inner:])
        total = jnp.sum(sums.reshape(split), inner, keepdims=True)
        return jnp.broadcast_to(total, split).reshape(sums.shape)

    def describe(self) -> str:
        return f"eden {self.block}"
