"""Embeddings: rows and tied heads of quantized and packed tables, in NNX and Linen."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, serialization

import lowbit_jax as lb
from lowbit_jax import formats, scaling
from lowbit_jax.ops.plane_tensor import PlaneTensor

V, D = 40, 64
W8 = lb.methods.get("absmax_integer", bits=8, activations=False)
W4G = lb.methods.get("absmax_integer", bits=4, activations=False, group=32, zero_points="weights")
WEIGHTS = {
    "w8": W8,
    "w4 groups": W4G,
    "quest": lb.quest(4),
    "quest weights": lb.quest(3, activations=False),
    "tensor": lb.LinearRecipe(out=lb.Gemm(rhs=lb.Quantizer(tiling=scaling.PerTensor()))),
    "blocks": lb.LinearRecipe(out=lb.Gemm(rhs=lb.Quantizer(tiling=scaling.Block(32, 8)))),
    "nvfp4": lb.LinearRecipe(out=lb.Gemm(rhs=lb.block_quantizer(formats.NVFP4))),
    "mxfp4": lb.LinearRecipe(out=lb.Gemm(rhs=lb.block_quantizer(formats.MXFP4))),
    "2:4": lb.LinearRecipe(out=lb.Gemm(rhs=lb.Quantizer(sparsity=lb.sparsity.NofM(2, 4)))),
}
IDS = jnp.asarray([[0, 7, 39], [-1, 7, 12]])


class Tied(nnx.Module):
    """A language model in miniature: its head is its embedding."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.mlp = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, ids):
        return self.embed.attend(nnx.relu(self.mlp(self.embed(ids))))


class TiedLinen(nn.Module):
    def setup(self):
        self.embed = nn.Embed(V, D)
        self.mlp = nn.Dense(D)

    def __call__(self, ids):
        return self.embed.attend(nn.relu(self.mlp(self.embed(ids))))


call = nnx.jit(lambda model, x: model(x))
attend = nnx.jit(lambda model, x: model.attend(x))


def layer(recipe, dtype=jnp.float32):
    return lb.quantize(nnx.Embed(V, D, dtype=dtype, rngs=nnx.Rngs(0)), recipe)


def table_of(embed, recipe):
    """The whole table as the quantizer makes it."""
    return np.asarray(jax.jit(recipe.out.rhs)(embed.embedding.get_value()))


@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_are_those_of_the_quantized_table_packed_too(name):
    recipe = WEIGHTS[name]
    embed = layer(recipe)
    wanted = table_of(embed, recipe)[np.asarray(IDS)]
    np.testing.assert_allclose(call(embed, IDS), wanted, rtol=1e-6, atol=1e-7)
    packed = lb.convert(embed)
    assert packed.embedding.get_value().nbytes < 0.35 * V * D * 4
    np.testing.assert_allclose(call(packed, IDS), wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(call(packed, IDS[0, 1]), wanted[0, 1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("packed", [False, True])
def test_ids_beyond_the_table_are_nan_as_in_flax(packed):
    embed = layer(WEIGHTS["tensor"])
    embed = lb.convert(embed) if packed else embed
    ids = jnp.asarray([V - 1, V, -V, -V - 1])
    missing = np.isnan(np.asarray(call(embed, ids)))
    np.testing.assert_array_equal(missing, np.isnan(np.asarray(nnx.Embed(V, D, rngs=nnx.Rngs(0))(ids))))
    assert missing[1].all() and not missing[[0, 2]].any()


@pytest.mark.parametrize("name", ["w8", "w4 groups", "quest", "quest weights"])
def test_the_head_multiplies_by_the_same_table(name, key):
    recipe, embed = WEIGHTS[name], layer(WEIGHTS[name])
    query = jax.random.normal(key, (2, 3, D))
    x = query if recipe.out.lhs is None else jax.jit(recipe.out.lhs)(query)
    wanted = np.asarray(x, np.float64) @ table_of(embed, recipe).T.astype(np.float64)
    for form in (embed, lb.convert(embed)):
        np.testing.assert_allclose(attend(form, query), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.uint16, jnp.int16, jnp.uint32])
def test_ids_of_any_integer_dtype(dtype):
    for embed in (nnx.Embed(300, D, rngs=nnx.Rngs(0)), layer(W8)):
        form = lb.convert(lb.quantize(embed, W8)) if type(embed) is nnx.Embed else embed
        ids = jnp.asarray([0, 5, 39])
        np.testing.assert_array_equal(call(form, ids.astype(dtype)), call(form, ids))
    beyond = jnp.full((2,), jnp.iinfo(dtype).max, dtype)
    assert jnp.all(jnp.isnan(call(lb.convert(layer(W8)), beyond))) and jnp.all(jnp.isnan(call(layer(W8), beyond)))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint32, jnp.int32])
