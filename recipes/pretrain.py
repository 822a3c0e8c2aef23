"""Pretrain a Llama-type model with low-bit weights and activations on real text, to packed weights that write text.

    python -m recipes.pretrain                          # tiny, QuEST W4A4, Python's own source, minutes on 2 cores
    python -m recipes.pretrain --baseline               # the unquantized twin as well
    python -m recipes.pretrain --bits 1 --preset 30M --data hf:roneneldan/TinyStories --tokenizer tokenizer.json
    python -m recipes.pretrain --mesh data=2,fsdp=4     # on eight devices

The same command again goes on where a killed run stopped, and `recipes.sample` writes text with a finished one. Paper:
Panferov et al. 2025, arXiv:2502.05003 (QuEST)."""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Literal

import jax
from flax import nnx
from jax.experimental import multihost_utils

import lowbit_jax as lb
from recipes import (
    command,
    deliver,
    finished,
    init_from,
    llama,
    out_of_memory,
    quantized,
    run_directory,
    schemes,
    text,
    train_loop,
)
from recipes.layout import Layout

NOT_NUMBERS = {"numbers": False}  # metadata: this setting changes no number, or is compared in another form


def free(default):
    """A setting in which two runs of one directory may differ."""
    return dataclasses.field(default=default, metadata=NOT_NUMBERS)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pretrain:
    preset: str = free("tiny")
    """smoke (seconds), tiny, 30M, 50M, 100M, 200M, 430M, 800M, 1.6B or 3.2B; or the directory of a finished run, for a
    model of its sizes."""
    method: str = free("quest")
    """A name of lb.methods.names(), or none."""
    bits: Literal[1, 2, 3, 4, 5, 6, 7, 8, "e2m1"] | None = free(None)
    """Width of weights and activations, for methods that have one; the method's default, 4 for most, unless given."""
    weight_only: bool = False
    """Keep activations in high precision."""
    backward: Literal[8] | None = free(None)
    """Width of the gradients in the backward products, which then multiply integers; --dtype's unless given."""
    options: tuple[str, ...] = free(())
    """More arguments of the method, as name=value, e.g. scaling=row of fp8, format=mxfp4 of block_scaled."""
    rules: tuple[str, ...] = ()
    """More (pattern=method:bits or pattern=none), tried before the rest, e.g. blocks/mlp/down=quest:8."""
    data: str = free("stdlib")
    """stdlib, a text file, a folder, tokens.bin with tokens.json beside it, or hf:<dataset> (the extra hf)."""
    tokenizer: str = free("bytes")
    """bytes, the path of a tokenizer.json, or ids."""
    glob: str | None = free(None)
    """Which files of a folder: '*.txt' for those right in it, '**/*.md' for those at any depth; all at any depth
    ('**/*') unless given. Files whose name starts with a dot are left out."""
    hf_bytes: int | None = free(None)
    """How much of a Hugging Face dataset is read; 64 MB unless given."""
    held_out: float = 0.05
    """Share of the text kept for validation."""
    steps: int | None = free(None)
    batch: int | None = free(None)
    context: int | None = free(None)
    learning_rate: float | None = free(None)
    weight_decay: float = 0.1
    microbatches: int | Literal["auto"] = 1
    """Cuts a batch into parts that are computed one after another, in less memory; auto: the fewest that fit."""
    memory_budget: str | None = free(None)
    """For --microbatches auto: memory of a device that a step may take, such as 2GB; by default 0.9 of all."""
    batch_ramp: str | None = None
    """Smaller batches at first: 4x100,8x200 takes 4 sequences for 100 steps, 8 for 200, then --batch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of activations; auto takes bfloat16 on accelerators. float16 comes with a dynamic loss scale."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the stored parameters; bfloat16 is updated by stochastic rounding, without a float32 copy."""
    optimizer_bits: Literal[8, 4, "e4m3", "coat"] | None = None
    """Of the optimizer's moments; float32 unless given."""
    remat: Literal["none", "full", "products", "codes"] = "none"
    """What the backward pass computes again instead of keeping it: nothing; each layer; all but its products; all
    but the codes, scales and masks of its quantized operands."""
    attention: Literal["auto", "cudnn", "xla"] = free("auto")
    """cuDNN's flash attention, or XLA's, which writes the scores to memory; auto takes cuDNN on a GPU it serves."""
    unroll: bool | None = free(None)
    """Compile each layer by itself: slower to compile, faster to run. By default on one GPU without --remat."""
    mesh: str | None = free(None)
    """Devices as data=2,fsdp=2,tensor=2: data and fsdp cut the batch, fsdp and tensor the weights; one may be -1."""
    gather: Literal["float", "packed"] = free("float")
    """How weights cut over fsdp travel: as they are, or as the packed codes that their layers compute with."""
    reduce: Literal["float", "int8", "int4"] = "float"
    """How gradients travel over data and fsdp."""
    compress: Literal["int8", "int4", "sign"] | None = None
    """Gradients over data in few bits, with error feedback."""
    offload_optimizer: bool = free(False)
    """Keep the optimizer's state in the host's memory between steps."""
    coordinator: str | None = free(None)
    """host:port of process 0, where several processes run this command together, each with its own --process."""
    processes: int | None = free(None)
    """How many there are."""
    process: int | None = free(None)
    """Which one this is, from 0."""
    seed: int = 0
    """Of the first weights, the batches and the sample; stochastic roundings draw the same keys for all."""
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
    init_from: pathlib.Path | None = free(None)
    """Start from the newest checkpoint of another run: its directory, or RUN/quest-w4a4 where it holds several."""
    skip_spikes: float | None = free(None)
    """Skip steps whose loss or gradient norm is so many standard deviations above the recent ones, such as 6."""
    on_save_error: Literal["stop", "continue"] = free("stop")
    """What a disk that refuses a checkpoint does: end the run, or cost only that checkpoint."""
    prompt: str | None = free(None)
    """What the sample goes on from, of which the model reads the last --context tokens; the first words of the held-out
    text unless given."""
    sample_tokens: int = free(200)
    temperature: float = free(0.7)


