"""QuEST forward and gradients against an independent float64 transcription of the paper's equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax import scaling
from tests.methods import reference

BITS = range(1, 9)


def operands(seed: int, tokens: int = 12, size: int = 256, channels: int = 24):
    """Float64 operands that float32 holds exactly, each row with its own spread."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape) * rng.uniform(0.1, 5, (shape[0], 1))
    return [
        a.astype(np.float32).astype(np.float64)
        for a in (draw(tokens, size), draw(channels, size), draw(tokens, channels))
    ]


def away_from_ties(u: np.ndarray, bits: int, block: int | None) -> bool:
    """No rotated element so near a decision that float32 may fall on the other side."""
    h = reference.rotate(u, block)
    step = 2 * reference.alpha_star(bits) * np.sqrt(np.mean(h**2, -1, keepdims=True)) / (2**bits - 1)
    v = np.abs(h / step)
    limits = [np.abs(v - np.round(v)).min(), np.abs(v - 2 ** (bits - 1)).min()]
    return min(limits) > 2e-6


def safe_operands(bits: int, block: int | None):
    for seed in range(500):
        x, w, g = operands(seed, tokens=4, size=128, channels=3)
        if away_from_ties(x, bits, block) and away_from_ties(w, bits, block):
            return x, w, g
    raise AssertionError("no draw keeps clear of ties")


@pytest.mark.parametrize("bits", BITS)
def test_alpha_star_to_1e_9(bits):
    """The minimizer by quadrature: flat to second order there, so compare the slope-accurate value through its loss
    too."""
    fmt = lb.formats.get(f"midrise{bits}")
    ours = scaling.optimal_clip(fmt)
    np.testing.assert_allclose(ours, reference.alpha_star(bits), rtol=1e-6)
    eps = 1e-4
    mse = lambda alpha: scaling.gaussian_mse(fmt, alpha / fmt.max_finite)
    assert mse(ours) < min(mse(ours * (1 + eps)), mse(ours * (1 - eps)))


@pytest.mark.parametrize(("bits", "block"), [*((b, 128) for b in BITS), (1, 32), (4, 32), (1, None), (4, None)])
def test_forward_and_gradients_match_float64(bits, block):
    x, w, g = safe_operands(bits, block)
    recipe = lb.quest(bits, block=block)

    def layer(x, kernel):
        return lb.dot_general(x, kernel, (((1,), (0,)), ((), ())), precision="highest", recipe=recipe)

    as32 = lambda a: jnp.asarray(a, jnp.float32)
    y, pullback = jax.vjp(jax.jit(layer), as32(x), as32(w.T))
    dx, dkernel = pullback(as32(g))
    for ours, theirs in zip((y, dx, dkernel.T), reference.linear(x, w, g, bits, block), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("side", ["weights", "activations"])
def test_one_sided_quest_unrotates(side):
    """With one operand in high precision the other is un-rotated: y = Q(xH)H^T w^T."""
    x, w, _ = safe_operands(3, 128)
    recipe = lb.quest(3, **{"weights": False, "activations": False} | {side: True})
    y = lb.dot_general(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(w, jnp.float32),
        (((1,), (1,)), ((), ())),
        precision="highest",
        recipe=recipe,
    )
    back = lambda u: reference.rotate(reference.quantize(u, 3, reference.alpha_star(3))[0], 128)
    expected = back(x) @ w.T if side == "activations" else x @ back(w).T
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=2e-6 * np.abs(expected).max())


def test_trust_mask_fractions_are_those_of_a_gaussian(key):
    """P(|h| > alpha* + T) from METHODS 3.1: .04644 at 2 bits, .007327 at 4, .2996 at 1 (s = 1.30)."""
    h = jax.random.normal(key, (64, 8192))
    for bits, expected in ((1, 0.2996), (2, 0.04644), (3, 0.01907), (4, 0.007327)):
        quantizer = lb.quest_quantizer(bits)
        gradient = jax.grad(lambda h, q=quantizer: jnp.sum(q.in_rotated_space(h) * jnp.ones_like(h)))(h)
        passed = lb.quest_quantizer(bits).rotation.apply(gradient)  # back to the space of the mask: 0 or 1
        fraction = float(jnp.mean(passed < 0.5))
        sigma = (expected * (1 - expected) / h.size) ** 0.5
        assert abs(fraction - expected) < 5 * sigma + 0.01 * expected, (bits, fraction)


def test_random_signs_save_rows_of_one_sign(key):
    """Behind a ReLU the sum of a row falls on one coefficient of the transform and is clipped; signs spread it."""
    x_key, w_key = jax.random.split(key)
    x, w = jax.nn.relu(jax.random.normal(x_key, (64, 256))), jax.random.normal(w_key, (256, 32))
    numbers = (((1,), (0,)), ((), ()))
    error = lambda recipe: float(jnp.linalg.norm(lb.dot_general(x, w, numbers, recipe=recipe) - x @ w))
    assert error(lb.quest(8, signs=0)) < 0.2 * error(lb.quest(8))
    with pytest.raises(ValueError, match="signs"):
        lb.quest(4, block=None, signs=0)
