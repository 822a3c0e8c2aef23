"""What a quantized training step costs: its time, compile time and memory over those of the float32 model.

    python -m benchmarks.train_step                     # the tables in benchmarks/results/train_step_<backend>.md
    python -m benchmarks.train_step --profile           # where the difference goes
    pip install -e '.[peers]'                           # to see Qwix and AQT beside us

A step is forward, backward and AdamW under `jit`. Every contender quantizes the same layers to 4-bit weights and
activations in the forward products. How it is timed: `benchmarks/timing.py`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import tyro

from benchmarks import breakdown
from benchmarks.contenders import Quantize, contenders
from benchmarks.models import WORKLOADS
from benchmarks.report import write
from benchmarks.timing import Program, compile_program, environment, interleaved_seconds, ratio

REFERENCE = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    models: tuple[str, ...] = ("mlp", "llama")
    widths: tuple[int, ...] = (512, 1024)
    depths: tuple[int, ...] = (2, 6)
    """The first width is measured at every depth, the others at the first depth."""
    tokens: int = 2048
    """Tokens a step."""
    scaling: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Tokens a step of the linearity check (first model, width and depth); empty to skip it."""
    rounds: int = 12
    """Rounds, each of which runs every contender once."""
    compiles: int = 3
    """How often each step is compiled; the median counts."""
    only: tuple[str, ...] = ()
    """Contenders to keep beside float32; all that are installed by default."""
    profile: bool = False
    """Take the QuEST step apart instead of comparing contenders."""
    output: pathlib.Path = pathlib.Path("benchmarks/results")


def programs_of(model: str, width: int, depth: int, tokens: int, quantizers: Mapping[str, Quantize], compiles: int):
    """Name -> compiled step, each compiled `compiles` times in turn; its times are the medians."""
    work = WORKLOADS[model]
    batch = work.batch(tokens, width)
    models = {name: quantize(work.build(width, depth), batch[0], work.layers) for name, quantize in quantizers.items()}
    compile_program(models[REFERENCE], work.loss, batch)  # a process's first compilation pays for warming up
    tries = [{name: compile_program(m, work.loss, batch) for name, m in models.items()} for _ in range(compiles)]
    programs = tries[-1]
    for name, program in programs.items():
        program.trace_s = median([t[name].trace_s for t in tries])
        program.compile_s = median([t[name].compile_s for t in tries])
    return programs


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def compare(programs: Mapping[str, Program], rounds: int) -> dict[str, dict]:
    """Name -> step time, compile time and memory, absolute and over the reference's."""
    seconds = interleaved_seconds(programs, rounds)
    base = programs[REFERENCE]
    return {
        name: {
            "step_ms": 1e3 * median(seconds[name]),
            "step_ratio": ratio(seconds[name], seconds[REFERENCE]),
            "compile_s": program.trace_s + program.compile_s,
            "of_which_tracing_s": program.trace_s,
            "compile_ratio": (program.trace_s + program.compile_s) / (base.trace_s + base.compile_s),
            "temp_mib": program.temp_bytes / 2**20,
            "peak_mib": program.peak_bytes / 2**20,
            "peak_ratio": program.peak_bytes / base.peak_bytes,
        }
        for name, program in programs.items()
    }


def sizes(config: Config) -> list[tuple[str, int, int]]:
    """(model, width, depth) of each table."""
    width, *wider = config.widths
    depth = config.depths[0]
    return [
        (m, w, d)
        for m in config.models
        for w, d in [*((width, d) for d in config.depths), *((w, depth) for w in wider)]
    ]


