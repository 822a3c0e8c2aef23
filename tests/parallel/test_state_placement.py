"""The optimizer's state lies where its parameters lie: bytes on each device, and steps equal to one device's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lowbit_jax as lb
from lowbit_jax.parallel import DECODER, Rules, make_mesh
from recipes import llama


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    """optax's optimizers promote their counters."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def abstract_mesh(**sizes):
    axes = dict.fromkeys(lb.parallel.AXES, 1) | sizes
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def bytes_a_device(tree, placed):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True)
    return sum(math.prod(s.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf, s in pairs)


class TestBytesOfEachDevice:
    """Of the recipe's presets on eight devices (shapes alone). Widths such as 640 that no block divides make blocks run
    over merged axes, and those must be cut too."""

    @pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=4, tensor=2)], ids=str)
    @pytest.mark.parametrize("preset", ["30M", "tiny"])
    def test_an_eighth_and_at_most_6_percent_more(self, preset, sizes):
        mesh = abstract_mesh(**sizes)
        vocabulary = 256 if preset == "tiny" else 32_000
        params = nnx.state(nnx.eval_shape(lambda: llama.build(llama.preset(preset), vocabulary)), nnx.Param)
        placed = lb.parallel.shardings(params, mesh, DECODER)
        for bits in (8, "e4m3", "coat", 4):
            state = jax.eval_shape(lb.optim.adamw_low_bit(1e-3, bits=bits).init, params)
            found = bytes_a_device(state, lb.optim.state_shardings(state, params, placed))
            whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            assert found <= 1.06 * whole / 8, (bits, found, whole / 8)


class TestMergedAxes:
    @pytest.mark.parametrize(
        ("shape", "spec", "words", "scales"),
        [
            ((6, 640, 1920), P(None, None, "fsdp"), P(None, "fsdp"), P(None, "fsdp")),
            ((6, 640, 1920), P(None, "tensor", "fsdp"), P(None, ("tensor", "fsdp")), P(None, ("tensor", "fsdp"))),
            ((1024, 640), P(("tensor", "fsdp"), None), P(("tensor", "fsdp")), P(("tensor", "fsdp"))),
            ((640, 1024), P("tensor", "fsdp"), P("tensor", "fsdp"), P("tensor", "fsdp")),
            ((7, 999), P(), P(), P()),
        ],
    )  # fmt: skip
    def test_have_the_cuts_of_the_axes_that_they_merge(self, shape, spec, words, scales):
        mesh = abstract_mesh(fsdp=2, tensor=2)
        params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
        state = jax.eval_shape(lb.optim.adamw_low_bit(1e-3).init, params)
        placed = lb.optim.state_shardings(state, params, {"w": NamedSharding(mesh, spec)})
        first = placed.inner_state[0].mu["w"].parts
        for found, expected in ((first.words, words), (first.scales[0], scales)):
            assert [cut for cut in found.spec if cut] == [cut for cut in expected if cut]
            assert all(a == b for a, b in zip(found.spec, expected, strict=False))

    def test_a_step_is_that_of_one_device(self, key):
        mesh = make_mesh(fsdp=2, tensor=2)
        params = {"w": jax.random.normal(key, (3, 64, 40)), "v": jax.random.normal(key, (96, 40))}
        placed = {"w": NamedSharding(mesh, P(None, "tensor", "fsdp")), "v": NamedSharding(mesh, P(None, "fsdp"))}
        tx = lb.optim.adamw_low_bit(1e-2, min_size=256)
        grads = jax.tree.map(lambda p: 0.1 * p + 0.01, params)
        state = jax.jit(tx.init)(params)
        places = lb.optim.state_shardings(state, params, placed)
        assert places.inner_state[0].mu["w"].parts.words.spec == P(None, ("tensor", "fsdp"))
        expected = jax.jit(tx.update)(grads, state, params)
        put = jax.device_put((grads, state, params), (placed, places, placed))
        found = jax.jit(tx.update, out_shardings=(placed, places))(*put)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found[1]), jax.device_get(expected[1]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *jax.device_get((found[0], expected[0])))


