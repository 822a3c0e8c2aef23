"""Lloyd-Max levels of the Gaussian against published tables, and against the condition that defines them."""

import math

import numpy as np
import pytest

from lowbit_jax import formats

# Least mean squared error to 7 digits and top level to 6 decimals, computed elsewhere.
PUBLISHED = {
    1: (0.3633802, 0.797885),
    2: (0.1174818, 1.510418),
    3: (0.03454776, 2.151946),
    4: (0.009501008, 2.732590),
    5: (0.002504668, 3.260732),
    6: (6.442397e-4, 3.744101),
    7: (1.634782e-4, 4.189694),
    8: (4.118508e-5, 4.603536),
}
MAX_1960 = {  # J. Max, IRE Trans. Inf. Theory 6(1), table 1: the positive levels, 4 digits
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}


def cells(bits: int):
    """Levels, nodes and Gaussian weights of each cell: Gauss-Legendre, exact to rounding on cells this narrow."""
    levels = np.array(formats.get(f"lloyd_max{bits}").levels)
    edges = np.concatenate([[-12.0], (levels[1:] + levels[:-1]) / 2, [12.0]])
    node, weight = np.polynomial.legendre.leggauss(200)
    half = np.diff(edges)[:, None] / 2
    x = (edges[1:] + edges[:-1])[:, None] / 2 + half * node
    return levels[:, None], x, half * weight * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_level_is_the_mean_of_its_cell(bits):
    levels, x, weight = cells(bits)
    means = (x * weight).sum(1) / weight.sum(1)
    np.testing.assert_allclose(levels[:, 0], means, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", range(1, 9))
def test_error_and_top_level_are_the_published_ones(bits):
    levels, x, weight = cells(bits)
    mse, top = PUBLISHED[bits]
    np.testing.assert_allclose(((x - levels) ** 2 * weight).sum(), mse, rtol=5e-7)
    np.testing.assert_allclose(levels[-1, 0], top, atol=6e-7)


@pytest.mark.parametrize("bits", MAX_1960)
def test_levels_are_those_of_max(bits):
    positive = formats.get(f"lloyd_max{bits}").levels[2 ** (bits - 1) :]
    np.testing.assert_allclose(positive, MAX_1960[bits], rtol=5e-4)


def test_one_bit_is_the_mean_magnitude():
    np.testing.assert_allclose(formats.LLOYD_MAX1.levels, [-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)], rtol=1e-15)
