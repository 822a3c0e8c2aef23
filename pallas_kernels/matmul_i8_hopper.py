"""`matmul_i8` on Hopper's integer tensor cores (IGMMA), by Pallas on Mosaic GPU: what impl="mosaic" runs.

One program a multiprocessor goes through the tiles of the result. One warp group moves 128 contraction indices of both
operands at a time into shared memory, ahead of two that multiply them; the two halve the tile's columns, or its rows
where there are more of those. Tiles are taken in groups of 8 rows of tiles, down each before across, so that what runs
together shares what it reads in the L2 cache.
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int8

from pallas_kernels import tuning
from pallas_kernels.checks import NoKernel, fail
from pallas_kernels.launch import Tile

STEP = 128  # contraction indices of one step; bytes of a swizzled row of shared memory
PART = 64  # rows and columns that are finished and stored at a time
TILES = (128, 256), (256, 128), (128, 128)  # rows and columns
_GROUPS = 2  # warp groups that multiply
_TALL = 8  # rows of tiles in a group
_SHARED_MEMORY = 232448 - 1024  # bytes of a program on Hopper, less its barriers


def why_not(m: int, n: int, k: int, tile: Tile) -> str | None:
    """Why this tile does not serve the product; None when it does."""
    if (tile.rows, tile.columns) not in TILES or tile.split != 1:
        return f"got {tile}, and it takes 128 x 256, 256 x 128 or 128 x 128 with split=1"
    if m % tile.rows or n % tile.columns or k % STEP:
        return f"got M={m}, N={n}, K={k}, and it takes multiples of {tile.rows}, {tile.columns} and {STEP}"
    return None


def default_tile(m: int, n: int, k: int) -> Tile:
    """The tuned tile of this shape's bucket, or the largest that divides the result into one a multiprocessor."""
    if found := tuning.lookup(tuning.key("matmul_i8_hopper", 8, m, n, k)):
        tile = Tile(**found)
        if why_not(m, n, k, tile) is None:
            return tile
    for rows, columns in TILES:
        if m % rows == 0 and n % columns == 0 and (m // rows) * (n // columns) >= tuning.PROGRAMS // 2:
            return Tile(rows=rows, columns=columns, warps=8, stages=4)
    return Tile(rows=128, columns=128, warps=8, stages=6)


def run(
    x: Int8[Array, "m k"],
    w: Int8[Array, "n k"],
    sides: list[tuple[Array | None, Array]],
    finish: Callable,
    out_dtype: Any,
    tile: Tile,
) -> Float[Array, "m n"]:
    """The product of `matmul_i8`, its arguments already checked; sides: (sums or None, scales) of rows and of columns.

    Raises: ValueError for sizes that the tile does not divide; NoKernel where Pallas on Mosaic GPU is not installed."""
    (m, k), n = x.shape, w.shape[0]
    if told := why_not(m, n, k, tile):
        fail("matmul_i8", f"{told} with impl='mosaic'", "impl='triton' takes any")
    given = [a for side in sides for a in side if a is not None]
    kernel = _kernel(m, n, k, tuple(sums is not None for sums, _ in sides), finish, jnp.dtype(out_dtype), tile)
    return kernel(x, w, *given)


def _kernel(m, n, k, has_sums, finish, out_dtype, tile) -> Callable:
    plgpu = _mosaic()
    by_row = tile.rows >= tile.columns  # the two groups part the tile's rows, else its columns
    own = (tile.rows // 2, tile.columns) if by_row else (tile.rows, tile.columns // 2)
    part_bytes = 2 * _GROUPS * PART * PART * out_dtype.itemsize
    steps = min(tile.stages, k // STEP, (_SHARED_MEMORY - part_bytes) // ((tile.rows + tile.columns) * STEP))
    swizzled = lambda dtype, width: (
        plgpu.TilingTransform((8, width // dtype.itemsize)), plgpu.SwizzleTransform(width)
    )  # fmt: skip
    operand, result = swizzled(jnp.dtype(jnp.int8), STEP), swizzled(out_dtype, 128)
    down, across = m // tile.rows, n // tile.columns

    def kernel(x_gmem, w_gmem, *refs):
        *side_refs, out_gmem = refs
        left = iter(side_refs)
        x_sums, x_scales = (next(left) if has_sums[0] else None), next(left)
        w_sums, w_scales = (next(left) if has_sums[1] else None), next(left)

        def pipeline(body, context):
            specs = [
                plgpu.BlockSpec((size, STEP), lambda i: (0, i), transforms=operand)
                for size in (tile.rows, tile.columns)
            ]
            return plgpu.emit_pipeline_warp_specialized(
                body, grid=(k // STEP,), in_specs=specs, memory_registers=40,
                wg_axis="group", num_compute_wgs=_GROUPS, max_concurrent_steps=steps, compute_context=context,
            )  # fmt: skip

        nothing = lambda *_, **__: None

        @functools.partial(
            pl.run_scoped,
            allocations=pipeline(nothing, nothing).get_allocations(x_gmem, w_gmem),
            out_smem=plgpu.SMEM((_GROUPS, 2, PART, PART), out_dtype, transforms=result),
            collective_axes="group",
        )
        def _(allocations, out_smem):
            group = lax.axis_index("group")

            @plgpu.nd_loop((down * across,), collective_axes="program")
            def _(loop):
                row, column = plgpu.planar_snake(loop.index[0], (down, across), 0, _TALL)
                rows, columns = pl.ds(row * tile.rows, tile.rows), pl.ds(column * tile.columns, tile.columns)
                half = pl.ds(group * own[0 if by_row else 1], own[0 if by_row else 1])
                inside = (half, slice(None)) if by_row else (slice(None), half)

                def store(total):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    load = lambda ref, at, axis: None if ref is None else _vector(plgpu, ref, at, axis)
                    parts = itertools.product(range(0, own[0], PART), range(0, own[1], PART))
                    for count, (i, j) in enumerate(parts):
                        at_row = row * tile.rows + i + (group * own[0] if by_row else 0)
                        at_column = column * tile.columns + j + (0 if by_row else group * own[1])
                        y = finish(
                            total[i : i + PART, j : j + PART],
                            load(x_sums, at_row, 0), load(x_scales, at_row, 0),
                            load(w_sums, at_column, 1), load(w_scales, at_column, 1),
                        )  # fmt: skip
                        slot = out_smem.at[group, count % 2]
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        slot[...] = y.astype(out_dtype)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(slot, out_gmem.at[pl.ds(at_row, PART), pl.ds(at_column, PART)])

                def multiply(run):
                    def summed(sums):
                        run(sums)
                        store(sums[...])

                    pl.run_scoped(summed, plgpu.ACC(own, jnp.int32))  # pyright: ignore

                def step(_, x_smem, w_smem, sums):
                    plgpu.wgmma(sums, x_smem.at[inside[0]], _transposed(plgpu, w_smem.at[inside[1]]))
                    plgpu.wgmma_wait(0)
                    return sums

                pipeline(step, multiply)(x_gmem.at[rows], w_gmem.at[columns], allocations=allocations)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel.__name__ = "matmul_i8_hopper"  # what profilers show
    launched = inspect.signature(plgpu.kernel).parameters
    out: dict[str, Any] = {
        "out_type" if "out_type" in launched else "out_shape": jax.ShapeDtypeStruct((m, n), out_dtype)
    }
    return plgpu.kernel(
        kernel,
        grid=(_multiprocessors(),),
        grid_names=("program",),
        num_threads=_GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **out,
    )


def _vector(plgpu, ref, start, axis) -> Array:
    """PART numbers of a vector, to be broadcast along the rows (axis 0) or columns of a part of the result."""
    at, layout = pl.ds(start, PART), plgpu.Layout.WGMMA.reduce(1 - axis)
    if "idx" in inspect.signature(plgpu.load).parameters:
        found = plgpu.load(ref, at, layout=layout, optimized=False)
    else:
        found = plgpu.load(ref.at[at], layout=layout, optimized=False)
    return lax.broadcast_in_dim(found, (PART, PART), (axis,))


def _transposed(plgpu, ref):
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def _multiprocessors() -> int:
    told = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return told.num_cores if told is not None else jax.devices()[0].core_count


def _mosaic():
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError as error:
        raise NoKernel(
            f"matmul_i8 with impl='mosaic' needs Pallas on Mosaic GPU: {error}. Use impl='triton'."
        ) from error
    return mosaic_gpu
