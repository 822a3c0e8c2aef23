"""Fresh random operands of each product, and their float64 reference."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64

from pallas_kernels import planes
from pallas_kernels.launch import Tile
from pallas_kernels.matmul_a8 import matmul_a8
from pallas_kernels.matmul_a16 import matmul_a16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A packed product as a function of its activation and one weight's arrays."""

    kernel: str  # matmul_a16 or matmul_a8
    bits: int
    m: int
    n: int
    k: int
    group: int | None = None

    @property
    def name(self) -> str:
        return f"w{self.bits}a{self.kernel.removeprefix('matmul_a')}"

    def activation(self, seed: int) -> tuple[Array, ...]:
        random = np.random.default_rng(seed)
        if self.kernel == "matmul_a16":
            return (jnp.asarray(random.standard_normal((self.m, self.k), np.float32), jnp.bfloat16),)
        codes = random.integers(-127, 128, (self.m, self.k), dtype=np.int8)
        return jnp.asarray(codes), jnp.asarray(random.random(self.m, np.float32) + 0.5)

    def weight(self, seed: int) -> tuple[Array, ...]:
        random = np.random.default_rng(seed)
        codes = jnp.asarray(random.integers(0, 1 << self.bits, (self.n, self.k), dtype=np.uint8))
        groups = 1 if self.group is None or self.kernel == "matmul_a8" else self.k // self.group
        scales = jnp.asarray(random.random((groups, self.n), np.float32) + 0.5)
        words = planes.pack(codes, self.bits, 16 if self.kernel == "matmul_a16" else 8)
        return (scales, *words) if self.kernel == "matmul_a16" else (scales[0], *words)

    def run(self, impl: str, tile: Tile | None = None) -> Callable[[tuple, tuple], Array]:
        """`(activation, weight) -> y`, bfloat16."""
        if self.kernel == "matmul_a16":
            return lambda x, w: matmul_a16(x[0], w[1:], w[0], bits=self.bits, group=self.group, tile=tile, impl=impl)
        return lambda x, w: matmul_a8(x[0], x[1], w[1:], w[0], bits=self.bits, tile=tile, impl=impl)

    def reference(self, activation: tuple, weight: tuple) -> Float64[np.ndarray, "m n"]:
        """The product in float64, on the host."""
        codes = np.asarray(planes.unpack(weight[1:], self.bits, self.n, self.k), np.float64)
        scales = np.asarray(weight[0], np.float64).reshape(-1, self.n)
        values = (codes - float(1 << (self.bits - 1))) * np.repeat(scales, self.k // len(scales), 0).T
        x = np.asarray(activation[0], np.float64)
        if self.kernel == "matmul_a8":
            x = x * np.asarray(activation[1], np.float64)[:, None]
        return x @ values.T


def relative_error(y: Array, reference: np.ndarray) -> float:
    """Largest difference over largest value."""
    return float(np.abs(np.asarray(y, np.float64) - reference).max() / np.abs(reference).max())


def poison(bytes_: int) -> None:
    """Fills and frees memory with NaN, so that an output that nobody wrote is seen."""
    jax.block_until_ready(jnp.full((bytes_ // 4,), jnp.nan, jnp.float32))
