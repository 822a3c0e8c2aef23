"""One step of an elementwise optimizer on stored moments, a few ten thousand elements at a time.

On a CPU the float32 moments of a whole layer are written to memory and read again between the passes of a step, and
the memory for them is fresh each time; a chunk stays in cache. The result is that of the whole at once. Small leaves go
through one loop together, which is compiled once for all of them.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowbit_jax.optim.lanes import Lane, Ranked, lane_of, row_length
from lowbit_jax.optim.state_codecs import Stored

ELEMENTS = 1 << 13  # of a chunk: the arrays of a step stay near a core (2^15 takes a seventh longer)
ALONE = 1 << 19  # leaves of so many elements have a loop of their own, in place; smaller ones are joined, by copying
TOGETHER = 1 << 22  # elements of the leaves that are joined: what the copies may take

Own = list[dict[str, Any]]  # for each node of the state, its fields: the arrays that belong to one leaf


def pays() -> bool:
    """Whether chunks are worth it: on one CPU device (a loop over a sharded axis gathers it; GPUs fuse the passes)."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A gradient, its parameter (or None), and what the state holds for it, in rows of `length` (0: not in rows)."""

    grad: Any
    weight: Any
    own: Own
    length: int

    @property
    def kind(self) -> tuple:
        """What leaves that are joined must have in common."""
        lanes = tuple((j, n, lane_of(a, self.length)) for j, o in enumerate(self.own) for n, a in o.items())
        return lanes, self.grad.dtype, None if self.weight is None else self.weight.dtype


def update_in_chunks(
    update: Callable,
    updates: Any,
    state: Any,
    params: Any,
    known: Callable[[Any], bool],
    fields: Callable[[Any], list[str]],
) -> tuple[Any, Any]:
    """`update(updates, state, params)` of an elementwise transformation.

    known: whether a node of the state has moments; fields(node): their names, each a tree with the paths of the
    updates."""
    grads, tree = jax.tree.flatten(updates)
    if not grads:
        return update(updates, state, params)
    weights = tree.flatten_up_to(params) if params is not None else [None] * len(grads)
    weights = [jax.tree.leaves(w)[0] if w is not None else None for w in weights]
    nodes, state_tree = jax.tree.flatten(state, is_leaf=known)
    held = [_fields_of(node, fields) if known(node) else {} for node in nodes]

    def step(grad: Any, own: Own, weight: Any) -> tuple[Any, Own, list]:
        now = state_tree.unflatten([n._replace(**a) if a else n for n, a in zip(nodes, own, strict=True)])
        moved, new = update(_wide(grad), now, _wide(weight))
        after = jax.tree.flatten(new, is_leaf=known)[0]
        arrays = [{name: getattr(n, name) for name in o} for n, o in zip(after, own, strict=True)]
        return moved.astype(grad.dtype), arrays, after

    leaves = []
    for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        own = [{name: arrays[i] for name, (arrays, _) in h.items()} for h in held]
        leaves.append(Leaf(grad, weight, own, _length(grad, own)))
    answers: list[Any] = [None] * len(leaves)
    for group in _groups(leaves):
        if leaves[group[0]].length:
            found = _loop(step, [leaves[i] for i in group])
        else:
            found = [_whole(step, leaves[i]) for i in group]
        for i, answer in zip(group, found, strict=True):
            answers[i] = answer
    few = jnp.zeros((1,), grads[0].dtype), [{n: jnp.zeros((1,)) for n in o} for o in leaves[0].own]
    scalars = step(*few, None if weights[0] is None else jnp.zeros((1,), weights[0].dtype))[2]
    whole = [
        node._replace(**{name: shape.unflatten([a[1][j][name] for a in answers]) for name, (_, shape) in h.items()})
        if h
        else node
        for j, (node, h) in enumerate(zip(scalars, held, strict=True))
    ]
    return tree.unflatten([moved for moved, _ in answers]), state_tree.unflatten(whole)


def _fields_of(node: Any, fields: Callable) -> dict[str, tuple[list, Any]]:
    is_stored = lambda leaf: isinstance(leaf, Stored)
    return {name: jax.tree.flatten(getattr(node, name), is_leaf=is_stored) for name in fields(node)}


def _wide(x: Any) -> Any:
    return x.astype(jnp.float32) if x is not None and jnp.dtype(x.dtype).itemsize < 4 else x


