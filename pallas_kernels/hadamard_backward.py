"""The way back of `hadamard_quantize` for gradients: dx = (g masked) blockdiag(H), from the packed mask.

H is symmetric and orthonormal, so the transpose of the rotation is the rotation. Each plane of 32 columns is masked by
one bit of the same words and meets its 32 rows of H.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import launch, planes
from pallas_kernels.checks import MATRIX_DTYPES, NoKernel, check_matrix, check_shape, fail
from pallas_kernels.hadamard_quantize import CHUNK, MASK_BLOCK, signed_hadamard
from pallas_kernels.launch import Tile


def hadamard_backward(
    g: Float[Array, "m k"],
    mask: Int[Array, "blocks m 32"],
    *,
    block: int | None = 128,
    out_dtype=None,
    tile: Tile | None = None,
    impl: str = "triton",
) -> Float[Array, "m k"]:
    """(g * mask) rotated by blocks, sums in float32; g is bfloat16 or float16, and so is the result unless `out_dtype`
    says so.

    mask: the words that `hadamard_quantize(..., trust=)` gave. Reference: `impl="xla"`, equal to a rounding of the
    result.
    Raises: ValueError for a mask of other sizes or blocks that do not divide K, NoKernel for K that 128 does not
    divide."""
    who = "hadamard_backward"
    launch.check_impl(who, impl)
    m, k = check_matrix(who, "g", g, MATRIX_DTYPES)
    check_shape(who, "mask", mask, (-(-k // MASK_BLOCK), m, planes.COLUMNS), jnp.int8)
    if block not in (None, 32, 64, 128) or (block is not None and k % block):
        fail(who, f"got block={block} for K={k}", "Blocks are 32, 64 or 128 and divide K, or None")
    if impl == "xla":
        return _reference(g, mask, block).astype(out_dtype or g.dtype)
    if k % CHUNK:
        raise NoKernel(f"{who} works on {CHUNK} columns at once, and K={k} leaves {k % CHUNK}. Use impl='xla'.")
    return _run(g, mask, block, out_dtype or g.dtype, tile or Tile(rows=64, columns=128, warps=4, stages=2), impl)


def _reference(g, mask, block):
    rows = planes.padded_n(g.shape[0])
    words = jnp.pad(mask, ((0, 0), (0, rows - g.shape[0]), (0, 0)))
    kept = g.astype(jnp.float32) * planes.unpack((words,), 1, *g.shape).astype(jnp.float32)
    if block is None:
        return kept
    tiles = kept.reshape(g.shape[0], -1, block)
    turned = lax.dot_general(tiles, signed_hadamard(block), (((2,), (0,)), ((), ())), lax.Precision.HIGHEST)
    return turned.reshape(g.shape) * block**-0.5


def _run(g, mask, block, out_dtype, tile, impl):
    m, k = g.shape
    padded_m, padded_k = -(-m // tile.rows) * tile.rows, -(-k // MASK_BLOCK) * MASK_BLOCK
    gp = jnp.pad(g, ((0, padded_m - m), (0, padded_k - k)))
    mask = jnp.pad(mask, ((0, 0), (0, padded_m - m), (0, 0)))
    matrix = jnp.asarray(signed_hadamard(block) if block else jnp.eye(32), g.dtype)
    kernel = functools.partial(_kernel, block=block or 32, norm=1.0 if block is None else block**-0.5)
    out = launch.call(
        kernel, "hadamard_backward", impl, tile, grid=(padded_m // tile.rows, padded_k // MASK_BLOCK),
        in_specs=[
            pl.BlockSpec((tile.rows, MASK_BLOCK), lambda i, j: (i, j)),
            pl.BlockSpec((1, tile.rows, planes.COLUMNS), lambda i, j: (j, i, 0)),
            pl.BlockSpec(matrix.shape, lambda i, j: (0, 0)),
        ],
        out_specs=pl.BlockSpec((tile.rows, MASK_BLOCK), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((padded_m, padded_k), out_dtype),
    )(gp, mask, matrix)  # fmt: skip
    return out[:m, :k]


def _kernel(g_ref, mask_ref, h_ref, out_ref, *, block, norm):
    word = mask_ref[0, :, :].astype(jnp.int32)
    for start in range(0, MASK_BLOCK, block):
        total = jnp.zeros((out_ref.shape[0], block), jnp.float32)
        for j in range(block // 32):
            part = g_ref[:, pl.ds(start + 32 * j, 32)]
            kept = jnp.where((word >> (start // 32 + j)) & 1 == 1, part, jnp.zeros_like(part))
            total = total + jnp.dot(kept, h_ref[pl.ds(32 * j, 32), :], preferred_element_type=jnp.float32)
        out_ref[:, pl.ds(start, block)] = (total * norm).astype(out_ref.dtype)
