"""NNX layers and models: what is computed, what stays, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from tests.nn.reference import INT4, assert_sums_equal, fake_int4


def spread(key, shape):
    """Rows of different size, so that scales differ."""
    x = jax.random.normal(key, shape)
    return x * jnp.exp(jnp.arange(shape[0], dtype=jnp.float32) / 3).reshape(-1, *[1] * (len(shape) - 1))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))

    def half(self, x):
        return self.up(x)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 32, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(32, 11, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def model():
    return Model(nnx.Rngs(0))


TOKENS = jnp.arange(10).reshape(2, 5)
call = nnx.jit(lambda model, *inputs: model(*inputs))  # one program, and not one for each operation


def test_linear_against_numpy(key):
    layer = nnx.Linear(32, 8, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    x = spread(key, (5, 32))
    y = call(lb.quantize(layer, INT4), x) - layer.bias[...][None]
    assert_sums_equal(y, fake_int4(x, 1), fake_int4(layer.kernel[...], 0))
    np.testing.assert_array_less(1e-2, jnp.abs(y + layer.bias[...][None] - layer(x)).max())


def test_linear_general_merges_its_contraction_axes(key):
    layer = nnx.LinearGeneral((4, 8), (2, 3), axis=(-2, -1), use_bias=False, rngs=nnx.Rngs(0))
    x = spread(key, (5, 4, 8))
    y = call(lb.quantize(layer, INT4), x)
    weight = fake_int4(layer.kernel[...].reshape(32, 6), 0)
    assert_sums_equal(y.reshape(5, 6), fake_int4(x.reshape(5, 32), 1), weight)


def test_einsum_quantizes_along_what_it_sums(key):
    layer = nnx.Einsum("bth,nhd->btnd", (3, 16, 4), rngs=nnx.Rngs(0))
    x = spread(key, (2, 5, 16))
    product = lambda a, b: np.einsum("bth,nhd->btnd", a, b)
    assert_sums_equal(call(lb.quantize(layer, INT4), x), fake_int4(x, 2), fake_int4(layer.kernel[...], 1), product)


def test_conv_shares_a_weight_scale_over_window_and_channels(key):
    layer = nnx.Conv(8, 4, (3,), padding="VALID", use_bias=False, rngs=nnx.Rngs(0))
    x = spread(key, (2, 6, 8))
    windows = np.stack([fake_int4(x, 2)[:, i : i + 3] for i in range(4)], 1).reshape(2, 4, 24)
    weight = fake_int4(layer.kernel[...].reshape(24, 4), 0)
    assert_sums_equal(call(lb.quantize(layer, INT4), x), windows, weight)


def test_attention_quantizes_its_four_projections(key):
    attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
    quantized = lb.quantize(attention, INT4)
    x = spread(key, (2, 5, 32))
    for name in ("query", "key", "value"):
        weight = fake_int4(getattr(attention, name).kernel[...].reshape(32, 32), 0)
        assert_sums_equal(call(getattr(quantized, name), x).reshape(2, 5, 32), fake_int4(x, 2), weight)
    assert len(lb.explain(quantized).rows) == 4 * 6
    assert not np.allclose(call(quantized, x), call(attention, x), atol=1e-2)


def test_attention_scores_by_an_attention_function(key):
    """As in docs/flax.md: both products of the attention on quantized operands, here along its 16 and 8 elements."""
    eight = lb.quest(8)

    def low_bit(query, key, value, mask=None, **options):
        scores = lb.einsum("...qhd,...khd->...hqk", query, key, recipe=eight)
        return lb.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores), value, recipe=eight)

    def by_quantizers(query, key, value, mask=None, **options):
        q, k = eight.out.lhs(query), eight.out.rhs(key)
        weights = jax.nn.softmax(jnp.einsum("...qhd,...khd->...hqk", q, k))
        return jnp.einsum("...hqk,...khd->...qhd", eight.out.lhs(weights), eight.out.rhs(value, axis=-3))

    x = jax.random.normal(key, (2, 8, 64))
    ours, theirs, plain = (
        call(nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0), **options), x)
        for options in ({"attention_fn": low_bit}, {"attention_fn": by_quantizers}, {})
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert jnp.abs(ours - plain).max() > 1e-3


def test_the_view_keeps_parameters_paths_and_the_original(model):
    before = call(model, TOKENS)
    quantized = lb.quantize(model, rules=[("blocks", INT4)])
    assert isinstance(quantized, Model) and isinstance(quantized.blocks[0].up, nnx.Linear)
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(m))) for m in (quantized, model))
    assert list(ours) == list(theirs)
    assert all(ours[path] is theirs[path] or ours[path] == theirs[path] for path in ours)
    assert quantized.blocks[1].down.kernel is model.blocks[1].down.kernel  # a view: the same Variable
    np.testing.assert_array_equal(call(model, TOKENS), before)
    np.testing.assert_array_equal(quantized.head(model.embed(TOKENS)), model.head(model.embed(TOKENS)))
    assert not np.allclose(call(quantized, TOKENS), before, atol=1e-3)


def test_however_a_layer_is_called(model, key):
    quantized = lb.quantize(model, INT4)
    x = spread(key, (5, 32))
    expected = fake_int4(x, 1), fake_int4(model.blocks[0].up.kernel[...], 0)
    for way in (lambda m, x: m.blocks[0].half(x), lambda m, x: m.blocks[0].up(x)):
        assert_sums_equal(way(quantized, x), *expected)
        assert_sums_equal(nnx.jit(way)(quantized, x), *expected)
        assert_sums_equal(nnx.remat(way)(quantized, x), *expected)
    assert_sums_equal(jax.vmap(quantized.blocks[0].up)(x), *expected)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(quantized.blocks[0].up, mesh=mesh, in_specs=spec, out_specs=spec)
    assert_sums_equal(jax.jit(mapped)(x), *expected)


def test_traces_once_and_equal_views_share_the_trace(model):
    count = []

    @nnx.jit
    def run(model, tokens):
        count.append(1)
        return model(tokens)

    for _ in range(2):
        run(lb.quantize(model, lb.quest(4)), TOKENS)
    assert len(count) == 1


def test_bfloat16_layers_fit_the_float32_master(key):
    """The scale comes from the float32 weight; from its bfloat16 rounding it would differ in half of the columns."""
    layer = nnx.Linear(32, 8, dtype=jnp.bfloat16, use_bias=False, rngs=nnx.Rngs(0))
    recipe = lb.LinearRecipe(out=lb.Gemm(rhs=INT4.out.rhs))
    y = call(lb.quantize(layer, recipe), jnp.eye(32))
    assert y.dtype == jnp.bfloat16
    expected = fake_int4(layer.kernel[...], 0).astype(jnp.bfloat16)
    rounded_first = fake_int4(layer.kernel[...].astype(jnp.bfloat16), 0).astype(jnp.bfloat16)
    np.testing.assert_array_equal(y, expected)
    assert np.any(expected != rounded_first)
    gradient = nnx.jit(nnx.grad(lambda m: m(jnp.eye(32)).astype(jnp.float32).sum()))(lb.quantize(layer, recipe))
    assert gradient["kernel"].get_value().dtype == jnp.float32


def test_sharding_metadata_stays():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        layer = nnx.Linear(64, 32, kernel_init=init, rngs=nnx.Rngs(0))
        quantized, prepared = lb.quantize(layer), lb.nn.prepare(lb.quantize(layer))
        for view, value in ((quantized, quantized.kernel.get_value()), (prepared, prepared.kernel.get_value().values)):
            assert view.kernel.get_metadata() == layer.kernel.get_metadata()
            assert value.sharding == layer.kernel.get_value().sharding
        assert not lb.convert(lb.quantize(layer)).kernel.get_value().words.sharding.is_fully_replicated


def test_shared_layers_stay_shared(key):
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(16, 16, rngs=rngs)
            self.second = self.first

    twice = lb.quantize(Twice(nnx.Rngs(0)), rules=[("second|first", INT4)])
    assert twice.first is twice.second
    assert lb.convert(twice).first is not twice.first


def test_modules_that_are_no_pytrees_are_walked(key):
    class Blocks(nnx.Module, pytree=False):
        def __init__(self, rngs):
            self.blocks = [nnx.Linear(32, 32, rngs=rngs) for _ in range(2)]

        def __call__(self, x):
            return self.blocks[1](self.blocks[0](x))

    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.inner, self.head = Blocks(rngs), nnx.Linear(32, 4, rngs=rngs)

        def __call__(self, x):
            return self.head(self.inner(x))

    outer, x = Outer(nnx.Rngs(0)), spread(key, (5, 32))
    before = call(outer, x)
    quantized = lb.quantize(outer, lb.methods.get("lsq", bits=4), rules=[("inner/blocks/1", INT4)])
    explanation = lb.explain(quantized, x)
    assert {row.layer for row in explanation.rows} == {"inner/blocks/0", "inner/blocks/1", "head"}
    assert not explanation.missing
    second = quantized.inner.blocks[1]
    product = fake_int4(x, 1), fake_int4(second.kernel[...], 0)
    assert_sums_equal(second(x), *product)
    scale = quantized.inner.blocks[0].dot_general.lhs_scale[...]
    lb.calibrate(quantized, x)
    assert quantized.inner.blocks[0].dot_general.lhs_scale[...] != scale
    packed = lb.convert(quantized)
    assert isinstance(packed.inner.blocks[0].kernel.get_value(), lb.QTensor)
    np.testing.assert_allclose(call(packed, x), call(quantized, x), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(call(outer, x), before)
    root = lb.quantize(Blocks(nnx.Rngs(0)), INT4)
    assert [row.layer for row in lb.explain(root).rows][::6] == ["blocks/0", "blocks/1"]


def test_abstract_models_can_be_quantized():
    abstract = nnx.eval_shape(lambda: lb.convert(lb.quantize(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))))
    assert abstract.kernel.get_value().shape == (64, 32)
    shapes = lb.convert(lb.quantize(nnx.eval_shape(lambda: nnx.Linear(64, 32, rngs=nnx.Rngs(0)))))
    leaves = lambda model: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model))]
    assert leaves(shapes) == leaves(abstract)
    assert jax.tree.structure(nnx.state(shapes)) == jax.tree.structure(nnx.state(abstract))


def test_subclasses_may_add_but_not_go_around(key):
    class Activated(nnx.Linear):
        def __call__(self, x):
            return nnx.relu(super().__call__(x))

    class Around(nnx.Linear):
        def attend(self, x):
            return x @ self.kernel[...].T

    x = spread(key, (3, 16))
    layer = lb.quantize(Activated(16, 4, use_bias=False, rngs=nnx.Rngs(0)), INT4)
    product = fake_int4(x, 1) @ fake_int4(layer.kernel[...], 0)
    np.testing.assert_allclose(layer(x), np.maximum(product, 0), rtol=0, atol=16 * 2.0**-22 * np.abs(product).max())
    with pytest.raises(ValueError, match="Around.attend uses `kernel` itself"):
        lb.quantize(Around(16, 4, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    "layer, error, words",
    [
        (lambda r: nnx.Linear(8, 4, dot_general=lambda *a, **k: 0, rngs=r), ValueError, "has a dot_general of its own"),
        (lambda r: nnx.Linear(8, 4, promote_dtype=lambda a, dtype: a, rngs=r), ValueError, "promote_dtype of its own"),
        (lambda r: nnx.Conv(8, 4, (3,), mask=jnp.ones((3, 8, 4)), rngs=r), NotImplementedError, "has a mask"),
        (lambda r: lb.quantize(nnx.Linear(8, 4, rngs=r)), ValueError, "this Linear is quantized already"),
        (
            lambda r: nnx.ConvTranspose(8, 4, (3,), rngs=r),
            ValueError,
            "no layer that it can quantize among ConvTranspose",
        ),
        (lambda r: nnx.Linear, TypeError, "the class Linear. Build the module first"),
        (lambda r: jnp.ones((2, 2)), TypeError, "For an array call a quantizer"),
        (lambda r: nnx.state(nnx.Linear(8, 4, rngs=r)), TypeError, "pass the module"),
        (lambda r: lambda x: x, TypeError, "call lb.dot_general"),
        (lambda r: None, TypeError, "NoneType, which is no Flax module"),
    ],
)
def test_refused(layer, error, words):
    with pytest.raises(error, match=words):
        lb.quantize(layer(nnx.Rngs(0)))


def test_a_group_that_does_not_divide_names_the_layer(model):
    with pytest.raises(ValueError, match=r"'blocks/0/down' \(Linear\), weight float32\[64, 32\].*Group\(24\)"):
        lb.quantize(model, lb.methods.get("absmax_integer", bits=4, group=24))


def test_an_error_in_a_call_names_the_layer(model):
    with pytest.raises(ValueError) as caught:
        lb.quantize(model).blocks[1].down(jnp.ones((2, 3)))
    assert any("blocks/1/down" in note for note in caught.value.__notes__)


def test_empty_and_single_inputs(model):
    quantized = lb.quantize(model, INT4)
    assert call(quantized, TOKENS[:, :0]).shape == (2, 0, 11)
    assert call(quantized, TOKENS[:1, :1]).shape == (1, 1, 11)
