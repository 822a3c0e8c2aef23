"""Gradients in few bits over four devices: nothing is lost in the long run, and the wire carries what it should."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lowbit_jax as lb
from lowbit_jax.optim.state_codecs import finite

DEVICES = 4
SHAPES = {"w": (48, 100), "b": (70,)}
BYTES = {"u8": 1, "s8": 1, "f32": 4, "s32": 4}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def gradients(steps, seed=0):
    """Different on each device, with a common part: leaves of shape (steps, devices, *shape)."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=(steps, DEVICES, *shape)) + 2 * rng.normal(size=(1, 1, *shape))
    return {name: jnp.asarray(draw(shape), jnp.float32) for name, shape in SHAPES.items()}


def runner(tx, mesh, shapes=SHAPES):
    """(init, step) over the mesh: gradients have a leading axis for the device, updates are those of device 0."""
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    specs = lb.optim.compression_specs(jax.eval_shape(tx.init, params), "data")
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False)

    def step(grads, state):
        updates, state = tx.update(jax.tree.map(lambda g: g[0], grads), state)
        return jax.tree.map(lambda u: u[None], updates), state

    step = jax.shard_map(step, mesh=mesh, in_specs=(P("data"), specs), out_specs=(P("data"), specs), check_vma=False)
    return jax.jit(init)(params), jax.jit(step)


COMPRESSORS = {
    "int8": dict(compressor="int8"),
    "int4": dict(compressor="int4"),
    "sign": dict(compressor="sign"),
    "codec": dict(compressor=lb.optim.Blockwise(lb.formats.E4M3, 32)),
    "int8 in two hops": dict(compressor="int8", two_hop=True, axis_size=DEVICES),
    "sign in two hops": dict(compressor="sign", two_hop=True, axis_size=DEVICES),
}


@pytest.mark.parametrize("options", COMPRESSORS.values(), ids=COMPRESSORS)
def test_error_feedback_sums_exactly(options, mesh):
    """What was sent so far and what is left to send are the sum of all gradients, to float32 rounding, and every
    device answers the same."""
    steps, (state, step) = 12, runner(lb.optim.compressed_mean("data", **options), mesh)
    grads = gradients(steps)
    sent = jax.tree.map(lambda g: np.zeros(g.shape[2:]), grads)
    for t in range(steps):
        updates, state = step(jax.tree.map(lambda g, t=t: g[t], grads), state)
        for device in range(1, DEVICES):
            jax.tree.map(lambda u, d=device: np.testing.assert_array_equal(u[d], u[0]), updates)
        sent = jax.tree.map(lambda s, u: s + np.asarray(u[0], np.float64), sent, updates)
    for key, shape in SHAPES.items():
        total = np.asarray(grads[key], np.float64).mean(1).sum(0)
        left = np.asarray(state.error[key], np.float64).mean(0)
        if options.get("two_hop"):
            left = left + np.asarray(state.server_error[key], np.float64).reshape(-1)[: total.size].reshape(shape)
        np.testing.assert_allclose(sent[key] + left, total, atol=2e-4)
        assert np.abs(left).max() > 0, "something was rounded away, or this shows nothing"


def test_without_feedback_signs_are_lost(mesh):
    """The same sum of signs alone is far off: the feedback does the work."""
    error = {}
    for feedback in (True, False):
        state, step = runner(lb.optim.compressed_mean("data", "sign", error_feedback=feedback), mesh)
        grads, total = gradients(30), 0.0
        for t in range(30):
            updates, state = step(jax.tree.map(lambda g, t=t: g[t], grads), state)
            total = total + np.asarray(updates["w"][0])
        expected = np.asarray(grads["w"]).mean(1).sum(0)
        error[feedback] = np.linalg.norm(total - expected) / np.linalg.norm(expected)
    assert error[True] < 0.3 * error[False]


