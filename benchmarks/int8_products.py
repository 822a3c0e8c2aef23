"""What int8 products bring on this machine: their time over XLA's float32 ones, at sizes of layers and of short sums.

    python -m benchmarks.int8_products          # the table in benchmarks/results/int8_products_<backend>.md

`lowbit_jax/ops/int8.py` takes int8 where `int8.multiplies` says so; a row whose ratio is above 1 speaks against it.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

import lowbit_jax as lb
from benchmarks.report import write
from benchmarks.timing import Call, environment, interleaved_seconds
from lowbit_jax.ops import int8

FORMATS = (lb.formats.INT8, lb.formats.INT8)
NUMBERS = (((1,), (0,)), ((), ()))
SIZES = ((2048, 512, 2048), (2048, 2048, 512), (512, 512, 512), (64, 2048, 2048), (1, 2048, 2048), (2048, 64, 512),
         (2048, 16, 512), (2048, 512, 2))  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    rounds: int = 15
    output: pathlib.Path = pathlib.Path("benchmarks/results")


def measure(config: Config) -> list[dict]:
    """One row a size: rows x terms of a sum x columns."""
    found = []
    for m, k, n in SIZES:
        a, b = (
            jax.random.randint(jax.random.key(i), shape, -127, 128, jnp.int8) for i, shape in ((0, (m, k)), (1, (k, n)))
        )
        narrow = lambda a, b: int8.product(a, b, FORMATS, NUMBERS, None)
        calls = {"int8": Call.of(narrow, a, b)}
        for dtype in (jnp.float32, jnp.bfloat16):
            calls[jnp.dtype(dtype).name] = Call.of(lambda a, b: lax.dot(a, b), a.astype(dtype), b.astype(dtype))
        each = {name: np.asarray(s) for name, s in interleaved_seconds(calls, config.rounds, steps=5).items()}
        found.append({
            "size": f"{m} x {k} x {n}",
            **{f"{name}_ms": 1e3 * float(np.median(s)) for name, s in each.items()},
            "int8_over_float32": float(np.median(each["int8"] / each["float32"])),
            "taken": int8.multiplies((m, k), (k, n), FORMATS, NUMBERS),
        })  # fmt: skip
        print(markdown_row(found[-1]), flush=True)
    return found


COLUMNS = ("size", "float32_ms", "bfloat16_ms", "int8_ms", "int8_over_float32", "taken")


def markdown_row(row: dict) -> str:
    cell = lambda v: ("yes" if v else "no") if isinstance(v, bool) else f"{v:.3f}" if isinstance(v, float) else v
    return "| " + " | ".join(cell(row[name]) for name in COLUMNS) + " |"


def main(config: Config) -> None:
    """Measures and writes the JSON file and the table."""
    report = {"environment": environment(), "rows": measure(config)}
    told = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    head = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|\n"
    text = f"# int8 products by XLA\n\nMade by `python -m benchmarks.int8_products`. {told}.\n\n{head}"
    write(config.output, "int8_products", report, text + "\n".join(map(markdown_row, report["rows"])) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
