"""Methods in custom formats: elements that share a scale in small blocks, and codebooks."""

import dataclasses

from lowbit_jax import rounding
from lowbit_jax.estimators import ClippedStraightThrough, StraightThrough
from lowbit_jax.formats import get as get_format
from lowbit_jax.formats.base import BlockFormat
from lowbit_jax.formats.catalogue import E2M1, MXFP4, NF4, NVFP4
from lowbit_jax.ops.recipe import FORWARD, Gemm, LinearRecipe, Requantized
from lowbit_jax.quantizer import Quantizer, block_quantizer
from lowbit_jax.rotation import Hadamard
from lowbit_jax.scaling import (
    FLOAT32,
    AbsmaxOn,
    Block,
    CandidateSearch,
    Eden,
    Group,
    PowerOfTwo,
    TwoLevel,
    absmax,
    rms_optimal,
)


def block_scaled(
    format: BlockFormat | str = "mxfp8", *, gradients: BlockFormat | str | None = None, stochastic: bool = False,
    scale_rounding: str | None = None,
) -> LinearRecipe:  # fmt: skip
    """All six operands in a block format, each quantized from the original along the sum of its own product: MXFP8,
    MXFP6, MXFP4 and MXINT8 (OCP), HBFP and MSFP, by name or as the format itself.

    `gradients`: another format for the cotangents, such as "mxfp8_e5m2". `stochastic` rounds the cotangents
    stochastically, which takes keys. `scale_rounding`: another mode of `PowerOfTwo` than the format's own; "floor",
    OCP's, clips what lies above the largest level; "rceil", as in Transformer Engine, does not, which unbiased
    stochastic rounding needs. The block divides both sizes of the weight (of its outputs the last axis) and the tokens;
    a rectangle, as of HBFP8, the axis before the activation's last.
    Source: Rouhani et al. 2023, arXiv:2310.10537, and the format's own. Raises: ValueError for a format that is unknown
    or no block format, another mode, and one for a format whose scales are no powers of two."""
    fmt = _block_format(format, "format")
    backward = fmt if gradients is None else _block_format(gradients, "gradients")
    scales = {} if scale_rounding is None else {"scale_format": PowerOfTwo(scale_rounding)}
    if scales and NVFP4 in (fmt, backward):
        raise ValueError(
            f"block_scaled({fmt.name!r}, scale_rounding={scale_rounding!r}): the scales of nvfp4 are no powers of two."
            " Leave it out."
        )
    forward = block_quantizer(fmt, estimator=StraightThrough(), **scales)
    rounded = rounding.stochastic if stochastic else rounding.nearest
    cotangent = block_quantizer(backward, rounding=rounded, estimator=StraightThrough(), **scales)
    name = fmt.name + ("" if backward == fmt else f", gradients {backward.name}")
    name += f", scales {scale_rounding}" if scales else ""
    return LinearRecipe(
        out=Gemm(lhs=forward, rhs=forward),
        grad_lhs=Gemm(lhs=cotangent, rhs=forward),
        grad_rhs=Gemm(lhs=forward, rhs=cotangent),
        name=name + (", stochastic" if stochastic else ""),
    )


def _block_format(fmt: BlockFormat | str, slot: str) -> BlockFormat:
    found = get_format(fmt) if isinstance(fmt, str) else fmt
    if not isinstance(found, BlockFormat):
        raise ValueError(
            f"block_scaled({slot}={fmt!r}): this is no block format. Give one such as 'mxfp8', 'mxfp4' or 'msfp12';"
            " for FP8 under larger scales use fp8()."
        )
    return found


def nvfp4(*, stochastic: bool = True, rotation: int | None = 16, four_over_six: bool = False) -> LinearRecipe:
    """NVIDIA's NVFP4 pretraining: E2M1 under an E4M3 scale for 16 elements under a float32 scale for the tensor.

    The weight's scales are of 16 x 16 tiles, so that the backward reuses its codes; activation and cotangent have runs
    of 16. Cotangents round stochastically, which takes keys (`stochastic=False`: nearest); the operands of the weight's
    gradient are rotated by a Hadamard matrix of `rotation` rows with fixed random signs (None: not). `four_over_six`
    puts the largest magnitude of a block of the forward on 6 or on 4, whichever errs less: not of that paper, but as
    Quartet II has it (arXiv:2601.22813). What the paper keeps in high precision, the first and last blocks, is a matter
    of rules.
    Source: NVIDIA 2025, arXiv:2509.25149, section 4."""
    plain = block_quantizer(NVFP4, estimator=StraightThrough())
    activation = _four_over_six(plain) if four_over_six else plain
    cotangent = dataclasses.replace(plain, rounding=rounding.stochastic if stochastic else rounding.nearest)
    turned = None if rotation is None else Hadamard(rotation, signs=0)
    return LinearRecipe(
        out=Gemm(lhs=activation, rhs=dataclasses.replace(activation, tiling=Block(16, 16))),
        grad_lhs=Gemm(lhs=cotangent, rhs=FORWARD),
        grad_rhs=Gemm(
            lhs=dataclasses.replace(plain, rotation=turned), rhs=dataclasses.replace(cotangent, rotation=turned)
        ),
        name=f"nvfp4{' four over six' if four_over_six else ''}"
        + ("" if stochastic else ", nearest")
        + ("" if rotation == 16 else f", rotation {rotation}"),
    )


