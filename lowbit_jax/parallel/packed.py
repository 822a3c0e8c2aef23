"""Where the arrays inside a `QTensor` lie: packed codes and block scales follow the array that they stand for."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lowbit_jax.qtensor import NO_SEAL, QTensor


def qtensor_specs(packed: QTensor, spec: PartitionSpec, mesh: Mesh, path: str = "") -> list[PartitionSpec]:
    """A spec for each array of `packed` (its leaves in order), when the array it stands for is cut by `spec`.

    Raises: ValueError when a cut of the contraction axis would split a byte or a tile between devices."""
    cuts = list(spec) + [None] * (packed.ndim - len(spec))
    contract = packed.ndim + packed.axis
    _check_whole(packed, cuts, contract, mesh, path)
    rows = [cut for axis, cut in enumerate(cuts) if axis != contract]
    words = PartitionSpec(*rows, cuts[contract])
    view, inside = _tiles(packed)
    on_tiles = _cuts_of_view(packed.shape, view, inside, cuts)
    scales = [_scale_spec(scale.shape, view, on_tiles) for scale in packed.scales]
    seal = [] if packed.seal is NO_SEAL else [PartitionSpec()]
    zeros = [] if packed.zeros is None else [_scale_spec(packed.zeros.shape, view, on_tiles)]
    return [words, *scales, *([] if packed.marks is None else [words]), *zeros, *seal]


def axis_of_view(packed: QTensor, axis: int) -> int | None:
    """Where the scales run along `axis` of the array, between tiles; None where it lies inside a tile."""
    view, inside = _tiles(packed)
    marked = _cuts_of_view(packed.shape, view, inside, ["here" if a == axis else None for a in range(packed.ndim)])
    return marked.index("here") if "here" in marked else None


def _tiles(packed: QTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of the view that the tiling makes of the array, and its axes inside a tile."""
    inside: list[int] = []

    def split(x: jax.Array) -> jax.Array:
        tiles, axes = packed.quantizer.tiling.split(x, packed.axis)
        inside.extend(a % tiles.ndim for a in axes)
        return tiles

    view = jax.eval_shape(split, jax.ShapeDtypeStruct(packed.shape, jnp.float32))
    return tuple(view.shape), tuple(inside)


def _cuts_of_view(shape: tuple[int, ...], view: tuple[int, ...], inside: tuple[int, ...], cuts: list) -> list:
    """The cuts of each axis of the view: an axis in tiles is cut between them, an axis inside a tile is one scale."""
    answer, at, extra = [], 0, len(view) - len(shape)
    for length, cut in zip(shape, cuts, strict=True):
        in_tiles = extra and at not in inside and at + 1 in inside and view[at] * view[at + 1] == length
        answer += [cut, None] if in_tiles else [None if at in inside else cut]
        at, extra = at + (2 if in_tiles else 1), extra - bool(in_tiles)
    return answer


def _scale_spec(shape: tuple[int, ...], view: tuple[int, ...], cuts: list) -> PartitionSpec:
    """A scale of the view's rank has one entry a tile; one of fewer axes is the tensor's, or that of stacked layers."""
    if len(shape) == len(view):
        return PartitionSpec(*[cut if n == whole else None for n, whole, cut in zip(shape, view, cuts, strict=True)])
    return PartitionSpec(*cuts[: len(shape)])


def _check_whole(packed: QTensor, cuts: list, contract: int, mesh: Mesh, path: str) -> None:
    cut = cuts[contract]
    names = () if cut is None else (cut,) if isinstance(cut, str) else cut
    count = math.prod(mesh.shape[name] for name in names)
    if count == 1:
        return
    q = packed.quantizer
    group = 1 if q.sparsity is None else q.sparsity.group
    unit: Any = math.lcm(8 // math.gcd(8, q.format.bits), group, getattr(q.tiling, "size", 1))
    if packed.length % (count * unit) or (q.sparsity is not None and packed.length % (count * 8 * q.sparsity.run)):
        raise ValueError(
            f"The packed leaf {path!r}: its contraction axis of {packed.length} cannot be cut into {count} parts of"
            f" whole bytes and tiles ({unit} elements of {q.format.name} together). Cut another axis, or use a mesh"
            f" whose {'+'.join(names)} divides {packed.length // unit}."
        )
