"""How every kernel here is launched: the tile it works in, and `pallas_call` for Triton or for interpretation.

`impl` of a kernel: "triton" compiles the Pallas kernel for an NVIDIA GPU (Ampere or later), "interpret" runs the same
kernel body step by step on any backend, with the jnp twins in place of inline assembly, and "xla" is the reference that
XLA compiles anywhere.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import chips
from pallas_kernels.checks import NoKernel, check_kind, fail

IMPLS = ("triton", "interpret", "xla")
LEAST_ROWS = 8  # of the right operand of a tensor-core product; of the left one 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What one program computes, and how: rows and columns of its block, warps, pipeline stages, and into how many
    programs the contraction is cut.

    Sizes are powers of two of at least 16; where rows are the right operand of the product (`LEAST_ROWS`), 8 too.
    `split` > 1 cuts the contraction into so many programs, whose sums are added in a fixed order afterwards; of a
    rotation by tiles of 128 columns `hadamard_rows` and `hadamard_chunks` say what it cuts."""

    rows: int = 16
    columns: int = 64
    warps: int = 4
    stages: int = 3
    split: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if type(value := getattr(self, field.name)) is not int:
                fail("Tile", f"got {field.name}={value!r}", "It takes plain integers")
        for name, least in (("rows", LEAST_ROWS), ("columns", 16)):
            size = getattr(self, name)
            if size < least or size & (size - 1):
                fail("Tile", f"got {name}={size}", f"The tensor cores take powers of two from {least} on")
        if self.warps not in (1, 2, 4, 8, 16) or self.stages < 1 or self.split < 1:
            fail("Tile", f"got warps={self.warps}, stages={self.stages}, split={self.split}",
                 "Use 1, 2, 4, 8 or 16 warps, and at least one stage and one part")  # fmt: skip


def check_impl(who: str, impl: str) -> None:
    """Raises: ValueError for an unknown implementation."""
    if impl not in IMPLS:
        fail(who, f"got impl={impl!r}", f"It is one of {', '.join(IMPLS)}")


def check_tile(who: str, tile: Any, rows: int = 16, *, splits: bool = False) -> None:
    """Raises: TypeError for anything but a `Tile` or None, ValueError for one of fewer rows than the kernel takes, or
    split unless it splits."""
    if tile is None:
        return
    check_kind(who, "tile", tile, Tile)
    if tile.rows < rows:
        fail(who, f"got tile.rows={tile.rows}", f"This kernel takes powers of two from {rows} on")
    if tile.split > 1 and not splits:
        fail(who, f"got tile.split={tile.split}", "This kernel does not cut the contraction; take split=1")


def check_split(who: str, tile: Tile, k: int, step: int) -> None:
    """Raises: ValueError unless `tile.split` cuts the K contraction indices into equal numbers of steps."""
    steps = -(-k // step)
    if steps % tile.split:
        fail(who, f"got tile.split={tile.split}, but K={k} is {steps} steps of {step}", "Take a divisor of them")


def assembly(impl: str) -> bool:
    """Whether inline assembly runs (interpretation cannot)."""
    return impl == "triton"


def call(kernel: Callable, name: str, impl: str, tile: Tile, **options: Any) -> Callable:
    """`pl.pallas_call` of the kernel body.

    Inside `jax.shard_map` the results vary over every mesh axis that an operand varies over.
    Raises (the callable): NoKernel for arrays where JAX has no GPU; what is only traced may be for another machine."""

    def run(*operands: Any) -> Any:
        operands, out_shape = _vary_alike(operands, options["out_shape"])
        return pl.pallas_call(
            kernel,
            name=name,
            interpret=impl == "interpret",
            compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            **options | {"out_shape": out_shape},
        )(*operands)

    if impl == "interpret":
        return run

    def on_gpu(*operands: Any) -> Any:
        if not any(isinstance(operand, Tracer) for operand in operands) and chips.traced_kind() is None:
            raise NoKernel(
                f"{name} with impl={impl!r} needs an NVIDIA GPU, and JAX has none here. Pass impl='xla', or"
                " impl='interpret' to test the kernel itself."
            )
        return run(*operands)

    return on_gpu


def _vary_alike(operands: tuple, out_shape: Any) -> tuple[tuple, Any]:
    """Operands and results as `jax.shard_map` wants them: all varying over the same of its mesh axes."""
    axes_of = lambda operand: jax.typeof(operand).manual_axis_type.varying
    axes = frozenset().union(*map(axes_of, operands))
    if not axes:
        return operands, out_shape
    missing = lambda operand: tuple(sorted(axes - axes_of(operand), key=str))
    marked = tuple(lax.pcast(o, missing(o), to="varying") if missing(o) else o for o in operands)
    kind = jax.typeof(marked[0]).manual_axis_type
    varying = lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, manual_axis_type=kind)
    return marked, jax.tree.map(varying, out_shape)


def loop(turns: int, body: Callable, start: Any) -> Any:
    """`lax.fori_loop` from 0, its index an int32 with jax_enable_x64 too."""
    return lax.fori_loop(np.int32(0), np.int32(turns), body, start)


def power_of_two(n: int, low: int, high: int) -> int:
    """The least power of two that is at least n, kept between low and high."""
    return max(low, min(high, 1 << max(n - 1, 0).bit_length()))


def dividing(n: int, sizes: tuple[int, ...]) -> int:
    """The first of the sizes that divides n (the last is taken to)."""
    return next(size for size in sizes if n % size == 0)
