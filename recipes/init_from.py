"""Another run's newest checkpoint as the start of this one, with another method, width or optimizer.

    python -m recipes.pretrain --method none --init-from runs/tiny-quest-w4a4-0123abcd --steps 50   # a bfloat16 finish

Taken are the parameters, and the optimizer's moments where they have the same shape and dtype and, in few bits, were
stored under the same --optimizer-bits. The rate's schedule, the counters and the data start anew; another --seed draws
other batches."""

import dataclasses
import json
import pathlib
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from recipes import checkpoints

Tree = Any


@dataclasses.dataclass(frozen=True)
class Origin:
    """A checkpoint by name: `params.<path>`, `optimizer.<path>`."""

    folder: pathlib.Path
    step: int
    arrays: dict[str, np.ndarray]
    sha256: str | None  # of the manifest, which has those of the arrays

    @classmethod
    def of(cls, run: pathlib.Path, *, optimizer_bits: int | str | None = None) -> "Origin":
        """The newest good checkpoint of a run directory, or of one of several trainings in it (`RUN/quest-w4a4`).

        optimizer_bits: those of the run that starts here. Moments in few bits are left out when the settings of this
        one do not name the same: codes of 8 bits and of "e4m3" have one shape and dtype, and mean other values.
        Raises: ValueError where there is none, or more than one to choose from."""
        training = _training(run)
        for step, folder in reversed(_saved(training).items()):
            try:
                arrays = _read(folder)
            except checkpoints.CorruptCheckpoint as error:
                warnings.warn(f"--init-from: step {step} of {training} is damaged ({error}).", stacklevel=2)
                continue
            if _optimizer_bits(training) != repr(optimizer_bits):
                arrays = {name: array for name, array in arrays.items() if not _is_code(name)}
            return cls(training, step, arrays, _sha256(folder))
        raise ValueError(f"--init-from: {training} holds no checkpoint that verifies. Name another run.")

    def model(self, model: nnx.Module) -> nnx.Module:
        """The model with the parameters of this run; those that it lacks, such as learned steps, stay as they are.

        Raises: ValueError for a parameter of another shape, or when none has a name in common."""
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        named = checkpoints.named({"params": params})
        taken = {name: self._param(name, leaf) for name, leaf in named.items() if name in self.arrays}
        if not taken:
            raise ValueError(f"--init-from: no parameter of {self.folder} has the name of one of this model.")
        leaves = [taken.get(name, leaf) for name, leaf in named.items()]
        return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(params), leaves), rest)

    def state(self, state: dict[str, Tree]) -> tuple[dict[str, Tree], str]:
        """A training state that starts here, and in words what was taken."""
        named = checkpoints.named(state)
        source = {_plain(name): leaf for name, leaf in self.arrays.items() if _is_moment(name, self.arrays)}
        leaves, moments, of = [], 0, 0
        for name, leaf in named.items():
            if name.startswith("params."):
                leaves.append(self._param(name, leaf) if name in self.arrays else leaf)
            elif _is_moment(name, named):
                found = source.get(_plain(name))
                fits = found is not None and (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
                leaves.append(_where(found, leaf) if found is not None and fits else leaf)
                moments, of = moments + fits, of + 1
            else:
                leaves.append(leaf)
        said = f"starts from step {self.step} of {self.folder}, with {moments} of {of} arrays of the optimizer"
        return jax.tree.unflatten(jax.tree.structure(state), leaves), said

    def _param(self, name: str, leaf) -> Any:
        found = self.arrays[name]
        if found.shape != leaf.shape:
            raise ValueError(
                f"--init-from: {self.folder} has {name.removeprefix('params.')} of shape {found.shape}, and this run"
                f" {leaf.shape}. Take the --preset and --tokenizer of that run."
            )
        return _where(found, leaf)


def origins(run: pathlib.Path, folder: pathlib.Path, names: list[str], *, optimizer_bits: int | str | None = None
            ) -> dict[str, Origin]:  # fmt: skip
    """The checkpoint of `run` for each training in `folder` that has none of its own to go on from. Where all have
    one, `run` is not read, and may be gone."""
    starting = [name for name in names if not checkpoints.Checkpoints(folder / name / "checkpoints").steps()]
    return dict.fromkeys(starting, Origin.of(run, optimizer_bits=optimizer_bits)) if starting else {}


def setting(run: pathlib.Path, held: str | None, origins: dict[str, Origin]) -> str:
    """What the settings of a run say of `--init-from run`: a checkpoint by its step, place and checksum. It is `held`,
    what they have said since the run began, where that is the same checkpoint: wherever it lies now, and, where no
    training starts from it any more (`origins` is empty), also if `run` has gone on or is gone from the same place.

    Raises: ValueError where `run` is another place without checkpoints."""
    if held is not None and held.startswith(("'", '"')):  # the path as it was written, all that there was before
        return repr(str(run))
    place = str(run.resolve())
    was = re.fullmatch(r"step \d+ of (.*), SHA-256 (\w+)", held or "", re.DOTALL)
    if origins:
        found = {origin.step: origin.sha256 for origin in origins.values()}
    elif was is not None and was[1] == place:
        return was[0]
    else:
        found = {step: _sha256(saved) for step, saved in _saved(_training(run)).items()}
    if was is not None and was[2] in found.values():
        return was[0]
    newest = max(found, default=0)
    return f"step {newest} of {place}, SHA-256 {found.get(newest)}"


def _training(run: pathlib.Path) -> pathlib.Path:
    """The one that `run` is, or holds."""
    found = [run] if (run / "checkpoints").is_dir() else sorted(p.parent for p in run.glob("*/checkpoints"))
    if len(found) != 1:
        several = ", ".join(str(folder) for folder in found)
        why = f"holds several trainings; name one of {several}" if found else "holds no checkpoints of a run"
        raise ValueError(f"--init-from: {run} {why}.")
    return found[0]


def _saved(training: pathlib.Path) -> dict[int, pathlib.Path]:
    """The folders of its checkpoints, oldest first."""
    store = checkpoints.Checkpoints(training / "checkpoints")
    return {step: store.folder / f"step_{step:08d}" for step in store.steps()}


def _sha256(checkpoint: pathlib.Path) -> str | None:
    """Of its manifest; None where that cannot be read."""
    try:
        return str(json.loads((checkpoint / "manifest.json").read_bytes())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _where(array: np.ndarray, leaf: Any) -> Any:
    """The array in the dtype of `leaf` and on its devices; no device holds more of it than of `leaf`."""
    array = array.astype(leaf.dtype)
    if not isinstance(leaf, jax.Array):
        return array
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])


