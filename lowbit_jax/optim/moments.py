"""Which arrays of an optimizer's state are moments, by the class of the state; and what else `low_bit_state` must know
of a state: which moments stay in float32, and whether it belongs to the parameters at hand."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lowbit_jax.optim import trees
from lowbit_jax.optim.separable import Role
from lowbit_jax.optim.state_codecs import FIRST_MOMENT, SECOND_MOMENT, StateCodec, Stored, for_second_moment

FIRST, SECOND = "first", "second"

# Class of an optax state -> its fields that have the shape of the parameters: a signed average ("first"), an average of
# squares or another non-negative one ("second"), or None for what stays as it is: sums that only grow (SM3's
# accumulators), step sizes that are multiplied at every step (Rprop), one number for a layer (NovoGrad), moments of
# which the difference is taken (nu - mu**2 of centered RMSProp, which rounding would make negative).
FIELDS: dict[str, dict[str, str | None]] = {
    "ScaleByAdamState": {"mu": FIRST, "nu": SECOND},
    "ScaleByAmsgradState": {"mu": FIRST, "nu": SECOND, "nu_max": SECOND},
    "ScaleByBeliefState": {"mu": FIRST, "nu": SECOND},
    "ScaleByLionState": {"mu": FIRST},
    "ScaleByRmsState": {"nu": SECOND},
    "ScaleByRmsWithCountState": {"nu": SECOND},
    "ScaleByRStdDevState": {"mu": None, "nu": None},
    "ScaleByRStdDevWithCountState": {"mu": None, "nu": None},
    "ScaleByAdemamixState": {"m1": FIRST, "m2": FIRST, "nu": SECOND},
    "ScaleBySimplifiedAdEMAMixState": {"m": FIRST, "n": SECOND},
    "MomoAdamState": {"exp_avg": FIRST, "exp_avg_sq": SECOND},
    "ScaleByAdanState": {"m": FIRST, "v": FIRST, "n": SECOND, "g": FIRST},
    "ScaleByNovogradState": {"mu": FIRST, "nu": None},
    "ScaleByAdaDeltaState": {"e_g": SECOND, "e_x": SECOND},
    "ScaleBySM3State": {"mu": None, "nu": FIRST},
    "ScaleByRpropState": {"step_sizes": None, "prev_updates": None},
    "ScaleByOptimisticGradientState": {"is_initial_step": None, "previous_gradient": FIRST},
    "TraceState": {"trace": FIRST},
    "EmaState": {"ema": FIRST},
    "MuonState": {"mu": FIRST, "ns_coeffs": None},
    "FactoredState": {"v_row": None, "v_col": None, "v": SECOND},
}
EMBEDDINGS = (r"(^|/|_)(embed|emb|wte|wpe)",)  # searched in paths, lower case


def is_stored(node: Any) -> bool:
    return isinstance(node, Stored)


def is_masked(node: Any) -> bool:
    """What optax puts where a transformation is not for a parameter; a node without leaves."""
    return isinstance(node, optax.MaskedNode)


def is_variable(node: Any) -> bool:
    """A variable of Flax NNX (this room does not import Flax)."""
    return hasattr(node, "get_value") and hasattr(node, "set_value")


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is stored how: class of a state -> field -> codec; and the moments that stay in float32, those of fewer than
    `min_size` elements or of none, and of parameters in whose path one of the regular expressions `keep` is found."""

    codecs: Mapping[str, Mapping[str, StateCodec | None]]
    min_size: int
    keep: tuple[str, ...]

    def known(self, node: Any) -> bool:
        return hasattr(node, "_fields") and type(node).__name__ in self.codecs

    def fields(self, node: Any) -> dict[str, StateCodec]:
        """The fields of a node that are moments and there, and how they are stored."""
        own = self.codecs[type(node).__name__].items()
        return {name: codec for name, codec in own if codec is not None and getattr(node, name, None) is not None}

    def kept(self, path: tuple, leaf: Any) -> str | None:
        """Why the moment of this parameter stays in float32, or None if it does not."""
        for pattern in self.keep:
            if re.search(pattern, trees.name_of_parameter(path).lower()):
                return f"its path has {pattern!r} (keep)"
        if leaf.size == 0:
            return "no elements"
        return f"fewer than {self.min_size} elements (min_size)" if leaf.size < self.min_size else None

    def stored(self, state: Any) -> Any:
        """A float32 state with its moments stored."""

        def store(codec: StateCodec, path: tuple, leaf: Any) -> Any:
            array = leaf.get_value() if is_variable(leaf) else leaf
            if is_masked(array):  # in a variable, which is not looked into
                return leaf
            if not jnp.issubdtype(array.dtype, jnp.floating) or self.kept(path, array):
                return leaf
            return dataclasses.replace(Stored.of(array, codec), within=jax.tree.structure(leaf))

        def node_stored(node: Any) -> Any:
            changed = {}
            for name, codec in self.fields(node).items():
                one = lambda path, leaf, codec=codec: store(codec, path, leaf)
                changed[name] = jax.tree_util.tree_map_with_path(one, getattr(node, name), is_leaf=is_variable)
            return node._replace(**changed)

        return self.changed(node_stored, state)

    def changed(self, change: Callable[[Any], Any], state: Any) -> Any:
        """The state with every known node changed, those that lie in other fields of a known node before it."""

        def one(node: Any) -> Any:
            if not self.known(node):
                return node
            return change(node._replace(**{f: self.changed(change, value) for f, value in self._others(node).items()}))

        return jax.tree.map(one, state, is_leaf=self._is_one)

    def nodes(self, state: Any) -> Iterator[tuple[tuple, Any]]:
        """The known nodes of a state with their paths, and those in other fields of known nodes."""
        for path, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=self._is_one)[0]:
            if self.known(node):
                yield path, node
                for field, value in self._others(node).items():
                    below = (*path, jax.tree_util.GetAttrKey(field))
                    yield from (((*below, *rest), inner) for rest, inner in self.nodes(value))

    def roles(self, state: Any) -> list[Role]:
        """The roles of the leaves of a state (stored ones are leaves): whose moment each is."""
        numbers = itertools.count()

        def of(tree: Any) -> Any:
            return jax.tree.map(one, tree, is_leaf=self._is_one)

        def one(node: Any) -> Any:
            if not self.known(node):
                return Role(None)
            number, roles = next(numbers), {}
            for name in node._fields:
                leaves, shape = jax.tree.flatten(getattr(node, name), is_leaf=is_stored)
                if name in self.fields(node):
                    roles[name] = shape.unflatten([Role(i, (number, name)) for i in range(len(leaves))])
                else:
                    roles[name] = of(getattr(node, name))
            return node._replace(**roles)

        return jax.tree.leaves(of(state))

    def _is_one(self, node: Any) -> bool:
        return self.known(node) or is_stored(node)

    def _others(self, node: Any) -> dict[str, Any]:
        """The fields of a known node of which the table says nothing."""
        return {f: getattr(node, f) for f in node._fields if f not in self.codecs[type(node).__name__]}


