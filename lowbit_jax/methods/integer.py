"""Integer methods of the survey that are compositions of the parts at hand."""

from lowbit_jax.estimators import StraightThrough
from lowbit_jax.formats.catalogue import INT8, TERNARY, element_format
from lowbit_jax.methods.qat import _bits
from lowbit_jax.ops.recipe import Gemm, LinearRecipe
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import Group, PerRow, PerTensor, absmax, mean_abs


def absmax_integer(
    bits: int = 8, *, weight_bits: int | None = None, activations: bool = True, group: int | None = None
) -> LinearRecipe:
    """Symmetric two's-complement integers by absmax: for each row, or for each `group` along the contraction.

    The scheme of AQT and Qwix. Source: Jacob et al. 2017, arXiv:1712.05877, without zero points.
    Raises: ValueError for bits outside 2 to 8."""
    tiling = PerRow() if group is None else Group(group)
    make = lambda b: Quantizer(
        format=element_format(f"int{_bits(b, 'absmax_integer', least=2)}"),
        tiling=tiling,
        fit=absmax,
        estimator=StraightThrough(),
    )
    wide = bits if weight_bits is None else weight_bits
    name = f"absmax W{wide}A{bits if activations else 16}" + ("" if group is None else f" g{group}")
    return LinearRecipe(out=Gemm(lhs=make(bits) if activations else None, rhs=make(wide)), name=name)


def bitnet() -> LinearRecipe:
    """BitNet b1.58: ternary weights by the mean magnitude of the tensor, 8-bit activations by absmax of the token.

    Source: Ma et al. 2024, arXiv:2402.17764, eq. 1 to 3 (the layer only; SubLN is the model's)."""
    weight = Quantizer(format=TERNARY, tiling=PerTensor(), fit=mean_abs, estimator=StraightThrough())
    activation = Quantizer(format=INT8, tiling=PerRow(), fit=absmax, estimator=StraightThrough())
    return LinearRecipe(out=Gemm(lhs=activation, rhs=weight), name="bitnet b1.58")
