"""y = x W^T with W in an OCP microscaling format: codes of 4 or 8 bits, one power of two for 32 of them.

    y[m, n] = sum_j 2^(b[n, j] - 127) sum_(k in j) a[m, k] w[n, k],   a[m, k] = x[m, k], or 2^(a[m, j] - 127) x[m, k]

x is bfloat16, or in such a format itself. The kernel is raw Triton, launched by jax-triton (`impl="jax-triton"`): its
`dot_scaled` takes codes and scales as they are stored to the block-scaled tensor cores of Blackwell, which Pallas on
Triton does not reach, and widens them to bfloat16, exactly, in registers where the chip has none. What multiplies, read
off the machine code (`pallas_kernels.report`):

    operands (rows)                   sm_80   sm_90   sm_100
    bfloat16 x MXFP4 or MXFP8         HMMA    HGMMA   UTCHMMA
    MXFP4 x MXFP4                     HMMA    HGMMA   UTCOMMA (more than 64 rows), else UTCHMMA
    MXFP8 x MXFP4 or MXFP8            none    HGMMA   UTCQMMA (more than 64 rows), else UTCHMMA

"none": Triton has no E4M3 below sm_89. It does not need the Triton lowering of Pallas, which JAX announces the end of.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from pallas_kernels import chips, launch, tuning
from pallas_kernels.block_scaled import MX_BLOCK, MX_FORMATS, dequantize_mx
from pallas_kernels.checks import NoKernel, check_matrix, check_shape, fail
from pallas_kernels.launch import Tile

IMPLS = ("jax-triton", "xla")
FORMATS = {"mxfp4": "e2m1", "mxfp8": "e4m3", "mxfp8_e5m2": "e5m2"}  # ours -> Triton's name of the element
OUT_DTYPES = (jnp.bfloat16, jnp.float32)
_FP8 = {"mxfp8": jnp.float8_e4m3fn, "mxfp8_e5m2": jnp.float8_e5m2}
STEP = 128  # contraction indices of one turn of the loop


def matmul_mx(
    x: Float[Array, "m k"] | UInt8[Array, "m bytes"],
    words: UInt8[Array, "n bytes_w"],
    scales: UInt8[Array, "*blocks_w"],
    x_scales: UInt8[Array, "m blocks"] | None = None,
    *,
    format: str,
    x_format: str | None = None,
    scales_across: bool = False,
    out_dtype=jnp.bfloat16,
    tile: Tile | None = None,
    impl: str = "jax-triton",
) -> Float[Array, "m n"]:
    """x times the matrix [N, K] in `words` and `scales`, transposed; sums in float32.

    words, scales: as `block_scaled.quantize_mx(w, format=format)` gives them, [N, bytes] and [N, K/32], for a format of
    `FORMATS`; scales_across says that the scales are [K/32, N] instead. x: bfloat16 [M, K], or with `x_format` and
    `x_scales` words and scales of its own. A scale of 255 makes its products NaN.
    Reference: `impl="xla"`, equal to a rounding of the result and K 2^-23 of its summands.
    Raises: ValueError for formats or sizes that do not fit and for options that belong to the other form of x,
    TypeError for dtypes, NoKernel where jax-triton is not installed.
    Source: OCP Microscaling Formats (MX) v1.0, section 6.2 (the dot product)."""
    who = "matmul_mx"
    if impl not in IMPLS:
        fail(who, f"got impl={impl!r}", f"It is one of {', '.join(IMPLS)}; raw Triton has no interpretation under JAX")
    for name, chosen in (("format", format), ("x_format", x_format)):
        if chosen not in FORMATS and not (name == "x_format" and chosen is None):
            fail(who, f"got {name}={chosen!r}", f"It is one of {', '.join(FORMATS)}")
    if (x_format is None) != (x_scales is None):
        fail(who, f"got x_format={x_format!r} and x_scales of {type(x_scales).__name__}", "Give both, or neither")
    if jnp.dtype(out_dtype) not in [jnp.dtype(d) for d in OUT_DTYPES]:
        raise TypeError(f"{who} got out_dtype={jnp.dtype(out_dtype).name}; it returns bfloat16 or float32.")
    launch.check_tile(who, tile, splits=True)
    m, width = check_matrix(who, "x", x, (jnp.bfloat16,) if x_format is None else (jnp.uint8,))
    k = width * _pack(x_format)
    n, _ = check_matrix(who, "words", words, (jnp.uint8,))
    if k % MX_BLOCK:
        fail(who, f"got K={k}, which blocks of {MX_BLOCK} do not divide", f"Pad x and W by {-k % MX_BLOCK} zeros")
    check_shape(who, "words", words, (n, k // _pack(format)), jnp.uint8)
    blocks = k // MX_BLOCK
    check_shape(who, "scales", scales, (blocks, n) if scales_across else (n, blocks), jnp.uint8)
    if x_scales is not None:
        check_shape(who, "x_scales", x_scales, (m, blocks), jnp.uint8)
    if impl == "xla":
        w = dequantize_mx(words, scales.T if scales_across else scales, format=format, dtype=jnp.float32, impl="xla")
        return _reference(x, x_scales, x_format, w).astype(out_dtype)
    if why := why_not():
        raise NoKernel(f"{who}: {why}. Pass impl='xla' to let XLA compute it.")
    tile = default_tile(m, n, k, format) if tile is None else tile
    return _launch(x, words, scales, x_scales, format, x_format, scales_across, out_dtype, tile)


@functools.cache
def why_not() -> str | None:
    """Why the kernel cannot be launched here; None when jax-triton is there and fits this JAX."""
    if importlib.util.find_spec("jax_triton") is None or importlib.util.find_spec("triton") is None:
        return "jax-triton is not installed (pip install 'lowbit_jax[triton]')"
    try:
        importlib.import_module("jax_triton")
    except ImportError as error:  # it asks for the CUDA plugin of JAX, or for another JAX
        return f"jax-triton cannot be imported ({str(error).splitlines()[0]})"
    return None


def default_tile(m: int, n: int, k: int, format: str) -> Tile:
    """The tuned tile of this shape's bucket, or one that compiles without spills and fills a GPU's multiprocessors."""
    found = tuning.lookup(tuning.key("matmul_mx", 8 // _pack(format), m, n, k))
    if found and found.get("split", 1) <= -(-k // STEP):
        return Tile(**found)
    if m > 64:
        return Tile(rows=64, columns=128, warps=8)  # 128 rows spill on Ampere
    block, steps = launch.power_of_two(m, 16, 64), -(-k // STEP)
    programs = -(-n // 64) * -(-m // block)
    splits = [s for s in (1, 2, 4, 8) if s == 1 or steps // s >= 4]  # turns to overlap
    split = next((s for s in splits if s * programs >= 3 * tuning.PROGRAMS), splits[-1])
    # On an H100 two warps and four parts of 14336 x 4096 took half the time of four warps and two parts.
    return Tile(rows=block, warps=2 if m <= 16 else 4, split=split)


def cases() -> list[tuple]:
    """For a compile test: (name, function, argument shapes, {chip: part of its tensor-core instruction})."""
    if why_not():
        return []
    shape = lambda *size, dtype=jnp.uint8: jax.ShapeDtypeStruct(size, dtype)
    n = k = 4096
    found = []
    for m in (16, 4096):
        x16, scales, x_scales = shape(m, k, dtype=jnp.bfloat16), shape(n, k // MX_BLOCK), shape(m, k // MX_BLOCK)
        wide = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"} if m > 16 else {"sm_90": "HMMA", "sm_100": "HMMA"}  # two warps
        for format in FORMATS:
            words = shape(n, k // _pack(format))
            chips = wide if format == "mxfp8" else wide | {"sm_80": "HMMA"}
            found.append((f"matmul_{format}_a16 m{m}", functools.partial(matmul_mx, format=format),
                          (x16, words, scales), chips))  # fmt: skip
        for x_format, format, native in (("mxfp4", "mxfp4", "UTCOMMA"), ("mxfp8", "mxfp4", "UTCQMMA"),
                                         ("mxfp8", "mxfp8", "UTCQMMA")):  # fmt: skip
            run = functools.partial(matmul_mx, format=format, x_format=x_format)
            arguments = shape(m, k // _pack(x_format)), shape(n, k // _pack(format)), scales, x_scales
            chips = wide | ({"sm_100": native} if m > 64 else {}) | ({"sm_80": "HMMA"} if x_format == "mxfp4" else {})
            found.append((f"matmul_{format}_{x_format} m{m}", run, arguments, chips))
    return found


def _pack(format: str | None) -> int:
    """Codes in a byte; 1 for an operand that is not in codes."""
    return 1 if format is None else 8 // MX_FORMATS[format].bits


def _reference(x, x_scales, x_format, w):
    if x_format is not None:
        x = dequantize_mx(x, x_scales, format=x_format, dtype=jnp.float32, impl="xla")
    return lax.dot_general(
        x.astype(jnp.float32), w, (((1,), (1,)), ((), ())), lax.Precision.HIGHEST, jnp.float32
    )  # fmt: skip


def _launch(x, words, scales, x_scales, format, x_format, scales_across, out_dtype, tile):
    import jax_triton

    from pallas_kernels.matmul_mx_triton import product

    m, n, k = x.shape[0], words.shape[0], x.shape[1] * _pack(x_format)
    typed = lambda a, f: lax.bitcast_convert_type(a, _FP8[f]) if f in _FP8 else a
    out = jax_triton.triton_call(
        typed(x, x_format), typed(words, format), scales, scales if x_scales is None else x_scales,
        kernel=product, name=f"matmul_{format}_{x_format or 'a16'}",
        out_shape=jax.ShapeDtypeStruct((tile.split, m, n), out_dtype if tile.split == 1 else jnp.float32),
        grid=(-(-n // tile.columns), -(-m // tile.rows), tile.split),
        num_warps=tile.warps, num_stages=tile.stages, compute_capability=chips.abstract_capability(),
        M=m, N=n, K=k, ROWS=tile.rows, COLUMNS=tile.columns, STEP=STEP, SPLIT=tile.split,
        X="bf16" if x_format is None else FORMATS[x_format], W=FORMATS[format],
        X_PACK=_pack(x_format), W_PACK=_pack(format), X_SCALED=x_scales is not None, ACROSS=scales_across,
    )  # fmt: skip
    return out[0] if tile.split == 1 else out.sum(0).astype(out_dtype)
