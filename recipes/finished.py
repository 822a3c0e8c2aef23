"""A finished run of `recipes.pretrain` as a model and its tokenizer, as its `run.json` says to rebuild them.

    model, codec = finished.load("runs/tiny-quest-w4a4-0123abcd")
    logits = model(codec.encode("import ")[None])  # (1, tokens, vocabulary)

`recipes.sampling.generate` goes on from ids; `python -m recipes.sample` does all of it."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import jax
from flax import nnx

import lowbit_jax as lb
from recipes import deliver, init_from, llama, schemes, text, tokenizers

VERSION = 1
FILE = "run.json"
DTYPES = ("float32", "bfloat16", "float16")


def load(
    run: str | os.PathLike,
    *,
    weights: Literal["packed", "float"] = "packed",
    tokenizer: str | os.PathLike | None = None,
) -> tuple[llama.Llama, tokenizers.Tokenizer]:
    """The model of a finished run, token ids in and logits out, and the tokenizer that it was trained with.

    weights: "float" are those that were trained, in the same quantized computation; a run with the method "none" has no
    others. tokenizer: where its tokenizer.json lies now; the one that ids were made with, for a run on ids.
    Raises: ValueError for what is no run, not finished, of another version or damaged, and for another tokenizer."""
    if weights not in ("packed", "float"):
        raise ValueError(f"finished: the weights are 'packed' or 'float', not {weights!r}.")
    folder = pathlib.Path(run).expanduser()
    description = Description.read(folder)
    codec = description.codec(tokenizer)
    return description.model(folder, weights), codec


def preset(name: str, **changes: Any) -> tuple[llama.LlamaConfig, int | None]:
    """Sizes by the name of a preset, or those of the model of a finished run, by its directory, with its vocabulary;
    with the `changes` that are not None.

    Raises: ValueError for what is neither, and as `llama.LlamaConfig`."""
    folder = pathlib.Path(name).expanduser()
    if name in llama.PRESETS or not (folder / FILE).is_file():
        return llama.preset(name, **changes), None
    description = Description.read(folder)
    told = {key: value for key, value in changes.items() if value is not None}
    return dataclasses.replace(description.model_config, **told), description.vocab_size


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What it takes to use a run: kept as JSON beside its weights."""

    preset: str
    data: str
    model_config: llama.LlamaConfig
    vocab_size: int  # of the model
    scheme: schemes.Scheme
    dtype: str
    param_dtype: str
    layout: str  # of the packed weights, which depends on the machine that packed them
    tokenizer: str  # "bytes", "ids" or an absolute path
    tokenizer_sha256: str | None
    tokenizer_vocab_size: int

    @classmethod
    def of(cls, config: Any, size: llama.LlamaConfig, scheme: schemes.Scheme, corpus: text.Corpus) -> "Description":
        """Of a run that starts now, with the settings of `recipes.pretrain`."""
        built_in = config.tokenizer in ("bytes", "ids")
        path = pathlib.Path(config.tokenizer).expanduser().absolute()
        return cls(
            preset=config.preset, data=config.data, model_config=size, vocab_size=corpus.vocab_size, scheme=scheme,
            dtype=llama.activation_dtype(config.dtype), param_dtype=config.param_dtype, layout=lb.nn.default_layout(),
            tokenizer=config.tokenizer if built_in else str(path), tokenizer_sha256=None if built_in else _sha256(path),
            tokenizer_vocab_size=corpus.tokenizer.vocab_size,
        )  # fmt: skip

    @classmethod
    def of_imported(
        cls, *, name: str, size: llama.LlamaConfig, vocab_size: int, tokenizer: str, codec: tokenizers.Tokenizer
    ) -> "Description":
        """Of a model that was trained elsewhere, in high precision. tokenizer: "ids" or an absolute path."""
        return cls(
            preset=name, data="", model_config=size, vocab_size=vocab_size, scheme=schemes.Scheme(method="none"),
            dtype=llama.activation_dtype("auto"), param_dtype="float32", layout=lb.nn.default_layout(),
            tokenizer=tokenizer, tokenizer_vocab_size=codec.vocab_size,
            tokenizer_sha256=None if tokenizer == "ids" else _sha256(pathlib.Path(tokenizer)),
        )  # fmt: skip

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Description":
        if not folder.is_dir():
            raise ValueError(f"finished: there is no run directory {folder}. Check the path.")
        if not (folder / "config.json").is_file():
            inside = (folder.absolute().parent / "config.json").is_file()
            hint = f"Did you mean {folder.parent}?" if inside else "Pass what recipes.pretrain names as such."
            raise ValueError(f"finished: {folder} is no run directory, it has no config.json. {hint}")
        path = folder / FILE
        try:
            content = json.loads(path.read_text())
            version = content.pop("version")
            if version == VERSION:
                content["model_config"] = llama.LlamaConfig(**content["model_config"])
                scheme = {"options": ()} | content["scheme"]  # which older ones do not have
                lists = {name: tuple(scheme[name]) for name in ("rules", "options")}
                content["scheme"] = schemes.Scheme(**scheme | lists)
                description = cls(**content)
                for part in (description, description.model_config):
                    _check(part)
                return description
        except FileNotFoundError:
            raise ValueError(
                f"finished: {folder} has no {FILE}, which recipes.pretrain writes at its end: the run is not finished,"
                " or older than that file. Run its command again: it trains the steps that are left and packs. (Runs of"
                " recipes.compare keep no weights for use.)"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"finished: {path} is not what recipes.pretrain writes there ({error!r}). Run its command again: it"
                " writes the file anew."
            ) from error
        raise ValueError(
            f"finished: {path} is of version {version!r}, and these recipes read version {VERSION}. Use the recipes"
            " that trained it, or run its command again with these: they pack anew."
        )

    @contextlib.contextmanager
    def of_finished(self, folder: pathlib.Path) -> Iterator[None]:
        """While inside, `folder` is not finished; after it, unless an error passes, it is and says this."""
        path = folder / FILE
        path.unlink(missing_ok=True)
        yield
        replacement = path.with_suffix(".new")
        replacement.write_text(json.dumps({"version": VERSION} | dataclasses.asdict(self), indent=1))
        os.replace(replacement, path)

    def model(self, folder: pathlib.Path, weights: str) -> Any:
        unquantized = self.scheme.method == "none"
        if unquantized and weights == "packed":
            raise ValueError(
                f"finished: {folder} was trained with the method 'none' and has no packed weights. Take the float ones:"
                " --weights float, load(run, weights='float')."
            )
        place = folder / ("unquantized/checkpoints" if unquantized else weights)
        if not place.is_dir():
            raise ValueError(f"finished: {place} is gone. Run the command of the run again: it writes it anew.")
        if unquantized:
            return self._of_last_step(folder / "unquantized")
        pack = lambda model: lb.convert(model, layout=self.layout) if weights == "packed" else model
        return deliver.load(folder / weights, nnx.eval_shape(lambda: pack(self._fresh())))

    def _of_last_step(self, training: pathlib.Path) -> nnx.Module:
        origin, steps = init_from.Origin.of(training), self.model_config.steps
        if origin.step != steps:  # a disk that refused the last one under --on-save-error continue
            raise ValueError(
                f"finished: the newest good checkpoint of {training} is of step {origin.step}, and the run has {steps}."
                " Run its command again: it goes on from there."
            )
        return origin.model(self._fresh())

    def _fresh(self) -> nnx.Module:
        model = self.scheme.quantized(llama.build(self.model_config, self.vocab_size, dtype=self.dtype))
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(self.param_dtype), params), rest)

    def codec(self, moved: str | os.PathLike | None = None) -> tokenizers.Tokenizer:
        if moved is not None and self.tokenizer == "bytes":
            raise ValueError(
                f"finished: the run was trained on bytes, so the tokenizer {str(moved)!r} does not fit it."
            )
        if moved is None and self.tokenizer == "ids":
            return tokenizers.Ids(self.tokenizer_vocab_size)
        if moved is None and self.tokenizer == "bytes":
            return tokenizers.Bytes()
        path = pathlib.Path(self.tokenizer if moved is None else moved).expanduser()
        if not path.is_file():
            raise ValueError(
                f"finished: the tokenizer of the run is not at {path}. Put it back, or say where it is: --tokenizer"
                " tokenizer.json, load(run, tokenizer=...)."
            )
        if self.tokenizer_sha256 not in (None, _sha256(path)):
            raise ValueError(
                f"finished: {path} is not the file that the run was trained with: its ids may mean other words. Pass a"
                f" tokenizer.json whose SHA-256 is {self.tokenizer_sha256}."
            )
        codec = tokenizers.TokenizerFile(path)
        if codec.vocab_size > self.vocab_size:
            raise ValueError(
                f"finished: {path} has a vocabulary of {codec.vocab_size}, and the model one of {self.vocab_size}. Pass"
                " the tokenizer.json that wrote the ids."
            )
        return codec


def _check(part: Any) -> None:
    """Raises: ValueError for a field that holds what no run has there."""
    values = {field.name: (field.type, getattr(part, field.name)) for field in dataclasses.fields(part)}
    for name, (kind, value) in values.items():
        counted = kind is int and type(value) is int and value >= (name != "steps")  # none of an imported model
        measured = kind is float and type(value) in (int, float) and value >= 0
        written = kind is str and type(value) is str and (value in DTYPES or not name.endswith("dtype"))
        if kind in (int, float, str) and not (counted or measured or written):
            raise ValueError(f"{name} {value!r:.40}")


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