def main(config: Pretrain) -> dict:
    """Trains, evaluates, packs and samples; answers with the numbers that `results.json` holds."""
    started = time.monotonic()
    if (config.coordinator, config.processes, config.process) != (None, None, None):
        lb.parallel.start(config.coordinator, config.processes, config.process)
    size, vocabulary = finished.preset(config.preset, steps=config.steps, batch=config.batch, context=config.context,
                                       learning_rate=config.learning_rate)  # fmt: skip
    if vocabulary is not None and size.steps == 0:
        raise ValueError(f"pretrain: {config.preset} was imported and has no number of steps. Pass --steps, and a"
                         " --learning-rate and a --batch that suit it.")  # fmt: skip
    scheme = schemes.Scheme(method=config.method, bits=config.bits, weight_only=config.weight_only, rules=config.rules,
                            backward=config.backward, options=config.options)  # fmt: skip
    if scheme.name == "none" and config.baseline:
        raise ValueError("pretrain: method 'none' is the unquantized model, so --baseline cannot take effect.")
    plan = train_loop.Plan.of(size, config)
    layout = layout_of(config)
    corpus = text.load(config.data, tokenizer=config.tokenizer, held_out=config.held_out, glob=config.glob,
                       hf_bytes=config.hf_bytes)  # fmt: skip
    corpus = corpus if vocabulary is None else corpus.of_model(vocabulary)
    delivery = deliver.Delivery.of(config, corpus, plan, started=started)
    description = finished.Description.of(config, size, scheme, corpus)
    settings = settings_of(config, size, scheme, corpus)
    named = f"{pathlib.Path(config.preset).name}-{scheme.name}-{run_directory.short_hash(settings)}"
    folder = pathlib.Path("runs") / named if config.out is None else config.out.expanduser()

    names = ["unquantized"] if scheme.name == "none" else [*(["unquantized"] if config.baseline else []), scheme.name]
    origins: dict[str, init_from.Origin] = {}
    if config.init_from is not None:
        run, held = config.init_from.expanduser(), run_directory.held_to(folder).get("init_from")
        origins = init_from.origins(run, folder, names, optimizer_bits=config.optimizer_bits)
        settings["init_from"] = init_from.setting(run, held, origins)

    def new_model(name: str) -> nnx.Module:
        make = lambda: llama.build(size, corpus.vocab_size, dtype=config.dtype, remat=config.remat, seed=config.seed,
                                   attention=config.attention, unroll=config.unroll)  # fmt: skip
        what = f"the model with a vocabulary of {corpus.vocab_size:,}"
        needs = lambda: 4 * size.params(corpus.vocab_size) // (1 if layout is None else layout.mesh.size)
        with out_of_memory.explained(what, needs, out_of_memory.OF_A_MODEL):
            model = make() if layout is None else layout.attach(layout.build(make))
            jax.block_until_ready(nnx.state(model))
        return origins[name].model(model) if name in origins else model

    with one_of_many(folder, settings), run_directory.StopRequest() as stop:
        print(f"{config.preset}: {size.block_params:,} parameters in the blocks")
        print(f"{size.steps} steps of {size.batch} x {size.context} tokens from {corpus.note}; run directory: {folder}")
        runs = {}
        for name in names:
            model, is_quantized = new_model(name), name != "unquantized"
            if is_quantized:
                model = scheme.apply(model, corpus.sample(size.context, size.batch))
                if jax.process_index() == 0:
                    print(quantized.write(folder / "quantized.txt", model, scheme.name, stacked=size.layers))
            runs[name] = train_loop.train(name, model, corpus, plan, folder, stop, quantized=is_quantized,
                                          layout=layout, origin=origins.get(name))  # fmt: skip
        if jax.process_index():
            return {}
        with description.of_finished(folder):
            return delivery.make(folder, runs, stop)


