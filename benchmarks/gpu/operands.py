"""Fresh random operands of each product, drawn on the device, and their float64 reference on the host."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jaxtyping import Array, Float64

from pallas_kernels import planes
from pallas_kernels.launch import Tile
from pallas_kernels.matmul_a8 import matmul_a8
from pallas_kernels.matmul_a16 import matmul_a16
from pallas_kernels.matmul_fp8 import matmul_fp8
from pallas_kernels.matmul_i8 import matmul_i8
from pallas_kernels.matmul_mx import matmul_mx

KERNELS = ("matmul_a16", "matmul_a8", "matmul_i8", "matmul_i8_hopper", "matmul_fp8", "matmul_mx")
HALF = 0.5  # what a mid-rise grid adds to a code; int8 products are measured with it, as QuEST uses them


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product as a function of its activation's and one weight's arrays.

    bits: of the weights. group: scales along the contraction for matmul_a16 (None: channels). zeros: matmul_a16 with a
    zero point for each group, drawn at random; matmul_a8 with mid-rise grids on both sides, as QuEST has them. tile:
    another than the default. impl of a run: "kernel" (what a GPU runs), "interpret" or
    "xla"."""

    kernel: str
    bits: int
    m: int
    n: int
    k: int
    group: int | None = None
    dtype: str = "bfloat16"
    zeros: bool = False
    tile: Tile | None = None

    @property
    def name(self) -> str:
        if self.kernel == "matmul_mx":
            return f"mxfp{self.bits}a16"
        if self.kernel == "matmul_fp8":
            return "fp8"
        if self.kernel.startswith("matmul_i8"):
            return "i8" + self.kernel.removeprefix("matmul_i8")
        return f"w{self.bits}a{self.kernel.removeprefix('matmul_a')}"

    @property
    def activation_bytes(self) -> int:
        """Bytes of one element of the activation."""
        return 2 if self.kernel in ("matmul_a16", "matmul_mx") else 1

    def activation(self, seed: int) -> tuple[Array, ...]:
        return _activation(self, jax.random.key(seed))

    def weight(self, seed: int) -> tuple[Array, ...]:
        """Scales, then what holds the elements; for zeros the zero points in between."""
        return _weight(self, jax.random.key(seed))

    def _draw_activation(self, key: Array) -> tuple[Array, ...]:
        keys = jax.random.split(key)
        shape = self.m, self.k
        if self.kernel in ("matmul_a16", "matmul_mx"):
            return (jax.random.normal(keys[0], shape, self.dtype),)
        scales = jax.random.uniform(keys[1], (self.m,), jnp.float32, 0.5, 1.5)
        if self.kernel == "matmul_fp8":
            return jax.random.normal(keys[0], shape).astype(jnp.float8_e4m3fn), scales
        codes = jax.random.randint(keys[0], shape, -127, 128, jnp.int8)
        return (codes, scales, codes.astype(jnp.int32).sum(1)) if self._sums else (codes, scales)

    def _draw_weight(self, key: Array) -> tuple[Array, ...]:
        keys = jax.random.split(key, 3)
        bytes_of = lambda shape: jax.random.bits(keys[0], shape, jnp.uint8)
        uniform = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, 0.5, 1.5)
        if self.kernel == "matmul_mx":
            scales = jax.random.randint(keys[1], (self.n, self.k // 32), 122, 133, jnp.int32).astype(jnp.uint8)
            words = bytes_of((self.n, self.k * self.bits // 8))
            return scales, jnp.where(words & 0x7F == 0x7F, jnp.uint8(0x40), words) if self.bits == 8 else words
        if self.kernel == "matmul_fp8":
            return uniform(keys[1], (self.n,)), jax.random.normal(keys[0], (self.n, self.k)).astype(jnp.float8_e4m3fn)
        if self._sums:
            codes = jax.random.randint(keys[0], (self.n, self.k), -128, 128, jnp.int32).astype(jnp.int8)
            return uniform(keys[1], (self.n,)), codes, codes.astype(jnp.int32).sum(1)
        groups = 1 if self.group is None else self.k // self.group
        scales = uniform(keys[1], (groups, self.n))
        words = planes.pack(bytes_of((self.n, self.k)) >> (8 - self.bits), self.bits, 16 if self._wide else 8)
        if self.zeros and self._wide:
            return scales, jax.random.uniform(keys[2], scales.shape, jnp.float32, 0, 1 << self.bits), *words
        return (scales if self._wide else scales[0], *words)

    @property
    def _wide(self) -> bool:
        return self.kernel == "matmul_a16"

    @property
    def _middle(self) -> float:
        """The zero point of a mid-rise grid."""
        return ((1 << self.bits) - 1) / 2

    @property
    def _sums(self) -> bool:
        """Whether the sums of the codes come with them."""
        return self.kernel.startswith("matmul_i8")

    def run(self, impl: str, tile: Tile | None = None) -> Callable[[tuple, tuple], Array]:
        """`(activation, weight) -> y`, in the dtype of 16-bit activations, else bfloat16."""
        own = {"kernel": "triton", "interpret": "interpret", "xla": "xla"}[impl]
        options: dict[str, Any] = dict(tile=tile or self.tile, impl=own)
        match self.kernel:
            case "matmul_a16":
                zeros = lambda w: w[1] if self.zeros else None
                words = lambda w: w[2:] if self.zeros else w[1:]
                return lambda x, w: matmul_a16(
                    x[0], words(w), w[0], zeros(w), bits=self.bits, group=self.group, **options
                )
            case "matmul_a8":
                if self.zeros:
                    options |= dict(x_zero=-HALF, w_zero=self._middle)
                return lambda x, w: matmul_a8(x[0], x[1], w[1:], w[0], bits=self.bits, **options)
            case "matmul_i8" | "matmul_i8_hopper":
                if self.kernel == "matmul_i8_hopper" and impl == "kernel":
                    options["impl"] = "mosaic"
                halves = dict(x_offset=HALF, w_offset=HALF, out_dtype=self.dtype)
                return lambda x, w: matmul_i8(x[0], w[1], x[1], w[0], x_sums=x[2], w_sums=w[2], **halves, **options)
            case "matmul_fp8":
                hopper = impl == "kernel" and jax.devices()[0].device_kind.startswith(("NVIDIA H100", "NVIDIA H200"))
                options["impl"] = "mosaic" if hopper else own
                return lambda x, w: matmul_fp8(x[0], w[1], x[1], w[0], **options)
            case "matmul_mx":
                options["impl"] = "jax-triton" if impl == "kernel" else "xla"
                return lambda x, w: matmul_mx(x[0], w[1], w[0], format=f"mxfp{self.bits}", **options)
        raise ValueError(f"benchmarks.gpu has no product {self.kernel!r}; it has {', '.join(KERNELS)}.")

    def reference(self, activation: tuple, weight: tuple) -> Float64[np.ndarray, "m n"]:
        """The product in float64, on the host."""
        x = np.asarray(activation[0]).astype(np.float64)
        if self._sums or self.kernel == "matmul_a8" and self.zeros:
            x = x + HALF
        if len(activation) > 1:
            x = x * np.asarray(activation[1], np.float64)[:, None]
        return x @ self._values(weight).T

    def _values(self, weight: tuple) -> Float64[np.ndarray, "n k"]:
        scales = np.asarray(weight[0]).astype(np.float64)
        if self.kernel == "matmul_mx":
            raw = np.asarray(weight[1])
            if self.bits == 4:
                codes = np.stack([raw & 15, raw >> 4], -1).reshape(self.n, self.k).view(ml_dtypes.float4_e2m1fn)
            else:
                codes = raw.view(ml_dtypes.float8_e4m3fn)
            return codes.astype(np.float64) * np.repeat(np.exp2(scales - 127), 32, 1)
        if self._sums:
            return (np.asarray(weight[1]).astype(np.float64) + HALF) * scales[:, None]
        if self.kernel == "matmul_fp8":
            return np.asarray(weight[1]).astype(np.float64) * scales[:, None]
        drawn = self.zeros and self._wide
        codes = np.asarray(planes.unpack(weight[2 if drawn else 1 :], self.bits, self.n, self.k), np.float64)
        scales = scales.reshape(-1, self.n)
        each = lambda table: np.repeat(table, self.k // len(table), 0).T
        fixed = self._middle if self.zeros else float(1 << (self.bits - 1))
        zero = each(np.asarray(weight[1], np.float64)) if drawn else fixed
        return (codes - zero) * each(scales)


_activation = jax.jit(Product._draw_activation, static_argnums=0)
_weight = jax.jit(Product._draw_weight, static_argnums=0)


def relative_error(y: Array, reference: np.ndarray) -> float:
    """Largest difference over largest value; NaN where an element was not written."""
    return float(np.abs(np.asarray(y).astype(np.float64) - reference).max() / np.abs(reference).max())


def poisoned(function: Callable, *arguments) -> Callable[[], Any]:
    """`function(*arguments)`, compiled now and run when called, so that its results lie where NaN (or, of integers,
    0x5A) was written before."""
    shapes = jax.eval_shape(function, *arguments)
    fill = lambda s: jnp.full(s.shape, jnp.nan if jnp.issubdtype(s.dtype, jnp.inexact) else 0x5A, s.dtype)
    # The outputs take over the donated buffers of equal shape and dtype.
    run = jax.jit(lambda before, *rest: function(*rest), donate_argnums=0, keep_unused=True)
    compiled = run.lower(shapes, *arguments).compile()
    return lambda: compiled(jax.block_until_ready(jax.tree.map(fill, shapes)), *arguments)


def bytes_of(tree: object) -> int:
    return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(tree))


def bits_of(x: Array) -> Array:
    """The bit patterns of a float array."""
    return lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[jnp.dtype(x.dtype).itemsize])
