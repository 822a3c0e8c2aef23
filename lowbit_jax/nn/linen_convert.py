"""Linen: variables with packed or prepared weights. How a weight is used is known only where the model is traced."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen
from flax.core import FrozenDict, freeze

from lowbit_jax.nn.linen import Quantization, quantization, quantization_of, watching, with_quantization
from lowbit_jax.nn.site import Site, needs_key, stacked
from lowbit_jax.nn.weight import Storage, packed_stack, ready_weight, to_nearest
from lowbit_jax.ops import LinearRecipe
from lowbit_jax.qtensor import QTensor

Sites = dict[str, tuple[Site, LinearRecipe]]


def convert(
    model: linen.Module, storage: Storage, variables: Any = None, *args: Any, **kwargs: Any
) -> tuple[linen.Module, Any]:
    """The model and its variables with packed kernels; see `lb.convert`."""
    sites = _sites(model, variables, args, kwargs, "lb.convert")

    def pack(site: Site, recipe: LinearRecipe, layer: dict[str, Any]) -> dict[str, Any]:
        recipe, scale = to_nearest(recipe), linen.meta.unbox(layer.get("rhs_scale"))
        kept = {name: value for name, value in layer.items() if name != "rhs_scale"}
        if recipe.out.rhs is None:
            return kept
        return kept | {"kernel": packed_stack(linen.meta.unbox(layer["kernel"]), recipe, site, scale, storage)}

    return model, _with_layers(variables, sites, pack)


def prepare(model: linen.Module, variables: Any = None, *args: Any, **kwargs: Any) -> tuple[linen.Module, Any]:
    """The model and its variables with weights quantized once; see `lb.nn.prepare`."""
    sites = _sites(model, variables, args, kwargs, "lb.nn.prepare")
    keys = iter(())
    if any(needs_key(recipe) for _, recipe in sites.values()):
        if "quantize" not in (kwargs.get("rngs") or {}):
            raise ValueError("lb.nn.prepare: a recipe rounds weights stochastically. Pass rngs={'quantize': key}.")
        keys = iter(jax.random.split(kwargs["rngs"]["quantize"], len(sites)))

    def ready(site: Site, recipe: LinearRecipe, layer: dict[str, Any]) -> dict[str, Any]:
        key, scale = next(keys, None), layer.get("rhs_scale")
        kernel, others = linen.meta.unbox((layer["kernel"], {"scale": scale}))
        function = lambda kernel, others: ready_weight(kernel, recipe, site, key=key, **others)
        return layer | {"kernel": stacked(function, kernel, site)(kernel, others)}

    policy = quantization_of(model).policy
    return with_quantization(model, Quantization(policy, form="ready")), _with_layers(variables, sites, ready)


def calibrate(model: linen.Module, variables: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Variables whose learned activation scales are fitted to one batch; see `lb.calibrate`."""
    sites = _sites(model, variables, args, kwargs, "lb.calibrate")
    learned = {path: site for path, site in sites.items() if "lhs" in site[1].learned}
    if not learned:
        raise ValueError("lb.calibrate: no activation scale is learned here; the scales are read off each batch.")
    drop = lambda site, recipe, layer: {name: value for name, value in layer.items() if name != "lhs_scale"}
    rngs = {"params": jax.random.key(0)} | dict(kwargs.pop("rngs", None) or {})
    run = lambda variables, args: model.apply(variables, *args, rngs=rngs, mutable=True, **kwargs)[1]
    new = array_call(jax.jit, run, _with_layers(variables, learned, drop), args)
    fitted = lambda site, recipe, layer: layer | {"lhs_scale": _inside(new["params"], site.path)["lhs_scale"]}
    return _with_layers(variables, learned, fitted)


