"""Scale formats against ml_dtypes and against the OCP definitions in exact integer arithmetic."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax import formats, scaling
from lowbit_jax.formats import E2M1, E4M3

# One program for each call, which compiles in a fraction of what its operations take one by one.
fakely = jax.jit(lambda quantizer, x: quantizer(x), static_argnums=0)
pack = jax.jit(lambda quantizer, x: quantizer.quantize(x), static_argnums=0)
error_of = jax.jit(lambda quantizer, x: jnp.mean((quantizer(x) - x) ** 2), static_argnums=0)


@pytest.fixture(scope="module")
def gaussian():
    return jax.random.normal(jax.random.key(0), (1024, 1024))


def exact_exponent(amax: float, fmt, mode: str) -> int:
    """The power that OCP MX v1.0 section 6.3 and its variants choose, by `math.frexp` on the largest magnitude."""
    emax = math.frexp(fmt.max_finite)[1] - 1
    fraction, exponent = math.frexp(amax)
    floor = exponent - 1
    match mode:
        case "floor":
            return floor - emax
        case "ceil":
            return floor - emax + (fraction != 0.5)
        case "rceil":
            f, e = math.frexp(float(np.float32(amax) * np.float32(1 / fmt.max_finite)))
            return e - 1 + (f != 0.5)
        case "even":
            return floor - emax + (2 * fraction >= 2 - 2.0 ** -(fmt.mantissa_bits + 1))
    raise AssertionError(mode)


@pytest.mark.parametrize("mode", ["floor", "ceil", "rceil", "even"])
@pytest.mark.parametrize("fmt", [E2M1, E4M3], ids=lambda f: f.name)
def test_e8m0_modes(mode, fmt):
    """At and beside every power of two and every point where a mode changes its mind."""
    base = np.array([1.0, 1.25, 1.5, 1.75, 1.875, 1.9375, 1.96875, 1.0625], np.float32)
    amax = np.concatenate([base * np.float32(2.0) ** k for k in (-20, -3, 0, 2, 9)])
    if mode != "even":  # the scale carries amax to one unit in the last place, and there "even" changes its mind
        amax = np.concatenate([amax, np.nextafter(amax, np.float32(0)), np.nextafter(amax, np.float32(np.inf))])
    quantizer = lb.Quantizer(
        format=fmt, fit=scaling.absmax, scale_format=scaling.PowerOfTwo(mode), tiling=scaling.PerRow()
    )
    stored = np.asarray(pack(quantizer, amax[:, None]).scales[0])
    expected = [exact_exponent(float(a), fmt, mode) + 127 for a in amax]
    wrong = [(a, int(s), e) for a, s, e in zip(amax, stored[:, 0], expected, strict=True) if int(s) != e]
    assert not wrong, wrong[:5]


def test_e8m0_codes_load_as_ml_dtypes_reads_them():
    codes = np.arange(256, dtype=np.uint8)
    ours = np.asarray(scaling.PowerOfTwo().load((jnp.asarray(codes),)))
    theirs = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(ours[1:], theirs[1:])
    assert ours[0] == 0  # here the code of a tile of zeros; in the format it is 2^-127, a float32 denormal


def test_two_level_scales_are_e4m3_under_one_float32(key):
    x = np.asarray(jax.random.normal(key, (64, 256))) * np.geomspace(0.01, 10, 64, dtype=np.float32)[:, None]
    quantized = pack(lb.block_quantizer(formats.NVFP4), x)
    tile, tensor = quantized.scales
    assert tile.dtype == jnp.float8_e4m3fn and tensor.shape == ()
    amax = np.abs(x).reshape(64, 16, 16).max(-1)
    np.testing.assert_allclose(float(tensor), amax.max() / (6 * 448), rtol=1e-6)
    expected = (amax / 6 / float(tensor)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ours = np.asarray(tile).astype(np.float32).reshape(64, 16)
    np.testing.assert_allclose(ours, expected, rtol=0.07)  # one E4M3 step where float32 rounding decides a tie
    assert (ours != expected).mean() < 1e-2
    assert quantized.bits_per_element == pytest.approx(4.5 + 32 / x.size)


@pytest.mark.parametrize(
    ("name", "expected"),  # METHODS 6.1, Monte Carlo of 2^21 samples
    [("mxfp4", 0.01322), ("nvfp4", 0.00903), ("mxfp8", 8.62e-4), ("mxfp8_e5m2", 2.916e-3), ("mxfp6_e2m3", 8.06e-4),
     ("mxfp6_e3m2", 2.916e-3), ("msfp12", 0.01371), ("msfp16", 5.28e-5), ("hbfp4", 0.0203)],
)  # fmt: skip
def test_block_formats_lose_what_they_should_of_a_gaussian(gaussian, name, expected):
    error = float(error_of(lb.block_quantizer(formats.get(name)), gaussian))
    np.testing.assert_allclose(error, expected, rtol=0.015)


@pytest.mark.parametrize(
    ("mode", "expected"), [("floor", 0.01322), ("ceil", 0.0208), ("rceil", 0.0133), ("even", 0.01252)]
)
def test_mxfp4_modes_lose_what_they_should(gaussian, mode, expected):
    quantizer = lb.block_quantizer(formats.MXFP4, scale_format=scaling.PowerOfTwo(mode))
    np.testing.assert_allclose(float(error_of(quantizer, gaussian)), expected, rtol=0.015)


def test_four_over_six(gaussian):
    """.00755 when the choice sees the rounded scales; ours is made before, .0077, still well below the plain .00903."""
    quantizer = lb.block_quantizer(
        formats.NVFP4, fit=scaling.CandidateSearch(fractions=(1.0, 1.5)), scale_format=scaling.TwoLevel(cap=256.0)
    )
    assert 0.00755 * 0.985 < float(error_of(quantizer, gaussian)) < 0.0078


def test_a_tiny_tile_keeps_a_scale_above_zero():
    x = np.float32([[1e-9], [1e3]]).repeat(16, axis=1)
    back = pack(lb.block_quantizer(formats.NVFP4), x)
    assert float(np.asarray(back.scales[0]).astype(np.float32).min()) > 0


def test_unknown_mode():
    with pytest.raises(ValueError, match="floor, ceil, rceil, even and nearest"):
        scaling.PowerOfTwo("round")


def test_two_levels_leave_zero_tiles_out_and_keep_faults_in_their_tile(key):
    """A tile of zeros says nothing about the tensor's scale, and an infinity spoils its own tile only."""
    quantizer = lb.block_quantizer(formats.NVFP4)
    x = np.asarray(jax.random.normal(key, (4, 64))) * np.float32(1e-6)
    plain = np.asarray(fakely(quantizer, x))
    some_zeros, some_infinite = x.copy(), x.copy()
    some_zeros[0, :16], some_infinite[2, 3] = 0, np.inf
    with_zeros = np.asarray(fakely(quantizer, some_zeros))
    assert not with_zeros[0, :16].any()
    np.testing.assert_allclose(with_zeros[1:], plain[1:], rtol=0.08)  # the largest tile may have been among them
    spoiled = np.asarray(fakely(quantizer, some_infinite))
    assert np.isnan(spoiled[2, :16]).all() and np.isfinite(np.delete(spoiled.reshape(16, 16), 8, 0)).all()


