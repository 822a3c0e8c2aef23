"""The scale of a grid that loses least of a standard normal variable, from the Gaussian integrals.

For levels l_i (grid units) and a scale s, nearest rounding sends the cell (s m_i, s m_{i+1}) to s l_i, where m_i are
the midpoints of the levels. With p_i the cell's probability and e_i = E[x; cell] = phi(s m_i) - phi(s m_{i+1}):

    D(s) = 1 - 2 s sum(l_i e_i) + s^2 sum(l_i^2 p_i),      D'(s) = 2 s sum(l_i^2 p_i) - 2 sum(l_i e_i)

(the cell edges are where neighboring errors are equal, so their motion adds nothing to D'). D' is solved by bisection
down to the spacing of the floats: QuEST's alpha* (arXiv:2502.05003, section 3) follows as s * max_finite. The released
constants of that paper's code stop early (0.95% low at 8 bits); these do not.
"""

import functools
import math

import numpy as np

from lowbit_jax.formats.base import Format

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _levels(fmt: Format, who: str) -> np.ndarray:
    if not hasattr(fmt, "levels"):
        raise TypeError(
            f"{who} got {fmt!r}, which has no grid of its own. Pass an element format, as lb.formats.E2M1 or the"
            " `element` of a block format."
        )
    return np.asarray(fmt.levels, np.float64)


def _cell_moments(levels: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Probability and first moment of N(0, 1) in each cell of `scale * levels`."""
    inner = scale * (levels[1:] + levels[:-1]) / 2
    cdf = np.concatenate([[0.0], (1 + _erf(inner / math.sqrt(2))) / 2, [1.0]])
    density = np.concatenate([[0.0], np.exp(-(inner**2) / 2) / math.sqrt(2 * math.pi), [0.0]])
    return np.diff(cdf), -np.diff(density)


def gaussian_mse(fmt: Format, scale: float) -> float:
    """E[(Q(x) - x)^2] for x ~ N(0, 1), nearest rounding to `scale * fmt.levels`.

    Raises: TypeError for a block format."""
    levels = _levels(fmt, "gaussian_mse")
    probability, moment = _cell_moments(levels, scale)
    return float(1 - 2 * scale * (levels @ moment) + scale**2 * (levels**2 @ probability))


def _slope(levels: np.ndarray, scale: float) -> float:
    probability, moment = _cell_moments(levels, scale)
    return float(scale * (levels**2 @ probability) - levels @ moment)


@functools.cache
def optimal_scale(fmt: Format) -> float:
    """Scale, in units of the standard deviation per grid unit, of least squared error on a Gaussian.

    Raises: TypeError for a block format; ValueError for a grid whose only level is 0."""
    levels = _levels(fmt, "optimal_scale")
    magnitudes = np.abs(levels[levels != 0])
    if magnitudes.size == 0:
        raise ValueError(
            f"optimal_scale of {fmt.name}: its only level is 0, so no scale fits it. Choose another format."
        )
    candidates = np.geomspace(1e-3, 40, 300) / magnitudes.max()
    errors = [gaussian_mse(fmt, s) for s in candidates]
    # A grid with levels far out for single outliers (posits) has the Gaussian among its inner ones. Floats fit about
    # equally well at every factor of 2, so the scale moves there only for a gain.
    decades = math.log10(magnitudes.max() / magnitudes.min())
    outer = 40 / np.geomspace(magnitudes.max(), magnitudes.min(), 2 + round(65 * decades))
    outer_errors = [gaussian_mse(fmt, s) for s in outer]
    if min(outer_errors) < 0.99 * min(errors):
        candidates, errors = outer, outer_errors
    best = int(np.argmin(errors))
    low, high = candidates[max(best - 1, 0)], candidates[min(best + 1, len(candidates) - 1)]
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return float(middle)
        low, high = (middle, high) if _slope(levels, middle) < 0 else (low, middle)


def optimal_clip(fmt: Format) -> float:
    """alpha*: where the largest level lies at the optimal scale, in standard deviations (1.4935 for 2-bit mid-rise)."""
    return optimal_scale(fmt) * fmt.reach
