"""Bit patterns of small floats against ml_dtypes, at every decision point."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import minifloat
from tests.pallas_kernels.compiled import compiled

DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn, "e2m1": ml_dtypes.float4_e2m1fn,
}  # fmt: skip
decode = compiled(minifloat.decode)
encode = compiled(minifloat.encode)
FORMATS = [minifloat.E4M3, minifloat.E5M2, minifloat.E3M2, minifloat.E2M3, minifloat.E2M1]


def table(fmt):
    """The float32 value of every code, by ml_dtypes."""
    return np.arange(1 << fmt.bits, dtype=np.uint8).view(DTYPES[fmt.name]).astype(np.float32)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
class TestMiniFloat:
    def test_decodes_every_code(self, fmt):
        codes = jnp.arange(1 << fmt.bits, dtype=jnp.int32)
        got = np.asarray(decode(codes, fmt))
        np.testing.assert_array_equal(got, table(fmt))
        np.testing.assert_array_equal(np.signbit(got), np.arange(1 << fmt.bits) >= 1 << (fmt.bits - 1))
        assert fmt.max_finite == np.nanmax(table(fmt)[np.isfinite(table(fmt))])

    def test_rounds_to_nearest_even_at_every_midpoint(self, fmt):
        values = table(fmt)
        grid = np.unique(values[np.isfinite(values)])
        ties = (grid[1:] + grid[:-1]) / 2
        x = np.concatenate([grid, ties, np.nextafter(ties, -np.inf), np.nextafter(ties, np.inf)]).astype(np.float32)
        x = np.concatenate([x, [-0.0]]).astype(np.float32)
        expected = x.astype(DTYPES[fmt.name]).view(np.uint8)
        np.testing.assert_array_equal(encode(jnp.asarray(x), fmt), expected)

    def test_saturates_and_keeps_nan(self, fmt):
        x = jnp.asarray([fmt.max_finite * 1.2, 3e38, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
        sign = 1 << (fmt.bits - 1)
        expected = [fmt.max_code, fmt.max_code, fmt.max_code, fmt.max_code | sign, fmt.nan_code or 0]
        np.testing.assert_array_equal(encode(x, fmt), expected)

    def test_stochastic_takes_the_two_neighbors_at_the_thresholds(self, fmt):
        """The code is the lower neighbor's up to the random word at which the sum carries, and exactly from there."""
        grid = np.unique(np.abs(table(fmt)[np.isfinite(table(fmt))]))
        lower, upper = grid[:-1].repeat(3), grid[1:].repeat(3)
        part = np.tile([0.25, 0.5, 0.8125], len(grid) - 1)
        x = jnp.asarray(lower + part * (upper - lower), jnp.float32)
        steps = 1 << fmt.dropped
        last_down = np.round((1 - part) * steps).astype(np.uint32) - 1
        word = lambda draw: jnp.asarray(draw << (32 - fmt.dropped), jnp.uint32)
        value = lambda draw: decode(encode(x, fmt, word(draw)), fmt)
        np.testing.assert_array_equal(value(last_down), lower)
        np.testing.assert_array_equal(value(last_down + 1), upper)
        np.testing.assert_array_equal(encode(jnp.asarray(grid), fmt, jnp.uint32(2**32 - 1)),
                                      encode(jnp.asarray(grid), fmt))  # fmt: skip


def test_integers_from_floats():
    x = np.asarray([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127.5, 3.499, -128.0, 0.0], np.float32)
    np.testing.assert_array_equal(minifloat.nearest_integer(jnp.asarray(x)), np.round(x).astype(np.int32))
    drawn = lambda word: np.asarray(
        minifloat.up_or_down(jnp.asarray([2.25, -2.25, 3.0], jnp.float32), jnp.uint32(word))
    )
    np.testing.assert_array_equal(drawn(0x3FFFFFFF), [3, -2, 3])
    np.testing.assert_array_equal(drawn(0x40000000), [2, -2, 3])
    np.testing.assert_array_equal(drawn(0xC0000000), [2, -3, 3])


def test_denormals_are_zeros_of_their_sign():
    x = np.asarray([1e-39, -1e-39, 2.0**-126, -0.0, np.nan], np.float32)
    got = np.asarray(minifloat.flush(jnp.asarray(x)))
    np.testing.assert_array_equal(got, np.asarray([0.0, -0.0, 2.0**-126, -0.0, np.nan], np.float32))
    np.testing.assert_array_equal(np.signbit(got[:4]), [False, True, False, True])
