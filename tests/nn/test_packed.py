"""Packed and prepared models compute what the training form computes, stacked or not, and survive a checkpoint."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx, serialization

import lowbit_jax as lb
from lowbit_jax.nn.nnx import PackedWeight

RECIPES = {
    "quest W4A4": lb.quest(4),
    "quest W3A16": lb.quest(3, activations=False),
    "lsq W2A2": lb.methods.get("lsq", bits=2),
    "int4": lb.methods.get("absmax_integer", bits=4, group=16),
}


BIAS = {"bias_init": jax.nn.initializers.normal(0.1)}  # or sums of odd halves are 0, a decision point of such a grid


class Stack(nnx.Module):
    """Three layers scanned, a convolution, an einsum, an attention projection and a head in high precision."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(32, 32, (3,), **BIAS, rngs=rngs)
        self.mix = nnx.Einsum("bth,nhd->btnd", (2, 32, 16), (2, 16), **BIAS, rngs=rngs)
        self.merge = nnx.LinearGeneral((2, 16), 32, axis=(-2, -1), **BIAS, rngs=rngs)
        self.layers = nnx.vmap(lambda rngs: nnx.Linear(32, 32, **BIAS, rngs=rngs))(rngs.split(3))
        self.head = nnx.Linear(32, 5, rngs=rngs)

    def __call__(self, x):
        x = self.merge(self.mix(self.conv(x)))
        step = lambda x, layer: jnp.tanh(layer(x))
        return self.head(nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers))


