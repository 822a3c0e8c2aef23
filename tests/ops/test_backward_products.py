"""Backward products with quantized operands, against the six-operand formula written out (METHODS 2.2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax import formats, rounding

NUMBERS = (((1,), (0,)), ((), ()))
INT8 = lb.Quantizer(format=formats.INT8, estimator=lb.estimators.StraightThrough())
NOISY = lb.Quantizer(format=formats.INT8, rounding=rounding.stochastic, estimator=lb.estimators.StraightThrough())


def setup(key):
    a, b, c = jax.random.split(key, 3)
    return jax.random.normal(a, (12, 32)), jax.random.normal(b, (32, 6)), jax.random.normal(c, (12, 6))


def test_all_six_operands(key):
    """D: Q(g) along channels times the forward's weight; G: the original activation and Q(g), both along tokens."""
    x, w, g = setup(key)
    recipe = lb.LinearRecipe(
        out=lb.Gemm(lhs=INT8, rhs=INT8),
        grad_lhs=lb.Gemm(lhs=INT8, rhs=lb.FORWARD),
        grad_rhs=lb.Gemm(lhs=INT8, rhs=INT8),
    )
    y, pullback = jax.vjp(lambda x, w: lb.dot_general(x, w, NUMBERS, precision="highest", recipe=recipe), x, w)
    dx, dw = pullback(g)
    x_hat, w_hat = INT8(x), INT8(w, axis=0)
    np.testing.assert_allclose(y, x_hat @ w_hat, atol=1e-4)
    np.testing.assert_allclose(dx, INT8(g) @ w_hat.T, atol=1e-4)
    np.testing.assert_allclose(dw, INT8(x, axis=0).T @ INT8(g, axis=0), atol=1e-4)


def test_switchback_keeps_the_weight_gradient_in_high_precision(key):
    """SwitchBack (arXiv:2304.13013): int8 in the forward and dx, original operands in dw."""
    x, w, g = setup(key)
    recipe = lb.LinearRecipe(
        out=lb.Gemm(lhs=INT8, rhs=INT8), grad_lhs=lb.Gemm(lhs=INT8, rhs=lb.FORWARD), grad_rhs=lb.Gemm()
    )
    _, pullback = jax.vjp(lambda x, w: lb.dot_general(x, w, NUMBERS, precision="highest", recipe=recipe), x, w)
    np.testing.assert_allclose(pullback(g)[1], x.T @ g, atol=1e-4)


def test_rotated_originals_meet_the_rotated_forward(key):
    """QuEST forward with high-precision backward operands: x and w enter in the rotated space, then mask and rotate
    back."""
    x, w, g = setup(key)
    quest = lb.quest(4)
    recipe = lb.LinearRecipe(out=quest.out, grad_lhs=lb.Gemm(), grad_rhs=lb.Gemm())
    _, pullback = jax.vjp(lambda x, w: lb.dot_general(x, w, NUMBERS, precision="highest", recipe=recipe), x, w)
    dx, dw = pullback(g)
    rotation = quest.out.lhs.rotation
    mask = lambda h, d, axis: jax.vjp(lambda h: lb.quest_quantizer(4, block=None).in_rotated_space(h, axis=axis), h)[1](
        d
    )[0]
    h_x, h_w = rotation.apply(x, 1), rotation.apply(w, 0)
    np.testing.assert_allclose(dx, rotation.undo(mask(h_x, g @ h_w.T, 1), 1), atol=2e-4)
    np.testing.assert_allclose(dw, rotation.undo(mask(h_w, h_x.T @ g, 0), 0), atol=2e-4)


def test_stochastic_cotangents_are_unbiased(key):
    x, w, g = setup(key)
    recipe = lb.LinearRecipe(grad_lhs=lb.Gemm(lhs=NOISY), grad_rhs=lb.Gemm(rhs=NOISY))

    def gradients(k):
        _, pullback = jax.vjp(
            lambda x, w: lb.dot_general(x, w, NUMBERS, precision="highest", recipe=recipe, key=k), x, w
        )
        return pullback(g)

    draws = jax.jit(jax.vmap(gradients))(jax.random.split(key, 2000))
    for mean, exact in zip((d.mean(0) for d in draws), (g @ w.T, x.T @ g), strict=True):
        spread = float(jnp.abs(exact).max()) * 0.02
        np.testing.assert_allclose(mean, exact, atol=5 * spread / 2000**0.5 + 1e-4)
    assert float(jnp.abs(draws[0][0] - draws[0][1]).max()) > 0


@pytest.mark.parametrize("layout", ["batched", "transposed kernel"])
def test_layouts(key, layout):
    from tests.ops.test_dot_general import operands

    lhs, rhs, numbers = operands(key, layout)
    exact = jax.grad(lambda a, b: jnp.sum(jnp.sin(jax.lax.dot_general(a, b, numbers))), (0, 1))(lhs, rhs)
    recipe = lb.LinearRecipe(grad_lhs=lb.Gemm(), grad_rhs=lb.Gemm())
    ours = jax.grad(lambda a, b: jnp.sum(jnp.sin(lb.dot_general(a, b, numbers, recipe=recipe))), (0, 1))(lhs, rhs)
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_ready_weight_has_no_original(key):
    x, w, _ = setup(key)
    recipe = lb.LinearRecipe(out=lb.Gemm(lhs=INT8, rhs=INT8), grad_lhs=lb.Gemm()).with_rhs_ready()
    with pytest.raises(ValueError, match="original weight"):
        lb.dot_general(x, w, NUMBERS, recipe=recipe)