def rules(
    bits: int | str,
    first: StateCodec | None,
    second: StateCodec | None,
    fields: Mapping[str, str | StateCodec | None],
    min_size: int,
    keep: Sequence[str],
) -> Rules:
    """The table above with the caller's words over it. Raises: ValueError for words that mean nothing."""
    _check_min_size(min_size)
    if isinstance(keep, str):
        raise TypeError(
            f"low_bit_state(keep={keep!r}): give a sequence of regular expressions, as in keep=({keep!r},)."
        )
    for pattern in keep:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"low_bit_state(keep=): {pattern!r} is no regular expression: {error}.") from None
    for name, codec in ((FIRST, first), (SECOND, second)):
        if codec is not None and not isinstance(codec, StateCodec):
            raise TypeError(
                f"low_bit_state({name}={codec!r}): give a codec, such as lb.optim.Blockwise(lb.formats.E4M3, 256);"
                f" for the usual ones pass bits={', '.join(map(repr, FIRST_MOMENT))}."
            )
    codecs = {
        FIRST: first or _codec(FIRST_MOMENT, bits),
        SECOND: for_second_moment(second or _codec(SECOND_MOMENT, bits)),
    }
    _check_second(codecs[SECOND])
    kinds: dict[str, dict[str, Any]] = {name: dict(own) for name, own in FIELDS.items()}
    for name, kind in fields.items():
        owner, dot, field = name.rpartition(".")
        if not dot or (isinstance(kind, str) and kind not in codecs):
            raise ValueError(
                f"low_bit_state(fields={{{name!r}: {kind!r}}}): write 'ClassOfTheState.field' and 'first', 'second', a"
                " codec or None."
            )
        kinds.setdefault(owner, {})[field] = kind
    table = {
        owner: {field: codecs[kind] if isinstance(kind, str) else kind for field, kind in own.items()}
        for owner, own in kinds.items()
    }
    return Rules(table, min_size, tuple(keep))


