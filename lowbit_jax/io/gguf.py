"""Packed weights as the blocks of GGUF, which llama.cpp reads.

    kind, rows = lb.io.gguf.blocks(packed)  # "Q4_0", uint8 [outputs, bytes]
    writer.add_tensor("blk.0.ffn_down.weight", rows, raw_dtype=gguf.GGMLQuantizationType[kind])  # of the package gguf

Every number is kept as it is, or nothing is made: scales are float16 in these files, so quantize with
`scale_format=lb.scaling.CastScale("float16")`. A block is 32 neighboring inputs (TQ2_0: 256) of one output.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from lowbit_jax import coding
from lowbit_jax.formats.catalogue import E2M1
from lowbit_jax.io.matrix import Integers, Matrix, Outputs, outputs_of, rounded_scales
from lowbit_jax.qtensor import QTensor
from lowbit_jax.scaling import PowerOfTwo

_WHO = "lb.io.gguf.blocks"


def _halves(codes: np.ndarray) -> np.ndarray:
    """Codes of 4 bits [..., 32] as 16 bytes: the first half in the low bits, the second above."""
    return codes[..., :16] | codes[..., 16:] << 4


def _q4_0(values: np.ndarray) -> list[np.ndarray]:
    return [_halves((values + 8).astype(np.uint8))]


def _q5_0(values: np.ndarray) -> list[np.ndarray]:
    codes = (values + 16).astype(np.uint8)
    return [np.packbits(codes >> 4, axis=-1, bitorder="little"), _halves(codes & 15)]


def _q8_0(values: np.ndarray) -> list[np.ndarray]:
    return [values.astype(np.int8).view(np.uint8)]


def _tq2_0(values: np.ndarray) -> list[np.ndarray]:
    """Two halves of 128; in each, byte i holds the elements i, i + 32, i + 64, i + 96 from the lowest bits on."""
    quarters = (values + 1).astype(np.uint8).reshape(*values.shape[:-1], 2, 4, 32)
    return [
        (quarters << np.asarray([0, 2, 4, 6], np.uint8)[:, None])
        .sum(-2, dtype=np.uint8)
        .reshape(*values.shape[:-1], 64)
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    name: str
    size: int  # inputs in a block
    low: int
    high: int
    code: Callable[[np.ndarray], list[np.ndarray]]
    scale_last: bool = False


_KINDS = (
    _Kind("TQ2_0", 256, -1, 1, _tq2_0, scale_last=True),
    _Kind("Q4_0", 32, -8, 7, _q4_0),
    _Kind("Q5_0", 32, -16, 15, _q5_0),
    _Kind("Q8_0", 32, -128, 127, _q8_0),
)


def blocks(layer: QTensor | Outputs, name: str = "the weight", *, round_scales: bool = False) -> tuple[str, np.ndarray]:
    """The smallest GGML type that holds the weight, by name, and its blocks, uint8 [outputs, bytes].

    TQ2_0 holds integers of three values, in rows of whole 256; Q4_0, Q5_0 and Q8_0 those of up to 4, 5 and 8 bits, and
    mid-rise grids of one bit less; MXFP4 that format. Axes beside the contraction are merged into outputs. name: of the
    layer, in errors. round_scales: to float16 where that changes them, instead of an error.

    Raises: ValueError for scales that float16 does not hold, and inputs or groups that are no whole blocks;
    NotImplementedError for a rotation, zero points and what no type holds; and as `QTensor.validate`."""
    outputs = outputs_of(layer)
    quantizer = outputs.packed.quantizer
    what = "has zero points" if quantizer.zero_point else ""
    what = what if quantizer.rotation is None else f"is rotated ({quantizer.rotation.describe()})"
    if what:
        raise NotImplementedError(
            f"{_WHO}: {name} {what}, for which GGUF has no place. Quantize it without, or write"
            " packed.dequantize() as floats."
        )
    matrix = Matrix.of(name, outputs, _WHO)
    if matrix.group % 32:
        raise ValueError(
            f"{_WHO}: {name} has a scale for each {matrix.group} inputs, and a block is 32. Quantize it in groups of a"
            " multiple of 32, or write packed.dequantize() as floats."
        )
    if quantizer.format == E2M1 and isinstance(quantizer.scale_format, PowerOfTwo) and matrix.group == 32:
        if quantizer.scale_format.times == 1:
            return "MXFP4", _mxfp4(matrix)
    integers = Integers.of(matrix)
    if integers is None:
        raise NotImplementedError(
            f"{_WHO}: no type of GGUF holds {name}, {quantizer.format.name}. There are such for integers of up to 8"
            " bits, mid-rise grids of up to 7, and MXFP4; write packed.dequantize() as floats."
        )
    return _of_integers(name, integers, matrix.group, round_scales)


def _mxfp4(matrix: Matrix) -> np.ndarray:
    codes = np.asarray(coding.encode(jnp.asarray(matrix.elements), E2M1)).reshape(len(matrix.elements), -1, 32)
    scales = matrix.by_output(matrix.packed.scales[0])
    return _joined([scales[..., None], _halves(codes)])


def _of_integers(name: str, integers: Integers, group: int, round_scales: bool) -> tuple[str, np.ndarray]:
    low, high = int(integers.values.min(initial=0)), int(integers.values.max(initial=0))
    rows = len(integers.values)
    kind = next(k for k in _KINDS if k.low <= low and high <= k.high and group % k.size == 0)
    values = integers.values.astype(np.int16).reshape(rows, -1, kind.size)
    scales = np.repeat(integers.scales, group // kind.size, axis=1)
    half, at = rounded_scales(scales, "float16", round_scales)
    if at is not None:
        raise ValueError(
            f"{_WHO}: the scale {scales[at]} of output {at[0]} of {name} would become {half[at]}, as GGUF keeps scales"
            " in float16, and the weights others. Quantize with scale_format=lb.scaling.CastScale('float16'), which"
            " training then computes with, or pass round_scales=True, for scales that it holds to all of its bits."
        )
    own = [half[..., None].view(np.uint8)]
    coded = kind.code(values)
    return kind.name, _joined([*coded, *own] if kind.scale_last else [*own, *coded])


def _joined(parts: list[Any]) -> np.ndarray:
    """Bytes [outputs, blocks, ...] of the parts of a block, as rows."""
    block = np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(block.reshape(len(block), -1))
