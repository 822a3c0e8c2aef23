"""The product of int8 codes, interpreted and by XLA, against float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import matmul_i8 as kernel
from pallas_kernels import matmul_i8_hopper, tuning
from pallas_kernels.chips import abstract_gpu
from pallas_kernels.launch import Tile
from pallas_kernels.matmul_i8 import matmul_i8

M, N, K = 19, 40, 200
SMALL = Tile(rows=16, columns=32, stages=1)


def operands(m=M, n=N, k=K, seed=0):
    """Codes over all of int8, and scales that differ from row to row."""
    rng = np.random.default_rng(seed)
    x, w = (rng.integers(-128, 128, (rows, k)).astype(np.int8) for rows in (m, n))
    s, t = (np.exp(rng.standard_normal(rows)).astype(np.float32) for rows in (m, n))
    return tuple(map(jnp.asarray, (x, w, s, t)))


def options(x, w, offsets, dtype) -> dict[str, Any]:
    sums = [jnp.asarray(np.asarray(a, np.int32).sum(1)) for a in (x, w)]
    return dict(x_offset=offsets[0], w_offset=offsets[1], x_sums=sums[0], w_sums=sums[1], out_dtype=dtype)


def check(y, x, w, s, t, offsets, dtype):
    """Five roundings to float32 (the integer, three terms or fewer, two scales) and one to the result's dtype."""
    a, b = np.asarray(x, np.float64), np.asarray(w, np.float64)
    scale = np.outer(np.asarray(s, np.float64), np.asarray(t, np.float64))
    exact = (a + offsets[0]) @ (b + offsets[1]).T * scale
    terms = np.abs(a @ b.T) + np.abs(offsets[1] * a.sum(1))[:, None] + np.abs(offsets[0] * b.sum(1))[None, :]
    terms += K * offsets[0] * offsets[1]
    tolerance = 6 * 2.0**-24 * terms * scale + float(jnp.finfo(dtype).eps) / 2 * np.abs(exact) * 1.01
    assert y.dtype == dtype and y.shape == exact.shape
    assert (np.abs(np.asarray(y, np.float64) - exact) <= tolerance).all()


@pytest.mark.parametrize("impl", ("xla", "interpret"))
class TestProduct:
    @pytest.mark.parametrize("offsets", ((0.0, 0.0), (0.5, 0.5), (0.0, 0.5), (-3.0, 0.0)))
    def test_offsets(self, impl, offsets):
        x, w, s, t = operands()
        given = options(x, w, offsets, jnp.float32)
        y = matmul_i8(x, w, s, t, **given, tile=SMALL, impl=impl)
        check(y, x, w, s, t, offsets, jnp.float32)

    @pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
    def test_result_dtypes_and_default_tiles(self, impl, dtype):
        x, w, s, t = operands()
        y = matmul_i8(x, w, s / 64, t / 64, **options(x, w, (0.5, 0.5), dtype), impl=impl)
        check(y, x, w, s / 64, t / 64, (0.5, 0.5), dtype)


@pytest.mark.parametrize("tile", (Tile(rows=16, columns=256), Tile(rows=32, columns=16)), ids=str)
@pytest.mark.parametrize("k", (96, 256))
def test_tiles_and_edges(tile, k):
    """More groups of programs than one, two accumulators, and a contraction with a rest or without."""
    x, w, s, t = operands(m=150, n=300 if tile.columns == 256 else 33, k=k)
    y = matmul_i8(x, w, s, t, out_dtype=jnp.float32, tile=tile, impl="interpret")
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T * np.outer(np.float64(s), np.float64(t))
    np.testing.assert_allclose(y, exact, rtol=4 * 2.0**-24, atol=0)


def test_every_tile_once():
    """The order of programs is a permutation of the tiles, groups of rows first."""
    for down, across in ((1, 1), (3, 5), (8, 2), (19, 7)):
        places = [tuple(map(int, kernel._place(p, down=down, across=across))) for p in range(down * across)]
        assert sorted(places) == [(m, n) for m in range(down) for n in range(across)]
        assert places[: min(down, kernel._GROUP)] == [(m, 0) for m in range(min(down, kernel._GROUP))]


def test_the_largest_sums_fit_int32():
    k = kernel.LONGEST
    x = jnp.full((1, k), -128, jnp.int8)
    y = matmul_i8(x, x, jnp.ones(1), jnp.ones(1), out_dtype=jnp.float32, impl="xla")
    assert float(y[0, 0]) == np.float32(k * 2**14) and k * 2**14 < 2**31 <= (k + 1) * 2**14


