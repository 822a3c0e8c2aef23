"""Methods in 8-bit floating point, all of whose three products have quantized operands."""

from typing import Literal, get_args

from lowbit_jax.estimators import StraightThrough
from lowbit_jax.formats.catalogue import E4M3, E5M2
from lowbit_jax.ops.recipe import FORWARD, Gemm, LinearRecipe
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import FLOAT32, Block, Group, PerRow, PerTensor, PowerOfTwo, absmax

Fp8Scaling = Literal["tensor", "row", "block"]


def fp8(scaling: Fp8Scaling = "tensor", *, weight_gradient: bool = True, power_of_two: bool = False) -> LinearRecipe:
    """FP8 training: E4M3 operands scaled by their present absmax, in all three products.

    scaling: who shares a scale:

    - "tensor": all of an operand; the cotangent in E5M2 ("current scaling" of Transformer Engine, "tensorwise" of
      torchao). Backward products reuse the forward's operands.
    - "row": a row of each product (torchao's "rowwise"). A row of the forward is no row of a backward product, so these
      quantize the original operands again.
    - "block": runs of 128 of activation and cotangent, tiles of 128 x 128 of the weight, which the backward reuses
      (DeepSeek-V3, arXiv:2412.19437, section 3.3; "Float8BlockScaling"); 128 divides both sizes of the weight (of its
      outputs the last axis), and the tokens.

    `weight_gradient=False` keeps the weight's gradient in high precision; by rows, the activation's gradient then reads
    the weight under one scale a tensor (torchao's "rowwise_with_gw_hp").
    `power_of_two` rounds the scales up to powers of two, as Transformer Engine does for blocks and torchao for rows.
    Source: Micikevicius et al. 2022, arXiv:2209.05433. Raises: ValueError for another word."""
    if scaling not in get_args(Fp8Scaling):
        raise ValueError(f"fp8(scaling={scaling!r}): it is one of {', '.join(map(repr, get_args(Fp8Scaling)))}.")
    scales = PowerOfTwo("rceil") if power_of_two else FLOAT32
    of = lambda fmt, tiling: Quantizer(
        format=fmt, tiling=tiling, fit=absmax, scale_format=scales, estimator=StraightThrough()
    )
    wide = of(E4M3, {"tensor": PerTensor(), "row": PerRow(), "block": Group(128)}[scaling])
    weight = of(E4M3, Block(128, 128)) if scaling == "block" else wide
    cotangent = of(E5M2, PerTensor()) if scaling == "tensor" else wide
    grad_rhs = Gemm(lhs=FORWARD if scaling == "tensor" else wide, rhs=cotangent)
    again = FORWARD
    if scaling == "row":
        again = wide if weight_gradient else of(E4M3, PerTensor())
    return LinearRecipe(
        out=Gemm(lhs=wide, rhs=weight),
        grad_lhs=Gemm(lhs=cotangent, rhs=again),
        grad_rhs=grad_rhs if weight_gradient else Gemm(),
        name=f"fp8 by {scaling}"
        + (" in powers of two" if power_of_two else "")
        + ("" if weight_gradient else ", weight gradient in high precision"),
    )
