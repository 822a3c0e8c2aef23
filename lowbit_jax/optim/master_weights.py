"""Parameters in few bits, trained through a float32 copy that the optimizer's state holds."""

from typing import Any, NamedTuple

import jax
import optax

from lowbit_jax.optim import landing, trees
from lowbit_jax.optim.landing import ParamFormat

_WHO = "master_weights"


class MasterWeightsState(NamedTuple):
    """master: the parameters in float32; inner_state: that of the wrapped optimizer, which sees the master only."""

    master: Any
    inner_state: Any


def master_weights(
    tx: optax.GradientTransformation, param_format: ParamFormat = None, *, mask: Any = None, axis: int = -2
) -> optax.GradientTransformationExtraArgs:
    """`tx` on a float32 copy of the parameters, which become the rounded copy after every step: no small step is lost.

    param_format: None rounds to the dtype that each parameter has (bfloat16, float16, an 8-bit float). A format or a
    `lb.Quantizer` puts the parameters on its grid, in arrays of their own dtype: those that `mask` picks (a tree of
    booleans or a function of the parameters; by default what has two axes or more), scaled along the contraction axis
    `axis`. Packed parameters (`QTensor`) are packed anew by their own quantizer; differentiate by
    `lb.optim.unpacked(params)`.

    The wrapper must be outermost: what it answers are the differences `rounded master - parameter`. Accumulate
    gradients inside: `master_weights(optax.MultiSteps(tx, k).gradient_transformation())`; around packed parameters
    `optax.MultiSteps` fails. Under `optax.inject_hyperparams` with parameters of 16 bits pass
    `hyperparam_dtype=jnp.float32`: in bfloat16 optax makes b2 = 0.999 a 1, and Adam's second moment stays 0.
    `optax.apply_updates` lands on the rounded master exactly for bfloat16 and float16 parameters, but for values that
    one step brings 2**15 times (float16: 2**13 times) nearer to zero, which land within 2**-24 of where they came from
    until the next step. 8-bit floats and packed parameters need `lb.optim.apply_updates`.
    `lb.optim.params_from_master` gives the rounded master itself, as after restoring a state alone.
    Raises: TypeError for leaves that are not floating; ValueError for a parameter that the tiles of `param_format` do
    not divide (`scaling.UnevenTiles`), a state without a master, trees that do not match, and `params=None`."""
    inner = optax.with_extra_args_support(tx)
    quantizer = landing.param_quantizer(param_format, _WHO)

    def init(params):
        trees.check_floating(params, _WHO, "parameter")
        master = trees.float32_copy(params)
        if quantizer is not None:  # what it cannot cut, before the first step
            jax.eval_shape(lambda m: _landings(m, params, param_format, mask, axis, as_updates=False), master)
        return MasterWeightsState(master, trees.apart_from(inner.init(master), master))

    def update(updates, state, params=None, **extra):
        trees.require_params(params, _WHO)
        check_has_master(state, params)
        trees.check_same_tree(updates, params, _WHO, ("gradients", "parameters"))
        trees.check_floating(updates, _WHO, "gradient")
        moved, inner_state = inner.update(trees.float32(updates), state.inner_state, state.master, **extra)
        master = optax.apply_updates(state.master, moved)
        answer = _landings(master, params, param_format, mask, axis, as_updates=True)
        return answer, MasterWeightsState(master, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def params_from_master(
    params: Any, state: Any, param_format: ParamFormat = None, *, mask: Any = None, axis: int = -2
) -> Any:
    """The rounded master itself, exactly: what the parameters are after each step of `master_weights` with the same
    arguments. `state` is its state, or one that holds it; `params` give dtypes and packed forms only.

    Raises: ValueError when `state` holds no master."""
    found = find_master(state)
    return _landings(found.master, params, param_format, mask, axis, as_updates=False)


def with_master(params: Any, inner_state: Any) -> MasterWeightsState:
    """A master copy for an optimizer state that was saved without one: the parameters as they are, in float32."""
    trees.check_floating(params, _WHO, "parameter")
    return MasterWeightsState(trees.float32_copy(params), inner_state)


def find_master(state: Any) -> MasterWeightsState:
    """The one state of `master_weights` inside an optimizer's state."""
    is_one = lambda node: isinstance(node, MasterWeightsState)
    found = [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]
    if len(found) != 1:
        raise ValueError(
            f"{_WHO}: this optimizer state holds {len(found)} master copies, not one. Give the state that"
            " lb.optim.master_weights(tx).init(params) made."
        )
    return found[0]


def check_has_master(state: Any, params: Any) -> None:
    """Raises ValueError unless `state` is that of `master_weights` for these parameters."""
    if not isinstance(state, MasterWeightsState) or (state.master is None and jax.tree.leaves(params)):
        raise ValueError(
            f"{_WHO} got a {type(state).__name__} without a master copy; was it restored from a checkpoint of an"
            " optimizer without one? Start the copy from the parameters:"
            " state = lb.optim.with_master(params, inner_state)."
        )
    trees.check_same_tree(params, state.master, _WHO, ("parameters", "master copy"))


def mask_tree(mask: Any, params: Any, who: str) -> Any:
    """A tree of booleans like `params`: which parameters the format is for."""
    if mask is None:
        return jax.tree.map(lambda leaf: leaf.ndim >= 2, params, is_leaf=trees.is_packed)
    answer = mask(params) if callable(mask) else mask
    try:
        return jax.tree.map(lambda _, chosen: bool(chosen), params, answer, is_leaf=trees.is_packed)
    except ValueError as error:
        raise ValueError(f"{who}: the mask has not the paths of the parameters: {error}") from None


def _landings(master: Any, params: Any, param_format: ParamFormat, mask: Any, axis: int, *, as_updates: bool) -> Any:
    quantizer = landing.param_quantizer(param_format, _WHO)
    chosen = mask_tree(mask if quantizer is not None else (lambda p: jax.tree.map(lambda _: False, p,
                       is_leaf=trees.is_packed)), params, _WHO)  # fmt: skip

    def land(path, param, target, on_grid):
        if trees.is_packed(param):
            new = landing.packed_anew(param, target, _WHO)
            return trees.PackedUpdate(new) if as_updates else new
        if on_grid and quantizer is not None:
            with landing.said_of(trees.name_of_parameter(path), param.shape, param_format, _WHO):
                target = quantizer(target, axis=axis if param.ndim > 1 else -1)
        target = landing.on_grid_of(target, param.dtype)
        return landing.difference(target, param) if as_updates else target.astype(param.dtype)

    return jax.tree_util.tree_map_with_path(land, params, master, chosen, is_leaf=trees.is_packed)
