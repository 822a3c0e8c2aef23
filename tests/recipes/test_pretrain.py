"""The main job from the command line's words to its results, interrupted in every way."""

import dataclasses
import json
import os
import signal

import pytest

from recipes import checkpoints, display, llama, metrics, pretrain, run_directory, schemes, train_loop
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
    assert answer["sample"].startswith("the ") and (config.out / "curves.png").read_bytes()[:4] == b"\x89PNG"


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


def test_other_settings_in_the_same_directory_are_refused(config):
    config.out.mkdir()
    run_directory.claim(config.out, {"seed": "5"})
    with pytest.raises(ValueError, match="seed: there 5, now 0"):
        pretrain.main(config)


def test_settings_that_change_no_number_may_change(config):
    first, second = (
        run_directory.fields_that_matter(c) for c in (config, dataclasses.replace(config, keep=5, prompt="x"))
    )
    assert first == second
    assert first != run_directory.fields_that_matter(dataclasses.replace(config, seed=1))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"checkpoint_every": 0}, "checkpoint_every must be at least 1, not 0"), ({"microbatches": 3}, "cut into 3"),
     ({"steps": 0}, "steps must be"), ({"learning_rate": -1.0}, "rate -1.0"), ({"sample_tokens": 0}, "sampling"),
     ({"prompt": ""}, "sampling"), ({"method": "none", "baseline": True}, "--baseline cannot take effect"),
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
         (schemes.Scheme(method="none"), "none"), (schemes.Scheme(rules=("a=none",)), "quest-w4a4-rules")],
    )  # fmt: skip
    def test_names(self, scheme, name):
        assert scheme.name == name

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
        with pytest.raises(ValueError, match="pact"):
            schemes.Scheme(method="pact", weight_only=True).recipe("pact", 4)
