"""Integer methods of the survey that are compositions of the parts at hand."""

from typing import Literal, get_args

from lowbit_jax.estimators import StraightThrough
from lowbit_jax.formats.catalogue import INT8, TERNARY, element_format
from lowbit_jax.methods.qat import _bits
from lowbit_jax.ops.recipe import Gemm, LinearRecipe
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import Group, PerRow, PerTensor, absmax, mean_abs

ZeroPoints = Literal["none", "weights", "activations", "both"]


def absmax_integer(
    bits: int = 8,
    *,
    weight_bits: int | None = None,
    activations: bool = True,
    group: int | None = None,
    zero_points: ZeroPoints = "none",
) -> LinearRecipe:
    """Two's-complement integers by absmax: for each row, or for each `group` along the contraction.

    Without zero points the scheme of AQT and Qwix. With those of "weights" (as 4-bit files by GPTQ and AWQ have them),
    of "activations" or of "both" a tile is spanned from its least to its largest element. Source: Jacob et al. 2017,
    arXiv:1712.05877. Raises: ValueError for bits outside 2 to 8, an unknown word for `zero_points`, and those of
    activations that are not quantized."""
    tiling = PerRow() if group is None else Group(group)
    _check_zero_points(zero_points, activations)
    make = lambda b, moved: Quantizer(
        format=element_format(f"int{_bits(b, 'absmax_integer', least=2)}"),
        tiling=tiling,
        fit=absmax,
        estimator=StraightThrough(),
        zero_point=zero_points in (moved, "both"),
    )
    wide = bits if weight_bits is None else weight_bits
    name = f"absmax W{wide}A{bits if activations else 16}" + ("" if group is None else f" g{group}")
    name += "" if zero_points == "none" else f", zero points of {zero_points}"
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


def bitnet() -> LinearRecipe:
    """BitNet b1.58: ternary weights by the mean magnitude of the tensor, 8-bit activations by absmax of the token.

    Source: Ma et al. 2024, arXiv:2402.17764, eq. 1 to 3 (the layer only; SubLN is the model's)."""
    weight = Quantizer(format=TERNARY, tiling=PerTensor(), fit=mean_abs, estimator=StraightThrough())
    activation = Quantizer(format=INT8, tiling=PerRow(), fit=absmax, estimator=StraightThrough())
    return LinearRecipe(out=Gemm(lhs=activation, rhs=weight), name="bitnet b1.58")
