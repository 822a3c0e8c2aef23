"""Optimizers with moments in few bits: the published 8-bit Adam, bytes, and the optax they live among."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowbit_jax as lb
from lowbit_jax.optim import Blockwise, Stored, chunks
from tests.optim import reference

PARAMS = {"layer": {"kernel": jnp.full((64, 128), 0.5, jnp.float32)}, "bias": jnp.zeros(128)}
ALL = {
    "adam": lambda **k: lb.optim.adam_low_bit(1e-2, **k),
    "adamw": lambda **k: lb.optim.adamw_low_bit(1e-2, **k),
    "lion": lambda **k: lb.optim.lion_low_bit(1e-3, **k),
    "adafactor": lambda **k: lb.optim.adafactor_low_bit(1e-2, **k),
    "muon": lambda **k: lb.optim.muon_low_bit(1e-2, **k),
}


def gradients(steps, shape, seed=0):
    """Noisy, of sizes that differ by orders of magnitude between columns."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-3, 0, shape[-1])
    return [(rng.normal(size=shape) + 0.3).astype(np.float32) * size.astype(np.float32) for _ in range(steps)]


@pytest.mark.parametrize("name", ALL)
def test_the_smallest_arrays_are_stored_too_if_asked(name):
    assert len(stored_in(ALL[name](min_size=0).init(PARAMS))) >= 1


def stepper(tx):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def begin(tx, params):
    """Its first state, by one program and not one for each operation."""
    return jax.jit(tx.init)(params)


def stored_in(state):
    leaves = jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, Stored))
    return [leaf for leaf in leaves if isinstance(leaf, Stored)]


@pytest.mark.parametrize("shape", [(32, 512), (67, 100)])
def test_8_bit_adamw_is_the_published_algorithm(shape):
    """Codes, scales and parameters over 12 steps against the transcription.

    Codes differ only where float32 and float64 fall on two sides of a threshold; such a code is the neighboring one."""
    p = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    tx = lb.optim.adamw_low_bit(1e-2, weight_decay=0.1)
    step, params, state = stepper(tx), jnp.asarray(p), begin(tx, p)
    peer, expected = reference.Adam8bit(shape, 1e-2, weight_decay=0.1), p.astype(np.float64)
    for g in gradients(12, shape):
        params, state = step(params, state, jnp.asarray(g))
        expected = peer.step(expected, g.astype(np.float64))
    for ours, theirs in zip(stored_in(state), (peer.m, peer.v), strict=True):
        codes = np.asarray(ours.parts.words).reshape(-1)[: p.size].astype(int)
        assert np.max(np.abs(codes - theirs[0].reshape(-1))) <= 1
        assert np.mean(codes != theirs[0].reshape(-1)) < 1e-3
        np.testing.assert_allclose(np.asarray(ours.parts.scales[0]).reshape(-1), theirs[1], rtol=1e-2)
    assert np.mean(np.abs(np.asarray(params) - expected) > 1e-5) < 1e-2
    np.testing.assert_allclose(params, expected, atol=2e-3)


@pytest.mark.parametrize(("bits", "most"), [(8, 2.1), (4, 1.1), ("e4m3", 2.1), ("coat", 2.1)])
def test_bytes_of_both_moments(bits, most):
    """By the compiler's account: what `init` answers, and what `update` takes beside gradients and parameters."""
    params = {"a": jnp.zeros((512, 512)), "b": jnp.zeros((300, 1000))}
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    tx = lb.optim.adam_low_bit(1e-3, bits=bits)
    made = jax.jit(tx.init).lower(params).compile().memory_analysis().output_size_in_bytes
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(lambda g, s: tx.update(g, s)).lower(params, state).compile().memory_analysis()
    assert made / count <= most
    assert (compiled.argument_size_in_bytes - 4 * count) / count <= most


def loss_of(params):
    return sum(jnp.sum((p.astype(jnp.float32) - 0.1) ** 2) for p in jax.tree.leaves(params))


gradient_of = jax.jit(jax.grad(loss_of))


