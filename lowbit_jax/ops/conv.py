"""`lax.conv_general_dilated` with a recipe: fake-quantized operands in a high-precision convolution.

The contraction runs over the window and the input channels. A weight shares a scale over both for each output
channel; an activation, which many windows read, is fitted over the channels of each position. Rotations act on the
channels, commute with the window and meet in the product; zero padding stays zero under them. With feature groups the
channels of a weight are those of one group, so a rotation takes a block that divides them on both sides.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax.ops.dot_general import check_operands, checked_scales
from lowbit_jax.ops.recipe import LinearRecipe
from lowbit_jax.ops.varying import vary_alike
from lowbit_jax.qtensor import QTensor
from lowbit_jax.rotation import Hadamard, largest_block


def refuse_backward(recipe: LinearRecipe) -> None:
    """Raises NotImplementedError for a recipe with backward products of its own."""
    if not recipe.plain_backward:
        raise NotImplementedError(
            f"lb.conv_general_dilated: recipe {recipe.name or recipe!r} quantizes backward products, which convolutions"
            " do not run. Give the convolutions a forward-only recipe by a rule."
        )


def refuse_fresh_signs(recipe: LinearRecipe) -> None:
    """Raises NotImplementedError for a rotation whose signs are drawn anew."""
    if any(q is not None and q.fresh_signs for q in recipe.forward_quantizers):
        raise NotImplementedError(
            "lb.conv_general_dilated: signs that are drawn anew are for lb.dot_general. Give convolutions"
            " Hadamard(signs=None) or a seed by a rule."
        )


def conv_general_dilated(
    lhs: Float[Array, "*image"],
    rhs: Float[Array, "*kernel"],
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    recipe: LinearRecipe,
    key: Array | None = None,
    scales: Mapping[str, Array] | None = None,
    **options: Any,
) -> Float[Array, "*out"]:
    """`lax.conv_general_dilated` of the quantized operands; the result has the dtype of `lhs`.

    Raises: NotImplementedError for a recipe with quantized backward products, which only `lb.dot_general` runs, and for
    implementation="kernel", as no kernel convolves; TypeError and ValueError as `lb.dot_general`."""
    if not isinstance(recipe, LinearRecipe):
        raise TypeError(f"lb.conv_general_dilated got recipe={recipe!r}; it takes a LinearRecipe, such as lb.quest(4).")
    refuse_backward(recipe)
    if recipe.implementation in ("kernel", "interpret"):
        raise NotImplementedError(
            f"lb.conv_general_dilated: implementation={recipe.implementation!r}, and no kernel convolves."
            " Give convolutions a recipe with implementation='auto' by a rule."
        )
    if isinstance(rhs, QTensor):
        raise TypeError("lb.conv_general_dilated got a packed rhs; convolutions take arrays: pass rhs.dequantize().")
    check_operands("lb.conv_general_dilated", lhs, rhs, key)
    refuse_fresh_signs(recipe)
    if feature_group_count > 1 and any(
        q is not None and q.rotation is not None and q.rotation.signs is not None for q in recipe.forward_quantizers
    ):
        raise NotImplementedError(
            f"lb.conv_general_dilated: random signs differ between the {feature_group_count} feature groups, so they"
            " would not cancel. Use Hadamard(signs=None) for grouped convolutions."
        )
    lhs, rhs, learned = vary_alike(lhs, rhs, checked_scales("lb.conv_general_dilated", recipe, scales, packed=False))
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    lhs_key, rhs_key = (None, None) if key is None else jax.random.split(key)
    lhs_channel, rhs_channel = numbers.lhs_spec[1], numbers.rhs_spec[1]
    window = tuple(numbers.rhs_spec[2:])
    q_lhs = _fit_rotation(recipe.out.lhs, rhs.shape[rhs_channel])
    q_rhs = _fit_rotation(recipe.out.rhs, rhs.shape[rhs_channel])
    method = "in_rotated_space" if recipe.shared_rotation else "__call__"
    compute = lhs.dtype
    if q_lhs is not None:
        lhs = getattr(q_lhs, method)(lhs, axis=lhs_channel, key=lhs_key, scale=learned.get("lhs"))
    if q_rhs is not None and not recipe.rhs_ready:
        rhs = getattr(q_rhs, method)(rhs, axis=(*window, rhs_channel), key=rhs_key, scale=learned.get("rhs"))
    return lax.conv_general_dilated(
        lhs.astype(compute),
        rhs.astype(compute),
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
        **options,
    )


def _fit_rotation(quantizer, channels):
    """Both operands rotate by the block that divides the channels of one feature group."""
    if quantizer is None or quantizer.rotation is None:
        return quantizer
    rotation = quantizer.rotation
    block = largest_block(channels, rotation.block)
    return dataclasses.replace(quantizer, rotation=Hadamard(block=block, signs=rotation.signs))
