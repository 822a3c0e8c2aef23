"""Whole models packed in the kernels' layout: the same outputs, and a table that names the kernels."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx

import lowbit_jax as lb
from lowbit_jax.ops import pack_rhs
from lowbit_jax.ops.plane_tensor import to_planes

# One program for each, which compiles in a fraction of what its operations take one by one.
call = nnx.jit(lambda model, x: model(x))
pack = jax.jit(pack_rhs, static_argnums=(1, 2))
in_planes = jax.jit(to_planes, static_argnums=(1, 2))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(256, 128, rngs=rngs, dtype=jnp.bfloat16)
        self.second = nnx.LinearGeneral(128, (2, 24), rngs=rngs, dtype=jnp.bfloat16)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def test_nnx_models_convert_and_explain(key):
    model = lb.quantize(Model(nnx.Rngs(0)), lb.quest(4))
    x = jax.random.normal(key, (5, 256), jnp.bfloat16)
    expected = np.asarray(call(lb.convert(model), x), np.float32)
    by_xla = lb.convert(model, layout="planes/1")
    np.testing.assert_array_equal(np.asarray(call(by_xla, x), np.float32), expected)
    interpreted = lb.convert(model, layout="planes/1", implementation="interpret")
    got = np.asarray(call(interpreted, x), np.float32)
    assert np.mean(np.abs(got - expected)) < 0.05 * np.mean(np.abs(expected))  # a code at a tie may move by one
    kernels = lambda m: {row.kernel for row in lb.explain(m).rows if row.product == "out" and row.operand == "weight"}
    assert kernels(by_xla) == {"xla (matmul_w4a8 on a GPU), packed"}
    assert kernels(interpreted) == {"matmul_w4a8, packed"}


def test_linen_modules_convert(key):
    dense = lb.quantize(linen.Dense(64, dtype=jnp.bfloat16), lb.quest(2, activations=False))
    x = jax.random.normal(key, (3, 128), jnp.bfloat16)
    variables = jax.jit(dense.init)(key, x)
    packed, packed_variables = lb.convert(dense, variables, x, layout="planes/1", implementation="interpret")
    np.testing.assert_allclose(
        np.asarray(jax.jit(packed.apply)(packed_variables, x), np.float32),
        np.asarray(jax.jit(dense.apply)(variables, x), np.float32),
        atol=0.05,
    )


def test_stacked_layers_are_packed_and_sliced(key):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return nnx.Linear(128, 128, rngs=rngs, dtype=jnp.bfloat16)

    model = lb.quantize(stack(nnx.Rngs(0)), lb.quest(4))
    run = lambda layers, x: nnx.scan(lambda x, layer: (layer(x), None), in_axes=(nnx.Carry, 0))(x, layers)[0]
    x = jax.random.normal(key, (4, 128), jnp.bfloat16)
    expected = np.asarray(run(lb.convert(model), x), np.float32)
    planes = lb.convert(model, layout="planes/1")
    assert planes.kernel.get_value().shape == (3, 128, 128)
    np.testing.assert_array_equal(np.asarray(run(planes, x), np.float32), expected)


def test_what_is_not_packed_in_rows_is_refused():
    packed = pack(jnp.ones((128, 32)), (((1,), (0,)), ((), ())), lb.quest(4))
    planes = in_planes(packed, 8)
    shown = "PlaneTensor(float32[128, 32], midrise4, "
    assert repr(planes).startswith(shown) and len(repr(planes)) < 120  # no arrays
    assert repr(jax.eval_shape(lambda: planes)) == repr(planes)
    for wrong, seen in ((planes, re.escape(shown)), (jnp.ones((128, 32)), "a ArrayImpl"), (None, "a NoneType")):
        with pytest.raises(TypeError, match=f"to_planes got {seen}.*it takes a QTensor"):
            to_planes(wrong, 8)


def test_options_without_effect_raise():
    model = lb.quantize(Model(nnx.Rngs(0)), lb.quest(4))
    with pytest.raises(ValueError, match="bitstream-le/1"):
        lb.convert(model, layout="rows")
    with pytest.raises(ValueError, match="planes/1"):
        lb.convert(model, implementation="interpret")
    small = lb.quantize(Model(nnx.Rngs(0)), lb.quest("e2m1"))
    with pytest.raises(NotImplementedError, match="not uniform"):
        lb.convert(small, layout="planes/1", implementation="kernel")


@pytest.mark.parametrize(("activations", "word_bits"), [(True, 8), (False, 16)])
def test_words_of_another_layout_are_refused(key, activations, word_bits):
    """However they are read: as values, by XLA's product, by the kernel."""
    weight, x = jax.random.normal(key, (128, 32)), jax.random.normal(key, (4, 128), jnp.bfloat16)
    recipe, numbers = lb.quest(4, activations=activations), (((1,), (0,)), ((), ()))
    packed = pack(weight, numbers, recipe)
    product = jax.jit(lambda x, w: lb.dot_general(x, w, numbers, recipe=recipe))
    for implementation in ("reference", "interpret", "auto"):
        planes = in_planes(packed, word_bits, implementation)
        product(x, planes)
        stale = dataclasses.replace(planes, layout="planes/0")
        for read in (stale.dequantize, stale.elements, lambda w=stale: lb.dot_general(x, w, numbers, recipe=recipe)):
            with pytest.raises(ValueError, match="planes/0"):
                read()


