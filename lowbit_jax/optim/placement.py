"""Where an optimizer's state lies on a mesh, from where its parameters lie."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lowbit_jax.optim import trees
from lowbit_jax.optim.state_codecs import Stored
from lowbit_jax.optim.stochastic_rounding import StochasticRoundingState
from lowbit_jax.qtensor import QTensor

Cuts = list[tuple[str, ...]]
"""For each axis of an array the axes of the mesh that cut it, slowest first."""


def state_shardings(state: Any, params: Any, shardings: Any) -> Any:
    """Shardings for an optimizer's state (or its `jax.eval_shape`): what belongs to a parameter lies as it does.

    A leaf belongs to the parameter whose path its own path ends with and whose shape it has, through any nesting of
    optax wrappers; all else is replicated. Low-bit arrays follow with their words and scales: axis for axis; where
    trailing axes are merged into blocks, the merged axis has all of their cuts, in memory order (XLA moves them at each
    step; the state is what stays in memory); and a cut that does not divide its axis goes to another that it divides.
    The scales of parameters on a grid (`stochastic_rounding(param_format=)`) follow their tiles.
    shardings: a tree like `params` of `NamedSharding`; packed parameters have one for each of their arrays, as
    `lb.parallel.shardings` gives them.
    Raises: ValueError when `shardings` does not have the paths of `params`."""
    named = trees.named_parameters(params)
    given = trees.named_parameters(shardings)
    if set(named) != set(given):
        missing = sorted(set(named) ^ set(given))
        raise ValueError(
            f"state_shardings: {', '.join(missing[:3])} {'is' if len(missing) == 1 else 'are'} in only one of the"
            " parameters and the shardings. Give one NamedSharding for each parameter."
        )
    if not given:
        return jax.tree.map(lambda _: None, state)
    placed = {name: _of_the_array(named[name], sharding) for name, sharding in given.items()}
    mesh = next(iter(placed.values())).mesh
    everywhere = NamedSharding(mesh, PartitionSpec())

    def tiled(name: str, scale: Any) -> NamedSharding:
        if name not in named:
            return everywhere
        return _with_tiles(placed[name], tuple(named[name].shape), tuple(scale.shape))

    def place(path: tuple, node: Any) -> Any:
        if isinstance(node, StochasticRoundingState):
            at = lambda name, own: jax.tree.map(lambda scale: tiled(name, scale), own)
            scales = {name: at(name, own) for name, own in node.scales.items()}
            inner = state_shardings(node.inner_state, params, shardings)
            return node._replace(count=everywhere, scales=scales, inner_state=inner)
        name = trees.name_of_parameter(path)
        owners = [p for p in named if name == p or name.endswith("/" + p) or p == trees.name_of(())]
        owner = max(owners, key=len, default=None)
        if owner is None or tuple(named[owner].shape) != tuple(node.shape):
            return jax.tree.map(lambda _: everywhere, node)
        if isinstance(node, QTensor) and jax.tree.structure(node) == jax.tree.structure(given[owner]):
            return given[owner]
        return jax.tree.map(lambda leaf: _with_blocks(placed[owner], tuple(node.shape), tuple(leaf.shape)), node)

    is_one = lambda node: isinstance(node, Stored | StochasticRoundingState | QTensor)
    return jax.tree_util.tree_map_with_path(place, state, is_leaf=is_one)


def _of_the_array(param: Any, sharding: Any) -> NamedSharding:
    """The sharding of a parameter; of packed ones that of the array that they stand for, read off their words, whose
    last axis is the contraction axis."""
    if not isinstance(sharding, QTensor):
        return sharding
    words: Any = sharding.words
    *rows, contract = _cuts(words, param.ndim)
    rows.insert(param.ndim + param.axis, contract)
    return _sharding(words, rows)


def _with_blocks(sharding: NamedSharding, shape: tuple[int, ...], stored: tuple[int, ...]) -> NamedSharding:
    """Of an array of shape `stored` that holds one of `shape`: axis for axis, or with the trailing axes merged."""
    cuts = _cuts(sharding, len(shape))
    if len(stored) == len(shape) and all(n in (m, 1) for n, m in zip(stored[:-1], shape, strict=False)):
        return _sharding(sharding, cuts, stored)
    same = [n == m for n, m in zip(stored, shape, strict=False)]
    kept = same.index(False) if False in same else len(same)
    return _sharding(sharding, [*cuts[:kept], tuple(name for cut in cuts[kept:] for name in cut)], stored)


def _with_tiles(sharding: NamedSharding, shape: tuple[int, ...], scale: tuple[int, ...]) -> NamedSharding:
    """Of the scales of an array's tiles: an axis of tiles is cut as the array is, one inside a tile is 1 long."""
    cuts, answer = _cuts(sharding, len(shape)), []
    for axis, length in enumerate(shape):
        at, left = len(answer), len(shape) - axis
        if at >= len(scale):
            return _sharding(sharding, [])
        in_tiles = len(scale) - at > left and scale[at + 1] == 1 and length % scale[at] == 0
        answer += [cuts[axis], ()] if in_tiles else [cuts[axis] if scale[at] == length else ()]
    return _sharding(sharding, answer, scale)


def _cuts(sharding: NamedSharding, ndim: int) -> Cuts:
    spec = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    return [() if cut is None else (cut,) if isinstance(cut, str) else tuple(cut) for cut in spec]


def _sharding(like: NamedSharding, cuts: Cuts, shape: tuple[int, ...] | None = None) -> NamedSharding:
    """On the mesh of `like`. With a `shape`, what an axis cannot take (the fastest first) goes to the longest one that
    can, so that the scales of few blocks are cut too."""
    mesh, left, fitted = like.mesh, [], []
    for axis, cut in enumerate(cuts):
        while shape is not None and cut and (axis >= len(shape) or shape[axis] % _extent(mesh, cut)):
            *cut, name = cut
            left += [name] if mesh.shape[name] > 1 else []
        fitted.append(tuple(cut))
    if shape is not None:
        fitted = [*fitted, *[()] * len(shape)][: len(shape)]
        for name in left:
            able = [a for a, n in enumerate(shape) if n % (_extent(mesh, fitted[a]) * mesh.shape[name]) == 0]
            if able:
                longest = max(able, key=lambda a: shape[a] // _extent(mesh, fitted[a]))
                fitted[longest] = (*fitted[longest], name)
    return NamedSharding(mesh, PartitionSpec(*[cut[0] if len(cut) == 1 else cut or None for cut in fitted]))


def _extent(mesh: Any, cut: tuple[str, ...] | list[str]) -> int:
    return math.prod(mesh.shape[name] for name in cut)
