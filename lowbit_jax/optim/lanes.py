"""How one array of an optimizer's state goes through a loop over rows: opened as rows, read and written a few rows at a
time, closed again.

A lane belongs to one field of one leaf. `open` answers arrays with the rows along their first axis, which the loop
carries; `read` makes float32 rows of some of them; `write` the reverse.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lowbit_jax.optim.state_codecs import Blockwise, Companded, RankOne, Stored


class Lane(Protocol):
    def open(self, leaf: Any) -> list[Array]: ...

    def read(self, parts: list[Array], start: Any) -> Float[Array, "rows length"]: ...

    def write(self, x: Float[Array, "rows length"], start: Any) -> list[Array]: ...

    def close(self, leaf: Any, parts: list[Array]) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Plain:
    """An array that is not stored in few bits, in rows of `length`."""

    length: int
    dtype: Any

    def open(self, leaf: Array) -> list[Array]:
        return [leaf.reshape(-1, self.length)]

    def read(self, parts: list[Array], start: Any) -> Array:
        return parts[0]

    def write(self, x: Array, start: Any) -> list[Array]:
        return [x.astype(self.dtype)]

    def close(self, leaf: Array, parts: list[Array]) -> Array:
        return parts[0].reshape(leaf.shape)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """An array stored in blocks that lie within rows of `length`."""

    codec: Blockwise | Companded
    length: int

    def open(self, leaf: Stored) -> list[Array]:
        rows = leaf.size // self.length
        return [p.reshape((rows, -1, 1) if p.shape[-1] == 1 else (rows, -1)) for p in jax.tree.leaves(leaf.parts)]

    def read(self, parts: list[Array], start: Any) -> Array:
        shape = (parts[0].shape[0] * self.length // self.codec.block, self.codec.block)
        like = jax.eval_shape(self.codec.encode, jax.ShapeDtypeStruct(shape, jnp.float32))
        leaves, tree = jax.tree.flatten(like)
        blocks = [p.reshape(s.shape) for p, s in zip(parts, leaves, strict=True)]
        return self.codec.decode(tree.unflatten(blocks), shape).reshape(-1, self.length)

    def write(self, x: Array, start: Any) -> list[Array]:
        return self.open(Stored.of(x.reshape(-1, self.codec.block), self.codec))

    def close(self, leaf: Stored, parts: list[Array]) -> Stored:
        leaves, tree = jax.tree.flatten(leaf.parts)
        return dataclasses.replace(
            leaf, parts=tree.unflatten([p.reshape(o.shape) for p, o in zip(parts, leaves, strict=True)])
        )


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Matrices stored by the maxima of their rows and columns. The loop reads `columns`, those of before; it writes by
    `new_rows` and `new_columns`, which a loop before it has gathered (`gather`)."""

    codec: RankOne
    matrix: tuple[int, int]
    columns: Float[Array, "matrices 1 length"]
    new_rows: Float[Array, "rows 1"] | None = None
    new_columns: Float[Array, "matrices 1 length"] | None = None

    @classmethod
    def of(cls, leaf: Stored) -> "Ranked":
        assert isinstance(leaf.codec, RankOne)
        rows, length = leaf.shape[-2:]
        return cls(leaf.codec, (rows, length), leaf.parts.scales[1].reshape(-1, 1, length))

    def open(self, leaf: Stored) -> list[Array]:
        rows = leaf.size // self.matrix[1]
        return [leaf.parts.words.reshape(rows, -1), leaf.parts.scales[0].reshape(rows, 1)]

    def _at(self, columns: Array, start: Any) -> Array:
        return lax.dynamic_index_in_dim(columns, start // self.matrix[0], keepdims=False)

    def read(self, parts: list[Array], start: Any) -> Array:
        like = jax.eval_shape(self.codec.encode_scaled, jax.ShapeDtypeStruct((1, self.matrix[1]), jnp.float32),
                              *2 * [jax.ShapeDtypeStruct((1, 1), jnp.float32)])  # fmt: skip
        scales = parts[1], self._at(self.columns, start)
        return self.codec.decode_scaled(dataclasses.replace(like, words=parts[0], scales=scales))

    def start(self) -> list[Array]:
        """Empty maxima, for `gather` to fill."""
        return [jnp.zeros((self.columns.shape[0] * self.matrix[0], 1)), jnp.zeros_like(self.columns)]

    def gather(self, maxima: list[Array], x: Array, start: Any) -> list[Array]:
        rows, columns = self.codec.scales_of(x, -1), self.codec.scales_of(x, -2)
        columns = jnp.maximum(self._at(maxima[1], start), columns)
        return [
            lax.dynamic_update_slice_in_dim(maxima[0], rows, start, 0),
            lax.dynamic_update_index_in_dim(maxima[1], columns, start // self.matrix[0], 0),
        ]

    def write(self, x: Array, start: Any) -> list[Array]:
        assert self.new_rows is not None and self.new_columns is not None
        rows = lax.dynamic_slice_in_dim(self.new_rows, start, x.shape[0], 0)
        return [self.codec.encode_scaled(x, rows, self._at(self.new_columns, start)).words, rows]

    def close(self, leaf: Stored, parts: list[Array]) -> Stored:
        assert self.new_columns is not None
        old = leaf.parts
        scales = parts[1].reshape(old.scales[0].shape), self.new_columns.reshape(old.scales[1].shape)
        return dataclasses.replace(
            leaf, parts=dataclasses.replace(old, words=parts[0].reshape(old.words.shape), scales=scales)
        )


def row_length(stored: list[Stored]) -> int:
    """Elements of a row that all these arrays, of one leaf, can be cut into; 0 where there is none.

    The last axis where one is ranked; else the smallest run that is whole blocks of every codec."""
    codecs = [s.codec for s in stored]
    if not stored or not all(isinstance(c, Blockwise | Companded | RankOne) for c in codecs):
        return 0
    shape = stored[0].shape
    ranked = [c for c in codecs if isinstance(c, RankOne) and c.is_ranked(shape)]
    blocks = math.lcm(8, *(c.block for c in codecs if c not in ranked))  # pyright: ignore[reportAttributeAccessIssue]
    length = shape[-1] if ranked else blocks
    return 0 if math.prod(shape) % length or length % blocks else length


def lane_of(leaf: Any, length: int) -> Lane:
    if not isinstance(leaf, Stored):
        return Plain(length, leaf.dtype)
    if isinstance(leaf.codec, RankOne):
        if leaf.codec.is_ranked(leaf.shape):
            return Ranked.of(leaf)
        return Blocks(Blockwise(leaf.codec.format, leaf.codec.block), length)
    assert isinstance(leaf.codec, Blockwise | Companded)
    return Blocks(leaf.codec, length)
