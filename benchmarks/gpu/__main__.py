"""Everything about the GPU kernels in one command and under eight minutes.

    python -m benchmarks.gpu               # on a machine with an NVIDIA GPU
    python -m benchmarks.gpu --package     # the same, and the tuned tiles into the package
    python -m benchmarks.gpu --smoke       # anywhere: the checks alone, small, kernels interpreted

Checks every kernel on fresh random data, times an 800M model's training step, tunes tiles (into the user's tuning
table) and times kernels over bfloat16 `jnp.dot`, then the forward of one token. Writes
benchmarks/results/gpu_<device>.json and .md, after each part.
"""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping

import jax
import tyro

import lowbit_jax as lb
from benchmarks.gpu import checks, model, speed
from benchmarks.timing import environment
from pallas_kernels import tuning

DECODE = (
    *(("matmul_a16", bits, 128) for bits in (4, 3, 8, 2, 1, 6)),
    *(("matmul_a8", bits, None) for bits in (2, 1, 4, 8)),
    ("matmul_mx", 4, None),
)
LARGE = (("matmul_i8", 8, None), ("matmul_a8", 4, None), ("matmul_a8", 8, None), ("matmul_fp8", 8, None))
ONE_TOKEN = {"w4a16": lb.quest(4, activations=False), "w4a4": lb.quest(4), "w8a8": lb.quest(8)}


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
    """Rows of the products of training and prefill."""
    preset: str = "800M"
    batch: int = 8
    context: int = 512
    minutes: float = 8.0
    """What is not begun by then is left out, and the report says so."""
    package: bool = False
    """Write the tuned tiles of this chip into the package's own table too."""
    output: pathlib.Path = pathlib.Path("benchmarks/results")


def parts(config: Config, report: dict, until: float) -> dict[str, Callable[[], list[dict]]]:
    """Name -> what it measures, in the order in which they run: what matters most first."""
    impl, size = ("interpret", 64) if config.smoke else ("kernel", 512)
    pallas = "interpret" if config.smoke else "triton"
    named = {
        "checks": lambda: [
            *checks.products(impl, size, config.seed),
            *checks.rotations(pallas, size, config.seed),
            *checks.codecs(pallas, size, config.seed),
        ]
    }
    if config.smoke:
        return named
    roof = speed.Roof.measured()
    report["roof"] = dataclasses.asdict(roof)
    shapes = lambda rows: [(m, *config.shape) for m in rows]
    return named | {
        "training": lambda: model.training(config.preset, config.batch, config.context, config.rounds),
        "large": lambda: speed.compare(shapes(config.large), LARGE, config.rounds, roof, until),
        "fused": lambda: speed.fused(8192, 4096, config.rounds, roof),
        "decode": lambda: speed.compare(shapes(config.decode), DECODE, config.rounds, roof, until),
        "one_token": lambda: model.one_token(config.preset, 1, config.rounds, ONE_TOKEN, "auto"),
    }


def main(config: Config) -> int:
    """Runs the parts in order and writes the report after each; 1 when a kernel is wrong."""
    if not config.smoke and jax.default_backend() != "gpu":
        print(
            f"benchmarks.gpu: JAX runs on {jax.default_backend()} here, and times need an NVIDIA GPU. --smoke runs the"
            " checks anywhere."
        )
        return 2
    start, report = time.perf_counter(), {"environment": environment(), "seed": config.seed, "left_out": []}
    until = start + 60 * config.minutes
    for name, part in parts(config, report, until).items():
        if time.perf_counter() > until:
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
    if config.package and not config.smoke and not wrong:
        chip = jax.devices()[0].device_kind
        own = json.loads(tuning.user_file().read_text()).get(chip, {}) if tuning.user_file().exists() else {}
        print(f"{len(own)} tiles into {tuning.store(own, chip, tuning.PACKAGED)}")
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
    if roof := report.get("roof"):
        lines += [f"The roof, measured: {roof['bandwidth'] / 1e12:.2f} TB/s of a copy, {roof['bfloat16'] / 1e12:.0f}"
                  " TFLOP/s of bfloat16, twice that of int8 and FP8.", ""]  # fmt: skip
    for part in ("checks", "training", "large", "fused", "decode", "one_token"):
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