def _check_min_size(min_size: Any) -> None:
    if isinstance(min_size, bool) or not isinstance(min_size, int | float | np.integer | np.floating):
        raise TypeError(
            f"low_bit_state got min_size={min_size!r} of type {type(min_size).__name__}; it is a number of elements,"
            " known when the program is built: min_size=4096. Under optax.inject_hyperparams pass"
            " static_args=('bits', 'min_size')."
        )
    if not min_size >= 0:
        raise ValueError(f"low_bit_state(min_size={min_size!r}): give 0, which stores moments of any size, or more.")


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


def check_used(fields: Mapping[str, Any], state: Any) -> None:
    """Raises ValueError for a name in `fields` that nothing in the state has."""
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


def check_known(state: Any, own: Rules) -> None:
    """Raises ValueError for a large floating leaf outside the known states, or in one of their unlisted fields."""
    said = lambda node: node._replace(**{f: None for f in own.codecs[type(node).__name__] if hasattr(node, f)})
    marked = own.changed(said, state)
    found, _ = jax.tree_util.tree_flatten_with_path(marked)
    counts = collections.Counter()
    for path, leaf in found:
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size >= max(own.min_size, 1):
            counts[_class_and_field(marked, path) or trees.name_of(path)] += 1
    if counts:
        told = ", ".join(f"{name} ({count} arrays)" for name, count in counts.items())
        raise ValueError(
            f"low_bit_state does not know what these large fields of the optimizer's state are: {told}. Say it, as in"
            " fields={'ClassOfTheState.field': 'first' | 'second' | a codec | None (stays as it is)}, or wrap only the"
            " part of the chain that has moments."
        )


def _class_and_field(state: Any, path: tuple) -> str | None:
    """'ClassOfTheState.field' of the innermost named tuple that a path goes through, or None."""
    found, node = None, state
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey) and hasattr(node, "_fields"):
            found = f"{type(node).__name__}.{key.name}"
        node = getattr(node, key.name) if isinstance(key, jax.tree_util.GetAttrKey) else _child(node, key)
    return found


def _child(node: Any, key: Any) -> Any:
    name = getattr(key, "key", getattr(key, "idx", None))
    try:
        return node[name]
    except (TypeError, KeyError, IndexError):
        return None


def check_belongs(state: Any, updates: Any, own: Rules) -> bool:
    """Whether each field of moments has exactly the paths of the gradients (else it has some of them: masked ones).

    Raises: ValueError for moments of parameters that have no gradient or one of another shape, for gradients without
    moments in a state that masks none, and for moments stored by another codec than the rules'."""
    grads = {trees.name_of_parameter(path): leaf for path, leaf in _leaves(updates)}
    exact = True
    for _, node in own.nodes(state):
        for field, codec in own.fields(node).items():
            value, where = getattr(node, field), f"{type(node).__name__}.{field}"
            found = {trees.name_of_parameter(path): leaf for path, leaf in _leaves(value)}
            masked = any(map(is_masked, jax.tree.leaves(value, is_leaf=is_masked)))
            exact = exact and list(found) == list(grads)
            missing = [n for n in found if n not in grads] or [n for n in grads if n not in found and not masked]
            if missing:
                here, there = ("state", "gradients") if missing[0] in found else ("gradients", "state")
                raise ValueError(
                    f"low_bit_state: {missing[0]!r} is in the {here} and not in the {there} ({where}). Give the"
                    " gradients of all parameters that the state was made for, under the same paths, or the state of"
                    " tx.init(params) for these."
                )
            for name, leaf in found.items():
                shape, needed = tuple(leaf.shape), tuple(grads[name].shape)
                if shape != needed and leaf.size > 1:  # optax puts arrays of one element where a field is not used
                    raise ValueError(
                        f"low_bit_state: {name!r} has shape {shape} in the state ({where}) and {needed} in the"
                        " gradients. Was the state made for a model of another size?"
                    )
                if is_stored(leaf) and leaf.codec != codec:
                    raise ValueError(
                        f"low_bit_state: {name!r} is stored as {leaf.codec.describe()} in the state ({where}), and this"
                        f" optimizer stores it as {codec.describe()}. Was the state made with other `bits`? Convert it:"
                        " lb.optim.encode_state(lb.optim.decode_state(state).inner_state, bits)."
                    )
    return exact


def _leaves(tree: Any) -> list[tuple[tuple, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_stored)[0]
