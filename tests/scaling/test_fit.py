"""Fits against their definitions in float64, and the tiles that break careless ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax import formats, scaling
from lowbit_jax.formats import E2M1, INT4, MIDRISE1, MIDRISE4, TERNARY
from lowbit_jax.scaling import fit

FITS = [scaling.absmax, scaling.rms_optimal, scaling.mean_abs, scaling.Percentile(99.0), scaling.CandidateSearch()]


def tiles_with_spread(key, rows=7, size=200):
    """Each row with its own spread, so that a wrong axis shows."""
    spread = np.geomspace(0.01, 30, rows, dtype=np.float32)[:, None]
    return np.asarray(jax.random.normal(key, (rows, size))) * spread


# One program for each fit, which compiles in a fraction of what its operations take one by one.
fitted = jax.jit(lambda how, x, fmt: how(x, fmt, (1,)), static_argnums=(0, 2))
fakely = jax.jit(lambda quantizer, x: quantizer(x), static_argnums=0)
error_of = jax.jit(lambda quantizer, x: jnp.mean((quantizer(x) - x) ** 2), static_argnums=0)


@pytest.mark.parametrize("fmt", [INT4, MIDRISE4, E2M1, TERNARY, MIDRISE1], ids=lambda f: f.name)
def test_fits_follow_their_formulas(key, fmt):
    x = tiles_with_spread(key)
    x64 = np.asarray(x, np.float64)
    smallest = min(abs(v) for v in fmt.levels if v)
    expected = {
        scaling.absmax: np.abs(x64).max(1) / fmt.max_finite,
        scaling.absmax_edge: np.abs(x64).max(1) / (1.5 * fmt.levels[-1] - 0.5 * fmt.levels[-2]),
        scaling.rms_optimal: np.sqrt((x64**2).mean(1)) * scaling.optimal_scale(fmt),
        scaling.mean_abs: np.abs(x64).mean(1) / smallest,
        scaling.Percentile(99.0): np.quantile(np.abs(x64), 0.99, axis=1) / fmt.max_finite,
    }
    for how, value in expected.items():
        scale = fitted(how, x, fmt)
        assert scale.shape == (7, 1) and len(np.unique(scale)) == 7
        np.testing.assert_allclose(scale[:, 0], value, rtol=2e-6)


@pytest.mark.parametrize("fmt", [INT4, MIDRISE4, E2M1], ids=lambda f: f.name)
def test_candidate_search_never_loses_to_its_candidates(key, fmt):
    x = np.asarray(tiles_with_spread(key), np.float64)
    search = scaling.CandidateSearch(fractions=(1.0, 0.8, 0.6, 0.4))
    levels = np.asarray(fmt.levels)

    def loss(scale):
        return (((scale * levels)[np.abs(row[:, None] - scale * levels).argmin(1)] - row) ** 2).sum()

    found = np.asarray(fitted(search, np.float32(x), fmt), np.float64)[:, 0]
    for row, scale in zip(x, found, strict=True):
        base = np.abs(row).max() / fmt.max_finite
        assert loss(scale) <= min(loss(base * f) for f in search.fractions) * (1 + 1e-5)
        assert min(abs(scale / base - f) for f in search.fractions) < 1e-6


@pytest.mark.parametrize("how", FITS, ids=lambda f: getattr(f, "__name__", type(f).__name__))
@pytest.mark.parametrize("fmt", [INT4, MIDRISE4, MIDRISE1, E2M1], ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(4, 16), (64, 300)], ids=str)  # XLA drops NaN from the maximum of the larger one
def test_zero_nan_and_inf_stay_in_their_tile(how, fmt, shape):
    x = np.ones(shape, np.float32)
    x[0], x[2, 3], x[3, 5] = 0, np.nan, -np.inf
    scale = np.asarray(fitted(how, x, fmt))[:, 0]
    assert scale[0] == (1 if fmt.has_zero else 0)
    assert np.isfinite(scale[1]) and scale[1] > 0
    if how is not FITS[3]:  # a percentile may rightly lie below the inf
        assert not np.isfinite(scale[2]) and not np.isfinite(scale[3])


@pytest.mark.parametrize("how", FITS[:3], ids=lambda f: f.__name__)
def test_fits_scale_with_the_data_over_the_range_of_float32(key, how):
    """A power of two is exact, so the scale of 2^k x is 2^k times that of x, to the bit; squares end at 2^±63."""
    x = tiles_with_spread(key)
    powers = (-30, -20, 20, 50) if how is scaling.rms_optimal else (-100, -83, -64, 40, 64, 83, 118)
    for fmt in (INT4, MIDRISE4):
        usual = np.asarray(fitted(how, x, fmt), np.float64)
        for k in powers:
            scaled = np.asarray(fitted(how, x * np.float32(2.0**k), fmt), np.float64)
            np.testing.assert_array_equal(scaled, usual * 2.0**k)


def test_rms_beyond_the_range_of_a_square_is_nan_or_a_tile_of_zeros():
    x = jnp.ones((3, 256)) * jnp.asarray([1e25, 1e-25, 1e-17])[:, None]
    scale = np.asarray(scaling.rms_optimal(x, MIDRISE4, (1,)))[:, 0]
    assert np.isnan(scale[0]) and scale[1] == 0 and scale[2] > 0


@pytest.mark.parametrize("name", ["midrise1", "binary", "lloyd_max1", "int8", "e2m1", "nf4", "e5m2", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("size", [1e37, 1e38, 3.4028234e38])
def test_absmax_saturates_at_the_end_of_float32(name, size):
    """On a 1-bit grid the scale is twice the largest element, and its reciprocal a denormal that XLA flushes."""
    fmt = formats.get(name)
    q = lb.block_quantizer(fmt) if isinstance(fmt, formats.BlockFormat) else lb.Quantizer(format=fmt)
    x = np.float32(size) * np.linspace(-1, 1, 32, dtype=np.float32)[None]
    y = np.asarray(fakely(q, x))
    assert np.isfinite(y).all()
    large = np.abs(x) > size / 2
    np.testing.assert_array_equal(np.sign(y[large]), np.sign(x[large]))
    assert (np.abs(y[large]) >= 2.0**125).all() or size < 1e38


def test_the_smallest_scale_is_the_smallest_normal_number():
    """amax / 127 is a denormal, which XLA would flush and so lose the tile."""
    x = jnp.asarray([[1e-37, -5e-38]], jnp.float32)
    np.testing.assert_array_equal(scaling.absmax(x, formats.INT8, (1,)), [[2.0**-126]])
    np.testing.assert_allclose(lb.Quantizer()(x), x, atol=2.0**-127)


def test_largest_scale_keeps_every_level_finite():
    for name in formats.names():
        fmt = formats.get(name)
        if isinstance(fmt, formats.BlockFormat):
            continue
        scale = np.float32(fit.largest_scale(fmt))
        assert np.isfinite(scale * np.asarray(fmt.levels, np.float32)).all() and 1 / scale >= 2.0**-126


def test_a_percentile_of_zero_is_fitted_by_absmax(key):
    """60 of 64 elements are zero: the median is, the tile is not."""
    x = jax.random.normal(key, (3, 64)).at[:, :60].set(0).at[2].set(0)
    scale = scaling.Percentile(50)(x, formats.INT8, (1,))
    np.testing.assert_allclose(scale[:2, 0], np.abs(x).max(1)[:2] / 127, rtol=1e-6)
    assert scale[2, 0] == 1


def test_positive_scales():
    values = jnp.asarray([0.5, -0.5, 0.0, -1e-40, 1e-40], jnp.float32)
    np.testing.assert_array_equal(fit.positive(values), np.float32([0.5, 0.5, 2.0**-126, 2.0**-126, 2.0**-126]))
    slope = jax.grad(lambda s: jnp.sum(fit.positive(s)))(values[:3])
    np.testing.assert_array_equal(slope, [1, -1, 1])


def test_bad_arguments_say_the_way_out():
    with pytest.raises(TypeError, match=r"Group\(size=\) is 32.0"):
        scaling.Group(32.0)
    assert scaling.Group(np.int64(32)) == scaling.Group(32)
    with pytest.raises(ValueError, match=r"Percentile\(0\)"):
        scaling.Percentile(0)
    with pytest.raises(ValueError, match="Percentile.'99'"):
        scaling.Percentile("99")
    for fractions in ((), (0.0,), (np.nan,), (np.inf,)):
        with pytest.raises(ValueError, match="positive multiples"):
            scaling.CandidateSearch(fractions=fractions)
    for options in (dict(fractions=0.9), dict(base="absmax")):
        with pytest.raises(TypeError, match="a sequence of multiples"):
            scaling.CandidateSearch(**options)
    with pytest.raises(ValueError, match="initial_scale"):
        scaling.Learned()(jnp.ones((2, 2)), INT4, (1,))


def test_mse_fit_beats_absmax_up_to_four_bits_and_loses_at_eight(key):
    """METHODS 6.1, rows of 1024 Gaussians: ratios 20.5, 3.86, 2.17, 1.53 and, at 8 bits, 0.70."""
    x = jax.random.normal(key, (512, 1024))
    for bits, expected in ((1, 20.5), (2, 3.86), (3, 2.17), (4, 1.53), (8, 0.70)):
        fmt = formats.get(f"midrise{bits}")
        error = lambda fit, fmt=fmt: float(error_of(lb.Quantizer(format=fmt, fit=fit), x))
        noise = 0.08 if bits == 8 else 0.03  # at 8 bits the loss of the rms fit is that of some 20 clipped elements
        np.testing.assert_allclose(error(scaling.absmax) / error(scaling.rms_optimal), expected, rtol=noise)


def test_absmax_on_levels_whose_reciprocal_is_no_normal_number():
    x = jnp.asarray([[1e10], [3e-5], [1e30]])
    scale = fit.absmax(x, formats.E8M0, (1,))
    np.testing.assert_allclose(np.asarray(scale, np.float64)[[0, 2]] * 2.0**127, [[1e10], [1e30]], rtol=1e-6)
    assert scale[1, 0] == fit.SMALLEST_SCALE


def test_a_fit_keeps_its_axes():
    """Without them a square array would get a scale an element."""
    forgets = lambda tiles, fmt, axes: jnp.max(jnp.abs(tiles), axis=axes) / fmt.max_finite
    with pytest.raises(ValueError, match="scales of shape .64,. for tiles of .64, 1.*keepdims"):
        lb.Quantizer(fit=forgets)(jnp.ones((64, 64)))
    constant = lb.Quantizer(fit=lambda tiles, fmt, axes: jnp.float32(0.5))
    np.testing.assert_array_equal(constant(jnp.ones((3, 4))), 1)


@pytest.mark.parametrize("power", [-110, -80, 70, 110])
@pytest.mark.parametrize("fractions", [(1.0, 0.8, 0.6), (0.5, 0.8, 1.0)])
def test_a_search_does_not_depend_on_magnitude(key, power, fractions):
    """Squares of errors stay inside float32: the same fraction wins at every power of two."""
    x = jax.random.normal(key, (4, 64))
    search = lambda x: scaling.CandidateSearch(fractions)(x, formats.INT2, (1,))
    np.testing.assert_array_equal(search(x * 2.0**power), search(x) * 2.0**power)
    assert (search(x) != scaling.absmax(x, formats.INT2, (1,))).any()
