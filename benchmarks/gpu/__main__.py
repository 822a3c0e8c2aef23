"""Everything about the GPU kernels in one command and under eight minutes.

    python -m benchmarks.gpu               # on a machine with an NVIDIA GPU
    python -m benchmarks.gpu --smoke       # anywhere: the checks alone, small, kernels interpreted

Checks every kernel against float64 on fresh random data, tunes tiles (into the user's tuning table), times kernels over
bfloat16 `jnp.dot`, then an 800M model's training step and one-token forward. Writes
benchmarks/results/gpu_<device>.json and .md.
"""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Mapping

import jax
import tyro

from benchmarks.gpu import checks, model, speed
from benchmarks.timing import environment
from pallas_kernels import tuning

PRODUCTS = (
    *(("matmul_a16", bits, 128) for bits in (1, 2, 3, 4, 6, 8)),
    *(("matmul_a8", bits, None) for bits in (1, 2, 4, 8)),
)
LARGE = (("matmul_a8", 4, None), ("matmul_a8", 8, None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    smoke: bool = False
    """Checks only, in interpretation, on small sizes."""
    seed: int = dataclasses.field(default_factory=lambda: time.time_ns() % (1 << 31))
    """Of the random data; fresh unless given."""
    rounds: int = 9
    decode: tuple[int, ...] = (1, 16)
    """Rows of the decode products."""
    shape: tuple[int, int] = (14336, 4096)
    """N and K of the products."""
    large: tuple[int, ...] = (4096,)
    """Rows of the int8 products of training and prefill."""
    preset: str = "800M"
    batch: int = 8
    context: int = 512
    minutes: float = 8.0
    """What is not begun by then is left out, and the report says so."""
    output: pathlib.Path = pathlib.Path("benchmarks/results")


def main(config: Config) -> int:
    """Runs the parts in order and writes the report after each; 1 when a kernel is wrong."""
    if not config.smoke and jax.default_backend() != "gpu":
        print(
            f"benchmarks.gpu: JAX runs on {jax.default_backend()} here, and times need an NVIDIA GPU. --smoke runs the"
            " checks anywhere."
        )
        return 2
    impl, size = ("interpret", 64) if config.smoke else ("triton", 512)
    start, report = time.perf_counter(), {"environment": environment(), "seed": config.seed, "left_out": []}
    roof = speed.Roof()
    kinds = {"bfloat16": (None, "auto"), "quest w8a8": (8, "auto"), "quest w4a4": (4, "auto"),
             "quest w4a4 by XLA": (4, "reference")}  # fmt: skip
    decode = [(m, *config.shape) for m in config.decode]
    parts = {
        "checks": lambda: checks.products(impl, size, config.seed) + checks.codecs(impl, size, config.seed),
        "decode": lambda: speed.compare(decode, PRODUCTS, config.rounds, roof),
        "large": lambda: speed.compare([(m, *config.shape) for m in config.large], LARGE, config.rounds, roof),
        "fused": lambda: speed.fused(8192, 4096, config.rounds, roof),
        "training": lambda: model.training(config.preset, config.batch, config.context, config.rounds, kinds),
        "one_token": lambda: model.one_token(config.preset, 1, config.rounds, (4, 8), "auto"),
    }
    for name, part in parts.items():
        if config.smoke and name != "checks":
            continue
        if time.perf_counter() - start > 60 * config.minutes:
            report["left_out"].append(name)
            continue
        began = time.perf_counter()
        try:
            report[name] = part()
        except Exception as error:  # the other parts' numbers are worth having
            report[name + "_error"] = f"{type(error).__name__}: {error}"
            print(f"{name}: {report[name + '_error']}", file=sys.stderr)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        _write(report, config)
    wrong = [row for row in report.get("checks", []) if not row["error"] <= row["limit"]]
    for row in wrong:
        print(f"WRONG: {row}")
    print(f"{len(report.get('checks', [])) - len(wrong)} of {len(report.get('checks', []))} checks hold")
    return 1 if wrong or any(name.endswith("_error") for name in report) else 0


def _write(report: Mapping, config: Config) -> None:
    device = jax.devices()[0].device_kind.lower().replace(" ", "_")
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / f"gpu_{'smoke_' if config.smoke else ''}{device}.json"
    tables = {"tuning": json.loads(tuning.user_file().read_text())} if tuning.user_file().exists() else {}
    path.write_text(json.dumps({**report, **tables}, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(report))


def markdown(report: Mapping) -> str:
    """The report's tables."""
    told = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    lines = ["# Kernels on a GPU", "", f"Made by `python -m benchmarks.gpu`, seed {report['seed']}. {told}.", ""]
    for part in ("checks", "decode", "large", "fused", "training", "one_token"):
        rows = [{k: v for k, v in row.items() if k not in ("tile", "tried_ms")} for row in report.get(part, [])]
        if rows:
            names = list(dict.fromkeys(key for row in rows for key in row))
            lines += [f"## {part}", "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
            cell = lambda v: f"{v:.3g}" if isinstance(v, float) else "" if v is None else str(v)
            lines += ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows] + [""]
        if f"{part}_error" in report:
            lines += [f"{part} failed: {report[f'{part}_error']}", ""]
    if report["left_out"]:
        lines.append(f"Left out for lack of time: {', '.join(report['left_out'])}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
