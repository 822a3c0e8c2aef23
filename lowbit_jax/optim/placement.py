"""Where an optimizer's state lies on a mesh, from where its parameters lie."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lowbit_jax.optim import trees
from lowbit_jax.optim.state_codecs import Stored


def state_shardings(state: Any, params: Any, shardings: Any) -> Any:
    """Shardings for an optimizer's state (or its `jax.eval_shape`): what belongs to a parameter lies as it does.

    A leaf belongs to the parameter whose path its own path ends with and whose shape it has, through any nesting of
    optax wrappers; all else is replicated. Low-bit arrays follow with their words and scales, each axis sharded where
    the mesh divides it and replicated where it does not.
    shardings: a tree like `params` of `NamedSharding`.
    Raises: ValueError when `shardings` does not have the paths of `params`."""
    named = {_plain(name): leaf for name, leaf in trees.named_leaves(params).items()}
    placed = {_plain(name): sharding for name, sharding in trees.named_leaves(shardings).items()}
    if set(named) != set(placed):
        missing = sorted(set(named) ^ set(placed))
        raise ValueError(
            f"state_shardings: {', '.join(missing[:3])} {'is' if len(missing) == 1 else 'are'} in only one of the"
            " parameters and the shardings. Give one NamedSharding for each parameter."
        )
    if not placed:
        return jax.tree.map(lambda _: None, state)
    mesh = next(iter(placed.values())).mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    is_one = lambda node: isinstance(node, Stored)

    def place(path: tuple, node: Any) -> Any:
        name = _plain(trees.name_of(path))
        owners = [p for p in named if (name == p or name.endswith("/" + p))]
        owner = max(owners, key=len, default=None)
        if owner is None or tuple(named[owner].shape) != tuple(node.shape):
            return jax.tree.map(lambda _: everywhere, node)
        return jax.tree.map(lambda leaf: _like(placed[owner], leaf.shape), node)

    return jax.tree_util.tree_map_with_path(place, state, is_leaf=is_one)


def _plain(name: str) -> str:
    """A path without the `value` that variables of Flax NNX add."""
    return name.removesuffix("/value")


def _like(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The same axes on an array of other lengths, left out where they no longer divide it."""
    spec = list(sharding.spec)[: len(shape)]
    kept = [
        axis if axis is not None and length % _extent(sharding.mesh, axis) == 0 else None
        for axis, length in zip(spec, shape, strict=False)
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def _extent(mesh: Any, axis: Any) -> int:
    size = 1
    for name in axis if isinstance(axis, tuple) else (axis,):
        size *= mesh.shape[name]
    return size
