"""The main job from the command line's words to its results, interrupted in every way."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from recipes import (
    checkpoints,
    command,
    deliver,
    display,
    llama,
    metrics,
    out_of_memory,
    pretrain,
    quantized,
    run_directory,
    schemes,
    text,
    token_files,
    train_loop,
)
from recipes.pretrain import Pretrain

STEPS = 20


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the recipe catches it."""


def settings(folder, **changes) -> Pretrain:
    """A run of a second on some text with structure."""
    lines = (f"the square of {i} is {i * i}, and {i} is {'odd' if i % 2 else 'even'}\n" for i in range(3000))
    (folder / "words.txt").write_text("".join(lines))
    config = Pretrain(
        preset="smoke", data=str(folder / "words.txt"), out=folder / "run", checkpoint_every=7, log_every=3
    )
    small = {"evaluate_every": 10, "tensorboard": False, "sample_tokens": 12, "prompt": "the "}
    return dataclasses.replace(config, **small, **changes)


@pytest.fixture
def config(tmp_path):
    return settings(tmp_path)


def curve(config, name="quest-w4a4") -> bytes:
    return (config.out / name / "metrics.jsonl").read_bytes()


def finish(config, monkeypatch) -> bytes:
    """Trains to the end, delivers nothing; the curve."""
    with monkeypatch.context() as patch:
        patch.setattr(pretrain.deliver.Delivery, "make", lambda *_: None)
        pretrain.main(config)
    return curve(config)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The curve of one run without interruption, made once."""
    config = settings(tmp_path_factory.mktemp("reference"), baseline=True)
    return config, pretrain.main(config)


def test_what_a_run_delivers(reference):
    config, answer = reference
    assert answer == json.loads((config.out / "results.json").read_text())
    lines = metrics.read(config.out / "quest-w4a4" / "metrics.jsonl")
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == list(range(1, STEPS + 1)) and losses[STEPS] < losses[1]
    held = [line["validation_loss"] for line in lines if "validation_loss" in line]
    entry = answer["runs"]["quest-w4a4"]
    assert held[-1] == entry["validation_loss"] < 5.0 and len(held) == 2
    assert entry["bits_per_byte"] == pytest.approx(entry["validation_loss"] / 0.6931472)
    twin = answer["runs"]["unquantized"]["validation_loss"]
    assert entry["above_unquantized"] == pytest.approx(entry["validation_loss"] - twin)
    assert 2.0 < answer["unigram_entropy"] < 3.2
    packed = answer["packed"]
    assert packed["validation_loss"] == pytest.approx(entry["validation_loss"], abs=1e-4)
    kernels = llama.preset("smoke").block_params - 5 * 64  # five norms of 64 gains
    assert packed["packed_block_bytes"] < packed["float_block_bytes"] / 5
    assert packed["packed_block_bytes"] >= kernels / 2 and packed["float_block_bytes"] >= 4 * kernels
    assert packed["packed_on_disk"] < packed["float_on_disk"]
    table = (config.out / "quantized.txt").read_text()
    assert "blocks/mlp/down" in table and "in high precision: embed (Embed), lm_head (Linear)" in table
    assert answer["seconds"] > 0
    assert answer["sample"].startswith("the ") and (config.out / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_line_about_what_is_quantized(tmp_path):
    """74,048 - 320 weights in kernels; down has 128 inputs and a float32 scale a row: 4 + 32 / 128 bits."""
    scheme = schemes.Scheme(rules=("blocks/attention=none", "blocks/mlp/down=quest:8"))
    model = scheme.apply(llama.build(llama.preset("smoke"), 256), np.zeros((4, 32), np.int32))
    line = quantized.write(tmp_path / "quantized.txt", model, scheme.name, stacked=2)
    assert line.startswith("quantized by quest-w4a4-rules: ")
    assert "1 layer x 2 in midrise8 (8.25 bits a weight)" in line
    assert "1 layer x 2 in midrise4 (4.50 bits a weight)" in line
    high = "blocks/attention/out, blocks/attention/qkv, embed, lm_head"
    assert line.endswith(f"in high precision: {high} (quantized.txt)")
    scheme = schemes.Scheme(rules=("embed|lm_head=quest:8",))
    model = scheme.apply(llama.build(llama.preset("smoke"), 256), np.zeros((4, 32), np.int32))
    line = quantized.write(tmp_path / "quantized.txt", model, scheme.name, stacked=2)
    assert (
        "4 layers x 2 in midrise4" in line
        and "2 layers in midrise8" in line
        and line.endswith("nothing else (quantized.txt)")
    )


def test_packed_weights_that_are_damaged_are_refused(reference):
    config, _ = reference
    scheme = schemes.Scheme()
    model = scheme.apply(llama.build(llama.preset("smoke"), 256), np.zeros((4, 32), np.int32))
    packed = deliver._convert(model)
    deliver.load(config.out / "packed", packed)
    copy = config.out.parent / "damaged"
    shutil.copytree(config.out / "packed", copy)
    file = max((f for f in (copy / "arrays").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match="deliver: the weights in .* are damaged"):
        deliver.load(copy, packed)


@pytest.mark.parametrize("death", [2, 11, 19])
def test_a_kill_and_the_same_command_give_the_same_curve(config, reference, monkeypatch, death):
    """Died after step `death` was computed, wherever the last checkpoint was."""
    update, calls = display.Progress.update, []

    def dying(self, step, *values):
        calls.append(step)
        if step >= death:
            raise Killed
        return update(self, step, *values)

    monkeypatch.setattr(display.Progress, "update", dying)
    with pytest.raises(Killed):
        pretrain.main(config)
    monkeypatch.undo()
    saved = checkpoints.Checkpoints(config.out / "quest-w4a4" / "checkpoints").steps()
    assert (max(saved) if saved else 0) < STEPS
    assert finish(config, monkeypatch) == curve(reference[0])


def test_sigterm_saves_and_the_rest_follows(config, reference, monkeypatch):
    update = display.Progress.update

    def told(self, step, *values):
        if step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, step, *values)

    monkeypatch.setattr(display.Progress, "update", told)
    with pytest.raises(train_loop.Stopped, match="stopped after step 10 of 20"):
        pretrain.main(config)
    monkeypatch.undo()
    assert 10 in checkpoints.Checkpoints(config.out / "quest-w4a4" / "checkpoints").steps()
    assert finish(config, monkeypatch) == curve(reference[0])


def test_a_damaged_checkpoint_costs_only_time(config, reference, monkeypatch):
    finish(config, monkeypatch)
    folder = config.out / "quest-w4a4" / "checkpoints" / f"step_{STEPS:08d}"
    for file in (folder / "arrays").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            raw = bytearray(file.read_bytes())
            raw[len(raw) // 2] ^= 1
            file.write_bytes(raw)
    with pytest.warns(UserWarning, match=f"step_{STEPS:08d} is damaged"):
        assert finish(config, monkeypatch) == curve(reference[0])


def test_a_damaged_line_of_the_metrics_costs_that_line(config, reference, monkeypatch):
    """Resumed from step 14: the line is gone, its file is kept aside, all others are those of a whole run."""
    finish(config, monkeypatch)
    folder = config.out / "quest-w4a4"
    shutil.rmtree(folder / "checkpoints" / f"step_{STEPS:08d}")
    lines = curve(config).splitlines(keepends=True)
    damaged = b"".join([*lines[:4], lines[4][:9] + b"\x00\xff\n", *lines[5:]])
    (folder / "metrics.jsonl").write_bytes(damaged)
    with pytest.warns(UserWarning, match="metrics.jsonl, line 5 cannot be read.*kept as metrics.damaged1"):
        after = finish(config, monkeypatch)
    whole = curve(reference[0]).splitlines(keepends=True)
    assert after == b"".join(whole[:4] + whole[5:]) and (folder / "metrics.damaged1").read_bytes() == damaged


def test_a_finished_run_without_its_last_held_out_loss_finds_it_again(config, reference, monkeypatch):
    finish(config, monkeypatch)
    path = config.out / "quest-w4a4" / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    again = pretrain.main(config)["runs"]["quest-w4a4"]
    assert again["validation_loss"] == reference[1]["runs"]["quest-w4a4"]["validation_loss"]


def test_a_finished_run_without_its_metrics_keeps_its_plot(config):
    """The packed weights are made anew; what nobody can draw again stays."""
    config = dataclasses.replace(config, steps=2)
    pretrain.main(config)
    plot = (config.out / "curves.png").read_bytes()
    (config.out / "quest-w4a4" / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match="metrics.jsonl has no line of the 2 steps that are done"):
        pretrain.main(config)
    assert (config.out / "curves.png").read_bytes() == plot


class TestABadEnd:
    def bad_tail(self, monkeypatch, first: int):
        """Steps from `first` on are not finite: nothing moves, as the real step has it."""
        real = train_loop.make_step

        def make(*arguments):
            step, count = real(*arguments), itertools.count(1)

            def one(state, rest, tokens):
                if next(count) < first:
                    return step(state, rest, tokens)
                state = state | {name: state[name] + 1 for name in ("skipped", "in_a_row")}
                nan = np.float32(np.nan)
                return state, {"loss": nan, "gradient_norm": nan, **{n: state[n] for n in ("skipped", "in_a_row")}}

            one.lower = step.lower
            return functools.cache(lambda: one)()

        monkeypatch.setattr(train_loop, "make_step", functools.cache(make))

    def test_the_last_good_parameters_are_delivered(self, config, monkeypatch, capsys):
        self.bad_tail(monkeypatch, 18)
        entry = pretrain.main(config)["runs"]["quest-w4a4"]
        assert entry["skipped_steps"] == 3 and math.isfinite(entry["validation_loss"])
        assert "the last 3 steps were skipped; what follows is of step 17" in capsys.readouterr().out

    def test_an_end_that_is_not_finite_is_told(self, config, monkeypatch):
        self.bad_tail(monkeypatch, 18)
        monkeypatch.setattr(train_loop, "evaluate", lambda *_: float("nan"))
        for _ in range(2):  # and so does the same command again
            with pytest.raises(train_loop.Diverged, match="held-out loss after step 20 is not finite; 3 steps"):
                pretrain.main(config)


class TestADiskThatRefuses:
    @pytest.fixture
    def full(self, monkeypatch):
        save = checkpoints.Checkpoints.save

        def refuse(self, step, tree, **extra):
            if step == 14:
                raise OSError("Checkpoints could not write step 14")
            return save(self, step, tree, **extra)

        monkeypatch.setattr(checkpoints.Checkpoints, "save", refuse)

    def test_stops(self, config, full):
        with pytest.raises(OSError, match="step 14"):
            pretrain.main(config)
        assert checkpoints.Checkpoints(config.out / "quest-w4a4" / "checkpoints").steps() == [7]

    def test_goes_on_if_told(self, config, reference, full, monkeypatch, capsys):
        config = dataclasses.replace(config, on_save_error="continue")
        assert finish(config, monkeypatch) == curve(reference[0])
        assert checkpoints.Checkpoints(config.out / "quest-w4a4" / "checkpoints").steps() == [7, STEPS]
        assert "step 14 was not saved, training goes on: Checkpoints could not write" in capsys.readouterr().out


class TestTheEnd:
    """What is handed over when a part of it fails, after a training of one line."""

    @pytest.fixture
    def delivery(self, config):
        plan = train_loop.Plan.of(llama.preset("smoke", steps=STEPS))
        return deliver.Delivery.of(config, text.load(config.data), plan, started=0.0)

    def trained(self, name):
        model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        return {name: train_loop.Trained(model, 2.0, [{"step": 1, "loss": 2.0}], 0.0, 0)}

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize(
        ("part", "before"),
        [("unigram_entropy", "its weights were packed"), ("save_both", "the packed weights were evaluated"),
         ("load", "a sample was written"), ("sampling.generate", "the results were written")],
    )  # fmt: skip
    def test_a_signal_stops_between_its_parts(self, delivery, tmp_path, monkeypatch, part, before, number):
        """And the run is not finished."""
        parts = {"unigram_entropy": 3.0, "save_both": {}, "load": None, "sampling.generate": np.asarray([65])}
        monkeypatch.setattr(deliver, "_convert", lambda model: model)
        monkeypatch.setattr(deliver.Delivery, "held_out_loss", lambda *_: 2.0)
        for name, value in parts.items():

            def done(*_, name=name, value=value, **__):
                if name == part:
                    os.kill(os.getpid(), number)
                return value

            monkeypatch.setattr(f"recipes.deliver.{name}", done)
        with pytest.raises(train_loop.Stopped, match=f"stopped before {before}; the same command") as stopped:
            with run_directory.StopRequest() as stop:
                delivery.make(tmp_path, self.trained("quest-w4a4"), stop)
        assert stopped.value.status == 128 + number and not (tmp_path / "results.json").exists()

    def test_a_plot_that_fails_leaves_the_numbers(self, delivery, tmp_path, monkeypatch):
        def fails(*_, **__):
            raise ValueError("no plot")

        monkeypatch.setattr(deliver.sampling, "generate", lambda _, prompt, **__: prompt)
        monkeypatch.setattr(deliver.plots, "curves", fails)
        with pytest.raises(ValueError, match="no plot"):
            delivery.make(tmp_path, self.trained("unquantized"))
        assert json.loads((tmp_path / "results.json").read_text())["runs"]["unquantized"]["validation_loss"] == 2.0

    @pytest.mark.parametrize(
        ("saved", "words"),
        [([], "it trains anew, none was saved"), ([7, 14], "it trains on from the checkpoint of step 14"),
         ([14, STEPS], "the training is done and its checkpoint is kept")],
    )  # fmt: skip
    def test_a_full_disk_tells_where_the_same_command_goes_on(self, delivery, tmp_path, monkeypatch, saved, words):
        def refuse(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(deliver, "_convert", lambda model: model)
        monkeypatch.setattr(checkpoints, "write", refuse)
        for step in saved:
            (tmp_path / "quest-w4a4" / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        with pytest.raises(OSError, match=f"the same command again: {words}."):
            delivery.make(tmp_path, self.trained("quest-w4a4"))


def test_out_of_memory_names_what_helps(config, monkeypatch):
    def exhausted(self, step):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    monkeypatch.setattr(train_loop.Steps, "at", exhausted)
    with pytest.raises(out_of_memory.OutOfMemory, match=r"4 x 32 tokens needs an estimated [\d.]+ MB.*--microbatches"):
        pretrain.main(config)


def test_a_vocabulary_that_no_device_holds(config, tmp_path):
    """2^31 words of width 64, in and out: 1.1 TB."""
    token_files.write(tmp_path / "ids.bin", np.arange(4000) % 300, vocab_size=300)
    index = json.loads((tmp_path / "ids.json").read_text())
    (tmp_path / "ids.json").write_text(json.dumps(index | {"vocab_size": 2**31}))
    config = dataclasses.replace(config, data=str(tmp_path / "ids.bin"), tokenizer="ids", prompt="1")
    needed = "a vocabulary of 2,147,483,648 needs an estimated 1099.51 GB .*smaller --preset"
    with pytest.raises(out_of_memory.OutOfMemory, match=needed):
        pretrain.main(config)


def test_other_settings_in_the_same_directory_are_refused(config):
    (config.out / "quest-w4a4").mkdir(parents=True)
    run_directory.claim(config.out, {"seed": "5"})
    (config.out / "quest-w4a4" / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    with pytest.raises(ValueError, match="seed: there 5, now 0"):
        pretrain.main(config)


def test_a_first_start_that_failed_does_not_hold_the_corrected_command(config, monkeypatch):
    with pytest.raises(ValueError, match="nowhere"):
        pretrain.main(dataclasses.replace(config, rules=("nowhere=quest:4",), seed=3))
    assert (config.out / "config.json").exists()
    assert finish(dataclasses.replace(config, steps=3), monkeypatch)


def test_a_run_that_has_not_made_its_first_step_keeps_its_directory_from_another(config):
    theirs = {"seed": "5"}
    with run_directory.locked(config.out):
        run_directory.claim(config.out, theirs)
        with pytest.raises(RuntimeError, match="is in use by process"):
            pretrain.main(config)
        assert json.loads((config.out / "config.json").read_text())["settings"] == theirs


def test_settings_that_change_no_number_may_change(config):
    first, second = (
        run_directory.fields_that_matter(c) for c in (config, dataclasses.replace(config, keep=5, prompt="x"))
    )
    assert first == second
    assert first != run_directory.fields_that_matter(dataclasses.replace(config, seed=1))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"checkpoint_every": 0}, "checkpoint_every must be at least 1, not 0"), ({"microbatches": 3}, "cut into 3"),
     ({"steps": 0}, "steps must be"), ({"steps": 10**30}, "--steps must be below .* and is 1000"),
     ({"microbatches": "auto", "memory_budget": "1e400GB"}, "is not an amount of memory"),
     ({"learning_rate": -1.0}, "rate -1.0"),
     ({"learning_rate": float("nan")}, "rate nan.*finite"), ({"weight_decay": float("inf")}, "decay inf.*finite"),
     ({"temperature": float("nan")}, "temperature nan"), ({"seed": -1}, "--seed must .* and is -1"),
     ({"skip_spikes": 1.0}, "--skip-spikes 1.0"),
     ({"sample_tokens": 0}, "sampling"),
     ({"prompt": ""}, "sampling"), ({"method": "none", "baseline": True}, "--baseline cannot take effect"),
     ({"mesh": "foo=1"}, "--mesh foo=1 cuts neither"), ({"mesh": "dta=2"}, "Did you mean 'data'"),
     ({"mesh": ""}, "--mesh '' names no axis"), ({"mesh": " ,"}, "--mesh ' ,' names no axis"),
     ({"context": 10**6}, "training part"), ({"preset": "huge"}, "no preset")],
)  # fmt: skip
def test_senseless_settings_are_refused_before_anything_is_trained(config, change, words):
    with pytest.raises(ValueError, match=words):
        pretrain.main(dataclasses.replace(config, **change))
    assert not config.out.exists()


class TestSchemes:
    @pytest.mark.parametrize(
        ("scheme", "name"),
        [(schemes.Scheme(), "quest-w4a4"), (schemes.Scheme(bits="e2m1"), "quest-we2m1ae2m1"),
         (schemes.Scheme(method="lsq", bits=2), "lsq-w2a2"), (schemes.Scheme(weight_only=True), "quest-w4a16"),
         (schemes.Scheme(method="none"), "none"), (schemes.Scheme(rules=("a=none",)), "quest-w4a4-rules"),
         (schemes.Scheme(method="fp8", options=("scaling=row", "weight_gradient=False")),
          "fp8-by-row-weight-gradient-in-high-precision"),
         (schemes.Scheme.of("quest:bits=3,block=32,signs=0"), "quest-w3a3-block=32-signs=0"),
         (schemes.Scheme.of("nf4:group=32,double_quantization=false"), "nf4-g32-float32-scales")],
    )  # fmt: skip
    def test_names(self, scheme, name):
        assert scheme.name == name

    def test_the_width_without_one_is_as_the_help_says(self, capsys):
        with pytest.raises(SystemExit):
            command.run("pretrain", Pretrain, pretrain.main, None, ["--help"])
        told = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
        assert "for methods that have one; the method's default, 4 for most, unless given" in told
        widths = {}
        for name in lb.methods.names():
            for bits in range(1, 9):
                with contextlib.suppress(ValueError):
                    if schemes.Scheme(method=name, bits=bits).name == schemes.Scheme(method=name).name:
                        widths[name] = bits
        assert widths == {"quest": 4, "lsq": 4, "pact": 4, "straight_through": 4, "absmax_integer": 8,
                          "static_integer": 8}  # fmt: skip

    def test_none_takes_no_options(self):
        with pytest.raises(ValueError, match="cannot take effect"):
            schemes.Scheme(method="none", bits=4)

    @pytest.mark.parametrize(
        "rule", ["blocks", "=quest:4", "blocks=", "blocks=none:4", "blocks=quest:nine", "nowhere=none"]
    )
    def test_rules_that_say_nothing(self, rule):
        with pytest.raises(ValueError):
            schemes.Scheme(rules=(rule,)).apply(llama.build(llama.preset("smoke"), 256), None)

    def test_unknown_method_and_option(self):
        with pytest.raises(ValueError, match="no such method"):
            schemes.Scheme(method="qest").recipe("qest", 4)
        with pytest.raises(ValueError, match="no option scale"):
            schemes.Scheme(method="fp8", options=("scale=row",)).quantized(None)
        with pytest.raises(ValueError, match="'scaling' is not name=value"):
            schemes.Scheme(method="fp8", options=("scaling",)).quantized(None)
        with pytest.raises(ValueError, match="the option 'bits' of 'quest' is given twice"):
            schemes.Scheme(bits=4, options=("bits=3",)).quantized(None)
        with pytest.raises(ValueError, match="pact"):
            schemes.Scheme(method="pact", weight_only=True).recipe("pact", 4)
