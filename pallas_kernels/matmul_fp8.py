"""y = x W^T with x and W in FP8 (E4M3 or E5M2), scaled by tensor, by row and channel, or by blocks of 128.

    y[m, n] = sum_g s_x[m, g] s_w[n, g] sum_(k in g) x[m, k] w[n, k]

Groups g are 128 long in the block-scaled form (DeepSeek-V3: activations in tiles of 1 x 128, weights in blocks of
128 x 128), and the sum of a group is added to a float32 total; one group in the others.

What multiplies, under impl="triton" (read off the machine code, see `pallas_kernels.deviceless`):

    through     sm_80   sm_89   sm_90          sm_100
    float8      aborts  QMMA    HMMA           UTCQMMA    FP8 tensor cores; one dtype on both sides
    float16     aborts  HMMA    HGMMA          UTCHMMA    widened to float16, exactly, by the chip's conversion
    bits        HMMA    HMMA    HGMMA          UTCHMMA    the same by shifts, where the chip has no FP8

Pallas cannot tell Triton that the sums inside Hopper's FP8 instruction, of about 14 bits, are good enough, so that
Triton takes the 16-bit instruction there. "aborts": the compiler would end the process, so "bits" is the default
there and the others raise NoKernel.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import chips, launch, matmul_fp8_hopper, tuning
from pallas_kernels.checks import NoKernel, check_array, check_matrix, check_offsets, check_out_dtype, fail
from pallas_kernels.launch import Tile

DTYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)
THROUGH = ("float8", "float16", "bits")
BLOCK = 128
STEP = 128  # contraction indices of one turn of the loop


def matmul_fp8(
    x: Float[Array, "m k"],
    w: Float[Array, "n k"],
    x_scales: Float[Array, "*x_scales"],
    w_scales: Float[Array, "*w_scales"],
    *,
    out_dtype=jnp.bfloat16,
    through: str | None = None,
    tile: Tile | None = None,
    impl: str = "triton",
) -> Float[Array, "m n"]:
    """x times W transposed, summed in float32, scaled, in out_dtype.

    x, w: float8_e4m3fn or float8_e5m2, any pair. x_scales, float32: [] for the tensor, [M] for rows, [M, ceil(K/128)].
    w_scales, float32: [], [N] for channels, [N, ceil(K/128)], or [ceil(N/128), ceil(K/128)] for blocks of 128 x 128;
    if one side has groups, the other is taken alike. through: "float8", "float16" or "bits", see above; by default
    "float8" where both dtypes are the same and else "float16", and "bits" where the chip has no FP8.
    Reference: `impl="xla"`, equal to a rounding of the result and K 2^-23 of its summands.
    Raises: ValueError for sizes that do not fit, TypeError for dtypes, NoKernel for a pair of dtypes through float8 and
    for what the chip has no FP8 for.
    Source: DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2."""
    who = "matmul_fp8"
    if impl != "mosaic":
        launch.check_impl(who, impl)
    m, k = check_matrix(who, "x", x, DTYPES)
    n, k_of_w = check_matrix(who, "w", w, DTYPES)
    if k != k_of_w:
        fail(who, f"got x of shape {x.shape} and w of shape {w.shape}", "Both end in K: w is [N, K]")
    out_dtype = check_out_dtype(who, out_dtype)
    launch.check_tile(who, tile, splits=True)
    if through is not None and through not in THROUGH:
        fail(who, f"got through={through!r}", f"It is one of {', '.join(THROUGH)}")
    x_scales, w_scales = _by_group(who, x_scales, w_scales, m, n, k)
    if impl == "xla":
        return _reference(x, w, x_scales, w_scales).astype(out_dtype)
    if impl == "mosaic":
        if through is not None:
            fail(who, f"got through={through!r} with impl='mosaic'", "That multiplies FP8 as it is; drop the argument")
        tile = matmul_fp8_hopper.default_tile() if tile is None else tile
        _check_offsets(who, m, n, k, tile)
        return matmul_fp8_hopper.run(x, w, x_scales, w_scales, out_dtype, tile)
    if through is None:
        converts = impl == "interpret" or chips.traced_capability() >= chips.FP8
        through = "bits" if not converts else "float8" if x.dtype == w.dtype else "float16"
    elif impl == "triton" and through != "bits":
        chips.check_fp8(f"{who} with through={through!r}", "Pass through='bits', or leave it out")
    if through == "float8" and x.dtype != w.dtype:
        raise NoKernel(
            f"{who} got x of {x.dtype} and w of {w.dtype}: Triton under Pallas multiplies FP8 of one dtype only."
            " Pass through='float16', which is exact, at the rate of 16-bit products."
        )
    tile = default_tile(m, n, k) if tile is None else tile
    _check_offsets(who, m, n, k, tile)
    return _run(x, w, x_scales, w_scales, out_dtype, through, tile, impl)


def default_tile(m: int, n: int, k: int) -> Tile:
    """The tuned tile of this shape's bucket, or one that compiles without spills and fills a GPU's multiprocessors."""
    found = tuning.lookup(tuning.key("matmul_fp8", 8, m, n, k))
    if found and -(-k // STEP) % found.get("split", 1) == 0:
        return Tile(**found)
    if m > 64:
        return Tile(rows=128, columns=128, warps=8)
    block = launch.power_of_two(m, 16, 64)
    programs, steps = -(-n // 64) * -(-m // block), -(-k // STEP)
    splits = [s for s in (1, 2, 4, 8) if steps % s == 0]
    split = next((s for s in splits if s * programs >= tuning.PROGRAMS), splits[-1])
    return Tile(rows=block, columns=64, split=split)


def cases() -> list[tuple]:
    """For a compile test: (name, function, argument shapes, {chip: part of its tensor-core instruction, or None})."""
    e4m3, e5m2 = DTYPES
    shape = lambda *size, dtype=jnp.float32: jax.ShapeDtypeStruct(size, dtype)
    operands = lambda m, a, b: (shape(m, 4096, dtype=a), shape(4096, 4096, dtype=b))
    rows = lambda m: (shape(m), shape(4096))
    blocks = shape(4096, 32), shape(32, 32)
    native = {"sm_80": "HMMA", "sm_89": "QMMA", "sm_90": "HMMA", "sm_100": "UTCQMMA"}
    widened = {"sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    hopper = functools.partial(matmul_fp8, impl="mosaic")
    half, bits = (functools.partial(matmul_fp8, through=through) for through in ("float16", "bits"))
    return [
        ("matmul_fp8_decode", matmul_fp8, (*operands(16, e4m3, e4m3), *rows(16)), native),
        ("matmul_fp8", matmul_fp8, (*operands(4096, e4m3, e4m3), *rows(4096)), native),
        ("matmul_fp8_e5m2", matmul_fp8, (*operands(4096, e5m2, e5m2), *rows(4096)), native),
        ("matmul_fp8_blocks", matmul_fp8, (*operands(4096, e4m3, e4m3), *blocks), native),
        ("matmul_fp8_float16", half, (*operands(4096, e4m3, e4m3), *rows(4096)), widened),
        ("matmul_fp8_mixed", half, (*operands(4096, e5m2, e4m3), *rows(4096)), widened),
        ("matmul_fp8_mixed_blocks", half, (*operands(4096, e5m2, e4m3), *blocks), widened),
        ("matmul_fp8_mosaic", hopper, (*operands(4096, e4m3, e4m3), *rows(4096)), {"sm_90": "QGMMA"}),
        ("matmul_fp8_mosaic_blocks", hopper, (*operands(4096, e5m2, e4m3), *blocks), {"sm_90": "QGMMA"}),
        ("matmul_fp8_bits_decode", bits, (*operands(16, e4m3, e4m3), *rows(16)), {"sm_80": "HMMA"}),
        ("matmul_fp8_bits", bits, (*operands(4096, e5m2, e4m3), *blocks), {"sm_80": "HMMA"}),
    ]


def _check_offsets(who: str, m: int, n: int, k: int, tile: Tile) -> None:
    """Of the operands and the result as the kernels see them: padded to whole tiles, and the sums of each part."""
    rows, columns, length = (-(-size // by) * by for size, by in ((m, tile.rows), (n, tile.columns), (k, STEP)))
    check_offsets(who, x=(rows, length), w=(columns, length), out=(tile.split, rows, columns))


def _by_group(who, x_scales, w_scales, m, n, k):
    """Scales [groups, M] and [groups, N], with as many groups as the finer of the two, or one."""
    groups = -(-k // BLOCK)
    for name, scales in (("x_scales", x_scales), ("w_scales", w_scales)):
        check_array(who, name, scales)
        if scales.dtype != jnp.float32:
            raise TypeError(f"{who} got {name} of {scales.dtype}; it takes float32. Cast it first.")
    legal = {"x_scales": [(), (m,), (m, groups)], "w_scales": [(), (n,), (n, groups), (-(-n // BLOCK), groups)]}
    for name, scales in (("x_scales", x_scales), ("w_scales", w_scales)):
        if scales.shape not in legal[name]:
            fail(who, f"got {name} of shape {scales.shape} for M={m}, N={n}, K={k}",
                 f"It is one of {', '.join(map(str, dict.fromkeys(legal[name])))}")  # fmt: skip
    if w_scales.ndim == 2 and w_scales.shape[0] != n:
        w_scales = jnp.repeat(w_scales, BLOCK, axis=0)[:n]
    count = groups if 2 in (x_scales.ndim, w_scales.ndim) else 1
    spread = lambda s, size: s.T if s.ndim == 2 else jnp.broadcast_to(s.reshape(1, -1), (count, size))
    return spread(x_scales, m), spread(w_scales, n)


def _reference(x, w, x_scales, w_scales):
    groups = x_scales.shape[0]
    k = x.shape[1]
    length = k if groups == 1 else BLOCK
    cut = lambda a: jnp.pad(a.astype(jnp.float32), ((0, 0), (0, groups * length - k))).reshape(-1, groups, length)
    parts = lax.dot_general(cut(x), cut(w), (((2,), (2,)), ((1,), (1,))), lax.Precision.HIGHEST, jnp.float32)
    return (parts * x_scales[:, :, None] * w_scales[:, None, :]).sum(0)


def _run(x, w, x_scales, w_scales, out_dtype, through, tile, impl):
    (m, k), n = x.shape, w.shape[0]
    steps = -(-k // STEP)
    launch.check_split("matmul_fp8", tile, k, STEP)
    padded_m, padded_n = (-(-size // block) * block for size, block in ((m, tile.rows), (n, tile.columns)))
    grouped = x_scales.shape[0] > 1
    raw = (lambda a: lax.bitcast_convert_type(a, jnp.uint8)) if through == "bits" else (lambda a: a)
    pad = lambda a, rows: jnp.pad(raw(a), ((0, rows - a.shape[0]), (0, steps * STEP - k)))
    kernel = functools.partial(
        _kernel, steps=steps // tile.split, grouped=grouped, through=through, dtypes=(x.dtype, w.dtype)
    )
    widen = lambda s, size: jnp.pad(s, ((0, 0), (0, size - s.shape[1])))
    groups = x_scales.shape[0]
    out = launch.call(
        kernel, f"matmul_{x.dtype.name}_{w.dtype.name}", impl, tile,
        grid=(padded_n // tile.columns, padded_m // tile.rows, tile.split),
        in_specs=[
            pl.BlockSpec((tile.rows, steps * STEP), lambda n, m, s: (m, 0)),
            pl.BlockSpec((tile.columns, steps * STEP), lambda n, m, s: (n, 0)),
            pl.BlockSpec((groups, tile.rows), lambda n, m, s: (0, m)),
            pl.BlockSpec((groups, tile.columns), lambda n, m, s: (0, n)),
        ],
        out_specs=pl.BlockSpec((1, tile.rows, tile.columns), lambda n, m, s: (s, m, n)),
        out_shape=jax.ShapeDtypeStruct(
            (tile.split, padded_m, padded_n), out_dtype if tile.split == 1 else jnp.float32
        ),
    )(pad(x, padded_m), pad(w, padded_n), widen(x_scales, padded_m), widen(w_scales, padded_n))  # fmt: skip
    y = out[0] if tile.split == 1 else out.sum(0).astype(out_dtype)
    return y[:m, :n]


def _kernel(x_ref, w_ref, x_scale_ref, w_scale_ref, out_ref, *, steps, grouped, through, dtypes):
    _, rows, columns = out_ref.shape
    part = pl.program_id(2)

    def turn(i, total):
        at = pl.ds((part * steps + i) * STEP, STEP)
        x, w = x_ref[:, at], w_ref[:, at]
        if through == "float16":
            x, w = x.astype(jnp.float16), w.astype(jnp.float16)
        elif through == "bits":
            x, w = _widened(x, dtypes[0]), _widened(w, dtypes[1])
        inner = lax.dot_general(w, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return total + (inner * scale(part * steps + i) if grouped else inner)

    def scale(group):
        return w_scale_ref[group, :][:, None] * x_scale_ref[group, :][None, :]

    total = launch.loop(steps, turn, jnp.zeros((columns, rows), jnp.float32))
    if not grouped:
        total = total * scale(0)
    out_ref[...] = total.T.astype(out_ref.dtype)[None]


def _widened(raw, dtype):
    """The float16 of the same value, from the bits of an FP8 number."""
    bits = raw.astype(jnp.int16)
    if dtype == jnp.float8_e5m2:  # the upper byte of a float16
        return lax.bitcast_convert_type(bits << 8, jnp.float16)
    magnitude = bits & 0x7F
    value = lax.bitcast_convert_type(((bits & 0x80) << 8) | (magnitude << 7), jnp.float16) * 256.0
    return jnp.where(magnitude == 0x7F, math.nan, value)
