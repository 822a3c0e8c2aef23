"""Dynamic loss scaling, which keeps small gradients of float16 and 8-bit floats from vanishing.

    tx = lb.optim.dynamic_loss_scale(optax.adamw(1e-3))
    loss, grads = jax.value_and_grad(lambda p: lb.optim.scale_loss(loss_of(p), state))(params)
    updates, state = tx.update(grads, state, params)
    loss = lb.optim.unscale(loss, state_before)

All of it is arrays in a jitted step: no value comes to the host.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float

from lowbit_jax.optim import nonfinite, trees


class LossScaleState(NamedTuple):
    """scale: what the loss is multiplied by; good_steps: since it last changed; total, in_a_row: steps skipped."""

    scale: Array
    good_steps: Array
    total: Array
    in_a_row: Array
    inner_state: Any


def dynamic_loss_scale(
    tx: optax.GradientTransformation,
    *,
    initial: float = 2.0**15,
    growth_interval: int = 2000,
    factor: float = 2.0,
    smallest: float = 1.0,
    largest: float = 2.0**24,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`tx` on gradients of a scaled loss: it divides them by the scale, in float32, and moves the scale.

    A step whose gradients are not finite moves nothing (as `skip_nonfinite`, with the same counters) and divides the
    scale by `factor`; `growth_interval` good steps in a row multiply it by `factor`. It stays within `smallest` and
    `largest`. With powers of two, scaling and unscaling are exact.
    Clip norms inside `tx`, where gradients have their true size. `axis_name`: as in `skip_nonfinite`.
    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
    Raises: ValueError for a range that is empty, a factor not above 1, an interval below 1, or the state of another
    optimizer; TypeError for parameters or gradients that are not floating."""
    if not 0 < smallest <= initial <= largest or factor <= 1 or growth_interval < 1:
        raise ValueError(
            f"dynamic_loss_scale: initial {initial}, smallest {smallest}, largest {largest}, factor {factor}, interval"
            f" {growth_interval}. It needs 0 < smallest <= initial <= largest, a factor above 1, an interval of at"
            " least 1."
        )
    inner = optax.with_extra_args_support(tx)

    def init(params):
        trees.check_floating(params, "dynamic_loss_scale", "parameter")
        good, total, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # a buffer each: the state can be donated
        return LossScaleState(jnp.float32(initial), good, total, in_a_row, inner.init(params))

    def update(updates, state, params=None, **extra):
        nonfinite.check_state(state, LossScaleState, "dynamic_loss_scale")
        trees.check_floating(updates, "dynamic_loss_scale", "gradient")
        good = nonfinite.all_finite((updates, extra.get("value")), axis_name)
        true = jax.tree.map(lambda g: g * (1 / state.scale), trees.float32(updates))
        moved, inner_state = inner.update(true, state.inner_state, params, **extra)
        inner_state = nonfinite.select(good, inner_state, state.inner_state)
        bad = 1 - good.astype(jnp.int32)
        grown = state.good_steps + 1 >= growth_interval
        scale = jnp.where(good, jnp.where(grown, state.scale * factor, state.scale), state.scale / factor)
        good_steps = jnp.where(good & ~grown, state.good_steps + 1, 0)
        state = LossScaleState(
            jnp.clip(scale, smallest, largest), good_steps, state.total + bad, (state.in_a_row + bad) * bad, inner_state
        )
        return nonfinite.still(good, moved, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def current_loss_scale(state: Any) -> Float[Array, ""]:
    """The scale inside an optimizer's state. Raises: ValueError when there is none, or more than one."""
    found = nonfinite.find(state, lambda node: isinstance(node, LossScaleState), "dynamic_loss_scale")
    return found.scale


def scale_loss(loss: Float[ArrayLike, ""], state: Any) -> Float[Array, ""]:
    """The loss times the scale, in float32: differentiate this."""
    return jnp.asarray(loss).astype(jnp.float32) * current_loss_scale(state)


def unscale(tree: Any, state: Any) -> Any:
    """Losses or gradients of a scaled loss at their true size, float32; `state` is the one that scaled them."""
    inverse = 1 / current_loss_scale(state)
    return jax.tree.map(lambda leaf: leaf * inverse, trees.float32(tree))
