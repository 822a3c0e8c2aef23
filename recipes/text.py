"""Where the text comes from: one corpus of token ids with a held-out part, and endless batches of it through grain.

`data` is "stdlib" (the source text of the running Python's standard library: some 11 MB on every machine), a text
file, a folder, a pre-tokenized `.bin`, or "hf:<dataset>". Nothing here depends on time, thread or machine: the same
data, tokenizer and seed give the same batches, and an iterator's state is one small JSON value."""

import dataclasses
import hashlib
import itertools
import math
import os
import pathlib
import sysconfig
from collections.abc import Iterator

import grain
import numpy as np

from recipes import token_files, tokenizers

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}
EVERY_FILE = "**/*"  # of a folder, at any depth
HF_BYTES = 64_000_000  # how much of a Hugging Face dataset is read unless told


@dataclasses.dataclass(frozen=True)
class Corpus:
    train: np.ndarray
    validation: np.ndarray
    tokenizer: tokenizers.Tokenizer
    bytes_per_token: float | None  # of the held-out text; None when only ids are known
    note: str  # where it came from, in words
    fingerprint: str
    vocabulary: int | None = None  # of a model that is there already

    @property
    def vocab_size(self) -> int:
        """Of the model: the tokenizer's, rounded up to a multiple of 128 as the QuEST runs do (50257 -> 50304), unless
        the model has its own."""
        return -(-self.tokenizer.vocab_size // 128) * 128 if self.vocabulary is None else self.vocabulary

    def of_model(self, vocabulary: int) -> "Corpus":
        """The same for a model with that vocabulary. Raises: ValueError where the tokenizer has more ids."""
        if self.tokenizer.vocab_size > vocabulary:
            raise ValueError(
                f"recipes.text: {self.note} has {self.tokenizer.vocab_size} different ids, and the model {vocabulary}."
                " Pass the --tokenizer that the model was trained with."
            )
        return dataclasses.replace(self, vocabulary=vocabulary)

    def sample(self, context: int, batch: int) -> np.ndarray:
        """The first `batch` inputs of the training text, for calibration."""
        self.check(context, batch)
        windows = Windows(self.train, context)
        return np.stack([windows[i][:-1] for i in range(batch)])

    def check(self, context: int, batch: int) -> None:
        for name, tokens, windows in (("training", self.train, batch), ("held-out", self.validation, 1)):
            if len(tokens) < windows * context + 1:
                other = "--batch or --held-out" if name == "training" else "raise --held-out"
                raise ValueError(
                    f"The {name} part of {self.note} has {len(tokens)} tokens; {windows} sequences of {context} need"
                    f" {windows * context + 1}. Give more text, or lower --context, {other}."
                )


def load(data: str = "stdlib", *, tokenizer: str = "bytes", held_out: float = 0.05, glob: str | None = None,
         hf_bytes: int | None = None) -> Corpus:  # fmt: skip
    """Reads, tokenizes and splits. Raises: ValueError for what is missing, empty, unreadable or not text."""
    if not 0 < held_out < 1:
        raise ValueError(f"recipes.text: the held-out share must lie between 0 and 1, not {held_out}.")
    path = pathlib.Path(data).expanduser()
    if glob is not None and not path.is_dir():
        raise ValueError(f"recipes.text: the glob {glob!r} chooses files of a folder, and {data!r} is none.")
    if hf_bytes is not None and not data.startswith("hf:"):
        raise ValueError(f"recipes.text: hf_bytes limits a 'hf:' dataset, and {data!r} is none.")
    tokens = tokenizers.load(tokenizer)
    if path.suffix == ".bin" and not path.is_dir():
        return _from_tokens(path, tokens, held_out)
    if tokens is None:
        raise ValueError(f"recipes.text: the tokenizer 'ids' belongs to a .bin file, and {data!r} is text.")
    documents = list(_documents(data, path, glob, hf_bytes))
    if not any(documents):
        raise ValueError(f"recipes.text: {data!r} holds no text ({len(documents)} empty documents).")
    kept, held = _split(documents, held_out)
    train, validation = _join(kept, tokens), _join(held, tokens)
    held_bytes = sum(len(document.encode()) + (tokens.separator is not None) for document in held)
    fingerprint = hashlib.sha256(train.tobytes() + b"|" + validation.tobytes()).hexdigest()
    note = f"{_shown(data)} ({len(documents)} documents, {sum(map(len, documents)):,} characters)"
    return Corpus(train, validation, tokens, held_bytes / max(1, len(validation)), note, fingerprint)


def batches(tokens: np.ndarray, *, context: int, batch: int, seed: int) -> grain.DatasetIterator:
    """Endless int32 batches (batch, context + 1), shuffled anew each epoch; `get_state` and `set_state` resume it."""
    windows = (
        grain.MapDataset.source(Windows(tokens, context)).seed(seed).shuffle().repeat(None, reseed_each_epoch=True)
    )
    # No remainder ever comes; grain counts batches with one in floats, which overflow for batches of 1.
    return iter(windows.batch(batch, drop_remainder=True).to_iter_dataset())


def fixed_batches(tokens: np.ndarray, *, context: int, batch: int, windows: int) -> list[np.ndarray]:
    """At most `windows` sequences spread evenly over `tokens`, in full batches where there are enough."""
    source = Windows(tokens, context)
    count = min(windows, len(source))
    batch = min(batch, count)
    chosen = np.linspace(0, len(source) - 1, count // batch * batch).astype(int)
    return [np.stack([source[i] for i in group]) for group in chosen.reshape(-1, batch)]


class Windows(grain.sources.RandomAccessDataSource):
    """Sequence i is tokens[i * context : (i + 1) * context + 1]: inputs, and the same moved on by one as targets."""

    def __init__(self, tokens: np.ndarray, context: int):
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index) -> np.ndarray:
        start = int(index) * self.context
        return np.asarray(self.tokens[start : start + self.context + 1]).astype(np.int32)


def _documents(data: str, path: pathlib.Path, glob: str | None, hf_bytes: int | None) -> Iterator[str]:
    if data == "stdlib":
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        files = (file for file in root.rglob("*.py") if SKIPPED.isdisjoint(file.relative_to(root).parts))
        return _read_all(root, sorted(files, key=lambda file: file.relative_to(root).as_posix()), "**/*.py")
    if data.startswith("hf:"):
        return _hugging_face(data.removeprefix("hf:"), hf_bytes or HF_BYTES)
    if path.is_dir():
        pattern = EVERY_FILE if glob is None else glob
        return _read_all(path, _matching(path, pattern), pattern)
    if path.is_file():
        return iter([_read(path)])
    raise ValueError(
        f"recipes.text: {data!r} is not 'stdlib', 'hf:<dataset>', or a file or folder on this machine. Check the path."
    )


def _shown(name: str | pathlib.Path) -> str:
    """A file's name that can be printed: bytes that are not UTF-8 as \\xff."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _read(file: pathlib.Path) -> str:
    try:
        return file.read_bytes().decode()
    except OSError as error:
        raise ValueError(f"recipes.text cannot read {_shown(file)}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"recipes.text: {_shown(file)} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}."
            " Convert it (iconv -t utf-8), or leave it out with --glob."
        ) from error


def _matching(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    """The files that `pattern` chooses, in the order of their names; without those whose name starts with a dot."""
    try:
        files = [file for file in folder.glob(pattern) if file.is_file() and not file.name.startswith(".")]
    except (ValueError, NotImplementedError) as error:  # pathlib's words for an empty and an absolute one
        raise ValueError(
            f"recipes.text: the glob {pattern!r} is no pattern of paths in a folder: {error}. It looks like '*.txt' or"
            " '**/*.md'."
        ) from error
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _read_all(folder: pathlib.Path, files: list[pathlib.Path], pattern: str) -> Iterator[str]:
    """Every file that is UTF-8; stops when more than one in twenty is not."""
    if not files:
        raise ValueError(
            f"recipes.text found no file in {_shown(folder)} that fits {pattern!r} and whose name does not start with a"
            " dot. Check the folder, or pass another --glob."
        )
    broken = []
    for file in files:
        try:
            yield _read(file)
        except ValueError as error:
            broken.append(str(error))
            if len(broken) > max(1, len(files) // 20):
                raise ValueError(
                    f"{error} ({len(broken)} of {len(files)} files so far; more than one in twenty.)"
                ) from error
    if broken:
        print(f"recipes.text left out {len(broken)} of {len(files)} files; the first: {broken[0]}")


def _hugging_face(name: str, limit: int) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"The data hf:{name} needs the package `datasets`: pip install 'lowbit_jax[recipes,hf]'."
        ) from error
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        first = next(iter(rows), None)
    except Exception as error:  # the package raises many kinds
        raise ValueError(
            f"recipes.text cannot load the dataset {name!r}: {type(error).__name__}: {error}. Check the name and the"
            " network, or pass a file."
        ) from error
    if first is None:
        raise ValueError(f"recipes.text: the dataset {name!r} has no rows. Pass another one, or a file.")
    if "text" not in first or not isinstance(first["text"], str | None):
        raise ValueError(
            f"recipes.text reads the column 'text'; {name!r} has {', '.join(first)}. Save it as text files."
        )
    total = 0
    for row in rows:
        if row["text"] is None:  # a row without one
            continue
        yield row["text"]
        total += len(row["text"].encode())
        if total >= limit:
            return


def _split(documents: list[str], held_out: float) -> tuple[list[str], list[str]]:
    """Whole documents where there are twenty or more, else the end of the text.

    Where the last of those documents would double the share held out, or leave half of the rest or less for training,
    only its end is held out."""
    sizes = [len(document) for document in documents]
    if len(documents) < 20:
        text = "".join(documents) if len(documents) == 1 else "\n".join(documents)
        cut = round(len(text) * (1 - held_out))
        return [text[:cut]], [text[cut:]]
    order = np.random.default_rng(0).permutation(len(documents))
    reached = list(itertools.accumulate(sizes[i] for i in order))
    total, asked = reached[-1], held_out * reached[-1]
    count = next(i for i, size in enumerate(reached) if size >= asked) + 1
    kept, held = [documents[i] for i in order[count:]], [documents[i] for i in order[:count]]
    if reached[count - 1] > 2 * asked or total - reached[count - 1] < (total - asked) / 2:
        last, cut = held[-1], math.floor(reached[count - 1] - asked)
        kept, held[-1] = [last[:cut], *kept], last[cut:]
    return kept, held


def _join(documents: list[str], tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    dtype = np.uint8 if tokenizer.vocab_size <= 2**8 else np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end = [] if tokenizer.separator is None else [np.asarray([tokenizer.separator], dtype)]
    parts = [part for document in documents for part in (_checked(tokenizer, document).astype(dtype), *end)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _checked(tokenizer: tokenizers.Tokenizer, document: str) -> np.ndarray:
    """The document's ids; a smaller dtype would wrap one beyond the vocabulary into another token."""
    ids = tokenizer.encode(document)
    if ids.size and ids.max() >= tokenizer.vocab_size:
        raise ValueError(
            f"recipes.text: the tokenizer {tokenizer.name!r} wrote the id {ids.max()}, and its vocabulary has"
            f" {tokenizer.vocab_size}. Repair it, or pass another --tokenizer."
        )
    return ids


def _from_tokens(path: pathlib.Path, chosen: tokenizers.Tokenizer | None, held_out: float) -> Corpus:
    ids, index = token_files.read(path)
    vocab_size = index["vocab_size"]
    tokenizer: tokenizers.Tokenizer = chosen or tokenizers.Ids(vocab_size)
    if vocab_size > tokenizer.vocab_size:
        raise ValueError(
            f"recipes.text: {path} has a vocabulary of {vocab_size} and the tokenizer {tokenizer.name!r} one of"
            f" {tokenizer.vocab_size}. Pass the --tokenizer that wrote it, or --tokenizer ids."
        )
    cut = round(len(ids) * (1 - held_out))
    per_token = index["bytes"] / len(ids) if index.get("bytes") and len(ids) else None
    note = f"{_shown(path)} ({len(ids):,} tokens)"
    return Corpus(ids[:cut], ids[cut:], tokenizer, per_token, note, token_files.fingerprint(path))