@pytest.mark.parametrize(("name", "bits"), [*((name, 8) for name in ALL), ("adam", 4), ("muon", 4)])
def test_every_optimizer_descends_close_to_its_float32_twin(name, bits):
    tx = ALL[name](bits=bits, min_size=256)
    twin = ALL[name](bits=bits, min_size=10**9)
    noise = gradients(8, (64, 128))

    def run(tx):
        step, params, state = stepper(tx), PARAMS, begin(tx, PARAMS)
        for n in noise:
            grads = gradient_of(params)
            grads["layer"]["kernel"] += 0.1 * n
            params, state = step(params, state, grads)
        return params, state

    with pytest.warns(UserWarning, match="nothing in few bits"):
        expected, plain = run(twin)
    params, state = run(tx)
    assert stored_in(state) and not stored_in(plain)
    moved = np.asarray(expected["layer"]["kernel"]) - 0.5
    error = np.asarray(params["layer"]["kernel"]) - np.asarray(expected["layer"]["kernel"])
    assert float(loss_of(params)) < float(loss_of(PARAMS))
    most = {8: 0.1, 4: 0.35}[bits] * (3 if name == "muon" else 1)  # it makes small directions as large as the others
    assert np.linalg.norm(error) / np.linalg.norm(moved) < most


@pytest.mark.parametrize("bits", [8, "e4m3", "coat", 4])
def test_rare_gradients_do_not_explode(bits):
    """Rows with gradients of size 1 share their blocks with rows whose only gradient is 3e-4: a second moment that
    rounds to 0 beside a first that does not makes a step of m / eps, 10 and not 0.001 (8 bits and E4M3 had that)."""
    rng = np.random.default_rng(0)
    params = {"table": jnp.zeros((64, 128))}
    low, plain = lb.optim.adam_low_bit(1e-3, bits=bits), optax.adam(1e-3)
    steps = [jax.jit(tx.update) for tx in (low, plain)]
    states, largest = [begin(low, params), plain.init(params)], np.zeros((2, 30))
    for i in range(30):
        g = np.zeros((64, 128), np.float32)
        g[0::2] = rng.normal(size=(32, 128))
        g[1::2] = 3e-4 * rng.normal(size=(32, 128)) if i == 20 else 0
        for k in (0, 1):
            updates, states[k] = steps[k]({"table": jnp.asarray(g)}, states[k])
            largest[k, i] = np.max(np.abs(updates["table"]))
    assert np.all(largest[0] <= 2 * largest[1].max())


def test_embeddings_stay_in_float32_unless_told():
    """As bitsandbytes has it: what `keep` finds in a path; the table says which and why."""
    params = {
        "embed": {"embedding": jnp.zeros((64, 128))},
        "block": {"kernel": jnp.zeros((64, 128))},
        "b": jnp.zeros(3),
    }
    state = lb.optim.adamw_low_bit(1e-3).init(params)
    mu = state.inner_state[0].mu
    assert isinstance(mu["block"]["kernel"], Stored) and mu["embed"]["embedding"].dtype == jnp.float32
    table = {row.split()[0]: row for row in lb.optim.explain_state(state).splitlines()}
    assert "(keep)" in table["inner_state/0/mu/embed/embedding"]
    assert "fewer than 4096 elements (min_size)" in table["inner_state/0/nu/b"]
    assert "keep" not in table["inner_state/0/mu/block/kernel"]
    every = lb.optim.adamw_low_bit(1e-3, keep=()).init(params).inner_state[0]
    assert isinstance(every.nu["embed"]["embedding"], Stored)
    encoded = lb.optim.encode_state(optax.scale_by_adam().init(params), keep=("kernel",)).inner_state
    assert isinstance(encoded.mu["embed"]["embedding"], Stored) and not isinstance(
        encoded.mu["block"]["kernel"], Stored
    )
    graph, variables = nnx.split(nnx.Embed(64, 128, rngs=nnx.Rngs(0)))
    with pytest.warns(UserWarning, match="nothing in few bits.*keep"):
        assert not stored_in(lb.optim.adamw_low_bit(1e-3).init({"wte": variables}))
    with pytest.raises(TypeError, match="sequence of regular expressions"):
        lb.optim.adamw_low_bit(1e-3, keep="embed")


