"""Parameters in few bits beside a float32 copy: every step lands on the rounded copy, and none is lost."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.optim.sixteen_bit import on_grid_of
from lowbit_jax.scaling import Group, UnevenTiles

DTYPES = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]


def everywhere(seed=0, size=40_000, exponents=(-30, 12)):
    """Values over many binades, with grid points, ties, neighbors of ties, zeros and denormals of the small formats."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=size) * 2.0 ** rng.uniform(*exponents, size=size)).astype(np.float32)
    coarse = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    ties = (coarse.view(np.uint32) | 0x8000).view(np.float32)
    edges = [np.nextafter(ties, np.float32(s)) for s in (-np.inf, np.inf)]
    special = np.array([0, -0.0, 1e-7, 6e-8, 3e-8, 448, 464, 57344, 65504, 65519, 1e5, -1e5], np.float32)
    return np.concatenate([x, coarse, ties, *edges, special])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_rounding_is_ml_dtypes(dtype):
    """Within the range of the dtype; beyond it, the largest value."""
    x = everywhere()
    largest = float(ml_dtypes.finfo(dtype).max)
    expected = np.clip(x, -largest, largest).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(on_grid_of, static_argnums=1)(jnp.asarray(x), dtype), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("apply", [optax.apply_updates, lb.optim.apply_updates], ids=["optax", "ours"])
def test_parameter_plus_update_is_the_rounded_master(dtype, apply):
    """Steps of every relative size, in one jitted program as users write it.

    The stated exception, values that come nearer to zero by a factor above 2**15 (2**13), is off by at most
    2**-24 of where they were."""
    wide = (-60, 60) if dtype == "bfloat16" else (-20, 14)
    start, step_size = (everywhere(seed, exponents=wide) for seed in (1, 2))
    start = np.clip(start, -6e4, 6e4)
    target = np.where(np.arange(start.size) % 3 == 0, step_size, start * (1 + 1e-3 * np.sign(step_size)))
    target = np.clip(np.where(np.arange(start.size) % 7 == 0, -start, target), -6e4, 6e4).astype(np.float32)
    params = {"w": jnp.asarray(start).astype(dtype)}
    tx = lb.optim.master_weights(optax.sgd(1.0))
    state = tx.init(params)._replace(master={"w": jnp.asarray(start)})

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return apply(params, updates), state

    moved, state = step(params, state, {"w": jnp.asarray(start - target)})
    master = np.asarray(state.master["w"])
    expected = master.astype(dtype).astype(np.float64)
    found, before = (np.asarray(p["w"]).astype(np.float64) for p in (moved, params))
    stated = (np.abs(before) <= 2.0 ** (15 if dtype == "bfloat16" else 13) * np.abs(expected)) | (expected == 0)
    assert stated.mean() > 0.5
    np.testing.assert_array_equal(found[stated], expected[stated])
    assert np.all(np.abs(found - expected) <= np.abs(before) * 2.0**-24 + 2.0**-9 * np.abs(expected))
    exact = lb.optim.params_from_master(params, state)["w"]
    np.testing.assert_array_equal(np.asarray(exact).astype(np.float64), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_steps_add_up(dtype):
    """A thousand steps of 2**-13: the master moves by all of them, nearest rounding without one by none."""
    params = {"w": jnp.ones(8, dtype)}
    grads = {"w": jnp.full(8, -(2.0**-13))}
    tx = lb.optim.master_weights(optax.sgd(1.0))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (lb.optim.apply_updates(params, updates), state), None

    (moved, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=1000))((params, tx.init(params)))
    np.testing.assert_array_equal(state.master["w"], np.float32(1 + 1000 * 2.0**-13))
    np.testing.assert_array_equal(moved["w"], jnp.float32(1 + 1000 * 2.0**-13).astype(dtype))
    assert (jnp.float32(1) + 2.0**-13).astype(dtype) == 1, "this step alone is lost"


