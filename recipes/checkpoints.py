"""Checkpoints that are whole or absent: Orbax arrays, a checksum of every array, one rename.

    <folder>/step_00000050/arrays/         written by Orbax
    <folder>/step_00000050/manifest.json   name -> shape, dtype, SHA-256, and what else the caller must have back

A checkpoint is written under a hidden name, flushed, and renamed, so a kill leaves the earlier ones as they were. Orbax
does not notice a flipped bit; the manifest does, and `latest` then warns and answers with the checkpoint before it.
Several processes write one checkpoint together, each the parts that it holds; it can be read by any number of them."""

import hashlib
import json
import os
import pathlib
import shutil
import warnings
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from recipes import orbax_errors

VERSION = 1
Tree = Any


class CorruptCheckpoint(Exception):
    """What was read is not what was written."""


class OtherStructure(ValueError):
    """What was read is whole, and has other arrays than are wanted. difference: in words that follow its name."""

    def __init__(self, folder: pathlib.Path, difference: str):
        super().__init__(f"Checkpoint {folder} {difference}. Use another --out.")
        self.difference = difference


class Checkpoints:
    """The newest `keep` checkpoints of one run."""

    def __init__(self, folder: pathlib.Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"Checkpoints: keep must be at least 1, not {keep}.")
        self.folder, self.keep = pathlib.Path(folder).absolute(), keep

    def save(self, step: int, tree: Tree, **extra) -> pathlib.Path:
        """Writes `tree` and the JSON values `extra`. Raises: OSError when the disk refuses; what is there stays."""
        final, hidden = self._path(step), self.folder / f".writing-{step:08d}"
        first = jax.process_index() == 0
        try:
            if first:
                self._remove_unfinished()
                hidden.mkdir(parents=True)
            _all_here(f"folder of step {step}")
            write(hidden, tree, step=step, **extra)
            _all_here(f"arrays of step {step}")
            if first:
                if final.exists():  # the same step of an earlier try; what is there did not verify
                    shutil.rmtree(final)
                os.rename(hidden, final)
                _flush(self.folder)
            _all_here(f"name of step {step}")
        except Exception as error:  # Orbax and TensorStore raise many kinds
            shutil.rmtree(hidden, ignore_errors=True)
            orbax_errors.raise_if_not_the_disks(error)
            raise OSError(
                f"Checkpoints could not write step {step} to {self.folder}: {orbax_errors.reason(error)}. Earlier"
                f" checkpoints ({self.steps() or 'none'}) are untouched; free space or choose another --out, and run"
                " again."
            ) from error
        for old in self.steps()[: -self.keep] if first else ():
            shutil.rmtree(self._path(old), ignore_errors=True)
        return final

    def latest(self, like: Tree, *, a_device: str | None = None) -> tuple[int, Tree, dict] | None:
        """Step, arrays in the structure of `like`, and extras of the newest good checkpoint; None where none is.

        Arrays whose names start with `a_device` have one part a device along their first axis, and may have been
        written by another number of devices: each then gets the mean, so that the mean over the devices stays.

        Raises: ValueError when a checkpoint is whole but of another shape or dtype than `like`, or none verifies."""
        if jax.process_index() == 0:
            self._remove_unfinished()
        _all_here("reading the newest checkpoint")
        for step in reversed(self.steps()):
            try:
                tree, manifest = read(self._path(step), like, a_device=a_device)
            except CorruptCheckpoint as error:
                warnings.warn(
                    f"Checkpoint {self._path(step)} is damaged ({error}); trying the one before it.", stacklevel=2
                )
                continue
            return step, tree, manifest["extra"]
        if self.steps():
            raise ValueError(f"No checkpoint in {self.folder} verifies. Remove the folder to start from the beginning.")
        return None

    def steps(self) -> list[int]:
        """Of the folders that `save` named; others, such as copies that somebody made, are left alone."""
        folders = (path for path in self.folder.glob("step_*") if path.is_dir())
        found = ((path, path.name.removeprefix("step_")) for path in folders)
        return sorted(int(step) for path, step in found if step.isdecimal() and path == self._path(int(step)))

    def _remove_unfinished(self) -> None:
        """What a kill left, or a full disk: threads of Orbax may write on after `save` has removed its folder."""
        for hidden in self.folder.glob(".writing-*"):
            shutil.rmtree(hidden, ignore_errors=True)

    def _path(self, step: int) -> pathlib.Path:
        return self.folder / f"step_{step:08d}"


def write(folder: pathlib.Path, tree: Tree, *, step: int = 0, alone: bool = False, **extra) -> None:
    """One tree of arrays and its manifest into an existing folder, flushed to the disk.

    All processes call it, or with `alone` the first one, for arrays of its own."""
    together = jax.process_count() > 1 and not alone
    arrays = {name: leaf if together else np.asarray(leaf) for name, leaf in named(tree).items()}
    with orbax_errors.silenced(), _checkpointer(alone) as writer:
        writer.save((folder / "arrays").absolute(), {name: array for name, array in arrays.items() if array.size})
    digest = (lambda array: {"sum64": sum64(array)}) if together else (lambda array: {"sha256": _digest(array)})
    entries = {name: _describe(array) | digest(array) for name, array in arrays.items()}
    manifest = {"version": VERSION, "step": step, "arrays": entries, "extra": extra}
    if jax.process_index():
        return
    with (folder / "manifest.json").open("w") as file:
        json.dump(manifest | {"sha256": _digest_of_json(manifest)}, file)
        file.flush()
        os.fsync(file.fileno())
    _flush(folder)