@pytest.mark.parametrize("in_chunks", [False, True])
def test_gradients_of_other_parameters(in_chunks, monkeypatch):
    """A state for {a, b} and a gradient of b alone: b must not get a's moments."""
    monkeypatch.setattr(chunks, "pays", lambda: in_chunks)
    both = {"a": jnp.ones((64, 128)), "b": jnp.ones((64, 128))}
    tx = lb.optim.adamw_low_bit(1e-2)
    state = tx.init(both)
    for params in ({"b": both["b"]}, {**both, "c": both["a"]}):
        with pytest.raises(ValueError, match="'(a|c)' is in the (state|gradients) and not in the (gradients|state)"):
            tx.update(params, state, params)
    other = {**both, "b": jnp.ones((128, 128))}
    with pytest.raises(ValueError, match=r"'b' has shape \(64, 128\) in the state .*mu.* and \(128, 128\)"):
        tx.update(other, state, other)
    with pytest.raises(
        ValueError, match="'a' is stored as dynamic_tree8.*this optimizer stores it as e4m3.*encode_state"
    ):
        lb.optim.adamw_low_bit(1e-2, bits="e4m3").update(both, state, both)


def operation_that_joins(tx, params):
    """The name that `elementwise=True` complains of, or None."""
    try:
        lb.optim.low_bit_state(tx, elementwise=True).init(params)
    except ValueError as error:
        return re.search("the operation '(.*?)'", str(error))[1]


def test_what_joins_elements_does_not_go_in_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "pays", lambda: True)
    monkeypatch.setattr(chunks, "update_in_chunks", lambda *_: pytest.fail("went in chunks"))
    schedule = optax.join_schedules([optax.linear_schedule(0, 1, 5), optax.cosine_decay_schedule(1.0, 9)], [5])
    alike = (optax.scale_by_adam(), optax.lion(1e-3), optax.trace(0.9), optax.scale_by_rms(), optax.adamw(schedule))
    assert [operation_that_joins(tx, PARAMS) for tx in alike] == [None] * 5
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    sums = (clipped, optax.lamb(1e-3), optax.chain(optax.centralize(), optax.adam(1e-3)))
    assert [operation_that_joins(tx, PARAMS) for tx in sums] == ["reduce_sum"] * 3
    assert operation_that_joins(optax.contrib.muon(1e-3), PARAMS)
    noisy = optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.adam(1e-3))
    assert operation_that_joins(noisy, PARAMS)
    running = optax.GradientTransformation(
        lambda p: optax.EmptyState(), lambda u, s, p=None: (jax.tree.map(lambda x: jnp.cumsum(x, -1), u), s)
    )
    assert operation_that_joins(optax.chain(running, optax.adam(1e-3)), PARAMS) == "cumsum"
    tx = lb.optim.low_bit_state(clipped)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="elementwise=True.*'reduce_sum'.*clipping by a norm"):
        lb.optim.low_bit_state(clipped, elementwise=True).init(PARAMS)


@pytest.mark.parametrize("mask", [lambda p: jax.tree.map(lambda x: x.ndim > 1, p), {"a": True, "b": False, "c": True}])
def test_masks_hold_in_chunks(mask, monkeypatch):
    """Rows of a long bias have two axes, the bias has one: masks look at the parameters as they are."""
    monkeypatch.setattr(chunks, "pays", lambda: True)
    params = {"a": jnp.ones((64, 512)), "b": jnp.ones(8192), "c": jnp.ones((64, 512))}
    grads = jax.tree.map(lambda p: 0.01 * p, params)
    decay = dict(weight_decay=0.5, mask=mask)
    for tx, plain in (
        (lb.optim.adamw_low_bit(1e-3, **decay), optax.adamw(1e-3, **decay)),
        (lb.optim.lion_low_bit(1e-3, **decay), optax.lion(1e-3, 0.9, 0.99, **decay)),
    ):
        lowered = jax.jit(tx.update).lower(grads, jax.eval_shape(tx.init, params), params)
        assert lowered.as_text().count("stablehlo.while") == 2  # a and c alike, b by itself
        found, _ = lowered.compile()(grads, begin(tx, params), params)
        expected, _ = jax.jit(lambda g, p, plain=plain: plain.update(g, plain.init(p), p))(grads, params)
        chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_leaves_of_a_kind_share_one_loop(monkeypatch):
    """The program grows by what is copied in and out of the loop, not by another loop for each leaf."""
    monkeypatch.setattr(chunks, "pays", lambda: True)
    tx = lb.optim.adamw_low_bit(1e-3)
    for count in (2, 12):
        params = {f"layer{i}": jnp.zeros((64, 128)) for i in range(count)}
        text = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params).as_text()
        assert text.count("stablehlo.while") == 1


