"""Floating-point and block-scaled training in float64 NumPy, by the casts of ml_dtypes and by nothing of the library.

Operands are x [tokens, inputs], w [outputs, inputs] and the cotangent g [tokens, outputs]; every quantizer has its
contraction along the last axis. A method answers (y, dx, dw)."""

import ml_dtypes
import numpy as np

E4M3, E5M2, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn


def largest(dtype) -> float:
    return float(ml_dtypes.finfo(dtype).max)


def cast(u: np.ndarray, dtype) -> np.ndarray:
    """To the nearest value of the dtype, ties to even, what is beyond the largest clipped to it."""
    return np.clip(u, -largest(dtype), largest(dtype)).astype(dtype).astype(np.float64)


def integer(u: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.round(u), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def tiled(u: np.ndarray, tile: tuple[int, int], scale_of, to_grid) -> np.ndarray:
    """u with one scale for each tile of (rows, columns); 0 takes all of an axis."""
    rows, columns = (size or length for size, length in zip(tile, u.shape, strict=True))
    view = u.reshape(u.shape[0] // rows, rows, u.shape[1] // columns, columns)
    scale = scale_of(np.abs(view).max((1, 3), keepdims=True))
    return (to_grid(view / scale) * scale).reshape(u.shape)


def absmax(dtype, tile):
    """One scale a tile in full precision, the largest magnitude on the largest value."""
    return lambda u: tiled(u, tile, lambda amax: amax / largest(dtype), lambda v: cast(v, dtype))


def up_to_a_power(dtype, tile):
    """The least power of two that clips nothing."""
    scale = lambda amax: 2.0 ** np.ceil(np.log2(amax / largest(dtype)))
    return lambda u: tiled(u, tile, scale, lambda v: cast(v, dtype))


def mx(dtype):
    """OCP Microscaling: 32 elements under 2^(floor(log2 amax) - exponent of the largest value)."""
    top = np.floor(np.log2(largest(dtype)))
    return lambda u: tiled(u, (1, 32), lambda amax: 2.0 ** (np.floor(np.log2(amax)) - top), lambda v: cast(v, dtype))


def nvfp4(tile):
    """E2M1 under an E4M3 scale a tile under a float32 scale for all, which puts the largest tile scale on 448."""

    def quantize(u):
        tensor = np.abs(u).max() / (6 * 448)
        return tiled(u, tile, lambda amax: cast(amax / 6 / tensor, E4M3) * tensor, lambda v: cast(v, E2M1))

    return quantize


def int8(tile):
    return lambda u: tiled(u, tile, lambda amax: amax / 127, lambda v: integer(v, 8))


def products(x, w, g, *, out, grad_lhs, grad_rhs):
    """The three products. Each pair quantizes (activation, weight), (cotangent, weight) and (activation, cotangent); in
    the last two, None keeps the original and "reuse" is the operand of `out`."""
    x_hat, w_hat = out[0](x), out[1](w)
    again = lambda how, original, hat: original if how is None else hat.T if how == "reuse" else how(original.T)
    g_d = g if grad_lhs[0] is None else grad_lhs[0](g)
    g_w = g.T if grad_rhs[1] is None else grad_rhs[1](g.T)
    w_d = w.T if grad_lhs[1] is None else again(grad_lhs[1], w, w_hat)
    x_w = x.T if grad_rhs[0] is None else again(grad_rhs[0], x, x_hat)
    return x_hat @ w_hat.T, g_d @ w_d.T, g_w @ x_w.T
