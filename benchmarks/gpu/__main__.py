"""Everything about the GPU kernels in one command and under eight minutes.

    python -m benchmarks.gpu               # on a machine with an NVIDIA GPU
    python -m benchmarks.gpu --package     # the same, and the tuned tiles into the package
    python -m benchmarks.gpu --smoke       # anywhere: the checks alone, small, kernels interpreted

Checks every kernel on fresh random data, times an 800M model's training step, tunes tiles (into the user's tuning
table) and times kernels over bfloat16 `jnp.dot`, then the forward of one token. Writes
benchmarks/results/gpu_<device>.json and .md, after each part. Parts run in a process of their own, which is ended where
it tells nothing for long; the next one goes on behind the kernel that hung or stopped the GPU. Kernels need jax,
jaxtyping and tyro; the parts `training` and `one_token` need what the recipes do.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping

import jax
import tyro

from benchmarks.gpu import checks, course, rotations, speed  # `model` needs more than the kernels do
from benchmarks.gpu.course import Course
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

CHOOSABLE = ("fused", "large", "training", "decode", "tiles")  # parts of several things with names
PARTS = ("checks", "fused", "large", "training", "decode", "tiles", "one_token")  # tuned before models take the tiles
NO_GPU = 2  # the exit status
NOT_IN_TABLES = ("tile", "tried_us", "kernels_ms", "wrong_tiles")
MOST_RESTARTS = 3  # of a part, each of which a kernel ended by stopping the GPU
GRACE = 15.0  # seconds after the time after which what still runs is ended
POLL = 0.5  # seconds


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
    """What is not begun by then is left out, and the report says so; what still runs 15 seconds later is ended."""
    parts: tuple[str, ...] = PARTS
    """Which parts, in this order."""
    only: tuple[str, ...] = ()
    """PART:TEXT, of this part only what has the text in its name: "training:int8 backward"."""
    package: bool = False
    """Write the tuned tiles of this chip into the package's own table too, pallas_kernels/tuned.json of the machine
    that runs this, and put a copy of that file, tuned_<device>.json, under `output`."""
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
    taken = [name for name in CHOOSABLE if name in config.parts]
    if bad := [each for each in config.only if each.partition(":")[0] not in taken or not each.partition(":")[2]]:
        print(f"benchmarks.gpu got --only {bad[0]!r}. It takes PART:TEXT, of the parts that run: {', '.join(taken)}.")
        return 1
    path, until = config.output / "gpu_writing.json", time.time() + 60 * config.minutes
    path.unlink(missing_ok=True)
    left, report, restarts = list(config.parts), {}, collections.Counter()
    while left and (config.smoke or not report or time.time() < until):
        own = dataclasses.replace(config, parts=tuple(left), until=until)
        command = [sys.executable, "-m", "benchmarks.gpu", *arguments(own)]
        ended = watched(command, path, None if config.smoke else until + GRACE)
        report = json.loads(path.read_text()) if path.exists() else {}
        if ended == NO_GPU or not report:
            return ended if isinstance(ended, int) and ended else 1
        if left := [name for name in left if name not in report["ended"]]:
            restarts[left[0]] += 1
            stopped(report, left[0], ended, restarts[left[0]] > MOST_RESTARTS)
            left = [name for name in left if name not in report["ended"]]
            write(path, report)
    if left:
        report["left_out"] += left
        write(path, report)
    for suffix in (".json", ".md"):
        path.with_suffix(suffix).replace(config.output / f"gpu_{report['name']}{suffix}")
    return told(config, report)


def stopped(report: dict, part: str, ended: int | str, last: bool) -> None:
    """Enters into the report how a process ended in the part, which is closed if it has been there before or `last`."""
    how = f"the process {ended if isinstance(ended, str) else f'ended with status {ended}'}"
    doing = report["doing"] or {"part": part, "what": "its start"}
    step = course.name(part, doing["what"])
    text = f"{how} at {doing['what']}"
    if last or step in report["done"] or doing["part"] != part:
        text += ", and what was left of it did not run"
        report["ended"].append(part)
    report["done"].append(step)
    for row in report.get("checks", []):
        if row.get("failed") == checks.RUNNING:
            row["failed"] = how
    report["errors"][part] = "; ".join(filter(None, (report["errors"].get(part), text)))


def told(config: Config, report: Mapping) -> int:
    """Prints what a report says in the end, and writes the tiles; 1 when a kernel is wrong or a part failed."""
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
        copy = config.output / f"tuned_{report['name']}.json"
        shutil.copyfile(tuning.PACKAGED, copy)
        tuning.store(own, chip, copy)
        print(f"{len(own)} tiles into {copy} and {tuning.store(own, chip, tuning.PACKAGED)}")
    return 1 if wrong or report.get("errors") else 0


def watched(command: list[str], path: pathlib.Path, until: float | None) -> int | str:
    """The exit status of the command, or why it was ended: the clock shows `until`, or the report at `path` has not
    changed for as long as it said it may take (None: it may take any time)."""
    age = lambda: path.stat().st_mtime_ns if path.exists() else 0
    seen, since, patience = age(), time.time(), course.PATIENCE
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            if (now := age()) != seen:
                doing = json.loads(path.read_text()).get("doing") or {}
                seen, since, patience = now, time.time(), doing.get("patience", course.PATIENCE)
            if until is not None and time.time() > until:
                return "did not end in time"
            if until is not None and time.time() - since > patience:
                return f"told nothing for {patience:.0f} s"
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
        return process.returncode
    finally:
        if process.poll() is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it back
                process.wait(5)


def write(path: pathlib.Path, report: Mapping) -> None:
    """The report and its tables; never half of it, whatever stops this process."""
    whole = path.with_suffix(".half")
    whole.write_text(json.dumps(report, indent=1) + "\n")
    whole.replace(path)
    path.with_suffix(".md").write_text(markdown(report))


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
    report |= {"checks": [], "seconds": {}} | course.fresh() | (json.loads(path.read_text()) if path.exists() else {})

    def save() -> None:
        tables = {"tuning": json.loads(tuning.user_file().read_text())} if tuning.user_file().exists() else {}
        write(path, report | tables)

    assert config.until is not None, "`main` says until when"
    until = time.perf_counter() + config.until - time.time()
    run = Course(rounds=config.rounds, until=until, only=config.only, report=report, save=save)
    named = parts(config, run)
    for run.part in config.parts:
        began, name = time.perf_counter(), run.part
        if run.over() and not config.smoke:
            report["left_out"].append(name)
        else:
            rows = report.setdefault(name, [])  # with those of a process that ended in this part
            run.now("its start")
            try:
                for row in named[name]():
                    rows.append(row)
                    run.finished()
                    save()
            except Exception as error:  # the other parts' numbers are worth having
                report["errors"][name] = f"{type(error).__name__}: {str(error)[:2000]}"
                traceback.print_exc()
                save()
        if alive := checks.answers():
            report["ended"].append(name)
            left = [each for each in config.only if each.startswith(f"{name}:") and each not in run.met]
            if left and name not in report["left_out"]:
                report["errors"].setdefault(name, f"nothing in it has a name with {left[0].partition(':')[2]!r}")
        report["seconds"][name] = round(report["seconds"].get(name, 0) + time.perf_counter() - began, 1)
        print(f"{name}: {report['seconds'][name]:.0f} s", flush=True)
        save()
        if not alive:
            return 1
    return 0


def environment() -> dict[str, str | int]:
    """What a reader must know to compare two reports."""
    backend, device = jax.default_backend(), jax.devices()[0].device_kind
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    return {"backend": backend, "device": device, "cores": os.cpu_count() or 0} | versions


def parts(config: Config, run: Course) -> dict[str, Callable[[], Iterable[dict]]]:
    """Name -> what measures its rows."""
    shapes, report = lambda rows: [(m, *config.shape) for m in rows], run.report

    def roof() -> speed.Roof:
        if "roof" not in report:
            report["roof"] = dataclasses.asdict(speed.Roof.measured())
        return speed.Roof(**report["roof"])

    def check() -> Iterable[dict]:
        checks.run(checks.every(config.smoke, 64 if config.smoke else 512, config.seed), run, report["checks"])
        return ()

    def training() -> Iterable[dict]:
        from benchmarks.gpu import model

        return model.training(config.preset, config.batch, config.context, run)

    def one_token() -> Iterable[dict]:
        from benchmarks.gpu import model

        return model.one_token(config.preset, 1, run)

    return {
        "checks": check,
        "training": training,
        "large": lambda: speed.compare(shapes(config.large), LARGE, roof(), run),
        "fused": lambda: rotations.measure(roof(), run),
        "decode": lambda: speed.compare(shapes(config.decode), DECODE, roof(), run),
        "tiles": lambda: speed.compare([(1, *layer) for layer in LAYERS], LAYER_KERNELS, roof(), run),
        "one_token": one_token,
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
    config = tyro.cli(Config, description=__doc__)
    status = main(config)
    if config.until is None:
        sys.exit(status)
    sys.stdout.flush()
    os._exit(status)  # threads that wait for a GPU that has stopped would hold back the end
