"""With 64 bits enabled, layers and quantizers of float32 compute what they compute without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def layer_and_gradient(name: str):
    recipe = lb.methods.get(name)
    rngs = nnx.Rngs(quantize=0) if recipe.needs_key else None
    layer = lb.quantize(nnx.Linear(128, 32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)), recipe, rngs=rngs)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 128)), jnp.float32)
    loss = lambda layer: jnp.sum(layer(x) ** 2)
    grads = nnx.jit(nnx.grad(loss))(layer)
    return np.asarray(nnx.jit(lambda layer: layer(x))(layer)), [np.asarray(g) for g in jax.tree.leaves(grads)]


@pytest.mark.parametrize("name", lb.methods.names())
def test_methods(name, x64):
    out, grads = layer_and_gradient(name)
    jax.config.update("jax_enable_x64", False)
    expected, expected_grads = layer_and_gradient(name)
    assert out.dtype == expected.dtype == np.float32
    for ours, theirs in zip([out, *grads], [expected, *expected_grads], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", lb.formats.names()[::10])  # neighbours are of a kind
def test_formats_are_packed_and_read_back(name, x64):
    """Eagerly, as a user tries them."""
    fmt = lb.formats.get(name)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(24, 192)), jnp.float32)
    quantizer = lb.Quantizer(format=fmt) if isinstance(fmt, lb.formats.Format) else lb.block_quantizer(fmt)
    np.testing.assert_array_equal(np.asarray(quantizer.quantize(x).dequantize()), np.asarray(quantizer(x)))
