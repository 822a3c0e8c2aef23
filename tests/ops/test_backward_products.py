"""Backward products with quantized operands, against the six-operand formula written out (METHODS 2.2)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax import formats, rounding
from lowbit_jax.ops.dot_general import prepare_rhs

NUMBERS = (((1,), (0,)), ((), ()))
INT8 = lb.Quantizer(format=formats.INT8, estimator=lb.estimators.StraightThrough())
NOISY = lb.Quantizer(format=formats.INT8, rounding=rounding.stochastic, estimator=lb.estimators.StraightThrough())


@functools.partial(jax.jit, static_argnames=("recipe", "numbers"))
def gradients(x, w, g, recipe, numbers=NUMBERS):
    """The product and what its backward answers to the cotangent g, in one program."""
    y, back = jax.vjp(lambda x, w: lb.dot_general(x, w, numbers, precision="highest", recipe=recipe), x, w)
    return y, *back(g)


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
    y, dx, dw = gradients(x, w, g, recipe)
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
    np.testing.assert_allclose(gradients(x, w, g, recipe)[2], x.T @ g, atol=1e-4)


def test_rotated_originals_meet_the_rotated_forward(key):
    """QuEST forward with high-precision backward operands: x and w enter in the rotated space, then mask and rotate
    back."""
    x, w, g = setup(key)
    quest = lb.quest(4)
    recipe = lb.LinearRecipe(out=quest.out, grad_lhs=lb.Gemm(), grad_rhs=lb.Gemm())
    _, dx, dw = gradients(x, w, g, recipe)
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

    def drawn(k):
        _, pullback = jax.vjp(
            lambda x, w: lb.dot_general(x, w, NUMBERS, precision="highest", recipe=recipe, key=k), x, w
        )
        return pullback(g)

    draws = jax.jit(jax.vmap(drawn))(jax.random.split(key, 2000))
    for mean, exact in zip((d.mean(0) for d in draws), (g @ w.T, x.T @ g), strict=True):
        spread = float(jnp.abs(exact).max()) * 0.02
        np.testing.assert_allclose(mean, exact, atol=5 * spread / 2000**0.5 + 1e-4)
    assert float(jnp.abs(draws[0][0] - draws[0][1]).max()) > 0


@pytest.mark.parametrize("layout", ["batched", "transposed kernel"])
def test_layouts(key, layout):
    from tests.ops.test_dot_general import operands

    lhs, rhs, numbers = operands(key, layout)
    exact = jax.jit(jax.grad(lambda a, b: jnp.sum(jnp.sin(jax.lax.dot_general(a, b, numbers))), (0, 1)))(lhs, rhs)
    recipe = lb.LinearRecipe(grad_lhs=lb.Gemm(), grad_rhs=lb.Gemm())
    loss = lambda a, b: jnp.sum(jnp.sin(lb.dot_general(a, b, numbers, recipe=recipe)))
    ours = jax.jit(jax.grad(loss, (0, 1)))(lhs, rhs)
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_ready_weight_has_no_original(key):
    x, w, _ = setup(key)
    recipe = lb.LinearRecipe(out=lb.Gemm(lhs=INT8, rhs=INT8), grad_lhs=lb.Gemm()).with_rhs_ready()
    with pytest.raises(ValueError, match="original weight"):
        lb.dot_general(x, w, NUMBERS, recipe=recipe)


def folded(g, s, e):
    """sum_n Q(g[m, n] s[n]) e[n, k] in float64, Q absmax int8 of each row."""
    weighted = np.asarray(g, np.float64) * np.asarray(s, np.float64)
    step = np.abs(weighted).max(-1, keepdims=True) / 127
    return np.round(weighted / step) * step @ np.asarray(e, np.float64)


def grid_and_scales(quantizer, x, axis):
    values, scales = jax.jit(lambda x: quantizer.elements(x, axis=axis))(x)
    return np.asarray(values, np.float64), np.asarray(scales, np.float64)


FOLDED = lb.LinearRecipe(
    out=lb.Gemm(lhs=INT8, rhs=INT8),
    grad_lhs=lb.Gemm(lhs=INT8, rhs=lb.FORWARD, fold=True),
    grad_rhs=lb.Gemm(lhs=lb.FORWARD, rhs=INT8, fold=True),
)


def test_folded_scales(key):
    """The forward's scales go into the cotangent before it is quantized, then codes meet codes: the formula, in
    float64. Rows differ in size, so a product that forgot the scales or quantized first would not pass."""
    x, w, g = setup(key)
    x, w = x * jnp.exp(jnp.arange(12.0) / 4)[:, None], w * jnp.exp(jnp.arange(6.0) / 2)[None, :]
    _, dx, dw = gradients(x, w, g, FOLDED)
    e_x, s_x = grid_and_scales(INT8, x, 1)
    e_w, s_w = grid_and_scales(INT8, w, 0)
    exact = folded(g, s_w, e_w.T), folded(g.T, s_x.T, e_x).T
    for got, expected in zip((dx, dw), exact, strict=True):
        np.testing.assert_allclose(got, expected, atol=32 * 2.0**-23 * np.abs(expected).max())
    unfolded = np.asarray(INT8(g) @ INT8(w, axis=0).T, np.float64)
    assert np.abs(unfolded - exact[0]).max() > 1e-3 * np.abs(exact[0]).max()


def test_folded_batches(key):
    """Batch axes and several free axes on both sides: each batch is a product of its own."""
    a, b, c = jax.random.split(key, 3)
    x, w = jax.random.normal(a, (3, 2, 4, 5)), jax.random.normal(b, (2, 6, 5, 3))
    g = jax.random.normal(c, (3, 2, 4, 2, 6))
    numbers = (((3,), (2,)), ((0,), (3,)))
    _, dx, dw = gradients(x, w, g, FOLDED, numbers)
    for i in range(3):
        flat_x, flat_w, flat_g = x[i].reshape(8, 5), w[..., i].reshape(12, 5), g[i].reshape(8, 12)
        e_x, s_x = grid_and_scales(INT8, flat_x, 1)
        e_w, s_w = grid_and_scales(INT8, flat_w, 1)
        np.testing.assert_allclose(dx[i].reshape(8, 5), folded(flat_g, s_w.T, e_w), atol=1e-5)
        np.testing.assert_allclose(dw[..., i].reshape(12, 5), folded(flat_g.T, s_x.T, e_x), atol=1e-5)


@pytest.mark.parametrize(
    "slots",
    [
        dict(rotation=lb.Hadamard(8)),
        dict(tiling=lb.scaling.Group(8)),
        dict(sparsity=lb.sparsity.NofM(2, 4)),
    ],
    ids=lambda slots: next(iter(slots)),
)
def test_folded_tokens_of_several_axes_are_one_axis(key, slots):
    """Rotations, groups and supports lie along all tokens, however a batch is shaped."""
    x, w, g = setup(key)
    x, g = (jnp.concatenate([a, a[:4] / 2]) for a in (x, g))  # 16 tokens
    recipe = dataclasses.replace(
        FOLDED, grad_rhs=lb.Gemm(lhs=lb.FORWARD, rhs=dataclasses.replace(INT8, **slots), fold=True)
    )
    flat = gradients(x, w, g, recipe)[2]
    shaped = gradients(x.reshape(8, 2, 32), w, g.reshape(8, 2, 6), recipe, (((2,), (0,)), ((), ())))[2]
    np.testing.assert_allclose(shaped, flat, atol=1e-5)


def test_requantized_operands_are_the_forwards(key):
    """Q'(Q(w)) along the outputs and Q'(Q(x)) along the tokens, in place of Q(w) and Q(x)."""
    x, w, g = setup(key)
    coarse = dataclasses.replace(INT8, format=formats.INT3)
    again = lb.Requantized(INT8)
    recipe = lb.LinearRecipe(
        out=lb.Gemm(lhs=coarse, rhs=coarse), grad_lhs=lb.Gemm(rhs=again), grad_rhs=lb.Gemm(lhs=again)
    )
    _, dx, dw = gradients(x, w, g, recipe)
    np.testing.assert_allclose(dx, g @ INT8(coarse(w, axis=0), axis=1).T, atol=1e-4)
    np.testing.assert_allclose(dw, INT8(coarse(x), axis=0).T @ g, atol=1e-4)
    ready = lb.ops.quantize_rhs(w, NUMBERS, recipe)
    np.testing.assert_allclose(gradients(x, ready, g, recipe.with_rhs_ready())[1], dx, atol=1e-5)


def test_folding_a_weight_that_was_quantized_before(key):
    """It brings no scales: where each row reaches the grid's largest level they are found again, to rounding."""
    x, w, g = setup(key)
    ready = jax.jit(lambda w: lb.ops.quantize_rhs(w, NUMBERS, FOLDED))(w)
    by_ready = jax.jit(
        lambda x: jax.vjp(lambda x: lb.dot_general(x, ready, NUMBERS, recipe=FOLDED.with_rhs_ready()), x)[1](g)[0]
    )
    np.testing.assert_allclose(by_ready(x), gradients(x, w, g, FOLDED)[1], atol=1e-4)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_folding_a_weight_that_brings_its_scales(key, implementation):
    """An rms fit reaches the largest level in few rows: by the scales it is the cotangent of the weight itself."""
    a, b, c = jax.random.split(key, 3)
    x, w, g = (jax.random.normal(k, shape) for k, shape in ((a, (64, 128)), (b, (128, 96)), (c, (64, 96))))
    recipe = lb.quest(8, backward=8).with_implementation(implementation)
    ready = jax.jit(lambda w: prepare_rhs(w, NUMBERS, recipe))(w)
    dx = jax.jit(
        lambda x: jax.vjp(lambda x: lb.dot_general(x, ready, NUMBERS, recipe=recipe.with_rhs_ready()), x)[1](g)
    )
    np.testing.assert_allclose(dx(x)[0], gradients(x, w, g, recipe)[1], atol=2e-5 * 128)


