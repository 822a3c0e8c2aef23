"""Each estimator against its written rule (METHODS 2.1), element by element in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax import formats, rounding
from lowbit_jax.estimators import LSQ, PACT, ClippedStraightThrough, StraightThrough, Trust, quantize_through

GRIDS = [formats.INT4, formats.MIDRISE2, formats.MIDRISE1, formats.E2M1, formats.UINT4]


def pull(estimator, fmt, x, scale, g, support=None):
    """(dx, dscale) of the quantization for the cotangent g."""
    f = lambda x, s: quantize_through(estimator, fmt, rounding.nearest, x, s, support, None)
    return jax.vjp(f, x, scale)[1](g)


@pytest.fixture
def data(key):
    a, b = jax.random.split(key)
    return jax.random.normal(a, (6, 40)) * 4, jnp.linspace(0.4, 1.1, 6)[:, None], jax.random.normal(b, (6, 40))


@pytest.mark.parametrize("fmt", GRIDS, ids=lambda f: f.name)
def test_mask_estimators(data, fmt):
    x, scale, g = data
    u = np.asarray(x / scale)
    q = np.asarray(rounding.nearest(x / scale, fmt))
    rules = {
        StraightThrough(): np.ones_like(u, bool),
        ClippedStraightThrough(): (u >= fmt.min_finite) & (u <= fmt.max_finite),
        Trust(): np.abs(q - u) <= fmt.top_gap / 2 * (1 + 1e-6),
        Trust(outer=1.3): (u <= 1.3 * fmt.max_finite) & (u >= 1.3 * fmt.min_finite),
    }
    for estimator, mask in rules.items():
        dx, dscale = pull(estimator, fmt, x, scale, g)
        np.testing.assert_array_equal(dx, np.where(mask, g, 0))
        np.testing.assert_array_equal(dscale, 0)
        assert not mask.all() or isinstance(estimator, StraightThrough)


def test_trust_on_a_sparse_support(data):
    """Kept: as ever. Dropped: only |u| <= T, the distance to the zero that replaces it."""
    x, scale, g = data
    support = jnp.arange(40)[None, :] % 2 == jnp.zeros((6, 1), jnp.int32)
    fmt = formats.MIDRISE4
    dx, _ = pull(Trust(), fmt, x, scale, g, support)
    u = np.asarray(x / scale)
    np.testing.assert_array_equal(dx, np.where(np.where(support, np.abs(u) <= 8.0, np.abs(u) <= 0.5), g, 0))
    y = quantize_through(Trust(), fmt, rounding.nearest, x, scale, support, None)
    np.testing.assert_array_equal(np.asarray(y)[~np.asarray(support)], 0)


@pytest.mark.parametrize("fmt", GRIDS, ids=lambda f: f.name)
def test_lsq(data, fmt):
    x, scale, g = data
    dx, dscale = pull(LSQ(), fmt, x, scale, g)
    u, g64 = np.asarray(x / scale, np.float64), np.asarray(g, np.float64)
    q = np.asarray(rounding.nearest(x / scale, fmt), np.float64)
    low, high = fmt.min_finite, fmt.max_finite
    slope = np.where(u <= low, low, np.where(u >= high, high, q - u))
    expected = (g64 * slope).sum(1, keepdims=True) / np.sqrt(40 * high)
    np.testing.assert_allclose(dscale, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(dx, np.where((u > low) & (u < high), g, 0))


def test_pact_is_the_papers_rule(data):
    """Unsigned: d alpha = sum of g where x >= alpha, with alpha = s Qp, and the x-gradient is not zero."""
    x, scale, g = data
    fmt = formats.UINT4
    dx, dscale = pull(PACT(), fmt, x, scale, g)
    u = np.asarray(x / scale)
    np.testing.assert_array_equal(dx, np.where((u >= 0) & (u < 15), g, 0))
    np.testing.assert_allclose(dscale, (np.asarray(g) * 15 * (u >= 15)).sum(1, keepdims=True), rtol=1e-5, atol=1e-5)
    assert np.abs(dx).max() > 0


def test_finite_differences_of_the_learned_scale():
    """Where all elements are clipped the output is s Qp, a smooth function of s: autodiff without the gain must
    agree."""
    x, fmt = jnp.full((1, 8), 100.0), formats.INT4
    f = lambda s: jnp.sum(quantize_through(PACT(), fmt, rounding.nearest, x, s, None, None) ** 2)
    s, eps = jnp.full((1, 1), 0.5), 1e-3
    slope = (f(s + eps) - f(s - eps)) / (2 * eps)
    np.testing.assert_allclose(jax.grad(f)(s)[0, 0], slope, rtol=1e-3)


def test_bad_trust():
    with pytest.raises(ValueError, match="positive multiple"):
        Trust(outer=-1)


@pytest.mark.parametrize("fmt", [formats.INT4, formats.INT8, formats.E2M1, formats.E4M3], ids=lambda f: f.name)
def test_nothing_that_absmax_fits_is_clipped(key, fmt):
    """u of the largest element may lie an ulp above the largest level."""
    x = jax.random.normal(key, (4096, 64))
    g = jax.grad(lambda x: jnp.sum(lb.Quantizer(format=fmt)(x)))(x)
    np.testing.assert_array_equal(g, 1)


def test_trust_looks_at_the_distance_where_inner_gaps_are_wider(key):
    """NF4: its top gap is .277, that of its two smallest levels .304."""
    fmt = formats.NF4
    u = jax.random.uniform(key, (1, 4000), minval=-1.2, maxval=1.2)
    g, _ = pull(Trust(), fmt, u, jnp.ones((1, 1)), jnp.ones_like(u))
    distance = np.abs(np.asarray(rounding.nearest(u, fmt)) - np.asarray(u))
    np.testing.assert_array_equal(g, distance <= fmt.top_gap / 2 * (1 + 1e-6))
    assert (np.asarray(g)[(u > -0.99) & (u < -0.7)] == 0).any()


@pytest.mark.parametrize("estimator", [LSQ(), PACT()], ids=lambda e: e.describe())
def test_what_a_support_drops_does_not_move_the_learned_scale(estimator):
    """Its output is 0 whatever the scale."""
    x, support = jnp.asarray([[30.0, 2.0, -30.0, 1.2]]), jnp.asarray([[True, True, False, False]])
    _, dscale = pull(estimator, formats.INT4, x, jnp.ones((1, 1)), jnp.asarray([[0.0, 0.0, 1.0, 1.0]]), support)
    np.testing.assert_array_equal(dscale, 0)
    _, dscale = pull(estimator, formats.INT4, x, jnp.ones((1, 1)), jnp.ones((1, 4)), support)
    assert dscale[0, 0] > 0
