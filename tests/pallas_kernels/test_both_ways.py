"""Codes of rows and columns at once: interpreted and by XLA, against float64 and against the library's quantizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from pallas_kernels.both_ways import quantize_both_ways
from pallas_kernels.launch import Tile

CASES = [
    ((40, 70), Tile(rows=16, columns=32, stages=1), jnp.float32),
    ((64, 256), None, jnp.bfloat16),
    ((17, 300), Tile(rows=32, columns=64), jnp.float16),
]


def operands(shape, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    g = jnp.asarray(rng.standard_normal(shape), dtype)
    weights = (jnp.asarray(np.exp(rng.standard_normal(n)), jnp.float32) for n in reversed(shape))
    return g, *weights


@pytest.mark.parametrize(("shape", "tile", "dtype"), CASES)
@pytest.mark.parametrize("impl", ("xla", "interpret"))
def test_against_float64(impl, shape, tile, dtype):
    g, v, u = operands(shape, dtype)
    got = jax.jit(lambda *x: quantize_both_ways(*x, tile=tile, impl=impl))(g, v, u)
    exact = np.asarray(g, np.float64)
    for codes, scales, weighted in (
        (got.rows, got.row_scales, exact * np.asarray(v, np.float64)[None, :]),
        (got.columns, got.column_scales, (exact * np.asarray(u, np.float64)[:, None]).T),
    ):
        step = np.abs(weighted).max(1) / 127
        np.testing.assert_allclose(scales, step, rtol=3e-7)
        steps = weighted / step[:, None]
        assert codes.dtype == jnp.int8 and codes.shape == weighted.shape
        assert np.abs(np.asarray(codes, np.float64) - steps).max() < 0.5 + 1e-4
        assert np.abs(np.asarray(codes, np.int32)).max(1).min() == 127


@pytest.mark.parametrize("impl", ("xla", "interpret"))
def test_it_is_the_quantizer_of_an_int8_cotangent(impl):
    g, v, u = operands((48, 96))
    gemm = lb.quest(4, backward=8).grad_lhs
    assert isinstance(gemm.folded, lb.Quantizer)
    got = quantize_both_ways(g, v, u, tile=Tile(rows=16, columns=32, stages=1), impl=impl)
    for codes, scales, weighted in (
        (got.rows, got.row_scales, g * v[None, :]), (got.columns, got.column_scales, (g * u[:, None]).T)
    ):  # fmt: skip
        values, own = gemm.folded.elements(weighted)
        np.testing.assert_array_equal(codes, values)
        np.testing.assert_array_equal(scales, own[:, 0])


@pytest.mark.parametrize("impl", ("xla", "interpret"))
@pytest.mark.parametrize(("shape", "tile", "dtype"), CASES[1:])
def test_what_is_not_finite_and_zeros(impl, shape, tile, dtype):
    g, v, u = operands(shape, dtype)
    g = g.at[3].set(0).at[:, 5].set(0).at[7, 9].set(jnp.nan).at[8, 11].set(jnp.inf)
    got = jax.jit(lambda *x: quantize_both_ways(*x, tile=tile, impl=impl))(g, v, u)
    assert np.flatnonzero(np.isnan(got.row_scales)).tolist() == [7, 8]
    assert np.flatnonzero(np.isnan(got.column_scales)).tolist() == [9, 11]
    assert got.row_scales[3] == 1 and got.column_scales[5] == 1
    assert not got.rows[3].any() and not got.columns[5].any()


def test_bad_operands():
    g, v, u = operands((40, 70))
    with pytest.raises(ValueError, match=r"along_columns of shape \(40,\); it takes \(70,\)"):
        quantize_both_ways(g, u, v, impl="xla")
    with pytest.raises(TypeError, match="g of int32; it takes bfloat16 or float16 or float32"):
        quantize_both_ways(g.astype(jnp.int32), v, u, impl="xla")
    with pytest.raises(TypeError, match="along_rows of float16"):
        quantize_both_ways(g, v, u.astype(jnp.float16), impl="xla")
    with pytest.raises(ValueError, match=r"tile\.split=2.*take split=1"):
        quantize_both_ways(g, v, u, tile=Tile(split=2), impl="interpret")
