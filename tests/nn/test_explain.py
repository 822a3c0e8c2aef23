"""The table says what is computed, and the compiled program confirms it."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import lowbit_jax as lb
from lowbit_jax.nn.compiled import products_of
from lowbit_jax.ops.int8 import multiplies


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 96, rngs=rngs)
        self.up = nnx.Linear(96, 80, rngs=rngs)
        self.unused = nnx.Linear(80, 8, rngs=rngs)
        self.head = nnx.Linear(80, 24, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, tokens):
        return self.head(jnp.tanh(self.up(self.embed(tokens))))


TOKENS = jnp.arange(6).reshape(2, 3)
ON_INT8 = multiplies((2, 64), (64, 2), (lb.formats.INT8,) * 2, (((1,), (0,)), ((), ())))
F32 = "dot f32 x f32 -> f32"
RAN = {"out": "dot s8 x s8 -> s32" if ON_INT8 else F32, "grad_lhs": F32, "grad_rhs": F32}


@pytest.fixture(scope="module")
def model():
    return lb.quantize(Net(nnx.Rngs(0)), lb.quest(3))


def rows_of(explanation, layer, product):
    return [row for row in explanation.rows if (row.layer, row.product) == (layer, product)]


def test_a_recipe_explains_itself():
    explanation = lb.explain(lb.quest(3))
    assert [(r.product, r.operand) for r in explanation.rows] == [
        ("out", "activation"),
        ("out", "weight"),
        ("grad_lhs", "cotangent"),
        ("grad_lhs", "weight"),
        ("grad_rhs", "activation"),
        ("grad_rhs", "cotangent"),
    ]
    weight = explanation.rows[1]
    assert (weight.format, weight.rotation, weight.bits, weight.kernel) == ("midrise3", "hadamard 128", 3.0, "xla")
    assert [r.format for r in explanation.rows[2:4]] == ["high precision", "as in out"]
    assert "midrise3" in str(explanation) and repr(explanation) == str(explanation)


def test_each_layer_shows_its_block_and_its_bits(model):
    """96 = 3 * 32: the largest power of two that divides it. A weight column of 96 elements has one float32 scale."""
    explanation = lb.explain(model)
    activation, weight = rows_of(explanation, "up", "out")
    assert weight.rotation.startswith("hadamard 32") and "128 does not divide 96" in weight.rotation
    assert weight.bits == pytest.approx(3 + 32 / 96) and activation.bits == 3
    assert explanation.high_precision == ("embed (Embed)",)
    assert not explanation.proved and "up" in str(explanation)


def test_the_compiled_program_shows_operation_and_dtypes(model):
    explanation = lb.explain(model, TOKENS)
    for product in ("out", "grad_lhs", "grad_rhs"):
        assert {r.ran for r in rows_of(explanation, "up", product)} == {RAN[product]}
    (head,) = {r.ran for r in rows_of(explanation, "head", "out")}
    assert head == RAN["out"] if ON_INT8 else head in (F32, "dot bf16 x bf16 -> bf16", "dot bf16 x bf16 -> f32")
    assert explanation.missing == ("unused",)
    assert "NOT IN THE COMPILED PROGRAM: unused" in str(explanation)


def test_packed_models_show_that_they_are(model):
    explanation = lb.explain(lb.convert(model), TOKENS)
    assert {r.kernel for r in rows_of(explanation, "up", "out")} == {"xla", "xla, packed"}
    assert {r.ran for r in rows_of(explanation, "up", "out")} == {RAN["out"]}
    assert "gradients" not in str(explanation)


def test_convolutions_and_stacks():
    class Images(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(16, 64, (3, 3), rngs=rngs)
            self.layers = nnx.vmap(lambda rngs: nnx.Linear(64, 64, rngs=rngs))(rngs.split(2))

        def __call__(self, x):
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                self.conv(x), self.layers
            )

    explanation = lb.explain(lb.quantize(Images(nnx.Rngs(0))), jnp.ones((1, 5, 5, 16)))
    assert not explanation.missing
    for product in ("out", "grad_lhs", "grad_rhs"):
        assert all("f32 x f32 -> f32" in r.ran for r in rows_of(explanation, "conv", product))
        assert all(r.ran == RAN[product] for r in rows_of(explanation, "layers", product))
    assert rows_of(explanation, "conv", "out")[1].rotation.startswith("hadamard 16")


def test_rotations_are_not_taken_for_products(key):
    """With as many tokens as inputs and outputs every matrix is 128 x 128, the transform's too."""
    layer = lb.quantize(nnx.Linear(128, 128, rngs=nnx.Rngs(0)))
    x = jnp.ones((128, 128))
    text = jax.jit(lambda layer, x: layer(x)).lower(layer, x).compile().as_text()
    assert [product.tag for product in products_of(text) if product.tag] == ["lowbit[]"]
    assert text.count(" dot(") > 1


