"""Quartet II: the mean of its gradients over keys, and models that train by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import lowbit_jax as lb
from lowbit_jax import methods
from lowbit_jax.formats import NVFP4

NUMBERS = (((1,), (0,)), ((), ()))


@functools.partial(jax.jit, static_argnames="recipe")
def gradients(x, w, g, recipe, key):
    _, back = jax.vjp(lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=recipe, key=key, precision="highest"), x, w)
    return back(g)


def test_the_mean_of_independent_gradients():
    """Its error falls fourfold with each fourfold number: the authors' own test. One product errs by (1 + D)^2 - 1."""
    x, w, g = jax.random.normal(jax.random.key(0), (3, 128, 128))
    recipe = methods.quartet2()
    x_hat, w_hat = recipe.out.lhs(x), recipe.out.rhs(w, axis=0)
    exact = (g @ w_hat.T, x_hat.T @ g)
    some = jax.jit(lambda keys: jax.vmap(lambda key: gradients(x, w, g, recipe, key))(keys))
    means = [jax.tree.map(lambda a: a.mean(0), some(keys)) for keys in jax.random.split(jax.random.key(9), (16, 16))]
    draws = some(jax.random.split(jax.random.key(8), 16))
    off = lambda a, b: float(jnp.sum((a - b) ** 2) / jnp.sum(b**2))
    for side, whole in enumerate(exact):
        once = np.mean([off(draw, whole) for draw in draws[side]])
        assert once == pytest.approx((1 + 9.72e-3) ** 2 - 1, rel=0.05)
        for n in (1, 4, 16):
            mean = sum(mean[side] for mean in means[:n]) / n
            assert off(mean, whole) == pytest.approx(once / (16 * n), rel=0.2)


class Mlp(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(64)(linen.relu(linen.Dense(128)(x)))


def test_trains_in_nnx():
    recipe = methods.get("quartet2")
    rngs = nnx.Rngs(0, quantize=1)
    layers = nnx.Linear(64, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 64, rngs=rngs)
    model = lb.quantize(nnx.Sequential(*layers), recipe, rngs=rngs)
    x = jax.random.normal(jax.random.key(2), (64, 64))

    @nnx.jit
    def step(model):
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(x) - x[:, ::-1]) ** 2))(model)
        state = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda w, dw: w - 0.5 * dw, state, nnx.state(gradient, nnx.Param)))
        return loss

    losses = [float(step(model)) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]
    rows = {(row.product, row.operand): row for row in lb.explain(model).rows if row.layer == "layers/2"}
    assert "eden 128" in rows["grad_lhs", "cotangent"].scale
    assert rows["grad_lhs", "cotangent"].rotation == "hadamard 64 (128 does not divide 64) signs fresh"
    assert rows["grad_lhs", "weight"].format == "e2m1 of out" and rows["out", "weight"].rotation == "none"
    run = nnx.jit(lambda model: model(x))
    y = run(model)
    np.testing.assert_allclose(run(lb.convert(model)), y, atol=1e-4 * jnp.abs(y).max())


def test_trains_in_linen():
    model = lb.quantize(Mlp(), methods.quartet2())
    x = jax.random.normal(jax.random.key(2), (64, 64))
    variables = model.init({"params": jax.random.key(0), "quantize": jax.random.key(1)}, x)

    @jax.jit
    def step(variables, key):
        loss = lambda variables: jnp.mean((model.apply(variables, x, rngs={"quantize": key}) - x[:, ::-1]) ** 2)
        value, gradient = jax.value_and_grad(loss)(variables)
        return value, jax.tree.map(lambda w, dw: w - 0.5 * dw, variables, gradient)

    losses = []
    for key in jax.random.split(jax.random.key(3), 12):
        loss, variables = step(variables, key)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    packed, packed_variables = lb.convert(model, variables, x)
    y = jax.jit(model.apply)(variables, x, rngs={"quantize": jax.random.key(4)})
    np.testing.assert_allclose(jax.jit(packed.apply)(packed_variables, x), y, atol=1e-4 * jnp.abs(y).max())


def test_without_four_over_six():
    plain = methods.quartet2(four_over_six=False)
    assert plain.out.lhs == lb.block_quantizer(NVFP4, estimator=lb.estimators.StraightThrough())
    assert plain.grad_lhs == methods.quartet2().grad_lhs and plain.name != methods.quartet2().name