@pytest.mark.parametrize("name", ["int8", "int4", "ternary", "e4m3", "mxfp4"])
def test_parameters_on_a_grid(name):
    """After a step the matrix is what the quantizer makes of the master, the vector (one axis) the master itself."""
    fmt = lb.formats.get(name)
    key = jax.random.key(0)
    params = {"w": jax.random.normal(key, (64, 32)).astype(jnp.bfloat16), "b": jnp.zeros(32)}
    tx = lb.optim.master_weights(optax.adam(1e-2), fmt)
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
    moved = optax.apply_updates(params, updates)
    quantizer = lb.optim.landing.param_quantizer(fmt, "test")
    expected = quantizer(state.master["w"], axis=-2).astype(jnp.bfloat16)
    np.testing.assert_array_equal(moved["w"], expected)
    np.testing.assert_allclose(moved["b"], state.master["b"], rtol=1e-6)
    assert jnp.unique(moved["w"][:, 0]).size <= len(quantizer.format.levels)


def test_packed_parameters():
    """`QTensor` weights: differentiated through `unpacked`, packed anew from the master after each step."""
    quantizer = lb.quest_quantizer(4).__class__(format=lb.formats.INT4, tiling=lb.scaling.Group(32))
    w = jax.random.normal(jax.random.key(0), (16, 64))
    params = {"w": quantizer.quantize(w)}
    tx = lb.optim.master_weights(optax.sgd(0.1))

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(lb.optim.unpacked(params))
        updates, state = tx.update(grads, state, params)
        return lb.optim.apply_updates(params, updates), state

    moved, state = step(params, tx.init(params))
    expected = quantizer.quantize(state.master["w"])
    np.testing.assert_array_equal(moved["w"].words, expected.words)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    np.testing.assert_allclose(state.master["w"], 0.8 * params["w"].dequantize(), rtol=1e-6)


