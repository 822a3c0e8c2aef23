"""Integer methods of the survey that are compositions of the parts at hand."""

import dataclasses
from typing import Literal, get_args

from lowbit_jax import rounding
from lowbit_jax.estimators import LSQ, StraightThrough
from lowbit_jax.formats.catalogue import INT8, TERNARY, element_format
from lowbit_jax.methods.qat import _bits
from lowbit_jax.ops.recipe import FORWARD, Gemm, LinearRecipe
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import (
    Block,
    Group,
    Learned,
    Percentile,
    PerRow,
    PerTensor,
    absmax,
    absmax_edge,
    mean_abs,
)

ZeroPoints = Literal["none", "weights", "activations", "both"]


def absmax_integer(
    bits: int = 8,
    *,
    weight_bits: int | None = None,
    activations: bool = True,
    group: int | None = None,
    zero_points: ZeroPoints = "none",
    preserve_max: bool = True,
) -> LinearRecipe:
    """Two's-complement integers by absmax: for each row, or for each `group` along the contraction.

    `preserve_max=False` puts the largest magnitude on the edge of the last bucket instead of on the largest level:
    without zero points, this is what Qwix does unless told otherwise, and AQT on the formats MIDTREAD2 to 8, which have
    no lowest integer. With zero points of "weights" (as 4-bit files by GPTQ and AWQ have them), of "activations" or of
    "both" a tile is spanned from its least to its largest element.
    Source: Jacob et al. 2017, arXiv:1712.05877. Raises: ValueError for bits outside 2 to 8, an unknown word for
    `zero_points`, those of activations that are not quantized, and those beside preserve_max=False."""
    tiling = PerRow() if group is None else Group(group)
    _check_zero_points(zero_points, activations)
    if zero_points != "none" and not preserve_max:
        raise ValueError(
            f"absmax_integer(zero_points={zero_points!r}, preserve_max=False): zero points span a tile from end to end."
            " Leave out one of them."
        )
    make = lambda b, moved: Quantizer(
        format=element_format(f"int{_bits(b, 'absmax_integer', least=2)}"),
        tiling=tiling,
        fit=absmax if preserve_max else absmax_edge,
        estimator=StraightThrough(),
        zero_point=zero_points in (moved, "both"),
    )
    wide = bits if weight_bits is None else weight_bits
    name = f"absmax W{wide}A{bits if activations else 16}" + ("" if group is None else f" g{group}")
    name += "" if zero_points == "none" else f", zero points of {zero_points}"
    name += "" if preserve_max else ", to the edge"
    lhs = make(bits, "activations") if activations else None
    return LinearRecipe(out=Gemm(lhs=lhs, rhs=make(wide, "weights")), name=name)


def _check_zero_points(zero_points: str, activations: bool) -> None:
    if zero_points not in get_args(ZeroPoints):
        raise ValueError(
            f"absmax_integer(zero_points={zero_points!r}): it is one of {', '.join(map(repr, get_args(ZeroPoints)))}."
        )
    if zero_points in ("activations", "both") and not activations:
        raise ValueError(
            f"absmax_integer(zero_points={zero_points!r}, activations=False): the activations stay in high precision."
            " Use zero_points='weights'."
        )


def static_integer(
    bits: int = 8, *, weight_bits: int | None = None, group: int | None = None, percent: float = 100.0
) -> LinearRecipe:
    """Two's-complement integers whose activation scale, one a tensor, is a number that the layer holds: no statistic is
    computed at a call. Weights by absmax of a row, or of each `group` along the contraction.

    `lb.calibrate` or `lb.nn.calibrate_over` fits the scale to what the layer meets, the `percent`-th percentile of |x|
    (100: absmax) on the largest level; before, it is that of a unit Gaussian. Training learns it on (LSQ).
    Source: Jacob et al. 2017, arXiv:1712.05877, section 3.1. Raises: ValueError for bits outside 2 to 8, and a percent
    outside 0 to 100."""
    wide = bits if weight_bits is None else weight_bits
    fmt = lambda bits: element_format(f"int{_bits(bits, 'static_integer', least=2)}")
    fit = Learned(absmax if percent == 100 else Percentile(percent))
    activation = Quantizer(format=fmt(bits), tiling=PerTensor(), fit=fit, estimator=LSQ())
    tiling = PerRow() if group is None else Group(group)
    weight = Quantizer(format=fmt(wide), tiling=tiling, fit=absmax, estimator=StraightThrough())
    name = f"static W{wide}A{bits}" + ("" if group is None else f" g{group}")
    name += "" if percent == 100 else f", percentile {percent:g}"
    return LinearRecipe(out=Gemm(lhs=activation, rhs=weight), name=name)


def bitnet() -> LinearRecipe:
    """BitNet b1.58: ternary weights by the mean magnitude of the tensor, 8-bit activations by absmax of the token.

    Source: Ma et al. 2024, arXiv:2402.17764, eq. 1 to 3 (the layer only; SubLN is the model's)."""
    weight = Quantizer(format=TERNARY, tiling=PerTensor(), fit=mean_abs, estimator=StraightThrough())
    activation = Quantizer(format=INT8, tiling=PerRow(), fit=absmax, estimator=StraightThrough())
    return LinearRecipe(out=Gemm(lhs=activation, rhs=weight), name="bitnet b1.58")


def switchback() -> LinearRecipe:
    """SwitchBack: int8 for the output and the activation's gradient, by rows of activation and cotangent and one scale
    for the weight, which both share; the weight's gradient, a sum over all tokens, in high precision.

    Source: Wortsman et al. 2023, arXiv:2304.13013, algorithm 1."""
    row = Quantizer(format=INT8, tiling=PerRow(), fit=absmax, estimator=StraightThrough())
    weight = dataclasses.replace(row, tiling=PerTensor())
    return LinearRecipe(
        out=Gemm(lhs=row, rhs=weight), grad_lhs=Gemm(lhs=row, rhs=FORWARD), grad_rhs=Gemm(), name="switchback"
    )


def jetfire() -> LinearRecipe:
    """Jetfire: int8 in tiles of 32 x 32 for all three products, whose transposes are quantized alike, so that the
    backward reuses the forward's operands; cotangents round stochastically, which takes keys.

    32 divides both sizes of the weight and the length of a sequence (the axis before the activation's last).
    Source: Xi et al. 2024, arXiv:2403.12422 (the products; its int8 data flow between layers is the model's)."""
    tile = Quantizer(format=INT8, tiling=Block(32, 32), fit=absmax, estimator=StraightThrough())
    cotangent = dataclasses.replace(tile, rounding=rounding.stochastic)
    return LinearRecipe(
        out=Gemm(lhs=tile, rhs=tile),
        grad_lhs=Gemm(lhs=cotangent, rhs=FORWARD),
        grad_rhs=Gemm(lhs=FORWARD, rhs=cotangent),
        name="jetfire",
    )
