"""GPTQ against a transcription in float64, and what it spares in outputs of layers and models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import formats, scaling
from lowbit_jax.gptq import damped, gptq
from lowbit_jax.nn.nnx import Scale
from lowbit_jax.ops.plane_tensor import PlaneTensor

K, N = 96, 24
# One program for each, which compiles in a fraction of what its operations take one by one.
pack = jax.jit(lambda quantizer, w: quantizer.quantize(w, axis=0), static_argnums=0)
unpack = jax.jit(lambda packed: packed.dequantize())
chosen = jax.jit(gptq, static_argnums=0, static_argnames="axis")
QUANTIZERS = {
    "int4 groups": lb.Quantizer(format=formats.INT4, tiling=scaling.Group(32), scale_format=scaling.BFLOAT16),
    "uint3 zero points": lb.Quantizer(format=formats.UINT3, tiling=scaling.Group(48), zero_point=True),
    "nf4 tensor": lb.Quantizer(format=formats.NF4, tiling=scaling.PerTensor()),
    "quest 2": lb.quest_quantizer(2),
    "quest 4": lb.quest_quantizer(4),
    "mxfp4": lb.block_quantizer(formats.MXFP4),
}


def operands(seed=0):
    """A weight [K, N] and inputs whose features are of unlike sizes and go together."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((K, K)) * np.geomspace(1, 0.05, K)
    x = random.standard_normal((400, K)) @ mixing
    return x, random.standard_normal((K, N)).astype(np.float32)


def gram_of(x):
    return damped(jnp.asarray(x.T @ x, jnp.float32))


def transcribed(quantizer, w, x):
    """Frantar et al. 2022, algorithm 1 with a block of one, for each output by itself, in float64; in rotated space."""
    turned = lambda a: a if quantizer.rotation is None else np.asarray(quantizer.rotation.apply(jnp.asarray(a), 0))
    gram = np.asarray(gram_of(x), np.float64)
    gram = turned(turned(gram).T)
    factor = np.linalg.cholesky(np.linalg.inv(gram)).T
    packed = pack(quantizer, jnp.asarray(w))
    tiles, _ = quantizer.tiling.split(jnp.zeros(w.shape), 0)
    scale = jnp.broadcast_to(quantizer.scale_format.load(packed.scales), tiles.shape).reshape(w.shape)
    zero = 0.0
    if packed.zeros is not None:
        zero = jnp.broadcast_to(packed.zeros.astype(jnp.float32), tiles.shape).reshape(w.shape)
    scale, zero, left = (np.asarray(a, np.float64) * np.ones(w.shape) for a in (scale, zero, turned(w)))
    levels = np.asarray(quantizer.format.levels)
    out = np.zeros(w.shape)
    for k in range(K):
        u = left[k] / scale[k] + zero[k]
        level = levels[np.argmin(np.abs(u[:, None] - levels[None, :]), axis=1)]
        out[k] = (level - zero[k]) * scale[k]
        left[k:] -= np.outer(factor[k, k:], (left[k] - out[k]) / factor[k, k])
    return out


@pytest.mark.parametrize("name", QUANTIZERS)
def test_equals_the_transcription(name):
    quantizer, (x, w) = QUANTIZERS[name], operands()
    packed = chosen(quantizer, jnp.asarray(w), gram_of(x), axis=0)
    packed.validate()
    got, wanted = np.asarray(packed.values(jnp.float32)), transcribed(quantizer, w, x)
    step = np.abs(wanted).max() / 4
    # Where float32 and float64 round a tie to different levels, that output's later levels may differ.
    same = (np.abs(got - wanted) < 1e-3 * step).all(axis=0)
    assert same.mean() > 0.8
    off = lambda w_hat: np.sum((x @ (w_hat - w)) ** 2)
    nearest = np.asarray(unpack(pack(quantizer, jnp.asarray(w))))
    assert off(np.asarray(unpack(packed))) < 0.75 * off(nearest)


@pytest.mark.parametrize("name", ["uint3 zero points", "quest 4"])
def test_inputs_that_do_not_go_together_leave_nearest_levels(name):
    _, w = operands()
    w, quantizer = jnp.asarray(w), QUANTIZERS[name]
    alike = chosen(quantizer, w, 3 * jnp.eye(K), axis=0)
    np.testing.assert_array_equal(unpack(alike), unpack(pack(quantizer, w)))