PACKED = {
    "quest": lb.quest_quantizer(4),
    "zero points": lb.Quantizer(format=lb.formats.UINT8, tiling=lb.scaling.Group(32), zero_point=True),
    "2:4": lb.Quantizer(sparsity=lb.sparsity.NofM(2, 4)),
    "nvfp4": lb.block_quantizer(lb.formats.NVFP4),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_parameters_of_every_kind_are_packed_anew(name):
    quantizer = PACKED[name]
    params = {"w": quantizer.quantize(jax.random.normal(jax.random.key(0), (16, 64)) + 0.3).sealed()}
    tx = lb.optim.master_weights(optax.sgd(0.25))
    grads = {"w": jnp.ones((16, 64))}

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return lb.optim.apply_updates(params, updates), state

    moved, state = step(params, tx.init(params))
    np.testing.assert_allclose(state.master["w"], params["w"].dequantize() - 0.25, rtol=1e-6)
    expected = quantizer.quantize(state.master["w"]).dequantize()
    np.testing.assert_allclose(moved["w"].dequantize(), expected, atol=2e-6)  # the same codes, scales to a last bit
    moved["w"].validate()
    assert jax.tree.structure(moved) == jax.tree.structure(params)


def test_packed_parameters_with_learned_scales_are_refused():
    quantizer = lb.Quantizer(fit=lb.scaling.Learned(), estimator=lb.estimators.LSQ())
    w = jnp.ones((4, 64))
    params = {"w": quantizer.quantize(w, scale=quantizer.initial_scale(w))}
    tx = lb.optim.master_weights(optax.sgd(0.25))
    with pytest.raises(ValueError, match="master_weights.*learned scale"):
        tx.update({"w": w}, tx.init(params), params)


def test_composes():
    """Around a chain with a schedule and low-bit moments, inside and around `MultiSteps`, in `inject_hyperparams`."""
    params = {"w": jnp.ones((64, 128), jnp.bfloat16)}
    grads = {"w": jnp.full((64, 128), 0.5, jnp.bfloat16)}
    inner = lambda learning_rate: optax.chain(optax.clip_by_global_norm(1.0), lb.optim.adamw_low_bit(learning_rate))
    for tx in (
        lb.optim.master_weights(inner(optax.cosine_decay_schedule(1e-3, 10))),
        optax.MultiSteps(lb.optim.master_weights(inner(1e-3)), 2),
        lb.optim.master_weights(optax.MultiSteps(inner(1e-3), 2).gradient_transformation()),
        optax.inject_hyperparams(lambda learning_rate: lb.optim.master_weights(inner(learning_rate)))(1e-3),
        lb.optim.skip_nonfinite(lb.optim.master_weights(inner(1e-3))),
    ):
        carry = params, tx.init(params)
        for _ in range(4):
            updates, state = jax.jit(tx.update)(grads, carry[1], carry[0])
            carry = optax.apply_updates(carry[0], updates), state
        assert carry[0]["w"].dtype == jnp.bfloat16 and float(jnp.max(carry[0]["w"])) < 1


def test_optax_refuses_to_add_packed_updates():
    """It would add the bytes of the codes; `nnx.Optimizer` applies updates by it too."""
    quantizer = lb.Quantizer(format=lb.formats.INT8, tiling=lb.scaling.Group(32))
    params = {"w": quantizer.quantize(jax.random.normal(jax.random.key(0), (4, 64))), "b": jnp.ones(4)}
    grads = {"w": jnp.ones((4, 64)), "b": jnp.ones(4)}
    for tx in (lb.optim.master_weights(optax.sgd(0.0)), lb.optim.stochastic_rounding(optax.sgd(0.0))):
        updates, _ = tx.update(grads, tx.init(params), params)
        assert isinstance(updates["w"], lb.optim.PackedUpdate)
        with pytest.raises((ValueError, TypeError)):
            optax.apply_updates(params, updates)
        moved = lb.optim.apply_updates(params, updates)
        np.testing.assert_array_equal(moved["w"].words, params["w"].words)
        late = jax.tree.map(lambda u: -1e-3 * u, updates)
        with pytest.raises(ValueError, match="words of float32.*outermost"):
            lb.optim.apply_updates(params, late)
        with pytest.raises(ValueError, match="for an array of float32"):
            lb.optim.apply_updates({**params, "w": jnp.ones((4, 64))}, updates)


def test_accumulates_inside():
    """`MultiSteps` goes inside the wrapper, also for packed parameters: nothing moves before the second step."""
    quantizer = lb.Quantizer(format=lb.formats.INT8, tiling=lb.scaling.Group(32))
    params = {"w": quantizer.quantize(jax.random.normal(jax.random.key(0), (4, 64)))}
    inner = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    for tx in (lb.optim.master_weights(inner), lb.optim.stochastic_rounding(inner)):
        update, state, seen = jax.jit(tx.update), tx.init(params), [params]
        for _ in range(2):
            updates, state = update({"w": jnp.ones((4, 64))}, state, seen[-1])
            seen.append(lb.optim.apply_updates(seen[-1], updates))
        np.testing.assert_array_equal(seen[1]["w"].words, seen[0]["w"].words)
        assert np.mean(np.asarray(seen[2]["w"].words) != np.asarray(seen[1]["w"].words)) > 0.5


@pytest.mark.parametrize("param_format", [None, lb.formats.INT8], ids=["dtype", "int8"])
def test_parameters_and_state_are_donated_together(param_format):
    """float32 norms in a bfloat16 model, float32 parameters on a grid, an inner state that holds the parameters."""
    dtype = jnp.bfloat16 if param_format is None else jnp.float32
    params = {"w": jnp.ones((8, 8), dtype), "norm": jnp.ones(8, jnp.float32)}
    for inner in (optax.adam(1e-3), optax.contrib.schedule_free(optax.sgd(1e-3), 1e-3)):
        tx = lb.optim.master_weights(inner, param_format)

        def step(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        step, grads = jax.jit(step, donate_argnums=(0, 1)), jax.tree.map(lambda p: 0.1 * p, params)
        for state in (tx.init(params), lb.optim.with_master(params, tx.init(params).inner_state)):
            moved, _ = step(jax.tree.map(jnp.copy, params), state, grads)
            assert float(moved["norm"][0]) < 1
        state = tx.init(params)
        own = jax.tree.map(jnp.copy, params)
        step(own, tx.init(own), grads)


def test_nnx_optimizer():
    model = nnx.Linear(16, 16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, lb.optim.master_weights(optax.adam(1e-2)), wrt=nnx.Param)
    before = model.kernel[...]
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 16))) ** 2))(model)
    optimizer.update(model, grads)
    assert model.kernel[...].dtype == jnp.bfloat16 and not jnp.array_equal(before, model.kernel[...])


