"""Any optax optimizer with its moments kept in few bits.

Every step decodes the stored moments to float32, runs the wrapped transformation, and encodes what it answers; under
`jit` the float32 moments are temporaries.
"""

import collections
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lowbit_jax.optim import chunks, trees
from lowbit_jax.optim.state_codecs import FIRST_MOMENT, SECOND_MOMENT, StateCodec, Stored

FIRST, SECOND = "first", "second"

# Class of an optax state -> its fields that have the shape of the parameters: a signed average ("first"), an average of
# squares or another non-negative one ("second"), or None for what stays as it is.
FIELDS: dict[str, dict[str, str | None]] = {
    "ScaleByAdamState": {"mu": FIRST, "nu": SECOND},
    "ScaleByAmsgradState": {"mu": FIRST, "nu": SECOND, "nu_max": SECOND},
    "ScaleByBeliefState": {"mu": FIRST, "nu": SECOND},
    "ScaleByLionState": {"mu": FIRST},
    "ScaleByRmsState": {"nu": SECOND},
    "ScaleByRStdDevState": {"mu": FIRST, "nu": SECOND},
    "ScaleByAdemamixState": {"m1": FIRST, "m2": FIRST, "nu": SECOND},
    "TraceState": {"trace": FIRST},
    "EmaState": {"ema": FIRST},
    "MuonState": {"mu": FIRST},
    "FactoredState": {"v_row": None, "v_col": None, "v": SECOND},
}


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
    elementwise: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`tx` with its moments stored in few bits; moments of fewer than `min_size` elements stay in float32.

    bits: 8 (dynamic tree, blocks of 256), 4 (dynamic tree in blocks of 128; second moments linear without zero, scaled
    by row and column maxima), "e4m3" (blocks of 256) or "coat" (companded E4M3, blocks of 128). `first` and `second`
    set the codecs of signed averages and of averages of squares themselves. `fields` says what the fields of other
    states are: {"ScaleBySophiaState.m": "first", "MyState.x": a codec, "MyState.anchor": None}.

    Which fields are moments is known by the class of the state (`lowbit_jax.optim.FIELDS`). What else is large is not
    guessed: a sum that only grows, a copy of the weights or an accumulated gradient is not a moment, and rounding it at
    every step would lose it; for those give `fields=` or wrap only the part of the chain that has moments.
    elementwise: says that `tx` treats each element by itself (Adam, Lion, momentum; not Muon, nor clipping by a norm).
    On one CPU device its step then runs in chunks: faster, and without float32 moments in memory.
    Gradients and parameters reach `tx` in float32; updates come back in the dtype of the gradients.
    Raises: ValueError for unknown `bits`, a `fields` entry that matches nothing, a large field of unknown kind, and for
    a second moment of at most 4 bits whose grid has a zero (m / sqrt(0) is without bound)."""
    codecs = {FIRST: first or _codec(FIRST_MOMENT, bits), SECOND: second or _codec(SECOND_MOMENT, bits)}
    _check_second(codecs[SECOND])
    rules = _rules(fields or {}, codecs)
    inner = optax.with_extra_args_support(tx)

    def encode(state: Any) -> Any:
        return _mapped(state, rules, min_size)

    def init(params):
        trees.check_floating(params, "low_bit_state", "parameter")
        state = lax.optimization_barrier(inner.init(trees.float32(params)))  # or XLA folds the codes of large zeros
        if fields:
            _check_used(fields, state)
        _check_known(state, rules, min_size)
        stored = encode(state)
        _warn_if_nothing(stored, params, min_size)
        return LowBitState(stored)

    def update(updates, state, params=None, **extra):
        if not isinstance(state, LowBitState):
            raise ValueError(
                f"low_bit_state got a {type(state).__name__} for its state; it needs the LowBitState of its `init`."
                " For a state in float32 from an older checkpoint use lb.optim.LowBitState(...) of"
                " tx.init(params) with the same structure, or encode it: lb.optim.encode_state(state)."
            )
        dtypes = jax.tree.map(lambda u: u.dtype, updates)
        in_variables = any(map(_is_variable, jax.tree.leaves(updates, is_leaf=_is_variable)))
        if elementwise and not extra and chunks.pays():
            known = _known(rules)
            names = lambda node: [f for f in rules[type(node).__name__] if getattr(node, f, None) is not None]
            store = lambda array, node, field: _store_or_keep(array, rules[type(node).__name__][field], min_size)
            moved, new = chunks.update_in_chunks(inner.update, updates, state.inner_state, params, known, names, store)
            return moved, LowBitState(new)
        decoded = decode_state(state.inner_state, in_variables=in_variables)
        moved, new = inner.update(trees.float32(updates), decoded, trees.float32(params), **extra)
        moved = jax.tree.map(lambda u, dtype: u.astype(dtype), moved, dtypes)
        return moved, LowBitState(_held_as(encode(new), state.inner_state))

    return optax.GradientTransformationExtraArgs(init, update)


def decode_state(state: Any, *, in_variables: bool = True) -> Any:
    """The state with every stored array in float32: what the wrapped optimizer works on.

    in_variables: arrays that came out of variables (Flax NNX) go back into them; `nnx.Optimizer` takes them out."""

    def decode(leaf: Any) -> Any:
        if not _is_stored(leaf):
            return leaf
        array = leaf.dequantize()
        return array if leaf.within is None or not in_variables else leaf.within.unflatten([array])

    return jax.tree.map(decode, state, is_leaf=_is_stored)


def encode_state(
    state: Any,
    bits: int | str = 8,
    *,
    first: StateCodec | None = None,
    second: StateCodec | None = None,
    fields: Mapping[str, str | StateCodec | None] | None = None,
    min_size: int = 4096,
) -> LowBitState:
    """The float32 state of an optimizer as `low_bit_state` with the same arguments keeps it: to go on from a checkpoint
    that was written without it."""
    codecs = {FIRST: first or _codec(FIRST_MOMENT, bits), SECOND: second or _codec(SECOND_MOMENT, bits)}
    rules = _rules(fields or {}, codecs)
    _check_known(state, rules, min_size)
    return LowBitState(_mapped(state, rules, min_size))


def explain_state(state: Any) -> str:
    """A table: each array of the optimizer's state, how it is stored, its bytes, and bits per element."""
    rows = [("state", "shape", "stored as", "bytes", "bits")]
    found, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_stored)
    for path, leaf in found:
        kind = leaf.codec.describe() if _is_stored(leaf) else jnp.dtype(leaf.dtype).name
        size = leaf.size if _is_stored(leaf) else jnp.size(leaf)
        nbytes = leaf.nbytes if _is_stored(leaf) else size * jnp.dtype(leaf.dtype).itemsize
        rows.append(
            (trees.name_of(path), str(tuple(leaf.shape)), kind, str(nbytes), f"{8 * nbytes / max(size, 1):.2f}")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _is_stored(node: Any) -> bool:
    return isinstance(node, Stored)


def _is_variable(node: Any) -> bool:
    """A variable of Flax NNX (this room does not import Flax)."""
    return hasattr(node, "get_value") and hasattr(node, "set_value")


def _held_as(new: Any, old: Any) -> Any:
    """`new` with the static data of `old`, which knows in what its arrays were held."""
    keep = lambda n, o: dataclasses.replace(n, within=o.within) if _is_stored(n) and _is_stored(o) else n
    return jax.tree.map(keep, new, old, is_leaf=_is_stored)


def _codec(table: Mapping[int | str, StateCodec], bits: int | str) -> StateCodec:
    if not isinstance(bits, int | str):
        raise TypeError(
            f"low_bit_state got bits of type {type(bits).__name__}; it must be known when the program is built. Under"
            " optax.inject_hyperparams pass static_args=('bits', 'min_size')."
        )
    if bits not in table:
        raise ValueError(
            f"low_bit_state(bits={bits!r}): there are {', '.join(map(repr, table))}; other formats go in as codecs,"
            " first=lb.optim.Blockwise(format, block) and second=..."
        )
    return table[bits]


def _check_second(codec: StateCodec) -> None:
    if codec.grid.has_zero and codec.grid.bits <= 4:
        raise ValueError(
            f"low_bit_state(second={codec.describe()}): {codec.grid.name} has a zero, and at {codec.grid.bits} bits a"
            " second moment would land on it: m / sqrt(0) is without bound. Use a grid without zero, such as"
            " lb.optim.LINEAR4_WITHOUT_ZERO."
        )


def _rules(
    fields: Mapping[str, str | StateCodec | None], codecs: Mapping[str, StateCodec]
) -> dict[str, dict[str, StateCodec | None]]:
    """Class of a state -> field -> codec, the user's words over the table's."""
    kinds: dict[str, dict[str, Any]] = {name: dict(own) for name, own in FIELDS.items()}
    for name, kind in fields.items():
        owner, dot, field = name.rpartition(".")
        if not dot or (isinstance(kind, str) and kind not in codecs):
            raise ValueError(
                f"low_bit_state(fields={{{name!r}: {kind!r}}}): write 'ClassOfTheState.field' and 'first', 'second', a"
                " codec or None."
            )
        kinds.setdefault(owner, {})[field] = kind
    return {
        owner: {field: codecs[kind] if isinstance(kind, str) else kind for field, kind in own.items()}
        for owner, own in kinds.items()
    }


def _check_used(fields: Mapping[str, Any], state: Any) -> None:
    present = set()

    def note(node: Any) -> None:
        if hasattr(node, "_fields"):
            present.update(f"{type(node).__name__}.{field}" for field in node._fields)
        for child in _children(node):
            note(child)

    note(state)
    unused = sorted(set(fields) - present)
    if unused:
        raise ValueError(
            f"low_bit_state(fields=): {', '.join(unused)} matches nothing in this optimizer's state, which has"
            f" {', '.join(sorted(present))}."
        )


def _children(node: Any) -> list:
    if isinstance(node, dict):
        return list(node.values())
    return list(node) if isinstance(node, tuple | list) else []


def _known(rules: Mapping[str, Any]) -> Callable[[Any], bool]:
    return lambda node: hasattr(node, "_fields") and type(node).__name__ in rules


def _mapped(state: Any, rules: Mapping[str, Mapping[str, StateCodec | None]], min_size: int) -> Any:
    """The state with the large leaves of known fields stored."""

    def store(node: Any) -> Any:
        if not _known(rules)(node):
            return node
        changed = {}
        for field, codec in rules[type(node).__name__].items():
            value = getattr(node, field, None)
            if codec is not None and value is not None:
                one = lambda leaf, c=codec: _store(leaf, c, min_size)
                changed[field] = jax.tree.map(one, value, is_leaf=_is_variable)
        return node._replace(**changed)

    return jax.tree.map(store, state, is_leaf=_known(rules))


def _store_or_keep(leaf: Any, codec: StateCodec | None, min_size: int) -> Any:
    return leaf if codec is None else _store(leaf, codec, min_size)


def _store(leaf: Any, codec: StateCodec, min_size: int) -> Any:
    array = leaf.get_value() if _is_variable(leaf) else leaf
    if array.size < min_size or not jnp.issubdtype(array.dtype, jnp.floating):
        return leaf
    stored = Stored.of(array, codec)
    return dataclasses.replace(stored, within=jax.tree.structure(leaf)) if _is_variable(leaf) else stored


def _check_known(state: Any, rules: Mapping[str, Any], min_size: int) -> None:
    """Raises for a large floating leaf outside the known states, or in one of their unlisted fields."""
    marked = jax.tree.map(
        lambda node: (
            node._replace(**{f: None for f in rules[type(node).__name__] if hasattr(node, f)})
            if _known(rules)(node)
            else node
        ),
        state,
        is_leaf=_known(rules),
    )
    found, _ = jax.tree_util.tree_flatten_with_path(marked)
    counts = collections.Counter()
    for path, leaf in found:
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size >= min_size:
            attributes = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
            counts[attributes[0] if len(attributes) == 1 else ".".join(attributes[-2:]) or trees.name_of(path)] += 1
    if counts:
        told = ", ".join(f"{name} ({count} arrays)" for name, count in counts.items())
        raise ValueError(
            f"low_bit_state does not know what these large fields of the optimizer's state are: {told}. Say it, as in"
            " fields={'ClassOfTheState.field': 'first' | 'second' | a codec | None (stays as it is)}, or wrap only the"
            " part of the chain that has moments."
        )


def _warn_if_nothing(state: Any, params: Any, min_size: int) -> None:
    leaves = jax.tree.leaves(state, is_leaf=_is_stored)
    if jax.tree.leaves(params) and not any(map(_is_stored, leaves)):
        warnings.warn(
            f"low_bit_state stored nothing in few bits: no moment has {min_size} elements or more. Pass a smaller"
            " min_size, or leave the wrapper out.",
            stacklevel=3,
        )
