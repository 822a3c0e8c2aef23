"""Float formats against ml_dtypes: every bit pattern, the special codes, and the derived numbers."""

import ml_dtypes
import numpy as np
import pytest

from lowbit_jax import formats
from lowbit_jax.formats import FloatFormat

FLOATS = [formats.get(name) for name in formats.names() if isinstance(formats.get(name), FloatFormat)]
WITH_DTYPE = [fmt for fmt in FLOATS if fmt.dtype is not None]
SMALL_DTYPES = [name for name in dir(ml_dtypes) if name.startswith(("float4", "float6", "float8"))]
over_floats = pytest.mark.parametrize("fmt", WITH_DTYPE, ids=lambda fmt: fmt.name)


def every_pattern(fmt: FloatFormat) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.arange(2**fmt.bits, dtype=np.uint8).view(fmt.dtype).astype(np.float64)


def test_every_small_float_of_ml_dtypes_is_here():
    assert sorted(SMALL_DTYPES) == sorted(fmt.dtype_name for fmt in WITH_DTYPE)


@over_floats
def test_levels_are_the_finite_values_of_all_bit_patterns(fmt):
    patterns = every_pattern(fmt)
    np.testing.assert_array_equal(fmt.levels, np.unique(patterns[np.isfinite(patterns)]))


@over_floats
def test_derived_numbers_are_those_of_finfo(fmt):
    info = ml_dtypes.finfo(fmt.dtype)
    assert (fmt.bits, fmt.mantissa_bits, fmt.max_finite) == (info.bits, info.nmant, float(info.max))
    assert fmt.min_exponent == np.log2(float(info.smallest_normal))
    assert fmt.has_zero == (0.0 in every_pattern(fmt))
    assert fmt.max_exponent == np.floor(np.log2(float(info.max)))


@over_floats
def test_special_codes_are_those_that_ml_dtypes_writes(fmt):
    patterns = every_pattern(fmt)
    assert fmt.has_inf == bool(np.isinf(patterns).any())
    assert fmt.has_nan == bool(np.isnan(patterns).any())
    assert fmt.negative_zero == bool((np.signbit(patterns) & (patterns == 0)).any())
    if fmt.has_nan:
        with np.errstate(invalid="ignore"):
            assert fmt.nan_code == np.float32(np.nan).astype(fmt.dtype).view(np.uint8)
    else:
        assert fmt.nan_code is None
    assert patterns[fmt.inf_code] == (np.inf if fmt.has_inf else fmt.max_finite)


def test_e3m0_is_seven_powers_of_two_of_each_sign_and_zero():
    """Chmiel et al. 2021, arXiv:2112.10769: one sign, three exponent and no mantissa bits."""
    positive = np.array([level for level in formats.E3M0.levels if level > 0])
    assert formats.E3M0.bits == 4 and formats.E3M0.symmetric and formats.E3M0.has_zero
    np.testing.assert_array_equal(positive[1:] / positive[:-1], np.full(6, 2.0))


def test_a_float_format_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="'wrong' has 4 bits and max_finite 7.0"):
        FloatFormat(name="wrong", exponent_bits=2, mantissa_bits=1, bias=1, max_finite=7.0, source="none")
    with pytest.raises(ValueError, match="9 bits"):
        FloatFormat(name="wide", exponent_bits=5, mantissa_bits=3, bias=15, max_finite=57344.0, source="none")
    with pytest.raises(ValueError, match="subnormals=False, which only E8M0 has"):
        FloatFormat(
            name="flushed", exponent_bits=2, mantissa_bits=1, bias=1, max_finite=6.0, subnormals=False, source="none"
        )


def test_infinity_and_nan_need_a_mantissa():
    with pytest.raises(ValueError, match="share an exponent.*Give it one"):
        formats.FloatFormat(
            name="e3m0_both",
            exponent_bits=3,
            mantissa_bits=0,
            bias=3,
            max_finite=8.0,
            source="here",
            has_inf=True,
            has_nan=True,
        )
