"""Named arrays in a safetensors file, in dtypes that NumPy lacks too; written whole or not at all."""

import json
import os
import pathlib
import shutil
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
    """`model.safetensors` and the text files, as a folder that is there at once and whole, or not at all.

    Raises: FileExistsError where a folder holds files already; ImportError without safetensors; OSError when the disk
    refuses."""
    library, folder = _safetensors(who), folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{who}: {folder} is there already, and is not written over. Give a new folder.")
    hidden = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)  # what a kill left
    hidden.mkdir(parents=True)
    try:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        library.numpy.save_file(contiguous, hidden / FILE, metadata={"format": "pt"})
        for name, text in texts.items():
            (hidden / name).write_text(text, encoding="utf-8")
            shutil.copymode(hidden / name, hidden / FILE)  # the package makes it for its owner alone
        os.replace(hidden, folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def cast(array: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """A floating array in another dtype; integers and booleans stay as they are.

    Raises: ValueError where a finite number would become infinite; `what` names the array."""
    if array.dtype.kind in "iub":
        return array
    with np.errstate(over="ignore"):
        found = array.astype(dtype, copy=False)
    if (np.isfinite(array) & ~np.isfinite(found)).any():
        raise ValueError(f"{what} holds {np.abs(array).max()}, which is infinite in {dtype}. Take float32 or bfloat16.")
    return found


def read(folder: pathlib.Path, who: str) -> dict[str, np.ndarray]:
    """The arrays of `model.safetensors`, or of the files that `model.safetensors.index.json` names.

    Raises: ValueError for files that are not there or damaged, and dtypes that ml_dtypes does not know."""
    index = folder / f"{FILE}.index.json"
    files = [FILE]
    if index.is_file() and not (folder / FILE).is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not files:
                raise ValueError("it names no file")
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
        arrays[name] = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def _safetensors(who: str):
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(f"{who} writes and reads with safetensors: pip install 'lowbit_jax[export]'.") from error
    return safetensors
