"""What can be seen in a program in PTX, before it is assembled."""

import re

_FLOAT_RESULT = re.compile(r"\b(?:add|sub|mul|fma|min|max|neg|abs|rcp|div|ex2)[.\w]*\.f32\s+(%\w+)")
_BYTE_STORE = re.compile(r"\bst\.[.\w:]*\.[bus]8\s+\[[^]]*\],\s*\{?\s*(%\w+)")


def float_bytes(ptx: str) -> int:
    """How many stores of one byte take it from the register of a float32.

    The assembler of CUDA 12.8 to 13.0 takes such a store for a conversion: where the lowest byte of 12582913.0 belongs,
    it writes 255 (seen on an H200; `F2IP.U8.F32` in the machine code). That of CUDA 13.1 stores the byte."""
    floats = set(_FLOAT_RESULT.findall(ptx))
    return sum(register in floats for register in _BYTE_STORE.findall(ptx))
