"""`lb.dot_general` in every layout against the same product in float64 of the fake-quantized operands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lowbit_jax as lb
from lowbit_jax import formats, scaling
from lowbit_jax.ops import pack_rhs, quantize_rhs

LAYOUTS = {  # name: (lhs shape, rhs shape, dimension numbers)
    "dense": ((5, 64), (64, 7), (((1,), (0,)), ((), ()))),
    "dense 3-d": ((2, 5, 64), (64, 7), (((2,), (0,)), ((), ()))),
    "transposed kernel": ((5, 64), (7, 64), (((1,), (1,)), ((), ()))),
    "contraction first": ((64, 5), (64, 7), (((0,), (0,)), ((), ()))),
    "several kernel outputs": ((2, 5, 64), (64, 3, 4), (((2,), (0,)), ((), ()))),
    "two contractions": ((2, 5, 4, 16), (4, 16, 7), (((2, 3), (0, 1)), ((), ()))),
    "swapped contractions": ((2, 4, 5, 16), (16, 4, 7), (((3, 1), (0, 1)), ((), ()))),
    "batched": ((3, 5, 64), (3, 64, 7), (((2,), (1,)), ((0,), (0,)))),
    "batched, two contractions": ((3, 4, 5, 16), (3, 4, 16, 7), (((1, 3), (1, 2)), ((0,), (0,)))),
}
RECIPES = {
    "quest4": lb.quest(4),
    "quest2 weights": lb.quest(2, activations=False),
    "quest3 activations": lb.quest(3, weights=False),
    "int8": lb.methods.get("absmax_integer", bits=8),
    "groups": lb.methods.get("absmax_integer", bits=4, group=16),
}


FEW = ("dense 3-d", "two contractions", "batched")
EVERY = [(layout, recipe) for recipe in RECIPES for layout in (LAYOUTS if recipe in ("quest4", "groups") else FEW)]
PACKED = [(layout, recipe) for recipe in ("quest4", "quest2 weights", "int8")
          for layout in (LAYOUTS if recipe == "quest4" else FEW) if layout != "batched, two contractions"]  # fmt: skip


product = functools.partial(jax.jit, static_argnames=("dimension_numbers", "recipe", "precision"))(lb.dot_general)


def operands(key, layout):
    lhs_shape, rhs_shape, numbers = LAYOUTS[layout]
    a, b = jax.random.split(key)
    return jax.random.normal(a, lhs_shape), jax.random.normal(b, rhs_shape), numbers


def by_hand(quantizer, x, axes):
    """Fake quantization with the contraction axes, in their order, merged and moved last; float64."""
    if quantizer is None:
        return np.asarray(x, np.float64)
    axes = [a % x.ndim for a in axes]
    last = np.moveaxis(np.asarray(x), axes, range(x.ndim - len(axes), x.ndim))
    flat = np.asarray(jax.jit(quantizer)(last.reshape(*last.shape[: x.ndim - len(axes)], -1)), np.float64)
    return np.moveaxis(flat.reshape(last.shape), range(x.ndim - len(axes), x.ndim), axes)


@pytest.mark.parametrize(("layout", "recipe"), EVERY)
def test_every_layout(key, layout, recipe):
    lhs, rhs, numbers = operands(key, layout)
    recipe = RECIPES[recipe]
    y = product(lhs, rhs, numbers, precision="highest", recipe=recipe)
    lhs_hat, rhs_hat = by_hand(recipe.out.lhs, lhs, numbers[0][0]), by_hand(recipe.out.rhs, rhs, numbers[0][1])
    expected = jax.lax.dot_general(
        jnp.asarray(lhs_hat, jnp.float32), jnp.asarray(rhs_hat, jnp.float32), numbers, "highest"
    )
    np.testing.assert_allclose(y, expected, atol=64 * 2e-6 * float(jnp.abs(expected).max()))
    assert y.shape == jax.lax.dot_general(lhs, rhs, numbers).shape


@pytest.mark.parametrize(("layout", "recipe"), PACKED)
def test_packed_and_ready_weights_give_the_same_product(key, layout, recipe):
    lhs, rhs, numbers = operands(key, layout)
    recipe = RECIPES[recipe]
    y = np.asarray(product(lhs, rhs, numbers, recipe=recipe))
    ready, packed = jax.jit(lambda w: (quantize_rhs(w, numbers, recipe), pack_rhs(w, numbers, recipe)))(rhs)
    assert ready.shape == rhs.shape
    tolerance = dict(atol=1e-5 * np.abs(y).max())
    np.testing.assert_allclose(product(lhs, ready, numbers, recipe=recipe.with_rhs_ready()), y, **tolerance)
    np.testing.assert_allclose(product(lhs, packed, numbers, recipe=recipe), y, **tolerance)


@pytest.mark.parametrize("packed_as", [((1, 2), (2, 1)), ((2, 1), (1, 2))])
@pytest.mark.parametrize("recipe", ["quest4", "groups"])
def test_the_order_of_the_contracted_pairs_does_not_matter(key, packed_as, recipe):
    """The weight's own order is that of its packed rows, whoever packs it and whoever multiplies."""
    recipe, orders = RECIPES[recipe], (((1, 2), (2, 1)), ((2, 1), (1, 2)))
    x, w = jax.random.normal(key, (8, 4, 16)), jax.random.normal(jax.random.split(key)[1], (5, 16, 4))
    packed = pack_rhs(w, (packed_as, ((), ())), recipe)
    x_hat = by_hand(recipe.out.lhs, jnp.swapaxes(x, 1, 2), (1, 2))
    w_hat = by_hand(recipe.out.rhs, w, (1, 2))
    expected = np.einsum("bji,nji->bn", x_hat, w_hat)
    tolerance = dict(atol=64 * 2e-6 * np.abs(expected).max())
    for order in orders:
        for rhs in (w, packed):
            y = product(x, rhs, (order, ((), ())), precision="highest", recipe=recipe)
            np.testing.assert_allclose(y, expected, **tolerance)
    gradients = [
        jax.jit(
            jax.grad(lambda x, w, order=order: jnp.sum(product(x, w, (order, ((), ())), recipe=recipe) ** 2), (0, 1))
        )(x, w)
        for order in orders
    ]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_array_equal(one, other)
    ready = quantize_rhs(w, (packed_as, ((), ())), recipe)
    np.testing.assert_allclose(
        product(x, ready, (orders[0], ((), ())), recipe=recipe.with_rhs_ready()), expected, **tolerance
    )


