"""Gradients inside `jax.shard_map` with its checks on: a replicated weight meets a sharded activation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import lowbit_jax as lb

NUMBERS = (((1,), (0,)), ((), ()))
INT8 = lb.Quantizer()
RECIPES = {
    "quest": lb.quest(4),
    "weights only": lb.quest(4, activations=False),
    "activations only": lb.quest(4, weights=False),
    "int8 backward": lb.quest(4, backward=8),
    "own backward operands": lb.LinearRecipe(
        out=lb.Gemm(lhs=INT8, rhs=INT8), grad_lhs=lb.Gemm(lhs=INT8, rhs=INT8), grad_rhs=lb.Gemm(lhs=INT8, rhs=INT8)
    ),
}


def mesh_of_one():
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def on_shards(function):
    return jax.shard_map(function, mesh=mesh_of_one(), in_specs=(P("data"), P()), out_specs=P("data"))


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_of_a_product_on_shards(name, key):
    product = lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=RECIPES[name])
    x, w = jax.random.normal(key, (8, 64)), jax.random.normal(jax.random.key(1), (64, 32))
    loss = lambda f: lambda x, w: jnp.sum(f(x, w) ** 2)
    found = jax.jit(jax.grad(loss(on_shards(product)), (0, 1)))(x, w)
    expected = jax.jit(jax.grad(loss(product), (0, 1)))(x, w)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_gradients_of_a_convolution_and_of_a_packed_layer_on_shards(key):
    layer = lb.quantize(nnx.Conv(8, 4, (3,), rngs=nnx.Rngs(0)), lb.quest(4))
    graph, state = nnx.split(layer)
    run = lambda x, state: nnx.merge(graph, state)(x)
    x = jax.random.normal(key, (4, 16, 8))
    found = jax.jit(jax.grad(lambda state: jnp.sum(on_shards(run)(x, state))))(state)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found))
    packed = nnx.jit(lb.convert)(lb.quantize(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), lb.quest(4)))
    graph, state = nnx.split(packed)
    x = jax.random.normal(key, (8, 64))
    dx = jax.jit(jax.grad(lambda x: jnp.sum(on_shards(lambda x, state: nnx.merge(graph, state)(x))(x, state))))(x)
    assert dx.shape == x.shape and float(jnp.abs(dx).sum()) > 0
