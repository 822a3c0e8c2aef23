"""Another run's checkpoint as a start: its parameters, and the moments that fit."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recipes import checkpoints, llama, metrics, pretrain, run_directory, schemes, text, train_loop
from recipes.init_from import Origin
from tests.recipes.test_pretrain import curve, finish, settings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of QuEST at 4 bits, six steps."""
    config = settings(tmp_path_factory.mktemp("first"), steps=6)
    with pytest.MonkeyPatch.context() as patch:
        finish(config, patch)
    return config


def new_state(scheme: schemes.Scheme, origin: Origin | None = None, *, seed: int = 9, **adamw):
    model = llama.build(llama.preset("smoke"), 256, seed=seed)
    model = model if origin is None else origin.model(model)
    model = scheme.apply(model, np.zeros((4, 32), np.int32))
    plan = train_loop.Plan.of(llama.preset("smoke"))
    return train_loop.first_state(nnx.split(model, nnx.Param, ...)[1], dataclasses.replace(plan.optimizer(), **adamw))


def test_parameters_and_moments_come_over_and_counters_do_not(run):
    origin = Origin.of(run.out)
    state, said = origin.state(new_state(schemes.Scheme(method="none")))
    assert "starts from step 6" in said and "19 of 19 arrays of the optimizer" in said  # 9 parameters, mu and nu, count
    taken, count = checkpoints.named(state), 0
    for name, array in taken.items():
        moments = name.startswith(("params.", "optimizer.1."))
        count += moments
        if moments:
            np.testing.assert_array_equal(array, origin.arrays[name])
    assert count == 28 and int(taken["optimizer.1.count"]) == 6 and int(taken["optimizer.3.count"]) == 0


