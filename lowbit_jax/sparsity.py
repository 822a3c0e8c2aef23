"""Which elements of a tile are kept. A support answers a boolean mask of the array's shape; the rest becomes zero."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from lowbit_jax.formats.base import settle_integers
from lowbit_jax.rounding import power_of_two
from lowbit_jax.scaling.tiling import normalized_axes


@runtime_checkable
class Support(Protocol):
    @property
    def group(self) -> int:
        """Elements in one group of the pattern."""
        ...

    @property
    def kept(self) -> int:
        """Elements kept of each group."""
        ...

    @property
    def run(self) -> int:
        """Neighbors that share one bit of the mask."""
        ...

    def mask(self, x: Float[Array, "*s"], axis: int) -> Bool[Array, "*s"]: ...

    def describe(self) -> str: ...


def compress(
    codes: UInt8[Array, "*rows K"], mask: Bool[Array, "*rows K"], support: Support
) -> tuple[UInt8[Array, "*rows kept"], UInt8[Array, "*rows marks"]]:
    """The kept codes in order, and one 0/1 mark for each `support.run` neighbors."""
    marks = mask[..., :: support.run].astype(jnp.uint8)
    *rows, length = codes.shape
    groups = codes.reshape(*rows, length // support.group, support.group)
    first = jnp.argsort(~mask.reshape(groups.shape), axis=-1, stable=True)[..., : support.kept]
    kept = jnp.take_along_axis(groups, first, axis=-1)
    return kept.reshape(*rows, length // support.group * support.kept), marks


def expand(
    kept: UInt8[Array, "*rows kept"], marks: UInt8[Array, "*rows marks"], support: Support
) -> tuple[UInt8[Array, "*rows K"], Bool[Array, "*rows K"]]:
    """What `compress` was given; the code where nothing is kept means nothing."""
    mask = jnp.repeat(marks == 1, support.run, axis=-1)
    groups = mask.reshape(*mask.shape[:-1], mask.shape[-1] // support.group, support.group)
    rank = jnp.clip(jnp.cumsum(groups, axis=-1) - 1, 0, support.kept - 1)
    codes = jnp.take_along_axis(kept.reshape(*groups.shape[:-1], support.kept), rank, axis=-1)
    return codes.reshape(mask.shape), mask


def _keep_largest(score: Float[Array, "*groups n"], keep: int) -> Bool[Array, "*groups n"]:
    """True for the `keep` largest of each last axis, NaN above all; of equals the first wins, so that the count is
    exact."""
    score = jnp.where(jnp.isnan(score), jnp.inf, score)
    ahead = score[..., None, :] > score[..., :, None]
    before = np.tri(score.shape[-1], k=-1, dtype=bool)  # before[i, j]: j comes earlier than i
    earlier = (score[..., None, :] == score[..., :, None]) & jnp.broadcast_to(before, ahead.shape)
    return jnp.sum(ahead | earlier, axis=-1) < keep


def _groups(x: Float[Array, "*s"], axis: int, size: int, who: str) -> Float[Array, "*rows groups size"]:
    if x.shape[axis] % size:
        raise ValueError(
            f"{who} cuts axis {axis} of length {x.shape[axis]} into groups of {size}, which leaves"
            f" {x.shape[axis] % size}. Pad by {-x.shape[axis] % size}, or leave this layer dense by a rule."
        )
    last = jnp.moveaxis(x, axis, -1)
    return last.reshape(*last.shape[:-1], last.shape[-1] // size, size)


def _ungroup(mask: Bool[Array, "*rows groups size"], axis: int) -> Bool[Array, "*s"]:
    return jnp.moveaxis(mask.reshape(*mask.shape[:-2], mask.shape[-2] * mask.shape[-1]), -1, axis)


@dataclasses.dataclass(frozen=True, slots=True)
class NofM:
    """The `n` largest magnitudes of each `m` consecutive elements. Source: Mishra et al. 2021, arXiv:2104.08378."""

    n: int = 2
    m: int = 4

    def __post_init__(self):
        settle_integers(self, "n", "m")
        if not 0 < self.n <= self.m:
            raise ValueError(f"NofM({self.n}, {self.m}): keep at least 1 and at most m of each m, as in NofM(2, 4).")

    @property
    def group(self) -> int:
        return self.m

    @property
    def kept(self) -> int:
        return self.n

    @property
    def run(self) -> int:
        return 1

    def mask(self, x, axis):
        (axis,) = normalized_axes(axis, x.ndim, "NofM")
        return _ungroup(_keep_largest(jnp.abs(_groups(x, axis, self.m, f"{self.n}:{self.m}")), self.n), axis)

    def describe(self) -> str:
        return f"{self.n}:{self.m}"


@dataclasses.dataclass(frozen=True, slots=True)
class PairsNofM:
    """Pairs of neighbors kept or dropped together: of each `2 m` elements, the `n` pairs of largest l2 norm.

    `PairsNofM(2, 4)` is the 4:8 support of QuEST's sparse INT4 weights (arXiv:2502.05003, section 4)."""

    n: int = 2
    m: int = 4

    def __post_init__(self):
        settle_integers(self, "n", "m")
        if not 0 < self.n <= self.m:
            raise ValueError(f"PairsNofM({self.n}, {self.m}): keep at least 1 and at most m of each m pairs.")

    @property
    def group(self) -> int:
        return 2 * self.m

    @property
    def kept(self) -> int:
        return 2 * self.n

    @property
    def run(self) -> int:
        return 2

    def mask(self, x, axis):
        (axis,) = normalized_axes(axis, x.ndim, "PairsNofM")
        groups = _groups(x, axis, 2 * self.m, self.describe())
        largest = jnp.max(jnp.where(jnp.isfinite(groups), jnp.abs(groups), 0), axis=-1, keepdims=True)
        unit = jnp.clip(power_of_two(largest, "floor"), 2.0**-126, 2.0**126)  # else squares over- and underflow
        pairs = (groups / unit).reshape(*groups.shape[:-1], self.m, 2)
        kept = _keep_largest(jnp.sum(pairs * pairs, axis=-1), self.n)
        return _ungroup(jnp.repeat(kept, 2, axis=-1), axis)

    def describe(self) -> str:
        return f"{2 * self.n}:{2 * self.m} pairs"