@pytest.mark.parametrize(
    ("name", "arrays"),
    [("adan", 4), ("novograd", 1), ("adadelta", 2), ("sm3", 1), ("rprop", 0), ("optimistic_gradient_descent", 1)],
)
def test_states_of_less_usual_optimizers_are_known(name, arrays):
    tx = lb.optim.low_bit_state(getattr(optax, name)(1e-2), min_size=512)
    if not arrays:
        with pytest.warns(UserWarning, match="nothing in few bits"):
            state = tx.init(PARAMS)
    else:
        state = tx.init(PARAMS)
    params, step = PARAMS, stepper(tx)
    for _ in range(3):
        params, state = step(params, state, gradient_of(params))
    assert len(stored_in(state)) == arrays
    assert float(loss_of(params)) < float(loss_of(PARAMS))


def test_decay_rates_in_16_bits_are_refused():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    inject = optax.inject_hyperparams(lb.optim.adamw_low_bit, static_args=("bits", "min_size"))
    with pytest.raises(ValueError, match="b1 is a bfloat16.*hyperparam_dtype=jnp.float32"):
        inject(learning_rate=1e-3).init(params)


@pytest.mark.parametrize(("bits", "in_chunks"), [(8, False), (4, True), ("coat", True)])
def test_arrays_without_elements_stay_as_they_are(bits, in_chunks, monkeypatch):
    monkeypatch.setattr(chunks, "pays", lambda: in_chunks)
    params = {"a": jnp.zeros(0), "b": jnp.zeros((0, 5)), "c": jnp.zeros((3, 0)), "w": jnp.ones((16, 16))}
    tx = lb.optim.adamw_low_bit(1e-2, bits=bits, min_size=0)
    state = begin(tx, params)
    assert {s.shape for s in stored_in(state)} == {(16, 16)}
    moved, state = stepper(tx)(params, state, params)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(moved["w"], 0.99, atol=1e-4)
    row = next(row for row in lb.optim.explain_state(state, min_size=0).splitlines() if "mu/b" in row)
    assert row.endswith("no elements")
    with pytest.warns(UserWarning, match="nothing in few bits"):  # an unknown field without elements is no large one
        lb.optim.low_bit_state(optax.scale_by_rss(), min_size=0).init({"b": params["b"]})


def test_small_moments_and_unlisted_fields_stay_float32():
    tx = lb.optim.adamw_low_bit(1e-3)
    state = tx.init(PARAMS)
    assert {s.shape for s in stored_in(state)} == {(64, 128)}
    table = lb.optim.explain_state(state)
    assert "mu/bias" in table and "float32" in table and "unsigned_dynamic_tree8 block 256" in table
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    assert tx.init(half).inner_state[0].mu["bias"].dtype == jnp.float32


def transformations():
    low = lb.optim.adamw_low_bit
    inject = optax.inject_hyperparams(low, static_args=("bits", "min_size"), hyperparam_dtype=jnp.float32)
    return {
        "chain": optax.chain(optax.clip_by_global_norm(1.0), low(1e-3)),
        "schedule": low(optax.cosine_decay_schedule(1e-3, 10)),
        "inject_hyperparams": inject(learning_rate=1e-3),
        "MultiSteps": optax.MultiSteps(low(1e-3), 2),
        "masked": optax.chain(
            optax.masked(low(1e-3), {"layer": True, "bias": False}),
            optax.masked(optax.scale(-1e-3), {"layer": False, "bias": True}),
        ),
        "multi_transform": optax.multi_transform(
            {"a": low(1e-3), "b": optax.sgd(1e-3)}, {"layer": {"kernel": "a"}, "bias": "b"}
        ),
        "around": lb.optim.low_bit_state(optax.chain(optax.scale_by_adam(), optax.trace(0.9), optax.scale(-1e-3))),
        "skip": lb.optim.skip_nonfinite(low(1e-3)),
    }


