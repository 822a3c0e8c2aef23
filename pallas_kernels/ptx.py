"""What can be seen in a program in PTX, before it is assembled."""

import re

_FLOAT_RESULT = re.compile(r"\b(?:add|sub|mul|fma|min|max|neg|abs|rcp|rsqrt|sqrt|div|ex2)[.\w]*\.f32\s+(%\w+)")
_MOVE = re.compile(r"\b(?:mov\.b32|cvt\.u16\.u32)\s+(%\w+),\s*(%\w+);")
_BYTE_STORE = re.compile(r"\bst\.[.\w:]*\.[bus]8\s+\[[^]]*\],\s*([^;]*);")


def float_bytes(ptx: str) -> int:
    """How many bytes are stored from the register of a float32, or from a copy of it.

    The assembler of CUDA 12.8 to 13.0 takes such a store for a conversion: where the lowest byte of 12582913.0 belongs,
    it writes 255 (seen on an H200; `F2IP.U8.F32` in the machine code). That of CUDA 13.1 stores the byte."""
    floats = set(_FLOAT_RESULT.findall(ptx))
    floats |= {to for to, source in _MOVE.findall(ptx) if source in floats}
    return sum(register in floats for stored in _BYTE_STORE.findall(ptx) for register in re.findall(r"%\w+", stored))