@pytest.mark.parametrize("two_hop", [False, True], ids=["one hop", "two hops"])
def test_sums_are_exact_in_bfloat16_too(two_hop, mesh):
    """A mean of bfloat16 gradients is rounded to bfloat16 once more, and that is fed back too: what was sent and what
    is left are the gradients' sum to float32 rounding, where the rounding alone would lose 12 x 2^-9 of a mean."""
    state, step = runner(lb.optim.compressed_mean("data", "int8", two_hop=two_hop, axis_size=DEVICES), mesh)
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradients(12))
    sent = 0.0
    for t in range(12):
        updates, state = step(jax.tree.map(lambda g, t=t: g[t], grads), state)
        assert updates["w"].dtype == jnp.bfloat16
        sent = sent + np.asarray(updates["w"][0], np.float64)
    total, left = np.asarray(grads["w"], np.float64).mean(1).sum(0), np.asarray(state.error["w"], np.float64).mean(0)
    if two_hop:
        left = left + np.asarray(state.server_error["w"], np.float64).reshape(-1)[: total.size].reshape(total.shape)
    np.testing.assert_allclose(sent + left, total, atol=2e-4)


def test_float16_saturates_and_sends_the_rest_later(mesh):
    """The mean of gradients at the end of float16 and errors of earlier steps can lie beyond it; it must not be inf."""
    state, step = runner(lb.optim.compressed_mean("data", "sign"), mesh, {"w": (64,)})
    large = np.full((DEVICES, 64), 6e4, np.float16) * np.linspace(0.1, 1, 64).astype(np.float16)
    for _ in range(4):
        updates, state = step({"w": jnp.asarray(large)}, state)
        assert np.isfinite(np.asarray(updates["w"], np.float32)).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("size", [3, 70, 300, 5000])
def test_two_hops_of_small_leaves_follow_the_sum_as_one_hop_does(size, mesh):
    """The same gradient 64 times: with feedback the mean sent is the gradient up to 1/64 of an error. Parts are padded
    to equal lengths, and the padding must reach neither a scale nor the errors (3 elements: one device has only it)."""
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=size).astype(np.float32)
    given, found = {"w": jnp.asarray(np.tile(gradient, (DEVICES, 1)))}, {}
    for name, more in (("one", {}), ("two", dict(two_hop=True, axis_size=DEVICES))):
        state, step = runner(lb.optim.compressed_mean("data", "sign", **more), mesh, {"w": (size,)})
        total = 0.0
        for _ in range(64):
            updates, state = step(given, state)
            total = total + np.asarray(updates["w"][0], np.float64)
        found[name] = np.linalg.norm(total - 64 * gradient) / np.linalg.norm(64 * gradient)
        if more:
            padding = np.asarray(state.server_error["w"]).reshape(-1)[size:]
            np.testing.assert_array_equal(padding, 0)
    assert found["one"] < 0.12 and found["two"] <= 2 * found["one"] + 0.01, found


TRANSFORMATIONS = {name: (lambda o=o: lb.optim.compressed_mean("data", **o)) for name, o in COMPRESSORS.items()} | {
    "no feedback": lambda: lb.optim.compressed_mean("data", "int8", error_feedback=False),
    "sign momentum": lambda: lb.optim.sign_momentum("data"),
    "vote": lambda: lb.optim.sign_momentum("data", vote=True),
    "1-bit Adam, warming up": lambda: lb.optim.scale_by_one_bit_adam("data", 9),
    "1-bit Adam": lambda: lb.optim.scale_by_one_bit_adam("data", 1),
}