def quartet() -> LinearRecipe:
    """Quartet, QuEST's successor in MXFP4 with all three products in 4 bits. Takes keys.

    Forward operands are rotated by blocks of 32 and scaled for the least squared error on a Gaussian. Backward products
    are of unbiased, stochastic MXFP4, for which the forward's quantized operands are rotated, by signs drawn anew for
    each product, and quantized again.

    Two choices differ from the authors' code: the root mean square in place of the standard deviation, and the power of
    two nearest to the fitted scale (theirs is rounded down, twice the squared error at worst).
    Source: Castro et al. 2025, arXiv:2505.14669, algorithm 1."""
    forward = Quantizer(
        format=E2M1,
        tiling=Group(32),
        fit=rms_optimal,
        scale_format=PowerOfTwo("nearest"),
        rotation=Hadamard(32),
        estimator=ClippedStraightThrough(),
    )
    return _with_backward("quartet", forward, dataclasses.replace(_unbiased(), rotation=Hadamard(32, signs="fresh")))


def quartet2(*, four_over_six: bool = True) -> LinearRecipe:
    """Quartet II: NVFP4 in all three products, the backward ones by MS-EDEN, which are unbiased with the noise of a
    nearest rounding. Takes keys.

    Forward operands have runs of 16, whose largest magnitude lies on 6 or on 4, whichever errs less (`four_over_six`;
    the choice is made before the scales are rounded). Cotangents and the forward's quantized operands, quantized
    again, are rotated by a Hadamard matrix of 128 rows, its signs drawn anew for each product, and rounded to nearest;
    the scales are corrected for each 128 (`scaling.Eden`) and drawn. A size of the weight, or a number of tokens, that
    128 does not divide takes the largest power of two that does, at least 16: runs of 16 have to divide it. Rounding by
    small rotations is less unbiased.
    Source: Panferov et al. 2026, arXiv:2601.22813 (with the correction of EDEN itself: `scaling.Eden` says how their
    code differs)."""
    forward = block_quantizer(NVFP4, estimator=StraightThrough())
    if four_over_six:
        forward = _four_over_six(forward)
    backward = dataclasses.replace(
        forward,
        fit=AbsmaxOn(6 / (17 / 16 * 0.93)),
        scale_format=TwoLevel(cap=255.99),
        rotation=Hadamard(128, signs="fresh"),
        debias=Eden(128),
    )
    return _with_backward("quartet2" + ("" if four_over_six else ", plain nvfp4"), forward, backward)


def _four_over_six(nvfp4: Quantizer) -> Quantizer:
    return dataclasses.replace(nvfp4, fit=CandidateSearch((1.0, 1.5)), scale_format=TwoLevel(cap=256.0))


def tetrajet() -> LinearRecipe:
    """TetraJet: MXFP4 in all three products with scales that clip nothing; the backward quantizes the forward's
    quantized operands again, stochastically. Takes keys.

    Source: Chen et al. 2025, arXiv:2502.20853 (without Q-EMA and Q-Ramping, which act on the optimizer)."""
    forward = block_quantizer(MXFP4, scale_format=PowerOfTwo("rceil"), estimator=StraightThrough())
    return _with_backward("tetrajet", forward, dataclasses.replace(forward, rounding=rounding.stochastic))


def _with_backward(name: str, forward: Quantizer, backward: Quantizer) -> LinearRecipe:
    """Cotangents by `backward`, and by it again the forward's quantized operands."""
    return LinearRecipe(
        out=Gemm(lhs=forward, rhs=forward),
        grad_lhs=Gemm(lhs=backward, rhs=Requantized(backward)),
        grad_rhs=Gemm(lhs=Requantized(backward), rhs=backward),
        name=name,
    )


def mxfp4_backward() -> LinearRecipe:
    """The forward in high precision, both backward products in unbiased MXFP4. Takes keys.

    They round stochastically, behind a Hadamard rotation by blocks of 64 with random signs, drawn anew for each.

    Source: Tseng et al. 2025, arXiv:2502.20586."""
    backward = dataclasses.replace(_unbiased(), rotation=Hadamard(64, signs="fresh"))
    both = Gemm(lhs=backward, rhs=backward)
    return LinearRecipe(grad_lhs=both, grad_rhs=both, name="mxfp4 backward")


def _unbiased() -> Quantizer:
    """MXFP4 whose scale leaves room, so that stochastic rounding clips nothing."""
    return block_quantizer(
        MXFP4, scale_format=PowerOfTwo("floor", times=4 / 3), rounding=rounding.stochastic, estimator=StraightThrough()
    )


def nf4(group: int = 64, *, double_quantization: bool = True) -> LinearRecipe:
    """QLoRA's weights: NormalFloat codes by absmax of `group` elements, activations and gradients in high precision.

    `double_quantization` keeps the scales in E4M3 under one float32 (the paper: 8 bits under a float32 for each 256).
    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3. Raises: as `lb.scaling.Group`."""
    weight = Quantizer(
        format=NF4,
        tiling=Group(group),
        fit=absmax,
        scale_format=TwoLevel() if double_quantization else FLOAT32,
        estimator=StraightThrough(),
    )
    name = f"nf4 g{group}" + ("" if double_quantization else ", float32 scales")
    return LinearRecipe(out=Gemm(rhs=weight), name=name)
