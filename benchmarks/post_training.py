"""What packing a model that was trained in full precision costs: each weight to the nearest level, and by GPTQ; and
what activations in integers cost, scaled anew for each token or by static scales.

    python -m recipes.pretrain --method none               # a float model, here the default's twin
    python -m benchmarks.post_training runs/tiny-none-...  # the table in benchmarks/results/post_training_<backend>.md

Held-out loss above the float model's, window by window with its standard error. GPTQ and static scales read
`--calibration` windows of the training text.
"""

import dataclasses
import functools
import pathlib
from typing import Literal

import jax
import tyro
from flax import nnx

import lowbit_jax as lb
from benchmarks.held_out import HeldOut, cell, corpus_of
from benchmarks.report import write
from benchmarks.timing import environment
from recipes import finished, text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    run: tyro.conf.Positional[pathlib.Path]
    """Directory of a finished run of recipes.pretrain --method none on text."""
    bits: tuple[int, ...] = (8, 4, 3, 2)
    windows: int = 256
    """Held-out windows of the model's context."""
    calibration: int = 64
    """Windows of the training text for GPTQ and static scales."""
    output: pathlib.Path = pathlib.Path("benchmarks/results")


def recipes(bits: int) -> dict[str, lb.LinearRecipe]:
    """Weights alone, by their names in the table."""
    absmax = lb.methods.absmax_integer
    return {
        "absmax, channels": absmax(bits, activations=False),
        "absmax, groups of 32, zero points": absmax(bits, activations=False, group=32, zero_points="weights"),
        "QuEST's grid (rotated, rms)": lb.quest(bits, activations=False),
    }


def activations(bits: int) -> dict[str, tuple[lb.LinearRecipe, Literal["mean", "max"] | None]]:
    """8-bit weights with activations of so many bits, by their names in the table; with the statistic of batches that
    static scales are."""
    static = functools.partial(lb.methods.static_integer, bits, weight_bits=8)
    return {
        "absmax of each token": (lb.methods.absmax_integer(bits, weight_bits=8), None),
        "static, mean of absmax": (static(), "mean"),
        "static, largest": (static(), "max"),
        "static, mean of the 99.9th percentile": (static(percent=99.9), "mean"),
    }


def measure(config: Config) -> dict:
    model, _ = finished.load(config.run, weights="float")
    described = finished.Description.read(config.run)
    if described.scheme.method != "none":
        raise ValueError(
            f"post_training: {config.run} was trained with the method {described.scheme.method!r}, whose weights know"
            " their grid. Take a run of --method none."
        )
    corpus, forward = corpus_of(config.run), nnx.jit(lambda model, tokens: model(tokens))
    held = HeldOut.of(corpus, model, config.windows, functools.partial(forward, model))
    seen = text.fixed_batches(
        corpus.train, context=model.config.context, batch=model.config.batch, windows=config.calibration
    )
    rows = []
    for bits in config.bits:
        for name, recipe in recipes(bits).items():
            quantized = lb.quantize(model, rules=[("blocks", recipe)])
            row = {"bits": bits, "weights": name}
            forms = {"nearest": lb.convert(quantized), "gptq": lb.nn.gptq(quantized, [b[:, :-1] for b in seen])}
            for how, packed in forms.items():
                row[how] = held.above(functools.partial(forward, packed))
            packed = [leaf for leaf in jax.tree.leaves(nnx.state(forms["gptq"]), is_leaf=_packed) if _packed(leaf)]
            row["bits_per_weight"] = 8 * sum(p.nbytes for p in packed) / sum(p.size for p in packed)
            rows.append(row)
    own = []
    for bits in (8, 6, 4):
        for name, (recipe, statistic) in activations(bits).items():
            quantized = lb.quantize(model, rules=[("blocks", recipe)])
            if statistic is not None:
                lb.nn.calibrate_over(quantized, [b[:, :-1] for b in seen], statistic=statistic)
            above = held.above(functools.partial(forward, lb.convert(quantized)))
            own.append({"bits": bits, "activations": name, "above": above})
    return {"environment": environment(), "run": config.run.name, "windows": len(held.losses), "loss": held.loss,
            "calibration": sum(map(len, seen)), "rows": rows, "activations": own}  # fmt: skip


def _packed(leaf) -> bool:
    return isinstance(leaf, lb.QTensor)


def markdown(report: dict) -> str:
    told = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    lines = [
        f"# Packing after training\n\nMade by `python -m benchmarks.post_training` of the run `{report['run']}`, whose"
        f" loss on {report['windows']} held-out windows is {report['loss']:.4f} nats a token; GPTQ and static"
        f" scales read {report['calibration']} windows. {told}.\n",
        "| bits | weights | bits a weight | nearest | GPTQ |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        found = " | ".join(cell(row[how]) for how in ("nearest", "gptq"))
        lines.append(f"| {row['bits']} | {row['weights']} | {row['bits_per_weight']:.2f} | {found} |")
    lines += ["\n8-bit weights by channels, and activations:\n", "| bits | scale | above |", "|---|---|---|"]
    lines += [f"| {row['bits']} | {row['activations']} | {cell(row['above'])} |" for row in report["activations"]]
    return "\n".join(lines) + "\n"


def main(config: Config) -> pathlib.Path:
    """Measures, prints, writes; returns the JSON file."""
    report = measure(config)
    page = markdown(report)
    print(page)
    return write(config.output, "post_training", report, page)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
