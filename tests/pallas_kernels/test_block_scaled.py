"""Block-scaled formats: the kernel (interpreted) and its reference, bit for bit the library's block quantizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax.scaling import PowerOfTwo, TwoLevel
from pallas_kernels import block_scaled
from pallas_kernels.launch import Tile
from tests.pallas_kernels.compiled import compiled

IMPLS = ("xla", "interpret")
quantize_mx = compiled(block_scaled.quantize_mx)
dequantize_mx = compiled(block_scaled.dequantize_mx)
quantize_nvfp4 = compiled(block_scaled.quantize_nvfp4)
dequantize_nvfp4 = compiled(block_scaled.dequantize_nvfp4)
MODES = block_scaled.SCALE_MODES
SMALL = Tile(rows=16, columns=32, stages=1)


def matrix(m=19, k=96, seed=0, dtype=jnp.float32):
    """Blocks of very different spread, one of zeros, some -0, and magnitudes at the edge of a binade."""
    rng = np.random.default_rng(seed)
    spread = np.exp(3 * rng.standard_normal((m, k // 16, 1)))
    x = (rng.standard_normal((m, k // 16, 16)) * spread).astype(np.float32).reshape(m, k)
    x[1, :32], x[2, 5], x[3, 7] = 0, -0.0, 2.0**12
    x[4, :32] = np.linspace(-127.9999, 127.9999, 32)
    return jnp.asarray(x, dtype)


@functools.cache
def by_library(name, mode):
    quantizer = lb.block_quantizer(lb.formats.get(name), scale_format=PowerOfTwo(mode))
    q = jax.jit(quantizer.quantize)(matrix())
    return (
        np.asarray(q.words),
        np.asarray(q.scales[0]).reshape(19, -1),
        np.asarray(jax.jit(lambda q: q.dequantize())(q)),
    )


@pytest.mark.parametrize("name", block_scaled.MX_FORMATS)
class TestMx:
    @pytest.mark.parametrize("impl", IMPLS)
    def test_is_the_block_quantizer_of_the_library(self, name, impl):
        words, scales = quantize_mx(matrix(), format=name, tile=SMALL, impl=impl)
        expected = by_library(name, "floor")
        np.testing.assert_array_equal(words, expected[0])
        np.testing.assert_array_equal(scales, expected[1])
        assert len(np.unique(scales)) > 5, "the data should need many scales"
        back = dequantize_mx(words, scales, format=name, dtype=jnp.float32, impl=impl)
        np.testing.assert_array_equal(back, expected[2])

    def test_scale_modes(self, name):
        for mode in {"mxfp8": MODES, "mxint8": ("ceil", "rceil", "even")}.get(name, ("rceil", "even")):
            words, scales = quantize_mx(matrix(), format=name, scale_mode=mode, impl="xla")
            expected = by_library(name, mode)
            np.testing.assert_array_equal(words, expected[0])
            np.testing.assert_array_equal(scales, expected[1])
        assert (by_library(name, "floor")[1] != by_library(name, "rceil")[1]).any()

    def test_nan_and_inf_stay_in_their_block(self, name):
        x = matrix().at[0, 3].set(jnp.nan).at[5, 40].set(-jnp.inf)
        words, scales = quantize_mx(x, format=name, impl="xla")
        back = np.asarray(dequantize_mx(words, scales, format=name, dtype=jnp.float32, impl="xla"))
        wrong = np.zeros((19, 96), bool)
        wrong[0, :32], wrong[5, 32:64] = True, True
        np.testing.assert_array_equal(np.isnan(back), wrong)
        np.testing.assert_array_equal(back[~wrong], by_library(name, "floor")[2][~wrong])

    def test_nearest_level_of_a_16_bit_input(self, name):
        """In units of the block's power of two, every bfloat16 goes to a level that no other is nearer than."""
        x = matrix(dtype=jnp.bfloat16)
        words, scales = quantize_mx(x, format=name, scale_mode="rceil", impl="interpret")
        back = np.asarray(dequantize_mx(words, scales, format=name, dtype=jnp.float32, impl="xla"), np.float64)
        levels = np.asarray(lb.formats.get(name).element.levels)
        step = np.exp2(np.asarray(scales, np.float64) - 127).repeat(32, axis=1)
        u = np.asarray(x, np.float64) / step
        least = np.abs(u[..., None] - levels).min(-1)
        np.testing.assert_array_equal(np.abs(back / step - u), least)
        rounded = dequantize_mx(words, scales, format=name, impl="xla")
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(rounded), back.astype(jnp.bfloat16))

    def test_stochastic_lands_on_the_neighbors(self, name):
        x, key = matrix(m=6), jax.random.key_data(jax.random.key(4))
        words, scales = quantize_mx(x, format=name, scale_mode="rceil", key=key, impl="xla")
        back = np.asarray(dequantize_mx(words, scales, format=name, dtype=jnp.float32, impl="xla"))
        levels = np.asarray(lb.formats.get(name).element.levels)
        power = np.exp2(np.asarray(scales, np.float64) - 127).repeat(32, axis=1)
        u, v = np.asarray(x, np.float64) / power, back / power
        above = np.searchsorted(levels, u, side="left").clip(0, len(levels) - 1)
        below = (np.searchsorted(levels, u, side="right") - 1).clip(0)
        assert ((v == levels[above]) | (v == levels[below])).all()
        assert (v != levels[np.abs(u[..., None] - levels).argmin(-1)]).any(), "some go the longer way"