def test_one_row_for_all_ids(dtype):
    packed = lb.convert(lb.quantize(nnx.Embed(1, D, rngs=nnx.Rngs(0)), W8))
    row = call(packed, jnp.zeros(1, jnp.int32))
    assert np.isfinite(row).all()
    np.testing.assert_array_equal(call(packed, jnp.asarray([0, 3], dtype)), jnp.concatenate([row, row]))


def test_a_row_does_not_depend_on_its_neighbors():
    """NVFP4 has a scale for the whole table."""
    recipe = WEIGHTS["nvfp4"]
    embed = layer(recipe)
    table = embed.embedding.get_value() * jnp.exp(2 * jax.random.normal(jax.random.key(1), (V, 1)))
    embed.embedding.set_value(table)
    wanted = table_of(embed, recipe)
    np.testing.assert_allclose(call(embed, jnp.asarray([3])), wanted[[3]], rtol=1e-6)
    np.testing.assert_allclose(call(embed, jnp.arange(V)), wanted, rtol=1e-6)


def test_kernels_read_no_tables():
    embed = layer(W4G)
    assert not isinstance(lb.convert(embed, layout="planes/1").embedding.get_value(), PlaneTensor)
    with pytest.raises(NotImplementedError, match="rows are read one by one"):
        lb.convert(embed, layout="planes/1", implementation="kernel")


def test_learned_scales_beside_a_table_are_calibrated():
    model = lb.quantize(Tied(nnx.Rngs(0)), rules=[("embed", W8), ("mlp", lb.methods.get("lsq", bits=4))])
    before = model.mlp.dot_general.lhs_scale.get_value()
    lb.calibrate(model, IDS)
    assert model.mlp.dot_general.lhs_scale.get_value() != before
    lb.calibrate(lb.quantize(Tied(nnx.Rngs(0)), lb.methods.get("lsq", bits=4)), IDS)  # its table in high precision


def test_a_lookup_unpacks_the_rows_it_reads_and_no_more():
    embed = lb.convert(lb.quantize(nnx.Embed(4096, 256, rngs=nnx.Rngs(0)), W4G))
    graph, state = nnx.split(embed)
    compiled = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids)).lower(state, IDS).compile()
    used = compiled.memory_analysis()
    assert used.argument_size_in_bytes < 4096 * 256 * 0.7
    assert used.temp_size_in_bytes < 64 * 1024


def test_gradients_of_both_uses_meet_in_the_table(key):
    """Straight-through: rows of the lookups plus g^T x of the head."""
    recipe = WEIGHTS["w8"]
    embed, query = layer(recipe), jax.random.normal(key, (5, D))
    g_rows, g_logits = jax.random.normal(key, (2, 3, D)), jax.random.normal(key, (5, V))

    def loss(embed):
        return jnp.sum(embed(IDS) * g_rows) + jnp.sum(embed.attend(query) * g_logits)

    got = nnx.jit(nnx.grad(loss))(embed).embedding.get_value()
    wanted = np.asarray(g_logits, np.float64).T @ np.asarray(query, np.float64)
    np.add.at(wanted, np.asarray(IDS), np.asarray(g_rows, np.float64))
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rows_have_the_dtype_of_the_layer_and_come_from_its_master(dtype):
    embed = layer(W8, dtype)
    rows = call(embed, IDS)
    assert rows.dtype == dtype
    np.testing.assert_array_equal(rows, table_of(embed, W8)[np.asarray(IDS)].astype(dtype))
    assert attend(embed, rows).dtype == dtype and attend(lb.convert(embed), rows).dtype == dtype


