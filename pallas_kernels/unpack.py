"""From a plane of words to numbers: backend-neutral, each form as inline assembly for NVIDIA GPUs and as a jnp twin.

In 16-bit words a 32-bit register holds two words, in 8-bit words four. A shift and one `lop3` put the field into the
mantissa of a power of two (bfloat16 128, float16 1024), which is the number 128 + u exactly; one fused multiply-add
takes the power off: no integer-to-float conversions, which run at a fraction of the rate. The twins are what interpret
mode and other backends run, and what the assembly is tested against over all words.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.planes import FIELDS

_ONES = {"bfloat16": 0x3F803F80, "float16": 0x3C003C00}
_BASE = {"bfloat16": (0x43004300, 128), "float16": (0x64006400, 1024)}


def offset(bits: int) -> float:
    """The code that `to_float` and `to_int8` call zero: 2^(bits-1), and 1/2 for one bit, whose values are -1 and 1."""
    return 0.5 if bits == 1 else float(1 << (bits - 1))


def gain(bits: int) -> float:
    """What the values of `to_float` are multiples of a code step of: 1, and 2 for one bit."""
    return 2.0 if bits == 1 else 1.0


def to_float(
    words: list[Int[Array, "*s"]], bits: int, planes: list[int], dtype, *, assembly: bool
) -> Float[Array, "*s"]:
    """`gain (code - offset)` of one plane, exactly, in bfloat16 or float16, from 16-bit words of each field."""
    return (_float_assembly if assembly else _float_twin)(words, bits, planes, jnp.dtype(dtype))


def to_int8(words: list[Int[Array, "*s"]], bits: int, planes: list[int], *, assembly: bool) -> Int[Array, "*s"]:
    """The code of one plane as int8, from 8-bit words of each field; 8-bit codes come as code - 128."""
    return (_int8_assembly if assembly else _int8_twin)(words, bits, planes)


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
        part = lax.shift_right_logical(words[i].astype(jnp.int32) & word, at) & ((1 << width) - 1)
        code = code | part << above
    return code


def _float_twin(words, bits, planes, dtype):
    code = _code(words, bits, planes, 0xFFFF)
    values = 2 * code - 1 if bits == 1 else code - (1 << (bits - 1))
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


def _float_assembly(words, bits, planes, dtype):
    kind = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
    one, (magic, base) = _ONES[dtype.name], _BASE[dtype.name]
    pair = lambda value: f"{int(np.asarray([value] * 2, dtype).view(np.uint32)[0]):#x}"
    if bits == 1:  # the bit becomes the sign of 1
        code, source = _moved("$1", planes[0] - 15)
        text = code + f"lop3.b32 $0, {source}, 0x80008000, {one ^ 0x80008000:#x}, 0x6a; "
    elif bits == 8 and dtype == jnp.bfloat16:  # 8 bits do not fit the mantissa: 16 high + low
        high, source = _moved("$1", 8 * planes[0] + 4)
        text = high + f"lop3.b32 t, {source}, 0x000f000f, {magic:#x}, 0xea; "
        text += f"mov.b32 o, {pair(16)}; mov.b32 n, {pair(-2304)}; fma.rn.{kind} v, t, o, n; "  # 16 high - 256
        low, source = _moved("$1", 8 * planes[0])
        text += low + f"lop3.b32 t, {source}, 0x000f000f, {magic:#x}, 0xea; "
        text += f"mov.b32 o, {one:#x}; fma.rn.{kind} $0, t, o, v; "  # + 128 + low
    else:
        text, previous = "", f"{magic:#x}"
        for i, width, at, above in _fields(bits, planes):
            mask = ((1 << width) - 1) * 0x00010001 << above
            code, source = _moved(f"${i + 1}", at - above)
            text += code + f"lop3.b32 t, {source}, {mask:#x}, {previous}, 0xea; "
            previous = "t"
        text += f"mov.b32 o, {one:#x}; mov.b32 n, {pair(-(base + offset(bits)))}; fma.rn.{kind} $0, t, o, n; "
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