class LinenStack(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(32, (3,), **BIAS)(x)
        x = linen.Einsum((2, 32, 16), "bth,nhd->btnd", **BIAS)(x)
        x = linen.DenseGeneral(32, axis=(-2, -1), **BIAS)(x)
        scanned = linen.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return linen.Dense(5, name="head")(scanned(name="layers")(x, None)[0])


class Step(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return jnp.tanh(linen.Dense(32, **BIAS)(x)), None


HEAD = [("head", None)]
LINEN_RECIPES = ["quest W3A16", "lsq W2A2"]
run = nnx.jit(lambda model, x: model(x))


@pytest.fixture(scope="module")
def stack():
    return nnx.jit(lambda: Stack(nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def linen_variables():
    """By recipe: learned scales are among them."""
    make = lambda recipe: jax.jit(lb.quantize(LinenStack(), recipe, rules=HEAD).init)
    return functools.cache(lambda name: make(RECIPES[name])(jax.random.key(0), jnp.ones((2, 6, 32))))


@pytest.fixture
def x(key):
    return jax.random.normal(key, (2, 6, 32))


def assert_close(actual, expected):
    """Same values in another order of sums: five layers of at most 96 terms, no layer growing more than fourfold."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=96 * 2.0**-23 * 4 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("name", RECIPES)
def test_nnx_packed_equals_training_form(name, stack, x):
    model = lb.quantize(stack, RECIPES[name], rules=HEAD)
    packed = lb.convert(model)
    assert_close(run(packed, x), run(model, x))
    bits = RECIPES[name].out.rhs.format.bits
    for layer, size in ((packed.layers, 3 * 32 * 32), (packed.conv, 3 * 32 * 32), (packed.mix, 2 * 32 * 16)):
        value = layer.kernel.get_value()
        assert isinstance(value, lb.QTensor)
        assert value.words.dtype == jnp.uint8 and value.words.size == size * bits // 8
    assert packed.layers.kernel.get_value().shape == (3, 32, 32)
    assert packed.head.kernel is model.head.kernel
    assert isinstance(model.conv.kernel.get_value(), jax.Array)  # the training form is untouched


@pytest.mark.parametrize("name", LINEN_RECIPES)
def test_linen_packed_equals_training_form(name, x, linen_variables):
    model, variables = lb.quantize(LinenStack(), RECIPES[name], rules=HEAD), linen_variables(name)
    packed, words = lb.convert(model, variables, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert_close(jax.jit(packed.apply)(words, x), jax.jit(model.apply)(variables, x))
    kernel = words["params"]["layers"]["Dense_0"]["kernel"]
    assert isinstance(kernel, lb.QTensor) and kernel.shape == (3, 32, 32)
    assert isinstance(variables["params"]["layers"]["Dense_0"]["kernel"], jax.Array)


def assert_gradients_close(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", ["quest W4A4", "lsq W2A2"])
def test_nnx_preparing_changes_neither_value_nor_gradient(name, stack, x):
    """Two microbatches with weights quantized once, against weights quantized for each."""
    model = lb.quantize(stack, RECIPES[name], rules=HEAD)

    def loss(model, prepare):
        model = prepare(model)
        return (jnp.mean(model(x[:1]) ** 2) + jnp.mean(model(x[1:]) ** 2)) / 2

    @nnx.jit
    def both(model):
        gradient = nnx.value_and_grad(loss)
        return gradient(model, lb.nn.prepare), gradient(model, lambda model: model)

    (value, ours), (expected, theirs) = both(model)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_gradients_close(ours, theirs)


def test_a_prepared_model_lies_where_its_weights_lay():
    """By the partition specs of its own state: the scales, of another shape, are on every device."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    cut = lambda *names: nnx.with_partitioning(jax.nn.initializers.normal(), names)
    with jax.set_mesh(mesh):
        rngs = nnx.Rngs(0)
        layers = nnx.List([
            nnx.Linear(64, 128, kernel_init=cut("data", "model"), rngs=rngs),
            nnx.LinearGeneral((4, 32), 64, axis=(-2, -1), kernel_init=cut("model", None, None), rngs=rngs),
        ])  # fmt: skip
        graph, state = nnx.split(lb.nn.prepare(lb.quantize(layers, lb.quest(4))))
        placed = jax.tree.map(
            lambda spec: jax.sharding.NamedSharding(mesh, spec), nnx.get_partition_spec(state),
            is_leaf=lambda spec: isinstance(spec, jax.sharding.PartitionSpec),
        )  # fmt: skip
        layers = nnx.merge(graph, jax.device_put(state, placed))
    values = layers[0].kernel.get_value().values
    assert values.sharding.spec == jax.sharding.PartitionSpec("data", "model")
    assert layers[0](jnp.ones((2, 64))).shape == (2, 128) and layers[1](jnp.ones((2, 4, 32))).shape == (2, 64)


@pytest.mark.parametrize("name", LINEN_RECIPES)
def test_linen_preparing_changes_no_gradient(name, x, linen_variables):
    model, variables = lb.quantize(LinenStack(), RECIPES[name], rules=HEAD), linen_variables(name)

    def prepared(variables):
        ready, weights = lb.nn.prepare(model, variables, x)
        return jnp.mean(ready.apply(weights, x) ** 2)

    plain = lambda variables: jnp.mean(model.apply(variables, x) ** 2)
    assert_gradients_close(*jax.jit(lambda v: (jax.grad(prepared)(v), jax.grad(plain)(v)))(variables))


@pytest.mark.parametrize("transformation", [optax.sgd(0.1), optax.adamw(1e-3)], ids=["sgd", "adamw"])
def test_the_gradient_of_a_prepared_model_is_none_of_the_model(transformation, x):
    """It belongs to the rotated weights (its cosine with the model's own is about 0), and no optimizer takes it."""
    model = lb.quantize(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), lb.quest(4))
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    gradient = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(lb.nn.prepare(model))
    before = np.asarray(model.kernel[...])
    with pytest.raises((TypeError, ValueError), match="PreparedKernel|lb.nn.prepare: this gradient"):
        optimizer.update(model, gradient)
    np.testing.assert_array_equal(model.kernel[...], before)

    dense = lb.quantize(linen.Dense(8), lb.quest(4))
    variables = dense.init(jax.random.key(0), x)
    ready, prepared = lb.nn.prepare(dense, variables, x)
    gradient = jax.grad(lambda v: jnp.mean(ready.apply(v, x) ** 2))(prepared)
    with pytest.raises(ValueError, match="is of a model that is not prepared"):
        dense.apply(prepared, x)
    state = transformation.init(variables)
    with pytest.raises((TypeError, ValueError), match="PreparedKernel|lb.nn.prepare: this gradient"):
        updates, _ = transformation.update(gradient, state, variables)
        optax.apply_updates(variables, updates)


def test_nnx_packed_checkpoint_round_trip(tmp_path, stack, x):
    packed = lb.convert(lb.quantize(stack, rules=HEAD))
    graph, state = nnx.split(packed)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "packed", state)
    empty = nnx.eval_shape(lambda: lb.convert(lb.quantize(Stack(nnx.Rngs(1)), rules=HEAD)))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "packed", nnx.state(empty))
    np.testing.assert_array_equal(run(nnx.merge(graph, restored), x), run(packed, x))


@pytest.mark.parametrize("layout", ["bitstream-le/1", "planes/1"])
def test_packed_checkpoints_do_not_become_weights_of_another_meaning(tmp_path, layout):
    """Their arrays have the same shapes, but for the seal."""
    linear = nnx.Linear(256, 64, rngs=nnx.Rngs(0))
    packed = lambda recipe: lb.convert(lb.quantize(linear, recipe), layout=layout)
    written, x = packed(lb.quest(4)), jnp.ones((2, 256))
    with ocp.StandardCheckpointer() as store:
        store.save(tmp_path / "c", nnx.state(written))
    others = {"signs": lb.quest(4, signs=0), "block": lb.quest(4, block=64),
              "int4": lb.methods.get("absmax_integer", bits=4)}  # fmt: skip
    shapes = lambda model: [a.shape for a in jax.tree.leaves(model.kernel.get_value().unsealed())]
    for recipe in others.values():
        graph, state = nnx.split(packed(recipe))
        assert shapes(written) == shapes(nnx.merge(graph, state))
        with ocp.StandardCheckpointer() as store, pytest.raises(ValueError, match="shape"):
            store.restore(tmp_path / "c", state)
        leaves = jax.tree.leaves(nnx.state(written))  # however they come into the other model
        mixed = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))
        for use in (lambda m=mixed: run(m, x), mixed.kernel.get_value().validate):
            with pytest.raises(ValueError, match="is not that of what it is read as.*lb.convert makes of the recipe"):
                use()


