"""Which tile a kernel takes: a table by chip, kernel, width and bucket of shapes, looked up while tracing, never timed
there.

`python -m benchmarks.gpu` writes a file of the user's own, `$LOWBIT_JAX_TUNING` or `~/.cache/lowbit_jax/tuning.json`,
and with --package also `tuned.json` beside this file, which the user's goes before. An entry is the fields of a
`launch.Tile`. Tiles of another chip are not taken, but for those that are `ALIKE`: without one for the chip that the
program is traced for a kernel takes a tile that is known to compile without spills.
"""

import contextlib
import functools
import json
import os
import pathlib
import uuid
from collections.abc import Iterator

from pallas_kernels import chips
from pallas_kernels.launch import Tile

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

FIELDS = {"rows": 1024, "columns": 1024, "warps": 16, "stages": 16, "split": 256}  # of a launch.Tile, and the most
PROGRAMS = 264  # two for each of the 132 multiprocessors of an H200: fewer leave some idle
ALIKE = {"NVIDIA H200": "NVIDIA H100 80GB HBM3"}  # the same processor with other memory: its tiles, where it has none
PACKAGED = pathlib.Path(__file__).with_name("tuned.json")
_chip: list[str] = []


def key(kernel: str, bits: int, m: int, n: int, k: int) -> str:
    """The bucket of a shape: one row, up to 16 rows, then by power of two; the matrix exactly."""
    return f"{kernel}/w{bits}/m{1 if m <= 1 else max(16, 1 << (m - 1).bit_length())}/{n}x{k}"


def lookup(entry: str, chip: str | None = None) -> dict[str, int] | None:
    """The tile tuned for the bucket on the chip (default: that of `on_chip`, else the one traced for), or None.

    Raises: ValueError for a table or an entry that is damaged."""
    chip = chip or (_chip[-1] if _chip else chips.traced_kind())
    if chip is None:
        return None
    for name in (chip, ALIKE.get(chip)):
        for path in (user_file(), PACKAGED):
            if found := _read(path, _age(path)).get(name, {}).get(entry):
                return dict(found)
    return None


@contextlib.contextmanager
def on_chip(name: str):
    """Inside, tables of this chip are read (the chip's name as JAX gives it: "NVIDIA H200")."""
    _chip.append(name)
    try:
        yield
    finally:
        _chip.pop()


def store(entries: dict[str, dict[str, int] | None], chip: str, path: pathlib.Path | None = None) -> pathlib.Path:
    """Adds entries to a table, or with None takes them out, and writes it (default: the user's); other writers wait.

    Raises: OSError where the file cannot be written, ValueError for a table that is damaged."""
    path = user_file() if path is None else path
    whole = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock.tmp")):
            table = dict(_parsed(path)) if path.exists() else {}
            table[chip] = {name: tile for name, tile in (table.get(chip, {}) | entries).items() if tile is not None}
            try:
                whole.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
                whole.replace(path)
            finally:
                whole.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"pallas_kernels.tuning cannot write {path} ({error}). Set LOWBIT_JAX_TUNING to a file in a folder that can"
            " be written."
        ) from error
    _read.cache_clear()  # two writes may share a time
    return path


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Inside, no other process or thread is; on systems and file systems that have locks."""
    if fcntl is None:
        yield
        return
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def user_file() -> pathlib.Path:
    """Where the user's own table is."""
    if told := os.environ.get("LOWBIT_JAX_TUNING"):
        return pathlib.Path(told)
    return pathlib.Path.home() / ".cache" / "lowbit_jax" / "tuning.json"


def _age(path: pathlib.Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=8)
def _read(path: pathlib.Path, age: int) -> dict:
    return _parsed(path) if age else {}


def _parsed(path: pathlib.Path) -> dict:
    try:
        table = json.loads(path.read_text(), object_hook=_in_one_part)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"pallas_kernels.tuning: {path} is not a readable table ({error}). Delete it, or run benchmarks.gpu again."
        ) from error
    entries = table.values() if isinstance(table, dict) else [None]
    tiles = [tile for entry in entries for tile in (entry.values() if isinstance(entry, dict) else [None])]
    if bad := [(tile, why) for tile in tiles if (why := _why_no_tile(tile))]:
        raise ValueError(
            f"pallas_kernels.tuning: {path} holds {bad[0][0]!r} where {{chip: {{bucket: tile}}}} belongs ({bad[0][1]})."
            " Delete the file, or run benchmarks.gpu again."
        )
    return table


def _in_one_part(fields: dict) -> dict:
    """Without the field `parts` of tiles, which older tables hold, and without tiles that have several."""
    return {name: tile for name, tile in fields.items() if not isinstance(tile, dict) or tile.pop("parts", 1) == 1}


def _why_no_tile(fields: object) -> str | None:
    if not isinstance(fields, dict) or not set(fields) <= set(FIELDS):
        return f"a tile is integers under {', '.join(sorted(FIELDS))}"
    try:
        Tile(**fields)
    except ValueError as error:
        return str(error).removesuffix(".")
    beyond = [name for name, size in fields.items() if size > FIELDS[name]]
    return f"{beyond[0]} is at most {FIELDS[beyond[0]]}" if beyond else None
