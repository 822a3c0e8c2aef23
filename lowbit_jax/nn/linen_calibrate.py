"""Linen: learned scales from batches, those of activations and of weights that a norm makes at every call.

A call fits each scale where it is used and writes it into `params`. Where Flax does not let it, in a loop whose turns
share their parameters or under a norm of weights, the call reports all that it fits instead."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, linen
from flax.core import DenyList
from jax import core
from jaxtyping import Array

from lowbit_jax.nn.linen import watching
from lowbit_jax.nn.linen_layers import Calibration, calibrating, calibration_names
from lowbit_jax.nn.linen_origin import of_slices
from lowbit_jax.nn.linen_sites import (
    Call,
    Sites,
    Traced,
    array_call,
    checked_trace,
    inside,
    numbered,
    told,
    trace,
    with_layers,
)
from lowbit_jax.nn.met import call_arguments, no_batches, several
from lowbit_jax.nn.site import called, check_stack, initial_scales

Scales = dict[tuple[str, str], tuple[Array, Array] | None]
"""By path and side: the scale, and of how many fits it is the mean; None where the call did not run the layer."""


def calibrate(model: linen.Module, variables: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Variables whose learned scales are fitted to one batch; see `lb.calibrate`."""
    if not args and not kwargs:
        raise TypeError("lb.calibrate(model, variables, *args) fits scales to a batch. Pass the inputs of one call.")
    variables, learned, found = _found(model, variables, args, kwargs, "lb.calibrate")
    scales = {entry: fitted[0] for entry, fitted in found.items() if fitted is not None}
    if left := sorted(path for path, _ in found.keys() - scales.keys()):
        raise ValueError(
            f"lb.calibrate: these inputs do not run the layer {left[0]!r}, as where they take another branch of nn.cond"
            " or nn.switch: there is nothing to fit its scale to. Call lb.nn.calibrate_over with batches that run every"
            " branch, or leave the layer out by a rule."
        )
    return _with_scales(variables, learned, scales)


def calibrate_over(model: linen.Module, variables: Any, batches: Iterable[Any], statistic: Callable) -> Any:
    """The same over several batches, each from the variables as they are; see `lb.nn.calibrate_over`."""
    who = "lb.nn.calibrate_over"
    calls = [_found(model, variables, *call_arguments(batch), who) for batch in several(batches, who)]
    if not calls:
        raise ValueError(no_batches(who))
    completed, learned, first = calls[-1]
    scales = {}
    for entry in first:
        each = [fitted for _, _, found in calls if (fitted := found[entry]) is not None]
        if not each:
            raise ValueError(
                f"{who}: no batch runs the layer {entry[0]!r}, as where all take another branch of nn.cond or"
                " nn.switch. Add a batch that runs it, or leave the layer out by a rule."
            )
        met = statistic(jnp.stack([jnp.where(fits == 0, jnp.nan, scale) for scale, fits in each]), axis=0)
        scales[entry] = jnp.where(jnp.isnan(met), each[0][0], met)  # a scale that nothing fitted is as it was
    return _with_scales(completed, learned, scales)


def _with_scales(variables: Any, learned: Sites, scales: dict[tuple[str, str], Array]) -> Any:
    def fitted(site: Any, recipe: Any, layer: dict[str, Any]) -> dict[str, Any]:
        own = {f"{side}_scale": scales.get((site.path, side)) for side in ("lhs", "rhs")}
        return layer | {name: scale for name, scale in own.items() if scale is not None}

    return with_layers(variables, learned, fitted)


