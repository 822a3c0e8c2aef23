"""Which matrix products a compiled program holds, read from its text and the name scopes of the quantized layers."""

import dataclasses
import math
import re
from collections.abc import Collection
from typing import Literal

_PRODUCTS = {"dot", "convolution", "ragged-dot", "scaled-dot"}
_LIBRARY_CALL = re.compile(r'custom_call_target="([^"]*(?:gemm|matmul|conv|dot)[^"]*)"', re.IGNORECASE)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\(([^)]*)\)(.*)$")
_TYPE = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True, slots=True)
class RanProduct:
    """One product of the program. backward: it belongs to the transposed (gradient) part. result, operands: HLO types.

    tag: the layer's, or "" where it is no layer's, or XLA rewrote the product and dropped its name (it does so with
    gradients of convolutions): then it is known by its size."""

    tag: str
    backward: bool
    operation: str
    result: str
    operands: tuple[str, ...]
    by_size: bool = False

    @property
    def words(self) -> str:
        words = f"{self.operation} {' x '.join(_dtype(o) for o in self.operands)} -> {_dtype(self.result)}"
        return f"{words} (known by its size)" if self.by_size else words

    @property
    def size(self) -> int:
        return elements(self.result)


def elements(kind: str) -> int:
    found = _TYPE.search(kind)
    return math.prod(int(n) for n in found[2].split(",") if n) if found else 0


def _dtype(kind: str) -> str:
    found = _TYPE.search(kind)
    return found[1] if found else "?"


def products_of(text: str) -> list[RanProduct]:
    """Products under the tag of a quantized layer, and those without a name; those that belong to a rotation are left
    out.

    Where XLA turned a product into something else (a sum over one row, say) its fusion is reported in its place."""
    found, rewritten = _instructions(text)
    found, rewritten = ([i for i in some if i.tag or not i.scope] for some in (found, rewritten))
    whole = {(i.tag, i.ran.backward) for i in found}
    return [i.ran for i in found] + [i.ran for i in rewritten if (i.tag, i.ran.backward) not in whole]


def other_products(text: str, tags: Collection[str]) -> list[RanProduct]:
    """Products that have a name, and belong neither to a layer of these tags nor to a rotation."""
    found, rewritten = ([i for i in some if i.scope and i.tag not in tags] for some in _instructions(text))
    whole = {(i.scope, i.frame) for i in found}
    once = {(i.scope, i.frame): i for i in rewritten if (i.scope, i.frame) not in whole}
    return [i.ran for i in [*found, *once.values()]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Instruction:
    """A product as it stands in the program. scope: its name; tag: of the layer in it; frame: of the stack."""

    scope: str
    tag: str
    frame: int
    ran: RanProduct


def _instructions(text: str) -> tuple[list[_Instruction], list[_Instruction]]:
    """The products outside of rotations, and what XLA made of others."""
    rotations = _frames_in(text, "rotation.py")
    types, found, rewritten = {}, [], []
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, kind, opcode, operands, rest = match.groups()
        types[name] = kind
        name_scope, frame = re.search(r'op_name="([^"]*)"', rest), _frame(rest)
        scope = name_scope[1] if name_scope else ""
        library = _LIBRARY_CALL.search(rest) if opcode == "custom-call" else None
        named = scope.rsplit("/", 1)[-1] in ("dot_general", "conv_general_dilated") and opcode in ("fusion", "reduce")
        whole = opcode in _PRODUCTS or library is not None
        if frame not in rotations and (whole or named):
            arguments = tuple(re.findall(r"%([\w.\-]+)", operands))
            some = found if whole else rewritten
            some.append((scope, frame, library[1] if library else opcode, kind, arguments))
    return [_read(entry, types) for entry in found], [_read(entry, types) for entry in rewritten]


def _read(entry: tuple, types: dict[str, str]) -> _Instruction:
    scope, frame, operation, kind, arguments = entry
    tag = next(reversed(re.findall(r"lowbit\[[^\]]*\]", scope)), "")
    operands = tuple(types.get(name, "?[]") for name in arguments[:2])
    backward = bool(tag) and "transpose(" in scope.partition(tag)[0]
    return _Instruction(scope, tag, frame, RanProduct(tag, backward, operation, kind, operands, by_size=not scope))


def _frame(rest: str) -> int:
    found = re.search(r"stack_frame_id=(\d+)", rest)
    return int(found[1]) if found else 0


def _frames_in(text: str, file: Literal["rotation.py"]) -> set[int]:
    """Stack frames that pass through this file of the library, by the tables at the head of the program."""
    files = {
        int(i) for i, name in re.findall(r'^(\d+) "([^"]*)"$', _section(text, "FileNames"), re.M) if _ours(name, file)
    }
    rows = re.findall(r"^(\d+) \{file_name_id=(\d+)", _section(text, "FileLocations"), re.M)
    locations = {int(i) for i, name in rows if int(name) in files}
    stack = re.findall(
        r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", _section(text, "StackFrames"), re.M
    )
    inside: set[int] = set()
    for frame, location, parent in ((int(i), int(at), int(up or 0)) for i, at, up in stack):
        # A frame names its parent by number plus one.
        if location in locations or parent - 1 in inside:
            inside.add(frame)
    return inside


def _ours(name: str, file: str) -> bool:
    return name.replace("\\", "/").endswith(f"lowbit_jax/{file}")


def _section(text: str, title: str) -> str:
    found = re.search(rf"^{title}\n((?:\d+ .*\n?)*)", text, re.M)
    return found[1] if found else ""


@dataclasses.dataclass(frozen=True, slots=True)
class Evidence:
    """What ran, by (tag, product). gradients: whether a gradient was compiled. others: products of the forward program
    that are none of these layers'."""

    out: dict[str, list[RanProduct]]
    grad_lhs: dict[str, list[RanProduct]]
    grad_rhs: dict[str, list[RanProduct]]
    gradients: bool = True
    others: list[RanProduct] = dataclasses.field(default_factory=list)


def evidence(forward: str, backward: str | None, sizes: dict[str, int]) -> Evidence:
    """The products of each layer in its compiled forward and gradient programs; `sizes`: elements of each weight, by
    tag.

    In the gradient program a product of the weight's size is grad_rhs, one of the activation's size grad_lhs; others
    are forward products computed again."""
    out: dict[str, list[RanProduct]] = {}
    grad_lhs: dict[str, list[RanProduct]] = {}
    grad_rhs: dict[str, list[RanProduct]] = {}
    ran = products_of(forward)
    for tag, size in sizes.items():
        of_weight = [r for r in ran if not r.tag and size in map(elements, r.operands)]
        out[tag] = [r for r in ran if r.tag == tag] or of_weight[:1]
    ran = products_of(backward) if backward is not None else []
    for tag, size in sizes.items():
        inputs = {elements(o) for r in out[tag] for o in r.operands} - {size}
        mine = [r for r in ran if r.tag == tag and r.backward]
        to_weight = [r for r in mine if r.size == size]
        to_input = [r for r in mine if r.size in inputs]
        if not inputs and len(to_weight) > 1:  # as many inputs as weights: either of the two
            to_weight, to_input = to_weight[:1], to_weight[1:]
        grad_rhs[tag] = to_weight or [r for r in ran if not r.tag and r.size == size][:1]
        grad_lhs[tag] = to_input or [r for r in ran if not r.tag and r.size in inputs][:1]
    return Evidence(out, grad_lhs, grad_rhs, backward is not None, other_products(forward, sizes.keys()))
