"""Modules of one of Flax's APIs inside a model of the other: quantized inside, never left out without a word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import lowbit_jax as lb

bridge = nnx.bridge


class Linens(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(32)(linen.relu(linen.Dense(32)(x)))


class Inner(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


class Mixed(nnx.Module):
    def __init__(self, inner):
        self.first = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
        self.inner = bridge.ToNNX(inner, rngs=nnx.Rngs(1)).lazy_init(jnp.ones((2, 32)))

    def __call__(self, x):
        return self.inner(self.first(x))


class LinenMixed(linen.Module):
    @linen.compact
    def __call__(self, x):
        return bridge.to_linen(Inner, name="inner")(linen.Dense(32, name="first")(x))


@pytest.fixture
def x(key):
    return jax.random.normal(key, (4, 32))


def test_a_bridge_alone_is_refused(x):
    for inner in (Linens(), linen.Dense(8)):
        with pytest.raises(ValueError, match=r"This ToNNX is a bridge.*bridge.ToNNX\(lb.quantize"):
            lb.quantize(bridge.ToNNX(inner, rngs=nnx.Rngs(0)).lazy_init(x), lb.quest(4))
    for model in (bridge.to_linen(Inner), bridge.ToLinen(nnx.Linear, (32, 8))):
        with pytest.raises(ValueError, match=r"This ToLinen is a bridge.*bridge.ToLinen\(lambda rngs: lb.quantize"):
            lb.quantize(model, lb.quest(4))
    rest = lb.quantize(LinenMixed(), lb.quest(4), rules=[("first", None)])
    with pytest.raises(ValueError, match="no layer left to quantize.*'inner' .ToLinen. is a bridge"):
        rest.init(jax.random.key(0), x)


def test_a_rule_for_a_bridge_alone_is_refused(x):
    with pytest.raises(ValueError, match="the rule 'inner' names nothing that it can.*'inner' .ToNNX. is a bridge"):
        lb.quantize(Mixed(Linens()), lb.quest(4), rules=[("inner", lb.quest(2))])
    model = lb.quantize(LinenMixed(), lb.quest(4), rules=[("inner.*", lb.quest(2))])
    with pytest.raises(ValueError, match="the rule 'inner.*' names nothing that it can.*'inner' .ToLinen. is a bridge"):
        model.init(jax.random.key(0), x)


def test_a_bridge_beside_layers_is_told(x):
    explanation = lb.explain(lb.quantize(Mixed(Linens()), lb.quest(4)), x)
    assert {row.layer for row in explanation.rows} == {"first"} and len(explanation.others) == 2
    assert explanation.own_code == ("inner (ToNNX)",)
    explanation = lb.explain(lb.quantize(LinenMixed(), lb.quest(4)), x)
    assert {row.layer for row in explanation.rows} == {"first"} and len(explanation.others) == 1
    assert explanation.own_code == ("inner (ToLinen)",)


def test_what_lies_around_a_bridge_converts(x):
    model = lb.quantize(LinenMixed(), lb.quest(4))
    variables = model.init(jax.random.key(0), x)
    packed, words = lb.convert(model, variables, x)
    np.testing.assert_allclose(packed.apply(words, x), model.apply(variables, x), atol=1e-5)


def test_quantized_inside(x):
    """The forms of docs/flax.md compute what the quantized module computes by itself."""
    quantized = lb.quantize(Linens(), lb.quest(4))
    inside = bridge.ToNNX(quantized, rngs=nnx.Rngs(0)).lazy_init(x)
    params = nnx.to_pure_dict(nnx.state(inside, nnx.Param))
    np.testing.assert_allclose(inside(x), quantized.apply({"params": params}, x), atol=1e-6)
    explanation = lb.explain(inside, x)
    assert explanation.own_code == ("the module (ToNNX, quantized inside)",) and len(explanation.others) == 2
    with pytest.raises(ValueError, match="lb.convert: what is quantized is the Linen module inside of this ToNNX"):
        lb.convert(inside)

    inner = lb.quantize(Inner(nnx.Rngs(0)), lb.quest(4))
    model = bridge.ToLinen(lambda rngs: lb.quantize(Inner(rngs), lb.quest(4)))
    params = {"layer": nnx.to_pure_dict(nnx.state(inner.layer))}
    np.testing.assert_allclose(model.apply({"params": params}, x), inner(x), atol=1e-6)
