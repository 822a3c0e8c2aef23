"""Einsum and convolution with a recipe, against the plain ones on fake-quantized operands."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lowbit_jax as lb
from lowbit_jax.ops import pack_rhs


@pytest.mark.parametrize(
    ("spec", "lhs", "rhs"),
    [
        ("bk,kn->bn", (3, 32), (32, 5)),
        ("...k,kn->...n", (2, 3, 32), (32, 5)),
        ("btd,dhk->bthk", (2, 3, 32), (32, 4, 5)),
        ("bthk,hkd->btd", (2, 3, 4, 8), (4, 8, 5)),
        ("bk,kn->nb", (3, 32), (32, 5)),
        ("ebk,ekn->ebn", (2, 3, 32), (2, 32, 5)),
        ("kb,nk->bn", (32, 3), (5, 32)),
        ("...k,...kn->...n", (2, 32), (2, 32, 5)),
    ],
)
def test_einsum(key, spec, lhs, rhs):
    """At 8 bits the product is that of NumPy to the noise of 8 bits; in no other order of letters could it be."""
    a, b = jax.random.split(key)
    x, w = jax.random.normal(a, lhs), jax.random.normal(b, rhs)
    y = jax.jit(lambda x, w: lb.einsum(spec, x, w, recipe=lb.quest(8)))(x, w)
    expected = np.einsum(spec, np.asarray(x, np.float64), np.asarray(w, np.float64))
    assert y.shape == expected.shape
    assert np.abs(y - expected).max() < 0.1 * np.abs(expected).max()
    error = np.sqrt(np.mean((y - expected) ** 2) / np.mean(expected**2))
    assert error < 0.05


def test_einsum_is_dot_general(key):
    x, w = jax.random.normal(key, (4, 128)), jax.random.normal(jax.random.split(key)[0], (128, 16))
    y = lb.einsum("bk,kn->nb", x, w, recipe=lb.quest(2))
    np.testing.assert_array_equal(y, lb.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=lb.quest(2)).T)


@pytest.mark.parametrize(
    ("spec", "lhs", "rhs", "numbers"),
    [
        ("bk,kn->nb", (3, 32), (32, 5), (((1,), (0,)), ((), ()))),
        ("bthk,hkd->btd", (2, 3, 4, 8), (4, 8, 5), (((2, 3), (0, 1)), ((), ()))),
        ("...hk,hkd->...d", (2, 3, 4, 8), (4, 8, 5), (((2, 3), (0, 1)), ((), ()))),
        ("bkh,hkd->bd", (2, 8, 4), (4, 8, 5), (((2, 1), (0, 1)), ((), ()))),
        ("bhk,dkh->bd", (2, 4, 8), (5, 8, 4), (((1, 2), (2, 1)), ((), ()))),
    ],
)
def test_einsum_of_packed_weights(key, spec, lhs, rhs, numbers):
    x, w, recipe = jax.random.normal(key, lhs), jax.random.normal(key, rhs), lb.quest(8)
    packed = pack_rhs(w, numbers, recipe)
    np.testing.assert_allclose(
        lb.einsum(spec, x, packed, recipe=recipe), lb.einsum(spec, x, w, recipe=recipe), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("spec", ["mk,kn->mn", "mk,kn->nm"])
def test_einsum_puts_its_output_where_it_is_asked_to(key, spec, named):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jax.random.normal(key, (8, 32)), PartitionSpec(None, "d"))
        w = jax.device_put(jax.random.normal(key, (32, 4)), PartitionSpec("d", None))
        out = NamedSharding(mesh, PartitionSpec("d")) if named else PartitionSpec("d")
        y = jax.jit(lambda x, w: lb.einsum(spec, x, w, recipe=lb.quest(8), out_sharding=out))(x, w)
    assert y.sharding.spec == PartitionSpec("d", None)
    expected = np.einsum(spec, *map(np.asarray, (x, w)))
    assert np.abs(y - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    "spec", ["bk,kn", "bk->b", "bk,kn,nm->bm", "bkk,kn->bn", "bk,kn->b", "bk,kn->bnz", "bxk,kn->bxn"]
)
def test_einsum_refuses(spec):
    with pytest.raises(ValueError, match="lb.einsum"):
        lb.einsum(spec, jnp.ones((3, 32)), jnp.ones((32, 5)), recipe=lb.quest(4))


def test_einsum_repeats_no_axis():
    """NumPy does; a packed weight could not tell whether it was meant."""
    with pytest.raises(ValueError, match="lb.einsum: batch axes .* differ in length: 1 and 4. .* jnp.broadcast_to"):
        lb.einsum("...ij,...jk->...ik", jnp.ones((1, 3, 32)), jnp.ones((4, 32, 5)), recipe=lb.quest(4))


def test_missing_scales_are_asked_for_by_who_is_called():
    recipe = lb.methods.get("lsq")
    with pytest.raises(ValueError, match="^lb.einsum: the recipe learns the scale of"):
        lb.einsum("bk,kn->bn", jnp.ones((2, 32)), jnp.ones((32, 2)), recipe=recipe)
    with pytest.raises(ValueError, match="^lb.conv_general_dilated: the recipe learns the scale of"):
        numbers = ("NHWC", "HWIO", "NHWC")
        lb.conv_general_dilated(
            jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 8, 4)), (1, 1), "SAME", dimension_numbers=numbers, recipe=recipe
        )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "recipe", [lb.quest(4), lb.quest(3, activations=False), lb.methods.get("absmax_integer", bits=8)]
)
def test_conv(key, recipe, groups):
    """NHWC by HWIO: one scale a pixel and one an output channel, rotated on the channels where both are."""
    a, b = jax.random.split(key)
    x, w = jax.random.normal(a, (2, 6, 6, 32)), jax.random.normal(b, (3, 3, 32 // groups, 8))
    numbers = ("NHWC", "HWIO", "NHWC")
    options = dict(dimension_numbers=numbers, feature_group_count=groups, precision="highest")
    product = lambda x, w: lb.conv_general_dilated(x, w, (1, 1), "SAME", recipe=recipe, **options)
    y, gradient = jax.jit(lambda x, w: (product(x, w), jax.grad(lambda w: jnp.sum(product(x, w) ** 2))(w)))(x, w)
    q_x, q_w = recipe.out.lhs, recipe.out.rhs
    fit = lambda q: dataclasses.replace(q, rotation=lb.Hadamard(32 // groups)) if q is not None and q.rotation else q

    @jax.jit
    def by_hand(x, w):
        x_hat = x if q_x is None else fit(q_x)(x, axis=3)
        return lax.conv_general_dilated(x_hat, fit(q_w)(w, axis=(0, 1, 2)), (1, 1), "SAME", **options)

    expected = by_hand(x, w)
    np.testing.assert_allclose(y, expected, atol=1e-4 * float(jnp.abs(expected).max()))
    assert np.isfinite(gradient).all() and float(jnp.abs(gradient).max()) > 0


def test_conv_weight_has_one_scale_an_output_channel(key):
    w = jax.random.normal(key, (3, 3, 16, 4)) * jnp.array([0.1, 1.0, 3.0, 10.0])[None, None, None, :]
    q = lb.quest_quantizer(1, block=None)(w, axis=(0, 1, 2))
    assert [len(np.unique(np.abs(q[..., c]))) for c in range(4)] == [1, 1, 1, 1]
    assert len(np.unique(np.abs(q))) == 4


def test_conv_refuses_what_it_cannot_run():
    conv = lambda x, w, recipe, **kw: lb.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), recipe=recipe, **kw
    )
    image, kernel = jnp.ones((1, 3, 3, 4)), jnp.full((2, 2, 4, 2), 0.4)
    with pytest.raises(TypeError, match="lhs of int32"):
        conv(image.astype(jnp.int32), kernel, lb.LinearRecipe(out=lb.Gemm(rhs=lb.Quantizer())))
    with pytest.raises(NotImplementedError, match="no kernel convolves"):
        conv(image, kernel, lb.quest(4).with_implementation("kernel"))
    with pytest.raises(TypeError, match="packed rhs"):
        conv(image, lb.Quantizer().quantize(kernel), lb.quest(4))