def test_packed_checkpoints_from_before_there_were_seals(tmp_path):
    packed = lb.convert(lb.quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), lb.quest(4)))
    is_packed = lambda leaf: isinstance(leaf, lb.QTensor)
    unsealed = lambda state: jax.tree.map(
        lambda leaf: leaf.unsealed() if is_packed(leaf) else leaf, state, is_leaf=is_packed
    )
    graph, state = nnx.split(packed)
    with ocp.StandardCheckpointer() as store:
        kernel = packed.kernel.get_value()
        arrays = {"value": {"words": kernel.words, "scales": list(kernel.scales), "marks": None}}
        store.save(tmp_path / "old", {"kernel": arrays, "bias": {"value": packed.bias.get_value()}})
    with ocp.StandardCheckpointer() as store:
        restored = store.restore(tmp_path / "old", unsealed(state))
        with pytest.raises(ValueError, match="seal"):
            store.restore(tmp_path / "old", state)
    np.testing.assert_array_equal(run(nnx.merge(graph, restored), jnp.ones((2, 64))), run(packed, jnp.ones((2, 64))))


def test_linen_packed_checkpoint_round_trip(tmp_path, x, linen_variables):
    model = lb.quantize(LinenStack(), RECIPES["lsq W2A2"], rules=HEAD)
    packed, words = lb.convert(model, linen_variables("lsq W2A2"), x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "packed", words)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "packed", jax.tree.map(ocp.utils.to_shape_dtype_struct, words))
    apply = jax.jit(packed.apply)
    np.testing.assert_array_equal(apply(restored, x), apply(words, x))


