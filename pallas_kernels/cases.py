"""What the report compiles and the tests assert on: each kernel at the sizes it is for, with the instruction it must
use.

A case is (name, function, argument shapes, {chip: start of the tensor-core instruction that must appear, or None})."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import planes
from pallas_kernels.hadamard import CHUNK
from pallas_kernels.hadamard_backward import hadamard_backward
from pallas_kernels.hadamard_quantize import MASK_BLOCK, hadamard_quantize
from pallas_kernels.launch import Tile
from pallas_kernels.matmul_a8 import default_tile, matmul_a8
from pallas_kernels.matmul_a16 import matmul_a16

Case = tuple[str, Callable, tuple[Any, ...], Mapping[str, str | None]]
N = K = 4096
FLOAT = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC"}
SMALL = {
    "sm_80": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HMMA",
    "sm_100": "HMMA",
}  # fewer rows than a warp group's product takes
INTEGER = {"sm_80": "IMMA", "sm_89": "IMMA", "sm_90": "IGMMA", "sm_100": "UTCIMMA"}
SMALL_INTEGER = {chip: "IMMA" for chip in INTEGER}
MANY_ROWS = ((128, jnp.bfloat16), (32, jnp.bfloat16), (None, jnp.float16), (32, jnp.float16))  # spread over the widths
_shape = jax.ShapeDtypeStruct


def _a16(x, scales, *words, bits, group):
    return matmul_a16(x, words, scales, bits=bits, group=group)


def _zeros_a16(x, scales, zeros, *words, bits, group):
    return matmul_a16(x, words, scales, zeros, bits=bits, group=group)


def _a8(x, x_scales, w_scales, *words, bits):
    tile = default_tile(x.shape[0], N, K, bits)  # of the kernel itself: on Hopper many rows unpack first without one
    return matmul_a8(x, x_scales, words, w_scales, bits=bits, tile=tile)


def _words(bits: int, word_bits: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    dtype = jnp.int16 if word_bits == 16 else jnp.int8
    return tuple(_shape(shape, dtype) for shape in planes.word_shapes(N, K, bits, word_bits))


def a16_case(bits: int, m: int = 16, group: int | None = 128, dtype=jnp.bfloat16) -> Case:
    groups = 1 if group is None else K // group
    name = f"w{bits}a16 {jnp.dtype(dtype).name} m{m} {'channel' if group is None else f'group{group}'}"
    arguments = (_shape((m, K), dtype), _shape((groups, N), jnp.float32), *_words(bits, 16))
    small = m <= 8 or m <= 16 and bits in (4, 8)  # those run in two warps
    return name, functools.partial(_a16, bits=bits, group=group), arguments, SMALL if small else FLOAT


def zeros_case(bits: int, m: int, group: int = 128) -> Case:
    name, _, (x, scales, *words), expected = a16_case(bits, m, group)
    return f"{name} zeros", functools.partial(_zeros_a16, bits=bits, group=group), (x, scales, scales, *words), expected


def a8_case(bits: int, m: int = 16) -> Case:
    sides = (_shape((m, K), jnp.int8), _shape((m,), jnp.float32), _shape((N,), jnp.float32))
    return (
        f"w{bits}a8 m{m}",
        functools.partial(_a8, bits=bits),
        (*sides, *_words(bits, 8)),
        SMALL_INTEGER if m <= 16 else INTEGER,
    )


def quantize_case(bits: int, m: int = 4096, axis: int = 1, dtype=jnp.bfloat16, packed: bool = False) -> Case:
    run = functools.partial(
        hadamard_quantize, bits=bits, alpha=0.3, trust=float(1 << (bits - 1)), axis=axis, packed=packed
    )
    shape = (m, K) if axis == 1 else (K, m)
    expected = SMALL if axis == 1 else FLOAT  # programs of 16 pieces: more of them run at once
    name = f"hadamard_quantize{bits} {jnp.dtype(dtype).name} m{m} axis{axis}" + (" packed" if packed else "")
    return name, run, (_shape(shape, dtype),), expected


def backward_case(axis: int = 1) -> Case:
    arguments = (_shape((N, K), jnp.bfloat16), _shape((K // MASK_BLOCK, N, planes.COLUMNS), jnp.int8))
    return f"hadamard_backward axis{axis}", functools.partial(hadamard_backward, axis=axis), arguments, FLOAT


def whole_rows(case: Case, *chips: str) -> Case:
    """The case of a rotation by its kernel for tiles of 128 columns, on these chips."""
    name, run, arguments, _ = case
    tile = Tile(rows=64, columns=CHUNK, warps=4, stages=2, split=4)
    return f"{name} whole", functools.partial(run, tile=tile), arguments, {chip: FLOAT[chip] for chip in chips}


def all_cases() -> list[Case]:
    """Every kernel: each width where the code differs by width."""
    found = [a16_case(bits) for bits in range(1, 9)]
    found += [
        a16_case(4, group=None),
        a16_case(4, dtype=jnp.float16),
        a16_case(6, group=32),
        a16_case(3, m=1, group=32),
        zeros_case(3, 1),
        zeros_case(4, 1),
        zeros_case(4, 16),
        zeros_case(8, 16),
        zeros_case(4, 64),
    ]
    rows = [(bits, 64 if bits % 2 else 256) for bits in range(1, 9)] + [(7, 256)]
    found += [a16_case(bits, m, *MANY_ROWS[(bits + m // 256) % 4]) for bits, m in rows]
    found += [a8_case(bits) for bits in range(1, 9)] + [
        a8_case(2, m=1),
        a8_case(7, m=1),
        a8_case(7, m=64),
        a8_case(4, m=4096),
        a8_case(8, m=4096),
    ]
    found += [quantize_case(4), quantize_case(8), quantize_case(1, m=16), quantize_case(4, axis=0, dtype=jnp.float32)]
    found += [quantize_case(4, packed=True), quantize_case(4, axis=0, dtype=jnp.float32, packed=True)]
    found += [quantize_case(1, packed=True), backward_case(), backward_case(axis=0)]
    every, newer = ("sm_80", "sm_90", "sm_100"), ("sm_90", "sm_100")
    found += [whole_rows(case, *every) for case in (quantize_case(4, packed=True), quantize_case(8),
                                                    backward_case(), backward_case(axis=0))]  # fmt: skip
    found += [whole_rows(quantize_case(4, dtype=jnp.float32, packed=True), *newer)]
    for module in ("matmul_i8", "matmul_fp8", "matmul_mx", "block_scaled", "stochastic", "both_ways"):
        if importlib.util.find_spec(f"pallas_kernels.{module}"):
            found += importlib.import_module(f"pallas_kernels.{module}").cases()
    return found
