"""The product with a packed weight by a kernel or by XLA.

Weights in the layout "planes/1": of int8 codes when the activation is quantized, else of 16 bits. Weights in a
microscaling format: as they are stored (`mx_product`)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, Int8

from lowbit_jax import rounding
from lowbit_jax.estimators.base import no_cotangent
from lowbit_jax.formats.base import IntFormat, MidRiseFormat
from lowbit_jax.ops import backend, coded_product, mx_product
from lowbit_jax.ops.coder import Coder
from lowbit_jax.ops.plane_tensor import PlaneTensor, affine_zero
from lowbit_jax.ops.product import Forward
from lowbit_jax.ops.recipe import LinearRecipe
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import FLOAT32, PerRow, PerTensor, rms_optimal
from lowbit_jax.scaling.gaussian import optimal_scale


@dataclasses.dataclass(frozen=True, slots=True)
class PackedProduct:
    """One product with a packed weight that a kernel may read; hashable. reference: `(self, lhs, rhs, key, scale) ->
    out` by XLA."""

    forward: Forward
    recipe: LinearRecipe
    rotated: bool  # both operands are rotated alike
    reference: Callable[..., Array]

    def __call__(self, lhs: Array, rhs: QTensor, key: Array | None, scale: Array | None) -> Array:
        if isinstance(rhs, PlaneTensor):
            rhs.check_layout()
        rhs.check_meaning("lb.dot_general: the packed rhs")
        return _through(self, lhs, rhs, key, scale)

    def why_not(self, lhs: Any, rhs: QTensor) -> str | None:
        """Why no kernel computes this product (lhs may be a shape and dtype); None when one does, on a GPU."""
        if any(map(export.is_symbolic_dim, lhs.shape)):
            return f"the activation's shape {tuple(lhs.shape)} is symbolic, and kernels are made for one size"
        if isinstance(rhs, PlaneTensor):
            return _why_not(self, lhs, rhs)
        if mx_product.mx_format(rhs.quantizer):
            return mx_product.why_not(self, lhs, rhs)
        return f"no kernel reads weights of {rhs.quantizer.format.name} in the layout {rhs.layout!r}"

    def coder(self, lhs: Any, rhs: QTensor) -> Coder | None:
        """What XLA multiplies codes by here, where no kernel runs; None where it multiplies their values."""
        if self.recipe.implementation != "auto":
            return None
        return coded_product.coder_of_packed(self.recipe, self.forward, lhs, rhs, self.rotated)


def _coded(product: PackedProduct, lhs: Array, rhs: QTensor, key: Array | None, scale: Array | None) -> Array:
    coder = product.coder(lhs, rhs)
    assert coder is not None and scale is None, "no coder takes learned scales"
    return coded_product.packed_product(coder, product.recipe, product.forward, lhs, rhs, key)


_MOST_OF_A_GROUP = 1024  # contraction indices that the 16-bit kernel writes out


def has_kernel(rhs: QTensor) -> bool:
    """Whether some kernel reads a weight stored like this one."""
    return isinstance(rhs, PlaneTensor) or mx_product.mx_format(rhs.quantizer) is not None


def uses_int8(quantizer: Any) -> TypeGuard[Quantizer]:
    """Whether an activation through this quantizer can meet the weight as int8 codes."""
    return (
        isinstance(quantizer, Quantizer)
        and affine_zero(quantizer.format) is not None
        and isinstance(quantizer.tiling, PerRow | PerTensor)
        and quantizer.sparsity is None
        and not quantizer.zero_point
    )


def word_bits(quantizer: Any) -> int:
    """Word size that the weight is packed in for activations through this quantizer (None: in high precision)."""
    return 8 if uses_int8(quantizer) else 16


def kernel_name(recipe: LinearRecipe, rhs: QTensor) -> str:
    """What computes the product where a GPU is, as `lb.explain` says it."""
    if not isinstance(rhs, PlaneTensor):
        return mx_product.kernel_name(recipe, rhs)
    bits = rhs.quantizer.format.bits
    return f"matmul_w{bits}a{8 if uses_int8(recipe.out.lhs) else 16}"


def _longest_a8(bits: int) -> int:
    """The longest contraction whose sums of products of such codes with int8 ones stay inside int32."""
    return ((1 << 31) - 1) // (128 * (128 if bits == 8 else (1 << bits) - 1))


def _why_not(product: PackedProduct, lhs: Array, rhs: PlaneTensor) -> str | None:
    dims, quantizer = product.forward.dims, product.recipe.forward_quantizers[0]
    if dims.lhs_batch or dims.rhs_batch:
        return "it has batch axes"
    if rhs.stack:
        return "the weight is a stack of layers that was not sliced"
    if product.forward.out_sharding is not None:
        return "it asks for an output sharding"
    if lhs.size == 0:
        return "the activation is empty"
    if reason := backend.why_not_dtype("the result", product.forward.out_dtype):
        return reason
    results = lhs.size // lhs.shape[dims.lhs] * rhs.rows
    if max(lhs.size, results, *(word.size for word in rhs.words)) > backend.MOST_ELEMENTS:
        return f"an array has more than {backend.MOST_ELEMENTS} elements, which the kernels count in 32 bits"
    if uses_int8(quantizer):
        if fused_options(quantizer, rhs.length) and (reason := backend.why_not_dtype("the activation", lhs.dtype)):
            return reason
        if rhs.length > (longest := _longest_a8(rhs.quantizer.format.bits)):
            return f"int32 sums of {rhs.length} products can overflow ({longest} cannot)"
        if not product.rotated and (quantizer.rotation or rhs.quantizer.rotation):
            return "only one operand is rotated"
        if rhs.quantizer.zero_point:
            return "int8 products take one zero point for the whole weight, and this one has one a scale"
        if rhs.groups != 1:
            return "int8 products take one scale an output channel, and this weight has groups"
        return None if rhs.words[0].dtype == jnp.int8 else "the weight is packed for 16-bit activations"
    if rhs.words[0].dtype != jnp.int16:
        return "the weight is packed for int8 activations"
    if lhs.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the activation is {lhs.dtype}, and the kernel takes bfloat16 and float16"
    if rhs.groups != 1 and rhs.length // rhs.groups > _MOST_OF_A_GROUP:
        return (
            f"groups of {rhs.length // rhs.groups} take more registers than there are, and {_MOST_OF_A_GROUP} are most"
        )
    rows = lhs.size // lhs.shape[dims.lhs]
    if rows > mx_product.LARGEST_A16 and rhs.implementation == "auto":
        return f"with {rows} rows XLA's product with the dequantized weight is as fast"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(product, lhs, rhs, key, scale):
    planes = isinstance(rhs, PlaneTensor)
    implementation = rhs.implementation if planes else product.recipe.implementation
    why_not = None if implementation == "reference" else product.why_not(lhs, rhs)
    if not planes and implementation == "interpret" and why_not is None:
        why_not = "raw Triton has no interpretation under JAX"
    by_xla = _coded if implementation == "auto" and product.coder(lhs, rhs) is not None else product.reference
    return backend.choose(
        functools.partial(_kernel if planes else mx_product.kernel, product),
        functools.partial(by_xla, product), lhs, rhs, key, scale,
        implementation=implementation, why_not=why_not, who="lb.dot_general",
    )  # fmt: skip


def _forward(product, lhs, rhs, key, scale):
    return _through(product, lhs, rhs, key, scale), (lhs, rhs, key, scale)


def _backward(product, saved, g):
    lhs, rhs, key, scale = saved
    _, back = jax.vjp(lambda lhs, rhs, scale: product.reference(product, lhs, rhs, key, scale), lhs, rhs, scale)
    dlhs, drhs, dscale = back(g)
    return dlhs, drhs, no_cotangent(key), dscale


_through.defvjp(_forward, _backward)


def _kernel(
    product: PackedProduct, impl: str, lhs: Array, rhs: PlaneTensor, key: Any, scale: Any
) -> Float[Array, "*out"]:
    dims, quantizer = product.forward.dims, product.recipe.forward_quantizers[0]
    zero, bits = affine_zero(rhs.quantizer.format), rhs.quantizer.format.bits
    assert zero is not None, "`why_not` says so of other grids"
    free = [lhs.shape[a] for a in dims.free("lhs", lhs.ndim)]
    out_dtype = product.forward.out_dtype
    if uses_int8(quantizer):
        rows, each, sums, offset = int8_rows(impl, quantizer, lhs, dims.lhs, key, scale)
        table = rhs.scale_table()[0]
        y = backend.matmul_a8(impl, rows, each, sums, offset, rhs.words, table, zero, rhs.sums, bits, out_dtype)
    else:
        x = lhs if quantizer is None else quantizer(lhs, axis=dims.lhs, key=key, scale=scale)
        if rhs.quantizer.rotation is not None:
            x = rhs.quantizer.rotation.apply(x, dims.lhs)
        rows = jnp.moveaxis(x.astype(lhs.dtype), dims.lhs, -1).reshape(-1, lhs.shape[dims.lhs])
        zeros = zero if rhs.zeros is None else rhs.zero_table()
        y = backend.matmul_a16(impl, rows, rhs.words, rhs.scale_table(), zeros, bits, out_dtype)
    return y.reshape(*free, *rhs.free)


def int8_rows(
    impl: str, quantizer: Quantizer, x: Array, axis: int, key: Any, scale: Any
) -> tuple[Int8[Array, "m k"], Float[Array, "m"], Any, float]:
    """Codes of the (rotated) rows along `axis` as a matrix, a scale for each row, the sums of their codes where the
    kernel gives them, and the code of value 0."""
    offset = _int8_offset(quantizer.format)
    rows = jnp.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    if (options := fused_options(quantizer, x.shape[axis])) is not None:
        found = backend.hadamard_quantize(impl, rows, **options, trust=None)
        return found.codes, found.scales, found.sums, -offset
    values, scales = quantizer.elements(x, axis=axis, key=key, scale=scale)
    each = jnp.broadcast_to(scales, [1 if a == axis else n for a, n in enumerate(x.shape)]).reshape(-1)
    codes = jnp.moveaxis((values - offset).astype(jnp.int8), axis, -1).reshape(rows.shape)
    return codes, each, None, -offset


def fused_options(quantizer: Quantizer, length: int) -> dict[str, Any] | None:
    """Arguments of the kernel that rotates, fits and rounds in one pass; None when it does not do this quantizer."""
    rotation, fmt = quantizer.rotation, quantizer.format
    block = None if rotation is None else rotation.block_for(length)
    plain = quantizer.fit is rms_optimal and quantizer.rounding is rounding.nearest and quantizer.sparsity is None
    plain &= isinstance(quantizer.tiling, PerRow) and quantizer.scale_format == FLOAT32 and not quantizer.zero_point
    plain &= isinstance(fmt, MidRiseFormat) or (isinstance(fmt, IntFormat) and fmt.low == -(1 << (fmt.bits - 1)))
    plain &= rotation is None or rotation.signs is None
    if not plain or length % 128 or block not in (None, 32, 64, 128):
        return None
    return dict(bits=fmt.bits, alpha=optimal_scale(fmt), block=block, midrise=isinstance(fmt, MidRiseFormat))


def _int8_offset(fmt: Any) -> float:
    """What is taken off a grid value to make it an integer that int8 holds."""
    if isinstance(fmt, MidRiseFormat):
        return 0.5
    assert isinstance(fmt, IntFormat)
    return 0.0 if -128 <= fmt.low and fmt.high <= 127 else float(fmt.low + 128)
