"""Derivatives of derivatives: by the estimator where a product keeps floats, an error where it keeps integers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.ops import int8
from lowbit_jax.ops.dot_general import pack_rhs

NUMBERS = (((1,), (0,)), ((), ()))
STRAIGHT = lb.Quantizer(estimator=lb.estimators.StraightThrough())
CLIPPED = lb.Quantizer(format=lb.formats.get("int4"), fit=lb.scaling.Percentile(90.0))
QUEST = dataclasses.replace(lb.methods.quest_quantizer(3, block=16), estimator=lb.estimators.StraightThrough())


def straight(quantizer: lb.Quantizer, x: jax.Array, axis: int, passes=True) -> jax.Array:
    """The quantized array with the derivatives of x where they pass, by `stop_gradient` alone."""
    kept = jnp.where(passes, x, 0.0)
    return kept + jax.lax.stop_gradient(quantizer(x, axis=axis) - kept)


def clipped(quantizer: lb.Quantizer, x: jax.Array, axis: int) -> jax.Array:
    scale = quantizer.fit(x, quantizer.format, (axis,))
    u = jax.lax.stop_gradient(x / scale)
    return straight(quantizer, x, axis, (u >= quantizer.format.min_finite) & (u <= quantizer.format.max_finite))


def trusted(quantizer: lb.Quantizer, x: jax.Array, axis: int) -> jax.Array:
    """QuEST's rule (METHODS 3.1) with a Hadamard matrix written out: the mask stands between two rotations."""
    block = 16
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]
    rotation = jnp.kron(jnp.eye(x.shape[axis] // block), jnp.asarray(signs) / 4)
    turn = lambda x: jnp.moveaxis(jnp.moveaxis(x, axis, -1) @ rotation, -1, axis)
    h, hat = turn(x), turn(quantizer(x, axis=axis))
    scale = jnp.max(jnp.abs(hat), axis=axis, keepdims=True) / quantizer.format.max_finite
    passes = jnp.abs(hat - h) <= scale / 2 * (1 + 1e-4)
    kept = jnp.where(jax.lax.stop_gradient(passes), h, 0.0)
    return turn(kept + jax.lax.stop_gradient(hat - kept))


def penalty(product, x, w):
    """A gradient penalty, whose own gradient needs second derivatives by x and by w."""
    critic = lambda x, w: jnp.tanh(product(x, w) / 8).sum()
    dx, dw = jax.grad(critic, (0, 1))(x, w)
    return (dx**2).sum() + (dw**3).sum()


@pytest.fixture
def operands(key):
    a, b = jax.random.split(key)
    return jax.random.normal(a, (12, 64)), jax.random.normal(b, (64, 10))


@pytest.mark.parametrize(("quantizer", "oracle"), [
    (STRAIGHT, straight), (CLIPPED, clipped), (QUEST, straight), (lb.methods.quest_quantizer(3, block=16), trusted),
])  # fmt: skip
def test_of_a_gradient_penalty(operands, quantizer, oracle):
    recipe = lb.LinearRecipe(out=lb.Gemm(lhs=quantizer, rhs=quantizer), implementation="reference")
    ours = lambda x, w: lb.dot_general(x, w, NUMBERS, "highest", recipe=recipe)
    theirs = lambda x, w: jnp.matmul(oracle(quantizer, x, 1), oracle(quantizer, w, 0), precision="highest")
    found, expected = (jax.jit(jax.grad(functools.partial(penalty, f), (0, 1)))(*operands) for f in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_third_derivatives(operands):
    """d^3/dt^3 of sin(3 t) through the rounding of t: with the derivative 1 of the rounding it is -27 cos(3 t_hat)."""
    hat = lambda t: STRAIGHT(jnp.stack([t, jnp.float32(1)]))[0]
    f = lambda t: jnp.sin(3 * hat(t))
    t = jnp.float32(0.3)
    assert jax.grad(jax.grad(jax.grad(f)))(t) == pytest.approx(-27 * np.cos(3 * float(hat(t))), rel=1e-5)


@pytest.mark.parametrize("name", ["lsq", "pact"])
def test_of_learned_scales(key, name):
    """The papers' rules written with `stop_gradient`: x_hat = s round(x / s), whose derivative by s is q - u inside the
    grid and the end of the grid outside (LSQ, times its gain), or the end alone (PACT)."""
    fmt = lb.formats.get("int4")
    estimator = {"lsq": lb.estimators.LSQ(), "pact": lb.estimators.PACT()}[name]
    quantizer = lb.Quantizer(format=fmt, tiling=lb.scaling.PerTensor(), fit=lb.scaling.Learned(), estimator=estimator)
    fixed, x = jax.lax.stop_gradient, jax.random.normal(key, (3, 64))
    gain = 1 / np.sqrt(x.size * fmt.max_finite)

    def by_hand(x, s):
        u = x / s
        q = fixed(jnp.clip(jnp.round(u), fmt.min_finite, fmt.max_finite))
        if name == "lsq":
            inside = fixed((u > fmt.min_finite) & (u < fmt.max_finite))
            slope = jnp.where(inside, q - u, q) * gain
        else:
            inside = fixed((u >= fmt.min_finite) & (u < fmt.max_finite))
            slope = jnp.where(inside, 0.0, q)
        x_hat = fixed(q * s) + jnp.where(inside, x - fixed(x), 0.0) + fixed(slope) * (s - fixed(s))
        g = jnp.cos(x_hat)
        dx, ds = jnp.where(inside, g, 0.0), (g * slope).sum()
        return (dx**3).sum() + ds**2

    def ours(x, s):
        dx, ds = jax.grad(lambda x, s: jnp.sin(quantizer(x, scale=s)).sum(), (0, 1))(x, s)
        return (dx**3).sum() + ds**2

    s = jnp.float32(0.2)
    expected, found = (jax.jit(jax.grad(f, (0, 1)))(x, s) for f in (by_hand, ours))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def test_of_quantized_backward_products(operands):
    """dx = Q(g) w_hat^T and dw = Q(x)^T g, with the original x in dw: differentiated as they are written."""
    x, w = operands
    recipe = lb.LinearRecipe(
        out=lb.Gemm(lhs=STRAIGHT, rhs=STRAIGHT),
        grad_lhs=lb.Gemm(lhs=STRAIGHT, rhs=lb.FORWARD),
        grad_rhs=lb.Gemm(lhs=STRAIGHT),
        implementation="reference",
    )
    ours = lambda x, w: lb.dot_general(x, w, NUMBERS, "highest", recipe=recipe)

    def by_hand(x, w):
        y = straight(STRAIGHT, x, 1) @ straight(STRAIGHT, w, 0)
        g = (1 - jnp.tanh(y / 8) ** 2) / 8
        dx, dw = straight(STRAIGHT, g, 1) @ straight(STRAIGHT, w, 0).T, straight(STRAIGHT, x, 0).T @ g
        return (dx**2).sum() + (dw**3).sum()

    found, expected = (jax.jit(jax.grad(f, (0, 1)))(x, w) for f in (functools.partial(penalty, ours), by_hand))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-3 * np.abs(b).max())  # a code of g may differ at a tie


def test_with_a_packed_weight(operands):
    x, w = operands
    recipe = lb.quest(3, block=16)
    quantizer, packed = recipe.out.rhs, pack_rhs(w, NUMBERS, recipe)
    ours = lambda x: lb.dot_general(x, packed, NUMBERS, "highest", recipe=recipe)
    theirs = lambda x: jnp.matmul(trusted(quantizer, x, 1), quantizer(w, axis=0), precision="highest")
    square = lambda f: lambda x: (jax.grad(lambda x: jnp.tanh(f(x) / 8).sum())(x) ** 2).sum()
    found, expected = (jax.jit(jax.grad(square(f)))(x) for f in (ours, theirs))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("recipe", "dtype", "within"), [
    (lb.quest(4), jnp.float32, lambda f: f),  # int8 products of x86 CPUs
    (lb.quest(4), jnp.float32, jax.jit),
    (lb.quest(4), jnp.float32, jax.checkpoint),
    (lb.quest(4, backward=8), jnp.float32, jax.jit),
    (lb.quest(4, backward=8).with_implementation("reference"), jnp.float32, jax.jit),
    (lb.quest(4).with_implementation("interpret"), jnp.bfloat16, jax.jit),  # the fused kernels
])  # fmt: skip
def test_integers_raise_instead_of_answering_zero(key, recipe, dtype, within):
    plain = recipe.implementation == "auto" and recipe.plain_backward
    x, w = jax.random.normal(key, (8, 128), dtype), jax.random.normal(key, (128, 8))
    if plain and not int8.multiplies(x.shape, w.shape, (recipe.out.lhs.format, recipe.out.rhs.format), NUMBERS):
        pytest.skip("no int8 products here")
    product = within(lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=recipe))
    jax.grad(lambda w: (product(x, w) ** 2).sum().astype(jnp.float32))(w)  # the first derivative is there
    first = lambda of: lambda *xw: (jax.grad(lambda *xw: (product(*xw) ** 2).sum(), of)(*xw) ** 2).sum()
    for outer, inner in ((1, 0), (0, 1), (0, 0), (1, 1)):
        with pytest.raises(NotImplementedError, match="second derivative .*with_implementation"):
            jax.grad(first(inner), outer)(x, w)