@pytest.mark.parametrize("name", ("mxfp8", "mxfp8_e5m2"))
def test_the_instruction_of_the_chip_gives_the_same_codes(name):
    x = matrix().at[0, 3].set(jnp.nan).at[5, 40].set(-jnp.inf)
    expected = quantize_mx(x, format=name, impl="xla")
    for got, want in zip(quantize_mx(x, format=name, cast=True, impl="interpret"), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    for wrong in (dict(format="mxfp4"), dict(format=name, key=jnp.zeros(2, jnp.uint32))):
        with pytest.raises(ValueError, match=r"cast=True.*drop the argument"):
            block_scaled.quantize_mx(x, cast=True, impl="xla", **wrong)


def test_stochastic_is_the_same_for_every_tile_and_the_reference():
    x, key = matrix(m=40, k=128), jax.random.key_data(jax.random.key(5))
    draw = functools.partial(quantize_mx, x, format="mxfp4", key=key)
    expected = draw(impl="xla")
    for tile in (SMALL, Tile(rows=32, columns=64, stages=1)):
        for got, want in zip(draw(impl="interpret", tile=tile), expected, strict=True):
            np.testing.assert_array_equal(got, want)
    other = quantize_mx(x, format="mxfp4", key=key + jnp.uint32(1), impl="xla")
    assert (np.asarray(other[0]) != np.asarray(expected[0])).any()


@pytest.mark.parametrize("impl", IMPLS)
class TestNvfp4:
    x = matrix(k=80).at[1].add(jnp.float32(0.5))  # without blocks of zeros

    def test_is_the_block_quantizer_of_the_library(self, impl):
        q = jax.jit(lb.block_quantizer(lb.formats.NVFP4, scale_format=TwoLevel()).quantize)(self.x)
        words, scales, tensor = quantize_nvfp4(self.x, impl=impl)
        np.testing.assert_array_equal(words, q.words)
        np.testing.assert_array_equal(scales, np.asarray(q.scales[0]).view(np.uint8).reshape(19, 5))
        assert tensor == q.scales[1] and len(np.unique(scales)) > 5
        back = dequantize_nvfp4(words, scales, tensor, dtype=jnp.float32, impl=impl)
        np.testing.assert_array_equal(back, jax.jit(lambda q: q.dequantize())(q))

    def test_zero_blocks_and_wild_values_leave_the_tensor_scale(self, impl):
        """Blocks of zeros or with an infinity say nothing about how large the others are."""
        x = self.x * 1e-4
        _, _, tensor = quantize_nvfp4(x, impl=impl)
        x = jnp.concatenate([x, jnp.zeros((2, 80)).at[1, 3].set(jnp.inf)])
        words, scales, other = quantize_nvfp4(x, impl=impl)
        assert other == tensor
        back = np.asarray(dequantize_nvfp4(words, scales, other, dtype=jnp.float32, impl=impl))
        np.testing.assert_array_equal(back[19], 0)
        np.testing.assert_array_equal(np.isnan(back[20]), np.arange(80) < 16)

    def test_a_given_tensor_scale(self, impl):
        words, scales, tensor = quantize_nvfp4(self.x, jnp.float32(1e12), impl=impl)
        assert tensor == jnp.float32(1e12)
        np.testing.assert_array_equal(scales, 1)  # no block scale is 0
        assert not np.asarray(words & 0x77).any(), "nothing is left of so small numbers but signs"


def test_scale_of_the_least_power():
    """Scale code 0 is 2^-127, which a backend that flushes denormals cannot hold: 57344 times it is normal."""
    words = jnp.full((1, 32), 0x7B, jnp.uint8)
    got = dequantize_mx(words, jnp.zeros((1, 1), jnp.uint8), format="mxfp8_e5m2", dtype=jnp.float32, impl="xla")
    np.testing.assert_array_equal(got, np.float32(57344 * 2.0**-127))


@pytest.mark.parametrize("k", (32, 96))
def test_tiles_that_do_not_fit_are_refused(k):
    x = jnp.ones((4, k))
    with pytest.raises(ValueError, match=r"tile.columns=128.*multiple of the block that divides"):
        quantize_mx(x, format="mxfp4", tile=Tile(rows=16, columns=128), impl="interpret")


def test_bad_input():
    quantize = functools.partial(quantize_mx, format="mxfp4", impl="xla")
    x = jnp.ones((4, 64))
    with pytest.raises(ValueError, match=r"format='mxfp5'.*mxfp8"):
        quantize_mx(x, format="mxfp5")
    with pytest.raises(ValueError, match=r"rows of 40 elements.*Pad them by 24"):
        quantize(jnp.ones((4, 40)))
    with pytest.raises(ValueError, match=r"rows of 40 elements.*Pad them by 8"):
        quantize_nvfp4(jnp.ones((4, 40)), impl="xla")
    with pytest.raises(ValueError, match=r"scale_mode='up'.*floor"):
        quantize(x, scale_mode="up")
    with pytest.raises(ValueError, match=r"impl='cuda'"):
        quantize_mx(x, format="mxfp4", impl="cuda")
    with pytest.raises(ValueError, match=r"shape \(4, 64, 1\).*matrix"):
        quantize(x[..., None])
    with pytest.raises(TypeError, match=r"x of int32.*bfloat16"):
        quantize(jnp.ones((4, 64), jnp.int32))
    with pytest.raises(TypeError, match=r"key of int32.*two uint32 words"):
        quantize(x, key=jnp.zeros(2, jnp.int32))
    with pytest.raises(TypeError, match=r"two uint32 words.*key_data"):
        block_scaled.quantize_mx(x, format="mxfp4", key=jax.random.key(0))
    words, scales = quantize(x)
    with pytest.raises(ValueError, match=r"words of shape \(4, 31\); it takes \(4, 32\)"):
        dequantize_mx(words[:, :31], scales, format="mxfp4", impl="xla")
    with pytest.raises(ValueError, match=r"words of shape \(4, 32\); it takes \(4, 48\)"):
        dequantize_mx(words, scales, format="mxfp6_e3m2", impl="xla")
    with pytest.raises(TypeError, match=r"scales of float32"):
        dequantize_mx(words, jnp.ones((4, 2)), format="mxfp4", impl="xla")
    with pytest.raises(TypeError, match=r"dtype=int8"):
        dequantize_mx(words, scales, format="mxfp4", dtype=jnp.int8, impl="xla")
    with pytest.raises(ValueError, match=r"tensor_scale of shape \(1,\)"):
        quantize_nvfp4(x, jnp.ones(1), impl="xla")


def test_cases_trace():
    """The compile test's cases have the shapes their functions take."""
    for _, function, arguments, chips in block_scaled.cases():
        assert jax.tree.leaves(jax.eval_shape(functools.partial(function, impl="xla"), *arguments))
        assert {"sm_90", "sm_100"} <= set(chips)