def _read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        entries = json.loads((folder / "manifest.json").read_bytes())["arrays"]
        like = {name: jax.ShapeDtypeStruct(e["shape"], jnp.dtype(e["dtype"])) for name, e in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise checkpoints.CorruptCheckpoint(f"the manifest cannot be read: {error}") from error
    return checkpoints.read(folder, like)[0]


def _optimizer_bits(training: pathlib.Path) -> str | None:
    """As `config.json` of its run has them; None where that is not known."""
    try:
        settings = json.loads((training.resolve().parent / "config.json").read_bytes())["settings"]
        return settings.get("optimizer_bits", repr(None))  # recipes.compare has float32 moments only
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_code(name: str) -> bool:
    """Whether an array is a part of a moment in few bits, `lb.optim`'s `Stored`."""
    return name.startswith("optimizer.") and ".parts." in name


def _is_moment(name: str, names) -> bool:
    """Whether an array of the optimizer belongs to Adam's moments: those, and the counter beside them."""
    beside, _, last = name.rpartition(".")
    if last == "count":
        return any(other.startswith(f"{beside}.mu.") for other in names)
    return name.startswith("optimizer.") and (".mu." in name or ".nu." in name)


def _plain(name: str) -> str:
    """The name without the wrappers of an optimizer, so that moments under a loss scale or a stochastic rounding are
    those of a plain one."""
    return name.replace("inner_state.", "")