def measure(config: Config) -> dict:
    """The whole report, as the JSON file holds it."""
    chosen = {n: q for n, q in contenders().items() if not config.only or n in (REFERENCE, *config.only)}
    unknown = sorted(set(config.only) - set(chosen))
    if unknown:
        raise ValueError(
            f"benchmarks.train_step: no contender {unknown}; here are {sorted(contenders())}. Qwix and AQT appear"
            " when they are installed: pip install -e '.[peers]'."
        )
    report: dict = {"environment": environment(), "config": dataclasses.asdict(config) | {"output": None}, "tables": []}
    for model, width, depth in sizes(config):
        programs = programs_of(model, width, depth, config.tokens, chosen, config.compiles)
        row = {"model": model, "width": width, "depth": depth, "tokens": config.tokens}
        report["tables"].append(row | {"rows": compare(programs, config.rounds)})
        print(table(report["tables"][-1]), flush=True)
    if config.scaling:
        report["scaling"] = scaling(config, {n: chosen[n] for n in (REFERENCE, "quest_w4a4") if n in chosen})
        print(scaling_table(report["scaling"]), flush=True)
    return report


def scaling(config: Config, quantizers: Mapping[str, Quantize]) -> list[dict]:
    """Microseconds a token at several numbers of tokens a step: level when the cost is linear."""
    model, width, depth = sizes(config)[0]
    rows = []
    for tokens in config.scaling:
        programs = programs_of(model, width, depth, tokens, quantizers, compiles=1)
        seconds = interleaved_seconds(programs, config.rounds)
        per_token = {name: 1e6 * median(times) / tokens for name, times in seconds.items()}
        ratios = {name: ratio(times, seconds[REFERENCE]) for name, times in seconds.items()}
        rows.append(
            {
                "model": model,
                "width": width,
                "depth": depth,
                "tokens": tokens,
                "us_per_token": per_token,
                "step_ratio": ratios,
            }
        )
    return rows


def table(entry: Mapping) -> str:
    """One size as Markdown."""
    lines = [
        f"\n### {entry['model']}, width {entry['width']}, depth {entry['depth']}, {entry['tokens']} tokens a step\n",
        "| | step ms | step ratio (quartiles) | compile s | compile ratio | temp MiB | peak MiB | peak ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in entry["rows"].items():
        step = row["step_ratio"]
        lines.append(
            f"| {name} | {row['step_ms']:.0f} | {step['median']:.3f} ({step['low']:.3f} to {step['high']:.3f}) |"
            f" {row['compile_s']:.2f} | {row['compile_ratio']:.2f} | {row['temp_mib']:.1f} | {row['peak_mib']:.1f} |"
            f" {row['peak_ratio']:.2f} |"
        )
    return "\n".join(lines)


def scaling_table(rows: Sequence[Mapping]) -> str:
    """Cost a token against tokens a step, as Markdown."""
    first = rows[0]
    lines = [
        f"\n### Cost a token: {first['model']}, width {first['width']}, depth {first['depth']}\n",
        "| tokens a step | " + " | ".join(f"{name}, us a token | ratio" for name in first["us_per_token"]) + " |",
        "|---" * (1 + 2 * len(first["us_per_token"])) + "|",
    ]
    for row in rows:
        cells = [f"{row['us_per_token'][n]:.1f} | {row['step_ratio'][n]['median']:.3f}" for n in row["us_per_token"]]
        lines.append(f"| {row['tokens']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(report: Mapping) -> str:
    """The report as a page."""
    told = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    parts = [
        "# Training step over float32\n\nMade by `python -m benchmarks.train_step`, settings in the JSON file. "
        + told
        + "."
    ]
    parts += [table(entry) for entry in report["tables"]]
    if report.get("scaling"):
        parts.append(scaling_table(report["scaling"]))
    return "\n".join(parts) + "\n"


def main(config: Config) -> pathlib.Path:
    """Measures, prints, writes; returns the JSON file."""
    if config.profile:
        name, report, page = "profile", *breakdown.profile(sizes(config), config.tokens, config.rounds)
    else:
        name, report = "train_step", measure(config)
        page = markdown(report)
    path = write(config.output, name, report, page)
    print(f"\n{path} and {path.with_suffix('.md')}")
    return path


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