@pytest.mark.parametrize("layout", ["bitstream-le/1", "planes/1"])
def test_a_packed_model_whose_floats_were_cast_says_so(layout):
    linear = nnx.Linear(64, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    packed = lb.convert(lb.quantize(linear, lb.quest(4)), layout=layout)
    graph, state = nnx.split(packed)
    cast = lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a
    with pytest.raises(ValueError, match="scales are bfloat16, and float32 stores float32"):
        run(nnx.merge(graph, jax.tree.map(cast, state)), jnp.ones((2, 64)))
    is_packed = lambda leaf: isinstance(leaf, lb.QTensor)
    beside = jax.tree.map(lambda a: a if is_packed(a) else cast(a), state, is_leaf=is_packed)
    assert nnx.merge(graph, beside).bias.dtype == jnp.bfloat16
    run(nnx.merge(graph, beside), jnp.ones((2, 64)))


def test_a_packed_kernel_in_plain_code_says_so():
    packed, x = lb.convert(lb.quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), lb.quest(4))), jnp.ones((2, 64))
    for use in (lambda: x @ packed.kernel, lambda: packed.kernel * 2, lambda: np.asarray(packed.kernel[...]),
                lambda: jnp.linalg.norm(packed.kernel[...]), lambda: jnp.asarray(packed.kernel)):  # fmt: skip
        with pytest.raises(TypeError, match="is packed, not an array"):
            use()


def test_packed_variables_in_flax_serialization(key):
    x = jax.random.normal(key, (2, 64))
    packed_by = lambda recipe, layout: lb.convert(lb.quantize(linen.Dense(8), recipe), kernel, x, layout=layout)
    kernel = linen.Dense(8).init(key, x)
    for layout in ("bitstream-le/1", "planes/1"):
        packed, words = packed_by(lb.quest(4), layout)
        data = serialization.to_bytes(words)
        restored = serialization.from_bytes(jax.tree.map(jnp.zeros_like, words), data)
        assert type(restored["params"]["kernel"]) is type(words["params"]["kernel"])
        np.testing.assert_array_equal(packed.apply(restored, x), packed.apply(words, x))
        with pytest.raises(ValueError, match="holds the format midrise4, the template has midrise3"):
            serialization.from_bytes(packed_by(lb.quest(3), layout)[1], data)
        with pytest.raises(ValueError, match=r"holds the shape float32\[64, 8\], the template has float32\[32, 8\]"):
            half = lb.convert(lb.quantize(linen.Dense(8)), linen.Dense(8).init(key, x[:, :32]), layout=layout)[1]
            serialization.from_bytes(half, data)
        with pytest.raises(ValueError, match="holds no packed weight there"):
            serialization.from_bytes(words, serialization.to_bytes(kernel))
    with pytest.raises(ValueError, match="holds the layout planes/1, the template has bitstream-le/1"):
        serialization.from_bytes(packed_by(lb.quest(4), "bitstream-le/1")[1], data)
    damaged = serialization.to_state_dict(words)
    damaged["params"]["kernel"]["sums"] = damaged["params"]["kernel"]["sums"][1:]
    with pytest.raises(ValueError, match=r"holds sums of int32\[7\], the template has int32\[8\]"):
        serialization.from_state_dict(words, damaged)


def test_kernels_of_layers_that_are_not_quantized_stay(key):
    class Mixed(linen.Module):
        @linen.compact
        def __call__(self, *, x):
            cell = linen.OptimizedLSTMCell(8)
            _, x = cell(cell.initialize_carry(key, x[:, 0].shape), linen.Dense(32)(x)[:, 0])
            return linen.ConvTranspose(4, (3,))(x[:, None])

    x = jax.random.normal(key, (2, 3, 32))
    model = lb.quantize(Mixed())
    variables = jax.jit(model.init)(key, x=x)
    packed, words = lb.convert(model, variables, x=jax.ShapeDtypeStruct(x.shape, x.dtype))
    np.testing.assert_allclose(packed.apply(words, x=x), model.apply(variables, x=x), rtol=0, atol=1e-5)
    kinds = {name: type(layer["kernel"]) for name, layer in words["params"].items() if "kernel" in layer}
    assert kinds["Dense_0"] is lb.QTensor and kinds["ConvTranspose_0"] is not lb.QTensor


def test_shapes_of_variables_are_packed_as_shapes(key):
    model, x = lb.quantize(linen.Dense(8), lb.methods.get("lsq", bits=4)), jnp.ones((2, 32))
    variables = jax.eval_shape(model.init, key, x)
    words = lb.convert(model, variables, x)[1]
    assert words["params"]["kernel"].words == jax.ShapeDtypeStruct((8, 16), jnp.uint8)