def test_levels_that_16_bits_do_not_hold(key):
    """Posits reach 2^24 and float16 65504: the product of levels is then float32's."""
    x, w, g = setup(key)
    posit = lb.Quantizer(format=formats.get("posit8"))
    for fold in (True, False):
        backward = dict(grad_lhs=lb.Gemm(lhs=INT8, rhs=lb.FORWARD, fold=fold))
        recipe = lb.LinearRecipe(out=lb.Gemm(lhs=posit, rhs=posit), **backward)
        dx = gradients(x.astype(jnp.float16), w, g.astype(jnp.float16), recipe)[1]
        wanted = g @ posit(w, axis=0).T
        np.testing.assert_allclose(dx, wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "method", [lb.methods.fp8("row"), lb.methods.mxfp4_backward(), lb.methods.block_scaled("mxint8")]
)
def test_a_float32_master_weight_is_quantized_anew(key, method):
    """Beside a bfloat16 cotangent, under strict promotion as in all tests; the gradient is that of the activation."""
    x, w = jax.random.normal(key, (64, 64), jnp.bfloat16), jax.random.normal(key, (64, 32))
    loss = lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=method, key=key).astype(jnp.float32).sum()
    dx, dw = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, w)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    wanted = jnp.broadcast_to(w.sum(1), x.shape)
    assert jnp.mean(jnp.abs(dx.astype(jnp.float32) - wanted)) < 0.3 * jnp.mean(jnp.abs(wanted))


