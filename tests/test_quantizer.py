"""The quantizer as a whole: fake quantization, packed codes and NumPy agree, whatever the slots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax import estimators, formats, rounding, scaling, sparsity

SLOTS = {
    "default": {},
    "quest4": None,
    "per tensor": dict(tiling=scaling.PerTensor()),
    "group": dict(tiling=scaling.Group(16), format=formats.INT3),
    "block": dict(tiling=scaling.Block(16, 4), format=formats.E4M3),
    "codebook": dict(tiling=scaling.Group(32), format=formats.NF4),
    "odd bits": dict(format=formats.MIDRISE5, fit=scaling.rms_optimal),
    "bf16 scale": dict(scale_format=scaling.BFLOAT16, format=formats.INT4),
    "e8m0 scale": dict(scale_format=scaling.PowerOfTwo("rceil"), tiling=scaling.Group(32), format=formats.E2M1),
    "two-level": dict(scale_format=scaling.TwoLevel(), tiling=scaling.Group(16), format=formats.E2M1),
    "2:4 mid-rise": dict(sparsity=sparsity.NofM(2, 4), format=formats.MIDRISE4, fit=scaling.rms_optimal),
    "4:8 rotated": dict(sparsity=sparsity.PairsNofM(2, 4), format=formats.MIDRISE4, rotation=lb.Hadamard(64)),
    "signs": dict(rotation=lb.Hadamard(32, signs=3), format=formats.INT8),
    "ternary": dict(format=formats.TERNARY, fit=scaling.mean_abs, tiling=scaling.PerTensor()),
}


def make(name: str) -> lb.Quantizer:
    return lb.quest_quantizer(4) if SLOTS[name] is None else lb.Quantizer(**SLOTS[name])


def spread_rows(key, shape=(8, 64)):
    x = jax.random.normal(key, shape)
    return x * jnp.geomspace(0.02, 20, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("name", SLOTS)
def test_packed_codes_equal_fake_quantization(key, name, axis):
    quantizer, x = make(name), spread_rows(key, (64, 64))
    packed = quantizer.quantize(x, axis=axis)
    fake = quantizer(x, axis=axis)
    np.testing.assert_allclose(packed.dequantize(), fake, rtol=2e-6, atol=2e-6 * float(jnp.abs(fake).max()))
    assert packed.shape == x.shape and packed.dtype == x.dtype
    assert packed.words.dtype == jnp.uint8
    scale_bits = 8 * sum(leaf.nbytes for leaf in packed.scales) / x.size
    assert packed.bits_per_element == pytest.approx(quantizer.element_bits() + scale_bits)


@pytest.mark.parametrize("name", [n for n in SLOTS if n not in ("block", "two-level", "codebook")])
def test_requantizing_is_idempotent(key, name):
    """On the grid already: with the same scale the same codes come back (fits that read the data need not agree)."""
    quantizer = dataclasses.replace(
        make(name), rotation=None, sparsity=None, fit=scaling.Learned(), tiling=scaling.PerTensor()
    )
    packed = quantizer.quantize(spread_rows(key), scale=jnp.float32(0.37))
    again = quantizer.quantize(packed.dequantize(), scale=jnp.float32(0.37))
    np.testing.assert_array_equal(packed.words, again.words)


@pytest.mark.parametrize("size", [1, 2, 7, 31, 257])
@pytest.mark.parametrize("bits", range(1, 9))
def test_any_width_and_odd_size(key, bits, size):
    quantizer = lb.quest_quantizer(bits)
    x = spread_rows(key, (3, size))
    packed = quantizer.quantize(x)
    assert packed.words.shape == (3, -(-size * bits // 8))
    np.testing.assert_allclose(packed.dequantize(), quantizer(x), rtol=3e-6, atol=3e-6 * float(jnp.abs(x).max()))


def test_mid_rise_error_is_half_a_step_inside_the_grid(key):
    x = jax.random.normal(key, (16, 128))
    for bits in (2, 4, 8):
        quantizer = lb.Quantizer(format=formats.get(f"midrise{bits}"))
        step = np.abs(np.asarray(x)).max(1, keepdims=True) / ((2**bits - 1) / 2)
        assert (np.abs(quantizer(x) - x) <= step / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_of_zeros_comes_back_as_zeros_with_a_finite_gradient(bits):
    for quantizer in (lb.quest_quantizer(bits), lb.Quantizer(format=formats.get(f"midrise{bits}"))):
        x = jnp.zeros((2, 128)).at[1].set(1.0)
        np.testing.assert_array_equal(quantizer(x)[0], 0)
        np.testing.assert_array_equal(quantizer.quantize(x).dequantize()[0], 0)
        assert np.isfinite(jax.grad(lambda x, q=quantizer: jnp.sum(q(x) ** 2))(x)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["default", "quest4", "group", "e8m0 scale", "bf16 scale"])
def test_a_bad_element_spoils_its_own_tile_only(key, name, bad):
    x = spread_rows(key)
    clean, spoiled = make(name)(x), np.asarray(make(name)(x.at[2, 5].set(bad)))
    others = np.ones(x.shape, bool)
    tile = {"group": slice(0, 16), "e8m0 scale": slice(0, 32)}.get(name, slice(None))
    others[2, tile] = False
    np.testing.assert_array_equal(spoiled[others], np.asarray(clean)[others])
    assert not np.isfinite(spoiled[2, tile]).all()


@pytest.mark.parametrize("name", ["default", "quest4", "group"])
def test_bfloat16_keeps_its_dtype_and_float32_statistics(key, name):
    x = spread_rows(key).astype(jnp.bfloat16)
    fake = make(name)(x)
    assert fake.dtype == jnp.bfloat16
    np.testing.assert_array_equal(fake, make(name)(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_stochastic_rounding_needs_a_key_and_is_unbiased(key):
    quantizer = lb.Quantizer(format=formats.INT4, rounding=rounding.stochastic, tiling=scaling.PerTensor())
    x = jax.random.uniform(key, (32,), minval=-1.0, maxval=1.0)
    with pytest.raises(ValueError, match="key"):
        quantizer(x)
    draws = jax.vmap(lambda k: quantizer(x, key=k))(jax.random.split(key, 4000))
    step = float(jnp.abs(x).max()) / 7
    np.testing.assert_allclose(draws.mean(0), x, atol=5 * step / 2 / 4000**0.5 + 1e-6)
    np.testing.assert_array_equal(quantizer(x, key=key), quantizer(x, key=key))


def test_transformations(key):
    quantizer = lb.quest_quantizer(3)
    x = spread_rows(key, (4, 6, 64))
    expected = quantizer(x)
    np.testing.assert_allclose(jax.jit(quantizer)(x), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(jax.vmap(quantizer)(x), expected, rtol=1e-6, atol=1e-7)
    _, scanned = jax.lax.scan(lambda c, row: (c, quantizer(row)), 0, x)
    np.testing.assert_allclose(scanned, expected, rtol=1e-6, atol=1e-7)
    loss = lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x)
    np.testing.assert_allclose(loss(jax.checkpoint(quantizer)), loss(quantizer), rtol=1e-6, atol=1e-7)


def test_a_packed_array_is_a_pytree(key):
    packed = lb.quest_quantizer(4).quantize(spread_rows(key))
    through = jax.jit(lambda q: q)(packed)
    np.testing.assert_array_equal(through.dequantize(), packed.dequantize())
    stacked = jax.vmap(lb.quest_quantizer(4).quantize)(jnp.stack([spread_rows(key)] * 3))
    assert stacked.shape == (3, 8, 64)
    _, rows = jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, stacked)
    np.testing.assert_array_equal(rows, stacked.dequantize())
    assert "QTensor(float32[8, 64], midrise4" in repr(packed)


def test_equal_quantizers_do_not_retrace(key):
    traces = []

    @jax.jit
    def run(x):
        traces.append(1)
        return lb.quest_quantizer(4)(x)

    for _ in range(3):
        run(jnp.ones((2, 8)))
    assert len(traces) == 1 and hash(lb.quest_quantizer(4)) == hash(lb.quest_quantizer(4))


def test_empty_arrays_and_single_elements():
    for shape in ((0, 16), (4, 0), (1, 1)):
        x = jnp.ones(shape)
        assert lb.quest_quantizer(4)(x).shape == shape
        assert lb.Quantizer(format=formats.INT4).quantize(x).dequantize().shape == shape


def test_bad_arguments_say_the_way_out():
    x = jnp.ones((2, 48))
    cases = [
        (TypeError, "block_quantizer", lambda: lb.Quantizer(format=formats.MXFP4)),
        (TypeError, "give a format", lambda: lb.Quantizer(format="int4")),
        (TypeError, "give a tiling", lambda: lb.Quantizer(tiling=scaling.PerRow)),
        (TypeError, "give an estimator", lambda: lb.Quantizer(estimator=estimators.Trust)),
        (TypeError, "Cast first", lambda: lb.Quantizer()(jnp.ones((2, 2), jnp.int32))),
        (ValueError, "scalar", lambda: lb.Quantizer()(jnp.float32(1))),
        (ValueError, "leaves 16.*Pad by 16", lambda: lb.Quantizer(tiling=scaling.Group(32))(x)),
        (ValueError, "axis 5", lambda: lb.Quantizer()(x, axis=5)),
        (ValueError, "reads the scale off the data", lambda: lb.Quantizer()(x, scale=jnp.float32(1))),
        (ValueError, "initial_scale", lambda: lb.Quantizer(fit=scaling.Learned())(x)),
        (ValueError, "nothing to hold", lambda: lb.Quantizer().initial_scale(x)),
        (ValueError, "1 to 8 bits", lambda: lb.quest(9)),
        (ValueError, "1 to 8 bits", lambda: lb.quest("int4")),
        (ValueError, "quantizes nothing", lambda: lb.quest(4, weights=False, activations=False)),
        (ValueError, "4:8", lambda: lb.quest(4, sparsity="3:4")),
        (ValueError, "of the weights", lambda: lb.quest(4, weights=False, sparsity="2:4")),
        (TypeError, "block format", lambda: lb.block_quantizer(formats.INT4)),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()