@pytest.mark.parametrize("layout", ["bitstream-le/1", "planes/1"])
def test_packed_models_print(layout):
    packed = lb.convert(lb.quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0))), layout=layout)
    assert "PackedWeight" in str(packed) and "midrise4" in str(nnx.state(packed))


def test_bfloat16_layers(key):
    """bfloat16 products of the same operands: one rounding of the result apart at most."""
    layer = lb.quantize(nnx.Linear(64, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    x = jax.random.normal(key, (4, 64), jnp.bfloat16)
    packed = lb.convert(layer)(x)
    assert packed.dtype == jnp.bfloat16
    scale = float(jnp.abs(layer(x)).max())
    np.testing.assert_allclose(packed.astype(jnp.float32), layer(x).astype(jnp.float32), rtol=0, atol=2.0**-7 * scale)


def test_stochastic_rounding_becomes_nearest(key):
    quantizer = dataclasses.replace(lb.quest_quantizer(4), rounding=lb.rounding.stochastic)
    random = lb.LinearRecipe(out=lb.Gemm(lhs=quantizer, rhs=quantizer))
    layer, x = nnx.Linear(64, 8, rngs=nnx.Rngs(0)), jax.random.normal(key, (4, 64))
    packed = lb.convert(lb.quantize(layer, random, rngs=nnx.Rngs(0)))
    nearest = dataclasses.replace(lb.quest_quantizer(4))
    expected = lb.quantize(layer, lb.LinearRecipe(out=lb.Gemm(lhs=nearest, rhs=nearest)))
    np.testing.assert_allclose(packed(x), expected(x), rtol=0, atol=1e-5)


def test_what_cannot_be_converted_raises(key):
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Linear has no quantized layer.*Call lb.quantize first"):
        lb.convert(layer)
    with pytest.raises(ValueError, match="packed already"):
        lb.convert(lb.convert(lb.quantize(layer)))
    with pytest.raises(ValueError, match="prepared"):
        lb.convert(lb.nn.prepare(lb.quantize(layer)))
    with pytest.raises(TypeError, match="call lb.convert\\(model\\) alone"):
        lb.convert(lb.quantize(layer), {})
    with pytest.raises(TypeError, match="no Flax module"):
        lb.convert(jnp.ones(3))
    with pytest.raises(TypeError, match="read whole"):
        lb.convert(lb.quantize(layer)).kernel[0]


def test_what_cannot_be_converted_in_linen_raises(key, x):
    model = lb.quantize(LinenStack(), rules=HEAD)
    variables = jax.eval_shape(model.init, key, x)
    with pytest.raises(TypeError, match="Pass the inputs of one"):
        lb.convert(model, variables)
    with pytest.raises(TypeError, match="give the variables of model.init"):
        lb.convert(model, x)
    with pytest.raises(ValueError, match="LinenStack is not quantized"):
        lb.convert(LinenStack(), variables, x)
    dense = lb.quantize(linen.Dense(8))
    packed = lb.convert(dense, dense.init(key, x))  # a Dense shows its use by itself
    with pytest.raises(ValueError, match="packed already"):
        lb.convert(*packed)


def test_weights_that_layers_share_stay_one():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = (nnx.Linear(32, 32, **BIAS, rngs=rngs) for _ in range(2))
            self.c = nnx.Linear(32, 32, rngs=rngs)
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.c(self.b(jnp.tanh(self.a(x))))

    model = lb.quantize(Tied(nnx.Rngs(0)), lb.quest(4))
    packed = lb.convert(model)
    assert packed.a.kernel is packed.b.kernel and packed.c.kernel is not packed.a.kernel
    x = jax.random.normal(jax.random.key(1), (4, 32))
    assert_close(run(packed, x), run(model, x))


def test_what_lies_beside_packed_weights_can_be_trained():
    packed = lb.convert(lb.quantize(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), lb.quest(4)))
    beside = nnx.All(nnx.Param, nnx.Not(PackedWeight))
    optimizer = nnx.Optimizer(packed, optax.sgd(0.1), wrt=beside)
    before = packed.kernel.get_value()
    loss = lambda m: jnp.sum((m(jnp.ones((2, 32))) - 1) ** 2)
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, beside))(packed)
    old = float(loss(packed))
    optimizer.update(packed, grads)
    assert float(loss(packed)) < old
    jax.tree.map(np.testing.assert_array_equal, packed.kernel.get_value(), before)


