"""Random words of a position in a matrix: Threefry2x32-20 of (row, pair of columns) under two key words.

A word depends on the key and on where its element is, and on nothing else, so every tiling draws the same. The function
is that of `jax.random` (`jax.random.key_data` of a threefry key is a key here); in 32-bit additions, rotations and
exclusive ors it runs the same inside a kernel, interpreted, and in XLA.
Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (Random123).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt32

from pallas_kernels.checks import fail

_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def check_key(who: str, key: UInt32[Array, "2"]) -> None:
    """Raises: TypeError for a key that is not uint32, ValueError unless it has two words."""
    if getattr(key, "dtype", None) != jnp.uint32:
        seen = getattr(key, "dtype", type(key).__name__)
        raise TypeError(f"{who} got a key of {seen}; it takes two uint32 words. Pass jax.random.key_data(key).")
    if key.shape != (2,):
        fail(who, f"got a key of shape {key.shape}", "It takes two words: jax.random.key_data of one threefry key")


def threefry2x32(
    key: tuple[UInt32[Array, ""], UInt32[Array, ""]], counter: tuple[UInt32[Array, "*s"], UInt32[Array, "*s"]]
) -> tuple[UInt32[Array, "*s"], UInt32[Array, "*s"]]:
    """Two random words of each counter."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for turn in range(5):
        for by in _ROTATIONS[turn % 2]:
            x = x + y
            y = x ^ ((y << by) | lax.shift_right_logical(y, jnp.uint32(32 - by)))
        x = x + keys[(turn + 1) % 3]
        y = y + keys[(turn + 2) % 3] + jnp.uint32(turn + 1)
    return x, y


def words(key: tuple, row: Array | int, column: Array | int, rows: int, columns: int) -> UInt32[Array, "rows columns"]:
    """32 random bits for each element of the tile whose first element is at (row, column); `columns` is even.

    Element (r, c) gets word c % 2 of the counter (r, c // 2)."""
    first, second = _drawn(key, row, column, rows, columns, 2)
    return jnp.stack([first, second], axis=-1).reshape(rows, columns)


def halves(key: tuple, row: Array | int, column: Array | int, rows: int, columns: int) -> UInt32[Array, "rows columns"]:
    """16 random bits for each element of the tile, in the low half of a word; `columns` is a multiple of 4.

    Element (r, c) gets half c % 4 of the counter (r, c // 4), low half first, first word first."""
    first, second = _drawn(key, row, column, rows, columns, 4)
    both = jnp.stack([first, second], axis=-1).reshape(rows, columns // 2, 1)
    shift = 16 * lax.broadcasted_iota(jnp.uint32, (1, 1, 2), 2)
    return (lax.shift_right_logical(*jnp.broadcast_arrays(both, shift)) & jnp.uint32(0xFFFF)).reshape(rows, columns)


def _drawn(key, row, column, rows, columns, each):
    shape = (rows, columns // each)
    at = lambda start, axis: jnp.asarray(start).astype(jnp.uint32) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return threefry2x32(key, (at(row, 0), at(column // each, 1)))
