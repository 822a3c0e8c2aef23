"""`lax.dot_general` with a recipe.

Operands are quantized along the contraction axis in the layout they come in; several contraction axes are merged into
one first. Two operands rotated alike meet in the rotated space and skip the way back (signs that are drawn anew are the
same for both); one that is rotated alone is un-rotated first (or, for packed weights, the activation follows it into
the rotated space, which is exact too).
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax.gptq import gptq
from lowbit_jax.ops import backend, coded_product, integer_product
from lowbit_jax.ops.coder import keeps_scale
from lowbit_jax.ops.merged import as_rhs_lies, merge, merged_axis, merged_batch
from lowbit_jax.ops.packed_product import PackedProduct, has_kernel
from lowbit_jax.ops.plane_tensor import PlaneTensor
from lowbit_jax.ops.prepared import PreparedKernel
from lowbit_jax.ops.product import Dims, Forward, backward_operands, plain_product, product
from lowbit_jax.ops.recipe import Gemm, LinearRecipe
from lowbit_jax.ops.varying import vary_alike
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.rounding import check_key

DimensionNumbers = tuple[tuple[Any, Any], tuple[Any, Any]]
"""((lhs contraction axes, rhs contraction axes), (lhs batch axes, rhs batch axes)), as `lax.dot_general` takes them."""


def dot_general(
    lhs: Float[Array, "*lhs"],
    rhs: Float[Array, "*rhs"] | QTensor | PreparedKernel,
    dimension_numbers: DimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    recipe: LinearRecipe,
    key: Array | None = None,
    scales: Mapping[str, Array] | None = None,
) -> Float[Array, "*out"]:
    """`lax.dot_general(lhs, rhs, dimension_numbers)` with the operands, and the gradients, of `recipe`.

    `rhs` may be packed (`pack_rhs`, `lb.convert`): then only the activation is quantized here. The result has the
    dtype of `lhs`, so a float32 master weight may meet a bfloat16 activation. `key` feeds stochastic roundings;
    `scales` holds the parameters of learned fits, under "lhs" and "rhs".
    Raises: TypeError for operands that are not floating or a recipe that is none; ValueError for sizes that disagree,
    products without a contraction, missing keys or scales, and groups that do not divide the contraction."""
    options = (precision, preferred_element_type, out_sharding, recipe, key, scales)
    return dot_general_of("lb.dot_general", lhs, rhs, dimension_numbers, *options)


def dot_general_of(
    who: str, lhs: Any, rhs: Any, dimension_numbers: Any, precision: Any, preferred_element_type: Any,
    out_sharding: Any, recipe: LinearRecipe, key: Array | None, scales: Mapping[str, Array] | None,
) -> Float[Array, "*out"]:  # fmt: skip
    """`dot_general`, called by `who`, whose name starts the errors about its arguments."""
    _check_recipe(who, recipe)
    rhs_scale = None
    if isinstance(rhs, PreparedKernel):
        rhs, rhs_scale = rhs.of(who, recipe.rhs_ready)
    check_operands(who, lhs, rhs, key)
    learned = checked_scales(who, recipe, scales, packed=isinstance(rhs, QTensor))
    out_dtype = lhs.dtype if preferred_element_type is None else checked_dtype(who, preferred_element_type)
    lhs, rhs, dims = _one_contraction(who, lhs, rhs, dimension_numbers)
    lhs_key, rhs_key, backward_key = (None, None, None) if key is None else jax.random.split(key, 3)
    rotated = recipe.shared_rotation and (not isinstance(rhs, QTensor) or rhs.quantizer == recipe.out.rhs)
    forward = Forward(dims, precision, jnp.dtype(out_dtype), out_sharding)
    lhs, rhs, learned, rhs_scale = vary_alike(lhs, rhs, learned, rhs_scale)
    by_name, reason = recipe.implementation in ("kernel", "interpret"), None
    if isinstance(rhs, QTensor):
        packed = PackedProduct(forward, recipe, rotated, _packed_by_xla)
        by_kernel = by_name or (recipe.implementation == "auto" and has_kernel(rhs) and backend.takes_kernel(lhs, rhs))
        by_kernel |= isinstance(rhs, PlaneTensor) or packed.coder(lhs, rhs) is not None
        product_of = packed if by_kernel else functools.partial(_packed_by_xla, packed)
        return product_of(lhs, rhs, lhs_key, learned.get("lhs"))
    if by_name or (recipe.implementation == "auto" and backend.takes_kernel(lhs, rhs)):
        reason = integer_product.why_not(recipe, forward, lhs, rhs, rhs_scale)
        if reason is None:
            return integer_product.IntegerProduct(forward, recipe)(lhs, rhs, rhs_scale)
    dtype = lhs.dtype
    if recipe.fresh_signs:
        signs_key, lhs_key = (None, None) if lhs_key is None else jax.random.split(lhs_key)
        lhs, rhs, recipe = _turned(lhs, rhs, dims, recipe, signs_key)
    coder = coded_product.coder_of(recipe, forward, lhs, rhs, rhs_scale, rotated)
    if by_name and coder is None:
        raise NotImplementedError(f"{who}: no integer product for this recipe: {reason}.")
    if coder is not None:
        keys = (lhs_key, rhs_key, backward_key)
        return coded_product.coded_product(coder, forward, recipe, lhs, rhs, rhs_scale, rotated, keys)
    lhs_hat = _operand(recipe.out.lhs, lhs, dims.lhs, rotated, lhs_key, learned.get("lhs"))
    if recipe.rhs_ready:
        rhs_hat = rhs
    else:
        rhs_hat = _operand(recipe.out.rhs, rhs, dims.rhs, rotated, rhs_key, learned.get("rhs"))
    lhs_hat, rhs_hat = lhs_hat.astype(dtype), rhs_hat.astype(dtype)
    if recipe.plain_backward:
        return plain_product(forward, lhs_hat, rhs_hat)
    others = backward_operands(lhs, rhs, dims, recipe, rotated, (lhs_key, rhs_key), learned, rhs_scale)
    return product(forward, recipe, lhs_hat, rhs_hat, others, backward_key)


def _turned(
    lhs: Array, rhs: Array, dims: Dims, recipe: LinearRecipe, key: Array | None
) -> tuple[Array, Array, LinearRecipe]:
    """Both operands behind the rotation whose signs `key` draws, and the recipe of what is left to do."""
    q_lhs, q_rhs = recipe.forward_quantizers
    assert q_lhs is not None and q_rhs is not None and q_lhs.rotation is not None, "`recipe.fresh_signs` says so"
    turn = functools.partial(q_lhs.rotation.apply, key=key)
    out = Gemm(lhs=dataclasses.replace(q_lhs, rotation=None), rhs=dataclasses.replace(q_rhs, rotation=None))
    return turn(lhs, dims.lhs), turn(rhs, dims.rhs), dataclasses.replace(recipe, out=out)


def _packed_by_xla(product: PackedProduct, lhs: Array, rhs: QTensor, key: Array | None, scale: Array | None) -> Array:
    """The product with the dequantized weight."""
    dims = product.forward.dims
    lhs_hat = _operand(product.recipe.out.lhs, lhs, dims.lhs, product.rotated, key, scale)
    if rhs.quantizer.rotation is not None and not product.rotated:
        lhs_hat = rhs.quantizer.rotation.apply(lhs_hat, dims.lhs)
    return plain_product(product.forward, lhs_hat.astype(lhs.dtype), rhs.values(lhs.dtype))


def quantize_rhs(
    rhs: Float[Array, "*rhs"],
    dimension_numbers: DimensionNumbers,
    recipe: LinearRecipe,
    *,
    key: Array | None = None,
    scale: Array | None = None,
) -> Float[Array, "*rhs"]:
    """The weight as the product uses it, in its own shape and dtype, differentiable.

    Quantize once, then run many microbatches with `recipe.with_rhs_ready()` and pull their summed gradient back through
    this function once. Raises: ValueError where each product draws its signs anew."""
    return prepare_rhs(rhs, dimension_numbers, recipe, key=key, scale=scale).values


def prepare_rhs(
    rhs: Float[Array, "*rhs"],
    dimension_numbers: DimensionNumbers,
    recipe: LinearRecipe,
    *,
    key: Array | None = None,
    scale: Array | None = None,
) -> PreparedKernel:
    """`quantize_rhs` with the scales, where these are all that the codes lack, so that products may multiply codes."""
    _check_recipe("quantize_rhs", recipe)
    if recipe.fresh_signs:
        raise ValueError(
            "quantize_rhs: the rotation of this recipe draws its signs anew in every product, so no weight is ready"
            " before. Fix them by a seed, as in Hadamard(signs=0)."
        )
    quantizer = recipe.out.rhs
    if quantizer is None or recipe.rhs_ready:
        return PreparedKernel(rhs)
    _check_weight("quantize_rhs", rhs)
    merged, axis, restore = merge(rhs, _rhs_axes("quantize_rhs", dimension_numbers, rhs.ndim))
    rotated, own = recipe.shared_rotation, None
    if isinstance(quantizer, Quantizer) and keeps_scale(recipe):
        values, own = quantizer.with_scale(merged, axis=axis, key=key)
    else:
        values = _operand(quantizer, merged, axis, rotated, key, scale)
    return PreparedKernel(restore(values).astype(rhs.dtype), own)


def pack_rhs(
    rhs: Float[Array, "*rhs"],
    dimension_numbers: DimensionNumbers,
    recipe: LinearRecipe,
    *,
    key: Array | None = None,
    scale: Array | None = None,
    gram: Array | None = None,
) -> QTensor:
    """The weight as packed codes and scales; several contraction axes are merged into one, as they lie in the weight.

    Their sizes are not kept: axes of 8 and 3 contract with a weight of 4 and 6 unnoticed. gram: the sum of x^T x over
    inputs, the contraction axes merged alike, for levels by `gptq`; nearest without it.
    Raises: ValueError when the recipe keeps the weight in high precision, and for axes that it has not; TypeError for
    a weight that is no floating array."""
    _check_recipe("pack_rhs", recipe)
    quantizer = recipe.forward_quantizers[1]
    if quantizer is None:
        raise ValueError(
            "pack_rhs: this recipe keeps its weight (out.rhs) in high precision, so there is nothing to pack."
        )
    _check_weight("pack_rhs", rhs)
    merged, axis, _ = merge(rhs, _rhs_axes("pack_rhs", dimension_numbers, rhs.ndim))
    if gram is not None:
        return gptq(quantizer, merged, gram, axis=axis, scale=scale)
    return quantizer.quantize(merged, axis=axis, key=key, scale=scale)


def _operand(quantizer, x, axis, rotated, key, scale):
    """`x` as the forward product takes it: in the rotated space when its partner is rotated alike."""
    if quantizer is None:
        return x
    return (quantizer.in_rotated_space if rotated else quantizer)(x, axis=axis, key=key, scale=scale)


def checked_scales(
    who: str, recipe: LinearRecipe, scales: Mapping[str, Array] | None, packed: bool
) -> dict[str, Array]:
    """`scales` as a dict that holds just the learned scales of this product."""
    scales = dict(scales or {})
    wanted = set(recipe.learned) - ({"rhs"} if packed or recipe.rhs_ready else set())
    if wanted - set(scales):
        raise ValueError(
            f"{who}: the recipe learns the scale of {sorted(wanted)}, and `scales` holds {sorted(scales)}."
            " Start from quantizer.initial_scale(x), or let lb.quantize hold them in the layer."
        )
    if set(scales) - set(recipe.learned):
        raise ValueError(f"{who}: `scales` for {sorted(set(scales) - set(recipe.learned))}, which are not learned.")
    return scales


def _check_recipe(who: str, recipe: Any) -> None:
    if not isinstance(recipe, LinearRecipe):
        raise TypeError(f"{who} got recipe={recipe!r}; it takes a LinearRecipe, such as lb.quest(4).")


def check_operands(who: str, lhs: Any, rhs: Any, key: Any) -> None:
    """Raises: TypeError for operands that are not floating arrays (`rhs` may be packed) and a key that is none."""
    if isinstance(lhs, QTensor):
        raise TypeError(
            f"{who} got a packed lhs. The weight goes on the right: swap the operands, or pass lhs.dequantize()."
        )
    _check_floating(who, "lhs", lhs)
    if not isinstance(rhs, QTensor):
        _check_floating(who, "rhs", rhs)
    if key is not None:
        check_key(who, key)


def _check_floating(who: str, name: str, x: Any) -> None:
    if not hasattr(x, "dtype") or not hasattr(x, "ndim"):
        raise TypeError(f"{who} got a {type(x).__name__} for {name}; it takes arrays: pass jnp.asarray(...).")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{who} got {name} of {x.dtype}; it quantizes floating arrays. Cast it first.")


def _check_weight(who: str, rhs: Any) -> None:
    """Raises: TypeError for a weight that is packed already or no floating array."""
    if isinstance(rhs, QTensor):
        raise TypeError(f"{who} got {rhs!r}, which is packed already. Pass rhs.dequantize() to do it anew.")
    _check_floating(who, "rhs", rhs)


def checked_dtype(who: str, dtype: Any) -> Any:
    """Raises: TypeError for what is no dtype, for `preferred_element_type`."""
    try:
        return jnp.dtype(dtype)
    except TypeError:
        raise TypeError(
            f"{who} got preferred_element_type={dtype!r}; it takes a dtype, such as jnp.float32, or None for that of"
            " lhs."
        ) from None


_NUMBERS = "They are ((lhs contraction, rhs contraction), (lhs batch, rhs batch)), each a sequence of integers."


def _sides(who: str, dimension_numbers: Any) -> DimensionNumbers:
    """((lhs contraction, rhs contraction), (lhs batch, rhs batch)), none of them checked.

    Raises: TypeError for what is not two pairs."""
    try:
        (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    except (TypeError, ValueError):
        raise TypeError(f"{who} got dimension_numbers={dimension_numbers!r}. {_NUMBERS}") from None
    return (lhs_contract, rhs_contract), (lhs_batch, rhs_batch)


def _checked_axes(who: str, side: str, contract: Any, batch: Any, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Non-negative contraction and batch axes of one operand."""
    try:
        axes = tuple(operator.index(a) for a in (*contract, *batch))
    except TypeError:
        raise TypeError(
            f"{who} got dimension_numbers with {contract!r} to contract and {batch!r} as batch axes of {side}."
            f" {_NUMBERS}"
        ) from None
    if any(not -ndim <= a < ndim for a in axes) or len({a % ndim for a in axes}) != len(axes):
        raise ValueError(
            f"{who}: {side} has {ndim} axes, and dimension_numbers name {tuple(contract)} to contract and"
            f" {tuple(batch)} as batch. Name each axis from {-ndim} to {ndim - 1} at most once."
        )
    return tuple(a % ndim for a in contract), tuple(a % ndim for a in batch)


