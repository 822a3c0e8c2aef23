"""What keys and values in few bits do to a trained model, and what caching them spares in sampling.

    python -m recipes.pretrain                          # a run, for instance the default one
    python -m benchmarks.kv_cache runs/tiny-quest-...   # the table in benchmarks/results/kv_cache_<backend>.md

Loss: held-out windows of the run's own text, every key and value rounded as `recipes.sample --cache-bits` keeps it; the
difference to the model without a cache, window by window, with its standard error. Time: the same text sampled with a
cache and by whole windows, interleaved.
"""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array

from benchmarks.held_out import HeldOut, cell, corpus_of
from benchmarks.report import write
from benchmarks.timing import environment, interleaved_seconds, ratio
from recipes import finished, sampling
from recipes.llama import Llama


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    run: tyro.conf.Positional[pathlib.Path]
    """Directory of a finished run of recipes.pretrain on text."""
    bits: tuple[int, ...] = (8, 6, 5, 4, 3, 2)
    windows: int = 256
    """Held-out windows of the model's context."""
    rounds: int = 7
    output: pathlib.Path = pathlib.Path("benchmarks/results")


def bytes_of(model: Llama, bits: int | None) -> int:
    """Of the cache of one sequence of the model's context."""
    cache = jax.eval_shape(lambda: model.init_cache(1, model.config.context, bits))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


class WholeWindows(nnx.Module):
    """The same model without `extend`, which `sampling.generate` then reads window by window."""

    def __init__(self, model: Llama):
        self.model = model

    def __call__(self, ids: Array) -> Array:
        return self.model(ids)


@dataclasses.dataclass(slots=True)
class Sampling:
    model: nnx.Module
    context: int
    vocab_size: int

    def run(self) -> None:
        options = dict(tokens=self.context - 1, context=self.context, vocab_size=self.vocab_size)
        sampling.generate(self.model, np.asarray([1]), temperature=0, key=jax.random.key(0), **options)


def measure(config: Config) -> dict:
    model, codec = finished.load(config.run)
    context = model.config.context
    whole = nnx.jit(lambda model, tokens: model(tokens))
    held = HeldOut.of(corpus_of(config.run), model, config.windows, functools.partial(whole, model))
    rows = []
    for bits in (None, *config.bits):

        @nnx.jit
        def cached(model, tokens, bits=bits):
            return model.extend(tokens, model.init_cache(*tokens.shape, bits), jnp.int32(0))[0]

        rows.append({"bits": bits, "bytes": bytes_of(model, bits)} | held.above(functools.partial(cached, model)))
    programs = {"cache": Sampling(model, context, codec.vocab_size),
                "windows": Sampling(WholeWindows(model), context, codec.vocab_size)}  # fmt: skip
    seconds = interleaved_seconds(programs, config.rounds)
    return {
        "environment": environment(), "run": config.run.name, "windows": len(held.losses), "loss": held.loss,
        "rows": rows, "tokens": context - 1, "seconds": {name: float(np.median(s)) for name, s in seconds.items()},
        "ratio": ratio(seconds["windows"], seconds["cache"]),
    }  # fmt: skip


def markdown(report: dict) -> str:
    told = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    lines = [
        f"# Keys and values in few bits\n\nMade by `python -m benchmarks.kv_cache` of the run `{report['run']}`, whose"
        f" loss on {report['windows']} held-out windows is {report['loss']:.4f} nats a token. {told}.\n",
        "| keys and values | loss above that without a cache | bytes a sequence |",
        "|---|---|---|",
    ]
    for row in report["rows"]:
        name = "as computed" if row["bits"] is None else f"{row['bits']} bits"
        lines.append(f"| {name} | {cell(row)} | {row['bytes']} |")
    seconds, of = report["seconds"], report["ratio"]
    lines.append(
        f"\n{report['tokens']} tokens by whole windows take {seconds['windows']:.2f} s, with a cache"
        f" {seconds['cache']:.2f} s: {of['median']:.1f} times as long ({of['low']:.1f} to {of['high']:.1f})."
    )
    return "\n".join(lines) + "\n"


def main(config: Config) -> pathlib.Path:
    """Measures, prints, writes; returns the JSON file."""
    report = measure(config)
    page = markdown(report)
    print(page)
    return write(config.output, "kv_cache", report, page)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
