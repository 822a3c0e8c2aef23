"""Linen: the layers of `lb.explain`, found by tracing a call, and the programs that prove them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen

from lowbit_jax.nn.compiled import evidence
from lowbit_jax.nn.linen import Run, quantization, watching
from lowbit_jax.nn.linen_convert import abstract_call
from lowbit_jax.nn.report import Explanation, Layer, explain_layers, recipe_rows
from lowbit_jax.nn.tracing import programs
from lowbit_jax.qtensor import QTensor


def explain(model: linen.Module, *args: Any, **kwargs: Any) -> Explanation:
    chosen, name = quantization(model), type(model).__name__
    if chosen is None:
        return Explanation(f"{name}: not quantized", ())
    if not args and not kwargs:
        rules = [*chosen.policy.rules, ("the rest", chosen.policy.default)]
        rows = [row for _, recipe in rules if recipe is not None for row in recipe_rows(recipe)]
        kept = tuple(pattern for pattern, recipe in rules if recipe is None)
        return Explanation(
            f"{name}: rules (pass inputs, lb.explain(model, *args), to see the layers)", tuple(rows), kept
        )
    options = dict(kwargs)
    rngs = {"params": jax.random.key(0)} | dict(options.pop("rngs", None) or {})
    variables, inputs = _variables(model, args, options, rngs)
    layers: dict[str, Layer] = {}
    runs: list[Run] = []

    def met(site: Any, recipe: Any, layer: Any) -> None:
        stored = layer.get_variable("params", "kernel") if layer.has_variable("params", "kernel") else None
        packed = stored if isinstance(stored, QTensor) else None
        layers.setdefault(site.path, Layer(site, recipe, packed, (), layer.param_dtype, layer.dtype))

    call = lambda variables, inputs: model.apply(variables, *inputs, rngs=rngs, mutable=True, **options)
    with watching(met, runs):
        abstract_call(call, variables, inputs)
    trainable = not any(layer.packed is not None for layer in layers.values())
    with watching(lambda *_: None):
        texts = programs(call, variables, inputs, trainable)
    sizes = {layer.site.tag: math.prod(layer.site.shape) for layer in layers.values()}
    nodes = {path: node for run in runs for path, node in run.nodes.items()}
    kept = [f"{p} ({n.kind})" for p, n in nodes.items() if p not in layers and (n.layer or n.opaque)]
    title = f"{name}: {len(layers)} quantized layer{'s' * (len(layers) != 1)}"
    return explain_layers(title, list(layers.values()), kept, evidence(*texts, sizes))


def _variables(model: linen.Module, args: tuple, options: dict, rngs: dict) -> tuple[Any, tuple]:
    """The variables given first, or abstract ones as `model.init` would make them."""
    if args and isinstance(args[0], Mapping) and "params" in args[0]:
        return args[0], args[1:]
    return abstract_call(lambda rngs, args: model.init(rngs, *args, **options), rngs, args), args