HALF = [(name, "bfloat16") for name in ("inject_hyperparams", "MultiSteps", "around")]


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in transformations()), *HALF])
def test_composes_and_runs_in_a_scan(name, dtype):
    """Six steps in one `scan` (the state keeps its types), equal to six single ones."""
    tx = transformations()[name]
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_of)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    single = jax.jit(step)
    carry = params, begin(tx, params)
    scanned = jax.jit(lambda carry: jax.lax.scan(step, carry, length=6)[0])(carry)
    for _ in range(6):
        carry = single(carry, None)[0]
    assert stored_in(carry[1])
    assert float(loss_of(carry[0])) < float(loss_of(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), scanned[0], carry[0])
    assert jax.tree.structure(scanned) == jax.tree.structure(carry)


def test_one_trace_and_nothing_comes_to_the_host():
    traces = 0
    tx = lb.optim.adamw_low_bit(1e-3)

    @jax.jit
    def step(params, state):
        nonlocal traces
        traces += 1
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    carry = step(PARAMS, tx.init(PARAMS))
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            carry = step(*carry)
    assert traces == 1


@pytest.mark.parametrize("name", ALL)
def test_hyperparameters_can_be_injected(name):
    """The ready-made optimizers show optax their arguments, also those that they hand on."""
    make = getattr(lb.optim, f"{name}_low_bit")
    static = ("bits", "min_size", *(("min_dim_size_to_factor",) if name == "adafactor" else ()))
    tx = optax.inject_hyperparams(make, static_args=static)(learning_rate=lambda count: 1e-2 / (count + 1))
    state = tx.init(PARAMS)
    assert stored_in(state)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, state = jax.jit(tx.update)(grads, state, PARAMS)
    plain = make(1e-2)
    expected, _ = jax.jit(plain.update)(grads, plain.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-8)
    assert "learning_rate" in state.hyperparams


def test_rates_that_sixteen_bits_round_to_one():
    with pytest.raises(ValueError, match="beta is a bfloat16"):
        lb.optim.muon_low_bit(1e-3, beta=jnp.bfloat16(0.999))


@pytest.mark.parametrize("bits", [8, 4, "e4m3", "coat"])
def test_a_gradient_whose_square_overflows(bits):
    """float32 Adam stops that element; a second moment stored as 0 would make a step of 1e18 of it."""
    tx = lb.optim.adam_low_bit(1e-3, bits=bits)
    step, state = stepper(tx), begin(tx, PARAMS)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 0.1), PARAMS)
    params, state = step(PARAMS, state, grads)
    huge = {**grads, "layer": {"kernel": grads["layer"]["kernel"].at[2, 3].set(1e20)}}
    for given in (huge, grads, grads):
        params, state = step(params, state, given)
    assert float(jnp.abs(params["layer"]["kernel"] - PARAMS["layer"]["kernel"]).max()) < 0.01


def test_moments_inside_of_a_state_that_is_named():
    """`fields=` says what the wrapper's own arrays are, and Adam's moments inside of it are found all the same."""
    many = optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation()
    tx = lb.optim.low_bit_state(many, fields={"MultiStepsState.acc_grads": None})
    state = tx.init(PARAMS)
    assert len(stored_in(state)) == 2
    assert "min_size" in lb.optim.explain_state(state)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 0.1), PARAMS)
    params, exact = PARAMS, many.init(PARAMS)
    other = PARAMS
    for _ in range(4):
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, exact = jax.jit(many.update)(grads, exact, other)
        other = optax.apply_updates(other, updates)
    chex.assert_trees_all_close(params, other, atol=1e-3)


def test_fields_of_unknown_kind_are_named_with_their_class():
    with pytest.raises(ValueError, match=r"ProdigyState\.exp_avg \(1 arrays\)"):
        lb.optim.low_bit_state(optax.contrib.prodigy()).init(PARAMS)
    for tx in (optax.rmsprop(1e-3, bias_correction=True), optax.contrib.simplified_ademamix(1e-3)):
        assert stored_in(lb.optim.low_bit_state(tx).init(PARAMS))