def test_default_tiles(tmp_path, monkeypatch):
    """Two accumulators where they do not spill and the tiles still fill the chip; the table goes before."""
    monkeypatch.setattr(tuning, "PACKAGED", tmp_path / "none.json")
    with abstract_gpu("sm_90"):
        assert kernel.default_tile(4096, 14336, 4096) == Tile(rows=128, columns=256, warps=8)
        assert kernel.default_tile(2048, 2048, 2048) == Tile(rows=128, columns=128, warps=8)
        assert kernel.default_tile(4, 4096, 4096) == Tile(rows=16, columns=64, warps=4)
    with abstract_gpu("sm_80"):
        assert kernel.default_tile(4096, 14336, 4096) == Tile(rows=128, columns=128, warps=8)
    monkeypatch.setenv("LOWBIT_JAX_TUNING", str(tmp_path / "tuning.json"))
    tuning.store({tuning.key("matmul_i8", 8, 16, 4096, 4096): dict(rows=32, columns=128, warps=8)}, "NVIDIA H200")
    with tuning.on_chip("NVIDIA H200"):
        assert kernel.default_tile(16, 4096, 4096) == Tile(rows=32, columns=128, warps=8)


def test_bad_input():
    x, w, s, t = operands()
    call = functools.partial(matmul_i8, impl="xla")
    with pytest.raises(TypeError, match=r"x of uint8.*int8"):
        call(x.astype(jnp.uint8), w, s, t)
    with pytest.raises(ValueError, match=r"w is \[N, K\]"):
        call(x, w[:, :-1], s, t)
    with pytest.raises(ValueError, match=r"x_scales of shape \(40,\).*\(19,\)"):
        call(x, w, t, t)
    with pytest.raises(TypeError, match=r"w_scales of bfloat16"):
        call(x, w, s, t.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"w_offset=0.5 and no x_sums.*hadamard_quantize"):
        call(x, w, s, t, w_offset=0.5)
    with pytest.raises(ValueError, match=r"x_offset=1.0 and no w_sums"):
        call(x, w, s, t, x_offset=1.0)
    with pytest.raises(TypeError, match=r"x_sums of float32"):
        call(x, w, s, t, w_offset=0.5, x_sums=s)
    with pytest.raises(TypeError, match=r"out_dtype=int32"):
        call(x, w, s, t, out_dtype=jnp.int32)
    with pytest.raises(ValueError, match=r"K=131072.*overflow"):
        call(jnp.zeros((1, 1 << 17), jnp.int8), jnp.zeros((1, 1 << 17), jnp.int8), s[:1], t[:1])
    with pytest.raises(ValueError, match=r"impl='cuda'"):
        matmul_i8(x, w, s, t, impl="cuda")
    with pytest.raises(ValueError, match=r"tile.split=2"):
        matmul_i8(x, w, s, t, tile=Tile(split=2), impl="interpret")


class TestHopper:
    """What impl="mosaic" takes; its numbers need a GPU (`python -m benchmarks.gpu`), its instructions a compiler."""

    @pytest.mark.parametrize(
        "chip, sizes, expected",
        [("sm_90", (4096, 14336, 4096), "mosaic"), ("sm_90", (128, 128, 128), "mosaic"),
         ("sm_90", (4096, 14336, 4080), "triton"), ("sm_90", (100, 128, 128), "triton"),
         ("sm_80", (4096, 14336, 4096), "triton"), ("sm_100", (4096, 14336, 4096), "triton")],
    )  # fmt: skip
    def test_best(self, chip, sizes, expected):
        with abstract_gpu(chip):
            found = kernel.best(*sizes)
        assert found == (expected if jax.__version_info__ >= (0, 11) else "triton")

    @pytest.mark.parametrize(
        "m, n, rows, columns",
        [
            (4096, 14336, 128, 256),
            (256, 65664, 256, 128),
            (2048, 4096, 128, 256),
            (2048, 2048, 128, 128),
            (1024, 1024, 128, 128),
        ],
    )
    def test_the_largest_tile_that_leaves_no_multiprocessor_idle(self, m, n, rows, columns):
        tile = matmul_i8_hopper.default_tile(m, n, 1024)
        assert (tile.rows, tile.columns) == (rows, columns) and matmul_i8_hopper.why_not(m, n, 1024, tile) is None

    def test_sizes_and_tiles_that_do_not_fit(self):
        x, w, s, t = operands(m=128, n=100, k=128)
        with pytest.raises(ValueError, match="matmul_i8 got M=128, N=100, K=128.*impl='triton' takes any"):
            matmul_i8(x, w, s, t, impl="mosaic")
        x, w, s, t = operands(m=128, n=128, k=128)
        with pytest.raises(ValueError, match="it takes 128 x 256, 256 x 128 or 128 x 128"):
            matmul_i8(x, w, s, t, tile=Tile(rows=64, columns=64), impl="mosaic")
