"""NNX: learned scales from batches, those of activations and of weights that a norm makes at every call."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from jax import core
from jaxtyping import Array

from lowbit_jax.nn.met import LOSES, call_arguments, closed_over, no_batches, runs, several
from lowbit_jax.nn.nnx import StatefulProduct, attribute_of, layer_type, modules, normed_layers

WHO = "lb.calibrate"


Scales = dict[str, dict[str, tuple[Array, Array, Array]]]  # by layer and side: the scale, numbers of calls and fits


def calibrate(model: nnx.Module, *args: Any, **kwargs: Any) -> nnx.Module:
    """Sets the scales in place and returns the model; see `lb.calibrate`."""
    return _calibrated(model, WHO, [(args, kwargs)], jnp.nanmean)


def calibrate_over(model: nnx.Module, batches: Iterable[Any], statistic: Callable) -> nnx.Module:
    """The same over several batches; see `lb.nn.calibrate_over`."""
    who = "lb.nn.calibrate_over"
    return _calibrated(model, who, map(call_arguments, several(batches, who)), statistic)


def _calibrated(
    model: nnx.Module, who: str, calls: Iterable[tuple[tuple, dict[str, Any]]], statistic: Callable
) -> nnx.Module:
    """statistic: of the scales that the calls fit, `jnp.nanmean` or `jnp.nanmax`; calls whose operand is all zeros,
    which fits none, are left out."""
    held = _held(model)
    if not held:
        raise ValueError(
            f"{who}: no activation scale is learned here. Quantize with a method that learns it, such as"
            " lb.methods.get('lsq', bits=4); the others read their scales off each batch."
        )
    run, found = _program(model), []
    for args, kwargs in calls:
        refuse_traced(who, model, args, kwargs)
        runs()  # forgets those of a call that raised
        found.append(_checked(run(*split_arrays(who, args, kwargs)), who))
    if not found:
        raise ValueError(no_batches(who))
    for path, (product, sides) in held.items():
        for side in sides:
            scale = _scale(product, side)
            fitted = [jnp.where(fits == 0, jnp.nan, own) for own, _, fits in (scales[path][side] for scales in found)]
            start, met = scale.get_value(), statistic(jnp.stack(fitted), axis=0)
            scale.set_value(jnp.where(jnp.isnan(met), start, met.astype(start.dtype)))
    return model


def _checked(scales: Scales, who: str) -> Scales:
    counted = runs()
    lost = sorted(
        path
        for path, sides in scales.items()
        if any(jnp.sum(calls) < counted.get(f"{path}/{side}", 0) for side, (_, calls, _) in sides.items())
    )
    if lost:
        raise ValueError(f"{who}: this call set no scale in {_named(lost)}, or not from all of its runs: {LOSES}.")
    unset = sorted(path for path, sides in scales.items() if any(jnp.any(jnp.isnan(s)) for s, *_ in sides.values()))
    if unset:
        raise ValueError(
            f"{who}: this call set no scale in {_named(unset)}: it does not reach them, or they got NaN (find it"
            " by lb.check_finite). Pass inputs that run these layers, or leave them out by a rule."
        )
    return scales


def refuse_traced(who: str, model: nnx.Module, *inputs: Any) -> None:
    """Raises ValueError inside of a transformation of the model or the inputs."""
    if any(isinstance(leaf, core.Tracer) for leaf in jax.tree.leaves((nnx.state(model), inputs))):
        raise ValueError(
            f"{who} got a model or inputs that are being traced (by nnx.jit, jax.vmap, jax.grad), and looks at the"
            " numbers that it finds. Call it outside of the transformation; it compiles the calls of the model itself."
        )


def _named(paths: list[str]) -> str:
    return ", ".join(map(repr, paths[:4])) + (", ..." if len(paths) > 4 else "")


def _held(model: nnx.Module) -> dict[str, tuple[StatefulProduct, tuple[str, ...]]]:
    """Products that hold a scale to fit, with its sides, by path of the layer."""
    normed, held = normed_layers(model), {}
    for layer, paths in modules(model):
        product = getattr(layer, attribute_of(layer), None) if layer_type(layer) else None
        if isinstance(product, StatefulProduct):
            wanted = ("lhs", "rhs") if paths[0] in normed else ("lhs",)
            if sides := tuple(side for side in wanted if hasattr(product, f"{side}_scale")):
                held[paths[0]] = product, sides
    return held


def _scale(product: StatefulProduct, side: str) -> nnx.Variable:
    return vars(product)[f"{side}_scale"]


def _program(model: nnx.Module) -> Callable[[list, "Call"], Scales]:
    """What one compiled call of a copy sets and how often, so that statistics, keys and weights stay as they are; NaN
    where it sets nothing. Calls alike are compiled once."""
    graph, state = nnx.split(model)

    def run(state: Any, arrays: list, call: "Call") -> Scales:
        copy = nnx.merge(graph, state)
        held = _held(copy)
        for path, (product, sides) in held.items():
            for side in sides:
                product.start_calibration(side, path)
        call(copy, arrays)
        return {path: {s: product.calibrated(s) for s in sides} for path, (product, sides) in held.items()}

    cached = jax.jit(run, static_argnums=2)

    def compiled(arrays: list, call: "Call") -> Scales:
        try:
            hash(call)
        except TypeError:  # given a list, or another object that has no hash
            return jax.jit(functools.partial(run, call=call))(state, arrays)
        return cached(state, arrays, call)

    return compiled


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A call of a model without its arrays, what else it is given staying as it is; hashable where that is.

    others: the leaves in the order of the tree, None for each array."""

    who: str
    tree: Any  # a PyTreeDef
    others: tuple[Any, ...]

    def __call__(self, model: Any, arrays: list) -> Any:
        rest = iter(arrays)
        args, kwargs = self.tree.unflatten([next(rest) if leaf is None else leaf for leaf in self.others])
        try:
            return model(*args, **kwargs)
        except TraceContextError as error:
            raise closed_over(self.who, "a layer") from error


def split_arrays(who: str, args: tuple, kwargs: dict[str, Any]) -> tuple[list, Call]:
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = lambda leaf: hasattr(leaf, "dtype") and hasattr(leaf, "shape")
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    return arrays, Call(who, tree, tuple(None if is_array(leaf) else leaf for leaf in leaves))
