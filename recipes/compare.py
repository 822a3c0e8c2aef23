"""Unquantized, QuEST, LSQ and straight-through training at 1 to 8 bits, over seeds: a table with intervals, and a plot.

    python -m recipes.compare                                    # 48 runs of the tiny model, 45 s each on 2 cores
    python -m recipes.compare --bits 1 2 --seeds 2 --steps 150   # minutes
    python -m recipes.compare --bits --schemes fp8 fp8:scaling=row nvfp4 block_scaled:format=mxfp4,stochastic=true

Every method sees the same initial weights and the same batches for a seed, so differences are paired. A run that is
finished is not run again. What to expect at this size (seeds differ by 0.01 to 0.03 nats): straight-through behind at
1 and 2 bits by 0.1 and more; QuEST and LSQ apart by less than the noise at 2 to 8 bits. Paper: arXiv:2502.05003."""

import dataclasses
import itertools
import json
import math
import pathlib

import numpy as np
import scipy.stats

from recipes import command, display, llama, plots, run_directory, schemes, text, train_loop


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    preset: str = "tiny"
    methods: tuple[str, ...] = ("quest", "lsq", "straight_through")
    """Names of lb.methods.names(); the unquantized twin always runs."""
    bits: tuple[int, ...] = (1, 2, 3, 4, 8)
    schemes: tuple[str, ...] = dataclasses.field(default=(), metadata={"numbers": False})
    """More, as method or method:option=value,option=value; --bits without a number leaves them alone."""
    seeds: int = dataclasses.field(default=3, metadata={"numbers": False})
    data: str = "stdlib"
    tokenizer: str = "bytes"
    steps: int | None = None
    batch: int | None = None
    context: int | None = None
    learning_rate: float | None = None
    """One rate for all methods."""
    dtype: str = "auto"
    out: pathlib.Path | None = dataclasses.field(default=None, metadata={"numbers": False})
    """Directory of the runs; named after the settings unless given."""


def main(config: Compare) -> list[dict]:
    """Trains every cell; answers with the rows of the table."""
    cells = [schemes.Scheme(method="none")]
    cells += [schemes.Scheme(method=method, bits=bits) for bits in config.bits for method in config.methods]
    cells += map(schemes.Scheme.of, config.schemes)
    if config.seeds < 1 or len(cells) == 1:
        raise ValueError("recipes.compare needs at least one seed, and one method and width or one scheme.")
    for one, other in itertools.combinations(cells, 2):
        if one.name == other.name or one.same_as(other):
            twice = one.name if one.name == other.name else f"{one.name}, also named {other.name},"
            raise ValueError(f"recipes.compare: {twice} would run twice. Name each method once for a width.")
    size = llama.preset(config.preset, steps=config.steps, batch=config.batch, context=config.context,
                        learning_rate=config.learning_rate)  # fmt: skip
    corpus = text.load(config.data, tokenizer=config.tokenizer)
    settings = run_directory.fields_that_matter(config, text=corpus.fingerprint, size=repr(size))
    named = f"compare-{config.preset}-{run_directory.short_hash(settings)}"
    folder = pathlib.Path("runs") / named if config.out is None else config.out.expanduser()
    losses: dict[str, list[float]] = {scheme.name: [] for scheme in cells}
    with run_directory.locked(folder), run_directory.StopRequest() as stop:
        run_directory.claim(folder, settings)
        for seed in range(config.seeds):
            for scheme in cells:
                model = llama.build(size, corpus.vocab_size, dtype=config.dtype, seed=seed)
                model = scheme.apply(model, corpus.sample(size.context, size.batch))
                plan = train_loop.Plan.of(size, dtype=config.dtype, seed=seed, evaluate_every=size.steps,
                                          checkpoint_every=100, keep=1, tensorboard=False)  # fmt: skip
                name = f"{scheme.name}-seed{seed}"
                quantized = scheme.method != "none"
                done = train_loop.train(name, model, corpus, plan, folder, stop, quantized=quantized)
                losses[scheme.name].append(done.validation_loss)
        rows = summary(cells, losses)
        (folder / "compare.json").write_text(json.dumps({"losses": losses, "rows": rows}, indent=1))
        show(rows, folder, config, corpus)
    return rows


def summary(cells: list[schemes.Scheme], losses: dict[str, list[float]]) -> list[dict]:
    """Mean held-out loss, and differences paired by seed: to the unquantized twin, to QuEST of the same width."""
    rows = []
    for scheme in cells:
        mine, quest = losses[scheme.name], f"quest-w{scheme.bits}a{scheme.bits}"
        against_quest = scheme.method not in ("none", "quest") and quest in losses
        rows.append({
            "name": scheme.name, "method": scheme.method, "bits": scheme.bits, "options": list(scheme.options),
            "loss": interval(mine),
            "above_unquantized": None if scheme.method == "none" else interval(np.subtract(mine, losses["none"])),
            "above_quest": interval(np.subtract(mine, losses[quest])) if against_quest else None,
        })  # fmt: skip
    return rows


def interval(values) -> tuple[float, float | None]:
    """Mean and half width of the 95% confidence interval of the mean (Student's t); None for a single value."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values.mean()), None
    error = values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(scipy.stats.t.ppf(0.975, len(values) - 1) * error)


def show(rows: list[dict], folder: pathlib.Path, config: Compare, corpus: text.Corpus) -> None:
    def cell(value: tuple[float, float | None] | None, sign: str) -> str:
        if value is None:
            return "-"
        return f"{value[0]:{sign}.4f}" + ("" if value[1] is None else f" ± {value[1]:.4f}")

    signs = {"loss": "", "above_unquantized": "+", "above_quest": "+"}
    lines = []
    for row in rows:
        name = "unquantized" if row["method"] == "none" else row["name"]
        lines.append([name, *(cell(row[key], sign) for key, sign in signs.items())])
    title = (
        f"Held-out loss, nats a token: {config.preset}, {config.seeds} seeds, 95% intervals, differences paired by seed"
    )
    display.table(title, ["run", "loss", "above unquantized", "above QuEST"], lines)
    series: dict[str, list] = {}
    for row in rows:
        if isinstance(row["bits"], int):
            label = ":".join([row["method"], *filter(None, [",".join(row["options"])])])
            series.setdefault(label, []).append((row["bits"], row["loss"][0], row["loss"][1] or 0.0))
    plot = folder / "compare.png"
    if series:
        plots.by_bits(plot, series, baseline=rows[0]["loss"][0], title=f"{config.preset}, {corpus.note}")
    print(f"{f'plot: {plot}; ' if series else ''}numbers: {folder / 'compare.json'}")


if __name__ == "__main__":
    command.run("compare", Compare, main, __doc__)