def test_axes_and_learned_scales():
    x, w = operands()
    quantizer = lb.Quantizer(format=formats.INT4, fit=scaling.Learned(), estimator=lb.estimators.LSQ())
    scale = quantizer.initial_scale(jnp.asarray(w), axis=0)
    first = chosen(quantizer, jnp.asarray(w), gram_of(x), axis=0, scale=scale)
    last = chosen(quantizer, jnp.asarray(w.T.reshape(4, 6, K)), gram_of(x), axis=-1, scale=scale.reshape(4, 6))
    np.testing.assert_array_equal(unpack(last).reshape(N, K).T, unpack(first))


def test_a_row_of_zeros_and_dead_inputs():
    x, w = operands()
    w[:, 3] = 0
    x[:, 5] = 0
    for quantizer in (lb.Quantizer(format=formats.INT4), dataclasses.replace(lb.quest_quantizer(4), rotation=None)):
        found = np.asarray(unpack(chosen(quantizer, jnp.asarray(w), gram_of(x), axis=0)))
        assert np.all(found[:, 3] == 0) and np.all(np.isfinite(found))


def test_refusals():
    x, w = operands()
    with pytest.raises(ValueError, match=r"96 elements, and the gram the shape \(95, 95\)"):
        gptq(QUANTIZERS["nf4 tensor"], jnp.asarray(w), jnp.eye(95), axis=0)
    with pytest.raises(ValueError, match="leaves elements out"):
        gptq(lb.Quantizer(sparsity=lb.sparsity.NofM(2, 4)), jnp.asarray(w), gram_of(x), axis=0)
    with pytest.raises(ValueError, match="by chance"):
        gptq(lb.Quantizer(rounding=lb.rounding.stochastic), jnp.asarray(w), gram_of(x), axis=0)
    for damping in (0.0, -0.1, np.inf, np.nan):
        with pytest.raises(ValueError, match=f"damping={damping}.*positive, finite"):
            damped(gram_of(x), damping)
    with pytest.raises(ValueError, match="gram is not finite"):
        gptq(QUANTIZERS["nf4 tensor"], jnp.asarray(w), jnp.full((K, K), jnp.nan), axis=0)


@pytest.mark.parametrize("damping", [None, 1e-7])
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_a_gram_that_float32_cannot_factor(damping, size):
    """Of rank 3: its Cholesky decomposition fails, and gave levels whose errors were a thousand times the nearest's."""
    random = np.random.default_rng(0)
    x, w = random.standard_normal((64, 3)) @ random.standard_normal((3, K)), jnp.asarray(operands()[1])
    gram = jnp.asarray(size * (x.T @ x), jnp.float32)
    quantizer = QUANTIZERS["quest 4"]
    packed = gptq(quantizer, w, gram if damping is None else damped(gram, damping), axis=0)
    off = lambda w_hat: np.sum((x @ np.asarray(w_hat - w, np.float64)) ** 2)
    assert off(packed.dequantize()) < 0.1 * off(quantizer.quantize(w, axis=0).dequantize())


def test_no_output_errs_more_than_with_nearest_levels():
    """Few inputs that go together by chance: one index after the other, some outputs would."""
    random = np.random.default_rng(1)
    x, w = random.standard_normal((5, 4)), random.standard_normal((4, 500)).astype(np.float32)
    quantizer = lb.Quantizer(format=formats.INT3)
    off = lambda w_hat: np.sum((x @ (np.asarray(w_hat, np.float64) - w)) ** 2, axis=0)
    nearest = off(quantizer.quantize(jnp.asarray(w), axis=0).dequantize())
    found = off(gptq(quantizer, jnp.asarray(w), jnp.asarray(x.T @ x, jnp.float32), axis=0).dequantize())
    assert np.all(found <= nearest * (1 + 1e-4)) and found.sum() < 0.9 * nearest.sum()


def test_a_gram_that_is_not_finite_leaves_nearest_levels_under_jit():
    quantizer, w = QUANTIZERS["uint3 zero points"], jnp.asarray(operands()[1])
    packed = jax.jit(lambda gram: gptq(quantizer, w, gram, axis=0))(jnp.full((K, K), jnp.nan))
    np.testing.assert_array_equal(packed.dequantize(), quantizer.quantize(w, axis=0).dequantize())


W3 = lb.methods.get("absmax_integer", bits=3, activations=False)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(K, 64, rngs=rngs)
        self.mix = nnx.Einsum("...hd,hdo->...o", (4, 16, K), rngs=rngs)

    def __call__(self, x):
        h = nnx.silu(self.up(x))
        return self.mix(h.reshape(*h.shape[:-1], 4, 16))


def stacked(rngs, layers=3):
    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return Mlp(rngs)

    return make(rngs)