@pytest.mark.parametrize("scale_format", [lb.scaling.BFLOAT16, lb.scaling.FLOAT32])
def test_scales_reach_the_kernel_as_they_are_stored(key, scale_format):
    recipe = lb.quest(4, activations=False)
    quantizer = dataclasses.replace(recipe.forward_quantizers[1], scale_format=scale_format)
    packed = jax.jit(lambda w: quantizer.quantize(w, axis=0))(jax.random.normal(key, (128, 32)))
    planes = in_planes(packed, 16)
    table = planes.scale_table()
    assert table.shape == (1, 32) and table.dtype == scale_format.dtype
    np.testing.assert_array_equal(
        np.asarray(table, np.float32).ravel(), np.asarray(scale_format.load(packed.scales)).ravel()
    )


def test_products_that_a_kernel_cannot_count_say_so():
    """8-bit codes at K = 2^17 could overflow int32, and 2^31 results do not fit 32-bit offsets: "auto" leaves both to
    XLA, and a request for the kernel is refused."""
    numbers, shape = (((1,), (0,)), ((), ())), jax.ShapeDtypeStruct
    for recipe, k, m, said in (
        (lb.methods.absmax_integer(8), 1 << 17, 1, "overflow"),
        (lb.quest(4), 128, 1 << 26, "2147483647"),
    ):
        weight = shape((k, 32), jnp.bfloat16)
        pack = lambda w, recipe=recipe, to="kernel": to_planes(pack_rhs(w, numbers, recipe), 8, to)
        run = lambda x, w, recipe=recipe: lb.dot_general(x, w, numbers, recipe=recipe)
        x = shape((m, k), jnp.bfloat16)
        with pytest.raises(NotImplementedError, match=said):
            jax.eval_shape(run, x, jax.eval_shape(pack, weight))
        auto = jax.eval_shape(lambda w, pack=pack: pack(w, to="auto"), weight)
        assert jax.eval_shape(run, x, auto).shape == (m, 32)


@pytest.fixture(scope="module")
def packed_kernel():
    """What a layer of 3 bits for int8 activations, in planes, holds: 200 columns, padded to 256."""
    layer = lb.quantize(nnx.Linear(200, 24, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), lb.quest(3))
    return lb.convert(layer, layout="planes/1").kernel.get_value()


def test_a_checkpoint_of_another_layout_is_not_restored(tmp_path):
    """Words of 3-bit codes for int8 and for 16-bit activations have the same shape: the stamp tells them apart."""
    layer = nnx.Linear(256, 24, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    written = lb.convert(lb.quantize(layer, lb.quest(3)), layout="planes/1")
    other = lb.convert(lb.quantize(layer, lb.quest(3, activations=False)), layout="planes/1")
    shapes = lambda model: jax.tree.map(lambda a: a.shape, nnx.state(model))
    assert [w.shape for w in written.kernel.get_value().words] == [w.shape for w in other.kernel.get_value().words]
    with ocp.StandardCheckpointer() as store:
        store.save(tmp_path / "c", nnx.state(written))
    with ocp.StandardCheckpointer() as store:
        restored = store.restore(tmp_path / "c", jax.eval_shape(lambda: nnx.state(written)))
        assert jax.tree.structure(shapes(written)) == jax.tree.structure(jax.tree.map(lambda a: a.shape, restored))
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(restored), jax.tree.leaves(nnx.state(written)))
        with pytest.raises(ValueError, match="shape"):
            store.restore(tmp_path / "c", jax.eval_shape(lambda: nnx.state(other)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"sums": t.sums + 1}, "sums of the codes .* are not those of the words"),
        (lambda t: {"sums": t.sums[:3]}, r"int32\[3\]"),
        (lambda t: {"sums": None}, "there are none"),
        (lambda t: {"sums": t.sums.astype(jnp.float32)}, "float32"),
        (lambda t: {"length": 192}, "codes behind the last row or the last of 192 columns"),
        (lambda t: {"free": (23,)}, "codes behind the last row"),
        (lambda t: {"words": tuple(w.astype(jnp.int16) for w in t.words)}, "stamp says .* words of 1 bytes"),
        (lambda t: {"words": tuple(w[:1] for w in t.words)}, "words of shapes"),
    ],
)
def test_damaged_planes_are_found(packed_kernel, change, words):
    packed_kernel.validate()
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(packed_kernel, **change(packed_kernel)).validate()