@pytest.mark.parametrize("bias_correction", [False, True])
def test_moments_whose_difference_is_taken_stay_in_float32(bias_correction):
    """sqrt(nu - mu**2) of a gradient that hardly changes: a code's rounding is more than the whole difference."""
    tx = lb.optim.low_bit_state(optax.rmsprop(1e-3, centered=True, bias_correction=bias_correction))
    with pytest.warns(UserWarning, match="nothing in few bits"):
        assert not stored_in(tx.init(PARAMS))


@pytest.mark.parametrize("wrap", [lb.optim.low_bit_state, lb.optim.master_weights])
def test_gradients_that_are_not_floating(wrap):
    tx = wrap(optax.adam(1e-3))
    with pytest.raises(TypeError, match="the gradient 'bias' is int32"):
        tx.update(jax.tree.map(lambda p: p.astype(jnp.int32), PARAMS), tx.init(PARAMS), PARAMS)


def test_what_is_no_codec_and_no_pattern():
    with pytest.raises(TypeError, match=r"low_bit_state\(second='e4m3'\): give a codec"):
        lb.optim.adamw_low_bit(1e-3, codecs={"second": "e4m3"})
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        lb.optim.adamw_low_bit(1e-3, keep=("(",))


def test_a_nan_gradient_does_not_poison_its_block():
    tx = lb.optim.adamw_low_bit(1e-2)
    step, state = stepper(tx), begin(tx, PARAMS)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 0.1), PARAMS)
    bad = {**grads, "layer": {"kernel": grads["layer"]["kernel"].at[2, 3].set(jnp.nan)}}
    params, state = step(PARAMS, state, bad)
    params, state = step(params, state, grads)
    lost = np.argwhere(~np.isfinite(np.asarray(params["layer"]["kernel"])))
    np.testing.assert_array_equal(lost, [[2, 3]])
    assert all(bool(jnp.all(jnp.isfinite(s.dequantize()))) for s in stored_in(state))


