"""Which operand of a layer's three products goes through which quantizer.

out       y  = lhs . rhs      lhs the activation, rhs the weight
grad_lhs  dx = g . rhs        the cotangent g stands where lhs stood
grad_rhs  dw = lhs . g        and here where rhs stood
"""

import dataclasses
from typing import Literal, get_args

from lowbit_jax.ops.backend import IMPLEMENTATIONS
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import PerRow, PerTensor

FORWARD: Literal["forward"] = "forward"
"""In a backward product: the operand just as the forward product used it, quantized. Costs nothing more."""


@dataclasses.dataclass(frozen=True, slots=True)
class Requantized:
    """In a backward product: the operand as the forward product used it, quantized, and then once more by `quantizer`,
    along the axis that the backward product contracts.

    Where both operands of the forward were rotated alike it is the rotated one. Raises: TypeError for another thing
    than a Quantizer, or one whose scale is learned."""

    quantizer: Quantizer

    def __post_init__(self):
        if not isinstance(self.quantizer, Quantizer) or self.quantizer.learned:
            raise TypeError(
                f"Requantized({self.quantizer!r}): it takes a Quantizer whose scale comes from the data, such as"
                " lb.block_quantizer(lb.formats.MXFP4)."
            )


Operand = Quantizer | Requantized | Literal["forward"] | None
Side = Literal["lhs", "rhs"]


