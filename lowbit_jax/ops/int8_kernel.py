"""Grid values as int8 on GPUs: products by the kernel that QuEST's training products use, scales and offsets inside it.

QuEST's own quantizer has a fused kernel too (`ops.integer_product`); what comes here was quantized by XLA.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, Int8

from lowbit_jax.formats.base import Format
from lowbit_jax.ops import backend
from lowbit_jax.ops.int8 import decode, encode, fits_int32, grid, holds, known_grid

__all__ = ["FEWEST", "computes", "decode", "encode", "holds", "multiplies", "product", "scaled_matrix"]

FEWEST = 128  # rows and columns; the kernel was measured on thousands


def multiplies(lhs: tuple[int, ...], rhs: tuple[int, ...], formats: tuple[Format, Format], numbers: tuple) -> bool:
    """Whether the kernel computes products of these shapes, on the GPU traced for."""
    return computes(lhs, rhs, formats, numbers) and backend.takes_kernel()


def computes(lhs: tuple[int, ...], rhs: tuple[int, ...], formats: tuple[Format, Format], numbers: tuple) -> bool:
    """Whether it would where a GPU is."""
    (lhs_axes, _), (lhs_batch, _) = numbers
    if any(grid(fmt) is None for fmt in formats) or lhs_batch:
        return False
    if any(map(export.is_symbolic_dim, [*lhs, *rhs])):
        return False  # `jax.export` of a batch of any size: kernels are made for one
    length = math.prod(lhs[a] for a in lhs_axes)
    rows, columns = math.prod(lhs) // max(1, length), math.prod(rhs) // max(1, length)
    sizes = rows * length, columns * length, rows * columns
    return (
        min(rows, columns) >= FEWEST
        and length <= backend.LONGEST_INT8
        and max(sizes) <= backend.MOST_ELEMENTS
        and fits_int32(length, formats)
    )


def product(
    lhs: Int8[Array, "*lhs"], rhs: Int8[Array, "*rhs"], formats: tuple[Format, Format], numbers: tuple, precision: Any
) -> Float[Array, "*out"]:
    """`lax.dot_general` of the grid values that these integers stand for, float32."""
    del precision  # exact sums
    (lhs_axes, rhs_axes), _ = numbers
    free = [n for x, axes in ((lhs, lhs_axes), (rhs, rhs_axes)) for a, n in enumerate(x.shape) if a not in axes]
    one = jnp.ones((), jnp.float32)
    return scaled_matrix((lhs, one), (rhs, one), formats, numbers, jnp.float32).reshape(free)


def scaled_matrix(
    lhs: tuple[Int8[Array, "*lhs"], Float[Array, "..."]],
    rhs: tuple[Int8[Array, "*rhs"], Float[Array, "..."]],
    formats: tuple[Format, Format],
    numbers: tuple,
    out_dtype: Any,
    implementation: str = "auto",
) -> Float[Array, "m n"]:
    """The product as a matrix of all free axes of lhs and of rhs. Each side: integers, and scales that broadcast
    against them with one entry along the contraction.

    Raises: NotImplementedError when "kernel" is asked for and cannot run."""
    axes, _ = numbers
    (x, x_scales, x_offset), (w, w_scales, w_offset) = (
        (_rows(codes, along), _each(scale, codes.shape, along) * step, offset)
        for (codes, scale), along, (step, offset) in zip((lhs, rhs), axes, map(known_grid, formats), strict=True)
    )
    sums = lambda codes, needed: jnp.sum(codes.astype(jnp.int32), axis=1) if needed else None
    operands = x, w, x_scales, w_scales, sums(x, w_offset), sums(w, x_offset)
    kernel = functools.partial(backend.matmul_i8, x_offset=x_offset, w_offset=w_offset, out_dtype=out_dtype)
    return backend.choose(
        kernel, functools.partial(kernel, "xla"), *operands, implementation=implementation, why_not=None,
        who="lb.dot_general",
    )  # fmt: skip


def _rows(x: Array, axes: tuple[int, ...]) -> Int8[Array, "rows length"]:
    """The array as a matrix with its contraction last, as the kernel reads both operands."""
    last = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    return last.reshape(-1, math.prod(x.shape[a] for a in axes))


def _each(scale: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Float[Array, "rows"]:
    return jnp.broadcast_to(scale, [1 if a in axes else n for a, n in enumerate(shape)]).reshape(-1)
