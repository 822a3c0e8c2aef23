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

from pallas_kernels import chips

FIELDS = {"rows", "columns", "warps", "stages", "split"}  # of a launch.Tile
PROGRAMS = 264  # two for each of the 132 multiprocessors of an H200: fewer leave some idle
ALIKE = {"NVIDIA H200": "NVIDIA H100 80GB HBM3"}  # the same processor with other memory: its tiles, where it has none
PACKAGED = pathlib.Path(__file__).with_name("tuned.json")
_chip: list[str] = []


def key(kernel: str, bits: int, m: int, n: int, k: int) -> str:
    """The bucket of a shape: rows by power of two, the matrix exactly."""
    return f"{kernel}/w{bits}/m{1 << max(m - 1, 0).bit_length()}/{n}x{k}"


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


def store(entries: dict[str, dict[str, int]], chip: str, path: pathlib.Path | None = None) -> pathlib.Path:
    """Adds entries to a table and writes it (default: the user's)."""
    path = user_file() if path is None else path
    table = dict(_read(path, _age(path)))
    table[chip] = table.get(chip, {}) | entries
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".writing")
    whole.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    whole.replace(path)
    return path


def user_file() -> pathlib.Path:
    """Where the user's own table is."""
    home = pathlib.Path.home() / ".cache" / "lowbit_jax" / "tuning.json"
    return pathlib.Path(os.environ.get("LOWBIT_JAX_TUNING", home))


def _age(path: pathlib.Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=8)
def _read(path: pathlib.Path, age: int) -> dict:
    if not age:
        return {}
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"pallas_kernels.tuning: {path} is not a readable table ({error}). Delete it, or run benchmarks.gpu again."
        ) from error
    entries = table.values() if isinstance(table, dict) else [None]
    tiles = [tile for entry in entries for tile in (entry.values() if isinstance(entry, dict) else [None])]
    if bad := [tile for tile in tiles if not _is_tile(tile)]:
        raise ValueError(
            f"pallas_kernels.tuning: {path} holds {bad[0]!r} where {{chip: {{bucket: tile}}}} belongs, a tile being"
            f" integers under {', '.join(sorted(FIELDS))}. Delete the file, or run benchmarks.gpu again."
        )
    return table


def _is_tile(tile: object) -> bool:
    return (
        isinstance(tile, dict) and set(tile) <= FIELDS and all(type(size) is int and size > 0 for size in tile.values())
    )
