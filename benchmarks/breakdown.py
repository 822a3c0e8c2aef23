"""Where a quantized step's time goes, told in two ways that check each other.

By parts: the step with weights only, with activations only, without rotation, and whole, each over float32.
By operations: the profiler's time of every compiled operation, put to the account of the room of `lowbit_jax` (or of
the model or optimizer) that traced it; an operation fused from several rooms is named by all of them.
"""

import collections
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence

import jax

import lowbit_jax
from benchmarks.contenders import ablations
from benchmarks.models import WORKLOADS
from benchmarks.timing import Program, compile_program, environment, interleaved_seconds, ratio

_TABLES = {
    "file": re.compile(r'^(\d+) "(.*)"$', re.M),
    "location": re.compile(r"^(\d+) \{file_name_id=(\d+) ", re.M),
    "frame": re.compile(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}", re.M),
}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*?(?:\s|\))([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_FRAME_ID = re.compile(r"stack_frame_id=(\d+)")
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_LIBRARY = str(pathlib.Path(lowbit_jax.__file__).parent) + "/"
_CONTAINERS = {"while", "call", "conditional"}  # their time is that of the operations inside


def owners(text: str) -> dict[str, str]:
    """Operation of an optimized program -> who traced it: rooms of `lowbit_jax`, "product", "optimizer" or "model".

    Read from the source locations that the compiler keeps: tables of files, locations and stack frames at the head of
    the text, and a frame's number in the metadata of each operation."""
    head = text[: text.find("\n%")] if "\nStackFrames" in text else ""
    files = dict(_TABLES["file"].findall(head.partition("FunctionNames")[0]))
    location_file = {i: files.get(f, "") for i, f in _TABLES["location"].findall(head)}
    frames = {
        int(i): (location_file.get(loc, ""), int(parent) - 1) for i, loc, parent in _TABLES["frame"].findall(head)
    }
    bodies: dict[str, set[str]] = collections.defaultdict(set)
    calls: dict[str, str] = {}
    own: dict[str, set[str]] = {}
    computation = ""
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            computation = opened[1]
        elif found := _INSTRUCTION.match(line):
            name, opcode = found.groups()
            if opcode in _CONTAINERS:
                continue
            frame = _FRAME_ID.search(line)
            own[name] = {_owner(int(frame[1]), frames, opcode)} if frame else set()
            bodies[computation] |= own[name]
            if called := _CALLS.search(line):
                calls[name] = called[1]
    named = {name: bodies[calls[name]] | own[name] if name in calls else own[name] for name in own}
    return {name: _label(parts) for name, parts in named.items()}


def _owner(frame: int, frames: Mapping[int, tuple[str, int]], opcode: str) -> str:
    """The innermost room of the library on the stack; outside it, "optimizer" or "model"."""
    paths = []
    while frame in frames:
        path, frame = frames[frame]
        paths.append(path)
    for path in paths:
        if path.startswith(_LIBRARY):
            room = path.removeprefix(_LIBRARY).split("/")[0].removesuffix(".py")
            if room in ("ops", "nn"):
                return "product" if opcode == "dot" else "ops"
            return room
    if any("/optax/" in path for path in paths):
        return "optimizer"
    return "product" if opcode == "dot" else "model"


def _label(parts: set[str]) -> str:
    """One name for a fused operation: a product counts whole; beside rooms of the library the model is left out."""
    if "product" in parts:
        return "product"
    rooms = sorted(parts - {"model", "optimizer"})
    return " + ".join(rooms or sorted(parts)) or "copies and constants"


def operation_seconds(program: Program, steps: int = 3) -> dict[str, float]:
    """Seconds a step of every operation, by the profiler; operations that run at the same time count in full."""
    program.run()
    totals: dict[str, float] = collections.defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                program.run()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    if "hlo_op" in dict(event.stats):
                        totals[event.name] += 1e-9 * event.duration_ns / steps
    return dict(totals)


def accounts(program: Program) -> dict[str, float]:
    """Seconds a step by owner, largest first."""
    owner = owners(program.text())
    totals: dict[str, float] = collections.defaultdict(float)
    for name, seconds in operation_seconds(program).items():
        if name in owner:
            totals[owner[name]] += seconds
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def profile(sizes: Sequence[tuple[str, int, int]], tokens: int, rounds: int) -> tuple[dict, str]:
    """The report of the first depth and width of every model, and its page."""
    report: dict = {"environment": environment(), "tokens": tokens, "models": []}
    first = {model: (model, width, depth) for model, width, depth in reversed(sizes)}
    for model, width, depth in reversed(first.values()):
        work = WORKLOADS[model]
        batch = work.batch(tokens, width)
        programs = {
            name: compile_program(quantize(work.build(width, depth), batch[0], work.layers), work.loss, batch)
            for name, quantize in ablations().items()
        }
        seconds = interleaved_seconds(programs, rounds)
        entry = {
            "model": model,
            "width": width,
            "depth": depth,
            "parts": {name: ratio(times, seconds["float32"]) for name, times in seconds.items()},
            "operations": {name: accounts(programs[name]) for name in ("float32", "both, rotated")},
        }
        report["models"].append(entry)
    page = _page(report)
    print(page)
    return report, page


def _page(report: Mapping) -> str:
    lines = ["# Where a QuEST W4A4 step goes\n\nMade by `python -m benchmarks.train_step --profile`."]
    for entry in report["models"]:
        lines += [
            f"\n### {entry['model']}, width {entry['width']}, depth {entry['depth']}, {report['tokens']} tokens\n"
        ]
        lines += ["| step | over float32 (quartiles) |", "|---|---|"]
        lines += [f"| {n} | {r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f}) |" for n, r in entry["parts"].items()]
        lines += ["\n| operations traced by | float32, ms | QuEST W4A4, ms |", "|---|---|---|"]
        plain, quest = entry["operations"]["float32"], entry["operations"]["both, rotated"]
        for name in dict.fromkeys([*quest, *plain]):
            lines.append(f"| {name} | {1e3 * plain.get(name, 0):.1f} | {1e3 * quest.get(name, 0):.1f} |")
    return "\n".join(lines) + "\n"
