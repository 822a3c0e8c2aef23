"""Codes of the dynamic-tree data types in closed form: arithmetic only, which vectorizes where look-ups do not.

With u = rank + 1/2 (counted so that decade i spans the ranks base 2**i .. base 2**(i + 1), base = 1 with a sign, 2
without), the value is the convex, piecewise linear

    value(u) = max_i (0.1 + 0.9 (u / (base 2**i) - 1)) 10**(i - last)

whose inverse is a minimum of lines. The threshold between two ranks of a decade is the integer between them; between
two decades it is 1/5 further up, since the lines' slopes differ by the factor 5.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from lowbit_jax.formats.base import Codebook, Format
from lowbit_jax.formats.catalogue import DYNAMIC_TREE4, DYNAMIC_TREE8
from lowbit_jax.optim.codebooks import UNSIGNED_DYNAMIC_TREE8

_TREES = {DYNAMIC_TREE8: (7, 1), DYNAMIC_TREE4: (3, 1), UNSIGNED_DYNAMIC_TREE8: (7, 2)}  # (decades, base)
_ROUND = float(2**23)  # a float32 of this size holds integers in its low bits


def is_tree(fmt: Format) -> bool:
    return isinstance(fmt, Codebook) and fmt in _TREES


def tree_code(x: Float[Array, "*s"], fmt: Codebook) -> UInt8[Array, "*s"]:
    """The code of the value nearest to each `x` (float32, finite, within [-1, 1]).

    As `nearest_code`, but for numbers within 5e-5 of a step of a threshold, which may go to either side."""
    decades, base = _TREES[fmt]
    top = float(base * 2**decades)  # u of the value 1 is beyond this
    magnitude = jnp.abs(x)
    u = None
    for i in range(decades):
        slope = base * 2**i / (0.9 * 10.0 ** (i + 1 - decades))
        line = magnitude * slope + base * 2**i * (1 - 0.1 / 0.9)
        u = line if u is None else jnp.where(line < u, line, u)
    assert u is not None
    below = jnp.floor(u)
    at_decade = (lax.bitcast_convert_type(below, jnp.int32) & 0x7FFFFF) == 0  # a power of two
    first = (0.1 + 0.45 / base) / 2  # halfway from 0 to the smallest value: its u - base is the threshold there
    past = jnp.where(below == base, (first - 0.1) * base / 0.9, 0.2)
    rank = below - jnp.where(at_decade & (u - below < past), 1.0, 0.0)
    rank = jnp.where(u >= top - 0.25, top, jnp.where(rank < top - 1, rank, top - 1)) - (base - 1)
    rank = jnp.where(rank > 0, rank, 0.0)
    if base == 1:
        zero = float(2**decades - 1)
        rank = jnp.where(x < 0, zero - jnp.where(rank < zero, rank, zero), zero + rank)
    return lax.bitcast_convert_type(rank + _ROUND, jnp.int32).astype(jnp.uint8)
