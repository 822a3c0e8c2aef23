"""Gradients of each device's own share: compressed under a loss scale, learned steps, sums of many microbatches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from recipes import gradients, llama, optimizer, schemes, train_loop
from recipes.layout import Layout

SMALL = dataclasses.replace(llama.preset("smoke"), kv_heads=2)


def batch(seed: int, rows: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, (rows, 17)).astype(np.int32)


def build(layout=None, dtype="float32"):
    make = lambda: llama.build(SMALL, 256, dtype=dtype)
    return make() if layout is None else layout.attach(layout.build(make))


def distance(found, expected) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))) for a, b in pairs)


class TestLossScaleAndCompression:
    def test_errors_are_in_units_of_the_gradient_whatever_the_scale(self):
        """Two steps under 2^15 and then 2^11 leave the errors, and answer the gradients, of two steps without a scale:
        powers of two are exact. Errors kept in scaled units would be 2^15 times as large."""
        layout = Layout(mesh=lb.parallel.make_mesh(data=2), compress="sign")
        graph, params, rest = nnx.split(build(layout), nnx.Param, ...)

        @jax.jit
        def gradient(params, tokens, scale, errors):
            return gradients.on_shards(graph, params, rest, tokens, scale, errors, layout=layout, microbatches=1)

        def run(scales):
            errors, answers = layout.first_errors(params), []
            for i, scale in enumerate(scales):
                value, found, errors = gradient(params, layout.batch(batch(i)), jnp.float32(scale), errors)
                answers.append(jax.tree.map(lambda g, s=scale: np.asarray(g) / s, (value, found)))
            return answers, errors

        (plain, left), (scaled, scaled_left) = run((1, 1)), run((2**15, 2**11))
        assert distance(scaled_left, left) < 1e-3
        assert distance(scaled, plain) < 1e-3

    def test_a_step_that_overflows_float16_is_skipped_and_the_run_recovers(self):
        """From a scale at which the cotangents overflow: steps are skipped with nothing moved, errors included, until
        the scale fits; then parameters move and the errors are finite."""
        layout = Layout(mesh=lb.parallel.make_mesh(data=2), compress="int8")
        graph, params, rest = nnx.split(build(layout, "float16"), nnx.Param, ...)
        adamw = optimizer.AdamW(peak=1e-2, steps=10, loss_scale=True)
        state = train_loop.first_state(params, adamw, layout)
        state["optimizer"] = state["optimizer"]._replace(scale=jnp.float32(2.0**20))
        state, rest = layout.place(state, layout.state_shardings(state)), layout.everywhere(rest)
        step = train_loop.make_step(graph, adamw, 1, None, layout)
        before, scales, skips = jax.tree.map(np.array, (state["params"], state["errors"])), [], []
        for i in range(8):
            state, numbers = step(state, rest, layout.batch(batch(i)))
            scales.append(float(numbers["loss_scale"]))
            skips.append(int(numbers["skipped"]))
            if i == 0:
                assert not np.isfinite(numbers["gradient_norm"]) and np.isfinite(numbers["loss"])
                after = jax.tree.map(np.array, (state["params"], state["errors"]))
                jax.tree.map(np.testing.assert_array_equal, after, before)
        bad = skips[-1]
        assert 1 <= bad <= 6 and skips[-2:] == [bad, bad], "it skipped at first and then no more"
        assert scales[:bad] == [2.0 ** (20 - i) for i in range(bad)] and scales[-1] == 2.0 ** (20 - bad)
        assert all(np.isfinite(e).all() for e in jax.tree.leaves(state["errors"]))
        assert distance(state["params"], before[0]) > 0 and any(np.any(e) for e in jax.tree.leaves(state["errors"]))


LEARNED = schemes.Scheme(method="lsq", bits=4)


@pytest.fixture(scope="module")
def one():
    """The model on one device, its steps calibrated."""
    return LEARNED.apply(build(), batch(9))


class TestLearnedSteps:
    def test_calibration_on_a_mesh_is_that_of_one_device(self, one):
        """Cut over data to the bit. Over fsdp and tensor the weights' own steps are sums in another order (1e-7), and
        an activation at a decision point may round to the other side: one of 16384 moves a mean by 1e-4."""
        expected = self.steps(one)
        for sizes, tolerance in ((dict(data=4), 0), (dict(fsdp=2, tensor=2), 1e-3)):
            model = build(Layout(mesh=lb.parallel.make_mesh(**sizes)))
            found = self.steps(LEARNED.apply(model, batch(9)))
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value, rtol=tolerance, err_msg=f"{sizes} {name}")
            down = nnx.state(model, nnx.Param)["blocks"]["mlp"]["down"]["kernel"][...]
            cut = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
            assert down.sharding.shard_shape(down.shape) != down.shape or cut == 1, "weights stay where they were"

    @staticmethod
    def steps(model) -> dict:
        leaves = jax.tree.flatten_with_path(nnx.state(model, nnx.Param))[0]
        named = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
        return {name: value for name, value in named.items() if "hs_scale" in name}

    def test_gradients_of_steps_on_shards_are_those_of_the_whole_batch(self, one):
        """LSQ divides by the root of the elements of the whole activation: each of four devices counting its own would
        double the gradient. Int8 sums err by about 1%."""
        graph, params, rest = nnx.split(one, nnx.Param, ...)
        _, expected = jax.jit(lambda p, t: gradients.whole(graph, p, rest, t))(params, batch(0))
        layout = Layout(mesh=lb.parallel.make_mesh(data=4), reduce=8)

        def on_shards(params, tokens):
            return gradients.on_shards(graph, params, rest, tokens, None, (), layout=layout, microbatches=1)[1]

        found = jax.jit(on_shards)(layout.place(params, layout.shardings(params)), layout.batch(batch(0)))
        for layer in ("attention", "mlp"):
            for name, product in expected["blocks"][layer].items():
                for side in ("lhs_scale", "rhs_scale"):
                    a, b = found["blocks"][layer][name]["dot_general"][side][...], product["dot_general"][side][...]
                    np.testing.assert_allclose(a, b, rtol=0.1, atol=0.02 * np.abs(b).max(), err_msg=f"{name} {side}")
        assert jax.tree.leaves(nnx.state(one, nnx.Param))[0].ndim, "the model itself holds arrays still, no tracers"


class Unigram(nnx.Module):
    """The same logits everywhere, in bfloat16."""

    def __init__(self):
        self.logits = nnx.Param(jnp.zeros(4, jnp.bfloat16))

    def __call__(self, ids):
        return jnp.broadcast_to(self.logits[...].astype(jnp.float32), (*ids.shape, 4))


@pytest.mark.parametrize("prepare", [None, lambda model: model], ids=["as it is", "prepared"])
def test_microbatches_of_bfloat16_parameters_are_summed_in_float32(prepare):
    """512 equal microbatches have the mean of one: 0.25 - 1 for the token, 0.25 for the others. Summed in bfloat16,
    terms of 1/512 no longer change what they are added to after 256 of them."""
    graph, params, rest = nnx.split(Unigram(), nnx.Param, ...)
    tokens = jnp.ones((512, 1, 3), jnp.int32)
    gradient = lambda p, t: gradients.accumulated(graph, p, rest, t, microbatches=512, prepare=prepare)
    value, found = jax.jit(gradient)(params, tokens)
    np.testing.assert_allclose(value, np.log(4), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(found["logits"][...], np.float32), [0.25, -0.75, 0.25, 0.25], rtol=1e-5)
