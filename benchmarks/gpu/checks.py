"""Every kernel on data of this run, into outputs poisoned first: products and rotations against float64, codecs and
stochastic roundings bit for bit against their references (which the test suite checks against ml_dtypes).

Programs are compiled, operands drawn and references computed on all cores; kernels run one after another, so that one
that stops the GPU is known by name.
"""

import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.course import Course
from benchmarks.gpu.operands import Product, bits_of, poisoned, relative_error
from pallas_kernels import block_scaled, chips, matmul_i8_hopper, matmul_mx, planes, stochastic
from pallas_kernels.both_ways import quantize_both_ways
from pallas_kernels.hadamard import CHUNK
from pallas_kernels.hadamard_backward import hadamard_backward
from pallas_kernels.hadamard_quantize import hadamard_quantize, signed_hadamard
from pallas_kernels.launch import Tile

LIMIT = {
    "bfloat16": 2.0**-7,
    "float16": 2.0**-9,
    "float32": 2.0**-20,
}  # a rounding of the result, and of a value twice as small as the largest

PATIENCE = 45.0  # seconds that one may run, when it has been compiled; most take a hundredth of one
RUNNING = "the process ended here"  # what the row of a check says until there is a result

Check = tuple[dict, Callable[[], Callable[[], float]]]  # (what is checked, compile and draw -> run and compare)


def run(checks: list[Check], course: Course, done: list[dict]) -> None:
    """Appends one row a check to `done`, without those that are there, and tells each before it runs.

    What a kernel raises becomes its row's `failed`, and the others run; none after one that has stopped the device."""
    known = {_name(row) for row in done}
    left = [(told, prepare) for told, prepare in checks if _name(told) not in known]
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        ready = [pool.submit(prepare) for _, prepare in left]
        for (told, _), future in zip(left, ready, strict=True):
            done.append(told | {"error": None, "failed": RUNNING})
            course.now(_name(told))
            try:
                compare = future.result()
                course.now(_name(told), PATIENCE)
                done[-1] = told | {"error": compare()}
            except Exception as error:
                done[-1]["failed"] = f"{type(error).__name__}: {str(error)[:2000]}"
                course.save()
                if not answers():
                    return
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    course.save()


def answers() -> bool:
    """Whether the device still computes: after an illegal access nothing does in this process."""
    try:
        return float(jnp.ones(4).sum()) == 4
    except RuntimeError as error:  # of JAX's runtime
        print(f"the device does not answer: {error}", file=sys.stderr)
        return False


def wrong(rows: list[dict]) -> list[dict]:
    """Those whose error is above the limit, is not a number, or is not there."""
    return [row for row in rows if row["error"] is None or not row["error"] <= row["limit"]]


def _name(row: dict) -> str:
    """The same for a row and for what a file in JSON has made of it."""
    return json.dumps([value for key, value in row.items() if key not in ("error", "failed")])


def every(interpreted: bool, size: int, seed: int) -> list[Check]:
    """All checks: of products, rotations and codecs."""
    pallas = "interpret" if interpreted else "triton"
    return [
        *quantizations(pallas, size, seed),
        *products("interpret" if interpreted else "kernel", size, seed),
        *codecs(pallas, size, seed),
    ]


def cases(size: int, interpreted: bool) -> Iterator[Product]:
    """All widths, decode and larger M, groups and channels, both 16-bit dtypes, zero points, odd sizes."""
    rows = (1, 16) if interpreted else (1, 16, 64, 200)
    for bits in range(1, 9):
        for m in rows:
            group = (None, 32, 64, 128)[(bits + m) % 4]
            dtype = "float16" if bits % 2 else "bfloat16"
            yield Product(kernel="matmul_a16", bits=bits, m=m, n=size, k=2 * size, group=group, dtype=dtype)
            yield Product(kernel="matmul_a8", bits=bits, m=m, n=size, k=2 * size)
        yield Product(kernel="matmul_a16", bits=bits, m=3, n=size + 32, k=2 * size, group=32, zeros=True)
    for bits in (3, 4):  # no whole block, step or tile in any direction
        yield Product(kernel="matmul_a16", bits=bits, m=5, n=100, k=1056, group=32)
        yield Product(kernel="matmul_a8", bits=bits, m=5, n=100, k=1056, zeros=True)
    for bits in (1, 2, 4):
        yield Product(kernel="matmul_a8", bits=bits, m=16, n=size, k=2 * size, zeros=True)
    for bits in (4, 3, 8):  # zero points as `lb.convert` makes them of asymmetric weights, at sizes of decoding
        for m in (1, 16):
            yield Product(kernel="matmul_a16", bits=bits, m=m, n=size, k=max(2 * size, 256), group=128, zeros=True)
    yield Product(kernel="matmul_i8", bits=8, m=100, n=1000, k=1000)
    for m in rows if interpreted else (*rows, 512):
        yield Product(kernel="matmul_i8", bits=8, m=m, n=size, k=2 * size)
    if not interpreted and on_hopper():
        for m, n, dtype in ((512, size, "bfloat16"), (256, size, "float32"), (384, 2 * size, "bfloat16")):
            for rows, columns in matmul_i8_hopper.TILES:
                tile = Tile(rows=rows, columns=columns, warps=8, stages=4)
                if m % rows == 0:
                    yield Product(kernel="matmul_i8_hopper", bits=8, m=m, n=n, k=2 * size, dtype=dtype, tile=tile)
        for bits in (4, 8):  # unpacked first
            yield Product(kernel="matmul_a8", bits=bits, m=512, n=size, k=2 * size)
    for m in (16,) if interpreted else (16, 512):
        yield Product(kernel="matmul_fp8", bits=8, m=m, n=size, k=2 * size)
        if not interpreted and matmul_mx.why_not() is None:
            yield Product(kernel="matmul_mx", bits=4, m=m, n=size, k=2 * size)
            yield Product(kernel="matmul_mx", bits=8, m=m, n=size, k=2 * size)