def test_models_that_keep_codes_raise(key):
    layer = lb.quantize(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), lb.quest(4).with_implementation("reference"))
    layer, x = lb.nn.keep_codes(layer), jax.random.normal(key, (8, 32))
    first = jax.grad(lambda x: (layer(x) ** 2).sum())
    assert jnp.abs(first(x)).max() > 0.1
    with pytest.raises(NotImplementedError, match="second derivative"):
        jax.grad(lambda x: (first(x) ** 2).sum())(x)


def test_hessian_of_a_model(key):
    """A Hessian-vector product of a model in reference, forward over reverse and reverse over reverse."""
    model = nnx.Sequential(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(16, 4, rngs=nnx.Rngs(1)))
    recipe = lb.LinearRecipe(out=lb.Gemm(lhs=STRAIGHT, rhs=STRAIGHT), implementation="reference")
    graph, params = nnx.split(lb.quantize(model, recipe))
    x = jax.random.normal(key, (8, 32))
    gradient = jax.grad(lambda params: (nnx.merge(graph, params)(x) ** 2).mean())
    direction = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
    dot = lambda a, b: sum(jnp.vdot(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    forward = jax.jit(lambda params: jax.jvp(gradient, (params,), (direction,))[1])(params)
    reverse = jax.jit(jax.grad(lambda params: dot(gradient(params), direction)))(params)
    assert dot(forward, forward) > 0.1
    for a, b in zip(jax.tree.leaves(forward), jax.tree.leaves(reverse), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))
