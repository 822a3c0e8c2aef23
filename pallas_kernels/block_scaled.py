"""Block-scaled formats: MXFP8, MXFP6, MXFP4, MXINT8 (a power of two for 32 elements) and NVFP4 (E4M3 for 16, under a
float32).

    scale[m, j] = rounded( max_(k in block j) |x[m, k]| / max_finite ),   code[m, k] = round( x[m, k] / scale[m, j] )

One pass over x: the block's maximum, its scale, the elements and their packing. Words are the bit stream
"bitstream-le/1": code i of a row lies at bits `bits i ... bits (i+1) - 1` of its bytes, least significant first; so FP4
has two codes in a byte, FP6 four in three bytes. Float codes are bit patterns; the code of MXINT8 is the integer + 128,
and its scale is that of the integer (the specification's element is the integer / 64: add 6 to the scale's code, flip
the code's top bit). Denormal float32 numbers count as zeros, on every backend.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, UInt8, UInt32

from pallas_kernels import chips, launch, threefry
from pallas_kernels.checks import check_choice, check_matrix, check_offsets, check_out_dtype, check_shape, fail
from pallas_kernels.launch import Tile
from pallas_kernels.minifloat import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    MiniFloat,
    bits_of,
    decode,
    encode,
    flush,
    magnitude_bits,
    nearest_integer,
    number_of,
    up_or_down,
)  # fmt: skip

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
SCALE_MODES = ("floor", "ceil", "rceil", "even", "nearest")
NVFP4_BLOCK = 16
MX_BLOCK = 32
_INFINITY, _MANTISSA_ONES, _NAN_SCALE = 0x7F800000, (1 << 23) - 1, 255
_SQRT2_MANTISSA = 0x3504F3  # float32 mantissa of the largest value below the square root of 2


@dataclasses.dataclass(frozen=True, slots=True)
class _Int8:
    """Integers -128 to 127, code `value + 128`."""

    name: str = "int8"
    bits: int = 8
    mantissa_bits: int = 6  # of an integer of the top binade, as a float
    max_exponent: int = 6
    max_finite: float = 127.0


MX_FORMATS: dict[str, MiniFloat | _Int8] = {
    "mxfp8": E4M3, "mxfp8_e5m2": E5M2, "mxfp6_e2m3": E2M3, "mxfp6_e3m2": E3M2, "mxfp4": E2M1, "mxint8": _Int8(),
}  # fmt: skip

_FP8 = {E4M3: jnp.float8_e4m3fn, E5M2: jnp.float8_e5m2}


def quantize_mx(
    x: Float[Array, "m k"],
    *,
    format: str,
    scale_mode: str = "floor",
    key: UInt32[Array, "2"] | None = None,
    cast: bool = False,
    tile: Tile | None = None,
    impl: str = "triton",
) -> tuple[UInt8[Array, "m bytes"], UInt8[Array, "m blocks"]]:
    """The packed codes of x and its E8M0 scales, 2^(scale - 127), one for 32 elements of a row.

    format: a key of `MX_FORMATS`. scale_mode, with amax the block's maximum: floor, 2^(floor(log2 amax) - emax), the
    OCP rule, where the top may saturate; ceil; rceil, the least power that saturates nothing; even, floor after amax
    was rounded to the element's mantissa; nearest, in the logarithm, to amax / max_finite. amax is max_finite times
    that quotient, as if the scale alone were known: up to two last places from where the power changes ("even" and
    "rceil" change inside a binade) it may be that of the other side. Rounding is to nearest, ties
    to even, or stochastic under the two words of `key`. A block of zeros has scale 127 (1); one with NaN or infinity
    has scale 255 and NaN codes (0 where the format has none). cast: convert to FP8 by the chip's instruction, which
    sm_89 and later have, instead of by bit arithmetic; the same codes with a quarter fewer instructions.
    Reference: `impl="xla"`, bit for bit.
    Raises: ValueError for an unknown format or mode, K that 32 does not divide, or a cast that cannot take effect (a
    format that is not FP8, stochastic rounding); NoKernel for a cast on a chip without FP8; TypeError for dtypes.
    Source: OCP Microscaling Formats (MX) v1.0, sections 5 and 6.3."""
    who = "quantize_mx"
    element = _mx_element(who, format)
    check_choice(who, "scale_mode", scale_mode, SCALE_MODES)
    if cast and (element not in _FP8 or key is not None):
        fail(who, f"got cast=True for {format}{'' if key is None else ' with a key'}",
             "Chips convert to FP8, to nearest; drop the argument")  # fmt: skip
    if cast and impl == "triton":
        chips.check_fp8(f"{who} with cast=True", "Drop the argument: bit arithmetic gives the same codes")
    _check(who, x, MX_BLOCK, key, impl)
    make = functools.partial(_mx_block, element=element, mode=scale_mode, cast=cast)
    if impl == "xla":
        return _quantized(x, key, make, element)
    codes, scales = _run_quantize(x, key, None, make, element, MX_BLOCK, f"quantize_{format}", tile, impl)
    return codes, scales


def quantize_nvfp4(
    x: Float[Array, "m k"],
    tensor_scale: Float[Array, ""] | None = None,
    *,
    key: UInt32[Array, "2"] | None = None,
    tile: Tile | None = None,
    impl: str = "triton",
) -> tuple[UInt8[Array, "m bytes"], UInt8[Array, "m blocks"], Float[Array, ""]]:
    """The packed E2M1 codes of x, the E4M3 bits of a scale for 16 elements of a row, and the float32 scale of the
    tensor.

    value = code * scale * tensor_scale. tensor_scale: by default the one that puts the largest block scale on 448, from
    the finite blocks that are not zero (a pass over x of its own); give one, of an earlier step say, to save that pass.
    A block scale that would round to 0 is kept at 2^-9, one above 448 saturates. A block with NaN or infinity has the
    NaN scale. Rounding as in `quantize_mx`.
    Reference: `impl="xla"`, bit for bit on the same backend (GPUs divide to 2 units in the last place, CPUs exactly).
    Raises: ValueError when 16 does not divide K, TypeError for dtypes.
    Source: NVIDIA 2025, arXiv:2509.25149, section 2."""
    who = "quantize_nvfp4"
    _check(who, x, NVFP4_BLOCK, key, impl)
    if tensor_scale is None:
        tensor_scale = _tensor_scale(x)
    check_shape(who, "tensor_scale", tensor_scale, (), jnp.float32)
    if impl == "xla":
        codes, scales = _quantized(x, key, functools.partial(_nvfp4_block, tensor=tensor_scale), E2M1)
    else:
        codes, scales = _run_quantize(
            x, key, tensor_scale, _nvfp4_block, E2M1, NVFP4_BLOCK, "quantize_nvfp4", tile, impl
        )
    return codes, scales, tensor_scale


def dequantize_mx(
    words: UInt8[Array, "m bytes"],
    scales: UInt8[Array, "m blocks"],
    *,
    format: str,
    dtype=jnp.bfloat16,
    tile: Tile | None = None,
    impl: str = "triton",
) -> Float[Array, "m k"]:
    """code * 2^(scale - 127) in float32, rounded to dtype; NaN where the scale is 255.

    Raises: ValueError for an unknown format or words and scales whose sizes do not fit; TypeError for dtypes."""
    who = "dequantize_mx"
    element = _mx_element(who, format)
    k = _check_words(who, words, scales, element.bits, MX_BLOCK, dtype, impl)
    return _dequantize(words, scales, None, element, MX_BLOCK, k, dtype, f"dequantize_{format}", tile, impl)


def dequantize_nvfp4(
    words: UInt8[Array, "m bytes"],
    scales: UInt8[Array, "m blocks"],
    tensor_scale: Float[Array, ""],
    *,
    dtype=jnp.bfloat16,
    tile: Tile | None = None,
    impl: str = "triton",
) -> Float[Array, "m k"]:
    """code * (scale * tensor_scale) in float32, rounded to dtype.

    Raises: ValueError for words and scales whose sizes do not fit; TypeError for dtypes."""
    who = "dequantize_nvfp4"
    k = _check_words(who, words, scales, E2M1.bits, NVFP4_BLOCK, dtype, impl)
    check_shape(who, "tensor_scale", tensor_scale, (), jnp.float32)
    return _dequantize(words, scales, tensor_scale, E2M1, NVFP4_BLOCK, k, dtype, who, tile, impl)


def default_tile(k: int, block: int) -> Tile:
    """A tile whose columns divide k, of about 4096 elements."""
    columns = launch.dividing(k, (128, 64, 32, 16)) if block == NVFP4_BLOCK else launch.dividing(k, (128, 64, 32))
    return Tile(rows=4096 // columns, columns=columns, stages=1)


def cases() -> list[tuple]:
    """For a compile test: (name, function, argument shapes, {chip: part of its tensor-core instruction, or None})."""
    x, key = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.uint32)
    shape = lambda *size, dtype=jnp.uint8: jax.ShapeDtypeStruct(size, dtype)
    nothing = dict.fromkeys(("sm_80", "sm_90", "sm_100"))
    found = []
    for name, element in MX_FORMATS.items():
        words, scales = shape(4096, 4096 * element.bits // 8), shape(4096, 128)
        back = functools.partial(dequantize_mx, format=name)
        found += [(f"quantize_{name}", functools.partial(quantize_mx, format=name), (x,), nothing)]
        found += [(f"dequantize_{name}", back, (words, scales), nothing)]
    draw = lambda x, key, **options: quantize_mx(x, format="mxfp4", key=key, **options)
    found += [("quantize_mxfp4_stochastic", draw, (x, key), nothing)]
    casts = dict.fromkeys(("sm_89", "sm_90", "sm_100"))
    found += [("quantize_mxfp8_cast", functools.partial(quantize_mx, format="mxfp8", cast=True), (x,), casts)]
    tensor = shape(dtype=jnp.float32)
    found += [("quantize_nvfp4", quantize_nvfp4, (x, tensor), nothing)]
    found += [("dequantize_nvfp4", dequantize_nvfp4, (shape(4096, 2048), shape(4096, 256), tensor), nothing)]
    return found


def _mx_element(who: str, format: str) -> MiniFloat | _Int8:
    check_choice(who, "format", format, MX_FORMATS, " (NVFP4 has functions of its own)")
    return MX_FORMATS[format]


def _check(who, x, block, key, impl):
    launch.check_impl(who, impl)
    _, k = check_matrix(who, "x", x, DTYPES)
    if k % block:
        fail(who, f"got rows of {k} elements, which blocks of {block} do not divide", f"Pad them by {-k % block} zeros")
    if key is not None:
        threefry.check_key(who, key)


def _check_words(who, words, scales, bits, block, dtype, impl):
    launch.check_impl(who, impl)
    check_out_dtype(who, dtype, "dtype", DTYPES)
    m, blocks = check_matrix(who, "scales", scales, (jnp.uint8,))
    check_shape(who, "words", words, (m, blocks * block * bits // 8), jnp.uint8)
    return blocks * block


# What is done to a tile is written once: the kernel calls it on its block of x, the reference on the whole of x.


def _block_maximum(x: Float[Array, "rows columns"], block: int) -> Array:
    """Bit pattern of the largest magnitude of each block, [rows, blocks]; above infinity's for NaN."""
    rows, columns = x.shape
    return jnp.max(magnitude_bits(x).reshape(rows, columns // block, block), axis=2)


def _block_scale(amax: Array, max_finite: float) -> Float[Array, "rows blocks"]:
    """amax / max_finite, and 1 where that is zero."""
    scale = number_of(amax) * float(np.float32(1 / max_finite))
    return jnp.where(bits_of(scale) < 1 << 23, 1.0, scale)


def _mx_block(x, words, *, element, mode, cast):
    amax = _block_maximum(x, MX_BLOCK)
    scale = _block_scale(amax, element.max_finite)
    top = scale if mode == "nearest" else scale * element.max_finite
    field = (bits_of(top) + _carry(element, mode)) & _INFINITY
    below = 0 if mode == "nearest" else element.max_exponent
    exponent = jnp.clip(lax.shift_right_logical(field, jnp.int32(23)) - below, 1, 254)
    finite = (amax < _INFINITY) & (bits_of(top) < _INFINITY)
    inverse = number_of(jnp.where(finite, (254 - exponent) << 23, 0x7FC00000))
    codes = _encode(x, inverse, words, element, MX_BLOCK, cast)
    return codes, jnp.where(finite, exponent, _NAN_SCALE).astype(jnp.uint8)


def _carry(element: MiniFloat | _Int8, mode: str) -> int:
    """What is added to the mantissa before it is cut off."""
    if mode == "rceil":  # carries where the mantissa is above that of max_finite
        return _MANTISSA_ONES - (int(np.float32(element.max_finite).view(np.int32)) & _MANTISSA_ONES)
    if mode == "even":
        return 1 << (22 - element.mantissa_bits)
    return {"floor": 0, "ceil": _MANTISSA_ONES, "nearest": _MANTISSA_ONES - _SQRT2_MANTISSA}[mode]


def _nvfp4_block(x, words, *, tensor):
    amax = _block_maximum(x, NVFP4_BLOCK)
    scale = _block_scale(amax, E2M1.max_finite)
    code = encode(scale / tensor, E4M3)
    code = jnp.maximum(code, 1)  # no scale is 0
    code = jnp.where(amax < _INFINITY, code, E4M3.nan_code or 0)
    return _encode(x, 1.0 / (decode(code, E4M3) * tensor), words, E2M1, NVFP4_BLOCK), code.astype(jnp.uint8)


def _encode(x, inverse, words, element, block, cast=False):
    rows, columns = x.shape
    u = (x.reshape(rows, columns // block, block) * inverse[:, :, None]).reshape(rows, columns)
    if cast:
        narrow = jnp.clip(u, -element.max_finite, element.max_finite).astype(_FP8[element])
        return jnp.where(u == u, lax.bitcast_convert_type(narrow, jnp.uint8).astype(jnp.int32), element.nan_code or 0)
    if isinstance(element, MiniFloat):
        return encode(u, element, words)
    clipped = jnp.clip(u, -128.0, 127.0)
    code = (nearest_integer(clipped) if words is None else up_or_down(clipped, words)) + 128
    return jnp.where(u == u, code, 0)


def _tensor_scale(x):
    amax = _block_maximum(flush(x.astype(jnp.float32)), NVFP4_BLOCK)
    scale = number_of(jnp.where(amax < _INFINITY, amax, 0)) * float(np.float32(1 / E2M1.max_finite))
    tensor = jnp.max(scale) * float(np.float32(1 / E4M3.max_finite))
    return jnp.where(bits_of(tensor) < 1 << 23, 1.0, tensor)


def _packed(codes, bits):
    """uint8 arrays that hold the codes: one, or for 6 bits the three bytes of every four codes."""
    rows, columns = codes.shape
    if bits == 8:
        return [codes.astype(jnp.uint8)]
    each = 2 if bits == 4 else 4
    shift = bits * lax.broadcasted_iota(jnp.int32, (1, 1, each), 2)
    group = codes.reshape(rows, columns // each, each)
    together = jnp.sum(lax.shift_left(*jnp.broadcast_arrays(group, shift)), axis=2, dtype=jnp.int32)
    if bits == 4:
        return [together.astype(jnp.uint8)]
    return [(lax.shift_right_logical(together, jnp.int32(8 * byte)) & 0xFF).astype(jnp.uint8) for byte in range(3)]


def _unpacked(parts, bits):
    """The int32 codes of `_packed`."""
    parts = [part.astype(jnp.int32) for part in parts]
    rows, columns = parts[0].shape
    if bits == 8:
        return parts[0]
    each = 2 if bits == 4 else 4
    together = parts[0] if bits == 4 else parts[0] | (parts[1] << 8) | (parts[2] << 16)
    shift = bits * lax.broadcasted_iota(jnp.int32, (1, 1, each), 2)
    codes = lax.shift_right_logical(*jnp.broadcast_arrays(together[:, :, None], shift)) & ((1 << bits) - 1)
    return codes.reshape(rows, columns * each)


def _quantized(x, key, make, element):
    m, k = x.shape
    words = None if key is None else threefry.words((key[0], key[1]), 0, 0, m, k)
    codes, scales = make(flush(x.astype(jnp.float32)), words)
    return jnp.stack(_packed(codes, element.bits), axis=-1).reshape(m, -1), scales


def _run_quantize(x, key, tensor, make, element, block, name, tile, impl):
    m, k = x.shape
    tile = _fitting(name, k, block, tile)
    rows = -(-m // tile.rows) * tile.rows
    check_offsets(name, x=(rows, k))
    at = lambda columns: pl.BlockSpec((tile.rows, columns), lambda m, k: (m, k))
    count, bytes_each = _bytes(element.bits)
    scalars = [a.reshape(-1) for a in (key, tensor) if a is not None]
    kernel = functools.partial(_quantize_kernel, make=make, bits=element.bits, drawn=key is not None)
    words, scales = launch.call(
        kernel, name, impl, tile,
        grid=(rows // tile.rows, k // tile.columns),
        in_specs=[at(tile.columns), *[pl.BlockSpec(a.shape, lambda m, k: (0,)) for a in scalars]],
        out_specs=(
            pl.BlockSpec((tile.rows, tile.columns // count, bytes_each), lambda m, k: (m, k, 0)),
            at(tile.columns // block),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((rows, k // count, bytes_each), jnp.uint8),
            jax.ShapeDtypeStruct((rows, k // block), jnp.uint8),
        ),
    )(jnp.pad(x, ((0, rows - m), (0, 0))), *scalars)  # fmt: skip
    return words.reshape(rows, -1)[:m], scales[:m]


def _quantize_kernel(x_ref, *refs, make, bits, drawn):
    *scalar_refs, words_ref, scales_ref = refs
    rows, columns = x_ref.shape
    words = None
    if drawn:
        key_ref, *scalar_refs = scalar_refs
        at = pl.program_id(0) * rows, pl.program_id(1) * columns
        words = threefry.words((key_ref[0], key_ref[1]), *at, rows, columns)
    if scalar_refs:
        make = functools.partial(make, tensor=scalar_refs[0][0])
    codes, scales = make(flush(x_ref[...].astype(jnp.float32)), words)
    for byte, part in enumerate(_packed(codes, bits)):
        words_ref[:, :, byte] = part
    scales_ref[...] = scales


def _dequantize(words, scales, tensor, element, block, k, dtype, name, tile, impl):
    if impl == "xla":
        count, bytes_each = _bytes(element.bits)
        parts = words.reshape(words.shape[0], -1, bytes_each)
        parts = [parts[:, :, byte] for byte in range(bytes_each)]
        return _values(parts, scales, tensor, element, block).astype(dtype)
    m, tile = words.shape[0], _fitting(name, k, block, tile)
    rows = -(-m // tile.rows) * tile.rows
    check_offsets(name, out=(rows, k))
    at = lambda columns: pl.BlockSpec((tile.rows, columns), lambda m, k: (m, k))
    count, bytes_each = _bytes(element.bits)
    scalars = [] if tensor is None else [tensor.reshape(1)]
    kernel = functools.partial(_dequantize_kernel, element=element, block=block)
    down = lambda a: jnp.pad(a, ((0, rows - m), (0, 0)))
    return launch.call(
        kernel, name, impl, tile,
        grid=(rows // tile.rows, k // tile.columns),
        in_specs=[
            pl.BlockSpec((tile.rows, tile.columns // count, bytes_each), lambda m, k: (m, k, 0)),
            at(tile.columns // block), *[pl.BlockSpec((1,), lambda m, k: (0,)) for _ in scalars],
        ],
        out_specs=at(tile.columns),
        out_shape=jax.ShapeDtypeStruct((rows, k), dtype),
    )(down(words).reshape(rows, -1, bytes_each), down(scales), *scalars)[:m]  # fmt: skip


def _dequantize_kernel(words_ref, scales_ref, *refs, element, block):
    *tensor_ref, out_ref = refs
    parts = [words_ref[:, :, byte] for byte in range(words_ref.shape[2])]
    tensor = tensor_ref[0][0] if tensor_ref else None
    out_ref[...] = _values(parts, scales_ref[...], tensor, element, block).astype(out_ref.dtype)


def _values(parts, scales, tensor, element, block):
    codes = _unpacked(parts, element.bits)
    rows, columns = codes.shape
    if isinstance(element, MiniFloat):
        values = decode(codes, element)
    else:
        values = number_of(codes | 0x4B000000) - (8388608.0 + 128.0)
    values = values.reshape(rows, columns // block, block)
    code = scales.astype(jnp.int32)
    if tensor is not None:
        return (values * (decode(code, E4M3) * tensor)[:, :, None]).reshape(rows, columns)
    # 2^-127 is a denormal, which some backends flush: twice it, of half the value.
    power = number_of(jnp.where(code == _NAN_SCALE, 0x7FC00000, jnp.maximum(code, 1) << 23))
    half = jnp.where(code == 0, 0.5, 1.0)
    return (values * half[:, :, None] * power[:, :, None]).reshape(rows, columns)


def _bytes(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest group that fills whole bytes."""
    return {4: (2, 1), 6: (4, 3), 8: (1, 1)}[bits]


def _fitting(who: str, k: int, block: int, tile: Tile | None) -> Tile:
    if tile is None:
        return default_tile(k, block)
    launch.check_tile(who, tile)
    if k % tile.columns or tile.columns % block:
        fail(who, f"got tile.columns={tile.columns} for rows of {k} in blocks of {block}",
             "Take a multiple of the block that divides the row")  # fmt: skip
    return tile
