"""Whether an optimizer treats each element by itself, and if so what it does to the elements of each parameter.

Read off the operations of one update of the whole tree, in its own shapes: masks, and whatever else asks for a
parameter's path or rank, are honoured. What is answered runs on any part of an array.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

_ELEMENTWISE = frozenset(
    "abs acos acosh add and asin asinh atan atan2 atanh broadcast_in_dim cbrt ceil clamp convert_element_type copy"
    " copy_p cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p"
    " logistic lt max min mul ne neg nextafter not or pow real reduce_precision rem round rsqrt select_n sign sin sinh"
    " sqrt square stop_gradient sub tan tanh xor".split()
)
_CALLS = frozenset("jit pjit closed_call core_call custom_jvp_call custom_vjp_call checkpoint remat remat2".split())


class Joins(Exception):  # noqa: N818  # an answer, not an error
    """The operation, named by the message, that is not known to treat each element by itself."""


@dataclasses.dataclass(frozen=True)
class Role:
    """What an argument or a result of the update is to the parameter number `leaf`: its gradient, weight or a moment,
    as `slot` says. leaf None: not a parameter's, such as the count of steps."""

    leaf: int | None
    slot: Hashable = None


@dataclasses.dataclass(frozen=True)
class _Value:
    """number: the same for the same computation. leaf: the parameter whose elements these are; None for what does not
    depend on any. one: a scalar, or a scalar spread over `shape`."""

    number: int
    leaf: int | None
    shape: tuple[int, ...]
    one: bool


@dataclasses.dataclass(frozen=True)
class LeafUpdate:
    """What happens to the elements of one parameter: (operation, names of its operands), in order; and slot -> name of
    the result. common: by number the scalars that are used, which come from outside."""

    steps: tuple
    results: tuple
    common: dict[int, _Value]

    @functools.cached_property
    def key(self) -> Hashable:
        """The same for parameters to which the same happens."""
        return tuple((e.primitive.name, _told(e), reads) for e, reads in self.steps), self.results

    def run(self, arguments: dict[Hashable, Any], common: dict[int, Any]) -> dict[Hashable, Any]:
        """Slot -> result, for arrays of one shape that hold some of the elements."""
        shape = jnp.shape(next(iter(arguments.values())))
        made: list[Any] = []
        of_kind = {"made": made, "argument": arguments, "common": common}
        read = lambda name: jnp.broadcast_to(of_kind[name[0]][name[1]], shape)
        for equation, reads in self.steps:
            operands = [read(name) for name in reads]
            is_same = equation.primitive.name == "broadcast_in_dim"  # to the parameter's shape
            made.append(operands[0] if is_same else equation.primitive.bind(*operands, **equation.params))
        return {slot: read(name) for slot, name in self.results}


