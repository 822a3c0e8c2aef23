"""Two-operand einsum as one `dot_general` and a transposition, so that the operands never change sides."""

from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from lowbit_jax.ops.dot_general import DimensionNumbers, check_operands, dot_general_of
from lowbit_jax.ops.recipe import LinearRecipe
from lowbit_jax.qtensor import QTensor


def parse(spec: str, lhs_ndim: int, rhs_ndim: int) -> tuple[DimensionNumbers, tuple[int, ...]]:
    """Dimension numbers of `spec`, and the permutation of `dot_general`'s output that `spec` asks for.

    Raises: ValueError for anything but two operands, an explicit output, one letter an axis and no repeated letter
    within a term; an ellipsis stands for leading axes of both operands or of one."""
    compact = spec.replace(" ", "")
    terms, arrow, out = compact.partition("->")
    operands = terms.split(",")
    if not arrow or len(operands) != 2:
        raise ValueError(f"lb.einsum({spec!r}): write two operands and the output, as in '...k,kn->...n'.")
    lhs, rhs = (_expand(term, ndim, spec) for term, ndim in zip(operands, (lhs_ndim, rhs_ndim), strict=True))
    out = out.replace("...", "".join(sorted({c for c in lhs + rhs if c.isdigit()})))
    for term in (lhs, rhs, out):
        if len(set(term)) != len(term):
            raise ValueError(
                f"lb.einsum({spec!r}): the letter that {term!r} repeats would need a diagonal. Take it first."
            )
    if set(out) - set(lhs + rhs) or (set(lhs) ^ set(rhs)) - set(out):
        raise ValueError(f"lb.einsum({spec!r}): each letter of one operand only must be in the output, and no other.")
    shared = [c for c in lhs if c in rhs]
    batch = [c for c in shared if c in out]
    contract = sorted((c for c in shared if c not in out), key=rhs.index)  # a packed weight is merged as it lies
    numbers = (
        (tuple(map(lhs.index, contract)), tuple(map(rhs.index, contract))),
        (tuple(map(lhs.index, batch)), tuple(map(rhs.index, batch))),
    )
    produced = batch + [c for c in lhs if c not in shared] + [c for c in rhs if c not in shared]
    return numbers, tuple(map(produced.index, out))


def _expand(term: str, ndim: int, spec: str) -> str:
    """The term with its ellipsis written as digits, aligned at the right as in NumPy."""
    named = term.replace("...", "")
    missing = ndim - len(named)
    if missing < 0 or ("..." not in term and missing):
        raise ValueError(f"lb.einsum({spec!r}): the term {term!r} names {len(named)} axes of an array with {ndim}.")
    return term.replace("...", "".join(str(9 - i) for i in reversed(range(missing))))


def _contracted(spec: str) -> int:
    """Letters that both terms share and the output lacks."""
    terms, _, out = spec.replace(" ", "").partition("->")
    lhs, _, rhs = terms.partition(",")
    return len({c for c in lhs if c.isalpha()} & set(rhs) - set(out))


def _permuted(sharding: Any, permutation: tuple[int, ...]) -> Any:
    """The sharding of the product before its axes are permuted into those that `sharding` is of."""
    if sharding is None or permutation == tuple(range(len(permutation))):
        return sharding
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    cuts = (*spec, *[None] * (len(permutation) - len(spec)))
    before = spec.update(partitions=tuple(cuts[permutation.index(axis)] for axis in range(len(permutation))))
    return NamedSharding(sharding.mesh, before) if isinstance(sharding, NamedSharding) else before


def einsum(
    spec: str,
    lhs: Float[Array, "*lhs"],
    rhs: Float[Array, "*rhs"] | QTensor,
    *,
    recipe: LinearRecipe,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    key: Array | None = None,
    scales: Any = None,
) -> Float[Array, "*out"]:
    """`jnp.einsum(spec, lhs, rhs)` through `lb.dot_general`; `lhs` is the activation and `rhs` the weight.

    `out_sharding` is of the axes as `spec` writes them. Axes of length 1 are not repeated. Raises: TypeError and
    ValueError as `lb.dot_general`, ValueError as `parse`."""
    check_operands("lb.einsum", lhs, rhs, key)
    merged = max(_contracted(spec) - 1, 0) if isinstance(rhs, QTensor) else 0  # a packed weight has one axis for them
    numbers, permutation = parse(spec, lhs.ndim, rhs.ndim + merged)
    options = (precision, preferred_element_type, _permuted(out_sharding, permutation), recipe, key, scales)
    out = dot_general_of("lb.einsum", lhs, rhs, numbers, *options)
    return jnp.transpose(out, permutation)
