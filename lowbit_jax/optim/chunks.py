"""One step of an elementwise optimizer on stored moments, a few hundred thousand elements at a time.

On a CPU the float32 moments of a whole layer are written to memory and read again between the passes of a step, and
the memory for them is fresh each time; a chunk stays in cache. The result is that of the whole at once.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowbit_jax.optim.state_codecs import Blockwise, Companded, Stored

ELEMENTS = 1 << 18  # of a chunk: 1 MiB of float32


def pays() -> bool:
    """Whether chunks are worth it: on one CPU device (a loop over a sharded axis gathers it; GPUs fuse the passes)."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def update_in_chunks(
    update: Callable,
    updates: Any,
    state: Any,
    params: Any,
    known: Callable[[Any], bool],
    fields: Callable[[Any], list[str]],
    store: Callable[[Any, Any, str], Any],
) -> tuple[Any, Any]:
    """`update(updates, state, params)` of an elementwise transformation, leaf by leaf.

    known: whether a node of the state has moments; fields(node): their names; store(array, node, field): how a new
    array is kept. Small leaves go as a whole."""
    grads, tree = jax.tree.flatten(updates)
    weights = tree.flatten_up_to(params) if params is not None else [None] * len(grads)
    weights = [jax.tree.leaves(w)[0] if w is not None else None for w in weights]
    nodes, state_tree = jax.tree.flatten(state, is_leaf=known)
    held = [_fields_of(node, fields) if known(node) else {} for node in nodes]
    kept = [{name: list(leaves) for name, (leaves, _) in own.items()} for own in held]

    def state_of(arrays: list[dict[str, Any]]) -> Any:
        return state_tree.unflatten([n._replace(**a) if a else n for n, a in zip(nodes, arrays, strict=True)])

    def step(grad: Any, own: list[dict[str, Any]], weight: Any) -> tuple[Any, list[dict[str, Any]], Any]:
        decoded = [{name: _decoded(leaf) for name, leaf in o.items()} for o in own]
        moved, new = update(_wide(grad), state_of(decoded), _wide(weight))
        after = jax.tree.flatten(new, is_leaf=known)[0]
        arrays = [{name: getattr(n, name) for name in o} for n, o in zip(after, own, strict=True)]
        return moved.astype(grad.dtype), arrays, after

    moved, scalars = [], None
    for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        own = [{name: leaves[i] for name, leaves in k.items()} for k in kept]
        stored = [leaf for o in own for leaf in o.values() if isinstance(leaf, Stored)]
        unit = _unit(stored)
        if unit and len(stored) == sum(map(len, own)) and grad.size % unit == 0 and grad.size >= 2 * ELEMENTS:
            answer, new = _loop(step, grad, weight, own, unit)
        else:
            answer, arrays, _ = step(grad, own, weight)
            new = [
                {name: store(array, node, name) for name, array in a.items()}
                for node, a in zip(nodes, arrays, strict=True)
            ]
        if scalars is None:
            few = [{n: _first(leaf, unit) for n, leaf in o.items()} for o in own]
            scalars = step(_first(grad, unit), few, _first(weight, unit))[2]
        moved.append(answer)
        for k, n in zip(kept, new, strict=True):
            for name, leaf in n.items():
                old = k[name][i]
                keep = isinstance(old, Stored) and isinstance(leaf, Stored)
                k[name][i] = dataclasses.replace(leaf, within=old.within) if keep else leaf
    if scalars is None:
        return update(updates, state, params)
    whole = [
        node._replace(**{name: held[j][name][1].unflatten(leaves) for name, leaves in kept[j].items()})
        if kept[j]
        else node
        for j, node in enumerate(scalars)
    ]
    return tree.unflatten(moved), state_tree.unflatten(whole)


def _fields_of(node: Any, fields: Callable) -> dict[str, tuple[list, Any]]:
    is_stored = lambda leaf: isinstance(leaf, Stored)
    return {name: jax.tree.flatten(getattr(node, name), is_leaf=is_stored) for name in fields(node)}


