"""Linen: whether a layer receives its weight as it is stored, read off the traced program of one call.

A lifted transformation (`nn.scan`, `nn.vmap`, `nn.remat`, `nn.jit`) hands a layer its weight, or the slice of a stack
that lies on axis 0. Anything else on the way (`nn.map_variables`, a stack on another axis) is an equation of the
program between the argument and the layer. One equation changes nothing: an `nn.vmap` around an `nn.scan` lets the two
axes of a stack change places before the scan slices it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Var
from jaxtyping import Array


@dataclasses.dataclass(frozen=True, slots=True)
class Permuted:
    """An argument, by number, whose leading axes changed places; the last ones, of this number, did not."""

    argument: int
    kept: int


Origin = int | str | Permuted
"""The number of an argument that arrives unchanged, or the name of the operation that made the value."""

_MARK = "lowbit stored "
_UNCHANGED = {"name", "stop_gradient", "copy", "device_put", "sharding_constraint", "reshard", "optimization_barrier"}


def mark(value: Array, path: str) -> None:
    """Leaves a trace of `value` in the program, as the weight of the layer `path`."""
    named = jax.custom_batching.custom_vmap(lambda x: checkpoint_name(x, f"{_MARK}{path}"))
    named.def_vmap(lambda size, batched, x: (named(x), True))  # it brings a mapped axis to the front, which shows
    named(lax.stop_gradient(value))


def origins(program: ClosedJaxpr) -> dict[str, set[Origin]]:
    """Where each marked weight comes from, by the path of its layer; one origin for each way that it is used in."""
    found: dict[str, set[Origin]] = {}
    _walk(program.jaxpr, list(range(len(program.jaxpr.invars))), found)
    return found


def of_slices(origin: Origin, ndim: int) -> int | str:
    """The origin of the last `ndim` axes of a value: those before them are of a stack, and may change places."""
    if isinstance(origin, Permuted):
        return origin.argument if origin.kept >= ndim else "transpose"
    return origin


def _permuted(origin: Origin, permutation: tuple[int, ...]) -> Origin:
    if isinstance(origin, str):
        return "transpose"
    moved = [axis for axis, source in enumerate(permutation) if axis != source]
    kept = len(permutation) - 1 - max(moved, default=-1)
    if isinstance(origin, Permuted):
        return Permuted(origin.argument, min(kept, origin.kept))
    return Permuted(origin, kept) if moved else origin


def _walk(jaxpr: Jaxpr, given: list[Origin], found: dict[str, set[Origin]]) -> list[Origin]:
    """Origins of the results; those of the arguments are `given`."""
    known: dict[Any, Origin] = dict(zip(jaxpr.invars, given, strict=True))
    origin = lambda value: known.get(value, "constant") if isinstance(value, Var) else "constant"
    for equation in jaxpr.eqns:
        sources, name, count = list(map(origin, equation.invars)), equation.primitive.name, len(equation.outvars)
        if (told := str(equation.params.get("name"))).startswith(_MARK):
            found.setdefault(told.removeprefix(_MARK), set()).add(sources[0])
        results = [sources] if name in _UNCHANGED else []
        if name == "transpose":
            results = [[_permuted(sources[0], equation.params["permutation"])]]
        for inner in _programs_of(equation):
            # A branch lacks the index before its arguments, the body of a while loop the constants of its condition.
            if len(inner.invars) <= len(sources):
                results.append(_walk(inner, sources[len(sources) - len(inner.invars) :], found))
        results = [result for result in results if len(result) == count]
        for at, made in enumerate(equation.outvars):
            agreed = {result[at] for result in results}
            known[made] = agreed.pop() if len(agreed) == 1 else name
    return [origin(value) for value in jaxpr.outvars]


def _programs_of(equation: Any) -> Iterator[Jaxpr]:
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(one, "jaxpr", one)
            if isinstance(inner, Jaxpr):
                yield inner
