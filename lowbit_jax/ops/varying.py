"""Operands of one product inside `jax.shard_map`, made to vary over the same mesh axes.

`shard_map` tracks over which manual axes a value varies, and the cotangents of a custom_vjp must vary exactly as its
operands do. A replicated weight that meets a sharded activation is therefore marked as varying before the product; the
transpose of that mark is the sum over the axis that its gradient needs, as for `lax.dot_general`.
"""

from typing import Any

import jax
from jax import lax


def vary_alike(*operands: Any) -> Any:
    """The operands (arrays, pytrees of arrays or None), each varying over every manual axis that one of them does.

    Outside `shard_map`, and with `check_vma=False`, they come back as they are."""
    axes = frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(operands)))
    if not axes:
        return operands
    return jax.tree.map(lambda leaf: _marked(leaf, axes), operands)


def _axes(leaf: Any) -> frozenset:
    kind = getattr(jax.typeof(leaf), "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying


def _marked(leaf: Any, axes: frozenset) -> Any:
    missing = tuple(sorted(axes - _axes(leaf), key=str))
    return lax.pcast(leaf, missing, to="varying") if missing else leaf
