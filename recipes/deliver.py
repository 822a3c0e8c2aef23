"""What a finished run hands over: held-out loss, packed weights and their size, their text, curves, results.json."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowbit_jax as lb
from recipes import checkpoints, display, keys, orbax_errors, plots, run_directory, sampling, text, train_loop


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What to make at the end; checked before hours of training go into it."""

    corpus: text.Corpus
    plan: train_loop.Plan
    prompt: np.ndarray
    sample_tokens: int
    temperature: float
    seed: int
    title: str
    started: float  # by time.monotonic

    @classmethod
    def of(cls, config, corpus: text.Corpus, plan: train_loop.Plan, *, started: float) -> "Delivery":
        corpus.check(plan.context, plan.batch)
        plots.check()
        prompt = corpus.validation[:12] if config.prompt is None else corpus.tokenizer.encode(config.prompt)
        sampling.check(prompt, config.sample_tokens, config.temperature, corpus.tokenizer.vocab_size)
        return cls(corpus=corpus, plan=plan, prompt=prompt, sample_tokens=config.sample_tokens, seed=config.seed,
                   temperature=config.temperature, title=f"{config.preset}, {corpus.note}",
                   started=started)  # fmt: skip

    def make(self, folder: pathlib.Path, runs: dict[str, train_loop.Trained],
             stop: run_directory.StopRequest | None = None) -> dict:  # fmt: skip
        """Prints the tables and writes the files; answers with what `results.json` holds.

        Raises: Stopped between two of its parts when a signal asks for it."""
        answer = {"text": self.corpus.note, "steps": self.plan.steps, "runs": {}}
        twin = runs.get("unquantized")
        for name, run in runs.items():
            entry = {
                "validation_loss": run.validation_loss,
                "bits_per_byte": bits_per_byte(run.validation_loss, self.corpus),
            }
            entry |= {"tokens_per_second": run.tokens_per_second, "skipped_steps": run.skipped}
            if twin is not None and run is not twin:
                entry["above_unquantized"] = run.validation_loss - twin.validation_loss
            answer["runs"][name] = entry
        answer["unigram_entropy"] = unigram_entropy(self.corpus)
        name, run = list(runs.items())[-1]
        model = run.model
        if name != "unquantized":
            _stop_if_asked(stop, "its weights were packed")
            packed = _convert(run.model)
            answer["packed"] = save_both(folder, run.model, packed, then=self.goes_on(folder / name))
            _stop_if_asked(stop, "the packed weights were evaluated")
            model = load(folder / "packed", packed)
            answer["packed"]["validation_loss"] = loss = self.held_out_loss(model)
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"deliver: the packed model's held-out loss is {loss}, and the trained one's {run.validation_loss}."
                    " Pack with more bits, or keep the layers at fault out by --rules."
                )
        _stop_if_asked(stop, "a sample was written")
        ids = sampling.generate(model, self.prompt, tokens=self.sample_tokens, context=self.plan.context,
                                temperature=self.temperature, vocab_size=self.corpus.tokenizer.vocab_size,
                                key=jax.random.key(self.seed))  # fmt: skip
        _stop_if_asked(stop, "the results were written")
        answer["sample"] = self.corpus.tokenizer.decode(ids)
        answer["seconds"] = round(time.monotonic() - self.started, 1)
        (folder / "results.json").write_text(json.dumps(answer, indent=1))
        plots.curves(folder / "curves.png", {name: run.lines for name, run in runs.items()}, title=self.title)
        show(answer, folder)
        return answer

    def goes_on(self, folder: pathlib.Path) -> str:
        """Where the same command again takes up a training whose last checkpoints the disk may have refused."""
        saved = checkpoints.Checkpoints(folder / "checkpoints").steps()
        if self.plan.steps in saved:
            return "the training is done and its checkpoint is kept"
        return f"it trains on from the checkpoint of step {saved[-1]}" if saved else "it trains anew, none was saved"

    def held_out_loss(self, model: nnx.Module) -> float:
        plan = self.plan
        batches = text.fixed_batches(
            self.corpus.validation, context=plan.context, batch=plan.batch, windows=plan.validation_windows
        )
        return train_loop.evaluate(model, batches)


def _stop_if_asked(stop: run_directory.StopRequest | None, before: str) -> None:
    if stop is not None and stop.signal is not None:
        raise train_loop.Stopped(
            f"The run is trained, and was stopped before {before}; the same command does what is left.", stop.signal
        )


_convert = nnx.jit(lb.convert)


def bits_per_byte(loss: float, corpus: text.Corpus) -> float | None:
    """loss / ln 2 / (bytes of text a token); a byte tokenizer counts each document's end as one byte."""
    return loss / math.log(2) / corpus.bytes_per_token if corpus.bytes_per_token else None


