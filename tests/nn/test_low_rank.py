"""Low-rank adapters of Flax on packed weights: the base stays packed and still, the adapters get its true gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit_jax as lb

RECIPES = {
    "nf4": lb.methods.nf4(),
    "quest, 4 bits": lb.quest(4, activations=False),
    "int8 weights and activations": lb.methods.get("absmax_integer"),
}


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(128, 256, rngs=rngs)
        self.down = nnx.Linear(256, 16, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


def adapted(model: Model) -> Model:
    """Adapters of rank 4 around both layers, with a second factor that is not zero."""
    rngs, b = nnx.Rngs(1), nnx.initializers.normal(0.1)
    model.up = nnx.LoRA(128, 4, 256, base_module=model.up, b_initializer=b, rngs=rngs)
    model.down = nnx.LoRA(256, 4, 16, base_module=model.down, b_initializer=b, rngs=rngs)
    return model


def batch():
    x, y = (jax.random.normal(jax.random.key(seed), (32, size)) for seed, size in ((0, 128), (1, 16)))
    return x, y


def gradient(model):
    x, y = batch()
    loss = lambda model: ((model(x) - y) ** 2).mean()
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    return nnx.jit(lambda model: nnx.grad(loss, argnums=wrt)(model))(model)


@pytest.mark.parametrize("name", RECIPES)
def test_adapters_get_the_gradient_of_the_dequantized_base(name):
    """The twin has the dequantized weights as floats, and quantizes activations as the packed one does."""
    recipe = RECIPES[name]
    packed = lb.convert(lb.quantize(Model(nnx.Rngs(0)), recipe))
    twin = Model(nnx.Rngs(0))
    for layer in ("up", "down"):
        dequantized = getattr(packed, layer).kernel.get_value().dequantize()
        getattr(twin, layer).kernel.set_value(dequantized)
    if recipe.out.lhs is not None:
        twin = lb.quantize(twin, lb.LinearRecipe(out=lb.Gemm(lhs=recipe.out.lhs)))
    found, expected = gradient(adapted(packed)), gradient(adapted(twin))
    for own, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.abs(other).max() > 1e-4
        np.testing.assert_allclose(own, other, atol=1e-5 * float(jnp.abs(other).max()) + 1e-7)


def test_the_base_stays_packed_and_still():
    model = adapted(lb.convert(lb.quantize(Model(nnx.Rngs(0)), lb.methods.nf4())))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Not(nnx.LoRAParam)))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    x, y = batch()

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: ((model(x) - y) ** 2).mean()
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam promotes its count
        losses = [float(step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]
    assert isinstance(model.up.base_module.kernel.get_value(), lb.QTensor)
    for old, new in zip(
        jax.tree.leaves(before), jax.tree.leaves(nnx.state(model, nnx.Not(nnx.LoRAParam))), strict=True
    ):
        np.testing.assert_array_equal(old, new)
