"""Which axis of which array is cut over which axis of the mesh: ordered rules over the paths of leaves.

A rule is `(pattern, cuts)`. The pattern is a regular expression for the end of a leaf's path, from a "/" on
("mlp/down/kernel" names "params/blocks/mlp/down/kernel" too); `cuts` has one entry for each of the leaf's *last* axes:
None, an axis of the mesh, a tuple of them (the first is the slowest), or a logical name that `logical` translates. Axes
before those, as of layers stacked for a scan, stay whole. The first rule that names a leaf decides; leaves that no rule
names are kept whole on every device.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowbit_jax.parallel.packed import qtensor_specs
from lowbit_jax.qtensor import QTensor

Cut = None | str | tuple[str, ...]
Tree = Any


@dataclasses.dataclass(frozen=True, slots=True)
class Rules:
    """Checked rules; hashable. `logical`: (name, axis or axes of the mesh, or None) triples of the names in use.

    Raises: TypeError for what is not a rule, ValueError for a pattern that is no regular expression."""

    rules: tuple[tuple[str, tuple[Cut, ...]], ...]
    logical: tuple[tuple[str, Cut], ...] = ()

    def __post_init__(self):
        for rule in self.rules:
            if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str)) or isinstance(
                rule[1], str | None
            ):
                raise TypeError(
                    f"Rules: {rule!r} is not (pattern, cuts), as in ('mlp/down/kernel', ('tensor', 'fsdp'))."
                )
            try:
                re.compile(rule[0])
            except re.error as error:
                raise ValueError(f"Rules: the pattern {rule[0]!r} is not a regular expression ({error}).") from error

    @classmethod
    def of(cls, *rules: tuple[str, Any], logical: Mapping[str, Any] | None = None) -> "Rules":
        """`Rules.of(("mlp/up/kernel", (None, "hidden")), logical={"hidden": "tensor"})`."""
        fixed = tuple((pattern, tuple(map(_fixed, cuts))) for pattern, cuts in rules)
        return cls(fixed, tuple((name, _fixed(cut)) for name, cut in (logical or {}).items()))

    def spec(self, path: str, ndim: int, mesh: Mesh) -> PartitionSpec | None:
        """The cuts of the leaf at `path`; None when no rule names it.

        Raises: ValueError for a name that is neither logical nor an axis of the mesh, an axis used twice, and more cuts
        than the leaf has axes."""
        index = self._deciding(path)
        if index is None:
            return None
        pattern, cuts = self.rules[index]
        if len(cuts) > ndim:
            raise ValueError(f"The rule {pattern!r} cuts {len(cuts)} axes, and the leaf {path!r} has {ndim}.")
        spec = [self._axes(cut, pattern, mesh) for cut in cuts]
        used = [name for cut in spec for name in _names(cut)]
        if len(set(used)) != len(used):
            raise ValueError(f"The rule {pattern!r} uses an axis of the mesh twice: {cuts}. Cut one axis by it.")
        return PartitionSpec(*[None] * (ndim - len(cuts)), *spec)

    def _deciding(self, path: str) -> int | None:
        for index, (pattern, _) in enumerate(self.rules):
            if re.fullmatch(f"(?:.*/)?(?:{pattern})", path):
                return index
        return None

    def _axes(self, cut: Cut, pattern: str, mesh: Mesh) -> Cut:
        translated: list[str] = []
        for name in _names(cut):
            for axis in _names(dict(self.logical).get(name, name)):
                if axis not in mesh.shape:
                    known = [*mesh.shape, *dict(self.logical)]
                    near = difflib.get_close_matches(axis, known, n=1, cutoff=0.5)
                    hint = f" Did you mean {near[0]!r}?" if near else ""
                    raise ValueError(f"The rule {pattern!r} names the axis {axis!r}; there are {known}.{hint}")
                translated.append(axis)
        return tuple(translated) if len(translated) > 1 else translated[0] if translated else None


def shardings(tree: Tree, mesh: Mesh, rules: Rules, *, unused: str = "raise") -> Tree:
    """A `NamedSharding` for each leaf of `tree` (arrays or their shapes); a `QTensor` gets one for each of its arrays.

    The codes and block scales of a QTensor are cut with the array that they stand for.
    Raises: ValueError for a rule that names no leaf (`unused="ignore"` allows it), an axis that the mesh does not
    divide, and whatever `Rules.spec` and `qtensor_specs` raise."""
    if unused not in ("raise", "ignore"):
        raise ValueError(f"shardings(unused={unused!r}): pass 'raise' or 'ignore'.")
    leaves, structure = jax.tree.flatten_with_path(tree, is_leaf=_is_qtensor)
    named = [(leaf_path(path), leaf) for path, leaf in leaves]
    deciding = {rules._deciding(path) for path, _ in named}
    idle = [pattern for index, (pattern, _) in enumerate(rules.rules) if index not in deciding]
    if idle and unused == "raise":
        paths = [path for path, leaf in named if len(getattr(leaf, "shape", ())) > 1]
        near = difflib.get_close_matches(idle[0], paths, n=3, cutoff=0.3) or paths[:3]
        raise ValueError(
            f"The rules {idle} name no leaf of this tree, or only leaves that an earlier rule names. Some of its"
            f" leaves: {near}. Correct or drop the rules, or pass unused='ignore'."
        )
    return structure.unflatten([_leaf_shardings(path, leaf, mesh, rules) for path, leaf in named])


def check_divides(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    """Raises ValueError naming the leaf, the axis, what is left over, and the sizes that would do."""
    for axis, cut in enumerate(spec):
        count = math.prod(mesh.shape[name] for name in _names(cut))
        if shape[axis] % count:
            legal = [n for n in range(1, min(shape[axis], 4 * count) + 1) if shape[axis] % n == 0]
            over = " x ".join(f"{name}={mesh.shape[name]}" for name in _names(cut))
            raise ValueError(
                f"The leaf {path!r} has shape {tuple(shape)}; its axis {axis} of length {shape[axis]} cannot be cut"
                f" into {count} parts ({over}), {shape[axis] % count} are left over. Cuts that divide it: {legal[-8:]};"
                f" padding by {-shape[axis] % count} would do, or a rule that leaves this axis whole."
            )


def leaf_path(path: tuple) -> str:
    """The path of a leaf, its parts joined by "/"; the `value` that Flax's variables end in is left out."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value")


