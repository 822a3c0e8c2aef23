"""y = x W^T with x in int8 codes and W in codes of 1 to 8 bits, on the integer tensor cores: sums are exact in int32.

    y[m, n] = s_x[m] s_w[n] sum_k (c[m, k] - z_x) (u[n, k] - z_w)
            = s_x s_w ( sum_k c (u - Z) + (Z - z_w) sum_k c - z_x sum_k (u - z_w) ),   Z = 2^(b-1), 0 for one bit

The integer sums are exact up to K = `longest(bits)`; zero points of half a code (mid-rise grids) enter only through the
row sums of the codes. What a zero point does not ask for is not computed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import launch, masks, matmul_i8, occupancy, planes, tuning
from pallas_kernels.checks import (
    MOST_ELEMENTS,
    SCALE_DTYPES,
    check_bits,
    check_matrix,
    check_number,
    check_offsets,
    check_out_dtype,
    check_shape,
    fail,
)
from pallas_kernels.launch import Tile
from pallas_kernels.unpack import held, plane, to_int8

WORD_BITS = 8
MANY = 512  # rows from which on the weights are unpacked first, on a chip where `matmul_i8` is that much faster
_TURN = 128  # contraction indices of one turn of the loop, at least: a shorter body is unrolled into thousands of lines


def matmul_a8(
    x: Int[Array, "m k"],
    x_scales: Float[Array, "m"],
    words: tuple[Int[Array, "blocks rows 32"], ...],
    w_scales: Float[Array, "n"],
    *,
    bits: int,
    x_zero: float = 0.0,
    w_zero: float | None = None,
    w_sums: Int[Array, "n"] | None = None,
    x_sums: Int[Array, "m"] | None = None,
    out_dtype: Any = jnp.bfloat16,
    layout: str = planes.LAYOUT,
    tile: Tile | None = None,
    impl: str = "triton",
) -> Float[Array, "m n"]:
    """The product of int8 codes `x` with the matrix [N, K] of codes in `words`, transposed.

    words: `planes.pack(codes, bits, 8)`. The value of a code c of x is x_scales (c - x_zero), of a code u of the
    weights w_scales (u - w_zero), w_zero by default 2^(bits-1); scales are float32, bfloat16 or float16. w_sums: sum of
    the codes of each output channel, int32; needed only when x_zero is not 0, and computed then if it is not given, at
    the price of unpacking all words. x_sums: sum of the codes of each row of x, int32; computed if it is needed and not
    given. Reference: `impl="xla"`; the integers are equal, the scaling to a rounding of the result.
    Raises: ValueError for sizes or layouts that do not fit or K above `longest(bits)`, TypeError for dtypes and for
    zero points that are not plain numbers."""
    who = "matmul_a8"
    launch.check_impl(who, impl)
    planes.check_layout(who, layout)
    check_bits(who, bits)
    x, x_scales, w_scales = jnp.asarray(x), jnp.asarray(x_scales), jnp.asarray(w_scales)
    m, k = check_matrix(who, "x", x, (jnp.int8,))
    if k > longest(bits):
        fail(who, f"got K={k}", f"Sums of more than {longest(bits)} products of {bits}-bit and 8-bit codes can overflow"
             " int32; split the product")  # fmt: skip
    n = w_scales.shape[0] if w_scales.ndim == 1 else fail(who, f"got w_scales of shape {w_scales.shape}", "It is [N]")
    if planes.check_words(who, words, bits, n, k) != WORD_BITS:
        fail(who, "got 16-bit words", "Pack with planes.pack(codes, bits, word_bits=8) for int8 activations")
    check_shape(who, "x_scales", x_scales, (m,), SCALE_DTYPES)
    check_shape(who, "w_scales", w_scales, (n,), SCALE_DTYPES)
    for name, sums, length in (("w_sums", w_sums, n), ("x_sums", x_sums, m)):
        if sums is not None:
            check_shape(who, name, sums, (length,), jnp.int32)
    x_zero = check_number(who, "x_zero", x_zero)
    w_zero = float(1 << (bits - 1)) if w_zero is None else check_number(who, "w_zero", w_zero)
    out_dtype = check_out_dtype(who, out_dtype)
    launch.check_tile(who, tile, launch.LEAST_ROWS, splits=True)
    if not x_zero:
        w_sums = None
    elif w_sums is None:
        w_sums = planes.unpack(tuple(words), bits, n, k).sum(-1, dtype=jnp.int32)
    if not _about(bits) and integer_zero(bits) == w_zero:
        x_sums = None
    elif x_sums is None:
        x_sums = x.sum(-1, dtype=jnp.int32)
    finish = functools.partial(_finished, bits=bits, w_zero=w_zero, x_zero=x_zero, k=k)
    sides = x_scales, w_scales, x_sums, w_sums
    if impl == "xla":
        codes = planes.unpack(tuple(words), bits, n, k).astype(jnp.int32) - (integer_zero(bits) - _about(bits))
        sums = lax.dot_general(x, codes.astype(jnp.int8), (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return finish(sums, *sides).astype(out_dtype)
    if tile is None and impl == "triton" and _unpacks_first(m, n, k):
        return _unpacked_first(x, words, sides, bits, x_zero, w_zero, out_dtype, "mosaic")
    tile = default_tile(m, n, k, bits) if tile is None else tile
    check_offsets(who, x=x.shape, out=(tile.split, m, n), **{f"words[{i}]": word.shape for i, word in enumerate(words)})
    return _run(x, tuple(words), sides, finish, bits, out_dtype, tile, impl)


def longest(bits: int) -> int:
    """The largest K whose int32 sums of products with int8 codes cannot overflow, whatever the codes.

    A product is at most 128 (2^bits - 1), and 128^2 for 8 bits, whose codes are taken about 128."""
    return ((1 << 31) - 1) // (128 * (128 if bits == 8 else (1 << bits) - 1))


def integer_zero(bits: int) -> int:
    """The code that the integer sums are taken about."""
    return 0 if bits == 1 else 1 << (bits - 1)


def _about(bits: int) -> int:
    """What is still to be taken off the codes that `to_int8` gives to have them about `integer_zero`."""
    return 0 if bits == 8 else integer_zero(bits)


def _finished(sums, x_scales, w_scales, x_sums, w_sums, *, bits, w_zero, x_zero, k, across=False):
    """From sums of x's codes and those of `to_int8` to the product, float32; [N, M] with `across`."""
    row = (lambda a: a[None, :]) if across else (lambda a: a[:, None])
    column = (lambda a: a[:, None]) if across else (lambda a: a[None, :])
    if _about(bits):
        sums = sums - _about(bits) * row(x_sums)
    y = sums.astype(jnp.float32)
    if integer_zero(bits) != w_zero:
        y = y + row((integer_zero(bits) - w_zero) * x_sums.astype(jnp.float32))
    if w_sums is not None:
        y = y - column(x_zero * (w_sums.astype(jnp.float32) - k * w_zero))
    return y * (row(x_scales.astype(jnp.float32)) * column(w_scales.astype(jnp.float32)))