class Program:
    """An update as operations on the elements of each parameter (`leaves`) and on what they have in common (`common`).

    Raises: Joins."""

    def __init__(self, closed: Any, takes: list[Role], gives: list[Role], shapes: list[tuple[int, ...]]):
        if len(gives) != len(closed.jaxpr.outvars):
            raise Joins("(its state changes its form)")
        self._takes, self._gives, self._shapes = takes, gives, shapes
        self._numbers: dict[Hashable, int] = {}
        self._made: dict[int, tuple[Any, list[_Value], int]] = {}  # number -> operation, operands, which of its results
        self._constants: dict[int, Any] = {}
        inputs = [
            self._value(("argument", k), v.aval.shape, role.leaf)
            for k, (v, role) in enumerate(zip(closed.jaxpr.invars, takes, strict=True))
        ]
        self._places = {value.number: k for k, value in enumerate(inputs)}
        self._results = self._read(closed.jaxpr, closed.consts, inputs)
        for value, role in zip(self._results, gives, strict=True):
            if value.leaf not in (None, role.leaf):
                raise Joins("(what is kept for one parameter depends on another)")
        self.leaves = [self._leaf(i) for i in range(len(shapes))]

    def common(self, arguments: list) -> tuple[dict[int, Any], list]:
        """(The scalars that the leaves use, by number; the results that belong to no parameter, in order), where
        `arguments` are those of the update (for a parameter's own anything will do)."""
        done: dict[int, Any] = dict(self._constants)

        def compute(v: _Value) -> Any:
            if v.number not in done:
                if v.number in self._places:
                    done[v.number] = arguments[self._places[v.number]]
                else:
                    equation, operands, k = self._made[v.number]
                    answer = equation.primitive.bind(*map(spread, operands), **equation.params)
                    done[v.number] = answer[k] if equation.primitive.multiple_results else answer
            return done[v.number]

        spread = lambda v: jnp.broadcast_to(compute(v), v.shape) if v.one else compute(v)
        scalars = {n: compute(v) for leaf in self.leaves for n, v in leaf.common.items()}
        return scalars, [spread(v) for v, r in zip(self._results, self._gives, strict=True) if r.leaf is None]

    def _value(self, key: Hashable, shape: tuple[int, ...], leaf: int | None = None) -> _Value:
        return _Value(self._numbers.setdefault(key, len(self._numbers)), leaf, tuple(shape), shape == ())

    def _constant(self, key: Hashable, array: Any) -> _Value:
        value = self._value(key, jnp.shape(array))
        self._constants[value.number] = array
        return value

    def _read(self, jaxpr: Any, consts: Any, inputs: list[_Value]) -> list[_Value]:
        """The results of a program, or of one that it calls, with its operations noted."""
        held = [self._constant(("constant", id(c)), c) for c in consts]
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*held, *inputs], strict=True))

        def read(atom: Any) -> _Value:
            if not isinstance(atom, Literal):
                return values[atom]
            aval: Any = atom.aval
            return self._constant(("literal", repr(atom.val), str(aval.dtype)), jnp.asarray(atom.val, aval.dtype))

        for equation in jaxpr.eqns:
            operands = [read(v) for v in equation.invars]
            if equation.primitive.name in _CALLS:
                inner = next(equation.params[n] for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in equation.params)
                found = self._read(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands)
            else:
                found = self._note(equation, operands)
            values |= dict(zip(equation.outvars, found, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _note(self, equation: Any, operands: list[_Value]) -> list[_Value]:
        name, shapes = equation.primitive.name, [tuple(v.aval.shape) for v in equation.outvars]
        leaves = {v.leaf for v in operands if v.leaf is not None}
        leaf = min(leaves, default=None)
        if leaf is not None:
            own = self._shapes[leaf]
            alike = shapes == [own] and all(v.shape == own or v.one and v.leaf is None for v in operands)
            if len(leaves) > 1 or not alike or name not in _ELEMENTWISE:
                raise Joins(name)
        elif name == "broadcast_in_dim" and operands[0].one:
            return [dataclasses.replace(operands[0], shape=shapes[0])]
        key = name, _told(equation), *((v.number, v.shape) for v in operands)
        found = [self._value((*key, k), shape, leaf) for k, shape in enumerate(shapes)]
        for k, value in enumerate(found):
            self._made.setdefault(value.number, (equation, operands, k))
        return found

    def _leaf(self, leaf: int) -> LeafUpdate:
        names: dict[int, tuple] = {}
        for number, k in self._places.items():
            if self._takes[k].leaf == leaf:
                names[number] = ("argument", self._takes[k].slot)
        steps, common = [], {}

        def name(value: _Value) -> tuple:
            if value.number in names:
                return names[value.number]
            if value.leaf is None:
                if not value.one:  # an array that is no parameter's, such as noise
                    raise Joins(self._made[value.number][0].primitive.name if value.number in self._made else "array")
                common[value.number] = value
                return ("common", value.number)
            equation, operands, _ = self._made[value.number]
            reads = tuple(map(name, operands))
            steps.append((equation, reads))
            names[value.number] = ("made", len(steps) - 1)
            return names[value.number]

        pairs = zip(self._results, self._gives, strict=True)
        results = tuple((role.slot, name(value)) for value, role in pairs if role.leaf == leaf)
        return LeafUpdate(tuple(steps), results, common)


def _told(equation: Any) -> str:
    return repr(sorted(equation.params.items()))


def program(update: Callable, arguments: tuple, takes: Any, gives: Any, shapes: list[tuple[int, ...]]) -> Program:
    """`update(*arguments)` as operations on elements; nothing is computed.

    takes, gives: the roles of the arguments' leaves and the answer's; shapes: of the parameters. Raises: Joins."""
    return Program(jax.make_jaxpr(update)(*arguments), takes, gives, shapes)
