"""The packed products, kernel body and XLA reference, against float64."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import matmul_i8 as module_i8
from pallas_kernels import planes, tuning
from pallas_kernels.launch import Tile
from pallas_kernels.matmul_a8 import default_tile as default_tile_a8
from pallas_kernels.matmul_a8 import longest, matmul_a8
from pallas_kernels.matmul_a16 import _step, default_tile, dequantize, matmul_a16

SMALL = dict(rows=16, columns=32)
pack = jax.jit(planes.pack, static_argnums=(1, 2))


def at_once(call, *arrays, **options):
    """As one program, which compiles in a fraction of what its operations take one by one."""
    return jax.jit(functools.partial(call, **options))(*arrays)


def relative(y, reference):
    return np.abs(np.asarray(y, np.float64) - reference).max() / np.abs(reference).max()


def product_a16(bits, m, n, k, group, zeros, dtype, seed=0):
    """Operands of `matmul_a16` and the float64 product."""
    random = np.random.default_rng(100 * bits + seed)
    codes = random.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    size = group or k
    scales = (random.random((k // size, n)) + 0.5).astype(np.float32)
    x = jnp.asarray(random.standard_normal((m, k)) + 0.3, dtype)
    zero = {None: float(1 << (bits - 1)), "half": ((1 << bits) - 1) / 2, "other": 0.75}.get(zeros)
    if zeros == "array":
        zero = (random.random((k // size, n)) * (1 << bits)).astype(np.float32)
    each = np.repeat(zero, size, 0).T if zeros == "array" else zero
    w = (codes - each) * np.repeat(scales, size, 0).T.astype(np.float64)
    given = None if zeros is None else jnp.asarray(zero) if zeros == "array" else zero
    operands = x, pack(jnp.asarray(codes), bits), jnp.asarray(scales), given
    return operands, np.asarray(x, np.float64) @ w.T


BF16, F16 = jnp.bfloat16, jnp.float16
SIXTEEN_BITS = [  # bits, m, n, k, group, zeros, dtype, tile rows, split
    (1, 1, 40, 1024, None, "half", BF16, 16, 2),
    (1, 17, 32, 512, 32, None, F16, 32, 1),
    (2, 1, 32, 320, 32, None, BF16, 16, 1),
    (2, 17, 33, 512, 64, "half", BF16, 16, 2),
    (3, 1, 32, 1024, 128, "array", F16, 16, 2),
    (3, 17, 33, 512, 64, "half", BF16, 32, 1),
    (4, 1, 33, 512, 128, "half", BF16, 16, 2),
    (4, 17, 64, 256, 32, "other", F16, 32, 1),
    (5, 1, 33, 700, None, None, BF16, 16, 1),
    (6, 17, 33, 512, None, "half", F16, 32, 2),
    (7, 1, 32, 512, None, "half", F16, 16, 1),
    (8, 1, 33, 384, 128, "half", BF16, 16, 1),
    (8, 17, 32, 256, 64, None, BF16, 32, 2),
]


@pytest.mark.parametrize(("bits", "m", "n", "k", "group", "zeros", "dtype", "rows", "split"), SIXTEEN_BITS)
def test_16_bit_activations(bits, m, n, k, group, zeros, dtype, rows, split):
    """Widths with one row and with more than a tile; tiles of 32 rows take parts of a block of words at a turn."""
    (x, words, scales, given), reference = product_a16(bits, m, n, k, group, zeros, dtype)
    tolerance = float(jnp.finfo(dtype).eps)  # the rounding of the result; sums are float32
    tile = Tile(rows=rows, columns=32, split=split)
    for options in (dict(impl="interpret", tile=tile), dict(impl="xla")):
        y = at_once(matmul_a16, x, words, scales, zeros=given, bits=bits, group=group, **options)
        assert y.dtype == dtype and y.shape == (m, n)
        assert relative(y, reference) < tolerance


EIGHT_ROWS = [  # bits, m, n, k, group, zeros, split
    (1, 1, 40, 1024, None, "half", 2),
    (3, 3, 100, 1024, 128, "array", 2),
    (4, 8, 64, 1024, 32, None, 1),
    (8, 20, 33, 512, 64, "other", 2),
]


@pytest.mark.parametrize(("bits", "m", "n", "k", "group", "zeros", "split"), EIGHT_ROWS)
def test_tiles_of_eight_rows(bits, m, n, k, group, zeros, split):
    (x, words, scales, given), reference = product_a16(bits, m, n, k, group, zeros, BF16)
    tile = Tile(rows=8, columns=32, split=split)
    options = dict(bits=bits, out_dtype=jnp.float32, impl="interpret", tile=tile)
    y = at_once(matmul_a16, x, words, scales, zeros=given, group=group, **options)
    assert relative(y, reference) < 1e-5
    random = np.random.default_rng(bits)
    codes, u = random.integers(-128, 128, (m, k)), random.integers(0, 1 << bits, (n, k))
    x_scales, w_scales = random.random(m).astype(np.float32) + 0.5, random.random(n).astype(np.float32) + 0.5
    middle, words = ((1 << bits) - 1) / 2, pack(jnp.asarray(u, jnp.uint8), bits, 8)
    codes8 = jnp.asarray(codes, jnp.int8)
    y = at_once(matmul_a8, codes8, x_scales, words, w_scales, x_zero=-0.5, w_zero=middle, **options)
    expected = (codes + 0.5) @ (u - middle).T * x_scales[:, None].astype(np.float64) * w_scales[None]
    assert relative(y, expected) < 1e-6


def test_a_tuned_split_that_does_not_fit_is_not_taken(monkeypatch, tmp_path):
    """The key of a tile holds no group, which makes steps longer: each shape asks whether it fits."""
    monkeypatch.setenv("LOWBIT_JAX_TUNING", str(tmp_path / "tuning.json"))
    tile = Tile(rows=8, columns=32, split=4)
    with tuning.on_chip("a chip"):
        for kernel, k in (("matmul_a16", 512), ("matmul_a8", 512), ("matmul_a8", 768)):
            tuning.store({tuning.key(kernel, 4, 1, 32, k): dataclasses.asdict(tile)}, "a chip")
        assert default_tile(1, 32, 512, 4, 256) != tile == default_tile(1, 32, 512, 4, 128)
        assert default_tile_a8(1, 32, 768, 4) != tile == default_tile_a8(1, 32, 512, 4)


@pytest.mark.parametrize("scale_dtype", [jnp.bfloat16, jnp.float16])
def test_scales_of_16_bits_and_results_of_32(scale_dtype):
    (x, words, scales, zeros), _ = product_a16(4, 3, 32, 128, 64, "array", BF16)
    scales, zeros = scales.astype(scale_dtype), zeros.astype(scale_dtype)
    exact = [np.asarray(a, np.float64) for a in (x, scales, zeros)]
    codes = np.asarray(planes.unpack(words, 4, 32, 128), np.float64)
    w = (codes - np.repeat(exact[2], 64, 0).T) * np.repeat(exact[1], 64, 0).T
    for options in (dict(impl="interpret", tile=Tile(**SMALL)), dict(impl="xla")):
        y = at_once(matmul_a16, x, words, scales, zeros, bits=4, group=64, out_dtype=jnp.float32, **options)
        assert y.dtype == jnp.float32
        assert relative(y, exact[0] @ w.T) < 128 * 2.0**-23


def test_arrays_of_numpy_are_arrays():
    """With as many channels as a group is long a wrong axis would go unseen by shapes."""
    (x, words, scales, zeros), reference = product_a16(4, 2, 32, 32, 32, "array", BF16)
    scales, zeros = np.asarray(scales), np.asarray(zeros)
    w = dequantize(words, scales, zeros, bits=4, k=32)
    assert relative(np.asarray(x, np.float64) @ np.asarray(w, np.float64).T, reference) < 1e-6
    for options in (dict(impl="interpret", tile=Tile(**SMALL)), dict(impl="xla")):
        y = matmul_a16(np.asarray(x), words, scales, zeros, bits=4, group=32, **options)
        assert relative(y, reference) < 2.0**-7


@pytest.mark.parametrize(("bits", "zeros"), [(1, None), (1, 0.5), (4, None), (4, 7.5), (8, None)])
def test_an_infinite_activation_stays_infinite(bits, zeros):
    codes = np.full((32, 64), (1 << bits) - 1, np.uint8)  # far from either zero point but for one bit about code 1
    if bits == 1 and zeros is None:
        codes[:] = 0
    x = np.ones((2, 64), np.float32)
    x[0, 3] = np.inf
    sign = 1 if codes[0, 0] else -1
    for options in (dict(impl="interpret", tile=Tile(**SMALL)), dict(impl="xla")):
        x16, words = jnp.asarray(x, BF16), pack(jnp.asarray(codes), bits)
        y = at_once(matmul_a16, x16, words, jnp.ones((2, 32)), zeros=zeros, bits=bits, group=32, **options)
        np.testing.assert_array_equal(np.asarray(y[0], np.float32), sign * np.inf)
        assert np.isfinite(np.asarray(y[1], np.float32)).all()


def kernel_operands(function, *arguments):
    """Shapes of the operands of the Pallas call in a traced function, and how many equations stand beside it."""
    equations = jax.make_jaxpr(function)(*arguments).jaxpr.eqns
    [call] = [e for e in equations if e.primitive.name == "pallas_call"]
    arithmetic = [e.primitive.name for e in equations if e.primitive.name in ("pad", "reduce_sum", "broadcast_in_dim")]
    return [v.aval.shape for v in call.invars], arithmetic


def test_default_zero_points_cost_nothing_beside_the_kernel():
    """No padding, no sums of x, no tables of constants: the operands as they came."""
    x, words = jnp.ones((1, 512), BF16), pack(jnp.zeros((40, 512), jnp.uint8), 4)
    tile = Tile(**SMALL)
    for zeros in (None, 8, 7.5):
        run = lambda x, zeros=zeros: matmul_a16(x, words, jnp.ones((4, 40)), zeros, bits=4, group=128, tile=tile)
        shapes, beside = kernel_operands(run, x)
        assert shapes == [(1, 512), (4, 40), *[w.shape for w in words]]
        assert beside.count("broadcast_in_dim") <= 1 and not set(beside) - {"broadcast_in_dim"}  # jnp.ones
    codes, row, channel = jnp.ones((1, 512), jnp.int8), jnp.ones(1), jnp.ones(40)
    words = pack(jnp.zeros((40, 512), jnp.uint8), 2, 8)
    run = lambda codes, sums: matmul_a8(codes, row, words, channel, bits=2, x_sums=sums, tile=tile)
    shapes, beside = kernel_operands(run, codes, jnp.ones(1, jnp.int32))
    assert shapes == [(1, 512), (1,), (40,), (1,), *[w.shape for w in words]] and not beside


INT8 = [  # bits, m, n, k, tile rows, split
    (1, 1, 40, 1024, 16, 2), (1, 17, 33, 512, 32, 1), (2, 1, 33, 1024, 16, 2), (2, 17, 32, 384, 32, 1),
    (3, 1, 40, 384, 16, 1), (4, 1, 32, 1024, 16, 2), (4, 17, 33, 384, 16, 1),
    (5, 17, 32, 512, 32, 2), (6, 17, 33, 320, 32, 1), (7, 1, 40, 384, 16, 1),
    (8, 1, 33, 1024, 16, 2), (8, 17, 40, 352, 32, 1),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "m", "n", "k", "rows", "split"), INT8)
def test_int8_activations_are_exact(bits, m, n, k, rows, split):
    random = np.random.default_rng(bits)
    codes = random.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    x = random.integers(-128, 128, (m, k)).astype(np.int8)
    words = pack(jnp.asarray(codes), bits, 8)
    ones = jnp.ones(m, jnp.float32), jnp.ones(n, jnp.float32)
    zero = 0 if bits == 1 else 1 << (bits - 1)
    exact = x.astype(np.int64) @ (codes.astype(np.int64) - zero).T  # below 2^24 or rounded once
    for options in (dict(impl="interpret", tile=Tile(rows=rows, columns=32, split=split)), dict(impl="xla")):
        options |= dict(bits=bits, w_zero=zero, out_dtype=jnp.float32)
        y = at_once(matmul_a8, jnp.asarray(x), ones[0], words, ones[1], **options)
        np.testing.assert_array_equal(y, exact.astype(np.float32))


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_many_rows_of_int8_activations_on_hopper_multiply_unpacked_codes(bits, monkeypatch):
    """Zero points off the middle on both sides; the product itself is XLA's here, where Hopper takes its own kernel."""
    monkeypatch.setattr(module_i8, "best", lambda m, n, k: "mosaic")
    taken = []
    original = module_i8.matmul_i8

    def by_xla(*arguments, impl, **options):
        taken.append(impl)
        return original(*arguments, impl="xla", **options)

    monkeypatch.setattr(module_i8, "matmul_i8", by_xla)
    random = np.random.default_rng(bits)
    codes, x = random.integers(0, 1 << bits, (33, 160)), random.integers(-128, 128, (512, 160))
    words = pack(jnp.asarray(codes, jnp.uint8), bits, 8)
    sides = jnp.ones(512), jnp.ones(33)
    zero = (1 << bits) / 2 - 0.5
    options = dict(bits=bits, x_zero=3.0, w_zero=zero, out_dtype=jnp.float32)
    y = at_once(matmul_a8, jnp.asarray(x, jnp.int8), sides[0], words, sides[1], **options)
    np.testing.assert_array_equal(y, (x - 3.0) @ (codes - zero).T)  # halves below 2^23
    assert taken == ["mosaic"]