def _rhs_axes(who: str, dimension_numbers: DimensionNumbers, ndim: int) -> tuple[int, ...]:
    """Non-negative contraction axes of the weight, as they lie in it; one at least."""
    (_, contract), (_, batch) = _sides(who, dimension_numbers)
    axes, _ = _checked_axes(who, "rhs", contract, batch, ndim)
    if not axes:
        raise ValueError(f"{who}: no contraction axes, so there is no axis to quantize along.")
    return tuple(sorted(axes))


def _one_contraction(who, lhs, rhs, dimension_numbers):
    packed = isinstance(rhs, QTensor)
    (lc, rc), (lb, rb) = _sides(who, dimension_numbers)
    lhs_axes, lhs_batch = _checked_axes(who, "lhs", lc, lb, lhs.ndim)
    if not lhs_axes:
        raise ValueError(f"{who}: no contraction axes, so there is no axis to quantize along. Multiply instead.")
    if (len(lc), len(lb)) != (len(rc), len(rb)):
        raise ValueError(
            f"{who} got dimension_numbers {dimension_numbers}: lhs and rhs name different numbers of"
            " contraction or batch axes. Name as many on each side."
        )
    rhs_ndim = rhs.ndim + (len(lhs_axes) - 1 if packed else 0)
    rhs_axes, rhs_batch = _checked_axes(who, "rhs", rc, rb, rhs_ndim)
    lhs_axes, rhs_axes = as_rhs_lies(lhs_axes, rhs_axes)
    if not packed:
        sizes = [(lhs.shape[a], rhs.shape[b]) for a, b in zip(lhs_axes, rhs_axes, strict=True)]
        if any(a != b for a, b in sizes):
            raise ValueError(
                f"{who}: contraction axes {lhs_axes} of lhs {lhs.shape} against {rhs_axes} of rhs {rhs.shape}"
                f" differ in length: {', '.join(f'{a} and {b}' for a, b in sizes if a != b)}. Check dimension_numbers,"
                " or in a layer the size of its input."
            )
    lhs, lhs_axis, _ = merge(lhs, lhs_axes)
    lhs_batch = merged_batch(lhs_batch, lhs_axes, lhs.ndim + len(lhs_axes) - 1)
    rhs_batch = merged_batch(rhs_batch, rhs_axes, rhs_ndim)
    if packed:
        rhs_axis = rhs.ndim + rhs.axis
        if rhs_axis != (named := merged_axis(rhs_axes, rhs_ndim)):
            raise ValueError(
                f"{who}: the packed rhs of shape {rhs.shape} lies along axis {rhs_axis}, and dimension_numbers"
                f" contract axis {named}. Pack it along that one: quantizer.quantize(w, axis={named}), or pack_rhs."
            )
        if rhs.length != lhs.shape[lhs_axis]:
            raise ValueError(
                f"{who}: the packed rhs holds {rhs.length} elements along its contraction axis and lhs"
                f" {lhs.shape[lhs_axis]}. Check the size of the layer's input, or pack this layer's own weight."
            )
    else:
        rhs, rhs_axis, _ = merge(rhs, rhs_axes)
    sizes = [(lhs.shape[a], rhs.shape[b]) for a, b in zip(lhs_batch, rhs_batch, strict=True)]
    if any(a != b for a, b in sizes):
        raise ValueError(
            f"{who}: batch axes of lhs {lhs.shape} and rhs {rhs.shape} differ in length:"
            f" {', '.join(f'{a} and {b}' for a, b in sizes if a != b)}. Check the operands; an axis of length 1 is not"
            " repeated: jnp.broadcast_to does that."
        )
    return lhs, rhs, Dims(lhs_axis, rhs_axis, lhs_batch, rhs_batch)
