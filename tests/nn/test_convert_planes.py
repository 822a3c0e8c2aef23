"""Whole models packed in the kernels' layout: the same outputs, and a table that names the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import lowbit_jax as lb


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(256, 128, rngs=rngs, dtype=jnp.bfloat16)
        self.second = nnx.LinearGeneral(128, (2, 24), rngs=rngs, dtype=jnp.bfloat16)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def test_nnx_models_convert_and_explain(key):
    model = lb.quantize(Model(nnx.Rngs(0)), lb.quest(4))
    x = jax.random.normal(key, (5, 256), jnp.bfloat16)
    expected = np.asarray(lb.convert(model)(x), np.float32)
    by_xla = lb.convert(model, layout="planes/1")
    np.testing.assert_array_equal(np.asarray(by_xla(x), np.float32), expected)
    interpreted = lb.convert(model, layout="planes/1", implementation="interpret")
    got = np.asarray(nnx.jit(lambda m, x: m(x))(interpreted, x), np.float32)
    assert np.mean(np.abs(got - expected)) < 0.05 * np.mean(np.abs(expected))  # a code at a tie may move by one
    kernels = lambda m: {row.kernel for row in lb.explain(m).rows if row.product == "out" and row.operand == "weight"}
    assert kernels(by_xla) == {"xla (matmul_w4a8 on a GPU), packed"}
    assert kernels(interpreted) == {"matmul_w4a8, packed"}


def test_linen_modules_convert(key):
    dense = lb.quantize(linen.Dense(64, dtype=jnp.bfloat16), lb.quest(2, activations=False))
    x = jax.random.normal(key, (3, 128), jnp.bfloat16)
    variables = dense.init(key, x)
    packed, packed_variables = lb.convert(dense, variables, x, layout="planes/1", implementation="interpret")
    np.testing.assert_allclose(
        np.asarray(packed.apply(packed_variables, x), np.float32),
        np.asarray(dense.apply(variables, x), np.float32),
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


def test_options_without_effect_raise():
    model = lb.quantize(Model(nnx.Rngs(0)), lb.quest(4))
    with pytest.raises(ValueError, match="bitstream-le/1"):
        lb.convert(model, layout="rows")
    with pytest.raises(ValueError, match="planes/1"):
        lb.convert(model, implementation="interpret")
    small = lb.quantize(Model(nnx.Rngs(0)), lb.quest("e2m1"))
    with pytest.raises(NotImplementedError, match="not uniform"):
        lb.convert(small, layout="planes/1", implementation="kernel")