def read(folder: pathlib.Path, like: Tree, *, a_device: str | None = None) -> tuple[Tree, dict]:
    """NumPy arrays in the structure of `like`, and the manifest: what they are put on is the caller's to say.

    Raises: CorruptCheckpoint; ValueError when names, shapes or dtypes are not those of `like`."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        checksum = manifest.pop("sha256")
        if checksum != _digest_of_json(manifest):
            raise CorruptCheckpoint("the manifest does not have its checksum")
        if missing := [name for name in ("version", "arrays", "extra") if name not in manifest]:
            raise CorruptCheckpoint(f"the manifest lacks {', '.join(missing)}")
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CorruptCheckpoint(f"the manifest cannot be read: {error}") from error
    if manifest["version"] != VERSION:
        raise ValueError(
            f"Checkpoint {folder} is of version {manifest['version']}; this recipe reads version {VERSION}."
        )
    wanted = named(like)
    _refuse_other_structure(folder, manifest["arrays"], wanted, a_device)
    try:
        with orbax_errors.silenced(), ocp.PyTreeCheckpointer() as reader:
            empty = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in wanted.items() if not leaf.size}
            as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted if name not in empty}
            arrays = (
                reader.restore((folder / "arrays").absolute(), restore_args=as_numpy) | empty
            )  # Orbax refuses those
    except (MemoryError, PermissionError):  # nothing is damaged
        raise
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise CorruptCheckpoint(orbax_errors.reason(error)) from error
    for name, entry in manifest["arrays"].items():
        array = np.asarray(arrays[name])
        whole = "sha256" in entry
        if (_digest(array) if whole else sum64_of_part(array, array.shape)) != entry["sha256" if whole else "sum64"]:
            raise CorruptCheckpoint(f"the array {name!r} does not have its checksum")
    for name, leaf in wanted.items():
        if tuple(arrays[name].shape) != tuple(leaf.shape):
            arrays[name] = np.broadcast_to(arrays[name].mean(axis=0), leaf.shape)
    leaves = [np.asarray(arrays[name]) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), manifest


def _checkpointer(alone: bool) -> ocp.Checkpointer:
    if not alone or jax.process_count() == 1:
        return ocp.PyTreeCheckpointer()
    first = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="alone")
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=first), multiprocessing_options=first)


def size_on_disk(folder: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _refuse_other_structure(folder: pathlib.Path, entries: dict, wanted: dict, a_device: str | None) -> None:
    other = set(entries) ^ set(wanted)
    if other:
        raise OtherStructure(folder, f"and this run differ in the arrays {sorted(other)[:5]}")
    for name, leaf in wanted.items():
        stored, expected = entries[name], _describe(leaf)
        if a_device is not None and name.startswith(a_device):
            stored = stored | {"shape": [*expected["shape"][:1], *stored["shape"][1:]]}
        if any(stored[key] != expected[key] for key in expected):
            raise OtherStructure(folder, f"stores {name!r} as {stored}; this run needs {expected}")


def named(tree: Tree) -> dict[str, Any]:
    """The leaves by their paths, in the order of `jax.tree.leaves`."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    assert len(set(names)) == len(names), names
    return {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def _describe(array) -> dict:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def sum64(array: jax.Array) -> int:
    """A checksum of an array that lies on several processes, the same however it is cut: each adds up its own parts."""
    own = 0
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            own += sum64_of_part(np.asarray(shard.data), array.shape, shard.index)
    halves = np.asarray([own & 0xFFFFFFFF, own >> 32 & 0xFFFFFFFF], np.uint32)
    every = multihost_utils.process_allgather(halves).reshape(-1, 2).astype(object)
    return int(sum(low + (high << 32) for low, high in every) % 2**64)


def sum64_of_part(part: np.ndarray, shape: tuple[int, ...], index: tuple[slice, ...] | None = None) -> int:
    """The sum over elements of mix(bits + position), modulo 2^64; mix is the finalizer of SplitMix64.

    A flipped bit changes one term, and elements that changed places two; the order of the sum does not matter.
    Source: Steele et al. 2014, "Fast splittable pseudorandom number generators", section 5."""
    if not part.size:
        return 0
    index = index or tuple(slice(None) for _ in shape)
    ranges = [np.arange(n, dtype=np.uint64)[cut] for n, cut in zip(shape, index, strict=True)]
    position = np.zeros((), np.uint64)
    for length, along in zip(shape, ranges, strict=True):
        position = position[..., None] * np.uint64(length) + along
    bits = np.ascontiguousarray(part).reshape(-1).view(f"uint{8 * part.dtype.itemsize}").astype(np.uint64)
    with np.errstate(over="ignore"):
        z = bits * np.uint64(0x9E3779B97F4A7C15) + (position.reshape(-1) + np.uint64(1)) * np.uint64(0xD1342543DE82EF95)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int(np.sum(z ^ (z >> np.uint64(31)), dtype=np.uint64))


def _all_here(what: str) -> None:
    """Several processes wait here for each other."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _digest_of_json(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flush(folder: pathlib.Path) -> None:
    """Makes the folder's entries durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
