"""Codecs of optimizer states: their codes, scales, bytes, and what bad values do to their neighbors."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_jax import coding, formats, rounding
from lowbit_jax.optim import LINEAR4_WITHOUT_ZERO, UNSIGNED_DYNAMIC_TREE8, Blockwise, Companded, RankOne, Stored
from lowbit_jax.optim.dynamic_tree import tree_code
from lowbit_jax.optim.nearest_code import nearest_code, value_of
from lowbit_jax.optim.state_codecs import FIRST_MOMENT, SECOND_MOMENT, blocked_shape
from lowbit_jax.qtensor import QTensor
from tests.optim import reference

CODEBOOKS = [formats.DYNAMIC_TREE8, UNSIGNED_DYNAMIC_TREE8, formats.DYNAMIC_TREE4, formats.NF4, formats.POSIT8]
CODECS = {
    **{f"first {bits}": codec for bits, codec in FIRST_MOMENT.items()},
    **{f"second {bits}": codec for bits, codec in SECOND_MOMENT.items()},
    "int8": Blockwise(formats.INT8, 64),
    "mid-rise": Blockwise(formats.MIDRISE4, 32),
}


SHAPE = (16, 1024)  # what most tests share, so that each codec compiles once


@functools.partial(jax.jit, static_argnums=1)
def stored(x, codec):
    """(the stored array, what it decodes to)"""
    kept = Stored.of(x, codec)
    return kept, kept.dequantize()


def spread(shape, seed=0, positive=False):
    """Values whose sizes differ by orders of magnitude, between blocks and within them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 0, size=shape)
    x = (x * 10.0 ** rng.uniform(-4, 4, size=(*shape[:-1], 1))).astype(np.float32)
    return np.abs(x) if positive else x


def test_maps_are_the_published_ones():
    np.testing.assert_allclose(formats.DYNAMIC_TREE8.levels, reference.dynamic_map(True, 8), rtol=1e-12)
    np.testing.assert_allclose(formats.DYNAMIC_TREE4.levels, reference.dynamic_map(True, 4), rtol=1e-12)
    np.testing.assert_allclose(UNSIGNED_DYNAMIC_TREE8.levels, reference.dynamic_map(False, 8), rtol=1e-12)
    assert len(UNSIGNED_DYNAMIC_TREE8.levels) == 256
    assert LINEAR4_WITHOUT_ZERO.levels == tuple(range(1, 17)) and LINEAR4_WITHOUT_ZERO.bits == 4


@pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda f: f.name)
def test_nearest_code_at_every_decision_point(fmt):
    """On the grid, at both sides of every threshold, far outside, and at random over many decades."""
    grid = np.asarray(fmt.levels, np.float32)
    middles = ((grid[1:].astype(np.float64) + grid[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    random = rng.normal(size=20_000) * 10.0 ** rng.uniform(-9, 2, size=20_000)
    edges = [np.nextafter(middles, np.float32(s)) for s in (-np.inf, np.inf)]
    x = np.concatenate([grid, middles, *edges, random, [0.0, 1e30, -1e30, 1e-37]]).astype(np.float32)
    expected = coding.encode(rounding.nearest(jnp.asarray(x), fmt), fmt)
    codes = jax.jit(nearest_code, static_argnums=1)(jnp.asarray(x), fmt)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(value_of(codes, fmt), coding.decode(expected, fmt))


@pytest.mark.parametrize("fmt", CODEBOOKS[:3], ids=lambda f: f.name)
def test_codes_in_closed_form(fmt):
    """The reference's code on the grid and around thresholds; nearer than 5e-5 of a step it may be either."""
    grid = np.asarray(fmt.levels, np.float64)
    middles, steps = (grid[1:] + grid[:-1]) / 2, np.diff(grid)
    rng = np.random.default_rng(0)
    random = np.clip(rng.normal(size=200_000) * 10.0 ** rng.uniform(-9, 0.3, size=200_000), -1, 1)
    x = np.concatenate([grid, middles - 6e-5 * steps, middles + 6e-5 * steps, middles, random, [0.0, -0.0, 1.0]])
    x = np.clip(x, 0 if grid[0] == 0 else -1, 1).astype(np.float32)
    ours = np.asarray(jax.jit(tree_code, static_argnums=1)(jnp.asarray(x), fmt)).astype(int)
    expected = np.searchsorted(middles, x.astype(np.float64), side="right")
    off = np.flatnonzero(ours != expected)
    at = np.minimum(ours, expected)[off]
    assert np.all(np.abs(ours - expected)[off] == 1)
    assert np.all(np.abs(x[off] - middles[at]) <= 5e-5 * steps[at])
    assert off.size < len(middles) + 20


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_agree_with_the_published_algorithm(signed):
    """Same codes and scales as the transcription, for a shape in rows of blocks and one that is flattened and padded.

    A code may differ only where the normalized value lies on a threshold to float32 rounding."""
    codec = (FIRST_MOMENT if signed else SECOND_MOMENT)[8]
    table = reference.dynamic_map(signed, 8)
    middles = (table[1:] + table[:-1]) / 2
    for shape in ((24, 512), (37, 100)):
        x = spread(shape, positive=not signed)
        codes, scales = reference.quantize_blocks(x, table, 256, positive_stays=not signed)
        kept, back = stored(jnp.asarray(x), codec)
        parts = kept.parts
        ours = np.asarray(parts.words).reshape(-1)[: x.size].reshape(shape)
        np.testing.assert_array_equal(np.asarray(parts.scales[0]).reshape(-1), scales)
        flat = np.pad(x.reshape(-1), (0, -x.size % 256)).reshape(-1, 256)
        normal = (flat / scales[:, None]).reshape(-1)[: x.size].reshape(shape).astype(np.float64)
        nearest_edge = middles[np.clip(np.searchsorted(middles, normal), 0, 254)]
        below = middles[np.clip(np.searchsorted(middles, normal) - 1, 0, 254)]
        gap = np.minimum(np.abs(nearest_edge - normal), np.abs(below - normal)) / np.abs(normal)
        assert np.all(gap[ours != codes] < 1e-5)
        assert np.mean(ours != codes) < 1e-3
        np.testing.assert_allclose(back, reference.dequantize_blocks(ours, scales, table, 256), rtol=1e-6)


@pytest.mark.parametrize("name", [n for n in CODECS if "coat" not in n])
def test_decode_is_what_the_packed_array_stands_for(name):
    """The fast decoding equals `QTensor.dequantize`; decoded values are on the grid.

    But for the signed dynamic tree, which has no -1: a block whose largest magnitude is negative shrinks by its gap."""
    x = jnp.asarray(spread(SHAPE, positive="second" in name))
    kept, back = stored(x, CODECS[name])
    assert back.shape == SHAPE and back.dtype == jnp.float32
    np.testing.assert_allclose(back, jax.jit(QTensor.dequantize)(kept.parts).reshape(SHAPE), rtol=3e-7)
    if name not in ("first 8", "first 4"):
        np.testing.assert_allclose(stored(back, CODECS[name])[1], back, rtol=2e-6)


@pytest.mark.parametrize("shape", [(37, 100), (3, 64, 128), (5000,), (), (0, 7)])
def test_any_shape_comes_back(shape):
    """Padded, merged, scalar and empty: in memory order the blocks are those of the flattened array."""
    x = spread((30_000,))[: int(np.prod(shape, dtype=int))].reshape(shape)
    kept, back = stored(jnp.asarray(x), Blockwise(formats.INT8, 64))
    assert back.shape == shape == kept.shape
    flat = np.pad(x.reshape(-1), (0, -x.size % 64)).reshape(-1, 64)
    step = np.abs(flat).max(1, initial=0) / 127
    assert np.all(np.abs(np.pad(np.asarray(back).reshape(-1), (0, -x.size % 64)).reshape(-1, 64) - flat)
                  <= 0.5001 * step[:, None])  # fmt: skip


def test_rank_one_is_the_published_scheme():
    rng = np.random.default_rng(0)
    v = (rng.chisquare(3, (256, 192)) * 10.0 ** rng.uniform(-2, 2, (1, 192))).astype(np.float32)
    v[3] *= 1e2  # columns of unlike size, and an outlying row
    kept, back = stored(jnp.asarray(v), RankOne(LINEAR4_WITHOUT_ZERO))
    parts = kept.parts
    codes, rows, columns = reference.rank_one(v.astype(np.float64))
    words = np.asarray(parts.words)
    ours = np.stack([words & 15, words >> 4], -1).reshape(v.shape)
    assert np.mean(ours != codes) < 1e-4
    np.testing.assert_allclose(parts.scales[0][:, 0] * 16, rows, rtol=1e-6)
    np.testing.assert_allclose(parts.scales[1][0] * 16, columns, rtol=1e-6)
    assert float(np.min(back)) > 0, "no positive second moment decodes to zero"
    error = lambda b: float(np.mean(np.abs(np.sqrt(b) - np.sqrt(v)) / np.sqrt(v)))
    assert error(np.asarray(back)) < error(np.asarray(stored(jnp.asarray(v), Blockwise(LINEAR4_WITHOUT_ZERO, 96))[1]))


def test_rank_one_of_thin_arrays_uses_blocks():
    """Row maxima of a [4096, 4] array would take as much as its codes."""
    codec = RankOne(LINEAR4_WITHOUT_ZERO)
    for shape in ((4096, 4), (5000,)):
        kept = jax.eval_shape(lambda x: Stored.of(x, codec), jax.ShapeDtypeStruct(shape, jnp.float32))
        assert kept.nbytes <= 0.6 * kept.size


def test_companding_is_coats():
    """The values that get rounded, and the exponents, are those of the published form."""
    x = spread(SHAPE)
    kept, back = stored(jnp.asarray(x), Companded())
    parts = kept.parts
    target, k = reference.companded(x.astype(np.float64), 128, 448.0, 2.0**-9)
    np.testing.assert_array_equal(np.asarray(parts["k"]).reshape(-1), np.rint(16 * k))
    expected = target.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    ours = np.asarray(parts["words"]).view(ml_dtypes.float8_e4m3fn)
    off = ours.astype(np.float32) != expected.astype(np.float32)
    assert off.mean() < 2e-3, "only where the power lands on a threshold to float32 rounding"
    plain = stored(jnp.asarray(x), Blockwise(formats.E4M3, 256))[1]
    error = lambda y: np.mean(np.abs(np.asarray(y) - x) / np.abs(x))
    assert error(back) < error(plain), "bending fits a wider range"


@pytest.mark.parametrize("name", CODECS)
def test_zeros_stay_zeros(name):
    np.testing.assert_array_equal(stored(jnp.zeros(SHAPE), CODECS[name])[1], np.zeros(SHAPE))


@pytest.mark.parametrize("name", CODECS)
def test_one_bad_element_touches_no_other(name):
    x = spread(SHAPE, positive="second" in name)
    x[3, 300] = 0.0  # what a bad element counts as
    clean = stored(jnp.asarray(x), CODECS[name])[1]
    for bad in (np.nan, np.inf, -np.inf):
        x[3, 300] = bad
        spoiled = stored(jnp.asarray(x), CODECS[name])[1]
        assert np.isfinite(spoiled).all()
        np.testing.assert_array_equal(spoiled, clean)


@given(st.lists(st.integers(1, 40), min_size=0, max_size=4), st.sampled_from([8, 64, 128]))
@settings(max_examples=60, deadline=None)
def test_blocks_of_any_shape_are_those_of_the_flattened_array(shape, block):
    size = int(np.prod(shape, dtype=int))
    blocked = blocked_shape(tuple(shape), block)
    assert blocked[-1] % block == 0
    padded = int(np.prod(blocked, dtype=int)) - size
    assert 0 <= padded < block
    if padded:
        assert len(blocked) == 1


def test_bits():
    """Stored bits of an element, scales included."""
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32)
    bits = {n: 8 * jax.eval_shape(lambda x, c=c: Stored.of(x, c), x).nbytes / 2**19 for n, c in CODECS.items()}
    assert bits["first 8"] == 8.125 and bits["second 8"] == 8.125
    assert bits["first 4"] == 4.25 and bits["second 4"] < 4.1
    assert bits["first coat"] == 8 + 40 / 128


def test_a_block_needs_an_element():
    with pytest.raises(ValueError, match="at least 1 element"):
        Blockwise(formats.INT8, 0)