class TestCastScale:
    def test_saturates_and_keeps_a_smallest_value(self):
        scale = jnp.asarray([1e-30, 1e-5, 1.0, 1e30, 0.0, jnp.inf, jnp.nan], jnp.float32)
        half = scaling.CastScale("float16")
        loaded = np.asarray(half.load(half.store(scale, E2M1)))
        np.testing.assert_array_equal(loaded, np.float32([2.0**-24, np.float16(1e-5), 1, 65504, 0, np.nan, np.nan]))
        largest = scaling.BFLOAT16.load(scaling.BFLOAT16.store(jnp.full((1,), 3.4e38, jnp.float32), E2M1))
        assert np.isfinite(largest).all()

    def test_takes_a_dtype_or_its_name(self):
        assert scaling.CastScale(jnp.bfloat16) == scaling.BFLOAT16

    @pytest.mark.parametrize("dtype", ["int8", "float33", "float64", "float4_e2m1fn", "float8_e8m0fnu", 3])
    def test_other_dtypes(self, dtype):
        with pytest.raises(ValueError, match="floating dtype of at most 32 bits"):
            scaling.CastScale(dtype)


@pytest.mark.parametrize("mode", ["floor", "ceil", "rceil", "nearest"])
@pytest.mark.parametrize("fmt", [E2M1, E4M3, formats.MIDRISE1], ids=lambda f: f.name)
def test_a_power_of_two_keeps_the_largest_level_finite(fmt, mode):
    q = lb.Quantizer(format=fmt, scale_format=scaling.PowerOfTwo(mode))
    x = jnp.asarray([[3.4028234e38, -3e38, 1e38, 0.0]], jnp.float32)
    fake, back = jax.jit(lambda x: (q(x), q.quantize(x).dequantize()))(x)
    assert np.isfinite(fake).all()
    np.testing.assert_array_equal(back, fake)


def test_bad_two_level():
    for cap in (-1, 0, 449.0, float("nan")):
        with pytest.raises(ValueError, match="up to 448"):
            scaling.TwoLevel(cap=cap)
    with pytest.raises(TypeError, match="small float with a NaN"):
        scaling.TwoLevel(E2M1)


def test_a_power_of_two_for_a_grid_without_positive_levels():
    for mode in ("floor", "ceil", "rceil", "even", "nearest"):
        quantizer = lb.Quantizer(format=formats.INT1, scale_format=scaling.PowerOfTwo(mode))
        np.testing.assert_array_equal(quantizer(jnp.asarray([[-1.0, -0.2, 0.0]])), [[-1, 0, 0]])


def test_a_block_format_without_a_tensor_scale_keeps_its_scale_format(gaussian):
    """NVFP4 with E4M3 scales alone: the same as the scale of a tensor that is 1, by ml_dtypes."""
    fmt = dataclasses.replace(formats.NVFP4, tensor_scale=False)
    got = np.asarray(lb.block_quantizer(fmt)(gaussian))
    tiles = np.asarray(gaussian).reshape(-1, 16)
    scale = (np.abs(tiles).max(1, keepdims=True) / 6).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected = (tiles / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
    np.testing.assert_allclose(got.reshape(tiles.shape), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e5m2"])
def test_nothing_not_finite_on_the_way(dtype):
    """`jax_debug_nans` stops at a NaN that is made and then left out, too."""
    with jax.debug_nans(True):
        stored = scaling.CastScale(dtype).store(jnp.asarray([0.0, 1.0, 3.0]), formats.INT8)
    np.testing.assert_array_equal(np.asarray(stored[0], np.float32), [0, 1, 3])
    assert np.isnan(np.asarray(scaling.CastScale(dtype).store(jnp.asarray([jnp.nan]), formats.INT8)[0], np.float32))
