"""Which kernel of `pallas_kernels` computes the forward product of a layer, as `lb.explain` says it.

It asks the very functions that choose while tracing, on the shapes and dtype of the layer with one row of activations.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lowbit_jax.nn.site import Site
from lowbit_jax.ops import LinearRecipe, int8_kernel, integer_product
from lowbit_jax.ops.backend import available, sees_gpu, takes_kernel
from lowbit_jax.ops.coder import keeps_scale
from lowbit_jax.ops.packed_product import PackedProduct, fused_options, has_kernel, kernel_name, uses_int8
from lowbit_jax.ops.plane_tensor import PlaneTensor
from lowbit_jax.ops.product import Dims, Forward
from lowbit_jax.qtensor import QTensor


def of_product(recipe: LinearRecipe, site: Site, packed: QTensor | None, dtype: Any) -> str:
    """What computes the product, and in brackets what would on a GPU."""
    if packed is not None:
        return f"{_of_packed(recipe, site, packed, dtype)}, packed"
    state = ", prepared" if recipe.rhs_ready else ""
    name = _of_training(recipe, site, dtype)
    return _chosen(name, recipe.implementation) + state


def of_activation(recipe: LinearRecipe, site: Site, packed: QTensor | None, dtype: Any) -> str:
    """What rounds the activation."""
    quantizer = recipe.forward_quantizers[0]
    if packed is None:
        by_kernel, chosen = _of_training(recipe, site, dtype) is not None, recipe.implementation
    else:
        by_kernel = uses_int8(quantizer) and _reason(recipe, site, packed, dtype) is None and has_kernel(packed)
        chosen = packed.implementation if isinstance(packed, PlaneTensor) else recipe.implementation
    if not by_kernel or quantizer is None or fused_options(quantizer, site.length) is None:
        return "xla"
    return _chosen(f"hadamard_quantize{quantizer.format.bits}", chosen)


def _chosen(name: str | None, implementation: str) -> str:
    if name is None or implementation == "reference" or not available():
        return "xla"
    if implementation in ("kernel", "interpret") or takes_kernel():
        return name
    return f"xla ({name} on {'one device' if sees_gpu() else 'a GPU'})"


def _of_training(recipe: LinearRecipe, site: Site, dtype: Any) -> str | None:
    if site.kind == "conv_general_dilated":
        return None
    columns = max(1, _count(site) // max(1, site.length))
    lhs: Any = jax.ShapeDtypeStruct((1, site.length), dtype)  # shapes and dtypes are all that is asked
    rhs: Any = jax.ShapeDtypeStruct((site.length, columns), jnp.float32)
    scale: Any = jax.ShapeDtypeStruct((1, columns), jnp.float32) if recipe.rhs_ready and keeps_scale(recipe) else None
    reason = integer_product.why_not(recipe, _forward(Dims(1, 0, (), ()), dtype), lhs, rhs, scale)
    return "matmul_i8" if reason is None or _by_codes(recipe, site, columns, scale) else None


def _by_codes(recipe: LinearRecipe, site: Site, columns: int, scale: Any) -> bool:
    """Whether XLA's codes of both operands meet in the kernel, at as many rows as it takes."""
    quantizers = recipe.forward_quantizers
    if (recipe.rhs_ready and scale is None) or not all(
        int8_kernel.holds(q, recipe.shared_rotation) for q in quantizers
    ):
        return False
    formats: Any = tuple(q.element_format for q in quantizers if q is not None)
    shapes = (int8_kernel.FEWEST, site.length), (site.length, columns)
    return int8_kernel.computes(*shapes, formats, Dims(1, 0, (), ()).numbers)


def _of_packed(recipe: LinearRecipe, site: Site, packed: QTensor, dtype: Any) -> str:
    if site.kind == "conv_general_dilated" or not has_kernel(packed) or _reason(recipe, site, packed, dtype):
        return "xla"
    implementation = packed.implementation if isinstance(packed, PlaneTensor) else recipe.implementation
    return _chosen(kernel_name(recipe, packed), implementation)


def _reason(recipe: LinearRecipe, site: Site, packed: QTensor, dtype: Any) -> str | None:
    one = packed
    for _ in range(packed.ndim - (len(site.shape) - len(site.contract) + 1)):  # layers stacked for a scan
        one = jax.eval_shape(lambda stack: jax.tree.map(lambda leaf: leaf[0], stack), one)
    forward = _forward(Dims(1, one.ndim + one.axis, (), ()), dtype)
    product = PackedProduct(forward, recipe, recipe.shared_rotation, forward)
    return product.why_not(jax.ShapeDtypeStruct((1, one.length), dtype), one)


def _forward(dims: Dims, dtype: Any) -> Forward:
    return Forward(dims, None, jnp.dtype(dtype))


def _count(site: Site) -> int:
    total = 1
    for size in site.shape:
        total *= size
    return total