class OwnCode(nnx.Module):
    """A product by `lb.einsum` with a parameter of its own, attention, and a layer in high precision."""

    def __init__(self, rngs):
        self.own = nnx.Param(jax.random.normal(rngs.params(), (128, 64)))
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.head = nnx.Linear(64, 16, rngs=rngs)

    def __call__(self, x):
        return self.head(self.attention(lb.einsum("btk,kn->btn", x, self.own[...], recipe=lb.quest(4))))


def test_products_of_no_layer_are_counted():
    """Two of the attention, one of the module's own, quantized code, and the head, which stays in high precision."""
    explanation = lb.explain(
        lb.quantize(OwnCode(nnx.Rngs(0)), lb.quest(4), rules=[("head", None)]), jnp.ones((2, 8, 128))
    )
    own = "dot s8 x s8 -> s32" if ON_INT8 else F32
    assert sorted(explanation.others) == sorted([F32, F32, F32, own])
    assert explanation.high_precision == ("head (Linear)",) and explanation.own_code == ("the module (OwnCode)",)
    assert "as their own code computes: the module (OwnCode)" in str(explanation)
    assert "other products in the forward program: 4 (" in str(explanation)


class LinenOwnCode(linen.Module):
    @linen.compact
    def __call__(self, x):
        own = self.param("own", linen.initializers.lecun_normal(), (x.shape[-1], 64))
        return linen.Dense(8, name="head")(lb.einsum("bk,kn->bn", x, own, recipe=lb.quest(4)))


def test_products_of_no_linen_layer_are_counted():
    explanation = lb.explain(lb.quantize(LinenOwnCode(), lb.quest(4)), jnp.ones((4, 128)))
    assert explanation.others == ("dot s8 x s8 -> s32" if ON_INT8 else F32,)
    assert explanation.high_precision == () and explanation.own_code == ("the module (LinenOwnCode)",)


def test_linen_models_are_explained_by_their_inputs():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(8, name="head")(linen.Dense(40, name="up")(x))

    model = lb.quantize(Model(), lb.quest(3), rules=[("head", None)])
    assert "pass inputs" in str(lb.explain(model)) and lb.explain(model).high_precision == ("head",)
    for arguments in ((jnp.ones((2, 96)),), (model.init(jax.random.key(0), jnp.ones((2, 96))), jnp.ones((2, 96)))):
        explanation = lb.explain(model, *arguments)
        assert {r.layer for r in explanation.rows} == {"up"} and explanation.high_precision == ("head (Dense)",)
        for product in ("out", "grad_lhs", "grad_rhs"):
            assert {r.ran for r in rows_of(explanation, "up", product)} == {RAN[product]}
    assert lb.explain(Model()).rows == ()


class Keyword(linen.Module):
    @linen.compact
    def __call__(self, *, x):
        return linen.Dense(8, name="up")(x)


def test_inputs_by_keyword_are_inputs():
    model, x = lb.quantize(Keyword(), lb.quest(3)), jnp.ones((2, 96))
    variables = jax.jit(model.init)(jax.random.key(0), x=x)
    for explanation in (lb.explain(model, x=x), lb.explain(model, variables, x=jax.ShapeDtypeStruct(x.shape, x.dtype))):
        for product in ("out", "grad_lhs", "grad_rhs"):
            assert {r.ran for r in rows_of(explanation, "up", product)} == {RAN[product]}


def test_a_forward_without_gradient_is_explained_alone():
    class Loop(linen.Module):
        @linen.compact
        def __call__(self, x):
            layer = linen.Dense(96, name="up")
            if self.is_initializing():
                return layer(x)
            body = lambda _, carry: (carry[0] + 1, layer(carry[1]))
            return linen.while_loop(lambda _, carry: carry[0] < 2, body, self, (0, x))[1]

    model, x = lb.quantize(Loop(), lb.quest(3)), jnp.ones((2, 96))
    explanation = lb.explain(model, model.init(jax.random.key(0), x), x)
    assert not explanation.missing and {r.ran for r in rows_of(explanation, "up", "out")} == {RAN["out"]}
    assert {r.ran for r in rows_of(explanation, "up", "grad_lhs")} == {""}
    assert "its gradient cannot be traced: Reverse-mode differentiation" in str(explanation)


def test_an_unquantized_model_has_an_empty_table():
    explanation = lb.explain(Net(nnx.Rngs(0)))
    assert explanation.rows == () and "head (Linear)" in explanation.high_precision


def test_what_cannot_be_explained_raises():
    with pytest.raises(TypeError, match="no Flax module"):
        lb.explain(4)
    with pytest.raises(TypeError, match="takes no inputs"):
        lb.explain(lb.quest(4), jnp.ones(3))