class TestPackedParameters:
    def test_are_trained_where_the_rules_put_them(self, key):
        """After two steps codes are those of one device to the bit, scales to a last digit (a sum may be fused)."""
        mesh = make_mesh(fsdp=2, tensor=2)
        quantizer = lb.Quantizer(format=lb.formats.INT8, tiling=lb.scaling.Group(32))
        params = {
            "mlp": {"w": quantizer.quantize(jax.random.normal(key, (128, 64)), axis=0)},
            "b": jnp.zeros(64, "bfloat16"),
        }
        placed = lb.parallel.shardings(params, mesh, Rules.of(("mlp/w", ("tensor", "fsdp"))))
        tx = lb.optim.stochastic_rounding(lb.optim.adamw_low_bit(1e-2, min_size=64))
        state = tx.init(params)
        places = lb.optim.state_shardings(state, params, placed)
        assert places.inner_state.inner_state[0].mu["mlp"]["w"].parts.words.spec == P(("tensor", "fsdp"))
        grads = {"mlp": {"w": 0.1 * jax.random.normal(jax.random.key(1), (128, 64))}, "b": jnp.ones(64)}

        def step(params, state):
            updates, state = tx.update(grads, state, params)
            return lb.optim.apply_updates(params, updates), state

        expected = jax.jit(step)(*jax.jit(step)(params, state))
        spread = jax.jit(step, out_shardings=(placed, places))
        found = spread(*spread(*jax.device_put((params, state), (placed, places))))
        for ours, alone in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            slack = 2.0**-22 if ours.dtype == jnp.float32 else 0
            np.testing.assert_allclose(np.asarray(ours), np.asarray(alone), rtol=slack, atol=0)

    def test_moments_follow_the_array_that_is_packed(self, key):
        mesh = make_mesh(fsdp=2, tensor=2)
        params = {"w": lb.quest_quantizer(4).quantize(jax.random.normal(key, (256, 64)), axis=0)}
        placed = lb.parallel.shardings(params, mesh, Rules.of(("w", (None, "tensor"))))
        state = jax.eval_shape(optax.adam(1e-3).init, jax.eval_shape(lb.optim.unpacked, params))
        assert lb.optim.state_shardings(state, params, placed)[0].mu["w"].spec == P(None, "tensor")


GROUPS = lb.Quantizer(format=lb.formats.INT4, tiling=lb.scaling.Group(32))
BLOCKS = lb.Quantizer(format=lb.formats.INT4, tiling=lb.scaling.Block(16, 16))


def test_a_parameter_that_is_the_tree_itself(key):
    mesh = lb.parallel.make_mesh(fsdp=2, tensor=2)
    w = jax.random.normal(key, (64, 128))
    place = NamedSharding(mesh, P("fsdp", "tensor"))
    places = lb.optim.state_shardings(jax.eval_shape(optax.adam(1e-3).init, w), w, place)
    assert places[0].mu == places[0].nu == place and places[0].count.spec == P()


class TestGridScales:
    @pytest.mark.parametrize(
        ("param_format", "shape", "spec", "expected"),
        [
            (GROUPS, (64, 128), P(None, "fsdp"), P(None, None, "fsdp")),
            (GROUPS, (3, 64, 128), P(None, "fsdp", None), P(None, "fsdp", None, None)),
            (BLOCKS, (64, 128), P("fsdp", "tensor"), P("fsdp", None, "tensor", None)),
            (lb.formats.INT8, (64, 128), P("tensor", "fsdp"), P(None, "fsdp")),
            (lb.formats.get("ternary"), (64, 128), P("tensor", "fsdp"), P(None, None)),
        ],
        ids=["groups", "groups of stacked layers", "blocks", "rows", "tensor"],
    )  # fmt: skip
    def test_follow_their_tiles(self, param_format, shape, spec, expected):
        mesh = make_mesh(fsdp=2, tensor=2)
        params = {"mlp": {"w": jnp.ones(shape)}, "b": jnp.ones(8)}
        tx = optax.chain(optax.clip_by_global_norm(1.0), lb.optim.stochastic_rounding(optax.adam(1e-3), param_format))
        placed = {"mlp": {"w": NamedSharding(mesh, spec)}, "b": NamedSharding(mesh, P())}
        state = tx.init(params)
        places = lb.optim.state_shardings(state, params, placed)
        jax.device_put(state, places)  # a sharding for every leaf, and each divides it
        assert [s.spec for s in places[1].scales["mlp/w"].stored] == [expected]
        assert places[1].inner_state[0].mu["mlp"]["w"].spec == spec
