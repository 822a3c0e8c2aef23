"""The model against its published sizes and slow, obvious forms of its parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax._src.ad_checkpoint import saved_residuals  # public is only print_saved_residuals, which prints it

import lowbit_jax as lb
from lowbit_jax.ops import backend
from recipes import llama, optimizer, sampling

SMALL = llama.preset("smoke")


def build(**changes):
    return llama.build(dataclasses.replace(SMALL, **changes), 256)


forward = jax.jit(lambda model, ids: model(ids))


def tokens(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape), jnp.int32)


@pytest.mark.parametrize(
    ("name", "count"),
    [("30M", 30_482_560), ("50M", 49_556_736), ("100M", 102_777_856), ("200M", 203_188_480), ("430M", 443_068_288),
     ("800M", 822_151_168), ("1.6B", 1_586_076_160)],
)  # fmt: skip
def test_presets_have_the_published_sizes(name, count):
    """Non-embedding parameters of the QuEST models (arXiv:2502.05003, appendix)."""
    config = llama.preset(name)
    model = nnx.eval_shape(lambda: llama.build(config, 256))
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert config.block_params == count == total - 2 * 256 * config.width


def test_the_largest_preset_is_the_next_of_its_family():
    config = llama.preset("3.2B")
    assert 3.0e9 < config.block_params < 3.4e9 and config.width == 128 * config.layers == 128 * config.heads


def test_unknown_preset():
    with pytest.raises(ValueError, match="no preset '30m'.*Did you mean '30M'"):
        llama.preset("30m")


@pytest.mark.parametrize("changes", [{"heads": 3}, {"kv_heads": 3, "heads": 4}, {"init": "xavier"}])
def test_impossible_shapes(changes):
    with pytest.raises(ValueError, match="Llama"):
        build(**changes)


def test_it_sees_only_the_past():
    model = build()
    before = tokens((1, 12))
    after = before.at[0, 7].set((before[0, 7] + 1) % 256)
    change = np.abs(np.asarray(forward(model, before) - forward(model, after))[0]).max(-1)
    assert (change[:7] == 0).all() and (change[7:] > 0).all()


def test_scan_equals_a_loop_over_the_layers():
    model = build()
    graph, stacked = nnx.split(model.blocks)
    x = model.embed(tokens((2, 8)))
    rotary = llama.rotary_table(8, SMALL.head_dim, SMALL.rope_theta)
    for index in range(SMALL.layers):
        x = nnx.merge(graph, jax.tree.map(lambda leaf, i=index: leaf[i], stacked))(x, rotary)
    np.testing.assert_allclose(model.lm_head(model.norm(x)), forward(model, tokens((2, 8))), atol=1e-5)


def test_attention_against_float64():
    """Grouped queries: query head h reads key-value head h // 2; softmax over the past; rotary positions."""
    stacked = build().blocks.attention
    kernel, out = (np.asarray(layer.kernel[...], np.float64)[0] for layer in (stacked.qkv, stacked.out))
    time, heads, kv, dim = 6, 2, 1, 32
    x = np.random.default_rng(1).standard_normal((time, 64))
    q, k, v = np.split((x @ kernel).reshape(time, heads + 2 * kv, dim), [heads, heads + kv], axis=1)
    angle = np.arange(time)[:, None] * 10_000.0 ** (-np.arange(0, dim, 2) / dim)

    def turn(pairs):  # as complex numbers
        z = (pairs[..., : dim // 2] + 1j * pairs[..., dim // 2 :]) * np.exp(1j * angle)[:, None, :]
        return np.concatenate([z.real, z.imag], axis=-1)

    q, k = turn(q), turn(k)
    mixed = np.zeros((time, heads, dim))
    for h in range(heads):
        for t in range(time):
            score = np.exp(k[: t + 1, h // 2] @ q[t, h] / np.sqrt(dim))
            mixed[t, h] = (score / score.sum()) @ v[: t + 1, h // 2]
    expected = mixed.reshape(time, heads * dim) @ out
    graph, state = nnx.split(stacked)
    attention = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
    got = attention(jnp.asarray(x[None], jnp.float32), llama.rotary_table(time, dim, 10_000.0))
    np.testing.assert_allclose(got[0], expected, atol=2e-5)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Programs traced inside are for one GPU, as far as the model can see."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(backend, "sees_gpu", lambda: True)
    monkeypatch.setattr(backend, "why_partitioned", lambda *_: None)


def attention_of(monkeypatch, implementation="auto", time=64, heads=4, dim=128, dtype=jnp.bfloat16):
    """What `attend` asks JAX for."""
    asked = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **options: asked.append(options) or q)
    q, kv = jnp.zeros((1, time, heads, dim), dtype), jnp.zeros((1, time, 2, dim), dtype)
    llama.attend(q, kv, kv, implementation)
    assert asked[0]["is_causal"]
    return asked[0]["implementation"]


@pytest.mark.parametrize("changes", [{}, {"dim": 8}, {"dtype": jnp.float16}, {"time": 512}])
def test_attention_on_a_gpu_is_cudnns(changes, on_a_gpu, monkeypatch):
    assert attention_of(monkeypatch, **changes) == "cudnn"
    assert attention_of(monkeypatch, "xla", **changes) == "xla"


@pytest.mark.parametrize("changes", [{"dim": 136}, {"dim": 60}, {"dtype": jnp.float32}, {"time": 100}])
def test_attention_that_cudnn_does_not_serve_is_xlas(changes, on_a_gpu, monkeypatch):
    assert attention_of(monkeypatch, **changes) == "xla"


def test_attention_elsewhere_is_xlas(monkeypatch):
    assert attention_of(monkeypatch) == "xla"


def test_attention_cut_over_devices_is_xlas(on_a_gpu, monkeypatch):
    monkeypatch.setattr(backend, "why_partitioned", lambda *_: "a mesh")
    assert attention_of(monkeypatch) == "xla"
    assert attention_of(monkeypatch, "cudnn") == "cudnn"


def test_unknown_attention():
    with pytest.raises(ValueError, match="attention 'flash' is unknown; choose one of auto, cudnn, xla"):
        llama.build(SMALL, 256, attention="flash")


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("unroll", [False, True])
def test_cudnn_attention_lowers_in_a_training_step(remat, unroll, monkeypatch):
    """For CUDA from any machine: its forward, again where that is rematerialized, its backward, no matrix of scores."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91400)  # of the library, which is on GPU machines only
    config = dataclasses.replace(SMALL, width=128, heads=2)
    model = llama.build(config, 256, dtype="bfloat16", remat=remat, attention="cudnn", unroll=unroll)
    graph, params = nnx.split(model)
    step = jax.jit(jax.grad(lambda p: nnx.merge(graph, p)(tokens((2, 192))).std()))
    text = step.trace(params).lower(lowering_platforms=("cuda",)).as_text()
    assert "192x192x" not in text
    forward, backward = (text.count(f"@__cudnn$fmhaSoftmax{name}(") for name in ("", "Backward"))
    assert backward in {1, SMALL.layers if unroll else 1}, "some versions of JAX write equal layers once"
    assert forward == backward * (1 + (remat == "full"))


def of_a_layer(remat: str, quantized: bool, unroll: bool | None = None):
    """(graph, parameters) of the smoke model, QuEST W4A4 or in float."""
    config = dataclasses.replace(SMALL, kv_heads=SMALL.heads)
    model = llama.build(config, 256, dtype="float32", remat=remat, unroll=unroll)
    return nnx.split(lb.quantize(model, rules=[("blocks", lb.quest(4))]) if quantized else model)


@pytest.fixture(scope="module")
def without_remat():
    return {quantized: gradient_of(*of_a_layer("none", quantized)) for quantized in (False, True)}


def gradient_of(graph, params):
    return jax.jit(jax.grad(lambda p: nnx.merge(graph, p)(tokens((2, 8))).std()))(params)


@pytest.mark.parametrize(
    ("remat", "quantized"), [("full", False), ("products", False), ("products", True), ("codes", True)]
)
def test_remat_changes_nothing_but_memory(remat, quantized, without_remat):
    found = gradient_of(*of_a_layer(remat, quantized))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), without_remat[quantized], found)


@pytest.mark.parametrize("quantized", [False, True])
def test_unrolled_layers_are_the_same_model(quantized, without_remat):
    graph, params = of_a_layer("none", quantized, unroll=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), without_remat[quantized], gradient_of(graph, params)
    )


@pytest.mark.parametrize(("remat", "loops"), [("none", False), ("full", True)])
def test_layers_are_a_loop_unless_on_one_gpu_with_nothing_rematerialized(remat, loops, on_a_gpu):
    def text(unroll):
        graph, params = of_a_layer(remat, False, unroll)
        return jax.jit(lambda p: nnx.merge(graph, p)(tokens((2, 8)))).lower(params).as_text()

    whiles = {unroll: "stablehlo.while" in text(unroll) for unroll in (None, False, True)}
    assert whiles == {None: loops, False: True, True: False}


def test_layers_are_a_loop_on_a_cpu():
    graph, params = of_a_layer("none", False)
    assert "stablehlo.while" in jax.jit(lambda p: nnx.merge(graph, p)(tokens((2, 8)))).lower(params).as_text()


def kept_bytes(remat: str, quantized: bool) -> dict[str, int]:
    """Bytes that a forward pass of 8 x 32 tokens keeps for the backward pass, by dtype, without its arguments and
    without matrices of rotations, which are one constant for all tokens and layers."""
    graph, params = of_a_layer(remat, quantized)
    kept: dict[str, int] = {}
    for aval, source in saved_residuals(lambda p: nnx.merge(graph, p)(tokens((8, 32))).std(), params):
        if "argument" not in source and aval.ndim > 2:
            kept[aval.dtype.name] = kept.get(aval.dtype.name, 0) + aval.size * aval.dtype.itemsize
    return kept


def test_a_quantized_layer_keeps_no_more_than_one_in_float():
    """With "products" the same arrays, and not what each rotation answers as well; with "codes" each operand at its
    4 bits and a boolean, for 8 x 32 tokens and the weights of both layers."""
    full, products = kept_bytes("full", False), kept_bytes("products", False)
    assert kept_bytes("products", True) == products and sum(products.values()) > 2 * sum(full.values())
    codes = kept_bytes("codes", True)
    per_token, weights = 64 + 64 + 64 + 128, 64 * 192 + 64 * 64 + 64 * 256 + 128 * 64
    elements = 2 * (8 * 32 * per_token + weights)
    assert elements / 2 <= codes["uint8"] < 0.501 * elements and elements <= codes["bool"] < 1.001 * elements
    assert sum(codes.values()) < sum(products.values())
    assert codes["float32"] <= 1.1 * full["float32"], "and a scale a row"


def test_unknown_remat():
    with pytest.raises(ValueError, match="remat 'some' is unknown; choose one of none, full, products, codes"):
        forward(llama.build(SMALL, 256, remat="some"), tokens((1, 4)))


def test_bfloat16_keeps_float32_masters_and_logits():
    model = llama.build(SMALL, 256, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    logits = forward(model, tokens((2, 8)))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, forward(build(), tokens((2, 8))), atol=0.1)


def test_fan_in_init_of_stacked_layers():
    kernel = np.asarray(build(width=128, ffn=512, layers=3).blocks.mlp.down.kernel[...])
    np.testing.assert_allclose(kernel.std(axis=(1, 2)), 512**-0.5, rtol=0.02)
    assert (kernel[0] != kernel[1]).all()


class TestOptimizer:
    def test_one_cycle(self):
        """lr/100 up to lr over 10%, down to lr/10, both as half a cosine (METHODS of arXiv:2502.05003)."""
        schedule = optimizer.one_cycle(3e-3, 200)
        count = np.arange(200)
        up = 3e-3 * (0.01 + 0.99 * (1 - np.cos(np.pi * count / 20)) / 2)
        down = 3e-3 * (0.1 + 0.9 * (1 + np.cos(np.pi * (count - 20) / 179)) / 2)
        got = np.asarray([schedule(c) for c in count])
        np.testing.assert_allclose(got, np.where(count < 20, up, down), rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(got[[0, 20, 199]], [3e-5, 3e-3, 3e-4], rtol=1e-5)

    @pytest.mark.parametrize("arguments", [(0.0, 10), (1e-3, 0), (1e-3, 10, 1.5)])
    def test_senseless_schedules(self, arguments):
        with pytest.raises(ValueError, match="one_cycle"):
            optimizer.one_cycle(*arguments)

    def test_only_the_matrices_of_the_blocks_decay(self):
        params = nnx.state(build(), nnx.Param)
        decays = optimizer.decayed(params)
        names = {
            jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
            for path, value in jax.tree.leaves_with_path(decays)
            if value
        }
        assert names == {
            f"blocks/{name}/kernel" for name in ("attention/qkv", "attention/out", "mlp/gate_up", "mlp/down")
        }
        by_names_alone = lb.optim.decay_mask()(params)
        assert jax.tree.leaves(by_names_alone) == jax.tree.leaves(decays)

    def test_decay_and_clipping_reach_the_update(self):
        params = {"blocks": {"kernel": jnp.ones(4)}, "embed": jnp.ones(4)}
        transform = optimizer.AdamW(peak=1.0, steps=10, weight_decay=0.5).transformation()
        updates, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
        np.testing.assert_allclose(updates["blocks"]["kernel"], -0.01 * 0.5, rtol=1e-5)  # the first rate is 1/100
        np.testing.assert_allclose(updates["embed"], 0)
        clipped, _ = optax.clip_by_global_norm(1.0).update({"a": jnp.full(4, 5.0)}, optax.EmptyState())
        np.testing.assert_allclose(clipped["a"], 0.5)


class NextIs(nnx.Module):
    """Token t is followed by t + 1, and the loudest logit says so."""

    def __call__(self, ids):
        return 9.0 * jax.nn.one_hot((ids + 1) % 11, 11)


class TestSampling:
    def test_greedy_follows_the_model_past_its_window(self):
        ids = sampling.generate(
            NextIs(), np.asarray([3, 4]), tokens=20, context=8, temperature=0, vocab_size=11, key=jax.random.key(0)
        )
        np.testing.assert_array_equal(ids, (np.arange(22) + 3) % 11)

    def test_a_long_prompt_comes_back_whole_and_its_end_is_read(self):
        ids = sampling.generate(
            NextIs(), np.arange(10), tokens=1, context=4, temperature=0, vocab_size=11, key=jax.random.key(0)
        )
        np.testing.assert_array_equal(ids, np.arange(11))

    def test_logits_beyond_the_vocabulary_are_never_drawn(self, key):
        """A table is padded to a multiple of 128: the model, which wants 7 after 6, has no text for it."""
        options = dict(tokens=8, context=8, vocab_size=7)
        greedy = sampling.generate(NextIs(), np.asarray([5]), temperature=0, key=key, **options)
        drawn = sampling.generate(NextIs(), np.asarray([5]), temperature=50.0, key=key, **options)
        assert greedy[1] == 6 and max(greedy) < 7 and max(drawn) < 7

    def test_the_key_decides(self, key):
        def draw(key):
            return sampling.generate(
                build(), np.asarray([65]), tokens=12, context=16, temperature=1.0, vocab_size=128, key=key
            )

        np.testing.assert_array_equal(draw(key), draw(key))
        assert (draw(key) != draw(jax.random.key(5))).any()

    @pytest.mark.parametrize("change", [{"prompt": np.zeros(0, int)}, {"prompt": np.asarray([11])}, {"tokens": 0},
                                        {"prompt": np.asarray([-1])}, {"temperature": -1.0},
                                        {"temperature": np.nan}])  # fmt: skip
    def test_what_cannot_be_sampled(self, change):
        with pytest.raises(ValueError, match="sampling: "):
            sampling.check(**({"prompt": np.asarray([1]), "tokens": 3, "temperature": 1.0, "vocab_size": 11} | change))
