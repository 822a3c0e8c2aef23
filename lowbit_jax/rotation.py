"""Orthogonal maps of the contraction axis that spread outliers before a fit, and cancel in the product.

A block Hadamard rotation is y = x blockdiag(H), H the Sylvester matrix of `block` rows over sqrt(block); with random
signs, y = x diag(d) blockdiag(H). H is symmetric and orthonormal: (xH)(wH)^T = x w^T, and H undoes itself.
Source: Ashkboos et al. 2024, arXiv:2404.00456; in training, Panferov et al. 2025, arXiv:2502.05003, section 3.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from lowbit_jax.formats.base import settle_integers
from lowbit_jax.rounding import check_key
from lowbit_jax.scaling.tiling import normalized_axes


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


@functools.cache
def _factor(block: int, dtype: np.dtype) -> np.ndarray:
    """The matrix that `_transform` multiplies by; one object a block and dtype, which a program holds once."""
    matrix = hadamard_matrix(block)
    return matrix * np.float32(block**-0.5) if dtype == np.float32 else matrix.astype(dtype)


def _transform(x: Float[Array, "*s"], block: int, axis: int) -> Float[Array, "*s"]:
    """One matrix product with the matrix of +1 and -1, exact in half precision too; sums are float32.

    Dense on purpose: factored forms (butterflies, two small products) save arithmetic but cost XLA more kernels to
    compile than they save (`recipes/LOG.md`). The reshapes keep every other axis, and so its sharding."""
    if x.size == 0:
        return x.astype(jnp.float32)
    half = x.dtype in (jnp.bfloat16, jnp.float16)
    norm = np.float32(block**-0.5)
    matrix = _factor(block, np.dtype(x.dtype if half else np.float32))
    tiles = lax.reshape(x, (*x.shape[:axis], x.shape[axis] // block, block, *x.shape[axis + 1 :]))
    tiles = lax.convert_element_type(tiles, matrix.dtype)
    kind = {"precision": lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    if math.prod(x.shape[axis + 1 :]) >= block:
        batch = tuple(range(axis + 1))
        each = lax.broadcast(matrix, tiles.shape[: axis + 1])
        y = lax.dot_general(each, tiles, (((axis + 2,), (axis + 1,)), (batch, batch)), **kind)
    else:
        y = lax.dot_general(tiles, matrix, (((axis + 1,), (0,)), ((), ())), **kind)
        if axis + 1 < x.ndim:
            y = jnp.moveaxis(y, -1, axis + 1)
    y = lax.reshape(y, x.shape)
    return lax.mul(y, norm) if half else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def block_hadamard(x: Float[Array, "*s"], block: int, axis: int) -> Float[Array, "*s"]:
    """x blockdiag(H) along `axis`, in float32 whatever the dtype of `x`; its gradient is the same map.

    `block` is a power of two that divides the axis."""
    return _transform(x, block, axis)


def _block_hadamard_forward(x, block, axis):
    return _transform(x, block, axis), np.zeros((0,), x.dtype)


def _block_hadamard_backward(block, axis, residual, g):
    return (_transform(g, block, axis).astype(residual.dtype),)


block_hadamard.defvjp(_block_hadamard_forward, _block_hadamard_backward)


def _drawn_signs(key: Array | None, length: int) -> Int[Array, "length"]:
    if key is None:
        raise ValueError(
            "Hadamard(signs='fresh') got no key. It draws its signs from one: pass key=jax.random.key(...), or fix them"
            " by a seed, as in Hadamard(signs=0)."
        )
    check_key("Hadamard(signs='fresh')", key)
    bits = jax.random.bits(key, (length,), jnp.uint32)  # alike with 64 bits enabled, as jax.random.rademacher is not
    return 1 - 2 * lax.shift_right_logical(bits, np.uint32(31)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class Hadamard:
    """Block Hadamard rotation of the contraction axis.

    A length that `block` does not divide gets the largest power of two that does (1: no rotation), which
    `lb.explain` reports; nothing is padded. `signs`, a seed, flips fixed random signs first; "fresh" draws them anew
    from a `key`, the same for both operands of a product (`lb.dot_general`). A coefficient is up to sqrt(block) times
    the largest element, so magnitudes within that factor of the largest float32 overflow.
    Raises: ValueError unless `block` is a power of two, and for negative signs and another word; TypeError for other
    things than integers."""

    block: int = 128
    signs: int | Literal["fresh"] | None = None

    def __post_init__(self):
        if isinstance(self.signs, str) and not self.fresh:
            raise ValueError(f"Hadamard(signs={self.signs!r}): give a seed, 'fresh', or None for no signs.")
        settle_integers(self, "block", *([] if self.signs is None or self.fresh else ["signs"]))
        if isinstance(self.signs, int) and self.signs < 0:
            raise ValueError(
                f"Hadamard(signs={self.signs}): a seed is 0 or positive. Pass None for no signs, or 'fresh' for others"
                " in every product."
            )
        if self.block < 1 or self.block & (self.block - 1):
            raise ValueError(f"Hadamard(block={self.block}): a Sylvester matrix has 2^n rows. Use 32, 64, 128, 256 ...")

    @property
    def fresh(self) -> bool:
        """Whether the signs are drawn from a key."""
        return self.signs == "fresh"

    def block_for(self, length: int) -> int:
        """The block that an axis of this length gets."""
        return largest_block(length, self.block)

    def _flip(self, x: Float[Array, "*s"], axis: int, key: Array | None) -> Float[Array, "*s"]:
        if self.signs is None:
            return x
        if self.signs == "fresh":
            signs = _drawn_signs(key, x.shape[axis])
        else:
            signs = np.random.default_rng(self.signs).integers(0, 2, x.shape[axis]) * 2 - 1
        return x * jnp.asarray(signs, x.dtype).reshape([-1 if a == axis else 1 for a in range(x.ndim)])

    def apply(
        self, x: Float[Array, "*s"], axis: int = -1, *, key: Array | None = None, with_gradient: bool = True
    ) -> Float[Array, "*s"]:
        """The rotated array, float32. key: of fresh signs, which depend on it and the length of the axis alone; others
        do not read it. `with_gradient=False` for code that has a gradient rule of its own: the same values, in less
        time to trace.
        Raises: ValueError for fresh signs without a key."""
        (axis,) = normalized_axes(axis, x.ndim, "Hadamard")
        return self._blocks(self._flip(x, axis, key), axis, with_gradient)

    def undo(
        self, y: Float[Array, "*s"], axis: int = -1, *, key: Array | None = None, with_gradient: bool = True
    ) -> Float[Array, "*s"]:
        """The array that `apply`, with the same key, rotated, float32; since the map is orthogonal, also its
        transpose."""
        (axis,) = normalized_axes(axis, y.ndim, "Hadamard")
        return self._flip(self._blocks(y, axis, with_gradient), axis, key)

    def _blocks(self, x: Float[Array, "*s"], axis: int, with_gradient: bool) -> Float[Array, "*s"]:
        block = self.block_for(x.shape[axis])
        if block == 1:
            return x.astype(jnp.float32)
        return block_hadamard(x, block, axis) if with_gradient else _transform(x, block, axis)

    def describe(self, length: int | None = None) -> str:
        block = self.block if length is None else self.block_for(length)
        signs = "" if self.signs is None else f" signs {self.signs}"
        if length is not None and block != self.block:
            return f"hadamard {block} ({self.block} does not divide {length}){signs}"
        return f"hadamard {block}{signs}"
