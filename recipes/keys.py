"""Random keys of stochastic roundings: each step, microbatch and device draws its own, and a resumed run the same."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

Tree = Any


def of_number(rest: Tree, number: Array | int) -> Tree:
    """`rest` with `number` folded into each random key that it holds; without keys `rest` itself."""
    leaves, structure = jax.tree.flatten(rest)
    if not any(map(_is_key, leaves)):
        return rest
    folded = [_folded(leaf, number) if _is_key(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, folded)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", None) or jnp.float32, jax.dtypes.prng_key)


@jax.jit
def _folded(key: Array, number: Array | int) -> Array:
    """Of one key, or of each of an array of them."""
    fold = lambda key: jax.random.fold_in(key, number)
    return jax.vmap(fold)(key.reshape(-1)).reshape(key.shape) if key.ndim else fold(key)


def as_numbers(tree: Tree) -> Tree:
    """The tree with the numbers of its random keys in their place, which files can hold; abstract trees too."""
    data = lambda key: jax.eval_shape(jax.random.key_data, key) if _is_abstract(key) else jax.random.key_data(key)
    return jax.tree.map(lambda leaf: data(leaf) if _is_key(leaf) else leaf, tree)


def from_numbers(tree: Tree, like: Tree) -> Tree:
    """The way back: `like` has keys, of JAX's default kind, where these numbers are some."""
    wrap = lambda numbers, leaf: jax.random.wrap_key_data(jnp.asarray(numbers)) if _is_key(leaf) else numbers
    return jax.tree.map(wrap, tree, like)


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
