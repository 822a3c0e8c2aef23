"""y = x W^T with x in int8 codes and W in codes of 1 to 8 bits, on the integer tensor cores: sums are exact in int32.

    y[m, n] = s_x[m] s_w[n] sum_k (c[m, k] - z_x) (u[n, k] - z_w)
            = s_x s_w ( sum_k c (u - Z) + (Z - z_w) sum_k c - z_x sum_k (u - z_w) ),   Z = 2^(b-1), 0 for one bit

The first sum is an integer of at most K 2^14, exact up to K = 2^17; zero points of half a code (mid-rise grids) enter
only through the row sums of the codes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import launch, planes, tuning
from pallas_kernels.checks import check_matrix, check_shape, fail
from pallas_kernels.launch import Tile
from pallas_kernels.unpack import to_int8

WORD_BITS = 8
LONGEST = 1 << 17  # K above which an int32 sum of int8 products may overflow
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
    out_dtype=jnp.bfloat16,
    layout: str = planes.LAYOUT,
    tile: Tile | None = None,
    impl: str = "triton",
) -> Float[Array, "m n"]:
    """The product of int8 codes `x` with the matrix [N, K] of codes in `words`, transposed.

    words: `planes.pack(codes, bits, 8)`. The value of a code c of x is x_scales (c - x_zero), of a code u of the
    weights w_scales (u - w_zero), w_zero by default 2^(bits-1). w_sums: sum of the codes of each output channel, int32;
    needed only when x_zero is not 0, and computed then if it is not given, at the price of unpacking all words.
    Reference: `impl="xla"`; the integers are equal, the scaling to a rounding of the result.
    Raises: ValueError for sizes or layouts that do not fit or K above 2^17, TypeError for dtypes."""
    who = "matmul_a8"
    launch.check_impl(who, impl)
    planes.check_layout(who, layout)
    m, k = check_matrix(who, "x", x, (jnp.int8,))
    if k > LONGEST:
        fail(who, f"got K={k}", f"Sums of more than {LONGEST} products can overflow int32; split the product")
    n = w_scales.shape[0] if w_scales.ndim == 1 else fail(who, f"got w_scales of shape {w_scales.shape}", "It is [N]")
    if planes.check_words(who, words, bits, n, k) != WORD_BITS:
        fail(who, "got 16-bit words", "Pack with planes.pack(codes, bits, word_bits=8) for int8 activations")
    check_shape(who, "x_scales", x_scales, (m,), jnp.float32)
    check_shape(who, "w_scales", w_scales, (n,), jnp.float32)
    if w_sums is not None:
        check_shape(who, "w_sums", w_sums, (n,), jnp.int32)
    elif x_zero:
        w_sums = planes.unpack(tuple(words), bits, n, k).astype(jnp.int32).sum(-1)
    w_zero = float(1 << (bits - 1)) if w_zero is None else float(w_zero)
    row = x.astype(jnp.int32).sum(-1)
    row_shift = (integer_zero(bits) - w_zero) * row.astype(jnp.float32)
    column_shift = jnp.zeros((n,), jnp.float32)
    if w_sums is not None:
        column_shift = -x_zero * (w_sums.astype(jnp.float32) - k * w_zero)
    sides = row, row_shift, x_scales, column_shift, w_scales
    if impl == "xla":
        codes = planes.unpack(tuple(words), bits, n, k).astype(jnp.int32) - integer_zero(bits)
        sums = lax.dot_general(x, codes.astype(jnp.int8), (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        return _finished(sums, *sides[1:]).astype(out_dtype)
    return _run(x, tuple(words), sides, bits, out_dtype, tile or default_tile(m, n, k, bits), impl)


def _finished(sums, row_shift, x_scales, column_shift, w_scales):
    """From the integer sums about `integer_zero` to the product, float32."""
    shifted = sums.astype(jnp.float32) + row_shift[:, None] + column_shift[None, :]
    return shifted * x_scales[:, None] * w_scales[None, :]


def integer_zero(bits: int) -> int:
    """The code that the integer sums are taken about."""
    return 0 if bits == 1 else 1 << (bits - 1)


def default_tile(m: int, n: int, k: int, bits: int) -> Tile:
    """The tuned tile of this shape's bucket, or one that compiles without spills and fills a GPU's multiprocessors."""
    rows, steps = planes.padded_n(n), _steps(k, bits)
    if found := tuning.lookup(tuning.key("matmul_a8", bits, m, n, k)):
        tile = Tile(**found)
        if rows % tile.columns == 0 and steps % tile.split == 0:
            return tile
    if m > 64:
        columns = launch.dividing(rows, (128, 64, 32))
        block = launch.power_of_two(m, 16, 128)
        stages = max(1, min(3, launch.SHARED_MEMORY // (_step(bits) * (block + columns * bits // 8))))
        return Tile(rows=block, columns=columns, warps=8 if columns == 128 else 4, stages=stages)
    block, columns = launch.power_of_two(m, 16, 64), launch.dividing(rows, (64, 32))
    programs = rows // columns * -(-m // block)
    splits = [s for s in (1, 2, 4, 8) if steps % s == 0 and (s == 1 or steps // s >= 4)]  # turns to overlap
    return Tile(
        rows=block, columns=columns, split=next((s for s in splits if s * programs >= tuning.PROGRAMS), splits[-1])
    )


def _step(bits: int) -> int:
    return max(planes.step_length(bits, WORD_BITS), _TURN)


def _steps(k: int, bits: int) -> int:
    return -(-k // _step(bits))


def _run(x, words, sides, bits, out_dtype, tile, impl):
    (m, k), n = x.shape, sides[-1].shape[0]
    rows, step, steps = planes.padded_n(n), _step(bits), _steps(k, bits)
    if rows % tile.columns:
        fail("matmul_a8", f"got tile.columns={tile.columns} for N={n}, stored as {rows}", "Take a divisor of it")
    if steps % tile.split:
        fail(
            "matmul_a8", f"got tile.split={tile.split}, but K={k} is {steps} steps of {step}", "Take a divisor of them"
        )
    padded_m = -(-m // tile.rows) * tile.rows
    xp = jnp.pad(x, ((0, padded_m - m), (0, steps * step - k)))
    of_rows = [jnp.pad(a, (0, padded_m - m)) for a in sides[:3]]
    of_columns = [jnp.pad(a, (0, rows - n)) for a in sides[3:]]
    words = [
        jnp.pad(w, ((0, steps * step // planes.block_length(f, WORD_BITS) - w.shape[0]), (0, 0), (0, 0)))
        for w, f in zip(words, planes.FIELDS[bits], strict=True)
    ]
    finish = tile.split == 1  # else the parts' integers are added first
    kernel = functools.partial(
        _kernel, bits=bits, step=step, steps=steps // tile.split, finish=finish, use_assembly=launch.assembly(impl)
    )
    out = launch.call(
        kernel, f"matmul_w{bits}a8", impl, tile,
        grid=(rows // tile.columns, padded_m // tile.rows, tile.split),
        in_specs=[
            pl.BlockSpec((tile.rows, steps * step), lambda n, m, s: (m, 0)),
            *[pl.BlockSpec((tile.rows,), lambda n, m, s: (m,)) for _ in of_rows],
            *[pl.BlockSpec((tile.columns,), lambda n, m, s: (n,)) for _ in of_columns],
            *[pl.BlockSpec((w.shape[0], tile.columns, planes.COLUMNS), lambda n, m, s: (0, n, 0)) for w in words],
        ],
        out_specs=pl.BlockSpec((1, tile.rows, tile.columns), lambda n, m, s: (s, m, n)),
        out_shape=jax.ShapeDtypeStruct((tile.split, padded_m, rows), out_dtype if finish else jnp.int32),
    )(xp, *of_rows, *of_columns, *words)  # fmt: skip
    if finish:
        return out[0, :m, :n]
    about = 0 if bits == 8 else integer_zero(bits)
    return _finished(out.sum(0)[:m, :n] - about * sides[0][:, None], *sides[1:]).astype(out_dtype)


def _kernel(x_ref, row_ref, row_shift_ref, x_scale_ref, column_shift_ref, w_scale_ref, *refs, bits, step, steps, finish,
            use_assembly):  # fmt: skip
    *word_refs, out_ref = refs
    columns, rows = out_ref.shape[2], out_ref.shape[1]
    fields = planes.FIELDS[bits]
    blocks = [step // planes.block_length(field, WORD_BITS) for field in fields]
    part = pl.program_id(2)

    def turn(i, total):
        at = part * steps + i
        words = [
            [ref[at * count + j, :, :] for j in range(count)] for ref, count in zip(word_refs, blocks, strict=True)
        ]
        for c in range(step // planes.COLUMNS):
            chosen, which = [], []
            for held, field in zip(words, fields, strict=True):
                count = WORD_BITS // field
                chosen.append(held[c // count])
                which.append(c % count)
            w = to_int8(chosen, bits, which, assembly=use_assembly)
            xs = x_ref[:, pl.ds(at * step + c * planes.COLUMNS, planes.COLUMNS)]
            total = total + jnp.dot(w, xs.T, preferred_element_type=jnp.int32)
        return total

    total = lax.fori_loop(0, steps, turn, jnp.zeros((columns, rows), jnp.int32))
    about = 0 if bits == 8 else integer_zero(bits)  # 8-bit codes come out of `to_int8` about their zero already
    if not finish:
        out_ref[...] = total.T[None]
        return
    if about:
        total = total - about * row_ref[...][None, :]
    shifted = total.astype(jnp.float32) + row_shift_ref[...][None, :] + column_shift_ref[...][:, None]
    y = shifted * (x_scale_ref[...][None, :] * w_scale_ref[...][:, None])
    out_ref[...] = y.T.astype(out_ref.dtype)[None]
