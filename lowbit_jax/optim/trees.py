"""Trees of parameters and gradients: paths for error messages, and the checks every wrapper makes first."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowbit_jax.qtensor import QTensor


def is_packed(node: Any) -> bool:
    """Packed weights are one parameter, not a subtree."""
    return isinstance(node, QTensor)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedUpdate:
    """The update of a packed parameter: the weights that take its place. A type of its own, so that
    `optax.apply_updates`, which would add packed bytes, finds two trees that do not match."""

    weights: QTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weights.shape)


def is_packed_update(node: Any) -> bool:
    return isinstance(node, PackedUpdate)


def name_of(path: tuple) -> str:
    """The path of a leaf as people write it: `layers/0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(the tree itself)"


def name_of_parameter(path: tuple) -> str:
    """The path of a parameter, or of what is kept for it, without the `value` that variables of Flax NNX end it with:
    `nnx.Optimizer` takes arrays out of their variables in `update`, and not in `init`."""
    in_variable = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
    return name_of(path[:-1] if in_variable else path)


def named_parameters(tree: Any) -> dict[str, Any]:
    """`name_of_parameter` -> leaf; packed weights count as leaves."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_packed)
    return {name_of_parameter(path): leaf for path, leaf in found}


def named_leaves(tree: Any) -> dict[str, Any]:
    """Path -> leaf; packed weights and their updates count as leaves."""
    one = lambda node: is_packed(node) or is_packed_update(node)
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=one)
    return {name_of(path): leaf for path, leaf in found}


def check_floating(tree: Any, who: str, what: str) -> None:
    """Raises TypeError, with the path, for a leaf that is neither a floating array nor packed weights."""
    for name, leaf in named_leaves(tree).items():
        if is_packed(leaf):
            continue
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"{who}: the {what} {name!r} is {kind}; it moves floating arrays only. Split such leaves off"
                " (nnx.split(model, nnx.Param, ...)), or leave them out with optax.masked."
            )


def check_same_tree(first: Any, second: Any, who: str, names: tuple[str, str]) -> None:
    """Raises ValueError unless both trees have the same paths and shapes; it names the first few that differ."""
    one, two = named_leaves(first), named_leaves(second)
    for these, others, here, there in ((one, two, *names), (two, one, *reversed(names))):
        only = [name for name in these if name not in others]
        if only:
            raise ValueError(
                f"{who}: {len(only)} leaves of the {here} are not among the {there}: {', '.join(only[:3])}"
                f"{' ...' if len(only) > 3 else ''}. Both trees must have the same paths; was one of them filtered,"
                " or made by another model?"
            )
    for name, leaf in one.items():
        if tuple(leaf.shape) != tuple(two[name].shape):
            raise ValueError(
                f"{who}: {name!r} has shape {tuple(leaf.shape)} in the {names[0]} and {tuple(two[name].shape)} in the"
                f" {names[1]}. Were they made by models of different sizes?"
            )


def require_params(params: Any, who: str) -> None:
    """Raises ValueError for `params=None`."""
    if params is None:
        raise ValueError(
            f"{who} got no parameters; it needs them to compute the update. Call tx.update(gradients, state, params)."
        )


def float32(tree: Any) -> Any:
    """Floating leaves below 32 bits as float32, packed weights as the arrays they stand for; the rest as it is."""
    return jax.tree.map(_float32, tree, is_leaf=is_packed)


def squarable(grads: Any) -> Any:
    """Gradients in float32; finite ones beyond 2**63, whose squares are not, as +-2**63."""

    def one(g: Any) -> Any:
        limit = jnp.asarray(2.0**63, g.dtype)
        return jnp.where(jnp.isfinite(g), jnp.clip(g, -limit, limit), g)

    return jax.tree.map(one, float32(grads))


def float32_copy(tree: Any) -> Any:
    """`float32`, in buffers of its own: a program may be given both trees to write into."""
    own = lambda wide, leaf: wide.copy() if wide is leaf else wide
    return jax.tree.map(own, float32(tree), tree, is_leaf=is_packed)


def apart_from(tree: Any, other: Any) -> Any:
    """`tree` with copies of those arrays that `other` holds as well."""
    held = {id(leaf) for leaf in jax.tree.leaves(other)}
    return jax.tree.map(lambda leaf: leaf.copy() if id(leaf) in held else leaf, tree)


def _float32(leaf: Any) -> Any:
    if is_packed(leaf):
        return leaf.dequantize(jnp.float32)
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.dtype(leaf.dtype).itemsize < 4:
        return leaf.astype(jnp.float32)
    return leaf
