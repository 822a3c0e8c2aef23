"""Linen: variables with packed or prepared weights."""

from typing import Any

import jax
from flax import linen

import lowbit_jax.nn.serialization  # noqa: F401  # makes flax.serialization know packed weights
from lowbit_jax.nn.linen import Quantization, quantization_of, with_quantization
from lowbit_jax.nn.linen_layers import missing_scale
from lowbit_jax.nn.linen_sites import packable_sites, with_layers
from lowbit_jax.nn.site import Site, stacked
from lowbit_jax.nn.weight import Storage, packed_stack, ready_weight, to_nearest
from lowbit_jax.ops import LinearRecipe


def convert(
    model: linen.Module, storage: Storage, variables: Any = None, *args: Any, **kwargs: Any
) -> tuple[linen.Module, Any]:
    """The model and its variables with packed kernels; see `lb.convert`."""
    sites = packable_sites(model, variables, args, kwargs, "lb.convert")

    def pack(site: Site, recipe: LinearRecipe, layer: dict[str, Any]) -> dict[str, Any]:
        recipe, scale = to_nearest(recipe), linen.meta.unbox(layer.get("rhs_scale"))
        kept = {name: value for name, value in layer.items() if name != "rhs_scale"}
        if recipe.out.rhs is None:
            return kept
        if "rhs" in recipe.learned and scale is None:
            raise ValueError(missing_scale("lb.convert", site.path, "rhs"))
        weight = linen.meta.unbox(layer[site.weight])
        return kept | {site.weight: packed_stack(weight, recipe, site, scale, storage)}

    return model, with_layers(variables, sites, pack)


def prepare(model: linen.Module, variables: Any = None, *args: Any, **kwargs: Any) -> tuple[linen.Module, Any]:
    """The model and its variables with weights quantized once; see `lb.nn.prepare`."""
    sites = packable_sites(model, variables, args, kwargs, "lb.nn.prepare")
    once = lambda site, recipe: recipe.rhs_once and site.kind != "embedding"  # whose rows are rounded where looked up
    sites = {path: found for path, found in sites.items() if once(*found)}
    keys = iter(())
    if any(recipe.needs_key for _, recipe in sites.values()):
        if "quantize" not in (kwargs.get("rngs") or {}):
            raise ValueError("lb.nn.prepare: a recipe rounds weights stochastically. Pass rngs={'quantize': key}.")
        keys = iter(jax.random.split(kwargs["rngs"]["quantize"], len(sites)))

    def ready(site: Site, recipe: LinearRecipe, layer: dict[str, Any]) -> dict[str, Any]:
        key, scale = next(keys, None), layer.get("rhs_scale")
        if "rhs" in recipe.learned and scale is None:
            raise ValueError(missing_scale("lb.nn.prepare", site.path, "rhs"))
        kernel, others = linen.meta.unbox((layer["kernel"], {"scale": scale}))
        function = lambda kernel, others: ready_weight(kernel, recipe, site, key=key, **others)
        return layer | {"kernel": stacked(function, kernel, site)(kernel, others)}

    policy = quantization_of(model).policy
    return with_quantization(model, Quantization(policy, form="ready")), with_layers(variables, sites, ready)
