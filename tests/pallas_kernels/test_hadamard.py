"""The fused rotation, fit, rounding and packing, and its way back, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton as plgpu
from scipy.linalg import hadamard

from pallas_kernels import hadamard as parts
from pallas_kernels import hadamard_chunks, launch, planes
from pallas_kernels import hadamard_quantize as kernel
from pallas_kernels.checks import NoKernel
from pallas_kernels.hadamard_backward import hadamard_backward
from pallas_kernels.hadamard_quantize import hadamard_quantize
from pallas_kernels.launch import Tile
from pallas_kernels.rounder import Rounder
from tests.pallas_kernels import ptx_scalar

SMALL = Tile(rows=16, columns=16, warps=1, stages=1)
ROWS = Tile(rows=16, columns=128, warps=1, stages=1, split=2)  # by whole rows, two groups a program
ALPHA = 0.6
pack = jax.jit(planes.pack, static_argnums=(1, 2))
unpack = jax.jit(planes.unpack, static_argnums=(1, 2, 3))


def rotated(x, block):
    if block is None:
        return x
    return (x.reshape(len(x), -1, block) @ hadamard(block) / np.sqrt(block)).reshape(x.shape)


def bits_of(mask, m, k):
    padded = jnp.pad(mask, ((0, 0), (0, planes.padded_n(m) - m), (0, 0)))
    return np.asarray(unpack((padded,), 1, m, k))


def quantize(x, axis, **options):
    return jax.jit(functools.partial(hadamard_quantize, axis=axis, **options))(x if axis == 1 else x.T)


def error_of_v(bits, k, dtype):
    """How far h/s may be from its exact value within the grid, in steps.

    h: products by +-1 are exact, 32 + 4 additions each within 2^-24 of the sum of |x| over a block, which is at most
    sqrt(block K) rms, and h has 1/sqrt(block) of it; float32 in two halves adds 2^-17 of the same. s: a sum of squares
    in some order of K terms whose partial sums grow (20 roundings of the last ones), a square root, an inverse, three
    products: 30 x 2^-24 of |v| <= 2^(b-1). Rounding: two multiply-adds of numbers up to 2^b."""
    length = np.sqrt(k) / ALPHA
    halves = 2.0**-17 * length if dtype == jnp.float32 else 0.0
    return 2.0**-24 * (36 * length + 30 * 2.0 ** (bits - 1) + 2 * 2.0**bits) + halves


CASES = [  # one piece and several, whole ones and halves, several rows a program and parts of a row
    (1, 5, 384, 128, jnp.bfloat16, 1, True),
    (2, 20, 256, 64, jnp.float16, 1, True),
    (3, 7, 640, 32, jnp.float32, 1, True),
    (4, 33, 384, 128, jnp.bfloat16, 1, False),
    (5, 18, 128, None, jnp.float32, 0, True),
    (6, 18, 256, 64, jnp.float32, 0, False),
    (7, 5, 384, 128, jnp.bfloat16, 0, True),
    (8, 20, 256, None, jnp.bfloat16, 1, False),
    (8, 17, 512, 32, jnp.float32, 0, True),
    (4, 2, 33 * 128, 128, jnp.bfloat16, 1, True),  # 17 pieces of which a program of 16 holds a part
]


@pytest.mark.parametrize(
    ("impl", "tile", "bits", "m", "k", "block", "dtype", "axis", "midrise"),
    [
        *(("interpret", SMALL, *case) for case in CASES), *(("xla", None, *case) for case in CASES[::3]),
        *(("interpret", ROWS, *case) for case in CASES if case[5] == 1),
        ("interpret", ROWS, 6, 9, 640, 64, jnp.bfloat16, 1, True),
        ("interpret", ROWS, 7, 5, 128, 128, jnp.float32, 1, False),
    ],
)  # fmt: skip
def test_codes_scales_sums_masks_and_words(bits, m, k, block, dtype, axis, midrise, impl, tile):
    random = np.random.default_rng(bits)
    x = jnp.asarray(random.standard_normal((m, k)) * np.exp(random.standard_normal((m, 1))), dtype).at[1].set(0)
    trust, half, low = 0.7 * 2.0 ** (bits - 1), 0.5 if midrise else 0.0, -(1 << bits - 1)
    exact = np.asarray(x, np.float64)
    scale = np.sqrt((exact**2).mean(1)) * ALPHA
    v = rotated(exact, block) / np.where(scale == 0, 1, scale)[:, None]
    codes = np.clip(np.round(v + half) - 2 * half, low, -low - 1)
    error = error_of_v(bits, k, dtype)
    at_tie = (np.abs(v + half - np.floor(v + half) - 0.5) < error) & (v != 0)  # zeros are exact, and so is their tie
    at_limit = np.abs(np.abs(v) - trust) < error
    assert at_tie.mean() < 0.02 and at_limit.mean() < 0.02 and len(np.unique(codes[2:] if m > 2 else codes)) > 1

    options = dict(bits=bits, alpha=ALPHA, block=block, midrise=midrise, trust=trust)
    got = quantize(x, axis, packed=True, impl=impl, tile=tile, **options)
    np.testing.assert_allclose(got.scales, scale, rtol=1e-6)
    np.testing.assert_array_equal(np.where(at_tie, codes, got.codes), codes)
    assert np.abs(np.asarray(got.codes) - codes).max() <= 1
    np.testing.assert_array_equal(got.sums, np.asarray(got.codes, np.int64).sum(1))
    np.testing.assert_array_equal(
        np.where(at_limit, 0, bits_of(got.mask, m, k)), np.where(at_limit, 0, np.abs(v) <= trust)
    )
    expected = pack(jnp.asarray(np.asarray(got.codes, np.int32) - low, jnp.uint8), bits, 8)
    for words, wanted in zip(got.words, expected, strict=True):
        np.testing.assert_array_equal(words, wanted)
    padding = pack(jnp.asarray(bits_of(got.mask, m, k)), 1, 8)[0][:, :m]
    np.testing.assert_array_equal(got.mask, padding)  # bits behind the end of a row are 0
    assert not ((np.asarray(got.codes[1], np.float32) + half) * np.asarray(got.scales[1])).any()  # zeros stay zeros


@pytest.mark.parametrize(
    ("impl", "tile", "axis"),
    [("xla", None, 0), ("xla", None, 1), ("interpret", SMALL, 0), ("interpret", SMALL, 1), ("interpret", ROWS, 1)],
)
def test_a_row_that_is_not_finite_leaves_the_others_alone(axis, impl, tile):
    m, k = 20, 384
    x = np.random.default_rng(0).standard_normal((m, k)).astype(np.float32)
    broken = x.copy()
    broken[3, 7], broken[11, 300], broken[12, 5] = np.nan, np.inf, 3e19
    others = np.delete(np.arange(m), [3, 11, 12])
    run = lambda x: quantize(jnp.asarray(x), axis, bits=3, alpha=ALPHA, trust=2.0, packed=True, impl=impl, tile=tile)
    whole, got = run(x), run(broken)
    for a, b in ((whole.codes, got.codes), (whole.scales, got.scales), (whole.sums, got.sums)):
        np.testing.assert_array_equal(a[others], b[others])
    for a, b in zip((whole.mask, *whole.words), (got.mask, *got.words), strict=True):
        np.testing.assert_array_equal(a[:, others], b[:, others])
    assert np.isnan(got.scales[np.asarray([3, 11, 12])]).all()


def test_without_trust_and_packing_there_is_neither():
    x = jnp.ones((3, 256), jnp.bfloat16)
    for impl in ("interpret", "xla"):
        got = quantize(x, 1, bits=4, alpha=ALPHA, impl=impl)
        assert got.mask is None and got.words is None


@pytest.mark.parametrize(
    ("block", "dtype", "axis"),
    [(128, jnp.bfloat16, 1), (32, jnp.float16, 0), (64, jnp.bfloat16, 0), (None, jnp.bfloat16, 1)],
)
@pytest.mark.parametrize("tile", [SMALL, ROWS], ids=["pieces", "chunks"])
def test_gradients_are_masked_and_rotated_back(block, dtype, axis, tile):
    m, k = 20, 384
    random = np.random.default_rng(0)
    g = jnp.asarray(random.standard_normal((m, k)), dtype)
    kept = random.integers(0, 2, (m, k)).astype(np.uint8)
    words = pack(jnp.asarray(kept), 1, 8)[0][:, :m]
    expected = rotated(np.asarray(g, np.float64) * kept, block)
    largest = np.abs(np.asarray(g, np.float64)).reshape(m, -1, block or 1).sum(2).max() / np.sqrt(block or 1)
    for impl in ("interpret", "xla") if tile is SMALL else ("interpret",):
        run = lambda out_dtype, impl=impl: jax.jit(
            functools.partial(hadamard_backward, block=block, axis=axis, out_dtype=out_dtype, tile=tile, impl=impl)
        )(g, words)
        exact, dx = run(jnp.float32), run(None)
        exact = exact if axis == 1 else exact.T
        assert dx.dtype == dtype and dx.shape == ((m, k) if axis == 1 else (k, m))
        np.testing.assert_allclose(exact, expected, rtol=0, atol=largest * 130 * 2.0**-24)  # so many additions
        np.testing.assert_array_equal(dx if axis == 1 else dx.T, exact.astype(dtype))


@pytest.mark.parametrize(("chunks", "split"), [(4, 3), (4, 8), (12, 8), (5, 4), (16, 4)])
def test_chunks_behind_the_end_are_not_written(chunks, split):
    """Into an array that has room for them, where their values would show."""
    m, k, tile = 16, 128 * chunks, Tile(rows=16, columns=128, stages=1, split=split)
    kernel, grid = hadamard_chunks.work(m, k, 128, 1, tile)
    g, mask = jnp.ones((m, 2 * k), jnp.bfloat16), jnp.full((chunks, m, 32), -1, jnp.int8)
    matrix = jnp.asarray(parts.signed_blocks(128), jnp.bfloat16)
    out_shape = jax.ShapeDtypeStruct((m, 2 * k), jnp.float32)
    got = launch.call(kernel, "chunks", "interpret", tile, grid=grid, out_shape=out_shape)(g, mask, matrix)
    assert np.isfinite(got[:, :k]).all() and np.isnan(got[:, k:]).all()


def test_whole_rows_of_large_numbers_keep_their_scale():
    """Squares that float32 holds, of numbers whose rotated squares would be beyond it before they are normalized."""
    x = jnp.full((2, 128), 1e18, jnp.bfloat16)
    for tile in (SMALL, ROWS):
        scales = quantize(x, 1, bits=4, alpha=0.3, impl="interpret", tile=tile).scales
        np.testing.assert_allclose(scales, 0.3 * float(x[0, 0]), rtol=1e-6)


class TestAssembly:
    """The assembly and its twins, run in NumPy, on numbers that settle where they differ."""

    @pytest.fixture(autouse=True)
    def assembly_on_cpu(self, monkeypatch):
        monkeypatch.setattr(plgpu, "elementwise_inline_asm", ptx_scalar.run)

    @pytest.mark.parametrize("bits", range(1, 9))
    @pytest.mark.parametrize("midrise", [True, False])
    def test_codes(self, bits, midrise):
        """Every eighth of a step over twice the grid: steps, the tie at zero, what is beyond, what is not finite."""
        top = 1 << bits
        h = np.concatenate([np.arange(-8 * top, 8 * top) / 8, [0.0, np.nan, np.inf, -np.inf]]).astype(np.float32)
        h, gain = h[None], np.full((1, 1), 1 / (top - 1), np.float32)
        by_hand, twin = Rounder(bits, midrise, True), Rounder(bits, midrise, False)
        half = 0.5 if midrise else 0.0
        expected = np.clip(np.round(h + half) - 2 * half, -top // 2, top // 2 - 1)
        with np.errstate(invalid="ignore"):
            near = ((h + half) % 1 == 0.5) & (h != 0) | ~np.isfinite(
                h
            )  # the gain is rounded, and ties but that of 0 with it
        for rounder in (by_hand, twin):
            found = np.asarray(rounder(h, gain))
            codes = np.asarray(rounder.int8(found), np.int64)
            np.testing.assert_array_equal(np.where(near, 0, codes), np.where(near, 0, expected))
            assert codes.min() >= -top // 2 and codes.max() < top // 2  # NaN too: it does not spill into other fields
            np.testing.assert_array_equal(codes[0, -2:], [top // 2 - 1, -top // 2])
            sums = rounder.sums(jnp.asarray(found.astype(np.int64).sum(1).astype(np.uint32).view(np.int32)), h.size, 0)
            np.testing.assert_array_equal(sums, codes.sum(1))
            above = bits
            for field in planes.FIELDS[bits]:
                above -= field
                [word] = np.asarray(rounder.field([jnp.asarray(found)], 0, field, above))
                np.testing.assert_array_equal(word & 255, ((codes[0] + top // 2) >> above) & ((1 << field) - 1))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_squares(self, dtype):
        part = jnp.asarray(np.arange(-32, 32).reshape(2, 32) / 8, dtype)
        total = np.arange(64, dtype=np.float32).reshape(2, 32)
        for assembly in (True, False):
            np.testing.assert_array_equal(
                kernel._squares(total, part, assembly), total + np.asarray(part, np.float32) ** 2
            )

    def test_beyond_the_limit(self):
        h = np.float32([[-3, -2, -1, -0.0, 0, 1, 2, 3]])
        word = np.arange(8, dtype=np.int32)[None]
        for assembly in (True, False):
            found = kernel._beyond(word, h, np.float32([[2]]), assembly)
            np.testing.assert_array_equal(found, 2 * word + (np.abs(h) > 2))

    def test_halves(self):
        x = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
        high, low = parts.halves(x, True)
        for a, b in zip((high, low), parts.halves(jnp.asarray(x), False), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        assert (np.abs(np.asarray(high, np.float64) + np.asarray(low, np.float64) - x) <= 2.0**-17 * np.abs(x)).all()


def test_no_kernel_and_bad_calls_say_why():
    x = jnp.zeros((4, 96), jnp.bfloat16)
    shape = jax.ShapeDtypeStruct
    with pytest.raises(NoKernel, match="K=96"):
        hadamard_quantize(x, bits=4, alpha=0.3, block=32)
    for options, said in [
        (dict(bits=9, alpha=0.3), "bits=9"),
        (dict(bits=4, alpha=0.3, block=128), "block=128"),
        (dict(bits=4, alpha=0.0, block=32), "alpha=0.0"),
        (dict(bits=4, alpha=0.3, block=32, axis=2), "axis=2"),
        (dict(bits=4, alpha=0.3, block=32, trust=0.0), "trust=0.0"),
        (dict(bits=4, alpha=0.3, block=32, trust=-1.0), "trust=-1.0"),
        (dict(bits=4, alpha=0.3, block=32, trust=float("nan")), "trust=nan"),
    ]:
        with pytest.raises(ValueError, match=said):
            hadamard_quantize(x, impl="xla", **options)
    with pytest.raises(ValueError, match="mask of shape"):
        jax.eval_shape(hadamard_backward, shape((4, 256), jnp.bfloat16), shape((2, 4, 32), jnp.int8))
    with pytest.raises(ValueError, match="axis=2"):
        jax.eval_shape(
            functools.partial(hadamard_backward, axis=2), shape((4, 256), jnp.bfloat16), shape((1, 4, 32), jnp.int8)
        )
    long = dict(bits=4, alpha=0.3, tile=Tile(rows=16, columns=128, stages=1))
    with pytest.raises(ValueError, match=r"tile\.columns=128 for K=16512\. Rows are taken whole up to 16384"):
        jax.eval_shape(functools.partial(hadamard_quantize, **long), shape((4, 129 * 128), jnp.bfloat16))
    padded = shape((135300, 15872), jnp.bfloat16)  # 2^31 elements only with the rows that words have more
    with pytest.raises(ValueError, match="32 bits"):
        jax.eval_shape(functools.partial(hadamard_quantize, bits=8, alpha=0.3, packed=True, impl="xla"), padded)
    large = shape((1 << 23, 256), jnp.bfloat16)
    with pytest.raises(ValueError, match="32 bits"):
        jax.eval_shape(functools.partial(hadamard_quantize, bits=4, alpha=0.3), large)
    with pytest.raises(ValueError, match="32 bits"):
        jax.eval_shape(hadamard_backward, large, shape((1, 1 << 23, 32), jnp.int8))
