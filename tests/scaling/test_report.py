"""The report against NumPy in float64, and an outlier that a whole-tile figure would hide."""

import jax
import jax.numpy as jnp
import numpy as np

import lowbit_jax as lb


def decibels(x, error):
    return 20 * np.log10(np.linalg.norm(x, axis=-1) / np.linalg.norm(error, axis=-1))


def test_figures_of_each_row(key):
    x = jax.random.normal(key, (4, 256)) * jnp.geomspace(1e-25, 1e25, 4)[:, None]
    quantizer = lb.Quantizer(format=lb.formats.INT4)
    report, near = quantizer.report(x), np.asarray(quantizer(x), np.float64)
    x64 = np.asarray(x, np.float64)
    assert report.sqnr.shape == (4, 1)
    np.testing.assert_allclose(report.sqnr[:, 0], decibels(x64, near - x64), atol=1e-3)
    at = np.abs(x64).argmax(1)
    others = np.stack([np.delete(row, i) for row, i in zip(x64, at, strict=True)])
    error = np.stack([np.delete(row, i) for row, i in zip(near - x64, at, strict=True)])
    np.testing.assert_allclose(report.rest[:, 0], decibels(others, error), atol=1e-3)
    np.testing.assert_allclose(report.outlier_ratio[:, 0], np.abs(x64).max(1) / np.sqrt((others**2).mean(1)), rtol=1e-4)
    assert not report.flagged


def test_an_outlier_of_1e4_sigma_is_flagged_and_loses_only_its_own_group(key):
    """Absmax keeps the outlier and rounds the 31 others of its group to zero: 0 dB, though the tile as a whole has
    80; the other groups keep what INT8 by absmax gives Gaussians, above 40 dB."""
    x = jax.random.normal(key, (2, 128)).at[1, 40].set(1e4)
    report = lb.Quantizer(tiling=lb.scaling.Group(32)).report(x)
    assert report.flagged == [(1, 1, 0)] and "1 flagged: (1, 1, 0)" in str(report)
    rest = np.asarray(report.rest).reshape(2, 4)
    assert abs(rest[1, 1]) < 0.5 and np.asarray(report.sqnr).reshape(2, 4)[1, 1] > 60
    assert np.delete(rest.reshape(-1), 5).min() > 38
    assert not lb.Quantizer(tiling=lb.scaling.Group(32), rotation=lb.Hadamard(32)).report(x).flagged


def test_tiles_without_a_spread():
    x = jnp.stack([jnp.zeros(8), jnp.ones(8), jnp.ones(8).at[3].set(jnp.nan), jnp.zeros(8).at[2].set(3.0)])
    report = lb.Quantizer().report(x)
    np.testing.assert_array_equal(report.outlier_ratio[:, 0], [0, 1, np.nan, np.inf])
    assert report.flagged == [(2, 0), (3, 0)] and np.isinf(report.sqnr[0, 0])
    assert str(lb.Quantizer().report(jnp.zeros((0, 8)))) == "0 tiles"
