"""What quantizing the weights once a step brings: gradients over microbatches with and without `lb.nn.prepare`, over
those of the float32 model.

    python -m benchmarks.microbatches           # the table in benchmarks/results/microbatches_<backend>.md
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import lowbit_jax as lb
from benchmarks.models import WORKLOADS
from benchmarks.report import write
from benchmarks.timing import Call, environment, interleaved_seconds, ratio

WORK = WORKLOADS["mlp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 512
    depth: int = 2
    microbatches: int = 4
    tokens: tuple[int, ...] = (256, 512, 2048)
    """Tokens a microbatch."""
    rounds: int = 12
    output: pathlib.Path = pathlib.Path("benchmarks/results")


def gradient(model: nnx.Module, prepare: Callable | None, config: Config, tokens: int) -> Call:
    """The compiled gradient of the mean loss, summed over microbatches one by one."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    batches = [
        x.reshape(config.microbatches, -1, *x.shape[1:]) for x in WORK.batch(tokens * config.microbatches, config.width)
    ]

    def whole(params: Any, *batches: Any) -> Any:
        def ready(params):
            model = nnx.merge(graph, params, rest)
            split = nnx.split(model if prepare is None else prepare(model), nnx.Param, ...)
            return split[1], (split[0], split[2])

        held, back, (held_graph, held_rest) = jax.vjp(ready, params, has_aux=True)
        loss = lambda held, batch: WORK.loss(nnx.merge(held_graph, held, held_rest), *batch)
        add = lambda total, batch: (jax.tree.map(jnp.add, total, jax.grad(loss)(held, batch)), None)
        return back(jax.lax.scan(add, jax.tree.map(jnp.zeros_like, held), tuple(batches))[0])

    return Call.of(whole, params, *batches)


def measure(config: Config) -> list[dict]:
    """One row a number of tokens: each kind's time over float32's, with quartiles."""
    kinds = {
        "float32": (lambda model: model, None),
        "each": (lambda model: lb.quantize(model, lb.quest(4)), None),
        "once": (lambda model: lb.quantize(model, lb.quest(4)), lb.nn.prepare),
    }
    rows = []
    for tokens in config.tokens:
        calls = {
            name: gradient(quantized(WORK.build(config.width, config.depth)), prepare, config, tokens)
            for name, (quantized, prepare) in kinds.items()
        }
        seconds = interleaved_seconds(calls, config.rounds)
        rows.append({
            "tokens": tokens,
            "float32_ms": 1e3 * float(np.median(seconds["float32"])),
            **{name: ratio(seconds[name], seconds["float32"]) for name in ("each", "once")},
        })  # fmt: skip
        print(markdown_row(rows[-1]), flush=True)
    return rows


HEAD = "| tokens a microbatch | float32 ms | weights quantized in each (quartiles) | once |\n|---|---|---|---|\n"


def markdown_row(row: dict) -> str:
    cell = lambda r: f"{r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})"
    return f"| {row['tokens']} | {row['float32_ms']:.0f} | {cell(row['each'])} | {cell(row['once'])} |"


def main(config: Config) -> None:
    """Measures and writes the JSON file and the table."""
    settings = dataclasses.asdict(config) | {"output": None}
    report = {"environment": environment(), "config": settings, "rows": measure(config)}
    told = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    text = (
        f"# Gradients over {config.microbatches} microbatches, QuEST W4A4 over float32\n\nMade by `python -m"
        f" benchmarks.microbatches`: an MLP of width {config.width} and depth {config.depth}. {told}.\n\n{HEAD}"
    )
    write(config.output, "microbatches", report, text + "\n".join(map(markdown_row, report["rows"])) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