def test_few_tokens_and_several_output_axes_in_bfloat16(key):
    """XLA's CPU compiler has no product of bfloat16 with a float32 sum for this one."""
    x, w = jax.random.normal(key, (32, 64), jnp.bfloat16), jax.random.normal(key, (64, 4, 16))
    loss = lambda w, recipe: lb.dot_general(x, w, NUMBERS, recipe=recipe).astype(jnp.float32).sum()
    found, expected = (jax.jit(jax.grad(loss), static_argnums=1)(w, r) for r in (lb.quest(4, backward=8), lb.quest(4)))
    np.testing.assert_allclose(found, expected, atol=2e-2 * np.abs(expected).max())


def test_a_small_float32_cotangent_of_a_float16_activation(key):
    """A product that answers in float32 has a cotangent in float32, which float16 would flush."""
    a, b, c = jax.random.split(key, 3)
    x, w = jax.random.normal(a, (64, 64), jnp.float16), jax.random.normal(b, (64, 32))
    g = jax.random.normal(c, (64, 32)) * 1e-7
    product = functools.partial(lb.dot_general, preferred_element_type=jnp.float32, recipe=lb.methods.fp8())
    gradient = jax.jit(lambda x, w, g: jax.vjp(lambda w: product(x, w, NUMBERS), w)[1](g)[0])
    narrow, wide = gradient(x, w, g), gradient(x.astype(jnp.float32), w, g)
    assert jnp.mean(jnp.abs(narrow - wide)) < 0.05 * jnp.mean(jnp.abs(wide))  # of float16 itself, at the end