def _sites(model: Any, variables: Any, args: tuple, kwargs: Mapping[str, Any], who: str) -> Sites:
    """The quantized products of one call, by path."""
    if quantization(model) is None:
        raise ValueError(f"{who}: this {type(model).__name__} is not quantized. Call lb.quantize on it first.")
    if quantization_of(model).form != "training":
        raise ValueError(f"{who}: this {type(model).__name__} is prepared. Use the model that you prepared.")
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise TypeError(f"{who}(model, variables, *args): give the variables of model.init, with 'params' among them.")
    if isinstance(model, linen.Dense) and not args and "kernel" in variables["params"]:
        shape = np.shape(linen.meta.unbox(variables["params"]["kernel"]))
        args = (jax.ShapeDtypeStruct((1, shape[0]), model.param_dtype),)
    if not args and not kwargs:
        raise TypeError(
            f"{who}(model, variables, *args): a Linen model shows how it uses its weights only in a call. Pass the"
            " inputs of"
            " one, or jax.ShapeDtypeStruct of their shapes."
        )
    sites = trace_sites(model, variables, args, kwargs)
    if normed := [name for name in _names(variables) if "/kernel/" in f"/{name}"]:
        raise ValueError(
            f"{who}: {normed[0]!r} belongs to a weight that a norm (linen.WeightNorm, SpectralNorm) makes at each call:"
            " there is nothing to keep. Leave its layer out by a rule, or fold the norm into it first."
        )
    for path in sites:
        if isinstance(_inside(variables["params"], path)["kernel"], QTensor):
            raise ValueError(f"{who}: the layer {path!r} is packed already. Use the variables of the training form.")
    unseen = [
        p for p in _kernels(variables["params"]) if p not in sites and quantization_of(model).recipe(p) is not None
    ]
    if unseen:
        raise ValueError(
            f"{who}: this call does not reach {', '.join(map(repr, unseen[:4]))}. Pass inputs (and `method=`) that"
            " run the"
            " whole model, or leave these out by a rule."
        )
    return sites


def trace_sites(model: linen.Module, variables: Any, args: tuple, kwargs: Mapping[str, Any]) -> Sites:
    """Site and recipe of each quantized product that the call runs."""
    sites: Sites = {}
    options = dict(kwargs)
    rngs = {"params": jax.random.key(0)} | dict(options.pop("rngs", None) or {})
    with watching(lambda site, recipe, layer: sites.update({site.path: (site, recipe)})):
        static = lambda variables, args: model.apply(variables, *args, rngs=rngs, mutable=True, **options)
        abstract_call(static, variables, args)
    return sites


def abstract_call(function: Callable[..., Any], variables: Any, args: tuple) -> Any:
    """`function(variables, args)` on shapes."""
    return array_call(lambda f: functools.partial(jax.eval_shape, f), function, variables, args)


def array_call(transform: Callable[..., Any], function: Callable[..., Any], variables: Any, args: tuple) -> Any:
    """`transform(function)(variables, args)`, where what is no array in `args` is not traced."""
    is_array = lambda a: hasattr(a, "shape") and hasattr(a, "dtype")
    leaves, tree = jax.tree.flatten(args)
    arrays = [a if is_array(a) else None for a in leaves]
    rebuild = lambda given: tree.unflatten([g if is_array(a) else a for g, a in zip(given, leaves, strict=True)])
    return transform(lambda v, given: function(v, rebuild(given)))(variables, arrays)


def _kernels(tree: Any, path: tuple[str, ...] = ()) -> list[str]:
    if not isinstance(tree, Mapping):
        return []
    own = ["/".join(path)] if "kernel" in tree and not isinstance(tree["kernel"], Mapping) else []
    return own + [p for name, value in tree.items() for p in _kernels(value, (*path, str(name)))]


def _names(tree: Any) -> list[str]:
    """The names of variables; a norm around a layer writes a path into one, such as Dense_0/kernel/scale."""
    if not isinstance(tree, Mapping):
        return []
    return [n for name, value in tree.items() for n in (_names(value) if isinstance(value, Mapping) else [str(name)])]


def _inside(params: Any, path: str) -> Any:
    for part in path.split("/") if path else ():
        params = params[part]
    return params


def _with_layers(variables: Any, sites: Sites, change: Callable[..., dict[str, Any]]) -> Any:
    """`variables` with `change(site, recipe, layer)` in place of the parameters of each layer in `sites`."""

    def visit(tree: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        new = {name: visit(value, (*path, name)) for name, value in tree.items()}
        found = sites.get("/".join(path))
        return new if found is None else change(*found, new)

    new = {name: visit(tree, ()) if name == "params" else tree for name, tree in variables.items()}
    return freeze(new) if isinstance(variables, FrozenDict) else new
