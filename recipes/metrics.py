"""Metrics of a run: JSON lines always, TensorBoard beside them.

`metrics.jsonl` holds only what the seed decides, so two runs of the same command, one of them killed and resumed, can
be compared with `cmp`. Times and speeds go to `timing.jsonl`."""

import json
import math
import os
import pathlib
from typing import Any


class Metrics:
    def __init__(self, folder: pathlib.Path, *, after_step: int, tensorboard: bool):
        """Drops what was written after the checkpoint of `after_step`: those steps are run again."""
        self.steps = _LineFile(folder / "metrics.jsonl", after_step)
        self.timing = _LineFile(folder / "timing.jsonl", after_step)
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
        self.flush()
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
    def __init__(self, path: pathlib.Path, after_step: int):
        kept = []
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n") or json.loads(line)["step"] > after_step:
                    break  # a line cut short by a kill, or a step that is run again
                kept.append(line)
        replacement = path.with_suffix(".new")
        replacement.write_bytes(b"".join(kept))
        os.replace(replacement, path)
        self.file = path.open("a", buffering=1)  # whole lines, so that others can follow

    def write(self, step: int, values: dict[str, Any]) -> None:
        finite = {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in values.items()
        }
        self.file.write(json.dumps({"step": step} | finite) + "\n")

    def flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


def _tensorboard(folder: pathlib.Path, after_step: int):
    try:
        import tensorboardX
    except ImportError as error:
        raise ImportError(
            "TensorBoard logs need tensorboardX: pip install 'lowbit_jax[recipes]', or pass --no-tensorboard."
        ) from error
    return tensorboardX.SummaryWriter(str(folder), purge_step=after_step + 1)
