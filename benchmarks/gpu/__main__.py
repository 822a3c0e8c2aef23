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
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import tyro

import lowbit_jax as lb
from benchmarks.gpu import checks, model, rotations, speed
from benchmarks.timing import environment
from pallas_kernels import tuning

DECODE = (
    *(("matmul_a16", bits, 128) for bits in (4, 3, 8)),
    *(("matmul_a8", bits, None) for bits in (2, 1, 4, 8)),
    ("matmul_mx", 4, None),
)
LARGE = (
    ("matmul_i8_hopper", 8, None), ("matmul_i8", 8, None), ("matmul_a8", 4, None), ("matmul_a8", 8, None),
    ("matmul_fp8", 8, None),
)  # fmt: skip
LAYERS = ((6144, 2048), (2048, 2048), (11264, 2048), (2048, 5632))  # N and K of the layers of the 800M model
LAYER_KERNELS = (("matmul_a16", 4, None), ("matmul_a8", 4, None), ("matmul_a8", 2, None))
ONE_TOKEN = {"w4a16": lb.quest(4, activations=False), "w4a4": lb.quest(4), "w2a2": lb.quest(2)}


PARTS = ("checks", "fused", "large", "training", "decode", "tiles", "one_token")  # tuned before models take the tiles
NO_GPU = 2  # the exit status
NOT_IN_TABLES = ("tile", "tried_us", "kernels_ms", "wrong_tiles")
MOST_RESTARTS = 3  # of the checks, each of which a kernel ended by stopping the GPU
GRACE = 120  # seconds after which a part that was begun in time is taken to hang


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
    batch: int = 32
    context: int = 512
    minutes: float = 8.0
    """What is not begun by then is left out, and the report says so; what still runs two minutes later is ended."""
    parts: tuple[str, ...] = PARTS
    """Which parts, in this order."""
    package: bool = False
    """Write the tuned tiles of this chip into the package's own table too."""
    output: pathlib.Path = pathlib.Path("benchmarks/results")
    until: float | None = None
    """For the command itself: this process is the one that uses the GPU, to this time of the clock."""


def main(config: Config) -> int:
    """Runs the parts, each time one stops the GPU the rest in a new process; 1 when a kernel is wrong."""
    if config.until is not None:
        return work(config)
    if unknown := [name for name in config.parts if name not in PARTS]:
        print(f"benchmarks.gpu has no part {unknown[0]!r}; it has {', '.join(PARTS)}.")
        return 1
    if config.smoke:
        config = dataclasses.replace(config, parts=("checks",))
    path, until = config.output / "gpu_writing.json", time.time() + 60 * config.minutes
    path.unlink(missing_ok=True)
    left, report, seen = list(config.parts), {}, (0, 0)
    while left:
        own = dataclasses.replace(config, parts=tuple(left), until=until)
        limit = None if config.smoke else max(until - time.time(), 0) + GRACE
        ended = in_time([sys.executable, "-m", "benchmarks.gpu", *arguments(own)], limit)
        report = json.loads(path.read_text()) if path.exists() else {}
        if ended == NO_GPU or not report:
            return ended or 1
        before, left = seen, [name for name in left if name not in report["ended"]]
        seen = len(report["ended"]), len(report.get("checks", []))
        stopped = len([row for row in report.get("checks", []) if "failed" in row])
        if left and (seen == before or left[0] == "checks" and stopped > MOST_RESTARTS):
            how = "did not end in time" if ended is None else f"ended with status {ended}"
            report["errors"][left[0]] = f"the process {how}, and what was left of it did not run"
            report["ended"].append(left.pop(0))
            path.write_text(json.dumps(report))
            path.with_suffix(".md").write_text(markdown(report))
    for suffix in (".json", ".md"):
        path.with_suffix(suffix).replace(config.output / f"gpu_{report['name']}{suffix}")
    wrong = checks.wrong(report.get("checks", []))
    wrong += [row for part in PARTS for row in report.get(part, []) if row.get("wrong_tiles")]
    for row in wrong:
        print(f"WRONG: {row}")
    if report.get("checks"):
        print(f"{len(report['checks']) - len(checks.wrong(report['checks']))} of {len(report['checks'])} checks hold")
    chip = report["environment"]["device"]
    if config.package and (config.smoke or wrong or not report.get("checks") or "checks" in report["errors"]):
        print("no tiles into the package: they go there from a GPU on which all checks have run and hold")
    elif config.package:
        own = json.loads(tuning.user_file().read_text()).get(chip, {}) if tuning.user_file().exists() else {}
        print(f"{len(own)} tiles into {tuning.store(own, chip, tuning.PACKAGED)}")
    return 1 if wrong or report.get("errors") else 0


