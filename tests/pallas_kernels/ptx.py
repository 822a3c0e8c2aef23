"""Runs the straight-line PTX of `pallas_kernels.unpack` in NumPy, in place of `elementwise_inline_asm`.

The instructions are those of the PTX ISA 8 manual, section 9.7: shifts, and, xor, lop3 with its truth table, packed
fma."""

import re

import ml_dtypes
import numpy as np

_HALF = {"bf16x2": ml_dtypes.bfloat16, "f16x2": np.float16}


def run(text, *, args, constraints, pack, result_shape_dtypes):
    """Drop-in for `elementwise_inline_asm` on NumPy arrays; `pack` elements share a 32-bit register, the first
    lowest."""
    [out] = result_shape_dtypes
    assert constraints == ",".join(["=r", *["r"] * len(args)])
    registers = {f"${i + 1}": np.ascontiguousarray(a).view(np.uint32) for i, a in enumerate(args)}
    assert all(32 == pack * 8 * a.dtype.itemsize for a in args)
    read = lambda name: registers[name] if name in registers else np.uint32(int(name, 0) & 0xFFFFFFFF)
    for instruction in re.sub(r"^\s*\{|\}\s*$", "", text.strip()).split(";"):
        if not instruction.strip() or instruction.strip().startswith(".reg"):
            continue
        name, rest = instruction.split(None, 1)
        target, *operands = [operand.strip() for operand in rest.split(",")]
        registers[target] = _execute(name, operands, read)
    answer = np.broadcast_to(registers["$0"], registers["$1"].shape).copy()
    return [answer.view(np.dtype(out.dtype)).reshape(out.shape)]


def _execute(name, operands, read):
    values = [read(o) for o in operands]
    match name:
        case "mov.b32":
            return values[0]
        case "shr.u32":
            return values[0] >> values[1]
        case "shl.b32":
            return values[0] << values[1]
        case "and.b32":
            return values[0] & values[1]
        case "xor.b32":
            return values[0] ^ values[1]
        case "lop3.b32":
            a, b, c, table = *values[:3], int(operands[3], 0)
            answer = np.uint32(0)
            for i in range(8):
                if table >> i & 1:
                    answer = answer | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            return answer
    assert name.startswith("fma.rn."), name
    kind = _HALF[name.removeprefix("fma.rn.")]
    answer = np.uint32(0)
    for at in (np.uint32(0), np.uint32(16)):
        a, b, c = [((v >> at) & np.uint32(0xFFFF)).astype(np.uint16).view(kind).astype(np.float64) for v in values]
        bits = np.asarray((a * b + c).astype(np.float32), np.float32).astype(kind).view(np.uint16)
        answer = answer | bits.astype(np.uint32) << at
    return answer