@pytest.mark.parametrize(("bits", "dtype"), [(8, "float32"), (4, "bfloat16"), ("coat", "float32")])
def test_chunks_give_the_step_of_the_whole(bits, dtype, monkeypatch):
    """A loop of its own, leaves that share one (and do not fill its last chunk), leaves too small or not made of rows,
    stacked matrices by their rows and columns: the same codes as without chunks."""
    shapes = {"a": (100, 256), "b": (5,), "c": (33, 257), "d": (2, 120, 256), "e": (23, 256), "f": (512, 10)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draw = lambda keys: {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    params = jax.tree.map(lambda p: p.astype(dtype), jax.jit(draw)(keys))
    tx = lb.optim.adamw_low_bit(1e-2, bits=bits)

    def run(in_chunks):
        monkeypatch.setattr(chunks, "pays", lambda: in_chunks)
        monkeypatch.setattr(chunks, "ELEMENTS", 1 << 11)
        monkeypatch.setattr(chunks, "ALONE", 1 << 14)
        step, carry = stepper(tx), (params, jax.jit(tx.init)(params))
        for _ in range(3):
            grads = jax.tree.map(lambda p: jnp.asarray(np.asarray(p, np.float32) * 0.3 + 0.01, p.dtype), carry[0])
            carry = step(*carry, grads)
        return carry

    expected, found = run(False), run(True)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert int(found[1].inner_state[0].count) == 3
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if ours.dtype == jnp.uint8:
            other = np.asarray(ours) != np.asarray(theirs)
        else:
            other = ~np.isclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=1e-5, atol=1e-6)
        assert np.mean(other) < 1e-3  # a moment on the edge between two codes, in another order of operations


@pytest.mark.parametrize("in_chunks", [False, True])
def test_nnx_state_under_plain_jit(in_chunks, monkeypatch):
    """As the recipes train: `nnx.split`, parameters in variables, and `jax.jit`."""
    monkeypatch.setattr(chunks, "pays", lambda: in_chunks)
    monkeypatch.setattr(chunks, "ELEMENTS", 1 << 11)
    graph, params = nnx.split(nnx.Linear(64, 128, rngs=nnx.Rngs(0)))
    tx = lb.optim.adamw_low_bit(1e-2)
    x = jnp.ones((4, 64))

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.mean((nnx.merge(graph, p)(x) - 1) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (moved, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=30))((params, begin(tx, params)))
    assert len(stored_in(state)) == 2
    assert float(jnp.mean((nnx.merge(graph, moved)(x) - 1) ** 2)) < 0.1


def test_states_in_variables_and_out_of_them_are_different_trees():
    """JAX compares the trees of what it has traced before; a tree cannot be compared with None."""
    graph, variables = nnx.split(nnx.Linear(64, 128, rngs=nnx.Rngs(0)))
    trees = [jax.tree.structure(stored_in(lb.optim.adam_low_bit(1e-2).init(p)))
             for p in (variables, nnx.as_pure(variables))]  # fmt: skip
    assert trees[0] != trees[1] and trees[1] != trees[0]


def test_nnx_optimizer():
    model = nnx.Sequential(nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(128, 64, rngs=nnx.Rngs(1)))
    optimizer = nnx.Optimizer(model, lb.optim.adamw_low_bit(1e-2), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (32, 64))
    loss = lambda model: jnp.mean((model(x) - x) ** 2)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    values = [float(step(model, optimizer)) for _ in range(20)]
    assert values[-1] < 0.7 * values[0]


def masking_transformations():
    low = dict(bits=8, min_size=256)
    return {
        "muon": lb.optim.muon_low_bit(1e-2, **low),
        "masked": optax.chain(
            optax.masked(lb.optim.adam_low_bit(1e-2, **low), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
            optax.masked(optax.scale(-1e-2), lambda p: jax.tree.map(lambda x: x.ndim <= 1, p)),
        ),
        "learned steps": optax.multi_transform(
            {"weight": lb.optim.adamw_low_bit(1e-2, **low), "step": lb.optim.adamw_low_bit(1e-4, min_size=1, keep=())},
            lb.optim.label_learned_steps(),
        ),
    }


@pytest.mark.parametrize(
    ("name", "in_chunks"), [("muon", False), ("masked", False), ("masked", True), ("learned steps", True)]
)
def test_masked_variables_of_nnx(name, in_chunks, monkeypatch):
    """optax masks the array within a variable, not the variable. Under `nnx.Optimizer`, and by hand with `nnx.split`,
    the steps are those of a tree of arrays."""
    monkeypatch.setattr(chunks, "pays", lambda: in_chunks)
    model = lb.quantize(nnx.Linear(64, 128, rngs=nnx.Rngs(0)), lb.methods.get("lsq", bits=4))
    tx = masking_transformations()[name]
    variables = nnx.state(model, nnx.Param)

    @nnx.jit
    def with_nnx(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: loss_of(nnx.state(model, nnx.Param)))(model))

    def steps(params):
        step, state = stepper(tx), begin(tx, params)
        for _ in range(3):
            params, state = step(params, state, gradient_of(params))
        return params, state

    expected, state = steps(nnx.as_pure(variables))
    assert stored_in(state) and float(loss_of(expected)) < float(loss_of(variables))
    found, by_hand = steps(variables)
    assert [s.codec for s in stored_in(by_hand)] == [s.codec for s in stored_in(state)]
    assert "dynamic_tree8" in lb.optim.explain_state(by_hand)
    jax.tree.map(np.testing.assert_array_equal, nnx.as_pure(found), expected)
    decoded = [lb.optim.decode_state(s) for s in (by_hand, state)]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, decoded))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(3):
        with_nnx(model, optimizer)
    jax.tree.map(np.testing.assert_array_equal, nnx.as_pure(nnx.state(model, nnx.Param)), expected)


