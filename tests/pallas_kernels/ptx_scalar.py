"""Runs the straight-line PTX of the Hadamard kernels in NumPy, in place of `elementwise_inline_asm`.

Unlike `tests.pallas_kernels.ptx` it has a register for each 32-bit element. The instructions are those of the PTX ISA 8
manual, sections 9.7.1 to 9.7.9; an fma has one rounding, float64 holding the product of two float32 numbers exactly."""

import re

import ml_dtypes
import numpy as np


def run(text, *, args, constraints, pack, result_shape_dtypes):
    """Drop-in for `elementwise_inline_asm`; `pack` neighbors go together, narrow ones in one register, lowest first."""
    [out] = result_shape_dtypes
    count = lambda dtype: pack * np.dtype(dtype).itemsize // 4
    outputs, inputs = count(out.dtype), []
    for a in args:
        words = np.ascontiguousarray(a).reshape(-1).view(np.uint32).reshape(-1, count(a.dtype))
        inputs += [words[:, i] for i in range(words.shape[1])]
    assert len(constraints.split(",")) == outputs + len(inputs)
    registers = {f"${outputs + i}": register for i, register in enumerate(inputs)}
    for instruction in re.sub(r"^\s*\{|\}\s*$", "", text.strip()).split(";"):
        if instruction.strip() and not instruction.strip().startswith(".reg"):
            name, rest = instruction.split(None, 1)
            target, *operands = [operand.strip() for operand in rest.split(",")]
            registers[target] = _execute(name, [_read(registers, operand) for operand in operands])
    answer = np.stack([registers[f"${i}"] for i in range(outputs)], 1)
    return [np.ascontiguousarray(answer).view(np.dtype(out.dtype)).reshape(out.shape)]


def _read(registers, name):
    if name in registers:
        return registers[name]
    return np.uint32(int(name.removeprefix("0f"), 16) if name.startswith("0f") else int(name, 0))


def _execute(name, words):
    floats = lambda: [np.asarray(w).view(np.float32) for w in words]
    bits = lambda x: np.asarray(x, np.float32).view(np.uint32)
    match name:
        case "mov.b32":
            return words[0]
        case "shl.b32":
            return words[0] << words[1]
        case "and.b32":
            return words[0] & words[1]
        case "xor.b32":
            return words[0] ^ words[1]
        case "abs.f32":
            return words[0] & np.uint32(0x7FFFFFFF)
        case "sub.f32":
            a, b = floats()
            return bits(a - b)
        case "shf.l.wrap.b32":
            return words[1] << words[2] | words[0] >> (32 - words[2])
        case "prmt.b32":
            pool = [(w >> np.uint32(8 * i)) & np.uint32(255) for w in words[:2] for i in range(4)]
            return sum(pool[int(words[2]) >> 4 * i & 7] << np.uint32(8 * i) for i in range(4))
        case "cvt.rn.bf16x2.f32":  # the first operand goes up
            up, down = [f.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32) for f in floats()]
            return up << 16 | down
    assert name in ("fma.rn.f32", "fma.rn.sat.f32"), name
    a, b, c = [f.astype(np.float64) for f in floats()]
    answer = a * b + c
    if name == "fma.rn.sat.f32":
        answer = np.where(np.isnan(answer), 0, np.clip(answer, 0, 1))
    return bits(answer)