class Deep(nnx.Module):
    def __init__(self, rngs):
        self.blocks = stacked(rngs)

    def __call__(self, x):
        body = lambda x, block: x + block(x)
        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


call = nnx.jit(lambda model, x: model(x))


@pytest.mark.parametrize("build, layout", [(Mlp, "bitstream-le/1"), (Deep, "planes/1")])
def test_models_err_less_than_packed_to_the_nearest(build, layout):
    model = build(nnx.Rngs(0))
    quantized = lb.quantize(model, W3)
    x = jnp.asarray(operands()[0], jnp.float32).reshape(4, 100, K)
    expected = call(model, x[3])
    off = lambda packed: float(jnp.mean((call(packed, x[3]) - expected) ** 2))
    packed = lb.nn.gptq(quantized, [x[0], (x[1],), x[2]], layout=layout)
    assert off(packed) < 0.7 * off(lb.convert(quantized))
    kernel = (packed.blocks if build is Deep else packed).up.kernel.get_value()
    assert isinstance(kernel, PlaneTensor) == (layout == "planes/1")
    np.testing.assert_array_equal(call(quantized, x[3]), call(lb.quantize(model, W3), x[3]))  # left as it was


def test_what_has_no_gram_is_packed_as_convert_packs_it():
    class Both(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
            self.heads = nnx.LinearGeneral((4,), (6,), batch_axis={0: 2}, rngs=rngs)
            self.out = nnx.Linear(12, 5, rngs=rngs)

        def __call__(self, x):
            x = self.heads(jnp.moveaxis(self.conv(x).reshape(-1, 2, 4), 1, 0))
            return self.out(jnp.moveaxis(x, 0, 1).reshape(-1, 12))

    model = lb.quantize(Both(nnx.Rngs(0)), W3)
    x = jax.random.normal(jax.random.key(0), (2, 10, 8))
    packed, plain = lb.nn.gptq(model, [x]), lb.convert(model)
    for name in ("conv", "heads"):
        a, b = (getattr(m, name).kernel.get_value() for m in (packed, plain))
        np.testing.assert_array_equal(a.words, b.words)
    assert np.any(packed.out.kernel.get_value().words != plain.out.kernel.get_value().words)
    assert call(packed, x).shape == (20, 5)


class Calls(nnx.Module):
    """Square layers of a size that compiles fast, called as `how` says."""

    def __init__(self, how, layers=1):
        make = lambda i: nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(i))
        self.how, self.layers = how, nnx.List([make(i) for i in range(layers)])

    def __call__(self, *args, **kwargs):
        return self.how(*self.layers, *args, **kwargs)


def inputs(seed=0, rows=32):
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, 2)) @ random.standard_normal((2, 8)) + 0.1 * random.standard_normal((rows, 8))
    return jnp.asarray(x, jnp.float32)


def words(how, *batches):
    return lb.nn.gptq(lb.quantize(Calls(how), W3), batches).layers[0].kernel.get_value().words


def plain(layer, x):
    return layer(x)


over_the_batch = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))


def test_layers_that_share_a_kernel_are_packed_for_the_inputs_of_both():
    model = Calls(lambda a, b, x, y: (a(x), b(y)), layers=2)
    model.layers[1].kernel = model.layers[0].kernel
    x, y = inputs(0), 3 * inputs(1)
    packed = lb.nn.gptq(lb.quantize(model, W3), [(x, y)])
    assert packed.layers[0].kernel is packed.layers[1].kernel
    np.testing.assert_array_equal(packed.layers[0].kernel.get_value().words, words(plain, x, y))
    assert np.any(words(plain, x, y) != words(plain, x))


def test_parts_that_were_quantized_by_themselves_keep_their_inputs_apart():
    """By the paths that they have in the model, not those in their parts, which are all alike."""
    model = Calls(lambda a, b, x: (a(x), b(jnp.roll(x, 1, axis=-1))), layers=2)
    model.layers = nnx.List([lb.quantize(layer, W3) for layer in model.layers])
    packed = lb.nn.gptq(model, [inputs()])
    np.testing.assert_array_equal(packed.layers[0].kernel.get_value().words, words(plain, inputs()))


def test_batches_of_flags_and_of_arguments_by_name():
    def how(layer, x, deterministic, scale=1.0):
        return layer(x if deterministic else 0 * x) * scale

    expected, x = words(plain, inputs()), inputs()
    np.testing.assert_array_equal(words(how, (x, True)), expected)
    np.testing.assert_array_equal(words(how, {"x": x, "deterministic": True, "scale": 2.0}), expected)


