"""Codes: every level of every format there and back, float codes bit for bit those of ml_dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import coding, formats, rounding
from lowbit_jax.formats import BlockFormat, FloatFormat

# Left out to compile less: the same code as formats that are in, with another constant.
SAME = (
    "uint2 uint3 uint5 uint6 uint7 midtread3 midtread5 midtread6 midtread7 lloyd_max5 lloyd_max6 lloyd_max7 posit8_es1"
).split()
ELEMENTS = [
    fmt for fmt in map(formats.get, formats.names()) if not isinstance(fmt, BlockFormat) and fmt.name not in SAME
]
WITH_DTYPE = [fmt for fmt in ELEMENTS if isinstance(fmt, FloatFormat) and fmt.dtype is not None]
over_elements = pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda fmt: fmt.name)
over_floats = pytest.mark.parametrize("fmt", WITH_DTYPE, ids=lambda fmt: fmt.name)
encode = jax.jit(coding.encode, static_argnums=1)
decode = jax.jit(coding.decode, static_argnums=1)
nearest = jax.jit(rounding.nearest, static_argnums=1)


@functools.cache
def there_and_back(fmt) -> tuple[np.ndarray, np.ndarray]:
    """Codes of all levels and of inf, -inf, NaN, and what they decode to: one compilation for two tests."""
    values = np.float32([*fmt.levels, np.inf, -np.inf, np.nan])
    codes = encode(values, fmt)
    return np.asarray(codes), np.asarray(decode(codes, fmt))


@over_elements
def test_every_level_comes_back_and_has_its_own_code(fmt):
    codes, decoded = (part[:-3] for part in there_and_back(fmt))
    assert codes.dtype == np.uint8 and len(np.unique(codes)) == len(fmt.levels) and codes.max() < 2**fmt.bits
    np.testing.assert_array_equal(decoded, np.float32(fmt.levels))
    if not isinstance(fmt, FloatFormat):
        np.testing.assert_array_equal(codes, np.arange(len(fmt.levels)))


@over_floats
def test_float_codes_are_the_bit_patterns_of_ml_dtypes(fmt):
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        values = codes.view(fmt.dtype).astype(np.float32)
    real = ~np.isnan(values)  # of several NaN patterns only one is written, and the sign of a NaN says nothing
    decoded = np.asarray(decode(codes, fmt))
    np.testing.assert_array_equal(decoded, values)
    np.testing.assert_array_equal(np.signbit(decoded[real]), np.signbit(values[real]))
    np.testing.assert_array_equal(encode(values[real], fmt), codes[real])
    with np.errstate(invalid="ignore"):
        nan_code = np.float32(np.nan).astype(fmt.dtype).view(np.uint8) if fmt.has_nan else 0
    np.testing.assert_array_equal(encode(np.float32([np.nan, -np.nan]), fmt), [nan_code, nan_code])


@over_elements
def test_bad_values_never_wrap_to_another_part_of_the_grid(fmt):
    codes, decoded = there_and_back(fmt)
    up, down, nan = decoded[-3:]
    if isinstance(fmt, FloatFormat):
        assert up == (np.inf if fmt.has_inf else fmt.max_finite)
        assert down == -up or not fmt.signed
        assert np.isnan(nan) == fmt.has_nan
    else:
        np.testing.assert_array_equal([up, down], np.float32([fmt.max_finite, fmt.min_finite]))
        assert codes[-1] == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("fmt", [formats.INT8, formats.MIDRISE8, formats.E4M3], ids=lambda fmt: fmt.name)
def test_rounded_16_bit_arrays_have_the_codes_of_their_values(fmt, dtype):
    u = np.random.default_rng(0).normal(0, fmt.max_finite / 2, 64).astype(dtype)
    values = nearest(u, fmt)
    assert values.dtype == dtype
    np.testing.assert_array_equal(decode(encode(values, fmt), fmt), values.astype(jnp.float32))


def test_negative_zero_where_the_format_has_one():
    assert coding.encode(jnp.float32([-0.0]), formats.E4M3)[0] == 0x80
    assert coding.encode(jnp.float32([-0.0]), formats.E4M3FNUZ)[0] == 0  # 0x80 would be the NaN
    assert coding.encode(jnp.float32([-0.0]), formats.INT4)[0] == 8


def test_smallest_scale_of_e8m0_survives_although_it_is_a_denormal():
    codes = coding.encode(jnp.asarray(np.float32([2.0**-127, 2.0**-126, 1.0, 2.0**127])), formats.E8M0)
    np.testing.assert_array_equal(codes, [0, 1, 127, 254])
    bits = np.asarray(coding.decode(codes, formats.E8M0)).view(np.uint32)
    np.testing.assert_array_equal(bits, [1 << 22, 1 << 23, 127 << 23, 254 << 23])


def test_a_block_format_is_not_an_element_format():
    for function in (coding.encode, coding.decode):
        with pytest.raises(TypeError):
            function(jnp.zeros((2,), jnp.uint8 if function is coding.decode else jnp.float32), formats.MXFP4)


def test_what_is_no_array_of_values_or_codes():
    """Floats would decode to other numbers than anyone's."""
    with pytest.raises(TypeError, match="coding.encode got a list; it takes arrays"):
        coding.encode([1.0, 2.0], formats.INT4)
    for codes, seen in ((jnp.ones(2), "array of float32"), (jnp.ones(2, jnp.int32), "array of int32"), ([1], "a list")):
        with pytest.raises(TypeError, match=f"coding.decode got an? ?{seen.removeprefix('a ')}; it takes uint8"):
            coding.decode(codes, formats.INT4)
