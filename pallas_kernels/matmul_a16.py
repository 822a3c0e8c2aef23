"""y = x W^T with W in codes of 1 to 8 bits and x in bfloat16 or float16: weights are unpacked in registers.

    y[m, n] = sum_g s[g, n] sum_(k in g) x[m, k] (u[n, k] - z[g, n])

The weights' tile is the left operand of the tensor-core product, so that it goes from packed words to registers to the
multiplier and only packed bytes pass through shared memory; the activations' tile is the right one.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import launch, planes, tuning
from pallas_kernels.checks import MATRIX_DTYPES, check_group, check_matrix, check_shape, fail
from pallas_kernels.launch import Tile
from pallas_kernels.unpack import gain, offset, to_float

WORD_BITS = 16


def matmul_a16(
    x: Float[Array, "m k"],
    words: tuple[Int[Array, "blocks rows 32"], ...],
    scales: Float[Array, "groups n"],
    zeros: Float[Array, "groups n"] | float | None = None,
    *,
    bits: int,
    group: int | None = None,
    layout: str = planes.LAYOUT,
    tile: Tile | None = None,
    impl: str = "triton",
) -> Float[Array, "m n"]:
    """x times the matrix [N, K] of codes in `words`, transposed; in the dtype of x, sums in float32.

    words: `planes.pack(codes, bits, 16)`. scales: float32 [K/group, N]; `group=None` is one scale an output channel.
    zeros: the code that means zero, a number for the whole matrix (default: 2^(bits-1)) or float32 [K/group, N]; halves
    are exact. Reference: `impl="xla"`, equal to a rounding of the result and K 2^-23 of its summands.
    Raises: ValueError for sizes, groups or layouts that do not fit, TypeError for dtypes."""
    who = "matmul_a16"
    launch.check_impl(who, impl)
    planes.check_layout(who, layout)
    m, k = check_matrix(who, "x", x, MATRIX_DTYPES)
    if scales.ndim != 2:
        fail(who, f"got scales of shape {scales.shape}", "They are [K/group, N]")
    n = scales.shape[1]
    word_bits = planes.check_words(who, words, bits, n, k)
    if word_bits != WORD_BITS:
        fail(who, "got 8-bit words", "Pack with planes.pack(codes, bits, word_bits=16) for 16-bit activations")
    length = check_group(who, group, k)
    check_shape(who, "scales", scales, (k // length, n), jnp.float32)
    if zeros is not None and not isinstance(zeros, int | float):
        check_shape(who, "zeros", zeros, (k // length, n), jnp.float32)
    zeros = float(1 << (bits - 1)) if zeros is None else zeros
    if impl == "xla":
        return _reference(x, words, scales, zeros, bits, length)
    tile = default_tile(m, n, k, bits, length) if tile is None else tile
    return _run(x, tuple(words), scales, zeros, bits, length, tile, impl)


def dequantize(
    words: tuple[Int[Array, "blocks rows 32"], ...], scales: Float[Array, "groups n"],
    zeros: Float[Array, "groups n"] | float, *, bits: int, k: int,
) -> Float[Array, "n k"]:  # fmt: skip
    """s (u - z), float32, by XLA."""
    groups, n = scales.shape
    codes = planes.unpack(words, bits, n, k).astype(jnp.float32).reshape(n, groups, k // groups)
    column = lambda a: a.T[:, :, None] if isinstance(a, jax.Array) else a
    return ((codes - column(zeros)) * column(scales)).reshape(n, k)


def _reference(x, words, scales, zeros, bits, length):
    w = dequantize(words, scales, zeros, bits=bits, k=x.shape[1])
    return lax.dot_general(
        x.astype(jnp.float32), w, (((1,), (1,)), ((), ())), lax.Precision.HIGHEST, jnp.float32
    ).astype(x.dtype)


def default_tile(m: int, n: int, k: int, bits: int, group: int) -> Tile:
    """The tuned tile of this shape's bucket, or one that compiles without spills and fills a GPU's multiprocessors."""
    if found := tuning.lookup(tuning.key("matmul_a16", bits, m, n, k)):
        tile = Tile(**found)
        if planes.padded_n(n) % tile.columns == 0 and _steps(k, bits, group) % tile.split == 0:
            return tile
    rows, step = planes.padded_n(n), _step(k, bits, group)
    if m > 64:
        columns = launch.dividing(rows, (128, 64, 32))
        block = 64  # two accumulators of 128 rows spill on Ampere
        return Tile(
            rows=block, columns=columns, warps=8 if columns == 128 else 4, stages=_stages(block, columns, step, bits)
        )
    block, columns = launch.power_of_two(m, 16, 64), launch.dividing(rows, (64, 32))
    steps, programs = _steps(k, bits, group), rows // columns * -(-m // block)
    splits = [s for s in (1, 2, 4, 8) if steps % s == 0 and (s == 1 or steps // s >= 4)]  # turns to overlap
    split = next((s for s in splits if s * programs >= tuning.PROGRAMS), splits[-1])
    return Tile(rows=block, columns=columns, split=split, stages=_stages(block, columns, step, bits))


def _stages(rows: int, columns: int, step: int, bits: int) -> int:
    """Pipeline stages whose tiles fit the shared memory of every chip since Ampere."""
    return max(1, min(3, launch.SHARED_MEMORY // (step * (2 * rows + columns * bits // 8))))


def _step(k: int, bits: int, group: int) -> int:
    """Contraction indices of one turn of the loop: whole blocks of every field and, if groups are scaled, whole
    groups."""
    block = planes.step_length(bits, WORD_BITS)
    return block if group == k else math.lcm(block, group)


def _steps(k: int, bits: int, group: int) -> int:
    return -(-k // _step(k, bits, group))


def _run(x, words, scales, zeros, bits, group, tile, impl):
    (m, k), n = x.shape, scales.shape[1]
    rows, step, steps = planes.padded_n(n), _step(k, bits, group), _steps(k, bits, group)
    if rows % tile.columns:
        fail("matmul_a16", f"got tile.columns={tile.columns} for N={n}, stored as {rows}", "Take a divisor of it")
    if steps % tile.split:
        fail(
            "matmul_a16", f"got tile.split={tile.split}, but K={k} is {steps} steps of {step}", "Take a divisor of them"
        )
    per_channel = group == k
    padded_m = -(-m // tile.rows) * tile.rows
    xp = jnp.pad(x, ((0, padded_m - m), (0, steps * step - k)))
    # u - z = (u - offset) + (offset - z): the kernel multiplies by the first, and the second meets the sums of x.
    groups = scales.shape[0]
    shift = offset(bits) - zeros
    sums = x.astype(jnp.float32).reshape(m, groups, group).sum(-1).T
    extra = steps * step // group - groups if not per_channel else 0
    sums = jnp.pad(sums, ((0, extra), (0, padded_m - m)))
    scales = jnp.pad(scales, ((0, extra), (0, rows - n)))
    shift = jnp.broadcast_to(jnp.asarray(shift, jnp.float32), (groups, n))
    shift = jnp.pad(shift, ((0, extra), (0, rows - n)))
    words = [
        jnp.pad(w, ((0, steps * step // planes.block_length(f, WORD_BITS) - w.shape[0]), (0, 0), (0, 0)))
        for w, f in zip(words, planes.FIELDS[bits], strict=True)
    ]
    kernel = functools.partial(
        _kernel, bits=bits, step=step, group=step if per_channel else group, steps=steps // tile.split,
        per_channel=per_channel, split=tile.split, use_assembly=launch.assembly(impl),
    )  # fmt: skip
    column = lambda a: pl.BlockSpec((a.shape[0], tile.columns), lambda n, m, s: (0, n))
    out = launch.call(
        kernel, f"matmul_w{bits}a16", impl, tile,
        grid=(rows // tile.columns, padded_m // tile.rows, tile.split),
        in_specs=[
            pl.BlockSpec((tile.rows, steps * step), lambda n, m, s: (m, 0)),
            column(scales), column(shift),
            pl.BlockSpec((sums.shape[0], tile.rows), lambda n, m, s: (0, m)),
            *[pl.BlockSpec((w.shape[0], tile.columns, planes.COLUMNS), lambda n, m, s: (0, n, 0)) for w in words],
        ],
        out_specs=pl.BlockSpec((1, tile.rows, tile.columns), lambda n, m, s: (s, m, n)),
        out_shape=jax.ShapeDtypeStruct((tile.split, padded_m, rows), x.dtype if tile.split == 1 else jnp.float32),
    )(xp, scales, shift, sums, *words)  # fmt: skip
    y = out[0] if tile.split == 1 else out.sum(0).astype(x.dtype)
    return y[:m, :n]


def _kernel(x_ref, scale_ref, shift_ref, sum_ref, *refs, bits, step, group, steps, per_channel, split, use_assembly):
    *word_refs, out_ref = refs
    columns, rows = out_ref.shape[2], out_ref.shape[1]
    dtype = x_ref.dtype
    fields = planes.FIELDS[bits]
    blocks = [step // planes.block_length(field, WORD_BITS) for field in fields]
    nothing = jnp.zeros((columns, rows), jnp.float32)
    part = pl.program_id(2)

    def turn(i, total):
        at = part * steps + i
        words = [
            [ref[at * count + j, :, :] for j in range(count)] for ref, count in zip(word_refs, blocks, strict=True)
        ]
        for g in range(step // group):
            inner = total if per_channel else nothing
            for c in range(g * group // planes.COLUMNS, (g + 1) * group // planes.COLUMNS):
                chosen, which = [], []
                for held, field in zip(words, fields, strict=True):
                    count = WORD_BITS // field
                    chosen.append(held[c // count])
                    which.append(c % count)
                w = to_float(chosen, bits, which, dtype, assembly=use_assembly)
                xs = x_ref[:, pl.ds(at * step + c * planes.COLUMNS, planes.COLUMNS)]
                inner = inner + jnp.dot(w, xs.T, preferred_element_type=jnp.float32)
            if per_channel:
                total = inner
            else:
                row = at * (step // group) + g
                total = total + _scaled(inner, scale_ref, shift_ref, sum_ref, row, bits)
        return total

    total = lax.fori_loop(0, steps, turn, nothing)
    if per_channel:  # one scale for the whole row; each part adds its share of the shift
        total = _scaled(total, scale_ref, shift_ref, sum_ref, 0, bits, 1 / split)
    out_ref[...] = total.T.astype(out_ref.dtype)[None]


def _scaled(inner, scale_ref, shift_ref, sum_ref, row, bits, share=1.0):
    shift = shift_ref[row, :][:, None] * (sum_ref[row, :][None, :] * share)
    return (inner * (1 / gain(bits)) + shift) * scale_ref[row, :][:, None]