def test_gradients_of_contraction_axes_in_descending_order(key):
    x, w = jax.random.normal(key, (8, 4, 16)), jax.random.normal(jax.random.split(key)[1], (5, 16, 4))
    numbers = (((1, 2), (2, 1)), ((), ()))
    recipe = lb.LinearRecipe(out=lb.Gemm(lhs=lb.Quantizer(), rhs=lb.Quantizer()))
    _, pull = jax.vjp(lambda x, w: lb.dot_general(x, w, numbers, recipe=recipe), x, w)
    _, plain = jax.vjp(lambda x, w: jax.lax.dot_general(x, w, numbers, "highest"), x, w)
    g = jax.random.normal(key, (8, 5))
    for got, expected in zip(pull(g), plain(g), strict=True):
        np.testing.assert_allclose(got, expected, atol=0.02 * float(jnp.abs(expected).max()))


def test_microbatches_with_ready_weights_give_the_gradient_of_the_whole(key):
    """Quantize once, accumulate over microbatches, pull back once: equal to differentiating the whole batch."""
    recipe, numbers = lb.quest(4), LAYOUTS["dense"][2]
    x, w = jax.random.normal(key, (32, 128)), jax.random.normal(jax.random.split(key)[0], (128, 16))
    loss = lambda w, x, recipe: jnp.sum(jnp.sin(lb.dot_general(x, w, numbers, recipe=recipe)))
    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    whole = gradient(w, x, recipe)
    prepare = lambda w: quantize_rhs(w, numbers, recipe)
    ready = jax.jit(prepare)(w)
    parts = sum(gradient(ready, part, recipe.with_rhs_ready()) for part in jnp.split(x, 4))
    pulled = jax.jit(lambda w, g: jax.vjp(prepare, w)[1](g)[0])(w, parts)
    np.testing.assert_allclose(pulled, whole, atol=2e-5 * float(jnp.abs(whole).max()))


def test_bfloat16_activation_meets_a_float32_master(key):
    x, w = jax.random.normal(key, (6, 128)).astype(jnp.bfloat16), jax.random.normal(key, (128, 16))
    recipe, numbers = lb.quest(4), LAYOUTS["dense"][2]
    y, pullback = jax.vjp(lambda x, w: lb.dot_general(x, w, numbers, recipe=recipe), x, w)
    assert y.dtype == jnp.bfloat16
    dx, dw = pullback(jnp.ones_like(y))
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    reference = lb.dot_general(x.astype(jnp.float32), w, numbers, recipe=recipe)
    np.testing.assert_allclose(y.astype(jnp.float32), reference, atol=3 * 2**-8 * float(jnp.abs(reference).max()))
    wide = lb.dot_general(x, w, numbers, preferred_element_type=jnp.float32, recipe=recipe)
    assert wide.dtype == jnp.float32


