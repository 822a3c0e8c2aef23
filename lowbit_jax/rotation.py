"""Orthogonal maps of the contraction axis that spread outliers before a fit, and cancel in the product.

A block Hadamard rotation is y = x blockdiag(H), H the Sylvester matrix of `block` rows over sqrt(block); with random
signs, y = x diag(d) blockdiag(H). H is symmetric and orthonormal: (xH)(wH)^T = x w^T, and H undoes itself.
Source: Ashkboos et al. 2024, arXiv:2404.00456; in training, Panferov et al. 2025, arXiv:2502.05003, section 3.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

_INNER = 16  # rows of the inner factor of the transform on a CPU


@functools.cache
def hadamard_matrix(size: int) -> np.ndarray:
    """Sylvester's matrix of +1 and -1, float32 [size, size]; `size` is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def largest_block(length: int, limit: int) -> int:
    """The largest power of two up to `limit` that divides `length` (1 for an odd length)."""
    return min(length & -length, limit) if length else 1


def _factored(x: Float[Array, "*s"], block: int, axis: int) -> Float[Array, "*s"]:
    """H_block = (H_(block/16) x I_16)(I x H_16) as two small matrix products.

    On a CPU this costs 0.4 to 0.8 of the dense product, and butterflies, which XLA fuses with their neighbors and
    repeats for each stage, cost more than both (`recipes/LOG.md`)."""
    columns = math.prod(x.shape[axis + 1 :])  # elements of one index of the axis
    inner = min(block, _INNER)
    y = _small_product(x, hadamard_matrix(inner) * np.float32(block**-0.5), columns)
    if block > inner:
        y = _small_product(y, hadamard_matrix(block // inner), inner * columns)
    return y.reshape(x.shape)


def _small_product(x: Float[Array, "*s"], matrix: np.ndarray, columns: int) -> Float[Array, "n m *columns"]:
    """The symmetric `matrix` times each group of as many rows of `columns` elements."""
    m = jnp.asarray(matrix)
    if columns == 1:
        return lax.dot(x.reshape(-1, len(matrix)), m, precision=lax.Precision.HIGHEST)
    groups = x.reshape(-1, len(matrix), columns)
    each = jnp.broadcast_to(m[None], (len(groups), *m.shape))
    return lax.dot_general(each, groups, (((2,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST)


def _dense(x: Float[Array, "*s"], block: int, axis: int) -> Float[Array, "*s"]:
    """One matrix product a block. Half-precision inputs stay so: +1 and -1 are exact, sums are float32."""
    tiles = x.reshape(*x.shape[:axis], x.shape[axis] // block, block, *x.shape[axis + 1 :])
    matrix = jnp.asarray(hadamard_matrix(block), x.dtype)
    y = lax.dot_general(
        tiles,
        matrix,
        (((axis + 1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return (jnp.moveaxis(y, -1, axis + 1) * np.float32(block**-0.5)).reshape(x.shape)


def _transform(x: Float[Array, "*s"], block: int, axis: int) -> Float[Array, "*s"]:
    if x.size == 0:
        return x.astype(jnp.float32)
    on_cpu = lambda x: _factored(x.astype(jnp.float32), block, axis)
    return lax.platform_dependent(x, cpu=on_cpu, default=lambda x: _dense(x, block, axis))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def block_hadamard(x: Float[Array, "*s"], block: int, axis: int) -> Float[Array, "*s"]:
    """x blockdiag(H) along `axis`, in float32 whatever the dtype of `x`; its gradient is the same map.

    `block` is a power of two that divides the axis."""
    return _transform(x, block, axis)


def _block_hadamard_forward(x, block, axis):
    return _transform(x, block, axis), jnp.zeros((0,), x.dtype)


def _block_hadamard_backward(block, axis, residual, g):
    return (_transform(g, block, axis).astype(residual.dtype),)


block_hadamard.defvjp(_block_hadamard_forward, _block_hadamard_backward)


@dataclasses.dataclass(frozen=True, slots=True)
class Hadamard:
    """Block Hadamard rotation of the contraction axis.

    A length that `block` does not divide gets the largest power of two that does (1: no rotation), which
    `lb.explain` reports; nothing is padded. `signs`, a seed, flips fixed random signs first.
    Raises: ValueError unless `block` is a power of two."""

    block: int = 128
    signs: int | None = None

    def __post_init__(self):
        if self.block < 1 or self.block & (self.block - 1):
            raise ValueError(f"Hadamard(block={self.block}): a Sylvester matrix has 2^n rows. Use 32, 64, 128, 256 ...")

    def block_for(self, length: int) -> int:
        """The block that an axis of this length gets."""
        return largest_block(length, self.block)

    def _flip(self, x: Float[Array, "*s"], axis: int) -> Float[Array, "*s"]:
        if self.signs is None:
            return x
        signs = np.random.default_rng(self.signs).integers(0, 2, x.shape[axis]) * 2 - 1
        return x * jnp.asarray(signs, x.dtype).reshape([-1 if a == axis else 1 for a in range(x.ndim)])

    def apply(self, x: Float[Array, "*s"], axis: int = -1) -> Float[Array, "*s"]:
        """The rotated array, float32."""
        axis %= x.ndim
        block = self.block_for(x.shape[axis])
        x = self._flip(x, axis)
        return x.astype(jnp.float32) if block == 1 else block_hadamard(x, block, axis)

    def undo(self, y: Float[Array, "*s"], axis: int = -1) -> Float[Array, "*s"]:
        """The array that `apply` rotated, float32."""
        axis %= y.ndim
        block = self.block_for(y.shape[axis])
        return self._flip(y.astype(jnp.float32) if block == 1 else block_hadamard(y, block, axis), axis)

    def describe(self, length: int | None = None) -> str:
        block = self.block if length is None else self.block_for(length)
        signs = "" if self.signs is None else f" signs {self.signs}"
        if length is not None and block != self.block:
            return f"hadamard {block} ({self.block} does not divide {length}){signs}"
        return f"hadamard {block}{signs}"
