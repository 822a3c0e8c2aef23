"""Rounding float32 to the dtype a parameter is kept in: nearest, or stochastic with a key.

The floats of 16 bits are rounded here, on the bits of float32; those of 8 and fewer through `rounding`. Written with
integers and powers of two, because XLA may drop a cast to a narrow float and back.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax import formats, rounding
from lowbit_jax.formats.base import FloatFormat

_F16_MANTISSA, _F16_LEAST_EXPONENT, _F16_MAX = 10, -14, 65504.0


def format_of(dtype) -> FloatFormat | None:
    """The catalogue's format of a float dtype of at most 8 bits, else None."""
    if jnp.dtype(dtype).itemsize > 1:
        return None
    found = formats.get(jnp.dtype(dtype).name)
    assert isinstance(found, FloatFormat)
    return found


def on_grid_of(x: Float[Array, "*s"], dtype, key: Array | None = None) -> Float[Array, "*s"]:
    """float32 values that `dtype` holds: nearest with ties to even, or, with a key, one of the two around `x` with the
    mean `x`. Saturates; NaN stays.

    Stochastic to bfloat16 is exact in 16 random bits: the probability of the upper neighbor is the dropped bits over
    2**16. Source: Gupta et al. 2015, arXiv:1502.02551."""
    dtype = jnp.dtype(dtype)
    if dtype.itemsize >= 4:
        return x
    if dtype == jnp.bfloat16:
        return _bfloat16(x, key)
    if dtype == jnp.float16:
        return _float16(x, key)
    fmt = format_of(dtype)
    assert fmt is not None, dtype
    return rounding.nearest(x, fmt) if key is None else rounding.stochastic(x, fmt, key)


def _bfloat16(x: Array, key: Array | None) -> Array:
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    if key is None:
        rest = jnp.uint32(0x7FFF) + ((bits >> 16) & jnp.uint32(1))
    else:
        rest = _sixteen_bits(key, x.shape)
    rounded = (bits + rest) & jnp.uint32(0xFFFF0000)
    rounded = jnp.where((rounded & jnp.uint32(0x7FFFFFFF)) >= jnp.uint32(0x7F800000), _largest(bits), rounded)
    return jnp.where(jnp.isnan(x), x, lax.bitcast_convert_type(rounded, jnp.float32))


def _sixteen_bits(key: Array, shape: tuple[int, ...]) -> Array:
    """Random bits, 16 for each element, as uint32; two elements of the last axis share a word where it is even."""
    if not shape or shape[-1] % 2:
        return jax.random.bits(key, shape, jnp.uint16).astype(jnp.uint32)
    words = jax.random.bits(key, (*shape[:-1], shape[-1] // 2), jnp.uint32)
    return lax.bitcast_convert_type(words, jnp.uint16).reshape(shape).astype(jnp.uint32)


def _largest(bits: Array) -> Array:
    return (bits & jnp.uint32(0x80000000)) | jnp.uint32(0x7F7F0000)


def _float16(x: Array, key: Array | None) -> Array:
    x = jnp.clip(x, -_F16_MAX, _F16_MAX)
    field = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(0xFF << 23)
    field = jnp.maximum(field, jnp.int32((_F16_LEAST_EXPONENT + 127) << 23)) - jnp.int32(_F16_MANTISSA << 23)
    step = lax.bitcast_convert_type(field, jnp.float32)
    steps = x * lax.bitcast_convert_type(jnp.int32(254 << 23) - field, jnp.float32)
    if key is None:
        return jnp.round(steps) * step
    lower = jnp.floor(steps)
    return (lower + (jax.random.uniform(key, x.shape) < steps - lower).astype(jnp.float32)) * step