def settings_of(
    config: Pretrain, size: llama.LlamaConfig, scheme: schemes.Scheme, corpus: text.Corpus
) -> dict[str, str]:
    """What changes the numbers of the run. With the path of `--init-from`, which names a folder; a run is then held to
    the checkpoint there."""
    settings = run_directory.fields_that_matter(
        config, text=corpus.fingerprint, vocabulary=corpus.vocab_size, scheme=scheme.name, **size.settings()
    )
    origin = None if config.init_from is None else config.init_from.expanduser()
    since = {"init_from": origin, "skip_spikes": config.skip_spikes, "options": config.options}
    for name, value in since.items():  # what a run had before they were there stays the same run
        if value not in (None, ()):
            settings[name] = repr(str(value))
    return settings


def layout_of(config: Pretrain) -> Layout | None:
    """None on one device, where nothing asks for a mesh."""
    reduce = None if config.reduce == "float" else int(config.reduce.removeprefix("int"))
    wants = {"gather": config.gather, "reduce": reduce, "compress": config.compress,
             "offload": config.offload_optimizer}  # fmt: skip
    if config.mesh is None and jax.process_count() == 1 and wants == {
        "gather": "float", "reduce": None, "compress": None, "offload": False
    }:  # fmt: skip
        return None
    mesh = ("data=-1" if jax.process_count() > 1 else "data=1") if config.mesh is None else config.mesh
    if not lb.parallel.parse_mesh(mesh):
        raise ValueError(f"pretrain: --mesh {mesh!r} names no axis. Leave it out, or give sizes, as in data=2,fsdp=2.")
    return Layout(mesh=lb.parallel.make_mesh(mesh), **wants)


@contextlib.contextmanager
def one_of_many(folder: pathlib.Path, settings: dict[str, str]) -> Iterator[None]:
    """The run directory, held by the first process alone; the others are silent and wait until it is theirs."""
    if jax.process_index() == 0:
        with run_directory.locked(folder):
            run_directory.claim(folder, settings)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("run directory")
            yield
    else:
        multihost_utils.sync_global_devices("run directory")
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield


if __name__ == "__main__":
    command.run("pretrain", Pretrain, main, __doc__)