def _word(operand: Operand) -> str:
    if isinstance(operand, Requantized):
        return f"Requantized({operand.quantizer.format.name})"
    return operand.format.name if isinstance(operand, Quantizer) else "FORWARD" if operand else "None"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """One matrix product. `None` keeps an operand in high precision; in a backward product only, `FORWARD` reuses the
    quantized operand of the forward and `Requantized(quantizer)` quantizes that again.

    The scales of a forward operand vary along what a backward product sums over, so they cannot be taken out of its
    sum. `fold` multiplies them into the cotangent before that is quantized: then codes meet codes, and the product can
    run on integers.

        grad_lhs   dx[m, k] = sum_n Q(g[m, n] s_w[n]) e_w[n, k]      w_hat = s_w e_w, e on the format's grid
        grad_rhs   dw[k, n] = sum_m e_x[m, k] Q(g[m, n] s_x[m])

    Raises: TypeError for other operands; ValueError for `fold` without a quantizer on the one side and FORWARD on the
    other."""

    lhs: Operand = None
    rhs: Operand = None
    fold: bool = False

    def __post_init__(self):
        for side in ("lhs", "rhs"):
            operand = getattr(self, side)
            if operand is not None and operand != FORWARD and not isinstance(operand, Quantizer | Requantized):
                raise TypeError(
                    f"Gemm({side}={operand!r}): an operand is a Quantizer, None (high precision) or, in a backward"
                    f" product, FORWARD or Requantized(). For a whole method use a recipe, such as lb.quest(4)."
                )
        if self.fold and not (FORWARD in (self.lhs, self.rhs) and isinstance(self.folded, Quantizer)):
            raise ValueError(
                "Gemm(fold=True) multiplies the scales of the forward's operand into the cotangent before it is"
                f" quantized, so one side is FORWARD and the other a Quantizer; got lhs={_word(self.lhs)},"
                f" rhs={_word(self.rhs)}. Leave out fold, or set both."
            )

    @property
    def folded(self) -> Operand:
        """The operand beside FORWARD."""
        return self.rhs if self.lhs == FORWARD else self.lhs

    def reads_forward(self, side: Side) -> bool:
        """Whether this operand comes from the quantized one of the forward, not from the original."""
        operand = getattr(self, side)
        return operand == FORWARD or isinstance(operand, Requantized)

    def quantizer(self, side: Side) -> Quantizer | None:
        """What quantizes this operand in this product."""
        operand = getattr(self, side)
        operand = operand.quantizer if isinstance(operand, Requantized) else operand
        return operand if isinstance(operand, Quantizer) else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LinearRecipe:
    """The three products of a linear layer; hashable, so it is a static attribute of a layer.

    By default the backward products are what autodiff of the quantized forward gives: a high-precision cotangent times
    the quantized operands. `rhs_ready` says that the weight arrives already rotated and quantized (`quantize_rhs`).
    `implementation` says what multiplies in training: "auto" (integer products and fused kernels on a CUDA GPU, XLA's
    FP8 products there, its int8 ones on an x86 CPU, where they do this recipe, else XLA on the quantized values),
    "kernel" (the kernels or an error), "reference" (XLA on the quantized values; the one with second derivatives) or
    "interpret" (the kernels, slowly, anywhere).
    Raises: ValueError for an unknown implementation, for FORWARD or Requantized in `out`, where a backward product
    reuses the operand it differentiates, or where it folds scales that are not one a row or a tensor, and for
    `rhs_ready` where each product of both operands draws signs of its own."""

    out: Gemm = Gemm()
    grad_lhs: Gemm = Gemm(rhs=FORWARD)
    grad_rhs: Gemm = Gemm(lhs=FORWARD)
    name: str = ""
    rhs_ready: bool = False
    implementation: str = "auto"

    def __post_init__(self):
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"LinearRecipe.implementation: {self.implementation!r} is none of {', '.join(IMPLEMENTATIONS)}."
            )
        if self.out.reads_forward("lhs") or self.out.reads_forward("rhs"):
            raise ValueError(
                "LinearRecipe.out: FORWARD and Requantized name the forward's operand, so only a backward product takes"
                " them."
            )
        if self.grad_lhs.reads_forward("lhs") or self.grad_rhs.reads_forward("rhs"):
            raise ValueError(
                "LinearRecipe: the cotangent stands at grad_lhs.lhs and grad_rhs.rhs, and it has no forward form."
                " Put None or a Quantizer there."
            )
        if self.rhs_ready and self.fresh_signs:
            raise ValueError(
                "LinearRecipe(rhs_ready=True): the rotation of `out` draws its signs anew in every product, so no"
                " weight is ready before. Fix them by a seed, as in Hadamard(signs=0)."
            )
        for name, side in (("grad_lhs", "rhs"), ("grad_rhs", "lhs")):
            quantizer = getattr(self.out, side)
            if not getattr(self, name).fold:
                continue
            if not isinstance(quantizer, Quantizer) or not isinstance(quantizer.tiling, PerRow | PerTensor):
                seen = quantizer.tiling.describe() if isinstance(quantizer, Quantizer) else "none: high precision"
                raise ValueError(
                    f"LinearRecipe.{name}: fold takes the scales out of out.{side}, one a row or one a tensor; they"
                    f" are {seen}. Quantize it by PerRow() or PerTensor(), or leave out fold."
                )

    @property
    def forward_quantizers(self) -> tuple[Quantizer | None, Quantizer | None]:
        """Those of the activation and of the weight in the forward product."""
        lhs, rhs = self.out.lhs, self.out.rhs
        return lhs if isinstance(lhs, Quantizer) else None, rhs if isinstance(rhs, Quantizer) else None

    @property
    def quantizers(self) -> list[Quantizer]:
        """Every quantizer of the three products."""
        found = [gemm.quantizer(side) for gemm in (self.out, self.grad_lhs, self.grad_rhs) for side in get_args(Side)]
        return [quantizer for quantizer in found if quantizer is not None]

    @property
    def needs_key(self) -> bool:
        """Whether some rounding is stochastic, or some signs are drawn anew."""
        return any(quantizer.needs_key for quantizer in self.quantizers)

    @property
    def learned(self) -> tuple[str, ...]:
        """Sides of the forward product ("lhs", "rhs") whose scale is a parameter."""
        return tuple(s for s in ("lhs", "rhs") if getattr(self.out, s) is not None and getattr(self.out, s).learned)

    @property
    def shared_rotation(self) -> bool:
        """Both operands of the forward product are rotated alike, so that the rotations cancel in it. Not by fresh
        signs, which are alike only where a product draws them for both (`fresh_signs`)."""
        return self._rotated_alike and not self.fresh_signs

    @property
    def fresh_signs(self) -> bool:
        """Both operands of the forward product are rotated alike, by signs that each product draws anew."""
        lhs, _ = self.forward_quantizers
        return self._rotated_alike and lhs is not None and lhs.fresh_signs

    @property
    def _rotated_alike(self) -> bool:
        lhs, rhs = self.forward_quantizers
        return lhs is not None and rhs is not None and lhs.rotation is not None and lhs.rotation == rhs.rotation

    @property
    def plain_backward(self) -> bool:
        """The backward products are those of autodiff."""
        return self.grad_lhs == Gemm(rhs=FORWARD) and self.grad_rhs == Gemm(lhs=FORWARD)

    @property
    def rhs_once(self) -> bool:
        """Whether all products read the weight as the forward quantizes it, so that `quantize_rhs` can do so before."""
        return self.out.rhs is not None and self.grad_lhs.reads_forward("rhs") and not self.fresh_signs

    @property
    def inherited_implementation(self) -> str:
        """That of a product made from this recipe, a backward or a packed one: kernels asked for by name are those of
        the training product, "reference" is for all."""
        return "reference" if self.implementation == "reference" else "auto"

    def with_implementation(self, implementation: str) -> "LinearRecipe":
        """The same recipe, computed another way."""
        return dataclasses.replace(self, implementation=implementation)

    def with_rhs_ready(self) -> "LinearRecipe":
        """The same recipe for a weight that went through `quantize_rhs` before."""
        return dataclasses.replace(self, rhs_ready=True)
