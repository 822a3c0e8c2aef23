"""Every kernel against float64 on data of this run."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.operands import Product, poison, relative_error
from pallas_kernels import planes
from pallas_kernels.hadamard_backward import hadamard_backward
from pallas_kernels.hadamard_quantize import hadamard_quantize, signed_hadamard

BFLOAT16 = 2.0**-7  # a rounding of the result, and of a value twice as small as the largest


def products(impl: str, size: int, seed: int) -> list[dict]:
    """Rows (kernel, shape, error, limit) of all widths, decode and larger M, groups and channels."""
    rows = []
    for bits in range(1, 9):
        for kernel, group in (("matmul_a16", 128), ("matmul_a16", None), ("matmul_a8", None)):
            for m in (1, 16, 200):
                if impl == "interpret" and m > 16:
                    continue
                p = Product(kernel=kernel, bits=bits, m=m, n=size, k=2 * size, group=group)
                x, w = p.activation(seed + m), p.weight(seed + bits)
                poison(1 << 20 if impl == "interpret" else 1 << 30)
                error = relative_error(jax.jit(p.run(impl))(x, w), p.reference(x, w))
                rows.append(
                    {"kernel": p.name, "m": m, "n": p.n, "k": p.k, "group": group, "error": error, "limit": BFLOAT16}
                )
    return rows


def codecs(impl: str, size: int, seed: int) -> list[dict]:
    """The fused quantization's codes, scales and masks, and the masked rotation back."""
    rows = []
    random = np.random.default_rng(seed)
    for bits in (1, 4, 8):
        for axis in (0, 1):
            x = jnp.asarray(random.standard_normal((size, 2 * size), np.float32), jnp.bfloat16)
            exact = np.asarray(x, np.float64)
            scale = np.sqrt((exact**2).mean(1)) * 0.4
            matrix = signed_hadamard(128).astype(np.float64) / np.sqrt(128)
            v = (exact.reshape(size, -1, 128) @ matrix).reshape(exact.shape) / scale[:, None]
            codes = np.clip(np.round(v + 0.5) - 1, -(1 << bits - 1), (1 << bits - 1) - 1)
            sure = np.abs(v + 0.5 - np.floor(v + 0.5) - 0.5) > 1e-3
            poison(1 << 20 if impl == "interpret" else 1 << 30)
            run = jax.jit(
                lambda x, bits=bits, axis=axis: hadamard_quantize(
                    x, bits=bits, alpha=0.4, trust=2.0 ** (bits - 1), axis=axis, impl=impl
                )
            )
            got, got_scale, mask = run(x if axis == 1 else x.T)
            wrong = float(((np.asarray(got) != codes) & sure).mean())
            rows.append({"kernel": f"hadamard_quantize{bits} axis{axis}", "m": size, "k": 2 * size,
                         "error": max(wrong, relative_error(got_scale, scale)), "limit": 1e-6})  # fmt: skip
            g = jnp.asarray(random.standard_normal(x.shape, np.float32), jnp.bfloat16)
            rows_padded = jnp.pad(mask, ((0, 0), (0, planes.padded_n(size) - size), (0, 0)))
            kept = np.asarray(planes.unpack((rows_padded,), 1, size, 2 * size), np.float64) * np.asarray(g, np.float64)
            back = jax.jit(lambda g, mask: hadamard_backward(g, mask, impl=impl))(g, mask)
            expected = (kept.reshape(size, -1, 128) @ matrix).reshape(kept.shape)
            rows.append({"kernel": "hadamard_backward", "m": size, "k": 2 * size,
                         "error": relative_error(back, expected), "limit": BFLOAT16})  # fmt: skip
    return rows
