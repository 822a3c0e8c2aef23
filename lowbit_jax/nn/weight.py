"""The weight of a site, quantized once: as an array that gradients pass (`ready_weight`), or packed (`packed_weight`).

Convolutions rotate the channels of a weight and share its scales over window and channels; packed, both are one axis.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit_jax import packing, rounding
from lowbit_jax.nn.site import Site, operand, stacked
from lowbit_jax.ops import LinearRecipe, pack_rhs
from lowbit_jax.ops.backend import IMPLEMENTATIONS, sees_gpu
from lowbit_jax.ops.conv import refuse_fresh_signs
from lowbit_jax.ops.dot_general import prepare_rhs
from lowbit_jax.ops.packed_product import word_bits
from lowbit_jax.ops.plane_tensor import LAYOUT as PLANES
from lowbit_jax.ops.plane_tensor import to_planes, why_not
from lowbit_jax.ops.prepared import PreparedKernel
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.rotation import Hadamard, largest_block


def ready_weight(
    kernel: Float[Array, "*s"],
    recipe: LinearRecipe,
    site: Site,
    *,
    scale: Array | None = None,
    key: Array | None = None,
) -> PreparedKernel:
    """The weight as the product uses it, for `recipe.with_rhs_ready()`; differentiable, same shape and dtype."""
    if site.kind != "conv_general_dilated":
        return prepare_rhs(kernel, site.numbers, recipe, scale=scale, key=key)
    refuse_fresh_signs(recipe)
    if recipe.out.rhs is None or recipe.rhs_ready:
        return PreparedKernel(kernel)
    quantizer = channel_rotation(operand(recipe, "rhs"), kernel.shape[-2])
    function = quantizer.in_rotated_space if recipe.shared_rotation else quantizer
    return PreparedKernel(function(kernel, axis=site.contract, scale=scale, key=key).astype(kernel.dtype))


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """How packed weights are laid out, and what computes with them.

    layout: "bitstream-le/1", rows of codes without gaps, or "planes/1", for the kernels; a weight that they cannot read
    stays in the first. implementation: see `ops.PlaneTensor`; anything but "auto" needs "planes/1".
    Raises: ValueError for other layouts or implementations, and where the implementation could not take effect."""

    layout: str = packing.LAYOUT
    implementation: str = "auto"

    def __post_init__(self):
        if self.layout not in (packing.LAYOUT, PLANES):
            raise ValueError(f"lb.convert(layout={self.layout!r}): the layouts are {packing.LAYOUT!r} and {PLANES!r}.")
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"lb.convert(implementation={self.implementation!r}): it is one of {', '.join(IMPLEMENTATIONS)}."
            )
        if self.layout != PLANES and self.implementation != "auto":
            way_out = f"kernels read the layout {PLANES!r}; pass it too"
            if self.implementation == "reference":
                way_out += ", or quantize with recipe.with_implementation('reference'), which a packed model keeps"
            raise ValueError(f"lb.convert(implementation={self.implementation!r}): {way_out}.")


def default_layout() -> str:
    """The layout that `lb.convert` packs into unless told, by the backend that JAX runs on."""
    return PLANES if sees_gpu() else packing.LAYOUT


def packed_weight(
    kernel: Float[Array, "*s"],
    recipe: LinearRecipe,
    site: Site,
    *,
    scale: Array | None = None,
    storage: Storage = Storage(),  # noqa: B008  frozen
    gram: Array | None = None,
) -> QTensor:
    """Packed codes and scales of the weight, its contraction axes merged into one; sealed. gram: as in `pack_rhs`.

    Raises: NotImplementedError when the storage asks for a kernel that cannot read this weight."""
    return _packed_weight(kernel, recipe, site, scale, storage, gram).sealed()


def _packed_weight(
    kernel: Array, recipe: LinearRecipe, site: Site, scale: Array | None, storage: Storage, gram: Array | None
) -> QTensor:
    if site.kind != "conv_general_dilated":
        packed = pack_rhs(kernel, site.numbers, recipe, scale=scale, gram=gram)
        if storage.layout != PLANES:
            return packed
        reason = "its rows are read one by one" if site.kind == "embedding" else why_not(packed)
        if reason is None:
            asked = storage.implementation
            implementation = recipe.inherited_implementation if asked == "auto" else asked
            return to_planes(packed, word_bits(recipe.out.lhs), implementation)
        if storage.implementation != "auto":
            raise NotImplementedError(f"lb.convert: no kernel reads the weight of {site.path!r}: {reason}.")
        return packed
    if storage.implementation != "auto":
        raise NotImplementedError(
            f"lb.convert: {site.path!r} is a convolution, which has no kernel. Leave it out by a rule."
        )
    quantizer = operand(recipe, "rhs")
    rotation = quantizer.rotation
    if rotation is not None and rotation.signs is not None:
        raise NotImplementedError(
            "random signs along the channels of a convolution have no packed form. Use Hadamard(signs=None) for it."
        )
    merged = kernel.reshape(-1, kernel.shape[-1])
    return channel_rotation(quantizer, kernel.shape[-2]).quantize(merged, axis=0, scale=scale)


@functools.partial(jax.jit, static_argnames=("recipe", "site", "storage"))
def _packed_stack(
    kernel: Array, scale: Array | None, gram: Array | None, recipe: LinearRecipe, site: Site, storage: Storage
) -> QTensor:
    pack = lambda kernel, scale, gram: packed_weight(kernel, recipe, site, scale=scale, storage=storage, gram=gram)
    return stacked(pack, kernel, site)(kernel, scale, gram)


def packed_stack(
    kernel: Array, recipe: LinearRecipe, site: Site, scale: Array | None, storage: Storage, gram: Array | None = None
) -> QTensor:
    """`packed_weight` over the leading axes of stacked layers, compiled once for layers alike; shapes for the shape of
    a kernel (`nnx.eval_shape`)."""
    pack = lambda *arrays: _packed_stack(*arrays, recipe, dataclasses.replace(site, path=""), storage)
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.eval_shape(pack, kernel, scale, gram)
    return pack(kernel, scale, gram)


def convolution_weight(packed: QTensor, recipe: LinearRecipe, site: Site, dtype: Any) -> Float[Array, "*s"]:
    """The array that `ready_weight` would give, from the packed form: rotated when the activation is rotated alike."""
    values = packed.values(jnp.float32) if recipe.shared_rotation else packed.dequantize(jnp.float32)
    return values.reshape(site.shape).astype(dtype)


def channel_rotation(quantizer: Quantizer, channels: int) -> Quantizer:
    """The quantizer with a block that divides the channels of one window position."""
    if quantizer.rotation is None:
        return quantizer
    rotation = Hadamard(block=largest_block(channels, quantizer.rotation.block), signs=quantizer.rotation.signs)
    return dataclasses.replace(quantizer, rotation=rotation)


def to_nearest(recipe: LinearRecipe) -> LinearRecipe:
    """The forward product with stochastic roundings replaced by nearest, as a converted model computes it: by the
    kernels that read packed weights, or by XLA where the recipe says "reference".

    Raises: NotImplementedError for fresh signs and scales that `debias` draws."""
    for quantizer in recipe.forward_quantizers:
        if quantizer is not None and quantizer.drawn:
            raise NotImplementedError(
                f"a packed model draws no random numbers, and this recipe has {quantizer.drawn} in the forward product."
                " Use it in backward products, and in `out` Hadamard(signs=0) and no debias."
            )
    change = lambda q: (
        dataclasses.replace(q, rounding=rounding.nearest) if q and q.rounding is rounding.stochastic else q
    )
    out = dataclasses.replace(recipe.out, lhs=change(recipe.out.lhs), rhs=change(recipe.out.rhs))
    return LinearRecipe(out=out, name=recipe.name, implementation=recipe.inherited_implementation)
