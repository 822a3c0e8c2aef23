"""Compiling a call of a model and its gradient, for the text of the programs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, slots=True)
class Programs:
    """Compiled text of a call and of its gradient. why_not: why there is no gradient, where one was asked for."""

    forward: str
    backward: str | None = None
    why_not: str = ""


def programs(function: Callable[..., Any], state: Any, inputs: Any, gradients: bool) -> Programs:
    """Programs of `function(state, inputs)`, and of its gradient by every floating leaf of both.

    Leaves of `inputs` that are no arrays stay as they are. Nothing is run. A forward that has no gradient, as one with
    a `while_loop`, comes alone."""
    state_leaves, state_tree = jax.tree.flatten(state)
    leaves, tree = jax.tree.flatten(inputs)
    given = [leaf for leaf in leaves if _is_array(leaf)]

    def run(arrays: list) -> Any:
        state, rest = arrays[: len(state_leaves)], iter(arrays[len(state_leaves) :])
        filled = [next(rest) if _is_array(leaf) else leaf for leaf in leaves]
        return function(state_tree.unflatten(state), tree.unflatten(filled))

    arrays = [*state_leaves, *given]
    forward = jax.jit(run).lower(arrays).compile().as_text() or ""
    if not gradients:
        return Programs(forward)
    floating = [_is_floating(a) for a in arrays]
    fixed = [None if f else a for a, f in zip(arrays, floating, strict=True)]
    moving = [a for a, f in zip(arrays, floating, strict=True) if f]

    def gradient(moving: list, fixed: list, cotangents: list) -> Any:
        def outputs(moving: list) -> list:
            rest = iter(moving)
            out = run([next(rest) if f else a for a, f in zip(fixed, floating, strict=True)])
            return [leaf for leaf in jax.tree.leaves(out) if _is_floating(leaf)]

        return jax.vjp(outputs, moving)[1](cotangents)

    cotangents = [leaf for leaf in jax.tree.leaves(jax.eval_shape(run, arrays)) if _is_floating(leaf)]
    try:
        lowered = jax.jit(gradient).lower(moving, fixed, cotangents)
    except (ValueError, TypeError, NotImplementedError) as error:
        return Programs(forward, why_not=str(error).partition("\n")[0])
    return Programs(forward, lowered.compile().as_text())


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_floating(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
