"""Codes of the dynamic-tree data types in closed form: arithmetic only, which vectorizes where look-ups do not.

Count the decades downwards, e = 0 for [0.1, 1]. Decade e has n = base 2**(last - e) values (base = 1 with a sign, 2
without), midpoints of equal parts; so with s = x 10**e the decimal fraction,

    rank within the decade = floor(n (s - 0.1) / 0.9)

The decade is found bit by bit. Decade e's threshold with the one below, e + 1, is 0.2 steps above its begin, since the
steps of the two differ by the factor 5: at s = 0.1 + 0.18 / n. What is below all decades is zero.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt8

from lowbit_jax.formats.base import Codebook, Format
from lowbit_jax.formats.catalogue import DYNAMIC_TREE4, DYNAMIC_TREE8
from lowbit_jax.optim.codebooks import UNSIGNED_DYNAMIC_TREE8

_TREES = {DYNAMIC_TREE8: (7, 1), DYNAMIC_TREE4: (3, 1), UNSIGNED_DYNAMIC_TREE8: (7, 2)}  # (decades, base)
_ROUND = float(2**23)  # a float32 of this size is an integer, and its low bits are


def is_tree(fmt: Format) -> bool:
    return isinstance(fmt, Codebook) and fmt in _TREES


def tree_code(x: Float[Array, "*s"], fmt: Codebook) -> UInt8[Array, "*s"]:
    """The code of the value nearest to each `x` (float32, finite, within [-1, 1]).

    As `nearest_code`, but for numbers within 1e-4 of a step of a threshold, which may go to either side."""
    decades, base = _TREES[fmt]
    parts = base * 2 ** (decades - 1)  # of the first decade
    fraction, scale = jnp.abs(x), float(parts)
    smaller: list[tuple[int, Bool[Array, "*s"]]] = []
    for bit in (4, 2, 1):
        if bit <= decades:
            below = fraction < _threshold(bit, smaller, decades, base)
            fraction = jnp.where(below, fraction * 10.0**bit, fraction)
            scale = jnp.where(below, scale * 0.5**bit, scale)
            smaller.append((bit, below))
    # rank from the first value (base for it), as an integer above _ROUND; half less, so that rounding is the floor
    rank = scale * (fraction * (1 / 0.9) + (1 - 0.1 / 0.9)) + (_ROUND - 0.5)
    last = 2 * scale + (_ROUND - 1)
    rank = jnp.where(rank < last, rank, last)
    if base > 1:  # of zero
        rank = jnp.where(rank < _ROUND + base - 1, _ROUND + base - 1, rank)
    rank = jnp.where(x >= 1 - 0.225 / parts, _ROUND + 2 * parts, rank)
    bits = lax.bitcast_convert_type(rank, jnp.int32)
    zero = 2**decades - 1 if base == 1 else 0
    code = bits + (zero - base + 1)
    return (jnp.where(x < 0, (zero + base - 1) - bits, code) if base == 1 else code).astype(jnp.uint8)


def _threshold(bit: int, smaller: list, decades: int, base: int, decade: int = 0) -> Array | float:
    """Below which, in units of `10**-decade`, a number is at least `bit` decades under `decade`: for each element by
    what is known of its decade."""
    if smaller:
        (bits, below), *rest = smaller
        further = [_threshold(bit, rest, decades, base, decade + more) for more in (bits, 0)]
        return jnp.where(below, *further)
    under = decade + bit  # the threshold above this decade
    if under == decades:  # zero: half the smallest value
        return (0.1 + 0.45 / base) / 2 * 10.0 ** (decade + 1 - decades)
    return 10.0 ** (decade - under + 1) * (0.1 + 0.18 / (base * 2 ** (decades - under)))
