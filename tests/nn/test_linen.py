"""Linen layers and models: what is computed however it is called, what stays, what is refused."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lowbit_jax as lb
from tests.nn.reference import INT4, assert_sums_equal, fake_int4


@pytest.fixture
def x(key):
    return jax.random.normal(key, (5, 32)) * jnp.exp(jnp.arange(5.0) / 3)[:, None]


def kernel_of(variables, *path):
    params = variables["params"]
    for name in path:
        params = params[name]
    return np.asarray(params["kernel"])


def check_dense(y, x, kernel):
    assert_sums_equal(y, fake_int4(x, -1), fake_int4(kernel, 0))


@pytest.mark.parametrize(
    "layer, shape, kernel_shape",
    [
        (nn.Dense(8, use_bias=False), (5, 32), (32, 8)),
        (nn.DenseGeneral((2, 3), axis=(-2, -1), use_bias=False), (5, 4, 8), (32, 6)),
        (nn.Einsum((32, 8), "...k,kn->...n", use_bias=False), (5, 32), (32, 8)),
        (nn.Conv(4, (1,), use_bias=False), (1, 5, 32), (32, 4)),
    ],
)
def test_layers_against_numpy(layer, shape, kernel_shape, x, key):
    quantized = lb.quantize(layer, INT4)
    variables = jax.jit(layer.init)(key, x.reshape(shape))
    y = jax.jit(quantized.apply)(variables, x.reshape(shape))
    check_dense(y.reshape(5, -1), x, kernel_of(variables).reshape(kernel_shape))


def test_einsum_keeps_its_bias(x, key):
    layer = nn.Einsum((32, 8), "bk,kn->bn", bias_init=nn.initializers.normal())
    variables = jax.jit(layer.init)(key, x)
    y = jax.jit(lb.quantize(layer, INT4).apply)(variables, x) - variables["params"]["bias"][None]
    check_dense(y, x, kernel_of(variables))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        h = nn.MultiHeadDotProductAttention(2, name="attention")(h[None])[0]
        return x + nn.Dense(32, name="out")(h), None


class Model(nn.Module):
    """Submodules from setup, from a compact method, from a field; scanned, rematerialized, jitted."""

    last: nn.Module = nn.Dense(6)

    def setup(self):
        self.first = nn.Dense(32)
        self.blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
        self.jitted = nn.jit(nn.Dense)(32)
        self.towers = [nn.Dense(4), nn.Dense(4)]

    def encode(self, x):
        return self.jitted(self.blocks(self.first(x), None)[0])

    def __call__(self, x):
        x = self.encode(x)
        return self.last(x), [tower(x) for tower in self.towers]


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Model().init)(jax.random.key(1), jnp.ones((5, 32)))


def test_initial_values_and_structure_stay(variables):
    ours = jax.jit(lb.quantize(Model(), INT4).init)(jax.random.key(1), jnp.ones((5, 32)))
    jax.tree.map(np.testing.assert_array_equal, ours, variables)


def test_however_a_layer_is_called(x, variables):
    """The same first layer through the model, a method by name or function, a lambda, and as a submodule of its own."""
    model = lb.quantize(Model(), INT4)
    first = lambda m, x: m.first(x)
    bias = variables["params"]["first"]["bias"][None]
    direct = model.bind(variables).first(x)
    check_dense(direct - bias, x, kernel_of(variables, "first"))
    np.testing.assert_array_equal(model.apply(variables, x, method=first), direct)
    encoded = model.apply(variables, x, method="encode")
    for method in (Model.encode, lambda m, x: m.encode(x), lambda m, x: m.jitted(m.blocks(m.first(x), None)[0])):
        np.testing.assert_allclose(model.apply(variables, x, method=method), encoded, rtol=1e-6)
    bound = model.bind(variables)
    np.testing.assert_array_equal(bound.last(encoded), model.apply(variables, x)[0])
    np.testing.assert_array_equal(bound.towers[1](encoded), model.apply(variables, x)[1][1])
    check_dense(bound.last(x) - variables["params"]["last"]["bias"][None], x, kernel_of(variables, "last"))


def test_every_layer_is_met_once_in_the_table(x):
    layers = {row.layer for row in lb.explain(lb.quantize(Model(), INT4), x).rows}
    attention = {f"blocks/attention/{name}" for name in ("query", "key", "value", "out")}
    assert layers == attention | {"first", "blocks/out", "jitted", "last", "towers_0", "towers_1"}


def test_the_original_and_what_jit_kept_of_it_stay(x, variables):
    """nn.jit keeps traces by module; those of quantized and plain runs must not be taken for one another."""
    plain, quantized = Model(), lb.quantize(Model(), INT4)
    before, first = plain.apply(variables, x)[0], quantized.apply(variables, x)[0]
    np.testing.assert_array_equal(plain.apply(variables, x)[0], before)
    np.testing.assert_array_equal(quantized.apply(variables, x)[0], first)
    jitted = lb.quantize(Model(), rules=[("jitted", INT4)]).apply(variables, x)[0]
    assert not np.allclose(before, first, atol=1e-3) and not np.allclose(before, jitted, atol=1e-3)


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_lifted_layers(lift, x, key):
    layer = lb.quantize(lift(nn.Dense)(8, use_bias=False), INT4)
    variables = jax.jit(layer.init)(key, x)
    check_dense(jax.jit(layer.apply)(variables, x), x, kernel_of(variables))
    check_dense(layer.apply(variables, x, method=lift(nn.Dense).__call__), x, kernel_of(variables))


def test_vmapped_layers(x, key):
    options = dict(variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=3)
    layer = lb.quantize(nn.vmap(nn.Dense, **options)(8, use_bias=False), INT4)
    variables = jax.jit(layer.init)(key, x)
    y = jax.jit(layer.apply)(variables, x)
    for i in range(3):
        check_dense(y[i], x, kernel_of(variables)[i])


def test_quantized_layers_inside_a_plain_model(x, key):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lb.quantize(nn.Dense(8, use_bias=False), INT4)(nn.Dense(32, use_bias=False)(x))

    class Inner(nn.Module):
        def setup(self):
            self.a = lb.quantize(nn.Dense(8, use_bias=False), INT4)

        def __call__(self, x):
            return self.a(x)

    variables = jax.jit(Outer().init)(key, x)
    assert set(variables["params"]) == {"Dense_0", "Dense_1"}
    hidden = x @ variables["params"]["Dense_1"]["kernel"]
    check_dense(jax.jit(Outer().apply)(variables, x), np.asarray(hidden), kernel_of(variables, "Dense_0"))
    variables = jax.jit(Inner().init)(key, x)
    check_dense(jax.jit(Inner().apply)(variables, x), x, kernel_of(variables, "a"))
    with pytest.raises(ValueError, match="'a' was quantized before"):
        lb.quantize(Inner()).init(key, x)
    outer = lb.quantize(Inner(), rules=[("a", None)])
    check_dense(outer.apply(variables, x), x, kernel_of(variables, "a"))


def test_modules_compare_copy_and_pickle_like_any_other(x, key):
    layer = nn.Dense(8, kernel_init=nn.initializers.ones)
    quantized = lb.quantize(layer)
    assert isinstance(quantized, nn.Dense) and type(quantized).__name__ == "Dense" and repr(quantized) == repr(layer)
    assert quantized == lb.quantize(layer) and hash(quantized) == hash(lb.quantize(layer))
    assert quantized != layer and quantized != lb.quantize(layer, lb.quest(3))
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), quantized.clone(), quantized.copy()):
        assert other == quantized
    count = []

    @jax.jit
    def run(variables, x):
        count.append(1)
        return quantized.apply(variables, x)

    variables = jax.jit(quantized.init)(key, x)
    run(variables, x), run(variables, x)
    assert len(count) == 1


def test_bfloat16_layers_fit_the_float32_master(key):
    recipe = lb.LinearRecipe(out=lb.Gemm(rhs=INT4.out.rhs))
    layer = lb.quantize(nn.Dense(8, dtype=jnp.bfloat16, use_bias=False), recipe)
    variables = jax.jit(layer.init)(key, jnp.eye(32))
    expected = fake_int4(kernel_of(variables), 0).astype(jnp.bfloat16)
    np.testing.assert_array_equal(layer.apply(variables, jnp.eye(32)), expected)
    rounded_first = fake_int4(kernel_of(variables).astype(jnp.bfloat16), 0).astype(jnp.bfloat16)
    assert np.any(expected != rounded_first)


def test_sharding_metadata_stays(x, key):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer = nn.Dense(8, kernel_init=init)
    variables = lb.quantize(layer).init(key, x)
    assert nn.get_partition_spec(variables) == nn.get_partition_spec(layer.init(key, x))
    packed, words = lb.convert(lb.quantize(layer), variables)
    np.testing.assert_allclose(packed.apply(words, x), lb.quantize(layer).apply(variables, x), rtol=1e-5)


def test_stochastic_rounding_draws_from_its_stream(x, key):
    quantizer = dataclasses.replace(lb.quest_quantizer(4), rounding=lb.rounding.stochastic)
    layer = lb.quantize(nn.Dense(8), lb.LinearRecipe(out=lb.Gemm(lhs=quantizer, rhs=quantizer)))
    variables = jax.jit(layer.init)(key, x)
    draw = lambda seed: np.asarray(layer.apply(variables, x, rngs={"quantize": jax.random.key(seed)}))
    assert np.array_equal(draw(0), draw(0)) and not np.array_equal(draw(0), draw(1))
    with pytest.raises(Exception, match='needs PRNG for "quantize"'):
        layer.apply(variables, x)


def test_a_method_without_parameters_runs(x):
    class Shifted(nn.Module):
        def setup(self):
            self.layer = nn.Dense(8)

        def shift(self, x):
            return x + 1

        def __call__(self, x):
            return self.layer(self.shift(x))

    np.testing.assert_array_equal(lb.quantize(Shifted()).apply({}, x, method="shift"), x + 1)


class Custom(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (32, 32))
        return nn.LayerNorm(name="norm")(nn.Dense(4, name="dense")(x @ w))


class Around(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("weight", self.kernel_init, (x.shape[-1], self.features))


class Adding(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return nn.relu(super().__call__(x))


class Magnitudes(nn.Dense):
    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return abs(value) if name == "kernel" else value


class Twice(nn.Dense):
    def back(self, h):
        return h @ self.variables["params"]["kernel"].T


def test_subclasses_may_add_but_not_go_around(x, key):
    adding = lb.quantize(Adding(8, use_bias=False), INT4)
    variables = jax.jit(adding.init)(key, x)
    product = fake_int4(x, 1) @ fake_int4(kernel_of(variables), 0)
    np.testing.assert_allclose(
        adding.apply(variables, x), np.maximum(product, 0), rtol=0, atol=32 * 2.0**-22 * np.abs(product).max()
    )
    with pytest.raises(ValueError, match="this Around never called Dense.__call__"):
        lb.quantize(Around(8)).init(key, x)
    with pytest.raises(ValueError, match="Magnitudes.param decides what the layer receives for its `kernel`"):
        lb.quantize(Magnitudes(8)).init(key, x)
    with pytest.raises(ValueError, match="Twice.back uses `kernel` itself"):
        lb.quantize(Twice(8)).init(key, x)


@pytest.mark.parametrize(
    "rules, words",
    [
        ([("dence", INT4)], "'dence' matches nothing.*'dense'"),
        ([("norm", INT4)], "norm is a LayerNorm"),
        ([("", INT4)], "the model is a Custom with its own w.*or drop it"),
        ([("dense", INT4), ("dense", None)], "has no effect"),
        ([(".*", None)], "no layer left to quantize"),
    ],
)
def test_rules_are_checked_when_the_model_is_traced(rules, words, x, key):
    model = lb.quantize(Custom(), rules=rules)
    with pytest.raises(ValueError, match=words):
        model.init(key, x)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(model.apply, Custom().init(key, x), x)


def test_a_catch_all_reaches_layers_past_code_of_its_own(x):
    found = lb.explain(lb.quantize(Custom(), rules=[(".*", INT4)]), x)
    assert {row.layer for row in found.rows} == {"dense"} and found.own_code == ("the module (Custom)",)


def test_a_rule_for_what_another_method_runs_is_no_error(x, variables):
    model = lb.quantize(Model(), rules=[("last", INT4), ("first", INT4)])
    encoded = model.apply(variables, x, method="encode")  # does not reach `last`, which the parameters name
    assert np.isfinite(encoded).all()


@pytest.mark.parametrize(
    "layer, error, words",
    [
        (nn.Dense(8, dot_general=lambda *a, **k: 0), ValueError, "this Dense has a dot_general of its own"),
        (nn.Dense(8, dot_general_cls=object), ValueError, "dot_general_cls of its own"),
        (nn.Dense(8, promote_dtype=lambda *a, dtype: a), ValueError, "promote_dtype of its own"),
        (nn.LayerNorm(), ValueError, "this LayerNorm has no layer left to quantize"),
    ],
)
def test_refused(layer, error, words, x, key):
    with pytest.raises(error, match=words):
        lb.quantize(layer).init(key, x)


def test_refused_at_once(x, key):
    with pytest.raises(ValueError, match="this Dense is quantized already"):
        lb.quantize(lb.quantize(nn.Dense(8)))
    with pytest.raises(TypeError, match="Build the module first"):
        lb.quantize(nn.Dense)
    with pytest.raises(TypeError, match="rngs={'quantize': key}"):
        lb.quantize(nn.Dense(8), rngs=key)
    with pytest.raises(ValueError, match=r"this Dense, weight float32\[32, 8\]: Group\(24\)"):
        lb.quantize(nn.Dense(8), lb.methods.get("absmax_integer", bits=4, group=24)).init(key, x)
    mask = jnp.ones((3, 32, 4))
    with pytest.raises(NotImplementedError, match="has a mask"):
        lb.quantize(nn.Conv(4, (3,), mask=mask)).init(key, x[None])
