"""Every kernel on data of this run, into outputs poisoned first: products and rotations against float64, codecs and
stochastic roundings bit for bit against their references (which the test suite checks against ml_dtypes)."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.operands import Product, bits_of, poisoned, relative_error
from pallas_kernels import block_scaled, matmul_mx, planes, stochastic
from pallas_kernels.hadamard_backward import hadamard_backward
from pallas_kernels.hadamard_quantize import hadamard_quantize, signed_hadamard

LIMIT = {
    "bfloat16": 2.0**-7,
    "float16": 2.0**-9,
}  # a rounding of the result, and of a value twice as small as the largest


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
    for m in rows if interpreted else (*rows, 512):
        yield Product(kernel="matmul_i8", bits=8, m=m, n=size, k=2 * size)
    for m in (16,) if interpreted else (16, 512):
        yield Product(kernel="matmul_fp8", bits=8, m=m, n=size, k=2 * size)
        if not interpreted and matmul_mx.why_not() is None:
            yield Product(kernel="matmul_mx", bits=4, m=m, n=size, k=2 * size)
            yield Product(kernel="matmul_mx", bits=8, m=m, n=size, k=2 * size)


def products(impl: str, size: int, seed: int) -> list[dict]:
    """One row a case: kernel, shape, error, limit."""
    found = []
    for number, p in enumerate(cases(size, impl == "interpret")):
        x, w = p.activation(seed + number), p.weight(seed + 1000 + number)
        error = relative_error(poisoned(p.run(impl), x, w), p.reference(x, w))
        found.append({"kernel": p.name, "m": p.m, "n": p.n, "k": p.k, "group": p.group, "dtype": p.dtype,
                      "zeros": p.zeros, "error": error, "limit": LIMIT[p.dtype]})  # fmt: skip
    return found


def rotations(impl: str, size: int, seed: int) -> list[dict]:
    """The fused quantization's codes, sums, scales and masks, and the masked rotation back."""
    found = []
    random = np.random.default_rng(seed)
    matrix = signed_hadamard(128).astype(np.float64) / np.sqrt(128)
    for bits, axis, dtype in ((1, 1, jnp.bfloat16), (4, 1, jnp.bfloat16), (8, 1, jnp.float16), (4, 0, jnp.float32),
                              (8, 0, jnp.bfloat16)):  # fmt: skip
        x = jnp.asarray(random.standard_normal((size, 2 * size), np.float32), dtype)
        exact = np.asarray(x, np.float64)
        scale = np.sqrt((exact**2).mean(1)) * 0.4
        v = (exact.reshape(size, -1, 128) @ matrix).reshape(exact.shape) / scale[:, None]
        codes = np.clip(np.round(v + 0.5) - 1, -(1 << bits - 1), (1 << bits - 1) - 1)
        limit = 2.0 ** (bits - 1)
        away = 1e-3 if dtype != jnp.float32 else 1e-2  # float32 is taken to 16 bits of mantissa
        sure = np.abs(v + 0.5 - np.floor(v + 0.5) - 0.5) > away  # not at a decision point
        run = lambda x, bits=bits, axis=axis, limit=limit: hadamard_quantize(
            x, bits=bits, alpha=0.4, trust=limit, axis=axis, packed=True, impl=impl
        )
        got = poisoned(run, x if axis == 1 else x.T)
        rows = planes.padded_n(size)
        whole = lambda words, rows=rows: jnp.pad(words, ((0, 0), (0, rows - words.shape[1]), (0, 0)))
        trusted = np.asarray(planes.unpack((whole(got.mask),), 1, size, 2 * size), bool)
        packed = np.asarray(planes.unpack(tuple(map(whole, got.words)), bits, size, 2 * size), np.int64)
        held = np.asarray(got.codes, np.int64)
        wrong = ((held != codes) & sure).mean() + (
            (trusted != (np.abs(v) <= limit)) & (np.abs(np.abs(v) - limit) > away)
        ).mean()
        wrong += (packed != held + (1 << bits - 1)).mean() + (np.asarray(got.sums) != held.sum(1)).mean()
        found.append({"kernel": f"hadamard_quantize{bits} {jnp.dtype(dtype).name} axis{axis}", "m": size, "k": 2 * size,
                      "error": max(float(wrong), relative_error(got.scales, scale)), "limit": 1e-6})  # fmt: skip
        g = jnp.asarray(random.standard_normal(x.shape, np.float32), jnp.bfloat16)
        back = poisoned(lambda g, mask, axis=axis: hadamard_backward(g, mask, axis=axis, impl=impl), g, got.mask)
        kept = trusted * np.asarray(g, np.float64)
        expected = (kept.reshape(size, -1, 128) @ matrix).reshape(kept.shape)
        found.append({"kernel": f"hadamard_backward axis{axis}", "m": size, "k": 2 * size,
                      "error": relative_error(back, expected if axis == 1 else expected.T),
                      "limit": LIMIT["bfloat16"]})  # fmt: skip
    return found


def codecs(impl: str, size: int, seed: int) -> list[dict]:
    """Block-scaled formats and stochastic roundings: the share of bits that differ from the reference's, which is 0."""
    x = jax.random.normal(jax.random.key(seed), (size, 2 * size)) * jnp.exp2(jnp.arange(size) % 20 - 10.0)[:, None]
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
    found = []
    for name, function in functions.items():
        got = poisoned(lambda x, function=function: function(x, impl), x)
        expected = jax.jit(lambda x, function=function: function(x, "xla"))(x)
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        found.append({"kernel": name, "m": size, "k": 2 * size, "error": max(_differ(a, b) for a, b in pairs),
                      "limit": 0.0})  # fmt: skip
    return found


def _differ(a, b) -> float:
    raw = lambda x: bits_of(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x
    return float(np.mean(np.asarray(raw(a)) != np.asarray(raw(b))))
