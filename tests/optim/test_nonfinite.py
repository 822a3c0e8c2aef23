"""Steps that are not finite move nothing and are counted; the loss scale finds its place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lowbit_jax as lb

PARAMS = {"w": jnp.ones((64, 128), jnp.float32), "b": jnp.zeros(3)}
GOOD = jax.tree.map(lambda p: jnp.full(p.shape, 0.5), PARAMS)


def bad(value=jnp.nan):
    return {**GOOD, "b": GOOD["b"].at[1].set(value)}


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_bad_step_moves_nothing(value):
    """Parameters and the whole inner state stay to the bit; the next good step is the one that would have come."""
    tx = lb.optim.skip_nonfinite(lb.optim.adamw_low_bit(1e-2))
    update = jax.jit(tx.update)
    updates, one = update(GOOD, tx.init(PARAMS), PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    updates, two = update(bad(value), one, params)
    jax.tree.map(np.testing.assert_array_equal, optax.apply_updates(params, updates), params)
    jax.tree.map(np.testing.assert_array_equal, two.inner_state, one.inner_state)
    after, three = update(GOOD, two, params)
    expected, _ = update(GOOD, one, params)
    jax.tree.map(np.testing.assert_array_equal, after, expected)
    assert [int(s.total) for s in (one, two, three)] == [0, 1, 1]
    assert [int(s.in_a_row) for s in (one, two, three)] == [0, 1, 0]
    assert [bool(s.last_finite) for s in (one, two, three)] == [True, False, True]
    assert {k: int(v) for k, v in lb.optim.skipped(optax.chain(tx).init(PARAMS)).items()} == {"total": 0, "in_a_row": 0}


@pytest.mark.parametrize("part", [complex(jnp.nan, 0), complex(0, jnp.inf)])
def test_either_part_of_a_complex_gradient(part):
    params = {"w": jnp.ones(4, jnp.complex64)}
    tx = lb.optim.skip_nonfinite(optax.sgd(1.0))
    updates, state = jax.jit(tx.update)({"w": params["w"].at[2].set(part)}, tx.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["w"], params["w"])
    assert int(state.total) == 1
    assert bool(lb.optim.all_finite(params))


def test_a_bad_loss_counts_too():
    tx = lb.optim.skip_nonfinite(optax.sgd(1.0))
    updates, state = tx.update(GOOD, tx.init(PARAMS), PARAMS, value=jnp.float32(jnp.nan))
    assert int(state.in_a_row) == 1 and not np.any(updates["w"])


def test_an_update_that_is_not_finite_counts_too():
    """A finite gradient, divided by the root of a second moment of 0."""
    tx = lb.optim.skip_nonfinite(optax.scale_by_rms(decay=1.0, eps=0.0))
    updates, state = tx.update(GOOD, tx.init(PARAMS), PARAMS)
    assert int(state.in_a_row) == 1 and not np.any(updates["w"])


def test_packed_parameters_stay():
    params = {"w": lb.Quantizer(tiling=lb.scaling.Group(32)).quantize(jnp.ones((4, 64)))}
    tx = lb.optim.skip_nonfinite(lb.optim.stochastic_rounding(optax.sgd(1.0)))
    updates, state = jax.jit(tx.update)({"w": jnp.full((4, 64), jnp.nan)}, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, lb.optim.apply_updates(params, updates), params)
    assert int(state.total) == 1


def test_all_devices_skip_when_one_does():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = lb.optim.skip_nonfinite(optax.sgd(1.0), axis_name="data")
    grads = jnp.ones((4, 8)).at[2, 5].set(jnp.nan)

    def step(grads):
        updates, state = tx.update(grads, tx.init(grads), grads)
        return updates, state.total[None]

    updates, total = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(grads)
    np.testing.assert_array_equal(updates, np.zeros((4, 8)))
    np.testing.assert_array_equal(total, np.ones(4))


def test_counters_of_no_or_several():
    tx = lb.optim.skip_nonfinite(optax.sgd(1.0))
    with pytest.raises(ValueError, match="0 states of skip_nonfinite"):
        lb.optim.skipped(optax.adam(1e-3).init(PARAMS))
    with pytest.raises(ValueError, match="2 states"):
        lb.optim.skipped((tx.init(PARAMS), tx.init(PARAMS)))


def test_loss_scale_grows_and_backs_off():
    """Against the rule of Micikevicius et al., step by step."""
    tx = lb.optim.dynamic_loss_scale(optax.sgd(1.0), initial=8.0, growth_interval=3, largest=16.0)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    seen = []
    for good in (1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0):
        _, state = update(GOOD if good else bad(), state, PARAMS)
        seen.append(float(state.scale))
    assert seen == [8, 8, 16, 16, 16, 16, 8, 4, 4, 4, 8, 4, 2, 1, 1, 1, 1, 1]
    assert int(state.total) == 9 and int(state.in_a_row) == 7


def test_scaled_training_is_plain_training():
    """With powers of two the scale comes out again exactly, in a jitted step without a value on the host."""
    loss_of = lambda p: jnp.sum((p["w"] - 0.3) ** 2) + jnp.sum(p["b"] ** 2)
    plain = optax.adamw(1e-2)
    scaled = lb.optim.dynamic_loss_scale(plain)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: lb.optim.scale_loss(loss_of(p), state))(params)
        updates, after = scaled.update(grads, state, params)
        return optax.apply_updates(params, updates), after, lb.optim.unscale(value, state)

    params, state = PARAMS, scaled.init(PARAMS)
    expected, other = PARAMS, plain.init(PARAMS)
    for _ in range(5):
        params, state, value = step(params, state)
        np.testing.assert_allclose(value, loss_of(expected), rtol=1e-6)
        updates, other = jax.jit(plain.update)(jax.grad(loss_of)(expected), other, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)


def test_float16_gradients_that_would_vanish():
    """A gradient below float16's smallest value survives scaled, and moves float16 parameters with a master copy."""
    params = {"w": jnp.ones(4, jnp.float16)}
    tx = lb.optim.dynamic_loss_scale(lb.optim.master_weights(optax.sgd(1.0)), initial=2.0**15)
    state = tx.init(params)
    tiny = 2.0**-26
    assert jnp.float16(tiny) == 0
    grads = {"w": jnp.full(4, tiny * 2.0**15, jnp.float16)}
    _, state = tx.update(grads, state, params)
    np.testing.assert_array_equal(lb.optim.params_from_master(params, state)["w"], np.float16(1))
    assert float(lb.optim.current_loss_scale(state)) == 2.0**15
    np.testing.assert_array_equal(state.inner_state.master["w"], np.float32(1 - tiny))