def unigram_entropy(corpus: text.Corpus) -> float:
    """Nats a token of the best model that ignores the context: held-out tokens coded with the training frequencies."""
    size = corpus.tokenizer.vocab_size
    sample = corpus.train[: 1 << 26]
    seen = np.bincount(sample, minlength=size) + 1.0
    held = np.bincount(corpus.validation[: 1 << 26], minlength=size)
    return float(-(held * np.log(seen / seen.sum())).sum() / held.sum())


def save_both(folder: pathlib.Path, trained: Any, packed: Any, *, then: str) -> dict:
    """Writes the float weights and the packed ones as checkpoints; answers with their sizes in bytes.

    then: what the same command again does, for the error."""
    sizes = {}
    for name, model in {"float": trained, "packed": packed}.items():
        final, hidden = folder / name, folder / f".writing-{name}"
        for path in (hidden, final):
            shutil.rmtree(path, ignore_errors=True)
        hidden.mkdir()
        state = keys.as_numbers(nnx.state(model))
        try:
            checkpoints.write(hidden, state, alone=True)
            os.rename(hidden, final)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            shutil.rmtree(hidden, ignore_errors=True)
            orbax_errors.raise_if_not_the_disks(error)
            raise OSError(
                f"deliver: the {name} weights could not be written to {final}: {orbax_errors.reason(error)}. Free space"
                f" and run the same command again: {then}."
            ) from error
        sizes |= {
            f"{name}_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
            f"{name}_on_disk": checkpoints.size_on_disk(final),
        }
    blocks = {name: nnx.state(model.blocks) for name, model in {"float": trained, "packed": packed}.items()}
    for name, state in blocks.items():
        sizes[f"{name}_block_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return sizes


def load(folder: pathlib.Path, like: Any) -> Any:
    """The model `like` with the arrays that `save_both` wrote: every checksum and every packed tensor is checked.

    Raises: ValueError for files or packed weights that are damaged, or of another model."""
    graph, state = nnx.split(like)
    try:
        found, _ = checkpoints.read(folder, keys.as_numbers(state))
        state = keys.from_numbers(found, state)
        for tensor in jax.tree.leaves(state, is_leaf=_checks_itself):
            if _checks_itself(tensor):
                tensor.validate()
    except checkpoints.OtherStructure as error:
        raise ValueError(
            f"deliver: {folder} {error.difference}. Its run.json was changed, or is another run's. Put the old one"
            " back, or run the command of the run again, which writes both anew."
        ) from error
    except (checkpoints.CorruptCheckpoint, ValueError) as error:
        raise ValueError(
            f"deliver: the weights in {folder} are damaged: {str(error).rstrip('.')}. Run the same command again: it"
            " writes them anew."
        ) from error
    return nnx.merge(graph, jax.tree.map(jnp.asarray, state))


def _checks_itself(leaf: Any) -> bool:
    return isinstance(leaf, lb.QTensor) and hasattr(leaf, "validate")


def show(answer: dict, folder: pathlib.Path) -> None:
    columns = ["run", "nats a token", "bits a byte", "above unquantized", "tokens/s", "skipped steps"]
    rows = []
    for name, run in answer["runs"].items():
        numbers = [run["validation_loss"], run["bits_per_byte"], run.get("above_unquantized"), run["tokens_per_second"]]
        formats = ["{:.4f}", "{:.4f}", "{:+.4f}", "{:,.0f}"]
        numbers[-1] = numbers[-1] or None  # a run that had nothing left to do measured no speed
        cells = ["-" if n is None else form.format(n) for form, n in zip(formats, numbers, strict=True)]
        rows.append([name, *cells, str(run["skipped_steps"])])
    by_frequency = f"guessing by frequency alone: {answer['unigram_entropy']:.4f} nats"
    display.table(f"Held-out loss after {answer['steps']} steps ({by_frequency})", columns, rows)
    if packed := answer.get("packed"):
        rows = []
        for part, key in (("blocks", "block_bytes"), ("whole model", "bytes"), ("whole model on disk", "on_disk")):
            before, after = packed[f"float_{key}"], packed[f"packed_{key}"]
            rows.append([part, display.size(before), display.size(after), f"{before / after:.2f}x"])
        display.table("Weights", ["", "float", "packed", "smaller"], rows)
        print(f"held-out loss of the packed model: {packed['validation_loss']:.4f} nats a token")
    print(f"\nWritten by the {'packed' if packed else 'trained'} model:\n{display.printable(answer['sample'])}\n")
    curves = folder / "curves.png"
    print(f"{f'curves: {curves}; ' if curves.exists() else ''}numbers: {folder / 'results.json'}")
    print(f"wall time of this command, without imports: {display.clock(answer['seconds'])}")