def on_hopper() -> bool:
    return chips.traced_capability() == (9, 0)


def products(impl: str, size: int, seed: int) -> list[Check]:
    """Products against float64."""
    found = []
    for number, p in enumerate(cases(size, impl == "interpret")):

        def prepare(p=p, number=number):
            x, w = p.activation(seed + number), p.weight(seed + 1000 + number)
            run, reference = poisoned(p.run(impl), x, w), p.reference(x, w)
            return lambda: relative_error(run(), reference)

        told = {"kernel": p.name, "m": p.m, "n": p.n, "k": p.k, "group": p.group, "dtype": p.dtype, "zeros": p.zeros,
                "tile": p.tile and dataclasses.asdict(p.tile)}  # fmt: skip
        found.append((told | {"limit": LIMIT[p.dtype]}, prepare))
    return found


def quantizations(impl: str, size: int, seed: int) -> list[Check]:
    """The fused quantizations' codes, sums, scales and masks, and the masked rotation back."""
    square, long, found = (size, 2 * size), (100, 640 if impl == "interpret" else 5632), []  # long: of the 800M model
    whole = Tile(rows=64, columns=CHUNK, warps=4, stages=2, split=2)  # by products of whole chunks
    for bits, axis, dtype, shape, tile in (
        (1, 1, jnp.bfloat16, square, None), (4, 1, jnp.bfloat16, square, None), (8, 1, jnp.float16, square, None),
        (4, 0, jnp.float32, square, None), (8, 0, jnp.bfloat16, square, None), (4, 1, jnp.bfloat16, long, None),
        (4, 0, jnp.float32, long, None), (1, 1, jnp.bfloat16, square, whole), (4, 1, jnp.bfloat16, long, whole),
        (8, 1, jnp.bfloat16, square, whole), (3, 1, jnp.float32, long, whole),
    ):  # fmt: skip
        told = {"kernel": f"hadamard_quantize{bits} {jnp.dtype(dtype).name} axis{axis}{' whole' if tile else ''}",
                "m": shape[0], "k": shape[1]}  # fmt: skip
        drawn = functools.partial(_quantize, impl, shape, seed, bits, axis, dtype, tile)
        found.append((told | {"limit": 1e-6}, drawn))
    for axis, shape, tile in itertools.product((0, 1), (square, long), (None, whole)):
        told = {"kernel": f"hadamard_backward axis{axis}{' whole' if tile else ''}", "m": shape[0], "k": shape[1],
                "limit": LIMIT["bfloat16"]}  # fmt: skip
        found.append((told, functools.partial(_rotate_back, impl, shape, seed, axis, tile)))
    for shape in (square, (100, 200)):
        told = {"kernel": "quantize_both_ways", "m": shape[0], "k": shape[1], "limit": 1e-6}
        found.append((told, functools.partial(_both_ways, impl, shape, seed)))
    return found


_MATRIX = signed_hadamard(128).astype(np.float64) / np.sqrt(128)


def _rotated(x: np.ndarray) -> np.ndarray:
    return (x.reshape(len(x), -1, 128) @ _MATRIX).reshape(x.shape)


def _quantize(
    impl: str, shape: tuple[int, int], seed: int, bits: int, axis: int, dtype: Any, tile: Tile | None
) -> Callable[[], float]:
    """The share of wrong codes, mask bits, packed codes and sums together, or the error of the scales if that is more.

    Codes and bits so near a decision point that float32 may decide otherwise are not counted."""
    m, k = shape
    x = jnp.asarray(np.random.default_rng([seed, bits, axis]).standard_normal(shape, np.float32), dtype)
    exact, limit = np.asarray(x, np.float64), 2.0 ** (bits - 1)
    scale = np.sqrt((exact**2).mean(1)) * 0.4
    v = _rotated(exact) / scale[:, None]
    codes = np.clip(np.round(v + 0.5) - 1, -(1 << bits - 1), (1 << bits - 1) - 1)
    away = 1e-3 if dtype != jnp.float32 else 1e-2  # float32 is taken to 16 bits of mantissa
    sure = np.abs(v + 0.5 - np.floor(v + 0.5) - 0.5) > away
    one = functools.partial(
        hadamard_quantize, bits=bits, alpha=0.4, trust=limit, axis=axis, packed=True, tile=tile, impl=impl
    )
    run = poisoned(one, x if axis == 1 else x.T)
    rows = planes.padded_n(m)
    whole = lambda words: jnp.pad(words, ((0, 0), (0, rows - words.shape[1]), (0, 0)))

    def compare() -> float:
        got = run()
        trusted = np.asarray(planes.unpack((whole(got.mask),), 1, m, k), bool)
        packed = np.asarray(planes.unpack(tuple(map(whole, got.words)), bits, m, k), np.int64)
        held = np.asarray(got.codes, np.int64)
        wrong = ((held != codes) & sure).mean()
        wrong += ((trusted != (np.abs(v) <= limit)) & (np.abs(np.abs(v) - limit) > away)).mean()
        wrong += (packed != held + (1 << bits - 1)).mean() + (np.asarray(got.sums) != held.sum(1)).mean()
        return max(float(wrong), relative_error(got.scales, scale))

    return compare