class TestRules:
    def test_methods_leave_embeddings_alone_unless_a_rule_names_them(self):
        model = Tied(nnx.Rngs(0))
        assert lb.explain(lb.quantize(model, lb.quest(4))).high_precision == ("embed (Embed)",)
        named = lb.quantize(model, lb.quest(4), rules=[("embed", W8)])
        assert {row.layer for row in lb.explain(named).rows if row.quantized} == {"embed", "mlp"}
        assert type(model.embed) is nnx.Embed  # a view

    def test_a_rule_for_what_is_around_one_does_not_take_it(self):
        model = nnx.Dict(decoder=Tied(nnx.Rngs(0)))
        quantized = lb.quantize(model, rules=[("decoder", lb.quest(4))])
        assert lb.explain(quantized).high_precision == ("decoder/embed (Embed)",)
        both = lb.quantize(model, rules=[("decoder/embed", W8), ("decoder", lb.quest(4))])
        assert not lb.explain(both).high_precision

    def test_a_rule_can_leave_it_out_or_have_no_effect(self):
        model = Tied(nnx.Rngs(0))
        everything = lb.quantize(model, rules=[("embed", None), (".*", lb.quest(4))])
        assert lb.explain(everything).high_precision == ("embed (Embed)",)
        with pytest.raises(ValueError, match="has no effect"):
            lb.quantize(model, rules=[("embed", None), ("embed", W8)])

    @pytest.mark.parametrize(
        ("recipe", "words"),
        [(lb.methods.get("lsq", bits=4), "learns its scales"), (lb.methods.get("absmax_integer", group=48), "48")],
    )
    def test_what_a_table_cannot_do_raises(self, recipe, words):
        with pytest.raises((NotImplementedError, ValueError), match=f"embed.*{words}"):
            lb.quantize(Tied(nnx.Rngs(0)), rules=[("embed", recipe)])
        with pytest.raises((NotImplementedError, ValueError), match=f"embed.*{words}"):
            lb.quantize(TiedLinen(), rules=[("embed", recipe)]).init(jax.random.key(0), IDS)

    def test_heads_that_read_the_table_themselves_raise_where_it_is_quantized(self, key):
        class Own(nnx.Module):
            def __init__(self, rngs):
                self.embed, self.mlp = nnx.Embed(V, D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)

            def __call__(self, ids):
                return self.mlp(self.embed(ids)) @ self.embed.embedding[...].T

        class OwnLinen(nn.Module):
            @nn.compact
            def __call__(self, ids):
                embed = nn.Embed(V, D)
                return jnp.einsum("btd,vd->btv", nn.Dense(D)(embed(ids)), embed.embedding)

        with pytest.raises(ValueError, match="multiplies by an `embedding` itself.*its `attend`"):
            lb.quantize(Own(nnx.Rngs(0)), rules=[("embed", W8)])
        with pytest.raises(ValueError, match="multiplies by an `embedding` itself.*its `attend`"):
            lb.quantize(OwnLinen(), rules=[("Embed_0", W8)]).init(key, IDS)
        lb.quantize(Own(nnx.Rngs(0)), lb.quest(4))  # whose table stays as it is
        lb.quantize(OwnLinen(), lb.quest(4)).init(key, IDS)

    def test_subclasses_and_repeated_quantization_raise(self):
        class Scaled(nnx.Embed):
            def __call__(self, ids):
                return super().__call__(ids) * 8

        with pytest.raises(NotImplementedError, match="class of its own"):
            lb.quantize(Scaled(V, D, rngs=nnx.Rngs(0)), W8)
        with pytest.raises(ValueError, match="quantized already"):
            lb.quantize(layer(W8), W8)
        with pytest.raises(ValueError, match="packed already"):
            lb.convert(lb.convert(layer(W8)))


RULES = [("embed", W4G)]


