"""A quantized table of vectors: its rows by their ids, and products with all of it, where a head shares it.

The table [ids, features] is quantized along the features, which the head's product sums over, so that both uses see the
same values. A row is unpacked, or rounded, only where it is looked up, if no scale lies across rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lowbit_jax.nn.site import Site, naming, operand
from lowbit_jax.ops import LinearRecipe, dot_general
from lowbit_jax.qtensor import NO_SEAL, QTensor
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import Group, PerRow, PerTensor, TwoLevel


def table_site(path: str, ids: int, features: int) -> Site:
    return Site(path, "embedding", (ids, features), (1,))


def check_recipe(recipe: LinearRecipe, where: str) -> None:
    """Raises: NotImplementedError for what a table has no place for: learned scales and random keys."""
    problem = "learns its scales" if recipe.learned else "rounds or rotates at random" if recipe.needs_key else None
    if problem:
        raise NotImplementedError(
            f"{where}: this recipe {problem}, which embeddings do not keep. Give it another by a rule, such as"
            " lb.methods.get('absmax_integer', bits=8, activations=False)."
        )


def lookup(
    table: Float[Array, "ids features"] | QTensor, ids: Int[Array, "*batch"], recipe: LinearRecipe, site: Site,
    dtype: Any,
) -> Float[Array, "*batch features"]:  # fmt: skip
    """The rows of the quantized table; NaN for ids that it has not, as `jnp.take` answers."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"the embedding {site.path!r} got ids of {ids.dtype}; they are integers.")
    count = site.shape[0]
    ids = jnp.zeros(ids.shape, jnp.int32) if count == 1 else _signed(ids, count)  # one row for all ids, as Flax has it
    with jax.named_scope(site.tag), naming(site.path):
        if isinstance(table, QTensor):
            table.check_layout()
            table.check_meaning(f"the embedding {site.path!r}")
            rows = _packed_rows(table, ids) if _apart(table.quantizer) else jnp.take(table.dequantize(dtype), ids, 0)
            missing = (ids < -count) | (ids >= count)
            return jnp.where(missing[..., None], jnp.nan, rows).astype(dtype)
        if recipe.out.rhs is None:
            return jnp.take(table, ids, axis=0).astype(dtype)
        quantizer = operand(recipe, "rhs")
        if isinstance(quantizer.tiling, PerRow | Group) and not isinstance(quantizer.scale_format, TwoLevel):
            return quantizer(jnp.take(table, ids, axis=0)).astype(dtype)
        return jnp.take(quantizer(table), ids, axis=0).astype(dtype)


def _signed(ids: Int[Array, "*batch"], count: int) -> Int[Array, "*batch"]:
    """Ids of 32 bits or more, which hold -count and count; those beyond the table stay beyond it."""
    if jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        ids = jnp.minimum(ids, min(count, jnp.iinfo(ids.dtype).max))
    return ids if ids.dtype == jnp.int64 else ids.astype(jnp.int32)


def attend(
    query: Float[Array, "*batch features"], table: Float[Array, "ids features"] | QTensor, recipe: LinearRecipe,
    site: Site, **options: Any,
) -> Float[Array, "*batch ids"]:  # fmt: skip
    """query . table^T by the recipe."""
    with jax.named_scope(site.tag), naming(site.path):
        return dot_general(query, table, (((query.ndim - 1,), (1,)), ((), ())), recipe=recipe, **options)


def _apart(quantizer: Quantizer) -> bool:
    """Whether rows can be taken out of the packed table."""
    return isinstance(quantizer.tiling, PerRow | Group | PerTensor)


def _packed_rows(table: QTensor, ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
    """The rows, unpacked alone."""
    count = table.shape[0]

    def take(leaf: Array) -> Array:
        if leaf.ndim == 0:  # the scale of a table, beside those of its tiles
            return leaf
        if leaf.shape[0] != count:
            return leaf.reshape((1,) * ids.ndim + leaf.shape[1:])
        return jnp.take(leaf, ids, axis=0, mode="wrap")

    words, scales, marks, zeros = jax.tree.map(take, (table.words, table.scales, table.marks, table.zeros))
    rows = dataclasses.replace(table, words=words, scales=scales, marks=marks, zeros=zeros, seal=NO_SEAL)
    return rows.dequantize(jnp.float32)
