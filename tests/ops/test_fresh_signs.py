"""Hadamard rotations whose signs every product draws anew from its key."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import methods, scaling

NUMBERS = (((1,), (0,)), ((), ()))


@functools.partial(jax.jit, static_argnames="recipe")
def gradients(x, w, g, recipe, key):
    _, back = jax.vjp(lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=recipe, key=key, precision="highest"), x, w)
    return back(g)


TURNED = lb.Quantizer(
    format=lb.formats.INT8, rotation=lb.Hadamard(32, signs="fresh"), estimator=lb.estimators.StraightThrough()
)


def operands(key):
    a, b, c = jax.random.split(key, 3)
    return jax.random.normal(a, (32, 64)), jax.random.normal(b, (64, 48)), jax.random.normal(c, (32, 48))


def test_signs_cancel_in_a_product(key):
    x, w, _ = operands(key)
    rotation = lb.Hadamard(signs="fresh")
    rotated = rotation.apply(x, 1, key=key) @ rotation.apply(w, 0, key=key)
    np.testing.assert_allclose(rotated, x @ w, atol=1e-6 * 64)
    np.testing.assert_allclose(rotation.undo(rotation.apply(x, key=key), key=key), x, atol=4e-6)
    others = rotation.apply(x, key=jax.random.split(key)[0])
    assert not np.allclose(others, rotation.apply(x, key=key))


def test_signs_are_the_same_for_both_operands_and_others_for_others(key):
    """At 8 bits a product comes near the plain one, as it would not with signs that do not cancel; it differs
    from key to key, as fixed signs do not."""
    x, w, g = operands(key)
    recipe = lb.LinearRecipe(out=lb.Gemm(lhs=TURNED, rhs=TURNED))
    run = jax.jit(lambda key: lb.dot_general(x, w, NUMBERS, recipe=recipe, key=key, precision="highest"))
    y, other = run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_allclose(y, x @ w, atol=0.02 * jnp.abs(x @ w).max())
    assert not np.array_equal(y, other) and np.array_equal(y, run(jax.random.key(0)))


@pytest.mark.parametrize("sides", ["both", "one"])
def test_gradients_come_back_from_the_rotated_space(key, sides):
    """Straight through a rotation that cancels: those of the product of the quantized operands."""
    x, w, g = operands(key)
    out = lb.Gemm(lhs=TURNED, rhs=TURNED if sides == "both" else None)
    dx, dw = gradients(x, w, g, lb.LinearRecipe(out=out), jax.random.key(0))
    np.testing.assert_allclose(dx, g @ w.T, atol=0.02 * jnp.abs(g @ w.T).max())
    np.testing.assert_allclose(dw, x.T @ g, atol=0.02 * jnp.abs(x.T @ g).max())


def test_signs_of_one_operand_are_undone(key):
    x, w, _ = operands(key)
    near = TURNED(x, key=key)
    np.testing.assert_allclose(near, x, atol=0.05)
    again = TURNED.unrotated(TURNED.in_rotated_space(x, key=key), key=key)
    np.testing.assert_array_equal(near, again)


def test_signs_of_a_backward_operand_into_which_scales_are_folded(key):
    x, w, g = operands(key)
    int8 = dataclasses.replace(TURNED, rotation=None)
    recipe = lb.LinearRecipe(
        out=lb.Gemm(lhs=TURNED, rhs=int8),
        grad_lhs=lb.Gemm(lhs=TURNED, rhs=lb.FORWARD, fold=True),
        grad_rhs=lb.Gemm(lhs=lb.FORWARD, rhs=int8, fold=True),
    )
    for found, exact in zip(gradients(x, w, g, recipe, key), (g @ w.T, x.T @ g), strict=True):
        np.testing.assert_allclose(found, exact, atol=0.03 * jnp.abs(exact).max())


def test_without_a_key(key):
    x, w, g = operands(key)
    recipe = lb.LinearRecipe(out=lb.Gemm(lhs=TURNED, rhs=TURNED))
    assert recipe.needs_key and TURNED.uses_key and methods.quartet2().needs_key
    for call in (lambda: TURNED(x), lambda: lb.dot_general(x, w, NUMBERS, recipe=recipe)):
        with pytest.raises(ValueError, match=r"signs='fresh'\) got no key.*jax.random.key"):
            call()
    with pytest.raises(ValueError, match="got no key"):
        gradients(x, w, g, methods.quartet2(), None)
    with pytest.raises(TypeError, match="key"):
        TURNED(x, key=3)


def test_where_they_cannot_be_honored(key):
    x, w, _ = operands(key)
    recipe = lb.LinearRecipe(out=lb.Gemm(lhs=TURNED, rhs=TURNED))
    with pytest.raises(ValueError, match="signs='frech'.*'fresh'"):
        lb.Hadamard(signs="frech")
    with pytest.raises(NotImplementedError, match="rotation=.*no packed form"):
        TURNED.quantize(x, key=key)
    with pytest.raises(ValueError, match="rhs_ready=True.*anew"):
        recipe.with_rhs_ready()
    with pytest.raises(ValueError, match="quantize_rhs: .*anew"):
        lb.ops.quantize_rhs(w, NUMBERS, recipe, key=key)
    with pytest.raises(ValueError, match="Learned.*before any key"):
        dataclasses.replace(TURNED, fit=scaling.Learned(), estimator=lb.estimators.LSQ())
    with pytest.raises(NotImplementedError, match="integer product for this recipe"):
        lb.dot_general(x, w, NUMBERS, recipe=recipe.with_implementation("kernel"), key=key)
    with pytest.raises(ValueError, match="gptq .*by chance"):
        lb.gptq.gptq(TURNED, w, jnp.eye(64), axis=0)
    rngs = nnx.Rngs(0, quantize=1)
    conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)
    with pytest.raises(NotImplementedError, match="lb.conv_general_dilated: signs that are drawn anew"):
        lb.quantize(conv, recipe, rngs=rngs)
    model = lb.quantize(nnx.Linear(64, 48, rngs=rngs), recipe, rngs=rngs)
    assert model(x).shape == (32, 48) and "signs fresh" in str(lb.explain(model))
    with pytest.raises(NotImplementedError, match="packed model draws no random numbers.*fresh"):
        lb.convert(model)
    prepared = lb.nn.prepare(model)  # leaves what cannot be ready
    assert not prepared.dot_general.product.recipe.rhs_ready and prepared(x).shape == (32, 48)