@pytest.mark.parametrize(("make", "bad"), [
    pytest.param(make, bad, id=f"{bad} {name}")
    for i, (name, make) in enumerate(TRANSFORMATIONS.items()) for bad in ((np.nan, np.inf) if i < 2 else (np.inf,))
])  # fmt: skip
def test_a_gradient_that_is_not_finite_is_seen_and_poisons_nothing(make, bad, mesh):
    """One element on one device: the update is NaN everywhere, the state stays to the bit, and later steps are those of
    a run that never saw it."""
    state, step = runner(make(), mesh)
    grads = gradients(3)
    now = lambda t: jax.tree.map(lambda g: g[t], grads)
    _, state = step(now(0), state)
    updates, after = step(now(1) | {"b": now(1)["b"].at[2, 5].set(bad)}, state)
    assert all(np.isnan(u).all() for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    jax.tree.map(np.testing.assert_array_equal, step(now(2), after), step(now(2), state))


@pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_gradients_of_integers_are_refused(make, mesh):
    state, step = runner(make(), mesh, {"b": (40,)})
    with pytest.raises(TypeError, match="the gradient 'b' is int32; it moves floating arrays only"):
        step({"b": jnp.ones((DEVICES, 40), jnp.int32)}, state)


def test_a_skip_around_the_rest_of_the_chain_counts_it(mesh):
    tx = optax.chain(lb.optim.compressed_mean("data", "int8"), lb.optim.skip_nonfinite(optax.sgd(1.0)))
    state, step = runner(tx, mesh, {"w": (64,)})
    ones = jnp.ones((DEVICES, 64))
    updates, state = step({"w": ones.at[1, 5].set(jnp.inf)}, state)
    np.testing.assert_array_equal(updates["w"], 0)
    assert lb.optim.skipped(state)["total"] == 1
    updates, state = step({"w": ones}, state)
    np.testing.assert_allclose(updates["w"], -1, rtol=1e-6)


def collective_bytes(text):
    """Bytes that arrive at a device in all collectives of a compiled program."""
    total = 0
    for result, kind in re.findall(r"= (.*?) (all-gather|all-reduce|all-to-all)(?:-start)?\(", text):
        sizes = [
            BYTES[dtype] * int(np.prod([int(n) for n in shape.split(",") if n], dtype=int))
            for dtype, shape in re.findall(r"\b(u8|s8|f32|s32)\[([\d,]*)\]", result)
        ]
        share = {"all-gather": (DEVICES - 1) / DEVICES, "all-to-all": (DEVICES - 1) / DEVICES,
                 "all-reduce": 2 * (DEVICES - 1) / DEVICES}[kind]  # fmt: skip
        total += sum(sizes) * share
    return total


BITS = {"int8": 8 + 32 / 256, "int4": 4 + 32 / 64, "sign": 1 + 32 / 2048}  # an element's, with its share of the scale


@pytest.mark.parametrize("two_hop", [False, True], ids=["one hop", "two hops"])
@pytest.mark.parametrize("compressor", BITS)
def test_bytes_on_the_wire(compressor, two_hop, mesh):
    """Counted in the compiled program, against an exact mean of the same gradients. Packed words travel: no array of
    less than 8 bits an element is in a collective."""
    params = jnp.zeros((256, 1024))

    def text(tx):
        specs = lb.optim.compression_specs(jax.eval_shape(tx.init, params), "data")
        state = jax.eval_shape(
            jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs, check_vma=False), params
        )
        step = jax.shard_map(tx.update, mesh=mesh, in_specs=(P(), specs), out_specs=(P(), specs), check_vma=False)
        return jax.jit(step).lower(params, state).compile().as_text()

    exact = optax.stateless(lambda g, _: jax.tree.map(lambda x: jax.lax.pmean(x, "data"), g))
    packed = text(lb.optim.compressed_mean("data", compressor, two_hop=two_hop, axis_size=DEVICES))
    flag = 4 * 2 * (DEVICES - 1) / DEVICES  # one int32 all-reduced: whether every gradient is finite
    ratio = (collective_bytes(packed) - flag) / collective_bytes(text(exact))
    expected = BITS[compressor] / 32 * (1 if two_hop else DEVICES / 2)  # a gather brings n - 1 packed gradients
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)
    assert not re.search(r"[su][124]\[", packed)


