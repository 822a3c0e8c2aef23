"""From a plane of words to numbers: backend-neutral, each form as inline assembly for NVIDIA GPUs and as a jnp twin.

In 16-bit words a 32-bit register holds two words, in 8-bit words four. A shift and one `lop3` put the field into the
mantissa of a power of two (bfloat16 128, float16 1024), which is the number 128 + u exactly; one fused multiply-add
takes the power off: no integer-to-float conversions, which run at a fraction of the rate. The twins are what interpret
mode and other backends run, and what the assembly is tested against over all words.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.planes import FIELDS, block_length

_ONES = {"bfloat16": 0x3F803F80, "float16": 0x3C003C00}
_BASE = {"bfloat16": (0x43004300, 128), "float16": (0x64006400, 1024)}


def offset(bits: int, midrise: bool) -> float:
    """The code that `to_float` calls zero: 2^(bits-1), or (2^bits - 1)/2, the middle of a mid-rise grid."""
    return ((1 << bits) - 1) / 2 if midrise else float(1 << (bits - 1))


def gain(midrise: bool) -> float:
    """What the values of `to_float` are multiples of a code step of: 1, and 2 about half a code, to stay integers."""
    return 2.0 if midrise else 1.0


def to_float(
    words: list[Int[Array, "*s"]], bits: int, planes: list[int], dtype, *, midrise: bool = False, assembly: bool
) -> Float[Array, "*s"]:
    """`gain (code - offset)` of one plane, exactly, in bfloat16 or float16, from 16-bit words of each field."""
    return (_float_assembly if assembly else _float_twin)(words, bits, planes, jnp.dtype(dtype), midrise)


def to_int8(words: list[Int[Array, "*s"]], bits: int, planes: list[int], *, assembly: bool) -> Int[Array, "*s"]:
    """The code of one plane as int8, from 8-bit words of each field; 8-bit codes come as code - 128."""
    return (_int8_assembly if assembly else _int8_twin)(words, bits, planes)


def held(ref: Any, field: int, word_bits: int, step: int, turn: Any, *, assembly: bool) -> list[Array]:
    """Inside a kernel, the words of one field for a turn of `step` contraction indices: rows of whole blocks, or, where
    a turn is part of a block, its row moved so that the turn's first plane is lowest."""
    block = block_length(field, word_bits)
    if block <= step:
        return [ref[turn * (step // block) + j, :, :] for j in range(step // block)]
    turns = block // step
    return [moved_down(ref[turn // turns, :, :], turn % turns * (word_bits // turns), assembly=assembly)]


def plane(words: list[list[Array]], bits: int, word_bits: int, slice_: int) -> tuple[list[Array], list[int]]:
    """Of the words that a turn holds of each field, those with a slice of 32 indices, and which plane of them it is."""
    counts = [word_bits // field for field in FIELDS[bits]]
    return [rows[slice_ // n] for rows, n in zip(words, counts, strict=True)], [slice_ % n for n in counts]


def moved_down(words: Int[Array, "*s"], by: Any, *, assembly: bool) -> Int[Array, "*s"]:
    """Words moved down by a number of bits that is known only as the kernel runs; what then stands on top of the planes
    that are left has no meaning."""
    word_bits = 8 * words.dtype.itemsize
    shift = jnp.broadcast_to(jnp.asarray(by).astype(words.dtype), words.shape)
    if assembly:
        text = f"{{ .reg .b32 s; and.b32 s, $2, {(1 << word_bits) - 1:#x}; shr.u32 $0, $1, s; }}"
        return _inline(text, [words, shift], words.dtype, pack=32 // word_bits)
    return lax.shift_right_logical(words, shift)


def _fields(bits: int, planes: list[int]):
    """(index of the word array, width, lowest bit in the word, lowest bit in the code) of each field."""
    above = bits
    for i, (width, plane) in enumerate(zip(FIELDS[bits], planes, strict=True)):
        above -= width
        yield i, width, width * plane, above


def _code(words, bits, planes, word):
    """The code of one plane, int32; `word` has the bits of a word set."""
    code = jnp.zeros(words[0].shape, jnp.int32)
    for i, width, at, above in _fields(bits, planes):
        part = lax.shift_right_logical(words[i].astype(jnp.int32) & word, jnp.int32(at)) & ((1 << width) - 1)
        code = code | part << above
    return code


def _float_twin(words, bits, planes, dtype, midrise):
    code = _code(words, bits, planes, 0xFFFF)
    values = 2 * code - ((1 << bits) - 1) if midrise else code - (1 << (bits - 1))
    return values.astype(dtype)


def _int8_twin(words, bits, planes):
    code = _code(words, bits, planes, 0xFF)
    return (code - 128 if bits == 8 else code).astype(jnp.int8)


def _moved(source: str, by: int) -> tuple[str, str]:
    """Code that moves a register's bits down by `by` (up if negative), and where the result is."""
    if by > 0:
        return f"shr.u32 u, {source}, {by}; ", "u"
    if by < 0:
        return f"shl.b32 u, {source}, {-by}; ", "u"
    return "", source


def _float_assembly(words, bits, planes, dtype, midrise):
    kind = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
    one, (magic, base) = _ONES[dtype.name], _BASE[dtype.name]
    pair = lambda value: f"{int(np.asarray([value] * 2, dtype).view(np.uint32)[0]):#x}"
    late = midrise and 2 << bits > base  # 2 code does not fit below the mantissa: doubled at the end instead
    last = "v" if late else "$0"
    if bits == 1 and midrise:  # the bit becomes the sign of 1
        code, source = _moved("$1", planes[0] - 15)
        text = code + f"lop3.b32 $0, {source}, 0x80008000, {one ^ 0x80008000:#x}, 0x6a; "
    elif bits == 8 and dtype == jnp.bfloat16:  # 8 bits do not fit the mantissa: 16 high + low
        high, source = _moved("$1", 8 * planes[0] + 4)
        text = high + f"lop3.b32 t, {source}, 0x000f000f, {magic:#x}, 0xea; "
        text += f"mov.b32 o, {pair(16)}; mov.b32 n, {pair(-2304)}; fma.rn.{kind} v, t, o, n; "  # 16 high - 256
        low, source = _moved("$1", 8 * planes[0])
        text += low + f"lop3.b32 t, {source}, 0x000f000f, {magic:#x}, 0xea; "
        text += f"mov.b32 o, {one:#x}; fma.rn.{kind} {last}, t, o, v; "  # + 128 + low
    else:
        text, previous, up = "", f"{magic:#x}", int(midrise and not late)  # up: the field is put where 2 code belongs
        for i, width, at, above in _fields(bits, planes):
            mask = ((1 << width) - 1) * 0x00010001 << above + up
            code, source = _moved(f"${i + 1}", at - above - up)
            text += code + f"lop3.b32 t, {source}, {mask:#x}, {previous}, 0xea; "
            previous = "t"
        zero = (1 << bits) - 1 if up else 1 << (bits - 1)
        text += f"mov.b32 o, {one:#x}; mov.b32 n, {pair(-(base + zero))}; fma.rn.{kind} {last}, t, o, n; "
    if late:  # 2 (code - 2^(b-1)) + 1 = 2 code - (2^b - 1)
        text += f"mov.b32 o, {pair(2)}; mov.b32 n, {one:#x}; fma.rn.{kind} $0, v, o, n; "
    return _inline("{ .reg .b32 t, u, v, o, n; " + text + "}", words, dtype, pack=2)


def _int8_assembly(words, bits, planes):
    text, previous = "", None
    for i, width, at, above in _fields(bits, planes):
        mask = ((1 << width) - 1) * 0x01010101 << above
        code, source = _moved(f"${i + 1}", at - above)
        if previous is None:
            text += code + f"and.b32 t, {source}, {mask:#x}; "
        else:
            text += code + f"lop3.b32 t, {source}, {mask:#x}, t, 0xea; "
        previous = "t"
    last = "xor.b32 $0, t, 0x80808080; " if bits == 8 else "mov.b32 $0, t; "
    return _inline("{ .reg .b32 t, u; " + text + last + "}", words, jnp.int8, pack=4)


def _inline(text, words, dtype, pack):
    [out] = plgpu.elementwise_inline_asm(
        text,
        args=list(words),
        constraints=",".join(["=r", *["r"] * len(words)]),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words[0].shape, dtype)],
    )
    return out
