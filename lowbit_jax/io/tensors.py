"""Named arrays in a safetensors file, in dtypes that NumPy lacks too; written whole or not at all."""

import json
import os
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

FILE = "model.safetensors"
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    **{f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
}  # fmt: skip


def write(folder: pathlib.Path, arrays: Mapping[str, np.ndarray], texts: Mapping[str, str], who: str) -> None:
    """`model.safetensors` and the text files, into a folder that has no such file yet.

    Raises: FileExistsError where it has; ImportError without safetensors; OSError when the disk refuses."""
    library = _safetensors(who)
    names = [FILE, *texts]
    if taken := [name for name in names if (folder / name).exists()]:
        raise FileExistsError(
            f"{who}: {folder / taken[0]} is there already, and is not written over. Give a new folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    hidden = {name: folder / f".writing-{name}" for name in names}
    try:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        library.numpy.save_file(contiguous, hidden[FILE], metadata={"format": "pt"})
        for name, text in texts.items():
            hidden[name].write_text(text)
        for name in names:
            os.replace(hidden[name], folder / name)
    finally:
        for path in hidden.values():
            path.unlink(missing_ok=True)


def read(folder: pathlib.Path, who: str) -> dict[str, np.ndarray]:
    """The arrays of `model.safetensors`, or of the files that `model.safetensors.index.json` names.

    Raises: ValueError for files that are not there or damaged, and dtypes that ml_dtypes does not know."""
    index = folder / f"{FILE}.index.json"
    files = [FILE]
    if index.is_file() and not (folder / FILE).is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{who}: {index} does not say which files there are ({error!r}).") from error
    arrays = {}
    for name in files:
        arrays |= _read_one(folder / name, who)
    return arrays


def _read_one(path: pathlib.Path, who: str) -> dict[str, np.ndarray]:
    library = _safetensors(who)
    try:
        found = library.deserialize(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{who}: there is no {path}. Give the folder that holds {FILE}.") from None
    except library.SafetensorError as error:
        raise ValueError(f"{who}: {path} is no safetensors file, or damaged: {error}.") from error
    arrays = {}
    for name, entry in found:
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{who}: {name} in {path} is of the dtype {entry['dtype']}, which is not read here.")
        arrays[name] = np.frombuffer(bytes(entry["data"]), _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def _safetensors(who: str):
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(f"{who} writes and reads with safetensors: pip install 'lowbit_jax[export]'.") from error
    return safetensors