def test_transformations(key):
    recipe, numbers = lb.quest(2), LAYOUTS["dense"][2]
    x, w = jax.random.normal(key, (3, 4, 128)), jax.random.normal(jax.random.split(key)[1], (3, 128, 8))
    apply = lambda x, w: lb.dot_general(x, w, numbers, recipe=recipe)
    expected = np.stack([apply(a, b) for a, b in zip(x, w, strict=True)])  # operation by operation
    np.testing.assert_allclose(jax.jit(jax.vmap(apply))(x, w), expected, atol=1e-4)
    np.testing.assert_allclose(jax.lax.scan(lambda c, xw: (c, apply(*xw)), 0, (x, w))[1], expected, atol=1e-4)
    gradient = lambda f: jax.jit(jax.grad(lambda w: jnp.sum(f(x[0], w) ** 2)))(w[0])
    np.testing.assert_allclose(gradient(jax.checkpoint(apply)), gradient(apply), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [("data", None), (None, "model"), ("data", "model")])
def test_sharding(key, spec):
    """Token and contraction shards: equal to one device (row fits over a sharded contraction add one reduction
    order)."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, w = jax.random.normal(key, (8, 256)), jax.random.normal(jax.random.split(key)[1], (256, 32))
    loss = jax.jit(
        jax.value_and_grad(
            lambda x, w: jnp.sum(lb.dot_general(x, w, LAYOUTS["dense"][2], recipe=lb.quest(4)) ** 2), (0, 1)
        )
    )
    expected, (dx, dw) = loss(x, w)
    put = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))
    value, (sx, sw) = loss(put(x, *spec), put(w, spec[1], None))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(sx, dx, atol=1e-4 * float(jnp.abs(dx).max()))
    np.testing.assert_allclose(sw, dw, atol=1e-4 * float(jnp.abs(dw).max()))


def test_learned_scales_get_gradients(key):
    recipe = lb.methods.get("lsq", bits=3)
    x, w = jax.random.normal(key, (16, 64)), jax.random.normal(jax.random.split(key)[1], (64, 8))
    numbers = LAYOUTS["dense"][2]
    scales = {"lhs": recipe.out.lhs.initial_scale(x), "rhs": recipe.out.rhs.initial_scale(w, axis=0)}
    assert scales["lhs"].shape == () == scales["rhs"].shape
    np.testing.assert_allclose(scales["lhs"], 2 * np.abs(x).mean() / 3.5**0.5, rtol=1e-5)
    grads = jax.jit(jax.grad(lambda s: jnp.sum(lb.dot_general(x, w, numbers, recipe=recipe, scales=s) ** 2)))(scales)
    assert all(float(jnp.abs(g)) > 0 for g in grads.values())
    packed = jax.jit(lambda w, s: pack_rhs(w, numbers, recipe, scale=s))(w, scales["rhs"])
    y = product(x, packed, numbers, recipe=recipe, scales=scales)
    np.testing.assert_allclose(y, product(x, w, numbers, recipe=recipe, scales=scales), atol=1e-5)


def test_cost_is_linear_in_tokens(key):
    """Floating-point operations of the compiled gradient, from XLA's own count."""
    w = jax.random.normal(key, (256, 64))
    loss = jax.grad(lambda x, w: jnp.sum(lb.dot_general(x, w, LAYOUTS["dense"][2], recipe=lb.quest(4)) ** 2), (0, 1))

    def flops(tokens):
        cost = jax.jit(loss).lower(jnp.ones((tokens, 256)), w).compile().cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    one, two, four = flops(256), flops(512), flops(1024)
    np.testing.assert_allclose(four - two, 2 * (two - one), rtol=0.02)