@pytest.mark.parametrize(
    "how",
    [
        over_the_batch,
        nnx.remat(plain),
        nnx.jit(plain),
        lambda layer, x: nnx.cond(jnp.sum(x) > jnp.inf, lambda layer, x: layer(-x), plain, layer, x),
        lambda layer, x: nnx.grad(lambda x, layer: jnp.sum(nnx.remat(plain)(layer, x)))(x, layer),  # runs it twice
        lambda layer, x: nnx.fori_loop(0, 1, lambda _, c: (c[0], c[0](c[1])), (layer, x))[1],
    ],
)
def test_transformations_that_keep_what_a_layer_meets(how):
    np.testing.assert_array_equal(words(how, inputs(0), inputs(1)), words(plain, inputs(0), inputs(1)))


def test_a_loop_that_carries_what_its_layer_meets():
    def turn(x, layer):
        layer(x)
        return jnp.roll(x, 1, axis=-1)

    axes = nnx.StateAxes({Scale: nnx.Carry, ...: None})
    loop = nnx.scan(turn, in_axes=(nnx.Carry, axes), out_axes=nnx.Carry, length=2)
    unrolled = lambda layer, x: turn(turn(x, layer), layer)
    np.testing.assert_array_equal(words(lambda layer, x: loop(x, layer), inputs()), words(unrolled, inputs()))


class TestRefused:
    @pytest.mark.parametrize("first", [plain, lambda layer, x: x])
    def test_a_loop_that_loses_what_its_layer_meets(self, first):
        """All of it, or a part."""
        loop = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=3)
        with pytest.raises(ValueError, match=r"not all runs of the layer 'layers/0'.*axis None.*StateAxes"):
            words(lambda layer, x: loop(first(layer, x), layer), inputs())

    @pytest.mark.parametrize("through", [jax.vmap, jax.checkpoint, jax.jit])
    def test_closures_by_the_name_of_their_layer(self, through):
        with pytest.raises(ValueError, match=r"lb\.nn\.gptq: the layer 'layers/0' runs inside.*nnx\.vmap\(lambda"):
            words(lambda layer, x: through(lambda x: layer(x))(x), inputs())
        with pytest.raises(ValueError, match="lb\\.nn\\.gptq: a layer runs inside"):
            words(lambda layer, x: through(lambda x: nnx.remat(plain)(layer, x))(x), inputs())

    def test_jit(self):
        with pytest.raises(ValueError, match="being traced"):
            jax.jit(lambda x: words(plain, x))(inputs())

    def test_layers_that_do_not_run_and_inputs_too_large_or_too_small_to_square(self):
        with pytest.raises(ValueError, match="do not run the layer 'layers/0'"):
            words(lambda layer, x: x, inputs())
        with pytest.raises(ValueError, match="not finite in float32.*1e19 and larger"):
            words(plain, 1e20 * inputs())
        with pytest.raises(ValueError, match="no input but zeros .or below 1e-19"):
            words(plain, 1e-24 * inputs())

    def test_no_batches_none_that_reach_and_not_finite_ones(self):
        model = lb.quantize(Mlp(nnx.Rngs(0)), W3)
        with pytest.raises(ValueError, match="got no batches"):
            lb.nn.gptq(model, [])
        with pytest.raises(ValueError, match="'mix' met no input but zeros"):
            lb.nn.gptq(model, [jnp.zeros((2, K))])
        with pytest.raises(ValueError, match="is not finite"):
            lb.nn.gptq(model, [jnp.full((2, K), jnp.inf)])

    def test_sparse_weights_by_the_name_of_their_layer(self):
        sparse = lb.LinearRecipe(out=lb.Gemm(rhs=lb.Quantizer(sparsity=lb.sparsity.NofM(2, 4))))
        model = lb.quantize(Mlp(nnx.Rngs(0)), W3, rules=[("up", sparse)])
        with pytest.raises(ValueError, match=r"lb\.nn\.gptq: the layer 'up' \(Linear\).*2:4"):
            lb.nn.gptq(model, [jnp.ones((2, K))])

    def test_models_that_are_not_quantized_or_packed(self):
        x = jnp.ones((2, K))
        with pytest.raises(ValueError, match="no quantized layer"):
            lb.nn.gptq(Mlp(nnx.Rngs(0)), [x])
        with pytest.raises(ValueError, match="packed already"):
            lb.nn.gptq(lb.convert(lb.quantize(Mlp(nnx.Rngs(0)), W3)), [x])
        with pytest.raises(TypeError, match="no Flax module"):
            lb.nn.gptq(lambda x: x, [x])