def _decoded(leaf: Any) -> Any:
    return leaf.dequantize() if isinstance(leaf, Stored) else leaf


def _wide(x: Any) -> Any:
    return x.astype(jnp.float32) if x is not None and jnp.dtype(x.dtype).itemsize < 4 else x


def _unit(stored: list[Stored]) -> int:
    """Elements of the smallest run that is whole blocks of every codec; 0 where one is not made of blocks."""
    blocks = [s.codec.block for s in stored if isinstance(s.codec, Blockwise | Companded)]
    return math.lcm(*blocks, 8) if stored and len(blocks) == len(stored) else 0


def _rows(leaf: Any, unit: int, count: int) -> Any:
    """An array as [count, unit]; the parts of a stored one as [count, bytes] and [count, blocks, 1]."""
    if not isinstance(leaf, Stored):
        return leaf.reshape(count, unit)
    return jax.tree.map(lambda p: p.reshape((count, -1, 1) if p.shape[-1] == 1 else (count, -1)), leaf.parts)


def _as_stored(leaf: Stored, rows: Any, count: int, unit: int) -> Stored:
    """A chunk of rows as the stored array of shape [count, unit] that it is."""
    parts = rows if isinstance(leaf.parts, dict) else dataclasses.replace(rows, length=unit)
    return dataclasses.replace(leaf, parts=parts, shape=(count, unit), within=None)


def _like(parts: Any, rows: Any) -> Any:
    """The same arrays in the shapes and with the static data of `rows`."""
    leaves, tree = jax.tree.flatten(rows)
    return tree.unflatten([p.reshape(r.shape) for p, r in zip(jax.tree.leaves(parts), leaves, strict=True)])


def _first(leaf: Any, unit: int) -> Any:
    """A short beginning of a leaf: enough to see what a step makes of the scalars."""
    if leaf is None:
        return None
    if not isinstance(leaf, Stored):
        return leaf.reshape(-1)[: unit or 1]
    return jnp.zeros((unit or 1,), jnp.float32)


def _loop(step: Callable, grad: Any, weight: Any, own: list[dict[str, Any]], unit: int) -> tuple[Any, list]:
    """The step over chunks of whole rows, writing in place; what does not fill a chunk goes at the end."""
    count = grad.size // unit
    size = max(1, ELEMENTS // unit)
    old = own
    carry = _rows(grad, unit, count), [{n: _rows(leaf, unit, count) for n, leaf in o.items()} for o in own]
    weight = None if weight is None else weight.reshape(count, unit)

    def chunk(start: Any, length: int, carry: tuple) -> tuple:
        part = lambda a: lax.dynamic_slice_in_dim(a, start, length, 0)
        grads, rows = jax.tree.map(part, carry)
        stored = [{n: _as_stored(leaf, rows[j][n], length, unit) for n, leaf in o.items()} for j, o in enumerate(old)]
        moved, arrays, _ = step(grads, stored, None if weight is None else part(weight))
        new = [{n: _like(Stored.of(a, old[j][n].codec).parts, rows[j][n]) for n, a in o.items()} for j, o in
               enumerate(arrays)]  # fmt: skip
        into = lambda whole, piece: lax.dynamic_update_slice_in_dim(whole, piece, start, 0)
        return jax.tree.map(into, carry, (moved, new))

    full = count // size
    carry = lax.fori_loop(0, full, lambda i, c: chunk(i * size, size, c), carry)
    if count % size:
        carry = chunk(full * size, count % size, carry)
    moved, rows = carry
    new = [
        {
            n: dataclasses.replace(leaf, parts=jax.tree.map(lambda r, p: r.reshape(p.shape), rows[j][n], leaf.parts))
            for n, leaf in o.items()
        }
        for j, o in enumerate(old)
    ]
    return moved.reshape(grad.shape), new