class TestNnx:
    @pytest.fixture
    def model(self):
        return lb.quantize(Tied(nnx.Rngs(0)), lb.quest(4), rules=RULES)

    def test_trains_and_packs_and_equals(self, model):
        optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=nnx.Param)
        targets = (IDS + 1) % V

        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(IDS), targets).mean()

        @nnx.jit
        def step(model, optimizer):
            value, grads = nnx.value_and_grad(loss)(model)
            optimizer.update(model, grads)
            return value

        with jax.numpy_dtype_promotion("standard"):  # which optax wants
            losses = [float(step(model, optimizer)) for _ in range(30)]
        assert losses[-1] < 0.5 * losses[0]
        np.testing.assert_allclose(call(lb.convert(model), IDS), call(model, IDS), rtol=1e-4, atol=1e-4)

    def test_state_clones_and_files(self, model, tmp_path):
        plain = Tied(nnx.Rngs(0))
        assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(plain))
        for twin in (nnx.clone(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            np.testing.assert_array_equal(call(twin, IDS), call(model, IDS))
        packed = lb.convert(model)
        graph, state = nnx.split(packed)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "packed", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "packed", nnx.eval_shape(lambda: state))
        np.testing.assert_array_equal(call(nnx.merge(graph, restored), IDS), call(packed, IDS))

    def test_stacked_tables_under_vmap(self):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Embed(V, D, rngs=rngs)

        tables = lb.quantize(make(nnx.Rngs(0)), W4G)
        run = nnx.jit(nnx.vmap(lambda table, ids: table(ids), in_axes=(0, None)))
        packed = lb.convert(tables)
        assert packed.embedding.get_value().shape == (3, V, D)
        np.testing.assert_allclose(run(packed, IDS), run(tables, IDS), rtol=1e-6)

    def test_explain_shows_the_program(self, model):
        table = lb.explain(model, IDS)
        assert not table.missing and not table.others
        ran = {row.ran for row in table.rows if row.layer == "embed" and row.product == "out"}
        assert ran == {"dot f32 x f32 -> f32"}
        alone = lb.explain(layer(W8), IDS)
        assert {row.ran for row in alone.rows if row.product == "out"} == {"rows"}

    def test_other_views_leave_it_right(self, model):
        expected = np.asarray(call(model, IDS))
        np.testing.assert_allclose(call(lb.nn.prepare(model), IDS), expected, atol=1e-5)
        np.testing.assert_allclose(call(lb.nn.keep_codes(model), IDS), expected, atol=1e-5)


class TestLinen:
    @pytest.fixture
    def model(self):
        return lb.quantize(TiedLinen(), lb.quest(4), rules=RULES)

    @pytest.fixture
    def variables(self, model, key):
        return jax.jit(model.init)(key, IDS)

    def test_equals_nnx_and_its_packed_form(self, model, variables):
        twin = Tied(nnx.Rngs(0))
        twin.embed.embedding.set_value(variables["params"]["embed"]["embedding"])
        twin.mlp.kernel.set_value(variables["params"]["mlp"]["kernel"])
        twin.mlp.bias.set_value(variables["params"]["mlp"]["bias"])
        expected = call(lb.quantize(twin, lb.quest(4), rules=RULES), IDS)
        got = jax.jit(model.apply)(variables, IDS)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        _, packed = lb.convert(model, variables, IDS)
        assert isinstance(packed["params"]["embed"]["embedding"], lb.QTensor)
        np.testing.assert_allclose(jax.jit(model.apply)(packed, IDS), got, rtol=1e-4, atol=1e-4)

    def test_the_tree_stays_and_files_hold_it(self, model, variables, key):
        plain = jax.eval_shape(TiedLinen().init, key, IDS)
        assert jax.tree.structure(plain) == jax.tree.structure(variables)
        _, packed = lb.convert(model, variables, IDS)
        again = serialization.from_bytes(packed, serialization.to_bytes(packed))
        run = jax.jit(model.apply)
        np.testing.assert_array_equal(run(again, IDS), run(packed, IDS))

    def test_alone_and_under_scan(self, key):
        embed = lb.quantize(nn.Embed(V, D), W8)
        variables = jax.jit(embed.init)(key, IDS)
        rows = jax.jit(embed.apply)(variables, IDS)
        wanted = jax.jit(W8.out.rhs)(variables["params"]["embedding"])[IDS]
        np.testing.assert_allclose(rows, wanted, rtol=1e-6)
        logits = embed.apply(variables, rows, method="attend")
        _, packed = lb.convert(embed, variables, IDS)
        np.testing.assert_allclose(embed.apply(packed, rows, method="attend"), logits, atol=1e-5)
        lowered = functools.partial(embed.apply, method=embed.attend)
        np.testing.assert_allclose(jax.jit(lowered)(packed, rows), logits, atol=1e-5)

    def test_compact_modules_and_explain(self, key):
        class Compact(nn.Module):
            @nn.compact
            def __call__(self, ids):
                return nn.Dense(4)(nn.Embed(V, D)(ids))

        model = lb.quantize(Compact(), lb.quest(4), rules=[("Embed_0", W4G)])
        variables = jax.jit(model.init)(key, IDS)
        table = lb.explain(model, variables, IDS)
        assert {row.layer for row in table.rows if row.quantized} == {"Embed_0", "Dense_0"} and not table.missing
        _, packed = lb.convert(model, variables, IDS)
        expected = jax.jit(model.apply)(variables, IDS)
        np.testing.assert_allclose(jax.jit(model.apply)(packed, IDS), expected, atol=1e-4)
        ready, prepared = lb.nn.prepare(model, variables, IDS)
        np.testing.assert_allclose(jax.jit(ready.apply)(prepared, IDS), expected, atol=1e-4)
