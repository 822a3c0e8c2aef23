"""Absmax integers for each row in float64 NumPy: what `lb.methods.get("absmax_integer", bits=4)` quantizes to."""

import numpy as np

import lowbit_jax as lb

INT4 = lb.methods.get("absmax_integer", bits=4)


def fake_int4(x, axis):
    """Codes -8..7 times the scale max|x| / 7 along `axis`."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(axis=axis, keepdims=True) / 7
    return np.clip(np.round(x / scale), -8, 7) * scale


def assert_sums_equal(actual, lhs, rhs, product=np.matmul):
    """`actual` is the float32 product of the float64 operands: within K eps times the sum of magnitudes.

    The factor 4 covers the roundings of the scales and of the dequantized operands."""
    length = lhs.shape[-1]
    expected, magnitude = product(lhs, rhs), product(np.abs(lhs), np.abs(rhs))
    assert np.all(np.abs(np.asarray(actual, np.float64) - expected) <= 4 * length * 2.0**-24 * magnitude)
