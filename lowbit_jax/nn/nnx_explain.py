"""NNX: the layers of `lb.explain`, and the programs that prove them."""

import dataclasses
import math
from typing import Any

from flax import nnx

from lowbit_jax.nn.bridge import quantized_inside
from lowbit_jax.nn.compiled import evidence
from lowbit_jax.nn.nnx import PackedWeight, describe, hook, layer_type, modules, weight_of
from lowbit_jax.nn.report import Explanation, Layer, explain_layers
from lowbit_jax.nn.tracing import programs
from lowbit_jax.ops import LinearRecipe


def explain(model: nnx.Module, *args: Any, **kwargs: Any) -> Explanation:
    layers, kept = [], []
    module: Any
    for module, paths in modules(model):
        node = describe(module, paths)
        product = hook(module) if layer_type(module) else None
        if product is not None:
            value = weight_of(module).get_value()
            packed = value if isinstance(weight_of(module), PackedWeight) else None
            stack = () if packed is not None else value.shape[: value.ndim - len(product.site.shape)]
            layers.append(Layer(product.site, product.recipe, packed, tuple(stack), value.dtype, module.dtype))
        elif node.bridge and quantized_inside(module):
            kept.append(dataclasses.replace(node, kind=f"{node.kind}, quantized inside"))
        else:
            kept.append(node)
    title = f"{type(model).__name__}: {len(layers)} quantized layer{'s' * (len(layers) != 1)}"
    if not args and not kwargs:
        return explain_layers(title, layers, kept)
    graph, state = nnx.split(model)
    trainable = not any(layer.packed is not None for layer in layers)
    ran = programs(
        lambda state, given: nnx.merge(graph, state)(*given[0], **given[1]), state, (args, kwargs), trainable
    )
    sizes = {layer.site.tag: math.prod(layer.site.shape) for layer in layers}
    found = evidence(ran.forward, ran.backward, sizes)
    return explain_layers(title, layers, kept, found, no_gradient=ran.why_not)


def recipes(model: nnx.Module) -> dict[str, LinearRecipe]:
    """See `lb.nn.recipes`."""
    found = [(paths, hook(module)) for module, paths in modules(model) if layer_type(module) is not None]
    return {path: product.recipe for paths, product in found if product is not None for path in paths}
