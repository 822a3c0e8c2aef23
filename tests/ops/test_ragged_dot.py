"""Grouped products against one `lb.dot_general` an expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax.ops.dot_general import prepare_rhs

MATRIX = (((1,), (0,)), ((), ()))
SIZES = (5, 0, 9, 2)


def operands(key, dtype=jnp.float32):
    """20 rows, the last 4 of no expert; each expert's weight of another magnitude."""
    a, b = jax.random.split(key)
    w = jax.random.normal(b, (4, 32, 12)) * jnp.asarray([1.0, 3.0, 0.1, 10.0])[:, None, None]
    return jax.random.normal(a, (20, 32), dtype), w


def by_expert(x, w, recipe):
    """What it must be, written out."""
    edges = np.cumsum([0, *SIZES])
    rows = [
        lb.dot_general(x[i:j], w[e], MATRIX, recipe=recipe)
        for e, (i, j) in enumerate(zip(edges, edges[1:], strict=False))
        if i < j
    ]
    return jnp.concatenate([*rows, jnp.zeros((x.shape[0] - edges[-1], w.shape[2]), x.dtype)])


@pytest.mark.parametrize("recipe", [
    lb.quest(4), lb.quest(1), lb.quest(8), lb.quest(4, activations=False), lb.quest(4, sparsity="2:4"),
    lb.methods.get("absmax_integer", bits=4, group=16), lb.LinearRecipe(),
], ids=lambda recipe: recipe.name)  # fmt: skip
def test_each_expert_as_by_itself(key, recipe):
    x, w = operands(key)
    recipe = recipe.with_implementation("reference")
    both = lambda f: jax.jit(jax.value_and_grad(lambda x, w: ((y := f(x, w)) ** 2).sum() + y[0, 0], argnums=(0, 1)))
    found = both(lambda x, w: lb.ragged_dot(x, w, jnp.asarray(SIZES), recipe=recipe))(x, w)
    expected = both(lambda x, w: by_expert(x, w, recipe))(x, w)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("recipe", [lb.quest(4), lb.quest(4, activations=False), lb.methods.nf4(32)])
def test_packed_experts(key, recipe):
    x, w = operands(key)
    packed = recipe.out.rhs.quantize(w, axis=1)
    assert packed.nbytes < w.nbytes / 4
    run = jax.jit(lambda x, w: lb.ragged_dot(x, w, jnp.asarray(SIZES), recipe=recipe))
    np.testing.assert_allclose(run(x, packed), run(x, w), atol=1e-5 * np.abs(w).max() * 32)


def test_a_weight_that_came_quantized(key):
    x, w = operands(key)
    recipe = lb.quest(4)
    ready = prepare_rhs(w, (((1,), (1,)), ((), (0,))), recipe)
    run = lambda w, recipe: lb.ragged_dot(x, w, jnp.asarray(SIZES), recipe=recipe)
    np.testing.assert_allclose(run(ready, recipe.with_rhs_ready()), run(w, recipe), atol=1e-4)


def test_bfloat16_learned_scales_and_keys(key):
    x, w = operands(key, jnp.bfloat16)
    sizes = jnp.asarray(SIZES)
    y = lb.ragged_dot(x, w, sizes, recipe=lb.quest(4))
    assert y.dtype == jnp.bfloat16 and not np.asarray(y[16:], np.float32).any()
    assert lb.ragged_dot(x, w, sizes, recipe=lb.quest(4), preferred_element_type=jnp.float32).dtype == jnp.float32
    lsq = lb.methods.lsq(4)
    scales = {side: getattr(lsq.out, side).initial_scale(a, axis=1) for side, a in (("lhs", x), ("rhs", w))}
    grads = jax.grad(lambda s: lb.ragged_dot(x, w, sizes, recipe=lsq, scales=s).astype(jnp.float32).sum())(scales)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in grads.values())
    noisy = lb.Quantizer(rounding=lb.rounding.stochastic)
    stochastic = lb.LinearRecipe(out=lb.Gemm(rhs=noisy))
    drawn = [lb.ragged_dot(x, w, sizes, recipe=stochastic, key=k) for k in jax.random.split(key)]
    assert (np.asarray(drawn[0]) != np.asarray(drawn[1])).any()


@pytest.mark.parametrize(("change", "error", "said"), [
    (dict(recipe=lb.quest(4, backward=8)), NotImplementedError, "forward-only recipe"),
    (dict(recipe=lb.quest(4).with_implementation("kernel")), NotImplementedError, "no kernel computes grouped"),
    (dict(recipe=4), TypeError, "LinearRecipe"),
    (dict(preferred_element_type="foo"), TypeError, "it takes a dtype"),
    (dict(lhs=jnp.ones((20, 16))), ValueError, r"\[rows, k\]"),
    (dict(lhs=jnp.ones((2, 10, 32))), ValueError, "Flatten tokens"),
    (dict(lhs=jnp.ones((20, 32), jnp.int32)), TypeError, "Cast it first"),
    (dict(group_sizes=jnp.ones((3,), jnp.int32)), ValueError, "for 4 experts"),
    (dict(group_sizes=jnp.ones((4,))), TypeError, "array of integers"),
    (dict(rhs=lb.Quantizer().quantize(jnp.ones((4, 32, 12)))), ValueError, "axis=1"),
    (dict(scales={"lhs": jnp.ones(())}), ValueError, "not learned"),
])  # fmt: skip
def test_bad_input(change, error, said):
    given = dict(lhs=jnp.ones((20, 32)), rhs=jnp.ones((4, 32, 12)), group_sizes=jnp.asarray(SIZES), recipe=lb.quest(4))
    with pytest.raises(error, match=said):
        lb.ragged_dot(**{**given, **change})
