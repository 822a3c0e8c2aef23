"""Another run's newest checkpoint as the start of this one, with another method, width or optimizer.

    python -m recipes.pretrain --method none --init-from runs/tiny-quest-w4a4-0123abcd --steps 50   # a bfloat16 finish

Taken are the parameters, and the optimizer's moments where they have the same shape and dtype and, in few bits, were
stored under the same --optimizer-bits. The rate's schedule, the counters and the data start anew; another --seed draws
other batches."""

import dataclasses
import json
import pathlib
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

    @classmethod
    def of(cls, run: pathlib.Path, *, optimizer_bits: int | str | None = None) -> "Origin":
        """The newest good checkpoint of a run directory, or of one of several trainings in it (`RUN/quest-w4a4`).

        optimizer_bits: those of the run that starts here. Moments in few bits are left out when the settings of this
        one do not name the same: codes of 8 bits and of "e4m3" have one shape and dtype, and mean other values.
        Raises: ValueError where there is none, or more than one to choose from."""
        found = [run] if (run / "checkpoints").is_dir() else sorted(p.parent for p in run.glob("*/checkpoints"))
        if len(found) != 1:
            several = ", ".join(str(folder) for folder in found)
            why = f"holds several trainings; name one of {several}" if found else "holds no checkpoints of a run"
            raise ValueError(f"--init-from: {run} {why}.")
        store = checkpoints.Checkpoints(found[0] / "checkpoints")
        for step in reversed(store.steps()):
            try:
                arrays = _read(store.folder / f"step_{step:08d}")
            except checkpoints.CorruptCheckpoint as error:
                warnings.warn(f"--init-from: step {step} of {found[0]} is damaged ({error}).", stacklevel=2)
                continue
            if _optimizer_bits(found[0]) != repr(optimizer_bits):
                arrays = {name: array for name, array in arrays.items() if not _is_code(name)}
            return cls(found[0], step, arrays)
        raise ValueError(f"--init-from: {found[0]} holds no checkpoint that verifies. Name another run.")

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
