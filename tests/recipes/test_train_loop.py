"""The training step: microbatches, steps that are not finite, and the loss it minimizes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from recipes import display, gradients, llama, metrics, optimizer, train_loop

SMALL = llama.preset("smoke")


def batch(seed: int, rows: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, (rows, 17)).astype(np.int32)


def started(model, microbatches=1, prepare=None):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    adamw = optimizer.AdamW(peak=1e-2, steps=10)
    step = train_loop.make_step(graph, adamw, microbatches, prepare)
    return lambda state, tokens: step(state, rest, tokens), train_loop.first_state(params, adamw)


def copy(state):
    return jax.tree.map(np.array, state)


@pytest.mark.parametrize("scheme", [None, 4])
def test_microbatches_equal_the_whole_batch(scheme):
    """The mean of four means of one sequence is the mean over four; float32 sums in another order.

    One query head a group: heads of a group answer alike at the first position, and their rotation is exactly zero in
    places, where the order of a sum decides what a mid-rise grid makes of it."""
    model = llama.build(dataclasses.replace(SMALL, kv_heads=SMALL.heads), 256)
    prepare = None
    if scheme is not None:
        model, prepare = lb.quantize(model, rules=[("blocks", lb.quest(scheme))]), lb.nn.prepare
    whole_step, state = started(model)
    cut_step, _ = started(model, 4, prepare)
    before = copy(state)
    whole, whole_numbers = whole_step(jax.tree.map(jnp.asarray, before), batch(0))
    cut, cut_numbers = cut_step(jax.tree.map(jnp.asarray, before), batch(0))
    np.testing.assert_allclose(cut_numbers["loss"], whole_numbers["loss"], rtol=1e-5)
    np.testing.assert_allclose(cut_numbers["gradient_norm"], whole_numbers["gradient_norm"], rtol=2e-3)
    first = jax.tree.leaves(whole["optimizer"][1].mu)
    for a, b in zip(first, jax.tree.leaves(cut["optimizer"][1].mu), strict=True):  # 0.1 x the clipped gradient
        assert np.linalg.norm(a - b) <= 2e-3 * np.linalg.norm(a)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    """Token 255 has an infinite embedding: any batch that holds it has no finite loss."""
    model = llama.build(SMALL, 256)
    model.embed.embedding[...] = model.embed.embedding[...].at[255].set(jnp.inf)
    step, state = started(model)
    state, numbers = step(state, batch(0))
    assert np.isfinite(numbers["loss"]) and int(state["skipped"]) == 0
    before = copy(state)
    poisoned = batch(1)
    poisoned[2, 5] = 255
    state, numbers = step(state, poisoned)
    assert not np.isfinite(numbers["gradient_norm"])
    assert (int(state["skipped"]), int(state["in_a_row"])) == (1, 1)
    for name in ("params", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, copy(state)[name], before[name])
    moved, _ = step(state, batch(2))
    assert (int(moved["skipped"]), int(moved["in_a_row"])) == (1, 0)
    kernel = moved["params"]["lm_head"]["kernel"][...]
    assert np.isfinite(kernel).all() and (np.asarray(kernel) != before["params"]["lm_head"]["kernel"][...]).any()


def test_skips_are_logged_and_too_many_stop_the_run(tmp_path, capsys):
    schedule = optimizer.one_cycle(1e-3, 100)

    def values(loss, skipped, in_a_row):
        return {"loss": np.float32(loss), "gradient_norm": np.float32(loss), "skipped": np.int32(skipped),
                "in_a_row": np.int32(in_a_row)}  # fmt: skip

    with metrics.Metrics(tmp_path, after_step=0, tensorboard=False) as log:
        train_loop._write(log, [(1, values(2.0, 0, 0)), (2, values(np.nan, 1, 1)), (3, values(1.5, 1, 0))], schedule)
    said = capsys.readouterr().out.splitlines()
    assert said == ["step 2 was skipped: loss nan, gradient norm nan (1 in a row, 1 in all); nothing moved"]
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines] == [2.0, None, 1.5]
    assert [line.get("skipped") for line in lines] == [None, 1, None]
    assert lines[2]["learning_rate"] == pytest.approx(float(schedule(1)))  # the optimizer has moved once before it
    with metrics.Metrics(tmp_path, after_step=3, tensorboard=False) as log:
        with pytest.raises(train_loop.Diverged, match="25 steps in a row up to step 28"):
            train_loop._write(log, [(28, values(np.nan, 26, 25))], schedule)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_person_sees_which_step_was_skipped(tmp_path, capsys, monkeypatch, terminal):
    """On a terminal above the progress bar, elsewhere as a line of its own, with the scale that it was skipped at."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    values = {"loss": np.float32(2), "gradient_norm": np.float32(np.inf), "skipped": np.int32(3),
              "in_a_row": np.int32(1), "loss_scale": np.float32(2**15)}  # fmt: skip
    bar = display.Progress("quest-w4a4", start=6, steps=100, tokens_per_step=64)
    assert (bar.bar is not None) == terminal
    (tmp_path / "metrics.jsonl").write_text('{"step": 6, "loss": 2.0}\n')
    with metrics.Metrics(tmp_path, after_step=6, tensorboard=False) as log, bar:
        train_loop._write(log, [(7, values)], optimizer.one_cycle(1e-3, 100), bar.say)
    line = "quest-w4a4 | step 7 was skipped: loss 2, gradient norm inf, loss scale 32768 (1 in a row, 3 in all)"
    assert line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out), "beside its colors"


def test_the_loss_is_the_cross_entropy_of_the_next_token():
    class Fixed(nnx.Module):
        def __call__(self, ids):
            return jnp.broadcast_to(jnp.log(jnp.asarray([0.5, 0.25, 0.25])), (*ids.shape, 3))

    loss = gradients.next_token_loss(Fixed(), jnp.asarray([[2, 0, 0, 1]]))
    np.testing.assert_allclose(loss, -np.mean(np.log([0.5, 0.5, 0.25])), rtol=1e-6)