def test_sharded_as_on_one_device(tmp_path):
    """Rows over two axes of devices: same codes bit for bit, words and scales where the parameters are; a checkpoint
    written so comes back on one device, and the next step is the same."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    params = {"w": jax.random.normal(jax.random.key(0), (64, 1024)), "b": jnp.zeros(64)}
    grads = jax.tree.map(lambda p: 0.1 * p + 0.01, params)
    shardings = {"w": NamedSharding(mesh, P("data", "tensor")), "b": NamedSharding(mesh, P())}
    tx = lb.optim.adamw_low_bit(1e-2)
    state = begin(tx, params)
    places = lb.optim.state_shardings(state, params, shardings)
    step = stepper(tx)
    expected = step(params, state, grads)
    spread = jax.device_put(params, shardings), jax.device_put(state, places), jax.device_put(grads, shardings)
    found = jax.jit(step, out_shardings=(shardings, places))(*spread)
    first, _ = stored_in(found[1])
    assert first.parts.words.sharding.spec == P("data", "tensor")
    assert first.parts.scales[0].sharding.spec[:2] == ("data", "tensor")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found[1]), jax.device_get(expected[1]))

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", found[1])
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.device_put(state, jax.devices()[0]))
    after = step(jax.device_get(found[0]), restored, grads)
    jax.tree.map(np.testing.assert_array_equal, after, step(*expected, grads))


def test_goes_on_from_a_float32_state():
    plain = optax.scale_by_adam()
    _, state = plain.update(PARAMS, plain.init(PARAMS))
    tx = lb.optim.low_bit_state(plain)
    encoded = lb.optim.encode_state(state)
    assert jax.tree.structure(encoded) == jax.tree.structure(tx.init(PARAMS))
    np.testing.assert_allclose(lb.optim.decode_state(encoded).inner_state.mu["layer"]["kernel"], 0.05, rtol=1e-2)
    with pytest.raises(ValueError, match="ScaleByAdamState.*encode_state"):
        tx.update(PARAMS, state, PARAMS)


def test_errors():
    adam = optax.scale_by_adam()
    with pytest.raises(ValueError, match="bits=3.*8, 4, 'e4m3', 'coat'"):
        lb.optim.low_bit_state(adam, 3)
    with pytest.raises(ValueError, match="has a zero.*LINEAR4_WITHOUT_ZERO"):
        lb.optim.low_bit_state(adam, 4, second=Blockwise(lb.formats.UINT4, 128))
    with pytest.raises(TypeError, match="'layer/kernel' is int32"):
        lb.optim.low_bit_state(adam).init({"layer": {"kernel": jnp.zeros((64, 64), jnp.int32)}})
    with pytest.raises(ValueError, match="matches nothing.*ScaleByAdamState.mu"):
        lb.optim.low_bit_state(adam, fields={"ScaleByAdamState.mo": None}).init(PARAMS)
    with pytest.raises(ValueError, match="write 'ClassOfTheState.field'"):
        lb.optim.low_bit_state(adam, fields={"mu": "first"})
    with pytest.raises(ValueError, match="does not know.*sum_of_squares.*fields="):
        lb.optim.low_bit_state(optax.adagrad(1e-2)).init(PARAMS)
    with pytest.raises(TypeError, match="static_args=.'bits', 'min_size'"):
        optax.inject_hyperparams(lb.optim.adamw_low_bit)(learning_rate=1e-3).init(PARAMS)
    for bad in ("8", None, True, jnp.zeros(())):
        with pytest.raises(TypeError, match="got min_size=.* of type .*number of elements.*static_args"):
            lb.optim.adamw_low_bit(1e-3, min_size=bad)
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError, match="min_size=.*give 0"):
            lb.optim.adamw_low_bit(1e-3, min_size=bad)


def test_fields_say_what_a_state_is():
    rules = {"ScaleByRssState.sum_of_squares": Blockwise(lb.formats.E5M2, 64)}
    (kept,) = stored_in(lb.optim.low_bit_state(optax.scale_by_rss(), fields=rules).init(PARAMS))
    assert kept.codec.format is lb.formats.E5M2
    rules = {"ScaleByRssState.sum_of_squares": None}
    tx = optax.chain(optax.trace(0.9), optax.scale_by_rss())
    (kept,) = stored_in(lb.optim.low_bit_state(tx, fields=rules).init(PARAMS))
    assert kept.codec.format is lb.formats.DYNAMIC_TREE8