@pytest.mark.parametrize("norm", [nnx.WeightNorm, nnx.SpectralNorm])
def test_weights_that_are_made_at_every_call(norm):
    normed = norm(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=f"this {norm.__name__} makes the weight of its layer at every call"):
        lb.convert(lb.quantize(normed, lb.quest(4)))
    with pytest.raises(ValueError, match=f"lb.nn.prepare: the layer 'layers/0' .{norm.__name__}. makes the weight"):
        lb.nn.prepare(lb.quantize(nnx.Sequential(normed), lb.quest(4)))
    model = lb.quantize(linen.WeightNorm(linen.Dense(16)), lb.quest(4))
    variables = model.init(jax.random.key(0), jnp.ones((2, 32)))
    with pytest.raises(ValueError, match="kernel/scale' belongs to a weight that a norm"):
        lb.convert(model, variables, jnp.ones((2, 32)))


def test_layers_stacked_on_another_axis_are_named():
    stack = nnx.vmap(lambda rngs: nnx.Linear(32, 16, rngs=rngs), out_axes=1)(nnx.Rngs(0).split(3))
    with pytest.raises(ValueError, match=r"^lb.quantize: the layer 'layers' \(Linear\), .*shape \(32, 3, 16\).*axis 0"):
        lb.quantize(nnx.Dict(layers=stack), lb.quest(4))

    class Stacked(linen.Module):
        @linen.compact
        def __call__(self, x):
            scanned = linen.scan(Step, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
            return scanned(name="layers")(x, None)[0]

    model = lb.quantize(Stacked(), lb.quest(4))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.ones((2, 32)))
    for verb, name in ((lb.convert, "lb.convert"), (lb.nn.prepare, "lb.nn.prepare")):
        told = rf"^{name}: the layer 'layers/Dense_0' \(Dense\): the stored weight has the shape \(32, 3, 32\).*axis 0"
        with pytest.raises(ValueError, match=told):
            verb(model, variables, jnp.ones((2, 32)))

    linear = lb.quantize(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), lb.quest(4))
    linear.kernel = nnx.Param(jnp.ones((32, 3, 16)))
    for verb, name in ((lb.convert, "lb.convert"), (lb.nn.prepare, "lb.nn.prepare")):
        with pytest.raises(ValueError, match=rf"^{name}: this Linear: .*shape \(32, 3, 16\).*axis 0"):
            verb(linear)


def test_the_bias_tells_the_axis_of_square_stacks():
    """Eight layers of eight features: the kernels have the same shape on both axes, the biases have not."""
    make = lambda axis: nnx.vmap(lambda rngs: nnx.Linear(8, 16, rngs=rngs), out_axes=axis)(nnx.Rngs(0).split(8))
    assert make(0).kernel.shape == make(1).kernel.shape
    quantized = lb.quantize(make(0), lb.quest(4))
    assert lb.convert(quantized).kernel.get_value().shape[0] == 8
    told = r"this Linear: the stored bias has the shape \(16, 8\), the configuration says \(16,\).*axis 0"
    with pytest.raises(ValueError, match=f"^lb.quantize: {told}"):
        lb.quantize(make(1), lb.quest(4))
    quantized.bias = make(1).bias
    for verb, name in ((lb.convert, "lb.convert"), (lb.nn.prepare, "lb.nn.prepare")):
        with pytest.raises(ValueError, match=f"^{name}: {told}"):
            verb(quantized)


def test_learned_scales_of_a_model_of_shapes():
    make = lambda: nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    outside = lb.quantize(nnx.eval_shape(make), lb.methods.get("lsq", bits=4))
    inside = nnx.eval_shape(lambda: lb.quantize(make(), lb.methods.get("lsq", bits=4)))
    shapes = lambda model: jax.tree.map(lambda a: (a.shape, a.dtype), nnx.state(model))
    assert shapes(outside) == shapes(inside)
