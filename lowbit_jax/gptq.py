"""GPTQ: a weight rounded one contraction index after the other, each error made up for by the indices that follow.

    least  sum over outputs of  d G d^T,     d = w - w_hat,  G = the sum of x^T x over what the weight meets

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1, with the scales (and zero points) of the weight as it came
("static groups") and the indices in their own order. Here an output whose sum is no smaller than with nearest levels
keeps those.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import core, lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling.tiling import join

DAMPING = 0.01
_BLOCK = 128  # indices whose errors reach the rest at once


def gptq(
    quantizer: Quantizer,
    w: Float[Array, "*s"],
    gram: Float[Array, "k k"],
    *,
    axis: int = -1,
    scale: Array | None = None,
) -> QTensor:
    """`quantizer.quantize(w, axis=axis)` with its levels chosen for small errors of x w, and the same scales.

    gram: the sum of x^T x for inputs x along `axis`, without the quantizer's rotation, as `damped` makes it. Where
    float32 cannot factor it, its diagonal grows, tenfold by tenfold, until it can. scale: a learned one.
    Raises: ValueError for a gram of another size or not finite (inside of `jit` that leaves nearest levels), and a
    quantizer with a support or one that draws from a key."""
    length = w.shape[axis]
    if tuple(gram.shape) != (length, length):
        raise ValueError(
            f"gptq: axis {axis} of the weight has {length} elements, and the gram the shape {tuple(gram.shape)}. It is"
            f" the sum of x^T x over inputs x of that length, ({length}, {length})."
        )
    if quantizer.sparsity is not None:
        raise ValueError(
            f"gptq: {quantizer.sparsity.describe()} leaves elements out, which would have to be chosen with the levels."
            " Quantize without sparsity, or pack by lb.convert."
        )
    if quantizer.uses_key:
        raise ValueError(
            "gptq chooses levels by errors, and this quantizer by chance. Use rounding.nearest, signs of a seed and no"
            " debias."
        )
    gram = jnp.asarray(gram, jnp.float32)
    if not isinstance(gram, core.Tracer) and not jnp.all(jnp.isfinite(gram)):
        raise ValueError(
            "gptq: the gram is not finite in float32. Inputs x of its sum of x^T x are not, or are of about 1e19 and"
            " more: leave them out, or divide all by one number, which changes no level."
        )
    if quantizer.rotation is not None:
        gram = quantizer.rotation.apply(quantizer.rotation.apply(gram, 0), 1)
    mean = jnp.mean(jnp.diagonal(gram))
    gram = gram / jnp.where(mean > 0, mean, 1)
    factor = _factor(gram)

    def choose(u: Array, scale: Array) -> Array:
        rows = lambda x: jnp.moveaxis(join(jnp.broadcast_to(x, u.shape), w.shape), axis, -1)
        u_rows, scale_rows = rows(u), rows(scale)
        levels = _compensated(quantizer, u_rows, scale_rows, factor)
        nearest = quantizer.rounding(u_rows, quantizer.format, None)

        def cost(levels: Array) -> Array:
            d = (levels - u_rows) * scale_rows
            return jnp.sum(jnp.matmul(d, gram, precision=lax.Precision.HIGHEST) * d, axis=-1, keepdims=True)

        levels = jnp.where(cost(levels) < cost(nearest), levels, nearest)
        tiles, _ = quantizer.tiling.split(jnp.moveaxis(levels, -1, axis), axis)
        return tiles

    return quantizer.quantize_by(choose, w, axis=axis, scale=scale)


def damped(gram: Float[Array, "*stack k k"], damping: float = DAMPING) -> Float[Array, "*stack k k"]:
    """With `damping` times the mean of its diagonal added to the diagonal, float32. Raises: ValueError unless it is
    positive and finite."""
    if not 0 < damping < math.inf:
        raise ValueError(
            f"gptq(damping={damping}): it is a positive, finite share of the mean of the diagonal, such as 0.01."
        )
    gram = gram.astype(jnp.float32)
    mean = jnp.mean(jnp.diagonal(gram, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return gram + damping * jnp.where(mean > 0, mean, 1) * identity


def _factor(gram: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The upper Cholesky factor U of the gram's inverse, U^T U, for a gram with 1 as the mean of its diagonal.

    It is the inverse of R in R R^T = gram, R upper: one Cholesky decomposition, its indices from the last to the first.
    What is missing to a positive definite gram is added to the diagonal. NaN for one that is not finite."""
    shares = jnp.asarray([0.0, *(10.0**e for e in range(-7, 1))], gram.dtype)
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    open_ = lambda tried: (tried[0] < len(shares)) & ~jnp.all(jnp.isfinite(tried[1]))
    more = lambda tried: (tried[0] + 1, jnp.linalg.cholesky((gram + shares[tried[0]] * identity)[::-1, ::-1]))
    _, lower = lax.while_loop(open_, more, (0, jnp.full_like(gram, jnp.nan)))
    return solve_triangular(lower[::-1, ::-1], identity, lower=False)


@functools.partial(jax.jit, static_argnums=0)
def _compensated(
    quantizer: Quantizer, u: Float[Array, "*rows k"], scale: Float[Array, "*rows k"], factor: Float[Array, "k k"]
) -> Float[Array, "*rows k"]:
    """The levels for the rows u * scale."""
    length = u.shape[-1]
    size = next(n for n in range(min(_BLOCK, length), 0, -1) if length % n == 0)
    w, s = (x.reshape(-1, length) for x in (u * scale, scale))
    inverse = jnp.where(s == 0, 0.0, 1 / jnp.where(s == 0, 1.0, s))

    def column(j, block):
        w, levels, errors, s, inverse, factor = block
        here = w[:, j]
        level = quantizer.rounding(here * inverse[:, j], quantizer.format, None)
        error = (here - level * s[:, j]) / factor[j, j]
        w = w - error[:, None] * factor[j][None, :]  # upper: the indices before j stay
        return w, levels.at[:, j].set(level), errors.at[:, j].set(error), s, inverse, factor

    def block(i, carry):
        w, levels = carry
        start = i * size
        part = lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1)
        rows = lax.dynamic_slice_in_dim(factor, start, size, axis=0)
        begin = (part(w), jnp.zeros_like(part(w)), jnp.zeros_like(part(w)), part(s), part(inverse), part(rows))
        _, chosen, errors, *_ = lax.fori_loop(0, size, column, begin)
        behind = jnp.arange(length)[None, :] >= start + size
        moved = lax.dot(errors, jnp.where(behind, rows, 0.0), precision=lax.Precision.HIGHEST)
        return w - moved, lax.dynamic_update_slice_in_dim(levels, chosen, start, axis=1)

    _, levels = lax.fori_loop(0, length // size, block, (w, jnp.zeros_like(w)))
    return levels.reshape(u.shape)
