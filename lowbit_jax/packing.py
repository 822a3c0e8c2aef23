"""Codes of 1 to 8 bits as bytes, without gaps: code `i` of a row is at bits `i*bits .. (i+1)*bits - 1` of its bytes.

Bits count from the least significant bit of byte 0 (little-endian). Every row starts at a byte, and the bits after its
last code are zero. Eight codes are `bits` bytes, so all shifts below are constants.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt8

from lowbit_jax.formats.base import whole_number

LAYOUT = "bitstream-le/1"  # name and version of this layout, for files that hold packed words

_GROUP = 8  # codes that fill a whole number of bytes at any width


def packed_size(size: int, bits: int) -> int:
    """Bytes a row of `size` codes takes: `ceil(size * bits / 8)`."""
    return -(-size * bits // 8)


def pack(codes: UInt8[Array, "*rows size"], bits: int) -> UInt8[Array, "*rows packed"]:
    """The codes of each row as `packed_size(size, bits)` bytes; bits of a code above `bits` are cut off.

    Raises: ValueError for a width that is not 1 to 8, TypeError for codes that are not uint8."""
    _check("pack", codes, bits)
    if bits == 8:
        return codes
    size = codes.shape[-1]
    codes = codes & jnp.uint8((1 << bits) - 1)
    if bits in (2, 4):  # no code crosses a byte: an eighth of the general form's time on a CPU
        groups = _in_groups(codes, 8 // bits)
        return _join([_shifted(groups[..., i], i * bits) for i in range(8 // bits)])
    groups = _in_groups(codes, _GROUP)
    parts = [groups[..., i] for i in range(_GROUP)]
    packed = [_byte(parts, bits, byte) for byte in range(bits)]
    return _ungroup(jnp.stack(packed, axis=-1), packed_size(size, bits))


def unpack(words: UInt8[Array, "*rows packed"], bits: int, size: int) -> UInt8[Array, "*rows size"]:
    """The `size` codes of each row: the inverse of `pack`.

    Raises: ValueError for a width that is not 1 to 8, a negative size, or rows whose length is not `packed_size(size,
    bits)`; TypeError for words that are not uint8."""
    _check("unpack", words, bits)
    if whole_number(size, "packing.unpack(size=)") < 0:
        raise ValueError(f"packing.unpack got size={size}; a row has 0 codes or more.")
    expected = packed_size(size, bits)
    if words.shape[-1] != expected:
        raise ValueError(
            f"unpack got rows of {words.shape[-1]} bytes for {size} codes of {bits} bits, which take {expected}. Pass"
            f" the `bits` of the call to `pack` and the last axis of its codes as `size`."
        )
    if bits == 8:
        return words
    if bits in (1, 2, 4):  # no code crosses a byte: one vector operation, a sixth of the general form's time on a CPU
        shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape([1] * words.ndim + [-1])
        return _ungroup((words[..., None] >> shifts) & jnp.uint8((1 << bits) - 1), size)
    groups = _in_groups(words, bits)
    parts = [groups[..., i] for i in range(bits)]
    codes = [_code(parts, bits, code) for code in range(_GROUP)]
    return _ungroup(jnp.stack(codes, axis=-1), size)


def _byte(codes: list[Array], bits: int, byte: int) -> Array:
    """Byte `byte` of a group: every code that reaches into its bits, shifted into place."""
    first, last = 8 * byte // bits, (8 * byte + 7) // bits
    return _join([_shifted(codes[i], i * bits - 8 * byte) for i in range(first, last + 1)])


def _code(words: list[Array], bits: int, code: int) -> Array:
    """Code `code` of a group, from the one or two bytes it lies in."""
    first, last = code * bits // 8, (code * bits + bits - 1) // 8
    joined = _join([_shifted(words[i], 8 * i - code * bits) for i in range(first, last + 1)])
    return joined & jnp.uint8((1 << bits) - 1)


def _shifted(x: Array, left: int) -> Array:
    return lax.shift_left(x, jnp.uint8(left)) if left >= 0 else lax.shift_right_logical(x, jnp.uint8(-left))


def _join(parts: list[Array]) -> Array:
    joined = parts[0]
    for part in parts[1:]:
        joined = joined | part
    return joined


def _in_groups(x: Array, width: int) -> Array:
    """The last axis cut into groups of `width`, padded with zeros."""
    *rows, size = x.shape
    count = -(-size // width)
    padded = jnp.pad(x, [(0, 0)] * len(rows) + [(0, count * width - size)])
    return padded.reshape(*rows, count, width)


def _ungroup(groups: Array, size: int) -> Array:
    *rows, count, width = groups.shape
    return groups.reshape(*rows, count * width)[..., :size]


def _check(who: str, x: Array, bits: int) -> None:
    if not 1 <= whole_number(bits, f"packing.{who}(bits=)") <= 8:
        raise ValueError(f"packing.{who} got bits={bits}; it stores codes of 1 to 8 bits.")
    if getattr(x, "dtype", None) != jnp.uint8 or x.ndim == 0:
        kind = f"a {x.dtype} array of shape {x.shape}" if hasattr(x, "dtype") else f"a {type(x).__name__}"
        raise TypeError(
            f"packing.{who} got {kind}; it takes uint8 with at least one axis: the codes"
            f" of coding.encode, or the bytes of packing.pack."
        )
