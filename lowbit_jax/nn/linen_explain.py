"""Linen: the layers of `lb.explain`, found by tracing a call, and the programs that prove them."""

import math
from collections.abc import Mapping
from typing import Any

from flax import linen

from lowbit_jax.nn.compiled import evidence
from lowbit_jax.nn.linen import Run, quantization, watching
from lowbit_jax.nn.linen_sites import Call, abstract_call
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
    variables, call = _variables_and_call(model, args, kwargs)
    layers: dict[str, Layer] = {}
    runs: list[Run] = []

    def met(site: Any, recipe: Any, layer: Any) -> None:
        stored = layer.get_variable("params", site.weight) if layer.has_variable("params", site.weight) else None
        packed = stored if isinstance(stored, QTensor) else None
        layers.setdefault(site.path, Layer(site, recipe, packed, (), layer.param_dtype, layer.dtype))

    with watching(met, runs):
        abstract_call(call, variables, call.inputs)
    trainable = not any(layer.packed is not None for layer in layers.values())
    with watching(lambda *_: None):
        ran = programs(call, variables, call.inputs, trainable)
    sizes = {layer.site.tag: math.prod(layer.site.shape) for layer in layers.values()}
    nodes = {path: node for run in runs for path, node in run.nodes.items()}
    kept = [node for path, node in nodes.items() if path not in layers]
    title = f"{name}: {len(layers)} quantized layer{'s' * (len(layers) != 1)}"
    found = evidence(ran.forward, ran.backward, sizes)
    return explain_layers(title, list(layers.values()), kept, found, no_gradient=ran.why_not)


def _variables_and_call(model: linen.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, Call]:
    """The variables given first, or abstract ones as `model.init` would make them, and the call."""
    if args and isinstance(args[0], Mapping) and "params" in args[0]:
        return args[0], Call.of(model, args[1:], kwargs)
    call = Call.of(model, args, kwargs)
    return call.init(), call
