"""The packed products, kernel body and XLA reference, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import planes
from pallas_kernels.launch import Tile
from pallas_kernels.matmul_a8 import matmul_a8
from pallas_kernels.matmul_a16 import matmul_a16

SMALL = dict(rows=16, columns=32)


def relative(y, reference):
    return np.abs(np.asarray(y, np.float64) - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize(
    ("bits", "m", "n", "k", "group", "zeros", "dtype", "split"),
    [  # every width; odd rows, channels and lengths; all groups, zero points, dtypes and splits among them
        (1, 5, 40, 1024, None, "half", jnp.bfloat16, 2),
        (2, 16, 32, 320, 32, None, jnp.bfloat16, 1),
        (3, 3, 32, 512, 64, "array", jnp.float16, 1),
        (4, 17, 64, 512, 128, "half", jnp.bfloat16, 2),
        (5, 1, 33, 700, None, None, jnp.bfloat16, 1),
        (6, 16, 32, 512, 128, "array", jnp.bfloat16, 1),
        (7, 2, 32, 512, None, "half", jnp.float16, 1),
        (8, 16, 32, 256, 64, None, jnp.bfloat16, 2),
    ],
)
def test_16_bit_activations(bits, m, n, k, group, zeros, dtype, split):
    random = np.random.default_rng(bits)
    codes = random.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    size = group or k
    scales = (random.random((k // size, n)) + 0.5).astype(np.float32)
    x = jnp.asarray(random.standard_normal((m, k)) + 0.3, dtype)
    zero = {None: float(1 << (bits - 1)), "half": ((1 << bits) - 1) / 2}.get(zeros)
    if zeros == "array":
        zero = (random.random((k // size, n)) * (1 << bits)).astype(np.float32)
    each = np.repeat(zero, size, 0).T if zeros == "array" else zero
    w = (codes - each) * np.repeat(scales, size, 0).T.astype(np.float64)
    reference = np.asarray(x, np.float64) @ w.T
    given = None if zeros is None else jnp.asarray(zero) if zeros == "array" else zero
    words = planes.pack(jnp.asarray(codes), bits)
    tolerance = float(jnp.finfo(dtype).eps)  # the rounding of the result; sums are float32
    for options in (dict(impl="interpret", tile=Tile(**SMALL, split=split)), dict(impl="xla")):
        y = matmul_a16(x, words, jnp.asarray(scales), given, bits=bits, group=group, **options)
        assert y.dtype == dtype and y.shape == (m, n)
        assert relative(y, reference) < tolerance


@pytest.mark.parametrize("bits", range(1, 9))
def test_int8_activations_are_exact(bits):
    m, n, k, split = (5, 40, 384, 1) if bits % 2 else (16, 32, 1024, 2)
    random = np.random.default_rng(bits)
    codes = random.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    x = random.integers(-128, 128, (m, k)).astype(np.int8)
    words = planes.pack(jnp.asarray(codes), bits, 8)
    ones = jnp.ones(m, jnp.float32), jnp.ones(n, jnp.float32)
    zero = 0 if bits == 1 else 1 << (bits - 1)
    exact = x.astype(np.int64) @ (codes.astype(np.int64) - zero).T  # below 2^24 or rounded once
    for options in (dict(impl="interpret", tile=Tile(**SMALL, split=split)), dict(impl="xla")):
        y = matmul_a8(jnp.asarray(x), ones[0], words, ones[1], bits=bits, w_zero=zero, out_dtype=jnp.float32, **options)
        np.testing.assert_array_equal(y, exact.astype(np.float32))


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_half_zero_points_and_scales(bits):
    """Mid-rise grids on both sides: zero points of half a code, which only the sums of codes see."""
    m, n, k = 3, 32, 256
    random = np.random.default_rng(bits)
    codes = random.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    x = random.integers(-(1 << bits - 1), 1 << bits - 1, (m, k)).astype(np.int8)
    x_scale, w_scale = [(random.random(s) * 4 + 0.1).astype(np.float32) for s in (m, n)]
    zero = ((1 << bits) - 1) / 2
    reference = ((x + 0.5) * x_scale[:, None].astype(np.float64)) @ ((codes - zero) * w_scale[:, None]).T
    words = planes.pack(jnp.asarray(codes), bits, 8)
    for impl in ("interpret", "xla"):
        y = matmul_a8(
            jnp.asarray(x), jnp.asarray(x_scale), words, jnp.asarray(w_scale), bits=bits, x_zero=-0.5, w_zero=zero,
            w_sums=jnp.asarray(codes.astype(np.int32).sum(-1)), out_dtype=jnp.float32, impl=impl,
            tile=Tile(**SMALL) if impl == "interpret" else None,
        )  # fmt: skip
        assert relative(y, reference) < 1e-6


def test_only_packed_bytes_are_held():
    """A program with a packed weight is given the packed bytes, and the dequantized copy is temporary."""
    n, k, bits = 1024, 1024, 4
    words = tuple(jax.ShapeDtypeStruct(s, jnp.int16) for s in planes.word_shapes(n, k, bits))
    run = lambda x, s, *w: matmul_a16(x, w, s, bits=bits, impl="xla")
    x, scales = jax.ShapeDtypeStruct((1, k), jnp.bfloat16), jax.ShapeDtypeStruct((1, n), jnp.float32)
    memory = jax.jit(run).lower(x, scales, *words).compile().memory_analysis()
    assert memory is not None and memory.argument_size_in_bytes == n * k * bits // 8 + 4 * n + 2 * k


def test_bad_calls_say_what_is_wrong():
    x, scales = jnp.zeros((2, 256), jnp.bfloat16), jnp.ones((1, 32), jnp.float32)
    words = planes.pack(jnp.zeros((32, 256), jnp.uint8), 4)
    codes, row = jnp.zeros((2, 256), jnp.int8), jnp.ones(2, jnp.float32)
    narrow = planes.pack(jnp.zeros((32, 256), jnp.uint8), 4, 8)
    a16 = lambda x=x, words=words, scales=scales, zeros=None, bits=4, **more: matmul_a16(
        x, words, scales, zeros, bits=bits, **{"impl": "xla"} | more
    )
    a8 = lambda codes=codes, words=narrow, **more: matmul_a8(
        codes, row, words, jnp.ones(32, jnp.float32), bits=4, **{"impl": "xla"} | more
    )
    for call, error, said in [
        (lambda: a16(x=x[0]), ValueError, "merge leading axes"),
        (lambda: a16(x=x.astype(jnp.float32)), TypeError, "bfloat16 or float16"),
        (lambda: a16(x=x[:0]), ValueError, "empty x"),
        (lambda: a16(x=x[:, :128]), ValueError, "planes/1"),
        (lambda: a16(bits=0), ValueError, "bits=0"),
        (lambda: a16(group=48), ValueError, "multiple of 32"),
        (lambda: a16(group=128), ValueError, r"\(2, 32\)"),
        (lambda: a16(layout="planes/0"), ValueError, "planes/0"),
        (lambda: a16(words=narrow), ValueError, "word_bits=16"),
        (lambda: a16(impl="cuda"), ValueError, "interpret"),
        (lambda: a16(impl="interpret", tile=Tile(rows=16, columns=64)), ValueError, "divisor"),
        (lambda: a16(impl="interpret", tile=Tile(rows=16, columns=32, split=3)), ValueError, "split=3"),
        (lambda: Tile(rows=24), ValueError, "powers of two"),
        (lambda: a8(codes=codes.astype(jnp.int32)), TypeError, "int8"),
        (lambda: a8(words=words), ValueError, "word_bits=8"),
    ]:
        with pytest.raises(error, match=said):
            call()