@pytest.mark.parametrize("split", [1, 2])
def test_sums_of_rows_can_be_given(split):
    """Sums handed over are used as they are: a wrong one is seen."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (33, 256)).astype(np.uint8)
    x = random.integers(-128, 128, (3, 256)).astype(np.int8)
    words = pack(jnp.asarray(codes), 4, 8)
    options = dict(bits=4, x_zero=3.0, w_zero=5.25, out_dtype=jnp.float32, tile=Tile(**SMALL, split=split))
    sides = jnp.ones(3, BF16), jnp.ones(33, F16)
    call = jax.jit(functools.partial(matmul_a8, impl="interpret", **options))
    run = lambda **more: call(jnp.asarray(x), sides[0], words, sides[1], **more)
    exact = (x - 3.0) @ (codes - 5.25).T
    sums = jnp.asarray(x.astype(np.int32).sum(-1))
    np.testing.assert_array_equal(run(), exact)  # quarters below 2^24
    np.testing.assert_array_equal(run(x_sums=sums), exact)
    np.testing.assert_array_equal(run(x_sums=sums + 4), exact - 4 * 5.25)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_longest_int8_product_is_the_longest(bits):
    """The extreme sum of `longest(bits)` products is inside int32 and one product more is outside."""
    codes = np.arange(1 << bits, dtype=object) - (128 if bits == 8 else 0)  # Python integers: no overflow here
    extreme = max(abs(c * x) for c in (codes[0], codes[-1]) for x in (-128, 127))
    assert longest(bits) * extreme <= 2**31 - 1 < (longest(bits) + 1) * extreme


def test_8_bit_sums_that_would_overflow_are_refused():
    """K = 2^17 of codes -128 on both sides sums to 2^31, one more than int32 holds."""
    assert longest(8) == 2**17 - 1
    shape = jax.ShapeDtypeStruct
    words = [shape(s, jnp.int8) for s in planes.word_shapes(32, 2**17, 8, 8)]
    run = lambda x, *words: matmul_a8(x, jnp.ones(1), words, jnp.ones(32), bits=8, impl="xla")
    with pytest.raises(ValueError, match="131071"):
        jax.eval_shape(run, shape((1, 2**17), jnp.int8), *words)


def test_more_elements_than_32_bits_count_are_refused():
    shape = jax.ShapeDtypeStruct
    k, m = 1 << 16, (1 << 15) + 1
    for run, dtype, word_bits in (
        (lambda x, *w: matmul_a16(x, w, jnp.ones((1, 32)), bits=4), jnp.bfloat16, 16),
        (lambda x, *w: matmul_a8(x, jnp.ones(m), w, jnp.ones(32), bits=4), jnp.int8, 8),
    ):
        words = [shape(s, jnp.int16 if word_bits == 16 else jnp.int8) for s in planes.word_shapes(32, k, 4, word_bits)]
        with pytest.raises(ValueError, match="2147483647"):
            jax.eval_shape(run, shape((m, k), dtype), *words)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_default_tiles_fit_the_shape_and_shared_memory(bits, group):
    for m, (n, k) in itertools.product((1, 16, 17, 64, 256), ((4096, 4096), (14336, 4096), (4128, 11008), (32, 640))):
        length = group or k
        if k % length:
            continue
        tile, rows = default_tile(m, n, k, bits, length), planes.padded_n(n)
        step = _step(k, bits, length, tile.rows)
        assert rows % tile.columns == 0 and -(-k // step) % tile.split == 0 and step % min(length, step) == 0
        assert tile.stages >= 3 and tile.stages * step * (2 * tile.rows + tile.columns * bits // 8) <= 160 << 10


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
    words = pack(jnp.asarray(codes), bits, 8)
    for impl in ("interpret", "xla"):
        options = dict(impl=impl, tile=Tile(**SMALL) if impl == "interpret" else None)
        y = at_once(
            matmul_a8, jnp.asarray(x), jnp.asarray(x_scale), words, jnp.asarray(w_scale), bits=bits, x_zero=-0.5,
            w_zero=zero, w_sums=jnp.asarray(codes.astype(np.int32).sum(-1)), out_dtype=jnp.float32, **options,
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
    words = pack(jnp.zeros((32, 256), jnp.uint8), 4)
    codes, row = jnp.zeros((2, 256), jnp.int8), jnp.ones(2, jnp.float32)
    narrow = pack(jnp.zeros((32, 256), jnp.uint8), 4, 8)
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
        (lambda: a8(impl="interpret", tile=Tile(rows=16, columns=32, split=3)), ValueError, "split=3"),
        (lambda: a8(words=words), ValueError, "word_bits=8"),
        (lambda: a8(w_zero=jnp.ones(32)), TypeError, "w_zero"),
        (lambda: a8(x_zero=jnp.ones(2)), TypeError, "x_zero"),
        (lambda: a8(x_sums=jnp.ones(3, jnp.int32)), ValueError, "x_sums"),
        (lambda: a8(out_dtype=jnp.int8), TypeError, "out_dtype=int8"),
        (lambda: a8(tile=dict(rows=16)), TypeError, "Tile"),
        (lambda: a16(out_dtype="half of it"), TypeError, "half of it"),
        (lambda: a16(tile=dict(rows=16)), TypeError, "Tile"),
        (lambda: a16(zeros=jnp.ones((1, 32), jnp.int32)), TypeError, "zeros of int32"),
        (
            lambda: a16(scales=scales.astype(jnp.int32)),
            TypeError,
            "scales",
        ),
    ]:
        with pytest.raises(error, match=said):
            call()
