"""`lax.ragged_dot`, the product of a mixture of experts, with a recipe: quantized values in XLA's grouped product."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from lowbit_jax.ops.dot_general import check_operands, checked_dtype, checked_scales
from lowbit_jax.ops.prepared import PreparedKernel
from lowbit_jax.ops.recipe import LinearRecipe
from lowbit_jax.ops.varying import vary_alike
from lowbit_jax.qtensor import QTensor

_WHO = "lb.ragged_dot"


def ragged_dot(
    lhs: Float[Array, "m k"],
    rhs: Float[Array, "experts k n"] | QTensor | PreparedKernel,
    group_sizes: Int[Array, "experts"],
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    recipe: LinearRecipe,
    key: Array | None = None,
    scales: Mapping[str, Array] | None = None,
) -> Float[Array, "m n"]:
    """Rows of `lhs`, sorted by expert, each times the weight of its expert, both quantized along k.

    The first `group_sizes[0]` rows meet `rhs[0]`, the next `group_sizes[1]` rows `rhs[1]`, and so on; rows beyond their
    sum give zeros. A weight has one scale for each expert and output channel by row, one for all experts by tensor.
    `rhs` may be packed along k: `quantizer.quantize(rhs, axis=1)`. The result has the dtype of `lhs`. What XLA
    multiplies are the quantized values. Gradients are those of `lax.ragged_dot`, through the estimators.
    Raises: NotImplementedError for a recipe with quantized backward products, which only `lb.dot_general` runs, and for
    implementation="kernel"; ValueError for other shapes; TypeError and ValueError as `lb.dot_general`."""
    if not isinstance(recipe, LinearRecipe):
        raise TypeError(f"{_WHO} got recipe={recipe!r}; it takes a LinearRecipe, such as lb.quest(4).")
    if not recipe.plain_backward:
        raise NotImplementedError(
            f"{_WHO}: recipe {recipe.name or recipe!r} quantizes backward products, which grouped products do not run."
            " Use a forward-only recipe, or lb.einsum('etk,ekn->etn') on experts of equally many rows."
        )
    if recipe.implementation in ("kernel", "interpret"):
        raise NotImplementedError(
            f"{_WHO}: implementation={recipe.implementation!r}, and no kernel computes grouped products. Use 'auto'."
        )
    w: Any = rhs.of(_WHO, recipe.rhs_ready)[0] if isinstance(rhs, PreparedKernel) else rhs
    check_operands(_WHO, lhs, w, key)
    _check_shapes(lhs, w, group_sizes)
    learned = checked_scales(_WHO, recipe, scales, packed=isinstance(w, QTensor))
    lhs, w, group_sizes, learned = vary_alike(lhs, w, group_sizes, learned)
    lhs_key, rhs_key = (None, None) if key is None else jax.random.split(key)
    q_lhs, q_rhs = recipe.forward_quantizers
    compute = lhs.dtype
    out_dtype = compute if preferred_element_type is None else checked_dtype(_WHO, preferred_element_type)
    packed = isinstance(w, QTensor)
    rotated = recipe.shared_rotation and (not packed or w.quantizer == q_rhs)
    if q_lhs is not None:
        quantize = q_lhs.in_rotated_space if rotated else q_lhs
        lhs = quantize(lhs, axis=1, key=lhs_key, scale=learned.get("lhs"))
    if packed:
        w.check_meaning(f"{_WHO}: the packed rhs")
        if w.quantizer.rotation is not None and not rotated:
            lhs = w.quantizer.rotation.apply(lhs, 1)
        w = w.values(compute)
    elif q_rhs is not None and not recipe.rhs_ready:
        quantize = q_rhs.in_rotated_space if rotated else q_rhs
        w = quantize(w, axis=1, key=rhs_key, scale=learned.get("rhs"))
    return lax.ragged_dot(lhs.astype(compute), w.astype(compute), group_sizes, precision, out_dtype)


def _check_shapes(lhs: Array, rhs: Any, group_sizes: Any) -> None:
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1]:
        raise ValueError(
            f"{_WHO} got lhs {lhs.shape} and rhs {rhs.shape}; it takes [rows, k] and [experts, k, n]. Flatten tokens"
            " first, and stack the weights of the experts."
        )
    if isinstance(rhs, QTensor) and rhs.axis != -2:
        raise ValueError(
            f"{_WHO}: the packed rhs of shape {rhs.shape} lies along axis {rhs.ndim + rhs.axis}, and the product"
            " contracts axis 1. Pack it along that one: quantizer.quantize(rhs, axis=1)."
        )
    if not hasattr(group_sizes, "dtype") or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"{_WHO} got group_sizes={group_sizes!r}; they are an array of integers.")
    if group_sizes.shape != rhs.shape[:1]:
        raise ValueError(
            f"{_WHO} got group_sizes of shape {group_sizes.shape} for {rhs.shape[0]} experts; give each its number of"
            " rows."
        )
