"""Fully sharded training of a Flax NNX model inside `jax.shard_map`: weights arrive as shards, and each layer gathers
its own when it computes.

A quantized layer quantizes its shard and gathers packed words; with layers in a scan and `remat` no device ever holds
more than one layer's whole weight. Source: Rajbhandari et al. 2020, arXiv:1910.02054 (ZeRO stage 3); Wang et al. 2023,
arXiv:2306.10209 (quantized weights).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from lowbit_jax.estimators import LSQ
from lowbit_jax.nn.nnx import StatefulProduct, attribute_of, edited, hook, layer_type, modules
from lowbit_jax.nn.product import Product
from lowbit_jax.ops.prepared import PreparedKernel
from lowbit_jax.parallel.collectives import FLOAT, Reduction, all_gather, all_gather_kernel
from lowbit_jax.parallel.rules import leaf_path


@dataclasses.dataclass(frozen=True, slots=True)
class GatheredProduct:
    """The quantized product of a layer whose weight is a shard along `axis` (counted from the end)."""

    product: Product
    axis_name: str
    axis: int
    packed: bool
    reduction: Reduction

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        at = 2 if self.product.site.kind == "einsum" else 1
        args = (*args[:at], self._whole(args[at]), *args[at + 1 :])
        recipe = self.product.recipe.with_rhs_ready() if self.packed else self.product.recipe
        return dataclasses.replace(self.product, recipe=recipe).compute(args, kwargs)

    def _whole(self, shard: Array) -> Array | PreparedKernel:
        if not self.packed:
            return all_gather(shard, self.axis_name, self.axis, self.reduction)
        recipe, (contract,) = self.product.recipe, self.product.site.contract
        return all_gather_kernel(
            shard, recipe, self.axis_name, axis=self.axis, contract=contract, reduction=self.reduction
        )


def gather_layers(model: Any, placed: Any, axis_name: str = "fsdp", *, packed: bool = True,
                  reduction: Reduction = FLOAT, shards: int = 1) -> Any:  # fmt: skip
    """A view of `model`, whose parameters are this device's shards, that computes what the whole model would.

    `placed` is `shardings` of the whole model's parameters; what it cuts over `axis_name` is gathered: by its layer
    when it computes, packed where its recipe quantizes the weight (`packed=False`: as it is), other parameters at once.
    The cotangents are summed over `axis_name` by `reduction`, so a loss that is the mean of a device's own share of the
    batch has to be divided by the devices. `shards` is the number of devices that have a share each: LSQ divides the
    gradient of an activation's step by the root of the elements that share it, of which a device counts its own only.
    Raises: NotImplementedError for a quantized layer that has no packed gather: learned scales, stochastic weights,
    convolutions, several contraction axes, and backward products that read the original weight."""
    cuts = _cuts(placed, axis_name)
    layers = {}
    for module, paths in modules(model):
        product = hook(module) if layer_type(module) is not None else None
        layers |= dict.fromkeys(paths, (paths[0], product))

    def change(module: Any, found: tuple[str, Product | None]) -> None:
        path, product = found
        if product is not None and isinstance(held := getattr(module, attribute_of(module)), StatefulProduct):
            _count_all_elements(held, shards)
        for name, variable in list(vars(module).items()):
            axis = cuts.get(f"{path}/{name}" if path else name)
            if axis is None or not hasattr(variable, "get_value"):
                continue
            if product is not None and product.recipe.out.rhs is not None and name == "kernel":
                if packed:
                    _check(module, product)
                held = GatheredProduct(product, axis_name, axis, packed, reduction)
                if packed or not isinstance(getattr(module, attribute_of(module)), StatefulProduct):
                    setattr(module, attribute_of(module), held)
                    continue
            setattr(module, name, variable.replace(all_gather(variable.get_value(), axis_name, axis, reduction)))

    return edited(model, layers, change)


def _count_all_elements(held: StatefulProduct, shards: int) -> None:
    """Makes the gradient of a learned activation step that of an activation which is `shards` times as long."""
    quantizer, variable = held.product.recipe.out.lhs, vars(held).get("lhs_scale")
    if variable is not None and shards > 1 and isinstance(getattr(quantizer, "estimator", None), LSQ):
        value = _with_gradient_times(variable.get_value(), shards**-0.5)
        setattr(held, "lhs_scale", variable.replace(value))  # noqa: B010  its type does not tell that it has one


def _with_gradient_times(x: Float[Array, "*s"], factor: float) -> Float[Array, "*s"]:
    still = lax.stop_gradient(x)
    return still + factor * (x - still)


def _cuts(placed: Any, axis_name: str) -> Mapping[str, int]:
    """Axis, from the end, that `axis_name` cuts, by the path of the parameter."""
    answer = {}
    is_sharding = lambda leaf: isinstance(leaf, NamedSharding)
    for path, sharding in jax.tree.flatten_with_path(placed, is_leaf=is_sharding)[0]:
        for axis, cut in enumerate(sharding.spec):
            if axis_name == cut or isinstance(cut, tuple) and axis_name in cut:
                answer[leaf_path(path)] = axis - len(sharding.spec)
    return answer


def _check(module: Any, product: Product) -> None:
    site, recipe = product.site, product.recipe
    problem = None
    if isinstance(getattr(module, attribute_of(module)), StatefulProduct):
        problem = "draws random keys" if recipe.needs_key else "learns a scale"
    elif site.kind == "conv_general_dilated" or len(site.contract) != 1:
        problem = f"is a {site.kind} that sums over {len(site.contract)} axes of its weight"
    elif not recipe.grad_lhs.reads_forward("rhs") or recipe.rhs_ready:
        problem = "reads its original weight in the backward product"
    if problem:
        raise NotImplementedError(
            f"gather_layers: the layer {site.path!r} {problem}, which has no packed gather. Pass packed=False to gather"
            " its weight in float, or give it another recipe by a rule."
        )