def test_sign_momentum_is_the_written_recursion(mesh):
    """m_t = beta m_(t-1) + (1 - beta) mean g_t + mean e_(t-1) - mean e_t, to float32 rounding; votes are signs."""
    beta, grads = 0.9, gradients(6)
    state, step = runner(lb.optim.sign_momentum("data", beta), mesh)
    momentum, left = 0.0, 0.0
    for t in range(6):
        updates, state = step(jax.tree.map(lambda g, t=t: g[t], grads), state)
        error = np.asarray(state.error["w"], np.float64).mean(0)
        expected = beta * momentum + (1 - beta) * np.asarray(grads["w"][t], np.float64).mean(0) + left - error
        momentum, left = np.asarray(updates["w"][0], np.float64), error
        np.testing.assert_allclose(momentum, expected, atol=1e-5)
        np.testing.assert_array_equal(state.momentum["w"], updates["w"][0])
    state, step = runner(lb.optim.sign_momentum("data", beta, vote=True), mesh)
    updates, state = step(jax.tree.map(lambda g: g[0], grads), state)
    assert set(np.unique(updates["w"])) <= {-1.0, 0.0, 1.0}
    votes = np.sign(np.asarray(grads["w"][0])).sum(0)
    np.testing.assert_array_equal(updates["w"][0], np.sign(votes))


def test_one_bit_adam_warms_up_exactly_and_then_descends(mesh):
    """The warm-up is Adam on the mean gradients to the rounding; after it the loss of noisy quadratics still falls."""
    tx = lb.optim.scale_by_one_bit_adam("data", warmup_steps=5)
    state, step = runner(tx, mesh)
    adam = optax.scale_by_adam()
    other = adam.init({name: jnp.zeros(shape) for name, shape in SHAPES.items()})
    grads = gradients(5)
    for t in range(5):
        now = jax.tree.map(lambda g, t=t: g[t], grads)
        updates, state = step(now, state)
        expected, other = adam.update(jax.tree.map(lambda g: g.mean(0), now), other)
        jax.tree.map(lambda u, e: np.testing.assert_allclose(u[0], e, rtol=1e-4, atol=1e-6), updates, expected)
    state, step = runner(tx, mesh)
    params = {name: np.ones(shape) for name, shape in SHAPES.items()}
    noise = gradients(80, seed=3)
    for t in range(80):
        now = jax.tree.map(lambda p, n, t=t: jnp.asarray(p + 0.1 * np.asarray(n[t]), jnp.float32), params,
                           noise)  # fmt: skip
        updates, state = step(now, state)
        params = jax.tree.map(lambda p, u: p - 0.02 * np.asarray(u[0]), params, updates)
    assert np.mean(params["w"] ** 2) < 0.3


def test_finite_sanitizes():
    np.testing.assert_array_equal(finite(jnp.array([1.0, jnp.nan, jnp.inf])), [1.0, 0.0, 0.0])


def test_errors():
    with pytest.raises(ValueError, match="no compressor 'int3'.*int8, int4, sign"):
        lb.optim.compressed_mean("data", "int3")
    with pytest.raises(ValueError, match="axis_size"):
        lb.optim.compressed_mean("data", two_hop=True)
    with pytest.raises(ValueError, match="at least 1 step"):
        lb.optim.scale_by_one_bit_adam("data", 0)
    with pytest.raises(TypeError, match="'n' is int32"):
        lb.optim.compressed_mean("data").init({"n": jnp.arange(3)})


def test_another_number_of_devices_than_there_are(mesh):
    state, step = runner(lb.optim.compressed_mean("data", two_hop=True, axis_size=DEVICES + 1), mesh)
    with pytest.raises(ValueError, match=rf"axis_size={DEVICES + 1}.*'data' has {DEVICES} devices"):
        step({name: jnp.zeros((DEVICES, *shape)) for name, shape in SHAPES.items()}, state)
