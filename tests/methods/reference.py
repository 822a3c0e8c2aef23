"""QuEST in float64 NumPy, written from the equations of arXiv:2502.05003 and by nothing of the library.

alpha* is found by quadrature and scalar minimization (SciPy), the Hadamard matrix comes from SciPy too."""

import functools

import numpy as np
from scipy.integrate import quad
from scipy.linalg import hadamard
from scipy.optimize import minimize_scalar


@functools.cache
def alpha_star(bits: int) -> float:
    """argmin over alpha of E[(Q_alpha(x) - x)^2], x ~ N(0, 1), on 2^bits levels evenly spaced in [-alpha, alpha]."""

    def loss(alpha):
        step = 2 * alpha / (2**bits - 1)
        edges = [step * k for k in range(2 ** (bits - 1))] + [40.0]
        density = lambda x: np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
        cells = zip(edges, edges[1:], strict=False)
        return 2 * sum(
            quad(lambda x, c=(k + 0.5) * step: (x - c) ** 2 * density(x), low, high, epsabs=1e-15, epsrel=1e-12)[0]
            for k, (low, high) in enumerate(cells)
        )

    return float(minimize_scalar(loss, bounds=(0.5, 5), method="bounded", options={"xatol": 1e-10}).x)


def rotate(u: np.ndarray, block: int | None) -> np.ndarray:
    """u blockdiag(H) along the last axis, H orthonormal."""
    if block is None:
        return u
    matrix = hadamard(block) / np.sqrt(block)
    return (u.reshape(-1, block) @ matrix).reshape(u.shape)


def quantize(u: np.ndarray, bits: int, alpha: float, block: int | None = 128, clip_scale: float | None = None):
    """(x_hat in the rotated space, mask), rows along the last axis."""
    h = rotate(u, block)
    sigma = np.sqrt(np.mean(h**2, axis=-1, keepdims=True))
    a = alpha * sigma
    step = 2 * a / (2**bits - 1)
    hat = np.round(np.clip(h, -a, a) / step + 0.5) * step - step / 2
    if clip_scale is None:
        mask = np.abs(hat - h) <= alpha / (2**bits - 1) * sigma * (1 + 1e-9)
    else:
        mask = np.abs(h) <= clip_scale * a
    return hat, mask


def linear(x: np.ndarray, w: np.ndarray, g: np.ndarray, bits: int, block: int | None = 128):
    """(y, dx, dw) for y = x_hat w_hat^T with the cotangent g of y; x [M, K], w [N, K], g [M, N]."""
    alpha = alpha_star(bits)
    clip_scale = {None: 1.25}.get(block, 1.30) if bits == 1 else None
    x_hat, x_mask = quantize(x, bits, alpha, block, clip_scale)
    w_hat, w_mask = quantize(w, bits, alpha, block, clip_scale)
    return x_hat @ w_hat.T, rotate((g @ w_hat) * x_mask, block), rotate((g.T @ x_hat) * w_mask, block)
