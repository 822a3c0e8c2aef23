"""One run, one directory: a lock against a second process, and a refusal to go on with other settings."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import signal
import warnings
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from recipes.checkpoints import Checkpoints


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Holds `folder/lock` while inside. The system releases it when the process ends in whatever way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / "lock", "a+")
    except OSError as error:
        raise OSError(
            f"The run directory {folder} cannot be written: {error.strerror}. Choose another --out."
        ) from error
    with handle:
        if fcntl is None:
            warnings.warn(
                "This system has no fcntl: nothing stops a second process in the same run directory.", stacklevel=3
            )
        else:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.seek(0)
                raise RuntimeError(
                    f"The run directory {folder} is in use by process {handle.read().strip()}. Wait for it, stop it, or"
                    " choose another --out."
                ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def fields_that_matter(config, **more) -> dict[str, str]:
    """The settings that change the numbers of a run, as text; a field opts out by `metadata={"numbers": False}`."""
    fields = (field for field in dataclasses.fields(config) if field.metadata.get("numbers", True))
    values = {field.name: getattr(config, field.name) for field in fields} | more
    return {name: repr(value) for name, value in values.items()}


def short_hash(settings: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def claim(folder: pathlib.Path, settings: dict[str, str]) -> None:
    """Writes the settings on the first visit and compares on the next; other versions of the libraries give a warning.
    A run that ended before its first step was logged or saved holds nobody to its settings. Call it inside `locked`.

    Raises: ValueError naming the settings that differ."""
    path = folder / "config.json"
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    if not path.exists():
        return _write(path, settings, versions)
    stored, before = _read(path)
    if not _trained(folder):
        return _write(path, settings, versions)
    differing = [name for name in sorted(set(stored) | set(settings)) if stored.get(name) != settings.get(name)]
    if differing:
        lines = [f"  {name}: there {stored.get(name)}, now {settings.get(name)}" for name in differing]
        raise ValueError(
            f"The run in {folder} was started with other settings:\n" + "\n".join(lines) + "\nTake them back, or choose"
            " another --out."
        )
    other = [f"{name} {before.get(name)} -> {now}" for name, now in versions.items() if before.get(name) != now]
    if other:
        warnings.warn(f"{folder} was started with other versions ({', '.join(other)}): its last bits may differ.",
                      stacklevel=2)  # fmt: skip


def held_to(folder: pathlib.Path) -> dict[str, str]:
    """The settings that a run in `folder` has been trained with; none where nothing is."""
    path = folder / "config.json"
    return _read(path)[0] if path.exists() and _trained(folder) else {}


def _read(path: pathlib.Path) -> tuple[dict, dict]:
    """Settings and versions, as `_write` has them."""
    try:
        content = json.loads(path.read_text())
        settings, versions = content["settings"], content["versions"]
        if not all(isinstance(value, str) for value in [*settings.values(), *versions.values()]):
            raise TypeError("a setting or version that is no text")
        return settings, versions
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not what a run writes there ({error!r}). Restore it, or choose another --out."
        ) from error


def _write(path: pathlib.Path, settings: dict[str, str], versions: dict[str, str]) -> None:
    replacement = path.with_suffix(".new")
    replacement.write_text(json.dumps({"settings": settings, "versions": versions}, indent=1))
    os.replace(replacement, path)


def _trained(folder: pathlib.Path) -> bool:
    """Whether a training in `folder` has a checkpoint or a line of metrics, or its results are there."""
    logged = any(file.stat().st_size for file in folder.glob("*/metrics.*"))
    saved = any(Checkpoints(path).steps() for path in folder.glob("*/checkpoints"))
    return (
        logged or saved or any((folder / name).exists() for name in ("float", "packed", "results.json", "compare.json"))
    )


class StopRequest:
    """Turns SIGTERM and Ctrl-C into a flag that the loop reads between steps; a second Ctrl-C acts at once."""

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "StopRequest":
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number