@pytest.mark.parametrize(
    ("adamw", "moments"),
    [({"param_dtype": "bfloat16"}, "19 of 19"), ({"loss_scale": True}, "19 of 19"), ({"bits": 8}, r"\d+ of \d+")],
)
def test_under_other_wrappers(run, adamw, moments):
    """8-bit moments are other arrays: what they need is made anew, and the small ones that stay float32 come over."""
    origin = Origin.of(run.out)
    fresh = new_state(schemes.Scheme(bits=2), **adamw)
    state, said = origin.state(fresh)
    assert re.search(moments + " arrays", said)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    for before, after in zip(jax.tree.leaves(fresh), jax.tree.leaves(state), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
    kernel = state["params"]["lm_head"]["kernel"][...]
    np.testing.assert_array_equal(kernel, origin.arrays["params.lm_head.kernel.value"].astype(kernel.dtype))


def test_codes_of_moments_come_over_to_their_own_codec_only(tmp_path):
    """8 bits and e4m3 have arrays of one shape and dtype, and their codes mean other values."""
    plan = train_loop.Plan.of(llama.preset("smoke"))

    def start(bits):
        params = {"blocks": {"kernel": jnp.zeros((64, 64)), "norm": jnp.zeros(64)}}
        return train_loop.first_state(params, dataclasses.replace(plan.optimizer(), bits=bits))

    written = jax.tree.map(lambda array: array + 1, start(8))
    checkpoints.Checkpoints(tmp_path / "quest-w4a4" / "checkpoints").save(6, written)

    def moments(state):
        return {name: array for name, array in checkpoints.named(state["optimizer"]).items() if ".mu." in name}

    def check(bits, words, taken):
        state, said = Origin.of(tmp_path / "quest-w4a4", optimizer_bits=bits).state(start(bits))
        assert f"with {taken} of 7 arrays of the optimizer" in said  # of mu and nu: words, scales, norm; and count
        found, fresh, theirs = moments(state), moments(start(bits)), moments(written)
        assert len(found) == 3
        for name, array in found.items():
            np.testing.assert_array_equal(array, (theirs if words or "norm" in name else fresh)[name])

    check(8, words=False, taken=3)  # without settings nothing is known of the codec
    run_directory.claim(tmp_path, {"optimizer_bits": "8"})
    check(8, words=True, taken=7)
    check("e4m3", words=False, taken=3)


def test_learned_steps_are_calibrated_for_the_weights_that_come_over(run):
    """LSQ's first step of a weight is 2 E|w| / sqrt(Q_p): here of the run's weights, not of a fresh model's.

    Source: Esser et al. 2020, arXiv:1902.08153, section 2.1; the largest level Q_p of 4 mid-rise bits is 7.5."""
    origin = Origin.of(run.out)
    found = checkpoints.named(new_state(schemes.Scheme(method="lsq"), origin)["params"])
    kernel = np.asarray(origin.arrays["params.blocks.mlp.down.kernel.value"], np.float64)
    expected = 2 * np.abs(kernel).mean(axis=(1, 2)) / np.sqrt(7.5)
    np.testing.assert_allclose(found["blocks.mlp.down.dot_general.rhs_scale.value"].reshape(2), expected, rtol=1e-5)


def test_a_finish_in_high_precision(run, tmp_path, monkeypatch):
    """The main job from there: its first loss is near the run's last one, and it resumes from its own checkpoints."""
    more = {"method": "none", "steps": 4, "seed": 1}
    finishing = settings(tmp_path, init_from=run.out, **more)
    monkeypatch.setattr(pretrain.deliver.Delivery, "make", lambda *_: None)
    pretrain.main(finishing)
    pretrain.main(dataclasses.replace(fresh := settings(tmp_path, **more), out=tmp_path / "fresh"))
    first, from_scratch = (
        metrics.read(config / "unquantized" / "metrics.jsonl")[0]["loss"]
        for config in (finishing.out, tmp_path / "fresh")
    )
    assert fresh.seed == finishing.seed and first < from_scratch - 0.5
    curve = (finishing.out / "unquantized" / "metrics.jsonl").read_bytes()
    pretrain.main(finishing)
    assert (finishing.out / "unquantized" / "metrics.jsonl").read_bytes() == curve


class TestTheSameStart:
    """A run goes on by the same command wherever the run that it started from lies, and by no other start."""

    @pytest.fixture
    def origin(self, run, tmp_path):
        return pathlib.Path(shutil.copytree(run.out, tmp_path / "origin"))

    @pytest.fixture
    def started(self, origin, tmp_path, monkeypatch):
        """Learned steps at 2 bits, which the first weights set; stopped after step 7 of 9."""
        config = settings(tmp_path, init_from=origin, method="lsq", bits=2, steps=9)
        monkeypatch.setattr(pretrain.deliver.Delivery, "make", lambda *_: None)
        pretrain.main(config)
        self.curve = curve(config, "lsq-w2a2")
        self.cut(config)
        return config

    def cut(self, config):
        shutil.rmtree(config.out / "lsq-w2a2" / "checkpoints" / "step_00000009")

    def go_on(self, config, **changes):
        pretrain.main(dataclasses.replace(config, **changes))
        assert curve(config, "lsq-w2a2") == self.curve

    def test_moved_written_otherwise_trained_on_or_gone(self, origin, started, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        for path in ("origin", "~/origin", "origin/quest-w4a4", str(origin)):
            self.go_on(started, init_from=pathlib.Path(path), out=pathlib.Path("~/run"))
            self.cut(started)
        origin.rename(tmp_path / "moved")
        self.go_on(started, init_from=pathlib.Path("moved"))
        self.cut(started)
        self.go_on(started)  # the folder named first is gone
        self.go_on(started)  # and the run finished

    def test_another_start_is_refused(self, run, origin, started, tmp_path, monkeypatch):
        with pytest.raises(ValueError, match="nowhere holds no checkpoints of a run"):
            pretrain.main(dataclasses.replace(started, init_from=tmp_path / "nowhere"))
        other = dataclasses.replace(run, out=tmp_path / "other", seed=1)
        finish(other, monkeypatch)
        refused = "init_from: there step 6 of .*origin, SHA-256 .*, now step 6 of .*other, SHA-256"
        with pytest.raises(ValueError, match=refused):
            pretrain.main(dataclasses.replace(started, init_from=other.out))
        (origin / "quest-w4a4").rename(tmp_path / "old")
        (other.out / "quest-w4a4").rename(origin / "quest-w4a4")
        with pytest.raises(ValueError, match="init_from: there step 6 of .*origin, .*, now step 6 of .*origin, "):
            pretrain.main(dataclasses.replace(started, baseline=True))  # whose twin would start from other weights

    def test_a_run_from_before_is_held_to_the_path(self, origin, started):
        path = started.out / "config.json"
        content = json.loads(path.read_text())
        content["settings"]["init_from"] = repr(str(origin))
        path.write_text(json.dumps(content))
        self.go_on(started)
        with pytest.raises(ValueError, match="init_from: there '.*origin', now '.*origin/quest-w4a4'"):
            pretrain.main(dataclasses.replace(started, init_from=origin / "quest-w4a4"))
        self.cut(started)
        shutil.rmtree(origin)
        self.go_on(started)

    def test_the_folder_of_a_run_without_out_is_named_as_ever(self, run):
        """By the path; `short_hash` of the settings that were there before checkpoints were named by checksums."""
        config = dataclasses.replace(run, init_from=pathlib.Path("a/b"))
        size, corpus = llama.preset("smoke"), text.load(run.data)
        found = pretrain.settings_of(config, size, schemes.Scheme(), corpus)
        plain = pretrain.settings_of(run, size, schemes.Scheme(), corpus)
        assert found == plain | {"init_from": "'a/b'"}


def test_runs_that_cannot_be_the_start(run, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoints of a run"):
        Origin.of(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="several trainings; name one of .*a, .*b"):
        Origin.of(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint that verifies"):
        Origin.of(tmp_path / "a")
    other = llama.build(dataclasses.replace(llama.preset("smoke"), width=128), 256)
    with pytest.raises(ValueError, match=r"of shape \(.*64.*this run .*128"):
        Origin.of(run.out).model(other)


def test_a_damaged_one_is_passed_over(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.out, copy)
    steps = checkpoints.Checkpoints(copy / "quest-w4a4" / "checkpoints")
    assert steps.steps() == [6]
    (pathlib.Path(steps.folder) / "step_00000006" / "manifest.json").write_text("{")
    with pytest.warns(UserWarning, match="step 6 .* is damaged"), pytest.raises(ValueError, match="verifies"):
        Origin.of(copy)
