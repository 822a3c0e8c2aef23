"""Bytes on the wire, counted in the compiled program: what each device sends in one run of it.

An all-gather, a reduce-scatter and an all-to-all among n devices send (n - 1) / n of the whole array from each of them,
an all-reduce twice that (its two halves), a permutation all of its operand. A collective inside a loop counts once for
each turn, where the compiler knows their number.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all",
          "collective-broadcast")  # fmt: skip
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+[0-9]+[a-z0-9]*)\[([\d,]*)\]")
_BITS = {"pred": 8}


@dataclasses.dataclass(frozen=True, slots=True)
class Collective:
    """One collective of the program. array_bytes: of the whole array among its `devices`. sent: by each, in one run."""

    kind: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    devices: int
    times: int
    array_bytes: float
    sent: float
    source: str


@dataclasses.dataclass(frozen=True, slots=True)
class Wire:
    """The collectives of a program; `sent` in all, `by_kind`, and `str()` as a table."""

    collectives: tuple[Collective, ...]

    @property
    def sent(self) -> float:
        return sum(c.sent for c in self.collectives)

    def of(self, kind: str | None = None, dtypes: Sequence[str] | None = None) -> "Wire":
        """Those of one kind, or of some HLO dtypes ("u8", "bf16", "f32")."""
        chosen = (c for c in self.collectives if kind is None or c.kind == kind)
        return Wire(tuple(c for c in chosen if dtypes is None or set(c.dtypes) <= set(dtypes)))

    def by_kind(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for c in self.collectives:
            totals[c.kind] = totals.get(c.kind, 0) + c.sent
        return totals

    def __str__(self) -> str:
        rows = [("collective", "array", "devices", "times", "bytes sent a device")]
        for c in self.collectives:
            arrays = ", ".join(f"{d}{list(s)}" for d, s in zip(c.dtypes, c.shapes, strict=True))
            short = arrays if len(arrays) <= 60 else f"{arrays[:57]}..."
            rows.append((c.kind, short, str(c.devices), str(c.times), f"{c.sent:,.0f}"))
        rows.append(("all", "", "", "", f"{self.sent:,.0f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def bytes_on_the_wire(compiled: Any) -> Wire:
    """Collectives of a compiled program: `jax.jit(f).lower(...).compile()`, or its text.

    Collectives among one device send nothing and are left out. Raises: TypeError for what is not compiled."""
    text = compiled if isinstance(compiled, str) else getattr(compiled, "as_text", lambda: None)()
    if not isinstance(text, str) or "HloModule" not in text:
        raise TypeError(
            f"bytes_on_the_wire got {type(compiled).__name__}, which is not a compiled program. Pass"
            " jax.jit(f).lower(*args).compile()."
        )
    bodies = _computations(text)
    partitions = [int(n) for n in re.findall(r"num_partitions=(\d+)|replica_count=(\d+)", text) for n in n if n]
    times = _times(bodies)
    found = []
    for name, lines in bodies.items():
        types = {m[1]: m[2] for m in map(_INSTRUCTION.match, lines) if m}
        for line in lines:
            match = _INSTRUCTION.match(line)
            if match and (kind := match[3].removesuffix("-start")) in _KINDS and times.get(name, 0):
                found.append(_collective(kind, match, types, max([1, *partitions]), times[name]))
    return Wire(tuple(c for c in found if c.devices > 1))


def _collective(kind: str, match: re.Match, types: dict[str, str], everyone: int, times: int) -> Collective:
    arguments, _, rest = match[4].partition(")")
    operands = [a for name in re.findall(r"%([\w.\-]+)", arguments) for a in _ARRAY.findall(types.get(name, ""))]
    if not operands:  # older text has the types of the operands in the call
        operands = _ARRAY.findall(arguments)
    results = _ARRAY.findall(match[2])
    if match[3].endswith("-start") and kind != "all-reduce":
        results = results[len(operands) : 2 * len(operands)] or results
    devices = _group_size(rest, everyone)
    read, made = _bytes(operands), _bytes(results)
    whole = {"all-gather": made, "reduce-scatter": read, "collective-permute": read}.get(kind, read)
    share = {"all-reduce": 2 * (devices - 1) / devices, "collective-permute": 1.0}.get(kind, (devices - 1) / devices)
    if kind == "collective-permute":
        devices = 2
    shown = results if kind == "all-gather" else operands
    source = re.search(r'op_name="([^"]*)"', rest)
    return Collective(
        kind,
        tuple(d for d, _ in shown),
        tuple(tuple(int(n) for n in s.split(",") if n) for _, s in shown),
        devices,
        times,
        whole,
        whole * share * times,
        source[1] if source else "",
    )


def _bytes(arrays: list[tuple[str, str]]) -> float:
    return sum(math.prod(int(n) for n in shape.split(",") if n) * _bits(kind) / 8 for kind, shape in arrays)


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    if kind.startswith("f8"):
        return 8
    found = re.match(r"[a-z]+(\d+)", kind)
    assert found is not None, kind
    return int(found[1])


def _group_size(rest: str, everyone: int) -> int:
    """Devices of one group, in each of the forms that HLO writes."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']*)'", found[2]))
    return everyone


def _computations(text: str) -> dict[str, list[str]]:
    """Lines of each computation; the entry under "ENTRY"."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
        if head and not line.startswith(" "):
            current = bodies.setdefault("ENTRY" if head[1] else head[2], [])
        else:
            current.append(line)
    return bodies


def _times(bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in one run of the program."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for line in bodies[name]:
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            inside = int(turns[1]) if turns and " while(" in line else 1
            for called in set(re.findall(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?"
                                         r"([\w.\-]+)", line)) | _listed(line):  # fmt: skip
                if called in bodies:
                    visit(called, count * inside)

    visit("ENTRY", 1)
    return times


def _listed(line: str) -> set[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", line)
    return set(re.findall(r"%?([\w.\-]+)", found[1])) if found else set()
