"""What keys and values in few bits do to a trained model, and what caching them spares in sampling.

    python -m recipes.pretrain                          # a run, for instance the default one
    python -m benchmarks.kv_cache runs/tiny-quest-...   # the table in benchmarks/results/kv_cache_<backend>.md

Loss: held-out windows of the run's own text, every key and value rounded as `recipes.sample --cache-bits` keeps it; the
difference to the model without a cache, window by window, with its standard error. Time: the same text sampled with a
cache and by whole windows, interleaved.
"""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jaxtyping import Array, Float

from benchmarks.report import write
from benchmarks.timing import environment, interleaved_seconds, ratio
from recipes import finished, sampling, text
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


@jax.jit
def losses(logits: Float[Array, "batch time vocab"], tokens: Array) -> Float[Array, "batch"]:
    """Mean cross-entropy of each window, in nats a token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(-1)


def of_windows(model: Llama, batches: list[np.ndarray], bits: int | None, cached: bool) -> np.ndarray:
    """The loss of each window."""

    @nnx.jit
    def logits(model, tokens):
        if not cached:
            return model(tokens)
        return model.extend(tokens, model.empty(*tokens.shape, bits), jnp.int32(0))[0]

    return np.concatenate([losses(logits(model, batch[:, :-1]), jnp.asarray(batch)) for batch in batches])


def bytes_of(model: Llama, bits: int | None) -> int:
    """Of the cache of one sequence of the model's context."""
    cache = jax.eval_shape(lambda: model.empty(1, model.config.context, bits))
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
    described = finished.Description.read(config.run)
    corpus = text.load(described.data, tokenizer=described.tokenizer)
    context, batch = model.config.context, model.config.batch
    batches = text.fixed_batches(corpus.validation, context=context, batch=batch, windows=config.windows)
    plain = of_windows(model, batches, None, cached=False)
    rows = []
    for bits in (None, *config.bits):
        above = of_windows(model, batches, bits, cached=True) - plain
        rows.append({
            "bits": bits, "above": float(above.mean()), "standard_error": float(above.std() / len(above) ** 0.5),
            "bytes": bytes_of(model, bits),
        })  # fmt: skip
    programs = {"cache": Sampling(model, context, codec.vocab_size),
                "windows": Sampling(WholeWindows(model), context, codec.vocab_size)}  # fmt: skip
    seconds = interleaved_seconds(programs, config.rounds)
    return {
        "environment": environment(), "run": config.run.name, "windows": len(plain), "loss": float(plain.mean()),
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
        lines.append(f"| {name} | {row['above']:+.4f} ± {row['standard_error']:.4f} | {row['bytes']} |")
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
