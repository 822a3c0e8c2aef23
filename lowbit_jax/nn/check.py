"""Shape errors before the first step: the quantizers of a recipe tried, abstractly, on the shapes of a layer."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowbit_jax.nn.site import Site, initial_scales, needs_key, stacked
from lowbit_jax.nn.weight import ready_weight
from lowbit_jax.ops import LinearRecipe


def check_site(site: Site, recipe: LinearRecipe, kernel: Array, where: str) -> None:
    """Raises what quantizing would raise (a group that does not divide the contraction, a dtype), with the layer's name."""
    try:
        _try(dataclasses.replace(site, path=""), recipe, tuple(kernel.shape), jnp.dtype(kernel.dtype))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(f"{where}, weight {kernel.dtype}{list(kernel.shape)}: {error}") from error


@functools.lru_cache(maxsize=1024)  # models repeat their layers
def _try(site: Site, recipe: LinearRecipe, shape: tuple[int, ...], dtype: Any) -> None:
    jax.eval_shape(lambda kernel: _quantize_all(kernel, recipe, site), jax.ShapeDtypeStruct(shape, dtype))


def _quantize_all(kernel: Array, recipe: LinearRecipe, site: Site):
    scales = {side: value.reshape(-1)[0] for side, value in initial_scales(recipe, site, kernel).items()}
    key = jax.random.key(0) if needs_key(recipe) else None
    one = lambda k: ready_weight(k, recipe, site, scale=scales.get("rhs"), key=key)
    weight = stacked(one, kernel, site)(kernel)
    lhs = recipe.out.lhs
    if lhs is None:
        return weight
    size = site.shape[-2] if site.kind == "conv_general_dilated" else site.length
    return weight, lhs(jnp.zeros((1, size)), key=key, scale=scales.get("lhs"))
