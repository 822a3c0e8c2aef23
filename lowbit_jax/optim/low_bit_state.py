"""Any optax optimizer with its moments kept in few bits.

Every step decodes the stored moments to float32, runs the wrapped transformation, and encodes what it answers; under
`jit` the float32 moments are temporaries.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lowbit_jax.optim import chunks, moments, trees
from lowbit_jax.optim.moments import EMBEDDINGS, is_stored, is_variable
from lowbit_jax.optim.separable import Joins, Program, Role
from lowbit_jax.optim.state_codecs import StateCodec, Stored


class LowBitState(NamedTuple):
    """The wrapped optimizer's state, moments as `Stored`."""

    inner_state: Any


def low_bit_state(
    tx: optax.GradientTransformation,
    bits: int | str = 8,
    *,
    first: StateCodec | None = None,
    second: StateCodec | None = None,
    fields: Mapping[str, str | StateCodec | None] | None = None,
    min_size: int = 4096,
    keep: Sequence[str] = EMBEDDINGS,
    elementwise: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`tx` with its moments stored in few bits.

    bits: 8 (dynamic tree, blocks of 256), 4 (dynamic tree in blocks of 128; second moments linear without zero, scaled
    by row and column maxima), "e4m3" (blocks of 256) or "coat" (companded E4M3, blocks of 128). `first` and `second`
    set the codecs of signed averages and of averages of squares themselves. `fields` says what the fields of other
    states are: {"ScaleBySophiaState.m": "first", "MyState.x": a codec, "MyState.anchor": None}.

    Moments of fewer than `min_size` elements stay in float32, and those of parameters in whose path (in lower case) one
    of the regular expressions `keep` is found: embeddings by default, whose rows get gradients of very unlike sizes, as
    bitsandbytes has it; `keep=()` keeps none. `lb.optim.explain_state` tells which.

    Which fields are moments is known by the class of the state (`lb.optim.FIELDS`). What else is large is not guessed:
    a sum that only grows, a copy of the weights or an accumulated gradient is not a moment, and rounding it at every
    step would lose it; for those give `fields=` or wrap only the part of the chain that has moments.
    elementwise: whether `tx` treats each element by itself (Adam, Lion, momentum; not Muon, nor clipping by a norm). On
    one CPU device its step then runs in chunks: faster, and without float32 moments in memory. None finds out; True
    makes it an error if it does not.
    Gradients and parameters reach `tx` in float32; updates come back in the dtype of the gradients. Finite gradients
    beyond 2^63 count as that: a square that is inf would be stored as 0, and a moment of that size divided by it.
    Raises: ValueError for unknown `bits`, a `fields` entry that matches nothing, a large field of unknown kind, a
    second moment of at most 4 bits whose grid has a zero (m / sqrt(0) is without bound), `elementwise=True` where
    elements act on one another; in a step, for gradients and states of different parameters, or a state in other
    bits."""
    own = moments.rules(bits, first, second, fields or {}, min_size, keep)
    inner = optax.with_extra_args_support(tx)

    def init(params):
        trees.check_floating(params, "low_bit_state", "parameter")
        state = lax.optimization_barrier(inner.init(trees.float32(params)))  # or XLA folds the codes of large zeros
        if fields:
            moments.check_used(fields, state)
        moments.check_known(state, own)
        stored = own.stored(state)
        if elementwise:
            _in_chunks(inner, own, elementwise, params, stored, params)
        _warn_if_nothing(stored, params, own)
        return LowBitState(stored)

    def update(updates, state, params=None, **extra):
        _check_state(state)
        trees.check_floating(updates, "low_bit_state", "gradient")
        exact = moments.check_belongs(state.inner_state, updates, own)
        stored = state.inner_state
        if exact and not extra and (found := _in_chunks(inner, own, elementwise, updates, stored, params)):
            moved, new = chunks.update_in_chunks(found[0], updates, stored, params, found[1])
            return moved, LowBitState(new)
        dtypes = jax.tree.map(lambda u: u.dtype, updates)
        decoded = decode_state(stored, in_variables=_in_variables(updates))
        moved, new = inner.update(trees.squarable(updates), decoded, trees.float32(params), **extra)
        moved = jax.tree.map(lambda u, dtype: u.astype(dtype), moved, dtypes)
        return moved, LowBitState(_stored_as(stored, new))

    return optax.GradientTransformationExtraArgs(init, update)


def _in_chunks(
    inner: optax.GradientTransformationExtraArgs,
    own: moments.Rules,
    elementwise: bool | None,
    updates: Any,
    state: Any,
    params: Any,
) -> tuple[Program, list[Role]] | None:
    """The program and roles of a step in chunks; None where the step is to be taken as a whole."""
    if elementwise is False or not (chunks.pays() or elementwise):
        return None
    decoded = jax.eval_shape(lambda s: decode_state(s, in_variables=_in_variables(updates)), state)
    roles = own.roles(state)
    try:
        found = chunks.program_of(inner.update, updates, state, params, decoded, roles)
    except Joins as operation:
        if not elementwise:
            return None
        raise ValueError(
            f"low_bit_state(elementwise=True): this optimizer has the operation {str(operation)!r}, by which"
            " elements act on one another (clipping by a norm, a trust ratio, noise), or may do so. Leave"
            " `elementwise` out, or wrap only the part that is elementwise: optax.chain("
            "optax.clip_by_global_norm(1.0), lb.optim.low_bit_state(optax.scale_by_adam()))."
        ) from None
    return (found, roles) if chunks.pays() else None


def _in_variables(tree: Any) -> bool:
    """Whether arrays stand in variables of Flax NNX."""
    return any(map(is_variable, jax.tree.leaves(tree, is_leaf=is_variable)))


def _check_state(state: Any) -> None:
    if not isinstance(state, LowBitState):
        raise ValueError(
            f"low_bit_state got a {type(state).__name__} for its state; it needs the LowBitState of its `init`."
            " A state in float32 from an older checkpoint is encoded by lb.optim.encode_state(state, bits)."
        )


def decode_state(state: Any, *, in_variables: bool = True) -> Any:
    """The state with every stored array in float32: what the wrapped optimizer works on.

    in_variables: arrays that came out of variables (Flax NNX) go back into them; `nnx.Optimizer` takes them out."""

    def decode(leaf: Any) -> Any:
        if not is_stored(leaf):
            return leaf
        array = leaf.dequantize()
        return leaf.within.unflatten([array]) if in_variables else array

    return jax.tree.map(decode, state, is_leaf=is_stored)


def encode_state(
    state: Any,
    bits: int | str = 8,
    *,
    first: StateCodec | None = None,
    second: StateCodec | None = None,
    fields: Mapping[str, str | StateCodec | None] | None = None,
    min_size: int = 4096,
    keep: Sequence[str] = EMBEDDINGS,
) -> LowBitState:
    """The float32 state of an optimizer as `low_bit_state` with the same arguments keeps it: to go on from a checkpoint
    that was written without it."""
    own = moments.rules(bits, first, second, fields or {}, min_size, keep)
    moments.check_known(state, own)
    return LowBitState(own.stored(state))


def explain_state(state: Any, *, min_size: int = 4096, keep: Sequence[str] = EMBEDDINGS) -> str:
    """A table: each array of the optimizer's state, how it is stored, its bytes, bits per element; and for moments that
    stayed in float32 why, given the `min_size` and `keep` that the optimizer has."""
    own = moments.rules(8, None, None, {}, min_size, keep)
    why = _reasons(state, own)
    rows = [("state", "shape", "stored as", "bytes", "bits", "why")]
    found, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_stored)
    for path, leaf in found:
        kind = leaf.codec.describe() if is_stored(leaf) else jnp.dtype(leaf.dtype).name
        size = leaf.size if is_stored(leaf) else jnp.size(leaf)
        nbytes = leaf.nbytes if is_stored(leaf) else size * jnp.dtype(leaf.dtype).itemsize
        bits = f"{8 * nbytes / max(size, 1):.2f}"
        name = trees.name_of(path)
        rows.append((name, str(tuple(leaf.shape)), kind, str(nbytes), bits, why.get(name, "")))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _reasons(state: Any, own: moments.Rules) -> dict[str, str]:
    """Path in the state -> why this moment stays in float32."""
    why = {}
    for above, node in own.nodes(state):
        for field in own.fields(node):
            for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(node, field), is_leaf=is_stored)[0]:
                if not is_stored(leaf) and (reason := own.kept(path, leaf)):
                    why[trees.name_of((*above, jax.tree_util.GetAttrKey(field), *path))] = reason
    return why


def _stored_as(old: Any, new: Any) -> Any:
    """`new`, a float32 state, with the arrays stored that are so in `old`."""

    def store(o: Any, n: Any) -> Any:
        if not is_stored(o):
            return n
        (array,) = jax.tree.leaves(n)
        return dataclasses.replace(Stored.of(array, o.codec), within=o.within)

    return jax.tree.map(store, old, new, is_leaf=is_stored)


def _warn_if_nothing(state: Any, params: Any, own: moments.Rules) -> None:
    leaves = jax.tree.leaves(state, is_leaf=is_stored)
    if jax.tree.leaves(params) and not any(map(is_stored, leaves)):
        warnings.warn(
            f"low_bit_state stored nothing in few bits: no moment that may be (lb.optim.FIELDS) has {own.min_size}"
            f" elements or more outside of what keep={own.keep} names. Pass a smaller min_size, or leave the wrapper"
            " out.",
            stacklevel=3,
        )
