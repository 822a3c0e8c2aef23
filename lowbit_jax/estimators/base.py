"""The one place where a rounding meets autodiff.

    u = x / scale,   q = round(u) on the support, 0 off it,   x_hat = scale q

An estimator sees u and q once, in the forward, and keeps what it needs (`residuals`); in the backward it turns the
cotangent of x_hat into those of x and of the scale. u and q are in grid units, so one rule serves every scale. An
attribute `learns_scale` says whether it has a gradient for the scale; `Quantizer` then holds it to the fit.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lowbit_jax.formats.base import Format
from lowbit_jax.scaling.fit import reciprocal


@runtime_checkable
class Estimator(Protocol):
    def residuals(
        self, u: Float[Array, "*s"], q: Float[Array, "*s"], fmt: Format, support: Bool[Array, "*s"] | None
    ) -> Any:
        """What the backward needs."""
        ...

    def gradients(
        self, residuals: Any, g: Float[Array, "*s"], fmt: Format, tile_size: int
    ) -> tuple[Float[Array, "*s"], Float[Array, "*s"] | None]:
        """Cotangents of x and, before the sum over each tile, of the scale (None: zero) for the cotangent g of
        x_hat, linear in g."""
        ...

    def describe(self) -> str: ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def quantize_through(
    estimator: Estimator,
    fmt: Format,
    rounding: Callable,
    x: Float[Array, "*s"],
    scale: Float[Array, "*#s"],
    support: Bool[Array, "*s"] | None,
    key: Array | None,
    inv_scale: Float[Array, "*#s"] | None = None,
    zero: Float[Array, "*#s"] | None = None,
) -> Float[Array, "*s"]:
    """`scale * rounding(x / scale)` on the support, zero off it; gradients of every order by `estimator`. A scale of 0
    gives 0.

    inv_scale: the reciprocal of `scale`, where it is at hand. zero: zero points z, of `scale * (rounding(x / scale + z)
    - z)`. Neither gets a gradient."""
    return _forward(estimator, fmt, rounding, x, scale, support, key, inv_scale, zero)[0]


def _forward(estimator, fmt, rounding, x, scale, support, key, inv_scale=None, zero=None):
    u = x * (reciprocal(scale) if inv_scale is None else inv_scale)
    if zero is not None:
        u = u + zero
    q = rounding(u, fmt, key)
    if support is not None:
        q = jnp.where(support, q, jnp.zeros_like(q))
    residuals = estimator.residuals(u if zero is None else at_the_edge(u, q, fmt), q, fmt, support)
    x_hat = q * scale if zero is None else (q - zero) * scale
    return _with_gradients(estimator, fmt, x, scale, x_hat, residuals), (residuals, scale, support, key)


def at_the_edge(u: Float[Array, "*s"], q: Float[Array, "*s"], fmt: Format) -> Float[Array, "*s"]:
    """u, and the edge of the grid for what lies up to half a step outside, as it does at the end of a tile that is
    moved by a whole zero point: it is rounded there, not clipped."""
    return jnp.where(jnp.abs(u - q) <= 0.5, jnp.clip(u, fmt.min_finite, fmt.max_finite), u)


def _backward(estimator, fmt, rounding, saved, g):
    residuals, scale, support, key = saved
    dx, dscale = _cotangents(estimator, fmt, residuals, scale, g)
    return dx, dscale, no_cotangent(support), no_cotangent(key), None, None


quantize_through.defvjp(_forward, _backward)


def no_cotangent(x: Array | None) -> Any:
    """What a gradient rule answers for an argument that is no number: a mask or a key."""
    return None if x is None else np.zeros(x.shape, jax.dtypes.float0)


def _cotangents(estimator, fmt, residuals, scale, g):
    tile = tuple(a for a in range(g.ndim) if scale.shape[a] == 1)
    dx, dscale = estimator.gradients(residuals, g, fmt, math.prod(g.shape[a] for a in tile))
    if dscale is not None:
        dscale = jnp.sum(dscale, axis=tile, keepdims=True).astype(scale.dtype)
    return dx, dscale


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_gradients(estimator, fmt, x, scale, x_hat, residuals):
    """`x_hat` with the estimator's gradients: what a derivative of a derivative, forward or reverse, meets in place of
    the rounding, whose own derivative is zero."""
    return x_hat


@_with_gradients.defjvp
def _with_gradients_tangent(estimator, fmt, primals, tangents):
    _, scale, x_hat, residuals = primals
    transposed = lambda g: [d for d in _cotangents(estimator, fmt, residuals, scale, g) if d is not None]
    moved = tangents[: len(jax.eval_shape(transposed, x_hat))]
    (dx_hat,) = jax.linear_transpose(transposed, x_hat)(list(moved))
    return _with_gradients(estimator, fmt, *primals), dx_hat