@pytest.mark.parametrize("wrong", [dict(initial=0.5), dict(factor=1.0), dict(growth_interval=0), dict(initial=2.0**30)])
def test_loss_scale_errors(wrong):
    with pytest.raises(ValueError, match="smallest <= initial <= largest, a factor above 1"):
        lb.optim.dynamic_loss_scale(optax.sgd(1.0), **wrong)


def test_fresh_states_can_be_donated():
    """Every counter is a buffer of its own, or a donating step refuses to run."""
    params = {"w": jnp.ones(4)}
    for tx in (lb.optim.skip_nonfinite(optax.sgd(0.1)), lb.optim.dynamic_loss_scale(optax.sgd(0.1))):
        step = jax.jit(lambda g, s, p, tx=tx: tx.update(g, s, p), donate_argnums=1)
        _, state = step(params, tx.init(params), params)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32)


def test_states_of_others_and_leaves_that_are_not_floating():
    for tx, name in (
        (lb.optim.skip_nonfinite(optax.sgd(0.1)), "skip_nonfinite"),
        (lb.optim.dynamic_loss_scale(optax.sgd(0.1)), "dynamic_loss_scale"),
    ):
        with pytest.raises(ValueError, match=f"{name} got a tuple for its state.*tx.init"):
            tx.update(GOOD, optax.sgd(0.1).init(PARAMS), PARAMS)
    scaled, whole = lb.optim.dynamic_loss_scale(optax.sgd(0.1)), {"n": jnp.arange(3)}
    with pytest.raises(TypeError, match="dynamic_loss_scale: the parameter 'n' is int32"):
        scaled.init(whole)
    with pytest.raises(TypeError, match="dynamic_loss_scale: the gradient 'n' is int32"):
        scaled.update(whole, scaled.init({"n": jnp.ones(3)}), whole)
