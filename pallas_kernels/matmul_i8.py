"""y = x W^T with x and W in int8 codes, on the integer tensor cores: exact sums, zero points and scales in one pass.

    y[m, n] = s_x[m] s_w[n] sum_k (c_x[m, k] + o_x)(c_w[n, k] + o_w)
            = s_x s_w ( sum_k c_x c_w + o_w sum_k c_x + o_x sum_k c_w + K o_x o_w )

The first sum is an int32; the sums of the codes come from whoever made them (`hadamard_quantize` gives them). o is 1/2
on a mid-rise grid and 0 on an integer one. Nothing of the size of the result is written but the result.

Programs go down columns of `_GROUP` tiles of rows before they take the next columns, so that those that run together
share what they read in the L2 cache. Edges are masked: no operand is padded. `impl="mosaic"` is matmul_i8_hopper.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int8, Int32

from pallas_kernels import chips, launch, masks, matmul_i8_hopper, tuning
from pallas_kernels.checks import check_finite, check_matrix, check_offsets, check_out_dtype, check_shape, fail
from pallas_kernels.launch import Tile

LONGEST = (2**31 - 1) // 2**14  # K up to which no sum of products of int8 overflows int32
STEP = 128  # contraction indices of one turn of the loop
PART = 128  # columns of one accumulator
_GROUP = 8


def matmul_i8(
    x: Int8[Array, "m k"],
    w: Int8[Array, "n k"],
    x_scales: Float[Array, "m"],
    w_scales: Float[Array, "n"],
    *,
    x_offset: float = 0.0,
    w_offset: float = 0.0,
    x_sums: Int32[Array, "m"] | None = None,
    w_sums: Int32[Array, "n"] | None = None,
    out_dtype=jnp.bfloat16,
    tile: Tile | None = None,
    impl: str = "triton",
) -> Float[Array, "m n"]:
    """x times W transposed; the value of a code c is scale (c + offset).

    impl="mosaic" is for Hopper alone, and for sizes that `matmul_i8_hopper.why_not` has nothing against; `best` tells.
    x_sums, w_sums: the sum of each row's codes, needed where the other side's offset is not 0. Reference: `impl="xla"`;
    the integers are equal, the rest are four float32 operations in the same order and the rounding of the result.
    Raises: ValueError for sizes that do not fit, missing sums, K above 131071, where a sum could overflow int32, and
    (the kernel) arrays of more than 2^31 - 1 elements; TypeError for dtypes and offsets that are no plain numbers."""
    who = "matmul_i8"
    if impl != "mosaic":
        launch.check_impl(who, impl)
    m, k = check_matrix(who, "x", x, (jnp.int8,))
    n, k_of_w = check_matrix(who, "w", w, (jnp.int8,))
    if k != k_of_w:
        fail(who, f"got x of shape {x.shape} and w of shape {w.shape}", "Both end in K: w is [N, K]")
    if k > LONGEST:
        fail(who, f"got K={k}", f"Sums of more than {LONGEST} products can overflow int32; add up parts of the product")
    out_dtype = check_out_dtype(who, out_dtype)
    launch.check_tile(who, tile)
    check_shape(who, "x_scales", x_scales, (m,), jnp.float32)
    check_shape(who, "w_scales", w_scales, (n,), jnp.float32)
    offsets = check_finite(who, "x_offset", x_offset), check_finite(who, "w_offset", w_offset)
    sums = _needed_sums(who, "x_sums", x_sums, m, offsets[1]), _needed_sums(who, "w_sums", w_sums, n, offsets[0])
    if impl == "xla":
        total = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        by_row = tuple(a if a is None else a[:, None] for a in (sums[0], x_scales))
        by_column = tuple(a if a is None else a[None, :] for a in (sums[1], w_scales))
        return _finished(total, k, offsets, *by_row, *by_column).astype(out_dtype)
    check_offsets(who, x=(m, k), w=(n, k), out=(m, n))
    if impl == "mosaic":
        finish = functools.partial(_finish, k=k, offsets=offsets)
        sides = [(sums[0], x_scales), (sums[1], w_scales)]
        tile = matmul_i8_hopper.default_tile(m, n, k) if tile is None else tile
        return matmul_i8_hopper.run(x, w, sides, finish, out_dtype, tile)
    tile = default_tile(m, n, k) if tile is None else tile
    return _run(x, w, x_scales, w_scales, sums, offsets, out_dtype, tile, impl)


def best(m: int, n: int, k: int) -> str:
    """The impl for these sizes on the GPU traced for: "mosaic" on Hopper where its tiles divide them, else "triton"."""
    if chips.traced_capability() != (9, 0) or jax.__version_info__ < (0, 11):
        return "triton"
    tile = matmul_i8_hopper.default_tile(m, n, k)
    return "triton" if matmul_i8_hopper.why_not(m, n, k, tile) else "mosaic"


def default_tile(m: int, n: int, k: int) -> Tile:
    """The tuned tile of this shape's bucket, or one that compiles without spills and fills a GPU's multiprocessors."""
    if (found := tuning.lookup(tuning.key("matmul_i8", 8, m, n, k))) and found.get("split", 1) == 1:
        return Tile(**found)
    if min(m, n) <= 64:
        return Tile(rows=launch.power_of_two(m, 16, 64), columns=launch.power_of_two(n, 16, 64), warps=4, stages=3)
    wide = _wide() and -(-m // 128) * -(-n // 256) >= tuning.PROGRAMS
    return Tile(rows=128, columns=256 if wide else 128, warps=8, stages=3)


def _wide() -> bool:
    """Whether the chip has room for two accumulators of 128 columns: where operands pass through registers on their way
    to the tensor cores (all but Hopper and Blackwell's data-center chips), 240 bytes spill."""
    return chips.traced_capability()[0] in (0, 9, 10)  # 0: not known


def cases() -> list[tuple]:
    """For a compile test: (name, function, argument shapes, {chip: part of its tensor-core instruction, or None})."""
    shape = jax.ShapeDtypeStruct
    chips = {"sm_80": "IMMA", "sm_89": "IMMA", "sm_90": "IGMMA", "sm_100": "UTCIMMA"}
    midrise = functools.partial(_with_sums, x_offset=0.5, w_offset=0.5)

    def arguments(m, n, k, sums=True):
        sides = [shape((size,), dtype) for dtype in (jnp.float32, *[jnp.int32] * sums) for size in (m, n)]
        return shape((m, k), jnp.int8), shape((n, k), jnp.int8), *sides

    return [
        ("matmul_i8", midrise, arguments(4096, 14336, 4096), chips),
        ("matmul_i8_square", midrise, arguments(2048, 2048, 2048), chips),
        ("matmul_i8_edges", midrise, arguments(4000, 14300, 4080), chips),
        ("matmul_i8_float32", functools.partial(matmul_i8, out_dtype=jnp.float32),
         arguments(4096, 14336, 4096, sums=False), chips),
        ("matmul_i8_few_rows", midrise, arguments(48, 4096, 4096), chips),
        ("matmul_i8_hopper", functools.partial(midrise, impl="mosaic"), arguments(4096, 14336, 4096),
         {"sm_90": "IGMMA"}),
        ("matmul_i8_hopper_square", functools.partial(midrise, impl="mosaic"), arguments(2048, 2048, 2048),
         {"sm_90": "IGMMA"}),
    ]  # fmt: skip


def _with_sums(x, w, x_scales, w_scales, x_sums, w_sums, **options):
    return matmul_i8(x, w, x_scales, w_scales, x_sums=x_sums, w_sums=w_sums, **options)


def _needed_sums(who, name, sums, size, offset):
    """The sums, or None where the other side has no offset."""
    if not offset:
        return None
    if sums is None:
        side = name[0]
        other = "w" if side == "x" else "x"
        fail(who, f"got {other}_offset={offset} and no {name}",
             f"Pass {name}={side}.astype(int32).sum(1), or what hadamard_quantize gave")  # fmt: skip
    check_shape(who, name, sums, (size,), jnp.int32)
    return sums


def _finished(total, k, offsets, x_sums, x_scales, w_sums, w_scales):
    """From the integer sums to the product, float32; the sides broadcast against `total`."""
    x_offset, w_offset = offsets
    y = total.astype(jnp.float32)
    if x_sums is not None:
        y = y + w_offset * x_sums.astype(jnp.float32)
    if w_sums is not None:
        y = y + x_offset * w_sums.astype(jnp.float32)
    if x_offset * w_offset:
        y = y + k * x_offset * w_offset
    return y * x_scales * w_scales


def _finish(total, x_sums, x_scales, w_sums, w_scales, *, k, offsets):
    return _finished(total, k, offsets, x_sums, x_scales, w_sums, w_scales)


def _run(x, w, x_scales, w_scales, sums, offsets, out_dtype, tile, impl):
    (m, k), n = x.shape, w.shape[0]
    down, across = -(-m // tile.rows), -(-n // tile.columns)
    at = functools.partial(_place, down=down, across=across)
    row, column = (lambda p: (at(p)[0],)), (lambda p: (at(p)[1],))
    sides = [(x_scales, tile.rows, row), (w_scales, tile.columns, column)]
    sides += [side for side in ((sums[0], tile.rows, row), (sums[1], tile.columns, column)) if side[0] is not None]
    kernel = functools.partial(
        _kernel, sizes=(m, n, k), at=at, offsets=offsets, has_sums=tuple(s is not None for s in sums)
    )
    return launch.call(
        kernel, "matmul_i8", impl, tile, grid=(down * across,),
        in_specs=[
            pl.BlockSpec((tile.rows, k), lambda p: (at(p)[0], 0)),
            pl.BlockSpec((tile.columns, k), lambda p: (at(p)[1], 0)),
            *[pl.BlockSpec((size,), where) for _, size, where in sides],
        ],
        out_specs=pl.BlockSpec((tile.rows, tile.columns), lambda p: at(p)),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
    )(x, w, *[a for a, _, _ in sides])  # fmt: skip


def _place(program, *, down, across):
    """(tile of rows, tile of columns) of a program: groups of `_GROUP` tiles of rows, down each before across."""
    program = lax.convert_element_type(program, jnp.int32)
    whole = jnp.int32(_GROUP * across)
    first = lax.div(program, whole) * jnp.int32(_GROUP)
    height = lax.min(jnp.int32(down) - first, jnp.int32(_GROUP))
    inside = lax.rem(program, whole)
    return first + lax.rem(inside, height), lax.div(inside, height)


def _kernel(x_ref, w_ref, x_scale_ref, w_scale_ref, *refs, sizes, at, offsets, has_sums):
    *sum_refs, out_ref = refs
    rows, columns = out_ref.shape
    m, n, k = sizes
    row, column = at(pl.program_id(0))
    row_in = masks.of_block(row, rows, m)
    # Each part of the result leaves the tensor cores' own memory (on Blackwell), is finished and is stored alone.
    width = min(columns, PART)
    parts = [pl.ds(start, width) for start in range(0, columns, width)]
    parts_in = [masks.of_block(column * len(parts) + i, width, n) for i in range(len(parts))]

    def read(ref, part, inside, i):
        k_in = masks.of_block(i, STEP, k)
        return masks.load(ref.at[part, pl.ds(i * STEP, STEP)], masks.outer(inside, k_in, (part.size, STEP)))

    def turn(i, totals):
        x = read(x_ref, pl.ds(0, rows), row_in, i)
        multiply = lambda w: lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        each = zip(totals, parts, parts_in, strict=True)
        return tuple(total + multiply(read(w_ref, part, inside, i)) for total, part, inside in each)

    zeros = jnp.zeros((rows, width), jnp.int32)
    totals = launch.loop(-(-k // STEP), turn, tuple(zeros for _ in parts))
    sums = iter(sum_refs)
    x_sum_ref, w_sum_ref = (next(sums) if has else None for has in has_sums)
    side = lambda ref, part, inside: None if ref is None else masks.load(ref.at[part], inside)
    of_rows = [side(ref, pl.ds(0, rows), row_in) for ref in (x_sum_ref, x_scale_ref)]
    of_rows = [a if a is None else a[:, None] for a in of_rows]
    for total, part, inside in zip(totals, parts, parts_in, strict=True):
        of_columns = [side(ref, part, inside) for ref in (w_sum_ref, w_scale_ref)]
        of_columns = [a if a is None else a[None, :] for a in of_columns]
        y = _finished(total, k, offsets, *of_rows, *of_columns).astype(out_ref.dtype)
        masks.store(out_ref.at[:, part], y, masks.outer(row_in, inside, (rows, width)))
