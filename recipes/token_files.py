"""Pre-tokenized data: `name.bin` (little-endian uint16 or uint32 ids, nothing else) beside `name.json`, its index.

The index says {"version": 1, "dtype": "uint16", "tokens": 1000, "vocab_size": 50257, "bytes": 4300}; `bytes`, the size
of the text in UTF-8, may be left out, and then bits per byte are not reported."""

import hashlib
import json
import os
import pathlib

import numpy as np
import numpy.typing as npt

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
CHUNK = 1 << 24
MOST_WORDS = 2**31  # whose ids an int32 holds


def write(path: str | os.PathLike, tokens: npt.ArrayLike, *, vocab_size: int, text_bytes: int | None = None) -> None:
    """Both files. Raises: ValueError for another name than `name.bin`, for ids in other than one dimension, and outside
    the vocabulary; TypeError for ids that are no integers."""
    path, ids = pathlib.Path(path), np.asarray(tokens)
    if path.suffix != ".bin":
        raise ValueError(f"token_files.write: {path} is not named .bin. Pass {path.with_suffix('.bin')}, say.")
    if ids.ndim != 1:
        raise ValueError(f"token_files.write: ids of shape {ids.shape}. Give one row of them: ids.reshape(-1).")
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"token_files.write: ids are integers, not {ids.dtype}. Cast them, if they are whole.")
    if not 1 <= vocab_size <= MOST_WORDS:
        raise ValueError(f"token_files.write: a vocabulary of {vocab_size}; 1 to {MOST_WORDS} words can be read back.")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"token_files.write: ids from {ids.min()} to {ids.max()} in a vocabulary of {vocab_size}.")
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    ids.astype(DTYPES[dtype]).tofile(path)
    index = {"version": 1, "dtype": dtype, "tokens": len(ids), "vocab_size": vocab_size, "bytes": text_bytes}
    path.with_suffix(".json").write_text(json.dumps(index))


def read(path: str | os.PathLike) -> tuple[np.ndarray, dict]:
    """The ids, mapped rather than loaded, and the index. Every id is checked against the vocabulary."""
    path = pathlib.Path(path)
    side = path.with_suffix(".json")
    if not path.is_file():
        raise ValueError(f"token_files.read: there is no file {path}.")
    example = '{"version": 1, "dtype": "uint16", "tokens": 1000, "vocab_size": 50257}'
    try:
        index = json.loads(side.read_text())
    except FileNotFoundError:
        raise ValueError(f"token_files.read: {path} has no index. Write {side} such as {example}.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"token_files.read cannot read the index {side}: {error}. It looks like {example}.") from error
    if not isinstance(index, dict):
        raise ValueError(f"token_files.read: the index {side} holds {index!r:.40}; it looks like {example}.")
    missing = [key for key in ("version", "dtype", "tokens", "vocab_size") if key not in index]
    if missing:
        raise ValueError(f"token_files.read: the index {side} lacks {', '.join(missing)}; it looks like {example}.")
    for key, known in (("version", [1]), ("dtype", list(DTYPES))):
        if index[key] not in known:
            raise ValueError(
                f"token_files.read: the index {side} has the {key} {index[key]!r}; known are"
                f" {', '.join(map(repr, known))}. It looks like {example}."
            )
    for key, lowest in (("tokens", 0), ("vocab_size", 1), ("bytes", 0)):
        value = index.get(key)
        if not (key == "bytes" and value is None) and (type(value) is not int or value < lowest):
            raise ValueError(
                f"token_files.read: the index {side} has the {key} {value!r:.40}; it must be a whole number of at least"
                f" {lowest}. It looks like {example}."
            )
    if index["vocab_size"] > MOST_WORDS:
        raise ValueError(
            f"token_files.read: the index {side} has the vocab_size {index['vocab_size']}; ids are read as int32, so it"
            f" can be {MOST_WORDS} (2**31) at most. It looks like {example}."
        )
    dtype = DTYPES[index["dtype"]]
    if path.stat().st_size != index["tokens"] * dtype.itemsize:
        raise ValueError(
            f"token_files.read: {path} has {path.stat().st_size} bytes, and its index promises {index['tokens']} ids of"
            f" {dtype.itemsize} bytes. The file is cut short or the index belongs to another one."
        )
    if not index["tokens"]:
        raise ValueError(f"token_files.read: {path} is empty.")
    ids = np.memmap(path, dtype, mode="r")
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        if chunk.max() >= index["vocab_size"]:
            first = start + int(np.argmax(chunk >= index["vocab_size"]))
            raise ValueError(
                f"token_files.read: {path} holds the id {ids[first]} at position {first}, and its index promises ids"
                f" below {index['vocab_size']}. Correct vocab_size or the dtype in {side}."
            )
    return ids, index


def fingerprint(path: pathlib.Path) -> str:
    """Of the size, the index, and the first and last chunk: enough to notice another file, quick for any size."""
    digest = hashlib.sha256(f"{path.stat().st_size}".encode() + path.with_suffix(".json").read_bytes())
    with path.open("rb") as file:
        digest.update(file.read(CHUNK))
        file.seek(max(0, path.stat().st_size - CHUNK))
        digest.update(file.read(CHUNK))
    return digest.hexdigest()
