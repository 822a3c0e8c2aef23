"""Several contraction axes as one, which is the axis that rotations, groups and supports lie along."""

import math

import jax.numpy as jnp


def merge(x, axes):
    """One contraction axis in place of several adjacent ones (moved last where they are not), and the way back."""
    if len(axes) == 1:
        return x, axes[0], lambda y: y
    shape = x.shape
    length = math.prod(shape[a] for a in axes)
    if axes == tuple(range(axes[0], axes[0] + len(axes))):
        merged = x.reshape(*shape[: axes[0]], length, *shape[axes[-1] + 1 :])
        return merged, axes[0], lambda y: y.reshape(shape)
    last = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    moved = last.shape
    back = lambda y: jnp.moveaxis(y.reshape(moved), range(len(moved) - len(axes), len(moved)), axes)
    return last.reshape(*moved[: x.ndim - len(axes)], length), x.ndim - len(axes), back


def as_rhs_lies(lhs_axes: tuple[int, ...], rhs_axes: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pairs of contraction axes in the order in which the weight has them, so that every order of the pairs is the
    same product with a weight that was merged before."""
    if len(rhs_axes) == 1:
        return lhs_axes, rhs_axes
    pairs = sorted(zip(lhs_axes, rhs_axes, strict=True), key=lambda pair: pair[1])
    return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)


def merged_axis(axes: tuple[int, ...], ndim: int) -> int:
    """Where the contraction axis lies after `merge`."""
    return axes[0] if axes == tuple(range(axes[0], axes[0] + len(axes))) else ndim - len(axes)


def merged_batch(batch, axes, ndim):
    """Where the batch axes lie after `merge`."""
    if len(axes) == 1:
        return batch
    if axes == tuple(range(axes[0], axes[0] + len(axes))):
        return tuple(b if b < axes[0] else b - len(axes) + 1 for b in batch)
    kept = [a for a in range(ndim) if a not in axes]
    return tuple(kept.index(b) for b in batch)
