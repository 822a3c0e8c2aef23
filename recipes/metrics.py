"""Metrics of a run: JSON lines always, TensorBoard beside them.

`metrics.jsonl` holds only what the seed decides, so two runs of the same command, one of them killed and resumed, can
be compared with `cmp`. Times and speeds go to `timing.jsonl`."""

import contextlib
import itertools
import json
import math
import os
import pathlib
import shutil
import warnings
from collections.abc import Iterator
from typing import Any, Literal


class Metrics:
    def __init__(self, folder: pathlib.Path, *, after_step: int, tensorboard: bool,
                 on_error: Literal["stop", "continue"] = "stop"):  # fmt: skip
        """Drops what was written after the checkpoint of `after_step`: those steps are run again.

        on_error: what a disk that refuses a line does; with "continue" lines wait in memory for a better time."""
        self.steps = _LineFile(folder / "metrics.jsonl", after_step, on_error)
        if after_step and self.steps.found_nothing:
            warnings.warn(
                f"metrics: {self.steps.path} has no line of the {after_step} steps that are done, and the curves lack"
                " them. Put the file back, if there is a copy, and run the same command again.",
                stacklevel=3,
            )
        self.timing = _LineFile(folder / "timing.jsonl", after_step, on_error)
        self.board = _tensorboard(folder / "tensorboard", after_step) if tensorboard else None

    def step(self, step: int, **values: float) -> None:
        self.steps.write(step, values)
        self._board(step, values)

    def time(self, step: int, **values: float) -> None:
        self.timing.write(step, values)
        self._board(step, values)

    def flush(self) -> None:
        self.steps.flush()
        self.timing.flush()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        try:
            self.flush()
        finally:
            self.steps.file.close()
            self.timing.file.close()
        if self.board is not None:
            self.board.close()

    def _board(self, step: int, values: dict) -> None:
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self.board.add_scalar(name, value, step)


class Silent(Metrics):
    """Writes nothing: for all processes but the first."""

    def __init__(self, *_, **__):
        pass

    def step(self, step: int, **values: float) -> None:
        pass

    def time(self, step: int, **values: float) -> None:
        pass

    def flush(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        pass


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class _LineFile:
    def __init__(self, path: pathlib.Path, after_step: int, on_error: str):
        self.path, self.on_error, self.told, self.waiting = path, on_error, False, b""
        with _named(path):
            self.found_nothing = not path.exists() or path.stat().st_size == 0
            kept = _kept(path, after_step) if path.exists() else []
            replacement = path.with_suffix(".new")
            replacement.write_bytes(b"".join(kept))
            os.replace(replacement, path)
            self.file = path.open("ab", buffering=0)  # at once, so that others can follow

    def write(self, step: int, values: dict[str, Any]) -> None:
        finite = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in values.items()
        }
        self.waiting += json.dumps({"step": step} | finite).encode() + b"\n"
        self._out()

    def flush(self) -> None:
        self._out(to_disk=True)

    def _out(self, to_disk: bool = False) -> None:
        try:
            with _named(self.path):
                while self.waiting:
                    self.waiting = self.waiting[self.file.write(self.waiting) :]
                if to_disk:
                    os.fsync(self.file.fileno())
        except OSError as error:
            if self.on_error == "stop":
                raise
            if not self.told:
                warnings.warn(f"{error} Its lines wait in memory.", stacklevel=4)
            self.told = True


def _kept(path: pathlib.Path, after_step: int) -> list[bytes]:
    """The lines up to `after_step`. A last line cut short by a kill goes silently; a file with other lines that no run
    writes is set aside under another name, and its good lines are kept."""
    kept, damaged = [], []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        step = _step_of(line)
        if step is None:
            damaged.append(number)
        elif step > after_step:
            break  # this and all that follow are run again
        else:
            kept.append(line)
    if damaged:
        aside = next(name for n in itertools.count(1) if not (name := path.with_suffix(f".damaged{n}")).exists())
        shutil.copyfile(path, aside)
        lines = f"line {damaged[0]}" if len(damaged) == 1 else f"{len(damaged)} lines from line {damaged[0]} on"
        warnings.warn(
            f"metrics: {path}, {lines} cannot be read as JSON with a step and numbers. The file is kept as"
            f" {aside.name}; the run goes on with its {len(kept)} good lines up to step {after_step}.",
            stacklevel=4,
        )
    return kept


def _step_of(line: bytes) -> int | None:
    try:
        content = json.loads(line)
    except ValueError:  # also bytes that are not UTF-8
        return None
    if not isinstance(content, dict) or not all(isinstance(value, int | float | None) for value in content.values()):
        return None
    step = content.get("step")
    return step if isinstance(step, int) else None


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
    """Says which file the system refused."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"metrics: {path}: {error.strerror}. Free space or choose another --out; what the last"
            " checkpoint holds is safe."
        ) from error


def _tensorboard(folder: pathlib.Path, after_step: int):
    try:
        import tensorboardX
    except ImportError as error:
        raise ImportError(
            "TensorBoard logs need tensorboardX: pip install 'lowbit_jax[recipes]', or pass --no-tensorboard."
        ) from error
    return tensorboardX.SummaryWriter(str(folder), purge_step=after_step + 1)