def table(tree: Tree, placed: Tree) -> str:
    """Path, shape, cuts and bytes on each device of every leaf, as text."""
    rows = []
    for (path, leaf), sharding in zip(jax.tree.flatten_with_path(tree)[0], jax.tree.leaves(placed), strict=True):
        local = math.prod(sharding.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize
        cuts = ", ".join("-" if cut is None else "+".join(_names(cut)) for cut in sharding.spec) or "whole"
        rows.append((leaf_path(path), "x".join(map(str, leaf.shape)) or "()", cuts, f"{local:,}"))
    head = ("leaf", "shape", "cut over", "bytes a device")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in [head, *rows])


def _leaf_shardings(path: str, leaf: Any, mesh: Mesh, rules: Rules) -> Any:
    spec = rules.spec(path, len(leaf.shape), mesh) or PartitionSpec()
    check_divides(path, tuple(leaf.shape), spec, mesh)
    if isinstance(leaf, QTensor):
        return _placed(leaf, qtensor_specs(leaf, spec, mesh, path), mesh)
    return NamedSharding(mesh, spec)


def _placed(leaf: QTensor, specs: list[PartitionSpec], mesh: Mesh) -> QTensor:
    """A QTensor with shardings in place of its arrays, so that it can be zipped with one of arrays."""
    structure = jax.tree.structure(leaf)
    return structure.unflatten([NamedSharding(mesh, spec) for spec in specs])


def _is_qtensor(node: Any) -> bool:
    return isinstance(node, QTensor)


def _names(cut: Cut) -> tuple[str, ...]:
    return () if cut is None else (cut,) if isinstance(cut, str) else tuple(cut)


def _fixed(cut: Any) -> Cut:
    return tuple(cut) if isinstance(cut, list | tuple) else cut
