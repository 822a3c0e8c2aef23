"""Grid values as int8, and their products with exact sums, where XLA's are faster than float32 ones: on x86 CPUs.

On such a CPU with AMX (JAX 0.10 and 0.12) they took a fifth to a quarter of the time (`benchmarks.int8_products`), on
an older one as long (`recipes/LOG.md`). Other platforms were not measured and do without.
"""

import functools
import math
import platform
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jaxtyping import Array, Float, Int8, Int32

from lowbit_jax.formats.base import Format
from lowbit_jax.ops import backend
from lowbit_jax.ops.coder import leaves_the_sum
from lowbit_jax.quantizer import Quantizer

_LARGEST_SUM = 2**31 - 1  # of int32
_SHORTEST = 64  # terms of a sum, for which int8 was faster than float32


@functools.cache
def grid(fmt: Format) -> tuple[float, float] | None:
    """(step, offset) that put every level of the format at step * (integer + offset), the integer an int8; else None.

    The offset is 0 where it can be: mid-rise levels up to 7 bits are odd integers times 1/2, those of 8 bits integers
    and 1/2."""
    for step, offset in ((1.0, 0.0), (0.5, 0.0), (0.25, 0.0), (0.125, 0.0), (1.0, 0.5)):
        found = [level / step - offset for level in fmt.levels]
        if all(n.is_integer() and -128 <= n <= 127 for n in found):
            return step, offset
    return None


def known_grid(fmt: Format) -> tuple[float, float]:
    """`grid` of a format that has one."""
    found = grid(fmt)
    assert found is not None, fmt
    return found


def holds(quantizer: Quantizer | None, rotated: bool) -> bool:
    """Whether what this quantizer makes is int8 times a scale that leaves the sum. A learned scale stays finite where
    an element is NaN, which int8 cannot say."""
    if quantizer is None or quantizer.learned or (fmt := quantizer.element_format) is None:
        return False
    if (found := grid(fmt)) is None:
        return False
    return leaves_the_sum(quantizer, rotated) and (quantizer.sparsity is None or found[1] == 0)


def _largest(fmt: Format) -> int:
    """The largest magnitude of its integers."""
    step, offset = known_grid(fmt)
    return int(max(abs(level / step - offset) for level in fmt.levels))


def fits_int32(length: int, formats: tuple[Format, Format]) -> bool:
    """Whether no sum of so many products of their integers overflows int32."""
    return length * math.prod(map(_largest, formats)) <= _LARGEST_SUM


def multiplies(lhs: tuple[int, ...], rhs: tuple[int, ...], formats: tuple[Format, Format], numbers: tuple) -> bool:
    """Whether `product` of arrays of these shapes is possible, and faster here than in float32: not for short sums,
    nor for one column, which XLA multiplies by in plain loops."""
    (lhs_axes, rhs_axes), (_, rhs_batch) = numbers
    if platform.machine().lower() not in ("x86_64", "amd64") or backend.platform() != "cpu":
        return False
    if any(grid(fmt) is None for fmt in formats) or not math.prod(lhs) * math.prod(rhs):
        return False
    length = math.prod(lhs[a] for a in lhs_axes)
    columns = math.prod(n for a, n in enumerate(rhs) if a not in (*rhs_axes, *rhs_batch))
    if export.is_symbolic_dim(length) or export.is_symbolic_dim(columns):
        return False  # `jax.export` of a batch of any size: neither known to be long enough nor to stay inside int32
    turns = lhs_axes[-1] == len(lhs) - 1 or len(lhs_axes) > 1 or length % 2 == 0  # see `_dot`
    return columns > 1 and length >= _SHORTEST and turns and fits_int32(length, formats)


def encode(values: Float[Array, "*s"], fmt: Format) -> Int8[Array, "*s"]:
    """The integers of grid values."""
    step, offset = known_grid(fmt)
    if step != 1:
        values = lax.mul(values, np.asarray(1 / step, values.dtype))
    if offset:
        values = lax.sub(values, np.asarray(offset, values.dtype))
    return lax.convert_element_type(values, jnp.int8)


def decode(codes: Int8[Array, "*s"], fmt: Format) -> Float[Array, "*s"]:
    """The grid values, float32."""
    step, offset = known_grid(fmt)
    values = lax.convert_element_type(codes, jnp.float32)
    if offset:
        values = lax.add(values, np.float32(offset))
    return lax.mul(values, np.float32(step)) if step != 1 else values


