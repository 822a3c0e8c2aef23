"""Parameters in few bits without any copy in more: each step is rounded up or down at random, so that its mean is kept.

Rounded to nearest, a step of less than half a unit in the last place changes nothing, whatever the number of steps.
"""

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array

from lowbit_jax.optim import landing, trees
from lowbit_jax.optim.landing import OnGrid, ParamFormat
from lowbit_jax.optim.master_weights import mask_tree
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import absmax

_WHO = "stochastic_rounding"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GridScales:
    """The scales of one parameter on the grid of `quantizer`, as its scale format stores them."""

    stored: tuple[Array, ...]
    quantizer: Quantizer = dataclasses.field(metadata=dict(static=True))


class StochasticRoundingState(NamedTuple):
    """count: steps taken; scales: path -> GridScales, for the parameters on the grid of `param_format`."""

    count: Array
    scales: dict[str, Any]
    inner_state: Any


def stochastic_rounding(
    tx: optax.GradientTransformation,
    param_format: ParamFormat = None,
    *,
    key: Any = 0,
    mask: Any = None,
    axis: int = -2,
    refit: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`tx` on parameters that live in few bits; `parameter + update` is rounded stochastically, with the right mean.

    param_format, mask, axis: as in `master_weights`: None is the dtype of each parameter (bfloat16, float16, 8-bit
    floats), a format or `lb.Quantizer` a grid with scales, kept in the state. Packed parameters (`QTensor`) step on
    their own grid, and no float copy of them is held anywhere between steps.
    refit: whether scales are fitted anew at each step (the default for absmax, as torchao does), or stay what they were
    at the first (for other fits, such as mean magnitude, which would shrink with every refit); None takes the default.
    Arrays are put on their grid by the first step, to nearest, with scales of what they are then. Values beyond a grid
    that stays saturate. A grid in arrays of 16 bits is exact as far as those hold it.

    key: an int or a single random key. The draw of a step depends on (key, number of the step, path of the parameter)
    and nothing else: it is the same again after a restart, on any sharding, and beside other parameters.

    Like `master_weights` the wrapper must be outermost, with `optax.MultiSteps` inside it. A transformation after it,
    as in `chain(stochastic_rounding(...), optax.scale(-1e-3))`, takes the updates off the grid: they are rounded to
    nearest where they are applied, and small steps are lost (for packed parameters `lb.optim.apply_updates` notices).
    `optax.apply_updates` serves arrays of 16 and 32 bits, `lb.optim.apply_updates` all.
    Source: Gupta et al. 2015, arXiv:1502.02551; int8: torchao quantized training; ternary to 8 bits: Zhao et al. 2024
    (direct quantized training), arXiv:2412.04787.
    Raises: TypeError for a key that is none and for leaves that are not floating; ValueError for several keys, for
    parameters of float32 without `param_format` (nothing would be rounded), a parameter that its tiles do not divide
    (`scaling.UnevenTiles`), trees that do not match, a state of another format or of other parameters,
    `params=None`."""
    inner = optax.with_extra_args_support(tx)
    quantizer = landing.param_quantizer(param_format, _WHO)
    key = single_key(key)

    def first_scales(params) -> dict[str, GridScales]:
        """Those of the parameters at hand."""
        if quantizer is None:
            return {}
        chosen = jax.tree.leaves(mask_tree(mask, params, _WHO))
        found = {}
        for (name, param), on_grid in zip(trees.named_parameters(params).items(), chosen, strict=True):
            if on_grid and not trees.is_packed(param):
                with landing.said_of(name, param.shape, param_format, _WHO):
                    scales = landing.fit_scales(quantizer, trees.float32(param), _axis(param, axis))
                found[name] = GridScales(scales, quantizer)
        return found

    def init(params):
        trees.check_floating(params, _WHO, "parameter")
        scales = first_scales(params)
        _check_takes_effect(list(trees.named_leaves(params).values()), bool(scales))
        return StochasticRoundingState(jnp.zeros((), jnp.int32), scales, inner.init(trees.float32(params)))

    def update(updates, state, params=None, **extra):
        trees.require_params(params, _WHO)
        _check_state(state)
        trees.check_same_tree(updates, params, _WHO, ("gradients", "parameters"))
        trees.check_floating(updates, _WHO, "gradient")
        fresh = jax.eval_shape(first_scales, params)
        _check_scales(state.scales, fresh)
        old_scales = state.scales
        if fresh:  # parameters may have been loaded since `init`
            old_scales = lax.cond(state.count == 0, lambda: first_scales(params), lambda: state.scales)
        moved, inner_state = inner.update(trees.float32(updates), state.inner_state, trees.float32(params), **extra)
        now = jax.random.fold_in(key, state.count)
        answers, scales = _steps(params, moved, old_scales, now, axis, refit)
        return answers, StochasticRoundingState(state.count + 1, scales, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_state(state: Any) -> None:
    if not isinstance(state, StochasticRoundingState):
        raise ValueError(
            f"{_WHO} got a {type(state).__name__} for its state; it needs that of its own `init`. To go on from a"
            " checkpoint without it: state = tx.init(params)._replace(inner_state=restored)."
        )


def _steps(params: Any, moved: Any, scales: dict[str, GridScales], key: Any, axis: int, refit: bool | None) -> Any:
    """(updates, new scales) of all parameters, each with a key of its own path."""
    answers, found = [], {}
    paths, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=trees.is_packed)
    for (path, param), change in zip(paths, tree.flatten_up_to(moved), strict=True):
        name = trees.name_of_parameter(path)
        leaf_key = jax.random.fold_in(key, path_number(name))
        answer, own = _step(param, change, scales.get(name), leaf_key, axis, refit)
        answers.append(answer)
        if own is not None:
            found[name] = own
    return tree.unflatten(answers), found


def _step(param, change, scales: GridScales | None, key, axis: int, refit: bool | None) -> tuple[Any, Any]:
    """(update, scales) of one parameter."""
    if trees.is_packed(param):
        old = landing.packed_elements(param, _WHO)
        fit_again = _refits(param.quantizer, refit)
        new = landing.step_on_grid(param.quantizer, old, change, key, param.axis, fit_again)
        return trees.PackedUpdate(landing.repacked(param, new)), None
    if scales is None:
        target = landing.on_grid_of(param.astype(jnp.float32) + change, param.dtype, key)
        return (change if param.dtype == jnp.float32 else landing.difference(target, param)), None
    along, quantizer = _axis(param, axis), scales.quantizer
    elements = landing.nearest_elements(quantizer, param.astype(jnp.float32), scales.stored, along)
    old = OnGrid(elements, scales.stored)
    new = landing.step_on_grid(quantizer, old, change, key, along, _refits(quantizer, refit))
    target = landing.on_grid_of(new.values(quantizer, along), param.dtype)
    return landing.difference(target, param), GridScales(new.scales, quantizer)


def _refits(quantizer: Quantizer, refit: bool | None) -> bool:
    return quantizer.fit is absmax if refit is None else refit


def _axis(param: Any, axis: int) -> int:
    return axis if param.ndim > 1 else -1


def _check_scales(held: dict[str, GridScales], needed: dict[str, Any]) -> None:
    """Raises ValueError unless the state holds the scales of these parameters, on the grid of this optimizer."""
    for name in sorted({*held, *needed}):
        own, other = (None if s is None else s.quantizer for s in (held.get(name), needed.get(name)))
        if own != other:
            raise ValueError(
                f"{_WHO}: the state keeps {name!r} {_on(own)}, and this optimizer {_on(other)}. Go on with the"
                " param_format and mask that the state was made with, or start anew: tx.init(params)."
            )
        shapes = [[tuple(a.shape) for a in s.stored] for s in (held[name], needed[name])]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{_WHO}: the scales of {name!r} have the shapes {shapes[0]} in the state, and parameters of this shape"
                f" need {shapes[1]}. Was the state made for a model of another size?"
            )


def _on(quantizer: Quantizer | None) -> str:
    if quantizer is None:
        return "off any grid"
    told = quantizer.explain()
    return f"on the grid of {told['format']} (a scale each {told['tiling']}, {told['fit']})"


def _check_takes_effect(leaves: list, on_grid: bool) -> None:
    narrow = [trees.is_packed(leaf) or jnp.dtype(leaf.dtype).itemsize < 4 for leaf in leaves]
    if leaves and not any(narrow) and not on_grid:
        raise ValueError(
            f"{_WHO}: all {len(leaves)} parameters are float32, so that nothing would be rounded. Cast them"
            " (jax.tree.map(lambda p: p.astype('bfloat16'), params)), or give param_format=."
        )


def path_number(name: str) -> np.uint32:
    """A number of 32 bits for a path, the same in every process and whatever other paths there are."""
    return np.uint32(zlib.crc32(name.encode()))


def single_key(key: Any) -> Array:
    """One random key, from an int, a typed key, or the two uint32 words of an old-style one.

    Raises: TypeError for anything else, ValueError for several keys."""
    if isinstance(key, bool) or not (isinstance(key, int | np.integer) or hasattr(key, "dtype")):
        raise TypeError(f"{_WHO}(key={key!r}): give an int or a key such as jax.random.key(0).")
    if isinstance(key, int | np.integer):
        return jax.random.key(int(key))
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        words = key
        several = words.ndim
    elif key.dtype == jnp.uint32 and key.ndim >= 1:
        several = key.ndim - 1
        words = key if several else jax.random.wrap_key_data(jnp.asarray(key))
    else:
        raise TypeError(
            f"{_WHO} got an array of {key.dtype} and shape {tuple(key.shape)} for its key. Give an int, a key of"
            " jax.random.key, or the uint32 words of jax.random.PRNGKey."
        )
    if several:
        raise ValueError(
            f"{_WHO} got {tuple(key.shape)} keys at once; it takes one and derives the others from the step and the"
            " path. Pass keys[0]."
        )
    return words
