"""Spikes by z-score: found from the third step on, never fed with what is not finite, and no deadlock after a shift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recipes import llama, optimizer, train_loop
from recipes.spikes import FLOORS, Spikes

SIX = Spikes(z=6)


def judged(losses, norms, spikes=SIX):
    """One bool a step, and the statistics at the end."""

    def one(seen, values):
        spike, seen = spikes.judge(seen, *values, jnp.isfinite(values[0]) & jnp.isfinite(values[1]))
        return seen, spike

    series = (jnp.asarray(losses, jnp.float32), jnp.asarray(norms, jnp.float32))
    seen, found = jax.jit(lambda series: jax.lax.scan(one, spikes.start(), series))(series)
    return np.asarray(found), seen


def in_float64(losses, norms, z, decay=0.95):
    """The docstring of Spikes, step by step."""
    count, mean, variance, found = 0, np.zeros(2), np.zeros(2), []
    for values in np.log(np.stack([losses, norms], 1)):
        deviation = np.maximum(np.sqrt(variance), FLOORS)
        limit = mean + z * deviation if count >= 2 else np.full(2, np.inf)
        found.append(bool((values > limit).any()))
        off = np.minimum(values, limit) - mean
        weight = max(1 - decay, 1 / (count + 1))
        count, mean, variance = count + 1, mean + weight * off, (1 - weight) * (variance + weight * off**2)
    return np.asarray(found), mean, variance


def noisy(steps, seed=0):
    draw = np.random.default_rng(seed)
    return 2 + draw.normal(0, 0.05, steps) + 2 * np.exp(-np.arange(steps) / 30), np.exp(draw.normal(0, 0.3, steps))


def test_against_float64():
    losses, norms = noisy(200)
    losses[50], norms[90:140] = 300.0, norms[90:140] * 40
    found, seen = judged(losses, norms)
    expected, mean, variance = in_float64(losses, norms, 6)
    np.testing.assert_array_equal(found, expected)
    # float32 logarithms of size 4 are off by 2e-7 each, and the running mean forgets at 1/20 a step
    np.testing.assert_allclose(seen["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(seen["variance"], variance, atol=1e-4)


@pytest.mark.parametrize("where", [2, 3, 10, 150])
@pytest.mark.parametrize("what", ["loss", "norm"])
def test_a_spike_of_a_hundred_is_found_and_nothing_else(where, what):
    losses, norms = noisy(200)
    (losses if what == "loss" else norms)[where] *= 100
    found, _ = judged(losses, norms)
    assert np.flatnonzero(found).tolist() == [where]


@pytest.mark.parametrize("factor", [10.0, 100.0, 1e6])
@pytest.mark.parametrize("z", [3.0, 6.0])
def test_a_lasting_shift_of_level_does_not_stop_the_run(z, factor):
    """Skips in a row stay below the 25 that end a run."""
    steps = np.arange(300)
    norms = np.where(steps < 100, 1.0, factor) * np.exp(0.01 * np.sin(steps))
    found, _ = judged(np.full(300, 2.0), norms, Spikes(z=z))
    skipped = np.flatnonzero(found)
    assert skipped[0] == 100 and len(skipped) <= 20 and skipped[-1] == 100 + len(skipped) - 1


def test_what_is_not_finite_is_no_spike_and_leaves_no_trace():
    losses, norms = noisy(60)
    _, without = judged(losses, norms)
    where = [1, 20, 21]
    found, seen = judged(np.insert(losses, where, np.nan), np.insert(norms, where, np.inf))
    assert not found.any()
    jax.tree.map(np.testing.assert_array_equal, seen, without)


@pytest.mark.parametrize("z", [0.0, 2.9, -1.0, float("nan"), float("inf")])
def test_limits_that_would_skip_ordinary_steps(z):
    with pytest.raises(ValueError, match="--skip-spikes .*3 or"):
        Spikes(z=z)


def test_a_step_that_is_a_spike_moves_nothing():
    """The norm of the gradient of a run of equal tokens is far from that of the text before."""
    graph, params, rest = nnx.split(llama.build(llama.preset("smoke"), 256), nnx.Param, ...)
    adamw, spikes = optimizer.AdamW(peak=1e-3, steps=10), Spikes(z=6)
    state = train_loop.first_state(params, adamw, None, spikes)
    step = train_loop.make_step(graph, adamw, 1, None, None, spikes)
    tokens = np.random.default_rng(0).integers(0, 250, (4, 17)).astype(np.int32)
    for _ in range(3):
        state, numbers = step(state, rest, tokens)
    assert int(state["skipped"]) == 0
    state["spikes"]["mean"] -= np.log(100)  # as if all before had been a hundredth
    before = jax.tree.map(np.array, state)
    state, numbers = step(state, rest, tokens)
    assert np.isfinite(numbers["loss"]) and (int(state["skipped"]), int(state["in_a_row"])) == (1, 1)
    for name in ("params", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state[name]), before[name])
