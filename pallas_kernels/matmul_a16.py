"""y = x W^T with W in codes of 1 to 8 bits and x in bfloat16 or float16: weights are unpacked in registers.

    y[m, n] = sum_g s[g, n] sum_(k in g) x[m, k] (u[n, k] - z[g, n])

The weights' tile is the left operand of the tensor-core product, so that it goes from packed words to registers to the
multiplier and only packed bytes pass through shared memory; the activations' tile is the right one. A zero point of
2^(b-1) or (2^b - 1)/2, those of integer and of mid-rise grids, is part of the unpacking and costs nothing; others are
made up for with the sums of x over each group.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import launch, masks, occupancy, planes, tuning
from pallas_kernels.checks import (
    MATRIX_DTYPES,
    SCALE_DTYPES,
    check_group,
    check_matrix,
    check_offsets,
    check_out_dtype,
    check_shape,
    fail,
)
from pallas_kernels.launch import Tile
from pallas_kernels.unpack import gain, held, offset, plane, to_float

WORD_BITS = 16
MOST_OF_A_GROUP = 1024  # contraction indices
_LONG = 256  # contraction indices of a group, up to which tuned tiles serve
_SHORT = 128  # contraction indices of a turn with many rows, unless a group is longer


def matmul_a16(
    x: Float[Array, "m k"],
    words: tuple[Int[Array, "blocks rows 32"], ...],
    scales: Float[Array, "groups n"],
    zeros: Float[Array, "groups n"] | float | None = None,
    *,
    bits: int,
    group: int | None = None,
    out_dtype: Any = None,
    layout: str = planes.LAYOUT,
    tile: Tile | None = None,
    impl: str = "triton",
) -> Float[Array, "m n"]:
    """x times the matrix [N, K] of codes in `words`, transposed; in `out_dtype` (default: that of x), sums in float32.

    words: `planes.pack(codes, bits, 16)`. scales: float32, bfloat16 or float16 [K/group, N]; `group=None` is one scale
    an output channel. zeros: the code that means zero, a number for the whole matrix (default: 2^(bits-1)) or an array
    like the scales; halves are exact. An infinite x gives what the reference does, but NaN with other zeros than
    2^(bits-1) and (2^bits - 1)/2. Reference: `impl="xla"`, equal to a rounding of the result and K 2^-23 of its
    summands.
    Raises: ValueError for sizes, groups or layouts that do not fit and, where it is compiled, groups above 1024;
    TypeError for dtypes."""
    who = "matmul_a16"
    launch.check_impl(who, impl)
    planes.check_layout(who, layout)
    x, scales = jnp.asarray(x), jnp.asarray(scales)
    m, k = check_matrix(who, "x", x, MATRIX_DTYPES)
    out_dtype = x.dtype if out_dtype is None else check_out_dtype(who, out_dtype)
    if scales.ndim != 2:
        fail(who, f"got scales of shape {scales.shape}", "They are [K/group, N]")
    n = scales.shape[1]
    word_bits = planes.check_words(who, words, bits, n, k)
    if word_bits != WORD_BITS:
        fail(who, "got 8-bit words", "Pack with planes.pack(codes, bits, word_bits=16) for 16-bit activations")
    length = check_group(who, group, k)
    check_shape(who, "scales", scales, (k // length, n), SCALE_DTYPES)
    if zeros is None:
        zeros = float(1 << (bits - 1))
    elif isinstance(zeros, int | float | np.integer | np.floating):
        zeros = float(zeros)
    else:
        zeros = jnp.asarray(zeros)
        check_shape(who, "zeros", zeros, (k // length, n), SCALE_DTYPES)
    launch.check_tile(who, tile, launch.LEAST_ROWS, splits=True)
    if impl == "triton" and MOST_OF_A_GROUP < length < k:
        fail(who, f"got group={group}", f"The loop over a group is written out, and above {MOST_OF_A_GROUP}"
             f" indices it runs out of registers; scale channels, or pass impl='xla'")  # fmt: skip
    if impl == "xla":
        return _reference(x, words, scales, zeros, bits, length).astype(out_dtype)
    tile = default_tile(m, n, k, bits, length) if tile is None else tile
    check_offsets(who, x=x.shape, out=(tile.split, m, n), **{f"words[{i}]": word.shape for i, word in enumerate(words)})
    return _run(x, tuple(words), scales, zeros, bits, length, tile, impl, out_dtype)


def dequantize(
    words: tuple[Int[Array, "blocks rows 32"], ...], scales: Float[Array, "groups n"],
    zeros: Float[Array, "groups n"] | float, *, bits: int, k: int,
) -> Float[Array, "n k"]:  # fmt: skip
    """s (u - z), float32, by XLA."""
    scales, zeros = jnp.asarray(scales, jnp.float32), jnp.asarray(zeros, jnp.float32)
    groups, n = scales.shape
    codes = planes.unpack(words, bits, n, k).astype(jnp.float32).reshape(n, groups, k // groups)
    column = lambda a: a.T[:, :, None] if a.ndim else a
    return ((codes - column(zeros)) * column(scales)).reshape(n, k)


def _reference(x, words, scales, zeros, bits, length):
    w = dequantize(words, scales, zeros, bits=bits, k=x.shape[1])
    return lax.dot_general(x.astype(jnp.float32), w, (((1,), (1,)), ((), ())), lax.Precision.HIGHEST, jnp.float32)


def default_tile(m: int, n: int, k: int, bits: int, group: int) -> Tile:
    """The tuned tile of this shape's bucket, or one that compiles without spills and fills a GPU's multiprocessors."""
    short = group == k or group <= _LONG  # a longer group makes a longer turn than the tuner saw
    if short and (found := tuning.lookup(tuning.key("matmul_a16", bits, m, n, k))):
        tile = Tile(**found)
        if planes.padded_n(n) % tile.columns == 0 and _steps(k, bits, group, tile.rows) % tile.split == 0:
            return tile
    rows = planes.padded_n(n)
    block = launch.power_of_two(m, launch.LEAST_ROWS, 64)  # two accumulators of 128 rows spill on Ampere
    columns = launch.dividing(rows, (128, 64, 32) if m > 64 else (64, 32))
    step, steps = _step(k, bits, group, block), _steps(k, bits, group, block)
    stages = occupancy.stages(columns * step * bits // 8 + 2 * block * step)
    if m > 64:
        return Tile(rows=block, columns=columns, warps=8 if columns == 128 else 4, stages=stages)
    plain = bits in (4, 8)  # one field, and words enough that unpacking them keeps many programs busy
    split = occupancy.split(rows // columns * -(-m // block), steps, 6 if plain else 1)
    return Tile(rows=block, columns=columns, warps=2 if plain and m <= 16 else 4, stages=stages, split=split)


def _step(k: int, bits: int, group: int, rows: int = 16) -> int:
    """Contraction indices of one turn of the loop: whole groups, if they are scaled, and whole blocks of every field.

    Where whole blocks would be too much for the registers, or, with more than 16 rows, the tile of x for shared memory,
    equal parts of a block, whose words are then read again for each part."""
    block, whole = planes.step_length(bits, WORD_BITS), 1 if group == k else group
    if whole & (whole - 1) == 0:
        if rows > 16:
            block = min(block, _SHORT)
        elif whole == 32 and len(planes.FIELDS[bits]) > 1:
            block = max(block // 2, _SHORT)
    return math.lcm(block, whole)


def _steps(k: int, bits: int, group: int, rows: int = 16) -> int:
    return -(-k // _step(k, bits, group, rows))


def _run(x, words, scales, zeros, bits, group, tile, impl, out_dtype):
    (m, k), (groups, n) = x.shape, scales.shape
    rows, step, steps = planes.padded_n(n), _step(k, bits, group, tile.rows), _steps(k, bits, group, tile.rows)
    if rows % tile.columns:
        fail("matmul_a16", f"got tile.columns={tile.columns} for N={n}, stored as {rows}", "Take a divisor of it")
    launch.check_split("matmul_a16", tile, k, step)
    midrise, shifted = _zero_form(bits, zeros)
    of_groups = pl.BlockSpec((groups, tile.columns), lambda n, m, s: (0, n))
    operands, specs = [x, scales], [pl.BlockSpec((tile.rows, steps * step), lambda n, m, s: (m, 0)), of_groups]
    if shifted:  # u - z = (u - offset) + (offset - z): the second meets the sums of x over each group
        operands += [_group_sums(x, groups)]
        specs += [pl.BlockSpec((groups, tile.rows), lambda n, m, s: (0, m))]
    if not isinstance(zeros, float):
        operands += [zeros]
        specs += [of_groups]
    words = [masks.lengthened(w, steps * step // planes.block_length(f, WORD_BITS))
             for w, f in zip(words, planes.FIELDS[bits], strict=True)]  # fmt: skip
    kernel = functools.partial(
        _kernel, bits=bits, step=step, group=step if group == k else group, steps=steps // tile.split,
        per_channel=group == k, split=tile.split, sizes=(m, n, k), midrise=midrise,
        zero=zeros if shifted and isinstance(zeros, float) else None,
        use_assembly=launch.assembly(impl),
    )  # fmt: skip
    out = launch.call(
        kernel, f"matmul_w{bits}a16", impl, tile,
        grid=(rows // tile.columns, -(-m // tile.rows), tile.split),
        in_specs=[
            *specs,
            *[pl.BlockSpec((w.shape[0], tile.columns, planes.COLUMNS), lambda n, m, s: (0, n, 0)) for w in words],
        ],
        out_specs=pl.BlockSpec((None, tile.rows, tile.columns), lambda n, m, s: (s, m, n)),
        out_shape=jax.ShapeDtypeStruct((tile.split, m, n), out_dtype if tile.split == 1 else jnp.float32),
    )(*operands, *words)  # fmt: skip
    return out[0] if tile.split == 1 else out.sum(0).astype(out_dtype)


def _zero_form(bits: int, zeros: Float[Array, "groups n"] | float) -> tuple[bool, bool]:
    """(whether weights are unpacked about half a code, whether a shift by the sums of x remains)."""
    if isinstance(zeros, float):
        for midrise in (False, True):
            if zeros == offset(bits, midrise):
                return midrise, False
    return bits == 1, True  # one bit is quickest as a sign


def _group_sums(x, groups):
    return x.astype(jnp.float32).reshape(x.shape[0], groups, -1).sum(-1).T


def _scaled(inner, of_group, *, bits, midrise, zero, share=1.0):
    """One group's product by its scale, with what the zero point still asks for.

    of_group: its scales, sums of x and zeros, as far as there are any; share: of the sums that is added here."""
    scale, *others = [side.astype(jnp.float32) for side in of_group]
    if not others:
        return inner * (scale * (1 / gain(midrise)))[:, None]
    sums = others[0][None, :] * share
    if zero is not None:
        shift = (offset(bits, midrise) - zero) * sums
    else:
        shift = offset(bits, midrise) - others[1][:, None]
        shift = jnp.where(shift == 0, 0, shift * sums)  # sums may be infinite
    return (inner * (1 / gain(midrise)) + shift) * scale[:, None]


def _kernel(x_ref, scale_ref, *refs, bits, step, group, steps, per_channel, split, sizes, midrise, zero,
            use_assembly):  # fmt: skip
    m, n, k = sizes
    *side_refs, out_ref = refs[: -1 - len(planes.FIELDS[bits])] + refs[-1:]  # sums of x and zeros, if there is a shift
    word_refs = refs[len(side_refs) : -1]
    columns, rows = out_ref.shape[1], out_ref.shape[0]
    nothing = jnp.zeros((columns, rows), jnp.float32)
    part = pl.program_id(2)
    of_rows, of_columns = masks.of_block(pl.program_id(1), rows, m), masks.of_block(pl.program_id(0), columns, n)
    last = None if k % step == 0 else scale_ref.shape[0] - 1  # rows of scales behind this one are not there

    def line(ref, row, mask):
        if last is not None:
            mask = (row <= last) & (jnp.ones(ref.shape[1], jnp.bool_) if mask is None else mask)
        return masks.load(ref.at[pl.ds(row, 1), :], None if mask is None else mask[None]).reshape(-1)

    def sides(row):
        """A group's scales, and where there is a shift the sums of x over it and its zeros, as they are stored."""
        refs = zip((scale_ref, *side_refs), (of_columns, of_rows, of_columns), strict=False)
        return [line(ref, row, mask) for ref, mask in refs]

    scaled = functools.partial(_scaled, bits=bits, midrise=midrise, zero=zero)
    groups = step // group  # of a turn

    def turn(i, carried):
        total, now = carried
        at = part * steps + i
        following = part * steps + jnp.minimum(i + 1, steps - 1)
        words = [
            held(ref, field, WORD_BITS, step, at, assembly=use_assembly)
            for ref, field in zip(word_refs, planes.FIELDS[bits], strict=True)
        ]
        ahead = []  # loaded a turn before they are used
        for g in range(groups):
            inner = total if per_channel else nothing
            for c in range(g * group // planes.COLUMNS, (g + 1) * group // planes.COLUMNS):
                chosen, which = plane(words, bits, WORD_BITS, c)
                w = to_float(chosen, bits, which, x_ref.dtype, midrise=midrise, assembly=use_assembly)
                start = at * step + c * planes.COLUMNS
                of_k = None if last is None else masks.below(k, start, planes.COLUMNS)
                mask = masks.outer(of_rows, of_k, (rows, planes.COLUMNS))
                xs = masks.load(x_ref.at[:, pl.ds(start, planes.COLUMNS)], mask)
                inner = inner + jnp.dot(w, xs.T, preferred_element_type=jnp.float32)
            total = inner if per_channel else total + scaled(inner, now[g])
            ahead.append(now[g] if per_channel else sides(following * groups + g))
        return total, ahead

    first = [sides(0)] if per_channel else [sides(part * steps * groups + g) for g in range(groups)]
    total, (whole, *_) = launch.loop(steps, turn, (nothing, first))
    if per_channel:  # one scale for the whole row; each part adds its share of the shift
        total = scaled(total, whole, share=1 / split)
    masks.store(out_ref, total.T.astype(out_ref.dtype), masks.outer(of_rows, of_columns, (rows, columns)))
