"""Modules that read the kernel of a quantized layer in code of their own, and keys that nothing would take."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import lowbit_jax as lb


class Around(nnx.Module):
    """Multiplies by the layer's kernel itself."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return x @ self.layer.kernel[...]


class Regularized(nnx.Module):
    """Reads the kernel, but takes no product with it."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)

    def penalty(self):
        return jnp.sum(self.layer.kernel[...] ** 2)


class WithRecipe(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        numbers = (((x.ndim - 1,), (0,)), ((), ()))
        return lb.dot_general(x, self.layer.kernel[...], numbers, recipe=lb.quest(4))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_method_that_goes_around_its_layer_is_refused(wrapped):
    model = Around(nnx.Rngs(0))
    model = nnx.Sequential(model, nnx.Linear(16, 16, rngs=nnx.Rngs(1))) if wrapped else model
    with pytest.raises(ValueError, match=r"Around\.__call__ multiplies by a `kernel` itself"):
        lb.quantize(model, lb.quest(4))


@pytest.mark.parametrize(
    "product",
    [
        lambda self, x: jax.lax.ragged_dot(x, self.layer.kernel[...][None], jnp.array([len(x)])),
        lambda self, x: jax.lax.conv_transpose(x[None], self.layer.kernel[...][None], (1,), "SAME")[0],
        lambda self, x: jax.lax.conv_with_general_padding(x, self.layer.kernel[...].T, (), (), None, None),
        lambda self, x: jnp.linalg.multi_dot([x, self.layer.kernel[...]]),
        lambda self, x: jnp.vecmat(x[0], self.layer.kernel[...]),
        lambda self, x: jnp.matvec(self.layer.kernel[...].T, x[0]),
        lambda self, x: jnp.linalg.vecdot(x[:1], self.layer.kernel[...].T),
    ],
)
def test_every_product_of_jax_is_seen(product):
    kind = type("Around", (Around,), {"__call__": product})
    assert kind(nnx.Rngs(0))(jnp.ones((2, 32))).shape[-1] == 16
    with pytest.raises(ValueError, match="multiplies by a `kernel` itself"):
        lb.quantize(kind(nnx.Rngs(0)), lb.quest(4))


def test_a_layer_that_stays_in_high_precision_may_be_gone_around():
    model = nnx.Sequential(Around(nnx.Rngs(0)), nnx.Linear(16, 16, rngs=nnx.Rngs(1)))
    quantized = lb.quantize(model, rules=[("layers/1", lb.quest(4))])
    assert {row.layer for row in lb.explain(quantized).rows} == {"layers/1"}


@pytest.mark.parametrize("kind", [Regularized, WithRecipe])
def test_reading_a_kernel_or_a_product_by_recipe_is_no_offense(kind):
    model = lb.quantize(kind(nnx.Rngs(0)), lb.quest(4))
    assert model(jnp.ones((2, 32))).shape == (2, 16)


def apply(layer, x):
    return layer(x)


class Keeping(nnx.Module):
    """Keeps what `make` makes of it."""

    def __init__(self, make):
        self.layer, self.norm = nnx.Linear(32, 32, rngs=nnx.Rngs(0)), nnx.LayerNorm(32, rngs=nnx.Rngs(0))
        self.kept = make(self)

    def forward(self, x):
        return self.layer(x)


def through_another(model):
    layers = {"one": [model.layer]}
    inner = lambda x: layers["one"][0](x)
    return lambda x: inner(x)


WHOLE, LAYER = "carries this Keeping along", r"carries the layer 'layer' \(Linear\) along"


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda m: lambda x: m.layer(x), WHOLE),
        (lambda m: m.forward, WHOLE),
        (lambda m: jax.jit(m.forward), WHOLE),
        (lambda m: nnx.jit(lambda x: m.layer(x)), WHOLE),
        (lambda m: (jax.nn.relu, m.forward), WHOLE),
        (lambda m: functools.partial(apply, m.layer), LAYER),
        (lambda m: lambda x, layer=m.layer: layer(x), LAYER),
        (lambda m: m.layer.__call__, LAYER),
        (through_another, LAYER),
    ],
)
def test_a_callable_that_keeps_the_original_is_refused(make, told):
    with pytest.raises(ValueError, match=f"this Keeping keeps a callable, 'kept', which {told}.*Make it a method"):
        lb.quantize(Keeping(make), lb.quest(4))


@pytest.mark.parametrize(
    "make",
    [
        lambda m: m.norm.__call__,
        lambda m: jax.nn.relu,
        lambda m: functools.partial(jax.nn.gelu, approximate=True),
        lambda m: jax.jit(jnp.tanh),
        lambda m: nnx.initializers.variance_scaling(1.0, "fan_in", "normal"),
        lambda m: nnx.data((nnx.Linear(32, 32, rngs=nnx.Rngs(0)), {"again": m.layer})),
        lambda m: nnx.data({"again": m.layer}),
    ],
)
def test_other_callables_and_data_are_taken(make):
    quantized = lb.quantize(Keeping(make), lb.quest(4))
    assert any(row.quantized for row in lb.explain(quantized).rows)


class LinenAround(linen.Module):
    @linen.compact
    def __call__(self, x):
        layer = linen.Dense(16, name="layer")
        layer(x)
        return jnp.dot(x, layer.variables["params"]["kernel"])


def test_a_linen_method_that_goes_around_its_layer_is_refused():
    model = lb.quantize(LinenAround(), lb.quest(4))
    with pytest.raises(ValueError, match=r"LinenAround\.__call__ multiplies by a `kernel` itself"):
        model.init(jax.random.key(0), jnp.ones((2, 32)))


def test_keys_that_nothing_takes_are_refused():
    layer = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no recipe here rounds stochastically"):
        lb.quantize(layer, lb.quest(4), rngs=nnx.Rngs(quantize=0))


def test_rngs_without_the_stream_say_which_one():
    stochastic = lb.LinearRecipe(out=lb.Gemm(rhs=lb.Quantizer(rounding=lb.rounding.stochastic)))
    with pytest.raises(ValueError, match=r"Pass nnx\.Rngs\(quantize=0\)"):
        lb.quantize(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), stochastic, rngs=nnx.Rngs(params=0))
