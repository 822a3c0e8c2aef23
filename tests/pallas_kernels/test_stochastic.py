"""Stochastic rounding: the generator against published vectors and jax.random, the roundings against their
neighbors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import formats
from pallas_kernels import stochastic, threefry
from pallas_kernels.launch import Tile
from tests.pallas_kernels.compiled import compiled

stochastic_round = compiled(stochastic.stochastic_round)
stochastic_codes = compiled(stochastic.stochastic_codes)
KEY = jax.random.key_data(jax.random.key(11))
DTYPES = (jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2)
TILES = (Tile(rows=16, columns=16, stages=1), Tile(rows=64, columns=64, stages=1))


def matrix(m=19, k=70, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((m, k)) * np.exp(2 * rng.standard_normal((m, 1))), jnp.float32)


class TestThreefry:
    def test_published_vectors(self):
        """Random123 1.14, kat_vectors, threefry2x32 with 20 rounds: counter, key, answer."""
        ones, zeros = (0xFFFFFFFF,) * 2, (0,) * 2
        pi = (0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344)
        vectors = (
            (zeros, zeros, (0x6B200159, 0x99BA4EFE)),
            (ones, ones, (0x1CB996FC, 0xBB002BE7)),
            (*pi, (0xC4923A9C, 0x483DF7A0)),
        )
        for counter, key, expected in vectors:
            got = jax.jit(threefry.threefry2x32)(*(tuple(jnp.uint32(word) for word in pair) for pair in (key, counter)))
            assert tuple(int(word) for word in got) == expected

    def test_is_that_of_jax(self):
        counter = jnp.zeros(50, jnp.uint32), jnp.arange(50, dtype=jnp.uint32)
        first, second = jax.jit(threefry.threefry2x32)((KEY[0], KEY[1]), counter)
        np.testing.assert_array_equal(first ^ second, jax.random.bits(jax.random.key(11), (50,), jnp.uint32))

    def test_a_window_has_the_words_of_the_whole(self):
        key = KEY[0], KEY[1]
        for draw in (threefry.words, threefry.halves):
            drawn = jax.jit(draw, static_argnums=(3, 4))
            whole = np.asarray(drawn(key, 0, 0, 12, 24))
            np.testing.assert_array_equal(drawn(key, 5, 8, 4, 16), whole[5:9, 8:24])
            assert len(np.unique(whole)) > 280


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
class TestRound:
    def test_every_tile_gives_the_bits_of_the_reference(self, dtype):
        x = matrix()
        expected = np.asarray(stochastic_round(x, KEY, dtype=dtype, impl="xla")).view(np.uint8)
        for tile in TILES if dtype == jnp.bfloat16 else TILES[:1]:
            got = stochastic_round(x, KEY, dtype=dtype, tile=tile, impl="interpret")
            assert got.dtype == dtype and got.shape == x.shape
            np.testing.assert_array_equal(np.asarray(got).view(np.uint8), expected)

    def test_unbiased(self, dtype):
        """The mean of 65536 draws of one number, within 4 sigma of the two-point distribution; subnormals too."""
        for number in (1.0 + 2.0**-9 + 2.0**-12, -3.3, 0.0021, 1.7e-5, 300.7):
            x = jnp.full((256, 256), number, jnp.float32)
            got = np.asarray(stochastic_round(x, KEY, dtype=dtype, impl="xla"), np.float64)
            neighbors = np.unique(got)
            number = np.float64(np.float32(number))
            assert len(neighbors) == 2 and neighbors[0] < number < neighbors[1]
            sigma = np.sqrt((number - neighbors[0]) * (neighbors[1] - number) / got.size)
            assert abs(got.mean() - number) < 4 * sigma

    def test_grid_values_stay_and_others_saturate(self, dtype):
        codes = np.arange(2 ** (8 * np.dtype(dtype).itemsize), dtype=f"uint{8 * np.dtype(dtype).itemsize}")
        values = codes.view(dtype).astype(np.float32)
        kept = np.isfinite(values) & ((np.abs(values) >= 2.0**-126) | (values == 0))
        x = jnp.asarray(np.resize(values[kept], (64, kept.sum() // 64)))
        got = stochastic_round(x, KEY, dtype=dtype, impl="xla")
        np.testing.assert_array_equal(np.asarray(got, np.float32), x)
        top = float(jnp.finfo(dtype).max)
        wild = jnp.asarray([[top * 1.001, 3.4e38, jnp.inf, -jnp.inf, jnp.nan]], jnp.float32)
        got = np.asarray(stochastic_round(wild, KEY, dtype=dtype, impl="xla"), np.float32)
        np.testing.assert_array_equal(got, [[top, top, top, -top, np.nan]])


@pytest.mark.parametrize("grid", stochastic.GRIDS)
class TestCodes:
    def test_every_tile_gives_the_bits_of_the_reference(self, grid):
        x = matrix()
        scales = jnp.abs(x).max(1) / 3
        bits, tile = (8, TILES[1]) if grid == "integer" else (1, None)
        draw = functools.partial(stochastic_codes, x, scales, KEY, bits=bits, grid=grid)
        np.testing.assert_array_equal(draw(tile=tile, impl="interpret"), draw(impl="xla"))

    @pytest.mark.parametrize("bits", range(1, 9))
    def test_neighbors_and_mean(self, grid, bits):
        """Each code is a neighbor of its number, clipped to the grid, and the mean error is within 4 sigma of 0."""
        fmt = formats.get(f"int{bits}" if grid == "integer" else f"midrise{bits}")
        rng = np.random.default_rng(bits)
        u = (rng.standard_normal((64, 256)) * 2 ** (bits - 1) * 0.6).astype(np.float32)
        scales = np.exp2(rng.integers(-6, 6, 64)).astype(np.float32)
        codes = stochastic_codes(
            jnp.asarray(u * scales[:, None]), jnp.asarray(scales), KEY, bits=bits, grid=grid, impl="xla"
        )
        assert codes.dtype == jnp.uint8 and int(codes.max()) < 2**bits
        levels = np.asarray(fmt.levels)
        clipped = u.astype(np.float64).clip(levels[0], levels[-1])
        error = levels[np.asarray(codes)] - clipped
        assert np.abs(error).max() < 1
        lower = clipped - levels[0] - np.floor(clipped - levels[0])
        assert abs(error.mean()) < 4 * np.sqrt((lower * (1 - lower)).sum()) / error.size

    def test_nan_zero_scale_and_infinity(self, grid):
        x = jnp.asarray([[jnp.nan, 1.0, jnp.inf, -jnp.inf], [0.0, 5.0, -5.0, 2.0]], jnp.float32)
        codes = np.asarray(stochastic_codes(x, jnp.asarray([0.5, 0.0]), KEY, bits=3, grid=grid, impl="xla"))
        assert codes[0, 0] == 0 and codes[0, 2] == 7 and codes[0, 3] == 0
        assert set(codes[1]) <= ({4} if grid == "integer" else {3, 4})


def test_bad_input():
    x = matrix()
    with pytest.raises(TypeError, match=r"x of bfloat16.*float32"):
        stochastic.stochastic_round(x.astype(jnp.bfloat16), KEY, impl="xla")
    with pytest.raises(TypeError, match=r"dtype=float16.*bfloat16"):
        stochastic.stochastic_round(x, KEY, dtype=jnp.float16, impl="xla")
    with pytest.raises(TypeError, match=r"two uint32 words.*key_data"):
        stochastic.stochastic_round(x, jax.random.key(0), impl="xla")
    with pytest.raises(ValueError, match=r"key of shape \(4,\)"):
        stochastic.stochastic_round(x, jnp.zeros(4, jnp.uint32), impl="xla")
    with pytest.raises(ValueError, match=r"empty x"):
        stochastic.stochastic_round(x[:0], KEY, impl="xla")
    codes = functools.partial(stochastic.stochastic_codes, x, impl="xla")
    with pytest.raises(ValueError, match=r"bits=9.*1 to 8"):
        codes(jnp.ones(19), KEY, bits=9)
    with pytest.raises(ValueError, match=r"grid='float'.*midrise"):
        codes(jnp.ones(19), KEY, bits=4, grid="float")
    with pytest.raises(ValueError, match=r"scales of shape \(7,\); it takes \(19,\)"):
        codes(jnp.ones(7), KEY, bits=4)
    with pytest.raises(TypeError, match=r"scales of float16"):
        codes(jnp.ones(19, jnp.float16), KEY, bits=4)