def product(
    lhs: Int8[Array, "*lhs"], rhs: Int8[Array, "*rhs"], formats: tuple[Format, Format], numbers: tuple, precision: Any
) -> Float[Array, "*out"]:
    """`lax.dot_general` of the grid values that these integers stand for: an exact sum of integers, whatever the
    precision, rounded to float32; an offset adds one or two sums to it there."""
    del precision
    (lhs_axes, rhs_axes), batch = numbers
    (lhs_step, lhs_offset), (rhs_step, rhs_offset) = map(known_grid, formats)
    y = lax.convert_element_type(_dot(lhs, rhs, numbers), jnp.float32)
    first, rows = len(batch[0]), lhs.ndim - len(lhs_axes)
    if rhs_offset:
        sums = _sums(lhs, lhs_axes, batch[0]) * rhs_offset
        y = lax.add(y, lax.broadcast_in_dim(sums, y.shape, range(rows)))
    if lhs_offset:
        length = math.prod(rhs.shape[a] for a in rhs_axes)
        sums = _sums(rhs, rhs_axes, batch[1]) * lhs_offset + length * lhs_offset * rhs_offset
        y = lax.add(y, lax.broadcast_in_dim(sums, y.shape, [*range(first), *range(rows, y.ndim)]))
    step = np.float32(lhs_step * rhs_step)
    return lax.mul(y, step) if step != 1 else y


def _dot(lhs: Int8[Array, "*lhs"], rhs: Int8[Array, "*rhs"], numbers: tuple) -> Int32[Array, "*out"]:
    """XLA's CPU compiler finds its fast product only where the contraction is last in lhs, and loses it again where it
    folds the transposition of a matrix into the product; one with the contraction in two halves stays. It multiplies
    one row by plain loops, so a row goes twice (under `jax.vmap` every example's)."""
    (lhs_axes, rhs_axes), (lhs_batch, rhs_batch) = numbers
    if len(lhs_axes) == 1 and lhs_axes[0] != lhs.ndim - 1:
        assert lhs.shape[lhs_axes[0]] % 2 == 0, "`multiplies` says no"
        lhs, lhs_axes, lhs_batch = _halved(lhs, lhs_axes[0], lhs_batch)
        rhs, rhs_axes, rhs_batch = _halved(rhs, rhs_axes[0], rhs_batch)
    order = [*(a for a in range(lhs.ndim) if a not in lhs_axes), *lhs_axes]
    if order != list(range(lhs.ndim)):
        lhs = lax.optimization_barrier(lax.transpose(lhs, order))
        lhs_axes, lhs_batch = (tuple(order.index(a) for a in axes) for axes in (lhs_axes, lhs_batch))
    one_row = math.prod(lhs.shape) == math.prod(lhs.shape[a] for a in (*lhs_axes, *lhs_batch))
    if one_row:
        lhs = lax.optimization_barrier(lax.broadcast(lhs, (2,)))
        lhs_axes, lhs_batch = (tuple(a + 1 for a in axes) for axes in (lhs_axes, lhs_batch))
    numbers = (lhs_axes, rhs_axes), (lhs_batch, rhs_batch)
    y = lax.dot_general(lhs, rhs, numbers, preferred_element_type=jnp.int32)
    return lax.index_in_dim(y, 0, axis=len(lhs_batch), keepdims=False) if one_row else y


def _halved(x: Array, axis: int, batch: tuple[int, ...]) -> tuple[Array, tuple[int, int], tuple[int, ...]]:
    """The array with an axis in two halves, the axes of those, and where the batch axes lie then."""
    shape = (*x.shape[:axis], 2, x.shape[axis] // 2, *x.shape[axis + 1 :])
    return x.reshape(shape), (axis, axis + 1), tuple(a + (a > axis) for a in batch)


def _sums(integers: Int8[Array, "*s"], axes: tuple[int, ...], batch: tuple[int, ...]) -> Float[Array, "*s"]:
    """Sums along axes, with the batch axes first: a product with ones, where XLA's sum would take four bytes each."""
    shape = [integers.shape[a] for a in (*batch, *axes)]
    ones = jnp.ones(shape, jnp.int8)
    numbers = (tuple(range(len(batch), len(shape))), axes), (tuple(range(len(batch))), batch)
    return lax.convert_element_type(_dot(ones, integers, numbers), jnp.float32)
