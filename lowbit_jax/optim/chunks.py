"""One step of an elementwise optimizer on stored moments, some ten thousand elements at a time.

On a CPU the float32 moments of a whole layer are written to memory and read again between the passes of a step, and
the memory for them is fresh each time; a chunk stays in cache. The result is that of the whole at once. Small leaves go
through one loop together, which is compiled once for all of them.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowbit_jax.optim import trees
from lowbit_jax.optim.lanes import Lane, Ranked, lane_of, row_length
from lowbit_jax.optim.separable import Joins, LeafUpdate, Program, Role, program
from lowbit_jax.optim.state_codecs import Stored

ELEMENTS = 1 << 16  # of a chunk: the arrays of a step stay in cache, and XLA thinks an operation worth two threads
ALONE = 1 << 19  # leaves of so many elements have a loop of their own, in place; smaller ones are joined, by copying
TOGETHER = 1 << 22  # elements of the leaves that are joined: what the copies may take

UPDATE, WEIGHT = "update", "weight"  # slots: a gradient and what becomes of it, a parameter

Own = dict[Hashable, Any]  # slot -> the array that a field of the state holds for one leaf


def pays() -> bool:
    """Whether chunks are worth it: on one CPU device (a loop over a sharded axis gathers it; GPUs fuse the passes)."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A gradient, its parameter (or None), what the state holds for it, in rows of `length` (0: not in rows), and what
    happens to its elements."""

    grad: Any
    weight: Any
    own: Own
    length: int
    update: LeafUpdate

    @property
    def kind(self) -> tuple:
        """What leaves that are joined must have in common."""
        lanes = tuple((slot, lane_of(a, self.length)) for slot, a in self.own.items())
        return lanes, self.grad.dtype, None if self.weight is None else self.weight.dtype, self.update.key

    def step(self, common: dict, grad: Any, own: Own, weight: Any) -> tuple[Any, Own]:
        """(updates, new float32 arrays) of some elements, all given in one shape."""
        arguments: dict[Hashable, Any] = {UPDATE: trees.squarable(grad), **own}
        if weight is not None:
            arguments[WEIGHT] = trees.float32(weight)
        new = self.update.run(arguments, common)
        return new.pop(UPDATE).astype(grad.dtype), new


def program_of(update: Callable, updates: Any, state: Any, params: Any, decoded: Any, roles: list[Role]) -> Program:
    """What `update(updates, state, params)` does to elements.

    decoded: `state` with every stored array in float32, or the shapes of it; roles: of the leaves of the state
    (`Rules.roles`). Raises: Joins where elements act on one another."""
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(updates)]
    own = lambda slot: [Role(i, slot) for i in range(len(shapes))]
    weights = [] if params is None else own(WEIGHT)
    if params is not None and len(jax.tree.leaves(params)) != len(shapes):
        raise Joins("(packed parameters)")
    arguments = jax.eval_shape(lambda u, d, p: (trees.float32(u), d, trees.float32(p)), updates, decoded, params)
    return program(update, arguments, [*own(UPDATE), *roles, *weights], [*own(UPDATE), *roles], shapes)


def update_in_chunks(steps: Program, updates: Any, state: Any, params: Any, roles: list[Role]) -> tuple[Any, Any]:
    """`update(updates, state, params)` by its program (`program_of`)."""
    grads, tree = jax.tree.flatten(updates)
    weights = [None] * len(grads) if params is None else jax.tree.leaves(params)
    arrays, state_tree = jax.tree.flatten(state, is_leaf=_is_stored)
    owns: list[Own] = [{} for _ in grads]
    for role, array in zip(roles, arrays, strict=True):
        if role.leaf is not None:
            owns[role.leaf][role.slot] = array
    common, others = steps.common([*grads, *arrays, *weights])
    leaves = [
        Leaf(grad, weight, own, _length(grad, own), own_update)
        for grad, weight, own, own_update in zip(grads, weights, owns, steps.leaves, strict=True)
    ]
    answers: list[Any] = [None] * len(leaves)
    for group in _groups(leaves):
        if leaves[group[0]].length:
            found = _loop(common, [leaves[i] for i in group])
        else:
            found = [_whole(common, leaves[i]) for i in group]
        for i, answer in zip(group, found, strict=True):
            answers[i] = answer
    new = iter(others)
    after = [next(new) if role.leaf is None else answers[role.leaf][1][role.slot] for role in roles]
    return tree.unflatten([moved for moved, _ in answers]), state_tree.unflatten(after)


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, Stored)


def _length(grad: Any, own: Own) -> int:
    """Elements of the rows in which a leaf goes through a loop; 0 where it goes as a whole: nothing is stored, its
    blocks do not lie in rows, or it is a matrix too small for two loops or of rows of which no number makes a chunk."""
    stored = [array for array in own.values() if isinstance(array, Stored)]
    if any(s.shape != grad.shape for s in stored):
        return 0
    length = row_length(stored)
    if length and any(isinstance(lane_of(s, length), Ranked) for s in stored):
        return length if grad.size >= ALONE and _rows_of_matrix(grad.shape) * length >= ELEMENTS // 4 else 0
    return length


def _rows_of_matrix(shape: tuple[int, ...]) -> int:
    """Rows of a chunk that does not reach from one matrix into the next."""
    most = max(1, ELEMENTS // shape[-1])
    return max(r for r in range(1, min(most, shape[-2]) + 1) if shape[-2] % r == 0)


def _groups(leaves: list[Leaf]) -> Iterable[list[int]]:
    """The numbers of the leaves that go through one loop: large and ranked ones alone, small ones of a kind joined."""
    alone, joined = [], {}
    for i, leaf in enumerate(leaves):
        ranked = leaf.length and any(isinstance(lane_of(a, leaf.length), Ranked) for a in leaf.own.values())
        if not leaf.length or ranked or leaf.grad.size >= ALONE:
            alone.append([i])
            continue
        groups = joined.setdefault(leaf.kind, [[]])
        if groups[-1] and sum(leaves[k].grad.size for k in groups[-1]) + leaf.grad.size > TOGETHER:
            groups.append([])
        groups[-1].append(i)
    return [*alone, *(group for groups in joined.values() for group in groups)]


def _whole(common: dict, leaf: Leaf) -> tuple[Any, Own]:
    decoded = {slot: a.dequantize() if isinstance(a, Stored) else a for slot, a in leaf.own.items()}
    moved, new = leaf.step(common, leaf.grad, decoded, leaf.weight)

    def kept(old: Any, array: Any) -> Any:
        if not isinstance(old, Stored):
            return array
        return dataclasses.replace(Stored.of(array, old.codec), within=old.within)

    return moved, {slot: kept(old, new[slot]) for slot, old in leaf.own.items()}


def _loop(common: dict, group: list[Leaf]) -> list[tuple[Any, Own]]:
    """The step over chunks of rows, writing in place; several leaves as one array of all their rows."""
    first = group[0]
    length = first.length
    lanes: dict[Hashable, Lane] = {slot: lane_of(a, length) for slot, a in first.own.items()}
    counts = [leaf.grad.size // length for leaf in group]
    ranked = {slot: lane for slot, lane in lanes.items() if isinstance(lane, Ranked)}
    size = _rows_of_matrix(first.grad.shape) if ranked else _chunk(sum(counts), max(1, ELEMENTS // length))
    spare = -sum(counts) % size if len(group) > 1 else 0
    join = lambda *parts: _joined(parts, spare)
    state = jax.tree.map(join, *({slot: lanes[slot].open(a) for slot, a in leaf.own.items()} for leaf in group))
    grads = join(*(leaf.grad.reshape(-1, length) for leaf in group))
    weight = None if first.weight is None else join(*(leaf.weight.reshape(-1, length) for leaf in group))

    def rows(start: Any, count: int, grads: Any, state: Any) -> tuple[Any, Own]:
        """(updates, new float32 arrays) of some rows.

        In a branch that is always taken, so that XLA has done with the rows before any is written: fused into what
        writes them it reads them late, and copies the whole arrays in every round so as to be able to."""

        def moved_rows() -> tuple[Any, Own]:
            part = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, count, 0), (grads, state, weight))
            decoded = {slot: lanes[slot].read(p, start) for slot, p in part[1].items()}
            return first.step(common, part[0], decoded, part[2])

        never = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(moved_rows))
        return lax.cond(start >= 0, moved_rows, never)

    if ranked:
        lanes |= _gather(rows, ranked, grads, state, size)

    def chunk(start: Any, count: int, carry: tuple) -> tuple:
        moved, arrays = rows(start, count, *carry)
        new = {slot: lanes[slot].write(a, start) for slot, a in arrays.items()}
        into = lambda whole, piece: lax.dynamic_update_slice_in_dim(whole, piece, start, 0)
        return jax.tree.map(into, carry, (moved, new))

    total = grads.shape[0]
    carry = lax.fori_loop(0, total // size, lambda i, c: chunk(i * size, size, c), (grads, state))
    if total % size:
        carry = chunk(total // size * size, total % size, carry)
    moved, state = carry
    answers, starts = [], _known_late([sum(counts[:i]) for i in range(len(counts))], first.grad)
    for leaf, count, start in zip(group, counts, starts, strict=True):
        cut = lambda a, s=start, c=count: lax.dynamic_slice_in_dim(a, s, c, 0) if len(group) > 1 else a
        own = {slot: lanes[slot].close(old, [cut(p) for p in state[slot]]) for slot, old in leaf.own.items()}
        answers.append((cut(moved).reshape(leaf.grad.shape), own))
    return answers


def _known_late(numbers: list[int], array: Any) -> tuple:
    """The numbers, as what XLA cannot foresee: slices that start at known places are compiled each by itself, slices
    that start at the values of variables once for all of the same size."""
    if len(numbers) == 1:
        return tuple(numbers)
    bits = lax.bitcast_convert_type(array.reshape(-1)[0].astype(jnp.float32), jnp.int32)
    always = (bits & jnp.int32(0x7FFFFFFF)) >= 0
    here = lambda scale: lambda: tuple(jnp.int32(scale * n) for n in numbers)
    return lax.cond(always, here(1), here(0))


def _gather(
    rows: Callable, ranked: dict[Hashable, Ranked], grads: Any, state: Any, size: int
) -> dict[Hashable, Ranked]:
    """The ranked lanes, with the maxima by which they will write: a loop before the loop, which writes nothing else."""

    def some(i: Any, maxima: dict) -> dict:
        start = i * size
        _, arrays = rows(start, size, grads, state)
        return {slot: lane.gather(maxima[slot], arrays[slot], start) for slot, lane in ranked.items()}

    maxima = lax.fori_loop(0, grads.shape[0] // size, some, {slot: lane.start() for slot, lane in ranked.items()})
    return {
        slot: dataclasses.replace(lane, new_rows=maxima[slot][0], new_columns=maxima[slot][1])
        for slot, lane in ranked.items()
    }


def _joined(parts: tuple, spare: int) -> Any:
    """Rows one after the other, and rows of zeros that fill the last chunk."""
    if len(parts) == 1:
        return parts[0]
    rest = [jnp.zeros((spare, *parts[0].shape[1:]), parts[0].dtype)] if spare else []
    return jnp.concatenate([*parts, *rest])


def _chunk(total: int, most: int) -> int:
    """Rows of a chunk: a number near `most` that leaves no remainder, which would have to be compiled as well."""
    if total <= most:
        return total
    near = [size for size in range(most // 2 + 1, most + 1) if total % size == 0]
    return near[-1] if near else most
