"""NNX: the same model with its weights packed (`convert`) or quantized once for many microbatches (`prepare`)."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

import lowbit_jax.nn.serialization  # noqa: F401  # makes flax.serialization know packed weights
from lowbit_jax.nn.bridge import quantized_inside, way_inside
from lowbit_jax.nn.nnx import (
    PackedWeight,
    PreparedWeight,
    StatefulProduct,
    attribute_of,
    check_stacked,
    edited,
    hook,
    layer_type,
    modules,
    normed_layers,
    weight_name,
    weight_of,
)
from lowbit_jax.nn.product import Product
from lowbit_jax.nn.site import called, stacked
from lowbit_jax.nn.weight import Storage, packed_stack, ready_weight, to_nearest


def convert(model: nnx.Module, storage: Storage, grams: Mapping[str, Array] = MappingProxyType({})) -> nnx.Module:
    """The packed view; see `lb.convert`. grams: of the inputs of layers, by path, for levels by GPTQ; those of layers
    that share their weight are summed."""
    products = _quantized(model, "lb.convert", "nothing to pack")
    _check_plain(model, "lb.convert")
    packed: dict[Any, tuple[Any, PackedWeight]] = {}  # weights that layers share stay one
    met: dict[Any, Array] = {}
    for layer, paths in modules(model):
        if (gram := grams.get(paths[0])) is not None:
            as_used = _as_used(layer, products[paths[0]])
            met[as_used] = met[as_used] + gram if as_used in met else gram

    def change(layer: Any, product: Product) -> None:
        name = called(product.site.path, type(layer))
        held = weight_of(layer)
        if isinstance(held, PackedWeight):
            raise ValueError(f"lb.convert: {name} is packed already. Convert the training form once.")
        if product.recipe.rhs_ready:
            raise ValueError(f"lb.convert: {name} is prepared. Convert the model that you prepared.")
        recipe = to_nearest(product.recipe)
        if recipe.out.rhs is not None:
            check_stacked(layer, product.site, f"lb.convert: {name}")
            as_used = _as_used(layer, product)
            if as_used not in packed:
                kernel = packed_stack(held.get_value(), recipe, product.site, _weight_scale(layer), storage,
                                      met.get(as_used))  # fmt: skip
                packed[as_used] = held, PackedWeight(kernel)
            setattr(layer, weight_name(layer), packed[as_used][1])
        _replace(layer, dataclasses.replace(product, recipe=recipe), drop=("rhs_scale", "rngs"))

    return edited(model, products, change)


def prepare(model: nnx.Module) -> nnx.Module:
    """The view with quantized weights; see `lb.nn.prepare`."""
    products = _quantized(model, "lb.nn.prepare", "no weight to prepare")
    _check_plain(model, "lb.nn.prepare")

    def change(layer: Any, product: Product) -> None:
        if product.site.kind == "embedding":  # its rows are rounded where they are looked up
            return
        if isinstance(layer.kernel, PackedWeight) or product.recipe.rhs_ready or not product.recipe.rhs_once:
            return
        check_stacked(layer, product.site, f"lb.nn.prepare: {called(product.site.path, type(layer))}")
        key = _draw(_held(layer).rngs) if product.recipe.needs_key else None
        kernel, others = layer.kernel.get_value(), {"scale": _weight_scale(layer), "key": key}
        ready = lambda kernel, others: ready_weight(kernel, product.recipe, product.site, **others)
        prepared = stacked(ready, kernel, product.site)(kernel, others)
        layer.kernel = PreparedWeight.from_metadata(prepared, layer.kernel.get_metadata())
        _replace(layer, dataclasses.replace(product, recipe=product.recipe.with_rhs_ready()), drop=("rhs_scale",))

    return edited(model, products, change)


def _as_used(layer: Any, product: Product) -> tuple:
    """What is alike for layers whose packed weights are one."""
    site = dataclasses.replace(product.site, path="")
    return id(weight_of(layer)), to_nearest(product.recipe), site, id(_weight_scale(layer))


def _check_plain(model: Any, who: str) -> None:
    """Raises ValueError for quantized layers whose weight is made anew at every call."""
    for path, norm in normed_layers(model).values():
        raise ValueError(
            f"{who}: {called(path, norm)} makes the weight of its layer at every call, so there is"
            " nothing to keep. Leave the layer out by a rule, or fold the norm into it first."
        )


def _quantized(model: Any, who: str, otherwise: str) -> dict[str, Product]:
    """Products of the quantized layers, under all of their paths."""
    products, bridges = {}, []
    for module, paths in modules(model):
        if way_inside(module) and quantized_inside(module):
            bridges.append(called(paths[0], type(module)))
        if layer_type(module) is not None and (product := hook(module)) is not None:
            products |= dict.fromkeys(paths, product)
    if not products and bridges:
        raise ValueError(
            f"{who}: what is quantized is the Linen module inside of {bridges[0]}, and it does not reach through the"
            f" bridge. Call {who}(linen_module, variables, *args) on that."
        )
    if not products:
        raise ValueError(
            f"{who}: this {type(model).__name__} has no quantized layer, so {otherwise}. Call lb.quantize first."
        )
    return products


def _held(layer: Any) -> Any:
    return getattr(layer, attribute_of(layer))


def _weight_scale(layer: Any) -> Array | None:
    scale = getattr(_held(layer), "rhs_scale", None)
    return None if scale is None else scale.get_value()


def _draw(stream: nnx.RngStream) -> Array:
    """The next key, or keys of a stack of streams."""
    key, count = stream.key.get_value(), stream.count.get_value()
    draw = jax.random.fold_in
    for _ in range(key.ndim):
        draw = jax.vmap(draw)
    stream.count.set_value(count + 1)
    return draw(key, count)


def _replace(layer: Any, product: Product, drop: tuple[str, ...]) -> None:
    """Puts `product` in the layer and keeps what it still needs of a stateful one."""
    attribute, held = attribute_of(layer), _held(layer)
    if not isinstance(held, StatefulProduct):
        setattr(layer, attribute, nnx.static(product))
        return
    kept = {
        name: value
        for name, value in vars(held).items()
        if name in ("lhs_scale", "rhs_scale", "rngs") and name not in drop
    }
    if not kept:
        setattr(layer, attribute, nnx.static(product))
        return
    fresh = StatefulProduct(product, {}, None)
    for name, value in kept.items():
        setattr(fresh, name, value)
    setattr(layer, attribute, nnx.data(fresh))