def _rotate_back(impl: str, shape: tuple[int, int], seed: int, axis: int, tile: Tile | None) -> Callable[[], float]:
    random = np.random.default_rng([seed, axis])
    trusted = random.random(shape) < 0.9
    mask = planes.pack(jnp.asarray(trusted, jnp.uint8), 1, 8)[0][:, : shape[0]]
    g = jnp.asarray(random.standard_normal(shape, np.float32), jnp.bfloat16)
    expected = _rotated(trusted * np.asarray(g, np.float64))
    run = poisoned(lambda g, mask: hadamard_backward(g, mask, axis=axis, tile=tile, impl=impl), g, mask)
    return lambda: relative_error(run(), expected if axis == 1 else expected.T)


def _both_ways(impl: str, shape: tuple[int, int], seed: int) -> Callable[[], float]:
    """The share of wrong codes, or the error of the scales if that is more; codes next to a tie are not counted."""
    random = np.random.default_rng([seed, 2])
    g = jnp.asarray(random.standard_normal(shape, np.float32), jnp.bfloat16)
    v, u = (jnp.asarray(random.uniform(0.5, 1.5, n), jnp.float32) for n in shape[::-1])
    exact = np.asarray(g, np.float64)
    rows, columns = exact * np.asarray(v, np.float64)[None, :], (exact * np.asarray(u, np.float64)[:, None]).T
    run = poisoned(lambda *operands: quantize_both_ways(*operands, impl=impl), g, v, u)

    def compare() -> float:
        got, found = run(), 0.0
        for codes, scales, weighted in ((got.rows, got.row_scales, rows), (got.columns, got.column_scales, columns)):
            step = np.abs(weighted).max(1)[:, None] / 127
            steps = weighted / step
            sure = np.abs(steps - np.floor(steps) - 0.5) > 1e-4
            found = max(
                found, ((np.round(steps) != np.asarray(codes)) & sure).mean(), relative_error(scales, step[:, 0])
            )
        return float(found)

    return compare


def codecs(impl: str, size: int, seed: int) -> list[Check]:
    """Block-scaled formats and stochastic roundings: the share of bits that differ from the reference's, which is 0."""
    key = jnp.asarray([seed & 0xFFFFFFFF, 7], jnp.uint32)
    functions: dict[str, Callable[..., Any]] = {
        f"quantize_{name}": lambda x, impl, name=name: block_scaled.quantize_mx(x, format=name, impl=impl)
        for name in block_scaled.MX_FORMATS
    }
    functions["quantize_nvfp4"] = lambda x, impl: block_scaled.quantize_nvfp4(x, impl=impl)
    functions["quantize_mxfp4 stochastic"] = lambda x, impl: block_scaled.quantize_mx(
        x, format="mxfp4", key=key, impl=impl
    )
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        functions[f"stochastic_round_{name}"] = lambda x, impl, name=name: stochastic.stochastic_round(
            x, key, dtype=jnp.dtype(name), impl=impl
        )
    functions["stochastic_codes4"] = lambda x, impl: stochastic.stochastic_codes(
        x, jnp.full((size,), 0.1, jnp.float32), key, bits=4, impl=impl
    )

    def prepare(function: Callable) -> Callable[[], float]:
        x = jax.random.normal(jax.random.key(seed), (size, 2 * size))
        x = x * jnp.exp2(jnp.arange(size) % 20 - 10.0)[:, None]
        run, expected = poisoned(lambda x: function(x, impl), x), jax.jit(lambda x: function(x, "xla"))(x)
        pairs = lambda: zip(jax.tree.leaves(run()), jax.tree.leaves(expected), strict=True)
        return lambda: max(_differ(a, b) for a, b in pairs())

    return [
        ({"kernel": name, "m": size, "k": 2 * size, "limit": 0.0}, lambda f=function: prepare(f))
        for name, function in functions.items()
    ]


def _differ(a, b) -> float:
    raw = lambda x: bits_of(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x
    return float(np.mean(np.asarray(raw(a)) != np.asarray(raw(b))))
