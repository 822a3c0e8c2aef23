"""What a run quantized: the whole table in a file, and one line to print."""

import pathlib
from typing import Any

import lowbit_jax as lb


def write(path: pathlib.Path, model: Any, method: str, *, stacked: int = 1) -> str:
    """Writes `lb.explain(model)`; answers with the line: how many layers, by which method, bits a weight (scales
    included), what stays in high precision. stacked: how many of each layer a scan over blocks holds."""
    table = lb.explain(model)
    path.write_text(f"{table}\n")
    bits: dict[str, list[float]] = {}
    for row in table.rows:
        if (row.product, row.operand) == ("out", "weight"):
            bits.setdefault(row.format, []).append(row.bits or 0.0)
    times = f" x {stacked}" if stacked > 1 else ""
    layers = ", ".join(
        f"{len(found)} layers{times} in {name} ({_range(found)} bits a weight)" for name, found in bits.items()
    )
    high = ", ".join(name.partition(" ")[0] for name in table.high_precision) or "nothing else"
    return f"quantized by {method}: {layers}; in high precision: {high} ({path.name})"


def _range(values: list[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
