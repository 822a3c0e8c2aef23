"""FP8 products, interpreted and by XLA, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import matmul_fp8 as kernel
from pallas_kernels.checks import NoKernel
from pallas_kernels.launch import Tile
from pallas_kernels.matmul_fp8 import matmul_fp8
from tests.pallas_kernels.compiled import compiled

E4M3, E5M2 = kernel.DTYPES
M, N, K = 19, 40, 200
matmul = compiled(matmul_fp8)
GROUPS = 2
SCALES = {  # shapes of the scales of x and of w
    "tensor": ((), ()), "rows": ((M,), (N,)), "blocks": ((M, GROUPS), (1, GROUPS)), "groups": ((M,), (N, GROUPS)),
}  # fmt: skip
SMALL = Tile(rows=16, columns=32, stages=1)


def operands(a, b, scales, seed=0):
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((M, K)) * 30, rng.standard_normal((N, K)) * np.exp(rng.standard_normal((N, 1)))
    drawn = [np.exp(rng.standard_normal(shape)).astype(np.float32) for shape in SCALES[scales]]
    return jnp.asarray(x, a), jnp.asarray(w, b), *map(jnp.asarray, drawn)


def by_element(scales, rows):
    """The scale of each element of a [rows, K] operand, float64."""
    s = np.asarray(scales, np.float64)
    if s.ndim < 2:
        return np.broadcast_to(s.reshape(-1, 1), (rows, K))
    return np.broadcast_to(s, (rows, GROUPS)).repeat(128, axis=1)[:, :K]


def check(y, x, w, x_scales, w_scales, dtype):
    a = np.asarray(x, np.float64) * by_element(x_scales, M)
    b = np.asarray(w, np.float64) * by_element(w_scales, N)
    rounding = float(jnp.finfo(dtype).eps) / 2 * np.abs(a @ b.T) * 1.01
    tolerance = rounding + (K + 4) * 2.0**-23 * (np.abs(a) @ np.abs(b).T)
    assert y.dtype == dtype and y.shape == (M, N)
    assert (np.abs(np.asarray(y, np.float64) - a @ b.T) <= tolerance).all()


@pytest.mark.parametrize("impl", ("xla", "interpret"))
class TestProduct:
    @pytest.mark.parametrize("scales", SCALES)
    def test_scales(self, impl, scales):
        x, w, *s = operands(E4M3, E4M3, scales)
        check(matmul(x, w, *s, out_dtype=jnp.float32, tile=SMALL, impl=impl), x, w, *s, jnp.float32)

    @pytest.mark.parametrize("a, b", ((E4M3, E5M2), (E5M2, E4M3), (E5M2, E5M2)))
    def test_pairs_of_dtypes(self, impl, a, b):
        x, w, *s = operands(a, b, "rows")
        check(matmul(x, w, *s, out_dtype=jnp.float32, tile=SMALL, impl=impl), x, w, *s, jnp.float32)

    @pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
    def test_result_dtypes_and_default_tiles(self, impl, dtype):
        x, w, *s = operands(E4M3, E4M3, "rows")
        check(matmul(x / 8, w, *s, out_dtype=dtype, impl=impl), x / 8, w, *s, dtype)


@pytest.mark.parametrize("through", ("float8", "float16", "bits"))
@pytest.mark.parametrize("tile", (Tile(rows=16, columns=64, split=2), Tile(rows=32, columns=16)), ids=str)
def test_ways_and_tiles(through, tile):
    x, w, *s = operands(E4M3, E4M3, "blocks")
    y = matmul(x, w, *s, out_dtype=jnp.float32, through=through, tile=tile, impl="interpret")
    check(y, x, w, *s, jnp.float32)


class TestHopper:
    """impl="mosaic", whose interpreter models shared memory, barriers and warp groups."""

    def test_promotes_and_scales_by_group(self):
        mosaic = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
        if not hasattr(mosaic, "force_gpu_interpret_mode"):
            pytest.skip("JAX before 0.11 does not interpret Mosaic GPU kernels")
        x, w, *s = operands(E5M2, E4M3, "blocks")
        with mosaic.force_gpu_interpret_mode():
            y = matmul_fp8(x, w, *s, out_dtype=jnp.float32, tile=Tile(rows=128, columns=64), impl="mosaic")
        check(y, x, w, *s, jnp.float32)

    def test_bad_input(self):
        x, w, *s = operands(E4M3, E4M3, "rows")
        with pytest.raises(ValueError, match=r"through='float16' with impl='mosaic'.*drop"):
            matmul_fp8(x, w, *s, through="float16", impl="mosaic")
        with pytest.raises(ValueError, match=r"rows=16.*It takes 128 rows"):
            matmul_fp8(x, w, *s, tile=SMALL, impl="mosaic")


@pytest.mark.parametrize("dtype", kernel.DTYPES, ids=lambda dtype: dtype.__name__)
def test_widening_by_bits(dtype):
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    got = np.asarray(kernel._widened(jnp.asarray(codes), dtype), np.float32)
    np.testing.assert_array_equal(got, codes.view(dtype).astype(np.float32))


def test_bad_input():
    x, w, *s = operands(E4M3, E4M3, "rows")
    call = functools.partial(matmul_fp8, impl="xla")
    with pytest.raises(TypeError, match=r"x of bfloat16.*float8_e4m3fn"):
        call(x.astype(jnp.bfloat16), w, *s)
    with pytest.raises(ValueError, match=r"w is \[N, K\]"):
        call(x, w[:, :-1], *s)
    with pytest.raises(ValueError, match=r"x_scales of shape \(20,\) for M=19.*\(19, 2\)"):
        call(x, w, jnp.ones(20), s[1])
    with pytest.raises(ValueError, match=r"w_scales of shape \(2, 2\).*\(1, 2\)"):
        call(x, w, s[0], jnp.ones((2, 2)))
    with pytest.raises(TypeError, match=r"w_scales of bfloat16"):
        call(x, w, s[0], s[1].astype(jnp.bfloat16))
    with pytest.raises(TypeError, match=r"out_dtype=int32"):
        call(x, w, *s, out_dtype=jnp.int32)
    with pytest.raises(ValueError, match=r"through='int8'.*float16"):
        call(x, w, *s, through="int8")
    with pytest.raises(NoKernel, match=r"one dtype only.*through='float16'"):
        matmul_fp8(x, w.astype(E5M2), *s, through="float8", impl="interpret")
    with pytest.raises(ValueError, match=r"tile.split=4.*2 steps of 128"):
        matmul_fp8(x, w, *s, tile=Tile(split=4), impl="interpret")
    with pytest.raises(ValueError, match=r"empty x"):
        call(x[:0], w, jnp.ones(0), s[1])


def test_default_tile_reads_the_table(tmp_path, monkeypatch):
    from pallas_kernels import tuning

    monkeypatch.setenv("LOWBIT_JAX_TUNING", str(tmp_path / "tuning.json"))
    key = tuning.key("matmul_fp8", 8, 16, 4096, 4096)
    tuning.store({key: dict(rows=32, columns=128, warps=8)}, "NVIDIA H200")
    with tuning.on_chip("NVIDIA H200"):
        assert kernel.default_tile(16, 4096, 4096) == Tile(rows=32, columns=128, warps=8)
        assert kernel.default_tile(4096, 4096, 4096) == Tile(rows=128, columns=128, warps=8)


def test_batches_and_jit():
    x, w, *s = operands(E4M3, E4M3, "rows")
    xs = jnp.stack([x, x[::-1]])
    y = jax.jit(jax.vmap(functools.partial(matmul_fp8, out_dtype=jnp.float32, impl="xla"), (0, None, None, None)))
    got = y(xs, w, *s)
    check(got[0], x, w, *s, jnp.float32)
    check(got[1], x[::-1], w, *s, jnp.float32)
