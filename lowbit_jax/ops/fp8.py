"""Grid values of E4M3 and E5M2 as the FP8 dtypes of XLA, which multiplies them on the FP8 tensor cores of GPUs.

Those are of compute capability 8.9 and later. Which kernel runs, its own (Triton) or cuBLASLt's, XLA's tuning says, and
whether the operands are quantized before it, to one byte an element, or in it. Scales of a tensor go into it; those of
rows take a pass over its result.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array, Float

from lowbit_jax.formats.base import Format
from lowbit_jax.formats.catalogue import E4M3, E5M2
from lowbit_jax.ops import backend
from lowbit_jax.ops.coder import leaves_the_sum
from lowbit_jax.quantizer import Quantizer

_DTYPES: dict[Format | None, Any] = {E4M3: jnp.float8_e4m3fn, E5M2: jnp.float8_e5m2}
_ALIGNED = 16  # bytes that cuBLASLt asks of each row; smaller products gain nothing


def holds(quantizer: Quantizer | None, rotated: bool) -> bool:
    """Whether this quantizer makes E4M3 or E5M2 times a scale that leaves the sum."""
    if quantizer is None or quantizer.learned or quantizer.element_format not in _DTYPES:
        return False
    return leaves_the_sum(quantizer, rotated)


def multiplies(lhs: tuple[int, ...], rhs: tuple[int, ...], formats: tuple[Format, Format], numbers: tuple) -> bool:
    """Whether the GPU traced for has FP8 tensor cores, which multiply E5M2 by E4M3 only, and all three sizes of each
    product are whole 16s."""
    if any(fmt not in _DTYPES for fmt in formats) or formats == (E5M2, E5M2) or not backend.has_fp8():
        return False
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = numbers
    left = lambda shape, axes: [n for a, n in enumerate(shape) if a not in axes]
    sizes = [
        math.prod(lhs[a] for a in lhs_axes),
        math.prod(left(lhs, (*lhs_axes, *lhs_batch))),
        math.prod(left(rhs, (*rhs_axes, *rhs_batch))),
    ]
    if any(map(export.is_symbolic_dim, [*lhs, *rhs])):
        return False  # `jax.export` of a batch of any size
    return math.prod(lhs) * math.prod(rhs) > 0 and not any(size % _ALIGNED for size in sizes)


def encode(values: Float[Array, "*s"], fmt: Format) -> Array:
    return lax.convert_element_type(values, _DTYPES[fmt])


def decode(codes: Array, fmt: Format) -> Float[Array, "*s"]:
    return lax.convert_element_type(codes, jnp.float32)


def product(
    lhs: Array, rhs: Array, formats: tuple[Format, Format], numbers: tuple, precision: Any
) -> Float[Array, "*out"]:
    """XLA's product. Hopper's FP8 tensor cores add with fewer bits than float32 has, so parts of the sum are added in
    float32 unless `precision` says "default" (Transformer Engine: split accumulator)."""
    precision = lax.Precision.HIGHEST if precision is None else precision
    return lax.dot_general(lhs, rhs, numbers, precision, jnp.float32)
