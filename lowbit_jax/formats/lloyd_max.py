"""The Lloyd-Max quantizer of the Gaussian: the 2**bits levels of least mean squared error for N(0, 1)."""

import math
from statistics import NormalDist

import numpy as np


def lloyd_max_levels(bits: int) -> tuple[float, ...]:
    """Levels in units of the standard deviation, ascending, to about 1e-13.

    Each level is the mean of the Gaussian over its own cell, and the cells meet halfway between levels:
    `y_i = E[x | t_i < x < t_(i+1)]`, `t_i = (y_(i-1) + y_i)/2`. Newton's method on the positive half, from levels that
    split a Gaussian of variance 3 into equal masses (their asymptotic density, Panter and Dite 1951).
    Source: Lloyd 1982, IEEE Trans. Inf. Theory 28(2); Max 1960, IRE Trans. Inf. Theory 6(1), whose table 1 stops at 36
    levels and 4 digits."""
    count = 2 ** (bits - 1)
    start = NormalDist(sigma=math.sqrt(3))
    levels = np.array([start.inv_cdf(0.5 + (i + 0.5) / (2 * count)) for i in range(count)])
    for _ in range(20):
        means, by_lower, by_upper = _cell_means(levels)
        change = _solve_tridiagonal(-by_lower[1:], 1 - by_lower - by_upper, -by_upper[:-1], levels - means)
        levels -= change
        if np.max(np.abs(change)) < 1e-10:  # the next change would be its square
            positive = levels.tolist()
            return tuple([-y for y in reversed(positive)] + positive)
    raise AssertionError(f"Newton's method did not settle on the {bits}-bit Lloyd-Max levels")


def _cell_means(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of N(0, 1) over each cell of the positive half, and half its derivatives by the cell's two edges: a level
    moves the edges on both its sides, so these are the entries of a tridiagonal Jacobian."""
    edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [40.0]])  # the density at 40 is exactly zero
    lower, upper = edges[:-1], edges[1:]
    density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    above = np.array([math.erfc(edge / math.sqrt(2)) / 2 for edge in edges])
    mass = above[:-1] - above[1:]
    means = -density[:-1] * np.expm1((lower**2 - upper**2) / 2) / mass  # density[:-1] - density[1:], no cancellation
    by_lower = density[:-1] * (means - lower) / mass / 2
    by_upper = density[1:] * (upper - means) / mass / 2
    by_lower[0] = by_upper[-1] = 0.0  # the edges at zero and at infinity do not move
    return means, by_lower, by_upper


def _solve_tridiagonal(below: np.ndarray, diagonal: np.ndarray, above: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Thomas's algorithm; the matrix is diagonally dominant, so nothing is pivoted. (The library call would start
    the threads of a BLAS while the package is imported.)"""
    diagonal, answer = diagonal.copy(), right.copy()
    for i in range(1, len(diagonal)):
        factor = below[i - 1] / diagonal[i - 1]
        diagonal[i] -= factor * above[i - 1]
        answer[i] -= factor * answer[i - 1]
    answer[-1] /= diagonal[-1]
    for i in range(len(diagonal) - 2, -1, -1):
        answer[i] = (answer[i] - above[i] * answer[i + 1]) / diagonal[i]
    return answer
