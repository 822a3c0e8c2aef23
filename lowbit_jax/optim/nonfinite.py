"""Steps that are not finite move nothing, and are counted."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool

from lowbit_jax.optim import trees


class SkipNonfiniteState(NamedTuple):
    """total: steps skipped so far; in_a_row: since the last good one; last_finite: whether the last was good."""

    total: Array
    in_a_row: Array
    last_finite: Array
    inner_state: Any


def skip_nonfinite(
    tx: optax.GradientTransformation, *, axis_name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """`tx`, but a step with a NaN or infinity in its gradients, in its updates, or in the extra argument `value=` (the
    loss), leaves parameters and the whole inner state as they were, to the bit; counters tell
    (`lb.optim.skipped(state)`).

    Unlike `optax.apply_if_finite` it never lets such a step through: how many in a row are too many is the caller's to
    decide. Inside `shard_map` or `pmap`, where each device sees gradients of its own, give `axis_name`: all devices
    skip when one does. Raises: ValueError for the state of another optimizer."""
    inner = optax.with_extra_args_support(tx)

    def init(params):
        total, in_a_row = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # a buffer each: the state can be donated
        return SkipNonfiniteState(total, in_a_row, jnp.array(True), inner.init(params))

    def update(updates, state, params=None, **extra):
        check_state(state, SkipNonfiniteState, "skip_nonfinite")
        good = all_finite((updates, extra.get("value")), axis_name)
        moved, inner_state = inner.update(updates, state.inner_state, params, **extra)
        good = good & all_finite(moved, axis_name)
        inner_state = select(good, inner_state, state.inner_state)
        bad = 1 - good.astype(jnp.int32)
        state = SkipNonfiniteState(state.total + bad, (state.in_a_row + bad) * bad, good, inner_state)
        return still(good, moved, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def all_finite(tree: Any, axis_name: str | None = None) -> Bool[Array, ""]:
    """Whether every floating or complex leaf is finite, on every device of `axis_name` if given."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    good = jnp.array(True)
    for leaf in leaves:
        good = good & jnp.all(jnp.isfinite(leaf))
    return good if axis_name is None else lax.pmin(good.astype(jnp.int32), axis_name) > 0


def select(good: Bool[Array, ""], new: Any, old: Any) -> Any:
    """`new` if `good`, else `old`, leaf by leaf."""
    return jax.tree.map(lambda n, o: jnp.where(good, n, o).astype(o.dtype), new, old)


def still(good: Bool[Array, ""], moved: Any, params: Any) -> Any:
    """The updates if `good`, else updates that move nothing: zeros, and the packed parameters themselves."""
    leaves = jax.tree.leaves(moved, is_leaf=trees.is_packed_update)
    if not any(map(trees.is_packed_update, leaves)):
        return jax.tree.map(lambda u: jnp.where(good, u, jnp.zeros_like(u)), moved)
    trees.require_params(params, "skip_nonfinite")

    def stop(u: Any, p: Any) -> Any:
        if trees.is_packed_update(u):
            return trees.PackedUpdate(select(good, u.weights, p))
        return jnp.where(good, u, jnp.zeros_like(u))

    return jax.tree.map(stop, moved, params, is_leaf=trees.is_packed_update)


def check_state(state: Any, kind: type, who: str) -> None:
    """Raises ValueError unless `state` is that of the wrapper."""
    if not isinstance(state, kind):
        raise ValueError(
            f"{who} got a {type(state).__name__} for its state; it needs the {kind.__name__} of its own `init`. To"
            " go on from a checkpoint without it: state = tx.init(params)._replace(inner_state=restored)."
        )


def skipped(state: Any) -> dict[str, Array]:
    """The counters of the `skip_nonfinite` or `dynamic_loss_scale` inside an optimizer's state: total, in_a_row.

    Raises: ValueError when there is none, or more than one."""
    found = find(state, lambda node: hasattr(node, "in_a_row") and hasattr(node, "total"), "skip_nonfinite")
    return {"total": found.total, "in_a_row": found.in_a_row}


def find(state: Any, is_one: Any, who: str) -> Any:
    """The one node of that kind in an optimizer's state; the outermost where they nest."""
    found = [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]
    if len(found) != 1:
        raise ValueError(
            f"lb.optim: this optimizer state holds {len(found)} states of {who}, not one. Wrap the optimizer in"
            f" lb.optim.{who}, once, and pass the state of the whole."
        )
    return found[0]
