"""The product with a weight in an OCP microscaling format, by a kernel that reads words and scales as they are stored.

Weights that `lb.convert` packs in "bitstream-le/1" are in the kernel's own layout already, so there is nothing to
convert. The activation is bfloat16, or microscaled too, which Blackwell multiplies without widening.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from lowbit_jax.formats.base import Format
from lowbit_jax.formats.catalogue import E2M1, E4M3, E5M2
from lowbit_jax.ops import backend
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import Group, PowerOfTwo

FORMATS: dict[Format, str] = {E2M1: "mxfp4", E4M3: "mxfp8", E5M2: "mxfp8_e5m2"}
BLOCK = 32
LARGEST_A16 = 256  # rows above which XLA multiplies by the dequantized weight: 16-bit products gain nothing there


def mx_format(quantizer: Any) -> str | None:
    """The kernel's name of the microscaling format that the quantizer rounds to; None for other quantizers."""
    if not isinstance(quantizer, Quantizer) or quantizer.format not in FORMATS:
        return None
    plain = quantizer.rotation is None and quantizer.sparsity is None and quantizer.tiling == Group(BLOCK)
    plain &= isinstance(quantizer.scale_format, PowerOfTwo) and quantizer.scale_format.times == 1
    return FORMATS[quantizer.format] if plain else None


def kernel_name(recipe: Any, rhs: QTensor) -> str:
    """What computes the product where a GPU is, as `lb.explain` says it."""
    return f"matmul_{mx_format(rhs.quantizer)}_{mx_format(recipe.out.lhs) or 'a16'}"


def why_not(product: Any, lhs: Array, rhs: QTensor) -> str | None:
    """Why the kernel does not compute this `PackedProduct`; None when it does, on a GPU."""
    dims, recipe = product.forward.dims, product.recipe
    if dims.lhs_batch or dims.rhs_batch:
        return "it has batch axes"
    if product.forward.out_sharding is not None:
        return "it asks for an output sharding"
    if lhs.size == 0:
        return "the activation is empty"
    if mx_format(recipe.out.lhs) is None:
        if lhs.dtype != jnp.bfloat16:
            return f"the activation is {lhs.dtype}, and the kernel takes bfloat16 or microscaled ones"
        rows = lhs.size // lhs.shape[dims.lhs]
        if rows > LARGEST_A16 and recipe.implementation == "auto":
            return f"with {rows} rows XLA's product with the dequantized weight is as fast"
    return backend.why_no_mx(mx_format(rhs.quantizer), mx_format(recipe.out.lhs))


def kernel(product: Any, impl: str, lhs: Array, rhs: QTensor, key: Any, scale: Any) -> Float[Array, "*out"]:
    """The product by `pallas_kernels.matmul_mx`."""
    dims, quantizer = product.forward.dims, product.recipe.forward_quantizers[0]
    free = [lhs.shape[a] for a in dims.free("lhs", lhs.ndim)] + [rhs.shape[a] for a in dims.free("rhs", rhs.ndim)]
    words, scales, across = matrix_of(rhs)
    if (x_format := mx_format(quantizer)) is not None:
        x, x_scales, _ = matrix_of(quantizer.quantize(jnp.moveaxis(lhs, dims.lhs, -1), key=key))
    else:
        x = lhs if quantizer is None else quantizer(lhs, axis=dims.lhs, key=key, scale=scale)
        x, x_scales = jnp.moveaxis(x, dims.lhs, -1).reshape(-1, lhs.shape[dims.lhs]), None
    y = backend.matmul_mx(
        impl, x, words, scales, x_scales, format=mx_format(rhs.quantizer), x_format=x_format, across=across,
        out_dtype=product.forward.out_dtype,
    )  # fmt: skip
    return y.reshape(free)


def matrix_of(packed: QTensor) -> tuple[UInt8[Array, "rows bytes"], UInt8[Array, "*blocks"], bool]:
    """Words [rows, bytes] and scales, all axes beside the contraction axis merged; whether the scales are
    [blocks, rows], which they are, as stored, when that axis leads."""
    at = packed.ndim + packed.axis
    [scales] = packed.scales
    scales = jnp.squeeze(scales, at + 1)
    words = packed.words.reshape(-1, packed.words.shape[-1])
    if at == 0 and packed.ndim > 1:
        return words, scales.reshape(scales.shape[0], -1), True
    scales = jnp.moveaxis(scales, at, -1)
    return words, scales.reshape(-1, scales.shape[-1]), False