def _length(grad: Any, own: Own) -> int:
    """Elements of the rows in which a leaf goes through a loop; 0 where it goes as a whole: nothing is stored, its
    blocks do not lie in rows, or it is a matrix too small for two loops or of rows of which no number makes a chunk."""
    stored = [leaf for o in own for leaf in o.values() if isinstance(leaf, Stored)]
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
        ranked = leaf.length and any(isinstance(lane_of(a, leaf.length), Ranked) for o in leaf.own for a in o.values())
        if not leaf.length or ranked or leaf.grad.size >= ALONE:
            alone.append([i])
            continue
        groups = joined.setdefault(leaf.kind, [[]])
        if groups[-1] and sum(leaves[k].grad.size for k in groups[-1]) + leaf.grad.size > TOGETHER:
            groups.append([])
        groups[-1].append(i)
    return [*alone, *(group for groups in joined.values() for group in groups)]


def _whole(step: Callable, leaf: Leaf) -> tuple[Any, Own]:
    decoded = [{n: a.dequantize() if isinstance(a, Stored) else a for n, a in o.items()} for o in leaf.own]
    moved, arrays, _ = step(leaf.grad, decoded, leaf.weight)

    def kept(old: Any, array: Any) -> Any:
        if not isinstance(old, Stored):
            return array
        return dataclasses.replace(Stored.of(array, old.codec), within=old.within)

    return moved, [{n: kept(old, a[n]) for n, old in o.items()} for o, a in zip(leaf.own, arrays, strict=True)]


def _loop(step: Callable, group: list[Leaf]) -> list[tuple[Any, Own]]:
    """The step over chunks of rows, writing in place; several leaves as one array of all their rows."""
    first = group[0]
    length = first.length
    lanes: list[dict[str, Lane]] = [{n: lane_of(a, length) for n, a in o.items()} for o in first.own]
    counts = [leaf.grad.size // length for leaf in group]
    ranked = [(j, n) for j, o in enumerate(lanes) for n, lane in o.items() if isinstance(lane, Ranked)]
    size = _rows_of_matrix(first.grad.shape) if ranked else _chunk(sum(counts), max(1, ELEMENTS // length))
    spare = -sum(counts) % size if len(group) > 1 else 0
    join = lambda *parts: _joined(parts, spare)
    opened = [[{n: lanes[j][n].open(a) for n, a in o.items()} for j, o in enumerate(leaf.own)] for leaf in group]
    state = jax.tree.map(join, *opened)
    grads = join(*(leaf.grad.reshape(-1, length) for leaf in group))
    weight = None if first.weight is None else join(*(leaf.weight.reshape(-1, length) for leaf in group))

    def rows(start: Any, count: int, grads: Any, state: Any) -> tuple[Any, Own]:
        """(updates, new float32 arrays) of some rows.

        In a branch that is always taken, so that XLA has done with the rows before any is written: fused into what
        writes them it reads them late, and copies the whole arrays in every round so as to be able to."""

        def moved_rows() -> tuple[Any, Own]:
            part = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, count, 0), (grads, state, weight))
            decoded = [{n: lanes[j][n].read(p, start) for n, p in o.items()} for j, o in enumerate(part[1])]
            return step(part[0], decoded, part[2])[:2]

        never = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(moved_rows))
        return lax.cond(start >= 0, moved_rows, never)

    if ranked:
        _gather(rows, lanes, ranked, grads, state, size)

    def chunk(start: Any, count: int, carry: tuple) -> tuple:
        moved, arrays = rows(start, count, *carry)
        new = [{n: lanes[j][n].write(a, start) for n, a in o.items()} for j, o in enumerate(arrays)]
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
        own = [
            {n: lanes[j][n].close(old, [cut(p) for p in state[j][n]]) for n, old in o.items()}
            for j, o in enumerate(leaf.own)
        ]
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


def _gather(rows: Callable, lanes: list[dict[str, Lane]], ranked: list, grads: Any, state: Any, size: int) -> None:
    """A loop before the loop, which writes nothing but the maxima that the ranked lanes will write by."""
    chosen = {(j, n): lane for j, n in ranked if isinstance(lane := lanes[j][n], Ranked)}

    def some(i: Any, maxima: list) -> list:
        start = i * size
        _, arrays = rows(start, size, grads, state)
        return [lane.gather(m, arrays[j][n], start) for ((j, n), lane), m in zip(chosen.items(), maxima, strict=True)]

    maxima = lax.fori_loop(0, grads.shape[0] // size, some, [lane.start() for lane in chosen.values()])
    for ((j, n), lane), (new_rows, new_columns) in zip(chosen.items(), maxima, strict=True):
        lanes[j][n] = dataclasses.replace(lane, new_rows=new_rows, new_columns=new_columns)


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
