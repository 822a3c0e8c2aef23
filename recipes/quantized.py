"""What a run quantized: the whole table in a file, and one line to print."""

import pathlib
from typing import Any

import lowbit_jax as lb


def write(path: pathlib.Path, model: Any, method: str, *, stacked: int = 1) -> str:
    """Writes `lb.explain(model)`; answers with the line: how many layers, by which method, bits a weight (scales
    included), what stays in high precision. stacked: how many of each layer of the blocks a scan holds."""
    table = lb.explain(model)
    path.write_text(f"{table}\n")
    bits: dict[tuple[str, int], list[float]] = {}
    for row in table.rows:
        if (row.product, row.operand) == ("out", "weight"):
            times = stacked if row.layer.startswith("blocks/") else 1
            bits.setdefault((row.format, times), []).append(row.bits or 0.0)
    layers = ", ".join(_told(name, times, found) for (name, times), found in bits.items())
    high = ", ".join(name.partition(" ")[0] for name in table.high_precision) or "nothing else"
    return f"quantized by {method}: {layers}; in high precision: {high} ({path.name})"


def _told(name: str, times: int, bits: list[float]) -> str:
    count = f"{len(bits)} layer{'s' * (len(bits) != 1)}" + (f" x {times}" if times > 1 else "")
    return f"{count} in {name} ({_range(bits)} bits a weight)"


def _range(values: list[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
