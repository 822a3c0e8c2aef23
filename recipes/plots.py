"""Curves as PNG files. Matplotlib without a display; imported only when a plot is drawn."""

import importlib.util
import pathlib

import numpy as np

LOSSES = ("loss", "validation_loss")  # of a line of metrics.jsonl


def curves(path: pathlib.Path, runs: dict[str, list[dict]], *, title: str) -> None:
    """Training loss (a moving mean over the faint steps) and held-out loss of each run over the steps.

    Without any point nothing is drawn, and what is at `path` stays."""
    if not any(line.get(name) is not None for lines in runs.values() for line in lines for name in LOSSES):
        return
    figure, axes = _figure(8, 5)
    tops = []
    for number, (name, lines) in enumerate(runs.items()):
        color = f"C{number}"
        points = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
        if points:
            steps, losses = np.asarray(points).T
            width = max(1, len(losses) // 25)
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
            axes.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
            axes.plot(steps[width - 1 :], smooth, color=color, label=f"{name}, training")
            tops.append(losses[len(losses) // 20 :].max())
        held = [(line["step"], line["validation_loss"]) for line in lines if line.get("validation_loss") is not None]
        if held:
            axes.plot(*np.asarray(held).T, "o--", color=color, markersize=4, label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.set_title(title, parse_math=False)  # it holds the path of the data, perhaps with a $
    if tops:  # the fall of the first steps would hide the rest
        axes.set_ylim(top=max(tops))
    axes.legend()
    figure.savefig(path, dpi=120)


def by_bits(
    path: pathlib.Path, series: dict[str, list[tuple[float, float, float]]], *, baseline: float | None, title: str
) -> None:
    """Held-out loss over bits: one line a method, each point (bits, mean, half width of its interval)."""
    figure, axes = _figure(8, 5)
    for name, points in series.items():
        bits, mean, half = np.asarray(sorted(points)).T
        axes.errorbar(bits, mean, yerr=half, marker="o", capsize=3, label=name)
    if baseline is not None:
        axes.axhline(baseline, color="black", linestyle="--", linewidth=1, label="unquantized")
    axes.set(xlabel="bits of weights and activations", ylabel="held-out loss (nats a token)", xscale="log")
    axes.set_title(title, parse_math=False)
    ticks = sorted({point[0] for points in series.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


def check() -> None:
    """Raises: ImportError where no plot can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("The plots need matplotlib: pip install 'lowbit_jax[recipes]'.")


def _figure(width: float, height: float):
    check()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
