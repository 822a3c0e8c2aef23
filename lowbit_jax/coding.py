"""Grid values to codes and back: `decode(encode(values, fmt), fmt) == values`, one uint8 a code.

Code of an element, by format: integers `value - low`; mid-rise `value + (2**bits - 1)/2`; floats their bit pattern as
in ml_dtypes; codebooks the rank of the value.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from lowbit_jax.formats.base import Codebook, FloatFormat, Format, IntFormat, MidRiseFormat


def encode(values: Float[Array, "*s"], fmt: Format) -> UInt8[Array, "*s"]:
    """The code of each value; the values must be on the grid, as the functions of `rounding` return them.

    NaN gets the NaN code of the format, or code 0 where it has none (a NaN scale then keeps the tile NaN). Infinities
    get the infinity code, or that of the largest magnitude. -0 is kept by floats that have it, else it is 0."""
    if not hasattr(values, "astype"):
        raise TypeError(f"coding.encode got a {type(values).__name__}; it takes arrays: pass jnp.asarray(values).")
    x = values.astype(jnp.float32)
    match fmt:
        case IntFormat():
            code = jnp.clip(x, fmt.low, fmt.high) - fmt.low
        case MidRiseFormat():
            code = jnp.clip(x, fmt.min_finite, fmt.max_finite) + fmt.max_finite
        case FloatFormat():
            return _encode_float(x, fmt)
        case Codebook():
            code = jnp.searchsorted(jnp.asarray(fmt.levels[1:], jnp.float32), x, side="right")
        case _:
            raise _not_a_format("encode", fmt)
    return jnp.where(jnp.isnan(x), 0, code).astype(jnp.uint8)


def decode(codes: UInt8[Array, "*s"], fmt: Format) -> Float[Array, "*s"]:
    """The value of each code in float32, exactly; codebook values are rounded to float32.

    A code that `encode` never gives (an integer format of 3 values has a fourth 2-bit code) decodes to a number beyond
    the grid, or in a codebook to its largest value. Raises: TypeError for codes that are not uint8."""
    if getattr(codes, "dtype", None) != jnp.uint8:
        kind = f"an array of {codes.dtype}" if hasattr(codes, "dtype") else f"a {type(codes).__name__}"
        raise TypeError(f"coding.decode got {kind}; it takes uint8: the codes of coding.encode, or of packing.unpack.")
    match fmt:
        case IntFormat():
            return codes.astype(jnp.float32) + fmt.low
        case MidRiseFormat():
            return codes.astype(jnp.float32) - fmt.max_finite
        case FloatFormat():
            return _decode_float(codes.astype(jnp.int32), fmt)
        case Codebook():
            table = jnp.asarray(np.asarray(fmt.levels, np.float32))
            return jnp.take(table, codes.astype(jnp.int32), mode="clip")
        case _:
            raise _not_a_format("decode", fmt)


def _encode_float(x: Float[Array, "*s"], fmt: FloatFormat) -> UInt8[Array, "*s"]:
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & _FLOAT32_MAGNITUDE
    dropped = _FLOAT32_MANTISSA - fmt.mantissa_bits
    code = (magnitude >> dropped) - ((127 - fmt.bias) << fmt.mantissa_bits)
    if fmt.subnormals:
        in_steps = (jnp.abs(x) * 2.0 ** (fmt.mantissa_bits - fmt.min_exponent)).astype(jnp.int32)
        code = jnp.where(magnitude < (fmt.min_exponent + 127) << _FLOAT32_MANTISSA, in_steps, code)
    code = jnp.where(magnitude == _FLOAT32_INF, fmt.inf_code, code)
    if fmt.signed:
        signed_zero = fmt.negative_zero | (code > 0)
        code = code | jnp.where((bits < 0) & signed_zero, jnp.int32(1 << (fmt.bits - 1)), jnp.int32(0))
    return jnp.where(magnitude > _FLOAT32_INF, fmt.nan_code or 0, code).astype(jnp.uint8)


def _decode_float(code: Array, fmt: FloatFormat) -> Float[Array, "*s"]:
    if not fmt.subnormals:  # in integers: 2**-127 is a float32 denormal, which arithmetic would flush to zero
        bits = jnp.where(code == 0, 1 << (_FLOAT32_MANTISSA - 1), code << _FLOAT32_MANTISSA)
        bits = jnp.where(code == fmt.nan_code, _FLOAT32_NAN, bits)
        return lax.bitcast_convert_type(bits, jnp.float32)
    magnitude = code & ((1 << (fmt.bits - fmt.signed)) - 1)
    bits = (magnitude + ((127 - fmt.bias) << fmt.mantissa_bits)) << (_FLOAT32_MANTISSA - fmt.mantissa_bits)
    normal = lax.bitcast_convert_type(bits, jnp.float32)
    subnormal = magnitude.astype(jnp.float32) * 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)
    value = jnp.where(magnitude < 1 << fmt.mantissa_bits, subnormal, normal)
    if fmt.has_inf:
        value = jnp.where(magnitude == fmt.inf_code, jnp.inf, value)
    if fmt.has_nan and fmt.negative_zero:
        value = jnp.where(magnitude > fmt.inf_code, jnp.nan, value)  # beyond the infinity or the largest value
    value = jnp.where(code != magnitude, -value, value)
    if fmt.has_nan and not fmt.negative_zero:
        value = jnp.where(code == fmt.nan_code, jnp.nan, value)
    return value


def _not_a_format(who: str, fmt) -> TypeError:
    return TypeError(
        f"coding.{who} got {fmt!r} for a format. It needs an IntFormat, MidRiseFormat, FloatFormat or Codebook: a"
        f" constant of lowbit_jax.formats, formats.get(name), or the `element` of a BlockFormat."
    )


_FLOAT32_MANTISSA = 23
_FLOAT32_MAGNITUDE = 0x7FFFFFFF
_FLOAT32_INF = 0x7F800000
_FLOAT32_NAN = 0x7FC00000
