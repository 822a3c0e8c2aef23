"""`matmul_fp8` on Hopper's FP8 tensor cores (QGMMA), by Pallas on Mosaic GPU: what impl="mosaic" runs.

One warp group moves 128 contraction indices of both operands at a time into shared memory, ahead of two that multiply
them. The instruction keeps about 14 bits in its own sums, so each product of 128 starts from zero and is added to a
float32 total, scaled by its group where there are groups.
Source: the promotion of DeepSeek-V3, DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2.
"""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.checks import NoKernel, fail
from pallas_kernels.launch import Tile

STEP = 128  # contraction indices between two promotions; bytes of a swizzled row of shared memory
_GROUPS = 2  # warp groups that multiply


def default_tile() -> Tile:
    return Tile(rows=128, columns=128, warps=8, stages=4)


def run(
    x: Float[Array, "m k"],
    w: Float[Array, "n k"],
    x_scales: Float[Array, "groups m"],
    w_scales: Float[Array, "groups n"],
    out_dtype,
    tile: Tile,
) -> Float[Array, "m n"]:
    """The product of `matmul_fp8`, its arguments already checked; one group of scales or one for each 128 of K.

    Raises: ValueError for a tile other than 128 rows by 64 or 128 columns, or split; NoKernel where Pallas on Mosaic
    GPU is not installed, and for two dtypes before JAX 0.11."""
    if x.dtype != w.dtype and jax.__version_info__ < (0, 11):
        raise NoKernel(
            f"matmul_fp8 with impl='mosaic' got x of {x.dtype} and w of {w.dtype}; JAX {jax.__version__} multiplies"
            " FP8 of one dtype only there. Use impl='triton', or JAX 0.11."
        )
    if tile.rows != 128 or tile.columns not in (64, 128) or tile.split != 1:
        fail("matmul_fp8", f"got {tile} with impl='mosaic'", "It takes 128 rows, 64 or 128 columns and split=1")
    (m, k), n = x.shape, w.shape[0]
    rows, columns, length = (
        -(-size // block) * block for size, block in ((m, tile.rows), (n, tile.columns), (k, STEP))
    )
    pad = lambda a, down, across: jnp.pad(a, ((0, down - a.shape[0]), (0, across - a.shape[1])))
    groups = x_scales.shape[0]
    kernel = _kernel(rows, columns, length, groups > 1, x.dtype, w.dtype, jnp.dtype(out_dtype), tile)
    y = kernel(
        pad(x, rows, length), pad(w, columns, length), pad(x_scales, groups, rows), pad(w_scales, groups, columns)
    )
    return y[:m, :n]


def _kernel(m, n, k, grouped, x_dtype, w_dtype, out_dtype, tile) -> Callable:
    plgpu = _mosaic()
    rows, columns, part = tile.rows, tile.columns, tile.rows // _GROUPS
    transforms = (plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(STEP))

    def kernel(x_gmem, w_gmem, x_scale_gmem, w_scale_gmem, out_gmem, out_smem):
        at_m, at_n, group = lax.axis_index("m"), lax.axis_index("n"), lax.axis_index("group")
        own_rows = pl.ds(at_m * rows + group * part, part)
        own_columns = pl.ds(at_n * columns, columns)

        def scale(g):
            down = _load(plgpu, x_scale_gmem, (g, own_rows), plgpu.Layout.WGMMA.reduce(1))
            across = _load(plgpu, w_scale_gmem, (g, own_columns), plgpu.Layout.WGMMA.reduce(0))
            wide = lambda a, axis: lax.broadcast_in_dim(a, (part, columns), (axis,))
            return wide(down, 0) * wide(across, 1)

        def step(index, x_smem, w_smem, total):
            def product(sums):
                plgpu.wgmma(sums, x_smem.at[pl.ds(group * part, part)], _transposed(plgpu, w_smem))
                return sums[...]

            inner = pl.run_scoped(product, plgpu.ACC((part, columns), jnp.float32))  # pyright: ignore
            return total + (inner * scale(index[0]) if grouped else inner)

        def multiply(pipeline):
            nothing = jnp.full((part, columns), 0.0, jnp.float32)
            total = pipeline(plgpu.layout_cast(nothing, plgpu.Layout.WGMMA))
            own = out_smem.at[group]
            own[...] = (total if grouped else total * scale(0)).astype(out_dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own, out_gmem.at[own_rows, own_columns])
            plgpu.wait_smem_to_gmem(0)

        block = lambda size, at: plgpu.BlockSpec((size, STEP), lambda i: (at, i), transforms=transforms)
        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(k // STEP,),
            in_specs=[block(rows, at_m), block(columns, at_n)],
            memory_registers=40,
            wg_axis="group",
            num_compute_wgs=_GROUPS,
            max_concurrent_steps=min(tile.stages, k // STEP),
            compute_context=multiply,
        )(x_gmem, w_gmem)

    kernel.__name__ = f"matmul_{x_dtype.name}_{w_dtype.name}"  # what profilers show
    launched = inspect.signature(plgpu.kernel).parameters
    out, scratch = ("out_type", "scratch_types") if "out_type" in launched else ("out_shape", "scratch_shapes")
    return plgpu.kernel(
        kernel,
        grid=(m // rows, n // columns),
        grid_names=("m", "n"),
        num_threads=_GROUPS + 1,
        thread_name="group",
        **{
            out: jax.ShapeDtypeStruct((m, n), out_dtype),
            scratch: {"out_smem": plgpu.SMEM((_GROUPS, part, columns), out_dtype)},
        },
    )


def _mosaic():
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError as error:
        raise NoKernel(
            f"matmul_fp8 with impl='mosaic' needs Pallas on Mosaic GPU: {error}. Use impl='triton'."
        ) from error
    return mosaic_gpu


# JAX 0.10 to 0.12 spell these two differently.


def _load(plgpu, ref, index, layout):
    if "idx" in inspect.signature(plgpu.load).parameters:
        return plgpu.load(ref, index, layout=layout, optimized=False)
    return plgpu.load(ref.at[index], layout=layout, optimized=False)


def _transposed(plgpu, ref):
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))