def default_tile(m: int, n: int, k: int, bits: int) -> Tile:
    """The tuned tile of this shape's bucket, or one that compiles without spills and fills a GPU's multiprocessors."""
    rows = planes.padded_n(n)
    if found := tuning.lookup(tuning.key("matmul_a8", bits, m, n, k)):
        tile = Tile(**found)
        if rows % tile.columns == 0 and _steps(k, bits, tile.rows) % tile.split == 0:
            return tile
    block = launch.power_of_two(m, launch.LEAST_ROWS, 128 if m > 64 else 64)
    columns = launch.dividing(rows, (128, 64, 32) if m > 64 else (64, 32))
    step, steps = _step(k, bits, block), _steps(k, bits, block)
    if m <= launch.LEAST_ROWS:  # programs of one warp, more of which are on their way
        split, bytes_ = occupancy.split(rows // 32, steps, 1), 32 * step * bits // 8 + block * step
        return Tile(rows=block, columns=32, warps=1, stages=occupancy.stages(bytes_, 5), split=split)
    stages = occupancy.stages(columns * step * bits // 8 + block * step)
    if m > 64:
        return Tile(rows=block, columns=columns, warps=8 if columns == 128 else 4, stages=stages)
    split = occupancy.split(rows // columns * -(-m // block), steps, 1)
    return Tile(rows=block, columns=columns, warps=2 if m <= 16 else 4, stages=stages, split=split)


def _step(k: int, bits: int, rows: int = 16) -> int:
    """Contraction indices of one turn of the loop: whole blocks of every field, two where that is few bytes and the
    words as stored have so many; with more than 16 rows, whose tile of x would fill shared memory, parts of a block."""
    block = planes.step_length(bits, WORD_BITS)
    if rows > 16:
        return _TURN
    if bits <= 2 and planes.padded_k(k, bits, WORD_BITS) % (2 * block) == 0:
        return 2 * block
    return max(block, _TURN)


def _steps(k: int, bits: int, rows: int = 16) -> int:
    return -(-k // _step(k, bits, rows))


def _unpacks_first(m, n, k):
    """Whether there are rows enough for it and `matmul_i8` takes the sizes."""
    small = k <= matmul_i8.LONGEST and n * k <= MOST_ELEMENTS
    return m >= MANY and small and matmul_i8.best(m, n, k) == "mosaic"


def _unpacked_first(x, words, sides, bits, x_zero, w_zero, out_dtype, impl):
    """By `matmul_i8` from codes that XLA unpacks: N K bytes are written and read, which many rows make up for."""
    x_scales, w_scales, x_sums, w_sums = sides
    n, k, zero = w_scales.shape[0], x.shape[1], integer_zero(bits)
    codes = (planes.unpack(tuple(words), bits, n, k) - jnp.uint8(zero)).astype(jnp.int8)  # wraps around to code - zero
    return matmul_i8.matmul_i8(
        x, codes, x_scales.astype(jnp.float32), w_scales.astype(jnp.float32), x_offset=-x_zero, w_offset=zero - w_zero,
        x_sums=x_sums, w_sums=None if w_sums is None else w_sums - k * zero, out_dtype=out_dtype, impl=impl,
    )  # fmt: skip


def _run(x, words, sides, finish, bits, out_dtype, tile, impl):
    (m, k), n = x.shape, sides[1].shape[0]
    rows, step, steps = planes.padded_n(n), _step(k, bits, tile.rows), _steps(k, bits, tile.rows)
    if rows % tile.columns:
        fail("matmul_a8", f"got tile.columns={tile.columns} for N={n}, stored as {rows}", "Take a divisor of it")
    launch.check_split("matmul_a8", tile, k, step)
    whole = tile.split == 1  # else the parts' integers are added before they are scaled
    of_row, of_column = (
        pl.BlockSpec((tile.rows,), lambda n, m, s: (m,)),
        pl.BlockSpec((tile.columns,), lambda n, m, s: (n,)),
    )
    given = [(a, spec) for a, spec in zip(sides, (of_row, of_column) * 2, strict=True) if whole and a is not None]
    words = [masks.lengthened(w, steps * step // planes.block_length(f, WORD_BITS))
             for w, f in zip(words, planes.FIELDS[bits], strict=True)]  # fmt: skip
    kernel = functools.partial(
        _kernel, bits=bits, step=step, steps=steps // tile.split, sizes=(m, n, k), finish=finish if whole else None,
        present=[a is not None for a in sides], use_assembly=launch.assembly(impl),
    )  # fmt: skip
    out = launch.call(
        kernel, f"matmul_w{bits}a8", impl, tile,
        grid=(rows // tile.columns, -(-m // tile.rows), tile.split),
        in_specs=[
            pl.BlockSpec((tile.rows, steps * step), lambda n, m, s: (m, 0)),
            *[spec for _, spec in given],
            *[pl.BlockSpec((w.shape[0], tile.columns, planes.COLUMNS), lambda n, m, s: (0, n, 0)) for w in words],
        ],
        out_specs=pl.BlockSpec((None, tile.rows, tile.columns), lambda n, m, s: (s, m, n)),
        out_shape=jax.ShapeDtypeStruct((tile.split, m, n), out_dtype if whole else jnp.int32),
    )(x, *[a for a, _ in given], *words)  # fmt: skip
    return out[0] if whole else finish(out.sum(0, dtype=jnp.int32), *sides).astype(out_dtype)


def _kernel(x_ref, *refs, bits, step, steps, sizes, finish, present, use_assembly):
    m, n, k = sizes
    fields = planes.FIELDS[bits]
    *side_refs, out_ref = refs[: -1 - len(fields)] + refs[-1:]
    word_refs = refs[-1 - len(fields) : -1]
    rows, columns = out_ref.shape
    of_rows, of_columns = masks.of_block(pl.program_id(1), rows, m), masks.of_block(pl.program_id(0), columns, n)
    part = pl.program_id(2)

    def turn(i, total):
        at = part * steps + i
        words = [
            held(ref, field, WORD_BITS, step, at, assembly=use_assembly)
            for ref, field in zip(word_refs, fields, strict=True)
        ]
        for c in range(step // planes.COLUMNS):
            chosen, which = plane(words, bits, WORD_BITS, c)
            w = to_int8(chosen, bits, which, assembly=use_assembly)
            start = at * step + c * planes.COLUMNS
            of_k = None if k % step == 0 else masks.below(k, start, planes.COLUMNS)
            mask = masks.outer(of_rows, of_k, (rows, planes.COLUMNS))
            xs = masks.load(x_ref.at[:, pl.ds(start, planes.COLUMNS)], mask)
            total = total + jnp.dot(w, xs.T, preferred_element_type=jnp.int32)
        return total

    left = iter(side_refs if finish is not None else ())
    sides = [  # before the loop, so that nothing waits for them behind it
        masks.load(next(left).at[:], mask) if there and finish is not None else None
        for there, mask in zip(present, (of_rows, of_columns) * 2, strict=True)
    ]
    total = launch.loop(steps, turn, jnp.zeros((columns, rows), jnp.int32))
    if finish is not None:
        total = finish(total, *sides, across=True)
    masks.store(out_ref, total.T.astype(out_ref.dtype), masks.outer(of_rows, of_columns, (rows, columns)))