def in_time(command: list[str], seconds: float | None) -> int | None:
    """The exit status of the command; None if it had to be ended after so many seconds (None: there is no limit)."""
    try:
        return subprocess.run(command, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return None


def arguments(config: Config) -> list[str]:
    """The flags that make this configuration."""
    told: list[str] = []
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            told += [flag] if value else []
        elif isinstance(value, tuple):
            told += [flag, *map(str, value)]
        elif value is not None:
            told += [flag, str(value)]
    return told


def work(config: Config) -> int:
    """The parts of one process, the report written after each check and each row."""
    if not config.smoke and jax.default_backend() != "gpu":
        print(
            f"benchmarks.gpu: JAX runs on {jax.default_backend()} here, and times need an NVIDIA GPU. --smoke runs the"
            " checks anywhere."
        )
        return NO_GPU
    path = config.output / "gpu_writing.json"
    config.output.mkdir(parents=True, exist_ok=True)
    device = ("smoke_" if config.smoke else "") + jax.devices()[0].device_kind.lower().replace(" ", "_")
    report = {"environment": environment(), "seed": config.seed, "name": device, "ended": [], "errors": {}}
    report |= {"left_out": [], "checks": [], "seconds": {}} | (json.loads(path.read_text()) if path.exists() else {})

    def save(rows: list[dict] | None = None) -> None:
        tables = {"tuning": json.loads(tuning.user_file().read_text())} if tuning.user_file().exists() else {}
        text = json.dumps({**report, **tables}, indent=1) + "\n"
        whole = path.with_suffix(".half")
        whole.write_text(text)
        whole.replace(path)  # never half a report, whatever stops this process
        path.with_suffix(".md").write_text(markdown(report))

    assert config.until is not None, "`main` says until when"
    until = time.perf_counter() + config.until - time.time()
    named = parts(config, report, until, save)
    for name in config.parts:
        began = time.perf_counter()
        if began > until:
            report["left_out"].append(name)
        else:
            if name != "checks":
                report[name] = []  # what a process that ended in this part has left is measured again
            try:
                for row in named[name]():
                    report[name].append(row)
                    save()
            except Exception as error:  # the other parts' numbers are worth having
                report["errors"][name] = f"{type(error).__name__}: {str(error)[:2000]}"
                traceback.print_exc()
        alive = answers()
        if alive or name != "checks":
            report["ended"].append(name)
        report["seconds"][name] = round(time.perf_counter() - began, 1)
        print(f"{name}: {report['seconds'][name]:.0f} s", flush=True)
        save()
        if not alive:
            return 1
    return 0


def answers() -> bool:
    """Whether the device still computes: after an illegal access nothing does in this process."""
    try:
        return float(jnp.ones(4).sum()) == 4
    except RuntimeError as error:  # of JAX's runtime
        print(f"the device does not answer: {error}", file=sys.stderr)
        return False


def parts(config: Config, report: dict, until: float, save: Callable) -> dict[str, Callable[[], Iterable[dict]]]:
    """Name -> what measures its rows."""
    shapes = lambda rows: [(m, *config.shape) for m in rows]

    def roof() -> speed.Roof:
        if "roof" not in report:
            report["roof"] = dataclasses.asdict(speed.Roof.measured())
        return speed.Roof(**report["roof"])

    def check() -> Iterable[dict]:
        checks.run(checks.every(config.smoke, 64 if config.smoke else 512, config.seed), save, report["checks"])
        return ()

    compare = lambda shapes, kernels: speed.compare(shapes, kernels, config.rounds, roof(), until, report["left_out"])

    return {
        "checks": check,
        "training": lambda: model.training(config.preset, config.batch, config.context, config.rounds),
        "large": lambda: compare(shapes(config.large), LARGE),
        "fused": lambda: rotations.measure(config.rounds, roof(), until, report["left_out"]),
        "decode": lambda: compare(shapes(config.decode), DECODE),
        "tiles": lambda: compare([(1, *layer) for layer in LAYERS], LAYER_KERNELS),
        "one_token": lambda: model.one_token(config.preset, 1, config.rounds, ONE_TOKEN),
    }


def markdown(report: Mapping) -> str:
    """The report's tables."""
    told = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    lines = ["# Kernels on a GPU", "", f"Made by `python -m benchmarks.gpu`, seed {report['seed']}. {told}.", ""]
    if roof := report.get("roof"):
        lines += [f"The roof, measured: {roof['bandwidth'] / 1e12:.2f} TB/s of a copy, {roof['bfloat16'] / 1e12:.0f}"
                  " TFLOP/s of bfloat16, twice that of int8 and FP8.", ""]  # fmt: skip
    for part in PARTS:
        rows = [{k: v for k, v in row.items() if k not in NOT_IN_TABLES} for row in report.get(part, [])]
        if rows:
            names = list(dict.fromkeys(key for row in rows for key in row))
            lines += [f"## {part}", "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
            cell = lambda v: f"{v:.3g}" if isinstance(v, float) else "" if v is None else str(v)
            lines += ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows] + [""]
        if part in report.get("errors", {}):
            lines += [f"{part} failed: {report['errors'][part]}", ""]
    if report["left_out"]:
        lines.append(f"Left out for lack of time: {', '.join(report['left_out'])}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