def test_bad_arguments_say_the_way_out():
    x, w, dense = jnp.ones((4, 48)), jnp.ones((48, 3)), LAYOUTS["dense"][2]
    dot = lambda **kw: lb.dot_general(**dict(lhs=x, rhs=w, dimension_numbers=dense, recipe=lb.quest(4)) | kw)
    packed = pack_rhs(w, dense, lb.quest(4))
    cases = [
        (TypeError, "lb.quest", lambda: dot(recipe=4)),
        (TypeError, "lhs of int32", lambda: dot(lhs=jnp.ones((4, 48), jnp.int32))),
        (ValueError, "differ in length", lambda: dot(rhs=jnp.ones((47, 3)))),
        (ValueError, "no contraction", lambda: dot(dimension_numbers=(((), ()), ((), ())))),
        (ValueError, "Pad by 16", lambda: dot(recipe=lb.methods.get("absmax_integer", bits=4, group=32))),
        (ValueError, "initial_scale", lambda: dot(recipe=lb.methods.get("lsq"))),
        (ValueError, "not learned", lambda: dot(scales={"lhs": jnp.float32(1)})),
        (ValueError, "packed rhs holds 48", lambda: dot(lhs=jnp.ones((4, 32)), rhs=packed)),
        (ValueError, "nothing to pack", lambda: pack_rhs(w, dense, lb.quest(4, weights=False))),
        (TypeError, "got a packed lhs", lambda: dot(lhs=packed)),
        (TypeError, "got a float for lhs", lambda: dot(lhs=1.0)),
        (TypeError, "lb.dot_general got 0 for a key", lambda: dot(key=0)),
        (TypeError, "sequence of integers", lambda: dot(dimension_numbers=((1, 0), ((), ())))),
        (TypeError, "lb.dot_general got dimension_numbers=None. They are", lambda: dot(dimension_numbers=None)),
        (TypeError, "numbers=\\(\\(1,\\), \\(0,\\)\\). They", lambda: dot(dimension_numbers=((1,), (0,)))),
        (TypeError, "pack_rhs got dimension_numbers=3. They", lambda: pack_rhs(w, 3, lb.quest(4))),
        (TypeError, "preferred_element_type='f32'; it takes a dtype", lambda: dot(preferred_element_type="f32")),
        (TypeError, "pack_rhs got a list for rhs", lambda: pack_rhs([[1.0]], dense, lb.quest(4))),
        (
            TypeError,
            "pack_rhs got QTensor.*packed already",
            lambda: pack_rhs(packed, (((1, 2), (0, 1)), ((), ())), lb.quest(4)),
        ),
        (TypeError, "quantize_rhs got QTensor.*packed already", lambda: quantize_rhs(packed, dense, lb.quest(4))),
        (
            ValueError,
            "pack_rhs: rhs has 2 axes.*Name each axis",
            lambda: pack_rhs(w, (((1,), (7,)), ((), ())), lb.quest(4)),
        ),
        (ValueError, "quantize_rhs: rhs has 2 axes", lambda: quantize_rhs(w, (((1,), (-9,)), ((), ())), lb.quest(4))),
        (ValueError, "no contraction axes", lambda: pack_rhs(w, (((), ()), ((), ())), lb.quest(4))),
        (TypeError, "pack_rhs got recipe=", lambda: pack_rhs(w, dense, lb.quest_quantizer(4))),
        (TypeError, "FORWARD", lambda: lb.Gemm(lhs=4)),
        (ValueError, "only a backward product", lambda: lb.LinearRecipe(out=lb.Gemm(lhs=lb.FORWARD))),
        (ValueError, "cotangent", lambda: lb.LinearRecipe(grad_lhs=lb.Gemm(lhs=lb.FORWARD))),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()


def test_batch_axes_of_other_sizes_are_named(key):
    x, w, numbers = operands(key, "batched")
    recipe = lb.quest(4)
    for rhs in (w, pack_rhs(w, numbers, recipe)):
        for lhs, sizes in ((x[:2], "2 and 3"), (x[:1], "1 and 3")):
            with pytest.raises(
                ValueError, match=f"lb.dot_general: batch axes of .* differ in length: {sizes}. .*repeated"
            ):
                lb.dot_general(lhs, rhs, numbers, recipe=recipe)


def test_empty_batch():
    y = lb.dot_general(jnp.ones((0, 64)), jnp.ones((64, 3)), LAYOUTS["dense"][2], recipe=lb.quest(4))
    assert y.shape == (0, 3)


def test_a_format_given_by_hand(key):
    x, w = jax.random.normal(key, (8, 64)), jax.random.normal(key, (64, 8))
    y = lb.dot_general(x, w, LAYOUTS["dense"][2], recipe=lb.quest(format=formats.LLOYD_MAX4))
    assert np.isfinite(y).all() and scaling.optimal_scale(formats.LLOYD_MAX4) > 0


@pytest.mark.parametrize("layout", ["dense", "transposed kernel", "two contractions"])
def test_a_packed_weight_is_contracted_along_the_axis_it_was_packed_for(key, layout):
    """Square weights fit in either direction."""
    x, w, numbers = operands(key, layout)
    recipe = lb.LinearRecipe(out=lb.Gemm(rhs=lb.Quantizer()))
    packed = pack_rhs(jnp.ones((*w.shape[:-1], w.shape[0]) if len(numbers[0][1]) == 1 else w.shape), numbers, recipe)
    other = {"dense": ((1,), (1,)), "transposed kernel": ((1,), (0,)), "two contractions": ((2, 3), (1, 2))}[layout]
    with pytest.raises(ValueError, match="lies along axis .*quantizer.quantize"):
        lb.dot_general(x, packed, (other, ((), ())), recipe=recipe)