@pytest.mark.parametrize("bits", [1, 4])
def test_an_8_bit_backward_of_quest_is_close_to_the_plain_one(key, bits):
    a, b, c = jax.random.split(key, 3)
    x, w, g = (jax.random.normal(k, shape) for k, shape in ((a, (64, 256)), (b, (256, 48)), (c, (64, 48))))
    pull = lambda recipe: gradients(x, w, g, recipe)[1:]
    for ours, plain in zip(pull(lb.quest(bits, backward=8)), pull(lb.quest(bits)), strict=True):
        ours, plain = np.asarray(ours, np.float64).ravel(), np.asarray(plain, np.float64).ravel()
        cosine = ours @ plain / np.sqrt(ours @ ours * (plain @ plain))
        assert 0.999 < cosine < 1 - 1e-7  # rounded, so not the same


def test_an_8_bit_backward_is_in_the_recipe():
    recipe = lb.quest(4, backward=8)
    assert recipe.name == "quest W4A4G8" and not recipe.plain_backward and lb.quest(4).plain_backward
    rows = {(row.product, row.operand): row for row in lb.explain(recipe).rows}
    for product in ("grad_lhs", "grad_rhs"):
        assert (rows[product, "cotangent"].format, rows[product, "cotangent"].fit) == ("int8", "absmax")
        assert rows[product, "cotangent"].estimator == "straight-through"


def test_what_cannot_fold_says_why():
    group = lb.Quantizer(tiling=lb.scaling.Group(32))
    fold = lambda **operands: lb.Gemm(**operands, fold=True)
    for call, said in [
        (lambda: fold(lhs=None, rhs=lb.FORWARD), r"one side is FORWARD and the other a Quantizer; got lhs=None"),
        (lambda: fold(lhs=INT8, rhs=INT8), r"lhs=int8, rhs=int8"),
        (lambda: lb.LinearRecipe(grad_lhs=fold(lhs=INT8, rhs=lb.FORWARD)), r"grad_lhs: .*out.rhs.*high precision"),
        (lambda: lb.LinearRecipe(out=lb.Gemm(lhs=group), grad_rhs=fold(lhs=lb.FORWARD, rhs=INT8)),
         r"grad_rhs: .*out.lhs.*group 32.*PerRow"),
        (lambda: lb.quest(4, backward=4), r"backward=4.*8 bits"),
        (lambda: lb.quest(4, activations=False, backward=8), r"backward=8.*both operands"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            call()