def test_checkpoints(tmp_path):
    params = {"w": jnp.ones((8, 8), jnp.bfloat16)}
    tx = lb.optim.master_weights(optax.adam(1e-3))
    _, state = tx.update(params, tx.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", tx.init(params))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("wrapper", [lb.optim.master_weights, lb.optim.stochastic_rounding])
@pytest.mark.parametrize("param_format", [lb.formats.MXFP4, lb.Quantizer(format=lb.formats.INT8, tiling=Group(32))])
def test_a_parameter_that_tiles_do_not_divide_is_named_at_once(wrapper, param_format):
    params = {"ok": jnp.ones((64, 8)), "enc": {"odd": jnp.ones((33, 4))}}
    told = "MXFP4" if param_format is lb.formats.MXFP4 else "Quantizer of int8, group 32"
    expected = (
        rf"^{wrapper.__name__}\(param_format={told}\): the parameter 'enc/odd' of shape \(33, 4\): Group\(32\) cuts"
        r" axis 0 of length 33.*\[1, 3, 11, 33\], or leave it out with mask=\."
    )
    with pytest.raises(UnevenTiles, match=expected):
        wrapper(optax.sgd(1.0), param_format).init(params)
    tx = wrapper(optax.sgd(1.0), param_format, mask={"ok": True, "enc": {"odd": False}})
    state = jax.eval_shape(tx.init, params)  # also of shapes alone
    assert jax.tree.leaves(state) and tx.update(params, tx.init(params), params)
    if wrapper is lb.optim.master_weights:  # a state that another format made
        with pytest.raises(UnevenTiles, match=expected):
            lb.optim.params_from_master(params, tx.init(params), param_format)


def test_errors():
    params = {"a": {"w": jnp.ones((4, 4), jnp.bfloat16)}}
    tx = lb.optim.master_weights(optax.adam(1e-3))
    state = tx.init(params)
    inner = state.inner_state
    with pytest.raises(ValueError, match="without a master copy.*checkpoint.*with_master"):
        tx.update(params, inner, params)
    mended = lb.optim.with_master(params, inner)
    assert jax.tree.structure(mended) == jax.tree.structure(state)
    with pytest.raises(ValueError, match="without a master copy"):
        tx.update(params, state._replace(master=None), params)
    with pytest.raises(ValueError, match="got no parameters.*tx.update"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="1 leaves of the gradients are not among the parameters: b"):
        tx.update({**params, "b": jnp.ones(3)}, state, params)
    with pytest.raises(ValueError, match="'a/w' has shape .3, 4. in the gradients and .4, 4. in the parameters"):
        tx.update({"a": {"w": jnp.ones((3, 4))}}, state, params)
    other = {"a": {"v": params["a"]["w"]}}
    with pytest.raises(ValueError, match="a/v"):
        tx.update(other, state, other)
    with pytest.raises(TypeError, match="parameter 'n' is int32.*floating"):
        tx.init({"n": jnp.arange(3)})
    with pytest.raises(TypeError, match="param_format='int8'.*lb.formats.INT8"):
        lb.optim.master_weights(optax.adam(1e-3), "int8")
    with pytest.raises(ValueError, match="without learned scale, rotation"):
        lb.optim.master_weights(optax.adam(1e-3), lb.quest_quantizer(4))
    with pytest.raises(ValueError, match="0 master copies"):
        lb.optim.params_from_master(params, inner)
    with pytest.raises(ValueError, match="mask has not the paths"):
        lb.optim.master_weights(optax.adam(1e-3), lb.formats.INT8, mask={"b": True}).update(params, state, params)
    with pytest.raises(ValueError, match="needs a packed update"):
        lb.optim.apply_updates({"w": lb.Quantizer().quantize(jnp.ones((4, 4)))}, {"w": jnp.ones((4, 4))})
