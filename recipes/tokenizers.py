"""Text to token ids and back: plain bytes, a `tokenizer.json`, or bare ids for data that comes tokenized."""

import pathlib
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def separator(self) -> int | None:
        """The id written after each document."""
        ...

    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: np.ndarray) -> str: ...


class Bytes:
    """The 256 bytes of UTF-8; byte 0, which text files do not hold, ends a document."""

    name, vocab_size, separator = "bytes", 256, 0

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: np.ndarray) -> str:
        return bytes(np.asarray(ids).astype(np.uint8)).decode(errors="replace")


class TokenizerFile:
    """A Hugging Face `tokenizer.json`. The end-of-text token, where there is one, ends a document."""

    def __init__(self, path: pathlib.Path):
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "A tokenizer.json needs the package `tokenizers`: pip install 'lowbit_jax[recipes]'."
            ) from error
        try:
            self.inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"recipes.tokenizers cannot read {path} as a tokenizer.json: {error}.") from error
        self.inner.no_truncation()  # a document is read whole, whatever length the file was made for
        self.inner.no_padding()
        self.name = path.name
        self.vocab_size = max(self.inner.get_vocab().values(), default=-1) + 1  # ids may have gaps
        ends = (self.inner.token_to_id(name) for name in ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"))
        self.separator = next((token for token in ends if token is not None), None)

    def encode(self, text: str) -> np.ndarray:
        try:
            return np.asarray(self.inner.encode(text, add_special_tokens=False).ids, np.uint32)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(
                f"recipes.tokenizers: {self.name} cannot encode the text that starts with {text[:40]!r}: {error}."
                " Repair the file, or pass another --tokenizer."
            ) from error

    def decode(self, ids: np.ndarray) -> str:
        return self.inner.decode([int(token) for token in ids])


class Ids:
    """For tokenized data without its tokenizer: a text is written as numbers."""

    name, separator = "ids", None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> np.ndarray:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError:
            raise ValueError(
                f"The tokenizer 'ids' reads numbers, not text such as {text[:40]!r}; pass a prompt of token ids."
            ) from None
        if outside := [token for token in ids if not 0 <= token < self.vocab_size]:
            raise ValueError(
                f"The tokenizer 'ids' has ids from 0 to {self.vocab_size - 1}, not {outside[0]}; pass a prompt of them."
            )
        return np.asarray(ids, np.uint32)

    def decode(self, ids: np.ndarray) -> str:
        return " ".join(str(int(token)) for token in ids)


def load(name: str) -> Tokenizer | None:
    """The tokenizer of that name or path; None for "ids", whose size only the data knows."""
    if name == "bytes":
        return Bytes()
    if name == "ids":
        return None
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
        raise ValueError(
            f"recipes.tokenizers: {name!r} is neither 'bytes', 'ids' nor a tokenizer.json on this machine."
        )
    return TokenizerFile(path)
