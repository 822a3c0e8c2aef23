"""Floats of 4 to 8 bits to their bit patterns and back, in float32 bit arithmetic: the same bits inside a kernel on any
GPU, interpreted, and in XLA, whether or not the backend flushes denormals."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

_MANTISSA = 23  # of float32
_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_NAN = 0x7FC00000
_APART = 90  # even, so that ties stay; neither 0 nor 128, which callers add
_EXACT = 0x4B000000  # float32 2^23, whose unit in the last place is 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MiniFloat:
    """Sign, exponent and mantissa bits; codes above `max_code` are infinity and NaN where the format has them.

    Source: OCP Microscaling Formats (MX) v1.0, tables 2 to 5; OCP 8-bit Floating Point Specification v1.0, table 1."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    max_code: int  # of the largest finite value
    inf_code: int | None = None
    nan_code: int | None = None

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        return 1 - self.bias

    @property
    def dropped(self) -> int:
        """Mantissa bits of a float32 that the format has not."""
        return _MANTISSA - self.mantissa_bits

    @property
    def max_bits(self) -> int:
        """The largest finite value as a float32 bit pattern."""
        return (self.max_code << self.dropped) + ((127 - self.bias) << _MANTISSA)

    @property
    def max_finite(self) -> float:
        return float(np.int32(self.max_bits).view(np.float32))

    @property
    def max_exponent(self) -> int:
        """floor(log2(max_finite)), `emax` of the MX specification."""
        return (self.max_bits >> _MANTISSA) - 127


E4M3 = MiniFloat(name="e4m3", exponent_bits=4, mantissa_bits=3, max_code=0x7E, nan_code=0x7F)
E5M2 = MiniFloat(name="e5m2", exponent_bits=5, mantissa_bits=2, max_code=0x7B, inf_code=0x7C, nan_code=0x7E)
E3M2 = MiniFloat(name="e3m2", exponent_bits=3, mantissa_bits=2, max_code=0x1F)
E2M3 = MiniFloat(name="e2m3", exponent_bits=2, mantissa_bits=3, max_code=0x1F)
E2M1 = MiniFloat(name="e2m1", exponent_bits=2, mantissa_bits=1, max_code=0x07)


def bits_of(x: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """The bit pattern of float32 numbers, as int32."""
    return lax.bitcast_convert_type(x, jnp.int32)


def magnitude_bits(x: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """The bit pattern of |x|. Such integers are in the order of the magnitudes, infinity and NaN above all numbers, so
    that their maximum keeps a NaN."""
    return bits_of(x) & 0x7FFFFFFF


def number_of(bits: Int[Array, "*s"]) -> Float[Array, "*s"]:
    """The float32 number of a bit pattern."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def flush(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """float32 with denormals as zeros of their sign, as XLA's CPU backend has them."""
    bits = bits_of(x)
    return number_of(jnp.where((bits & _MAGNITUDE) < (1 << _MANTISSA), bits & ~_MAGNITUDE, bits))


def encode(u: Float[Array, "*s"], fmt: MiniFloat, words: UInt32[Array, "*s"] | None = None) -> Int[Array, "*s"]:
    """The code of each float32, int32: the nearest value with ties to even, or with random words one of its two
    neighbors.

    The upper neighbor (in magnitude) has the probability of the distance from the lower one in steps, to 2^-20 of a
    step. Values beyond the grid saturate, infinities too. NaN gets the NaN code, or 0 where the format has none; -0
    stays."""
    bits = bits_of(u)
    magnitude = bits & _MAGNITUDE
    kept = jnp.minimum(magnitude, fmt.max_bits)
    # A code with `dropped` bits of fraction: exponent re-biased, mantissa as it is; linear below the smallest normal.
    normal = kept - ((127 - fmt.bias) << _MANTISSA)
    below = kept < (fmt.min_exponent + 127) << _MANTISSA
    if words is None:
        even = (normal >> fmt.dropped) & 1
        rounded = (normal + ((1 << (fmt.dropped - 1)) - 1) + even) >> fmt.dropped
        magic = float(2.0 ** (_MANTISSA + fmt.min_exponent - fmt.mantissa_bits))  # its last place is the smallest step
        linear = bits_of(number_of(kept) + magic) - int(np.float32(magic).view(np.int32))
        code = jnp.where(below, linear, rounded)
    else:
        smallest = 2.0**fmt.min_exponent
        linear = (jnp.minimum(number_of(kept), smallest) * (2.0**_MANTISSA / smallest)).astype(jnp.int32)
        noise = lax.shift_right_logical(words, jnp.uint32(32 - fmt.dropped)).astype(jnp.int32)
        code = (jnp.where(below, linear, normal) + noise) >> fmt.dropped
    code = code | (lax.shift_right_logical(bits, jnp.int32(31)) << (fmt.bits - 1))
    return jnp.where(magnitude > _INFINITY, fmt.nan_code or 0, code)


def decode(codes: Int[Array, "*s"], fmt: MiniFloat) -> Float[Array, "*s"]:
    """The float32 value of each int32 code, exactly."""
    magnitude = codes & ((1 << (fmt.bits - 1)) - 1)
    linear = (number_of(magnitude | _EXACT) - 2.0**_MANTISSA) * 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)
    normal = (magnitude << fmt.dropped) + ((127 - fmt.bias) << _MANTISSA)
    bits = jnp.where(magnitude < 1 << fmt.mantissa_bits, bits_of(linear), normal)
    if fmt.inf_code is not None:
        bits = jnp.where(magnitude == fmt.inf_code, _INFINITY, bits)
    if fmt.nan_code is not None:
        bits = jnp.where(magnitude > (fmt.max_code if fmt.inf_code is None else fmt.inf_code), _NAN, bits)
    return number_of(bits | ((codes >> (fmt.bits - 1)) << 31))


def nearest_integer(x: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """The nearest int32 to a float32 of magnitude up to 2^21, ties to even, by one addition.

    What is added is 1.5 * 2^23 and `_APART`: else the lowest byte of the sum would be that of the integer, and where
    one is stored, the assembler of CUDA 12.8 to 13.0 converts the float to a byte instead (255, whatever it is)."""
    return bits_of(x + float(12582912 + _APART)) - (0x4B400000 + _APART)


def up_or_down(x: Float[Array, "*s"], words: UInt32[Array, "*s"]) -> Int[Array, "*s"]:
    """The int32 below x, or with probability x - floor(x), to 2^-24, the next; x of magnitude up to 2^22."""
    lower = jnp.floor(x)
    part = ((x - lower) * 2.0**24).astype(jnp.int32)
    noise = lax.shift_right_logical(words, jnp.uint32(8)).astype(jnp.int32)
    return lower.astype(jnp.int32) + (noise < part).astype(jnp.int32)
