"""Pretrain a Llama-type model with low-bit weights and activations on real text, to packed weights that write text.

    python -m recipes.pretrain                          # tiny, QuEST W4A4, Python's own source, minutes on 2 cores
    python -m recipes.pretrain --baseline               # the unquantized twin as well
    python -m recipes.pretrain --bits 1 --preset 30M --data hf:allenai/c4 --tokenizer tokenizer.json

The same command again goes on where a killed run stopped. Paper: Panferov et al. 2025, arXiv:2502.05003 (QuEST)."""

import dataclasses
import pathlib
from typing import Literal

from recipes import command, deliver, llama, run_directory, schemes, text, train_loop

NOT_NUMBERS = {"numbers": False}  # metadata: this setting changes no number, or is compared in another form


def free(default):
    """A setting in which two runs of one directory may differ."""
    return dataclasses.field(default=default, metadata=NOT_NUMBERS)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pretrain:
    preset: str = free("tiny")
    """smoke (seconds), tiny, 30M, 50M, 100M, 200M, 430M, 800M, 1.6B or 3.2B."""
    method: str = free("quest")
    """A name of lb.methods.names(), or none."""
    bits: Literal[1, 2, 3, 4, 5, 6, 7, 8, "e2m1"] | None = free(None)
    """Width of weights and activations; 4 unless given."""
    weight_only: bool = False
    """Keep activations in high precision."""
    rules: tuple[str, ...] = ()
    """More (pattern=method:bits or pattern=none), tried before the rest, e.g. blocks/mlp/down=quest:8."""
    data: str = free("stdlib")
    """stdlib, a text file, a folder, tokens.bin, or hf:<dataset>."""
    tokenizer: str = free("bytes")
    """bytes, the path of a tokenizer.json, or ids."""
    glob: str | None = free(None)
    """Which files of a folder."""
    hf_bytes: int | None = free(None)
    """How much of a Hugging Face dataset is read; 64 MB unless given."""
    held_out: float = 0.05
    """Share of the text kept for validation."""
    steps: int | None = free(None)
    batch: int | None = free(None)
    context: int | None = free(None)
    learning_rate: float | None = free(None)
    weight_decay: float = 0.1
    microbatches: int = 1
    """Cuts a batch into parts that are computed one after another, in less memory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations; auto takes bfloat16 on accelerators."""
    remat: bool = False
    """Recompute each layer in the backward pass, in less memory."""
    seed: int = 0
    baseline: bool = free(False)
    """Train the unquantized twin too."""
    out: pathlib.Path | None = free(None)
    """Run directory; named after the settings unless given."""
    evaluate_every: int = 100
    checkpoint_every: int = free(50)
    keep: int = free(2)
    """Checkpoints kept."""
    log_every: int = free(10)
    tensorboard: bool = free(True)
    prompt: str | None = free(None)
    """What the sample goes on from; the first words of the held-out text unless given."""
    sample_tokens: int = free(200)
    temperature: float = free(0.7)


def main(config: Pretrain) -> dict:
    """Trains, evaluates, packs and samples; answers with the numbers that `results.json` holds."""
    size = llama.preset(config.preset, steps=config.steps, batch=config.batch, context=config.context,
                        learning_rate=config.learning_rate)  # fmt: skip
    scheme = schemes.Scheme(method=config.method, bits=config.bits, weight_only=config.weight_only, rules=config.rules)
    if scheme.name == "none" and config.baseline:
        raise ValueError("pretrain: method 'none' is the unquantized model, so --baseline cannot take effect.")
    plan = train_loop.Plan.of(size, config)
    corpus = text.load(config.data, tokenizer=config.tokenizer, held_out=config.held_out, glob=config.glob,
                       hf_bytes=config.hf_bytes)  # fmt: skip
    delivery = deliver.Delivery.of(config, corpus, plan)
    settings = run_directory.fields_that_matter(
        config, text=corpus.fingerprint, vocabulary=corpus.vocab_size, scheme=scheme.name, **dataclasses.asdict(size)
    )
    folder = config.out or pathlib.Path("runs") / f"{config.preset}-{scheme.name}-{run_directory.short_hash(settings)}"

    def new_model() -> llama.Llama:
        return llama.build(size, corpus.vocab_size, dtype=config.dtype, remat=config.remat, seed=config.seed)

    with run_directory.locked(folder), run_directory.StopRequest() as stop:
        run_directory.claim(folder, settings)
        print(f"{config.preset}: {size.block_params:,} parameters in the blocks")
        print(f"{size.steps} steps of {size.batch} x {size.context} tokens from {corpus.note}; run directory: {folder}")
        runs = {}
        if config.baseline or scheme.name == "none":
            runs["unquantized"] = train_loop.train("unquantized", new_model(), corpus, plan, folder, stop)
        if scheme.name != "none":
            model = scheme.apply(new_model(), corpus.sample(size.context, size.batch))
            runs[scheme.name] = train_loop.train(scheme.name, model, corpus, plan, folder, stop, quantized=True)
        return delivery.make(folder, runs)


if __name__ == "__main__":
    command.run("pretrain", Pretrain, main, __doc__)