def _found(
    model: linen.Module, variables: Any, args: tuple, kwargs: dict[str, Any], who: str
) -> tuple[Any, Sites, Scales]:
    """The variables with the scales that a float model lacks, the layers that learn scales, and what one call fits."""
    traced = checked_trace(model, variables, args, kwargs, who)
    learned = {path: site for path, site in traced.sites.items() if site[1].learned}
    sides = lambda path: ("lhs", "rhs") if path in traced.normed else ("lhs",)
    entries = frozenset((path, s) for path, (_, recipe) in learned.items() for s in sides(path) if s in recipe.learned)
    if not entries:
        raise ValueError(f"{who}: no activation scale is learned here; the scales are read off each batch.")
    for path, (site, _) in learned.items():
        kernel = linen.meta.unbox(inside(variables["params"], path)[site.weight])
        check_stack(kernel.shape, site.shape, f"{who}: {called(path, traced.nodes[path].kind)}")
    call, given = Call.of(model, args, kwargs), variables
    variables = with_layers(given, learned, _completed)
    if jax.tree.structure(variables) != jax.tree.structure(given):
        traced = trace(call, variables)
    _check_arrival(traced, variables, who)
    dims = lambda path, side: np.ndim(linen.meta.unbox(inside(variables["params"], path)[f"{side}_scale"]))
    stacked = frozenset(entry for entry in entries if dims(*entry))
    reported = lambda entries: Calibration(stacked - entries, {entry: [] for entry in entries})
    ways = [(Calibration(stored=entries), call)] + [(reported(entries - stacked), call)] * bool(stacked)
    last = reported(entries), dataclasses.replace(call, mutable=DenyList("params"))
    calibration, call = next((way for way in ways if _runs(way[1], variables, learned, way[0])), last)
    if lost := sorted(path for path, _ in stacked & calibration.reported.keys()):
        raise ValueError(
            f"{who}: {lost[0]!r} is a stack of layers under a norm of weights or in a branch (nn.cond), or beside one,"
            " and what they fit does not tell them apart. Leave the stack out by a rule, or train it from the scales"
            " that init gives."
        )
    _, ran = jax.block_until_ready(_ran(jax.jit, call, variables, learned, calibration))
    found: Scales = {}
    for path, side in entries:
        _, name, count = calibration_names(side)
        if (path, side) in calibration.stored:
            layer = inside(ran["params"], path)
            found[path, side] = layer[name], layer[count]
        elif (path, side) in calibration.reported:
            held = linen.meta.unbox(inside(variables["params"], path)[name])
            if _traced((variables, call.inputs)):
                raise ValueError(
                    f"{who}: the scale of {path!r} can only be reported while the model runs, and these inputs are"
                    " being traced. Call it outside jit."
                )
            found[path, side] = _mean(calibration.reported[path, side], held)
    return variables, learned, found


def _check_arrival(traced: Traced, variables: Any, who: str) -> None:
    """Raises: ValueError for a layer that does not receive its scales as they are stored: they are fitted there."""
    numbers = numbered(variables)
    for path, (_, recipe) in traced.sites.items():
        for name in (f"{side}_scale" for side in recipe.learned):
            arrived = {of_slices(origin, 0) for origin in traced.origins.get(f"{path}/{name}", set())}
            for origin in arrived - {*jax.tree.leaves(inside(numbers, path)[name])}:
                raise ValueError(
                    f"{who}: {called(path, traced.nodes[path].kind)} does not receive its {name} as it is stored: what"
                    f" arrives {told(origin)}, as under nn.map_variables, which would change the fitted scale as well."
                    " Map the other parameters alone, or leave the layer out by a rule."
                )


def _completed(site: Any, recipe: Any, layer: dict[str, Any]) -> dict[str, Any]:
    """With the scales that a float model lacks."""
    if all(f"{side}_scale" in layer for side in recipe.learned):
        return layer
    start = initial_scales(recipe, site, linen.meta.unbox(layer["kernel"]))
    return {f"{side}_scale": value for side, value in start.items()} | layer


def _ran(transform: Any, call: Call, variables: Any, learned: Sites, calibration: Calibration) -> Any:
    """What the call answers and leaves under `transform`, fitting scales on its way."""

    def aside(site: Any, recipe: Any, layer: dict[str, Any]) -> dict[str, Any]:
        moved = {f"{side}_scale": calibration_names(side)[0] for path, side in calibration.stored if path == site.path}
        return {moved.get(name, name): value for name, value in layer.items()}

    def answers(variables: Any, inputs: Any) -> Any:
        y, new = call(variables, inputs)
        return [leaf for leaf in jax.tree.leaves(y) if isinstance(leaf, jax.Array)], new

    with calibrating(calibration), watching(lambda *_: None):
        return array_call(transform, answers, with_layers(variables, learned, aside), call.inputs)


def _runs(call: Call, variables: Any, learned: Sites, calibration: Calibration) -> bool:
    """Whether the call can be made so."""
    try:
        program = _ran(jax.make_jaxpr, call, variables, learned, calibration)
    except (ValueError, TypeError, errors.FlaxError):
        return False
    # JAX takes a scale that a branch leaks, where it closes over its layer, for a constant until it runs.
    return not _traced(program.consts) or _traced((variables, call.inputs, call.rngs))


def _traced(tree: Any) -> bool:
    return any(isinstance(leaf, core.Tracer) for leaf in jax.tree.leaves(tree))


def _mean(reports: list[Any], held: Array) -> tuple[Array, Array] | None:
    """Mean of the scales that were reported, such as by the turns of a loop, and their number; 0 stands for an operand
    of zeros, and where all are, the scale stays. None where nothing was reported."""
    if not reports:
        return None
    fitted = np.stack([np.asarray(report) for report in reports])
    count = np.count_nonzero(fitted, axis=0)
    return jnp.where(count == 0, held, (fitted.sum(0) / np.maximum(count, 1)).astype(held.dtype)), jnp.asarray(count)
