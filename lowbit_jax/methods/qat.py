"""Quantization-aware training: quantized forward products, high-precision cotangents."""

from lowbit_jax.estimators import LSQ, PACT, StraightThrough
from lowbit_jax.formats.base import whole_number
from lowbit_jax.formats.catalogue import element_format
from lowbit_jax.ops.recipe import Gemm, LinearRecipe
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import Learned, PerRow, PerTensor, absmax


def _bits(bits: int, who: str, least: int = 1) -> int:
    try:
        found = whole_number(bits, who)
    except TypeError:
        found = 0
    if not least <= found <= 8:
        raise ValueError(f"{who}(bits={bits!r}): it has integer grids for {least} to 8 bits.")
    return found


def straight_through(bits: int = 4, *, weights: bool = True, activations: bool = True) -> LinearRecipe:
    """The plain baseline: absmax mid-rise grid for each row, no rotation, identity gradient.

    Source: Bengio et al. 2013, arXiv:1308.3432. Raises: ValueError for other bits or when nothing is quantized."""
    bits = _bits(bits, "straight_through")
    quantizer = Quantizer(
        format=element_format(f"midrise{bits}"),
        tiling=PerRow(),
        fit=absmax,
        estimator=StraightThrough(),
    )
    return _forward_only("straight-through", bits, quantizer, quantizer, weights, activations)


def lsq(bits: int = 4, *, weights: bool = True, activations: bool = True) -> LinearRecipe:
    """Learned step size, one step a tensor, on the mid-rise grid (two's complement wastes a level at few bits).

    Source: Esser et al. 2019, arXiv:1902.08153; the half-integer levels as in QuEST's baseline, arXiv:2502.05003.
    Raises: ValueError for other bits or when nothing is quantized."""
    bits = _bits(bits, "lsq")
    quantizer = Quantizer(format=element_format(f"midrise{bits}"), tiling=PerTensor(), fit=Learned(), estimator=LSQ())
    return _forward_only("lsq", bits, quantizer, quantizer, weights, activations)


def pact(bits: int = 4, *, signed: bool = True) -> LinearRecipe:
    """Learned clipping of the activations, and absmax weights for each row.

    `signed=False` is the paper's form, for activations that follow a ReLU; the signed one clips both ends.
    Source: Choi et al. 2018, arXiv:1805.06085. Raises: ValueError for other bits."""
    bits = _bits(bits, "pact")
    grid = f"midrise{bits}" if signed else f"uint{bits}"
    activation = Quantizer(format=element_format(grid), tiling=PerTensor(), fit=Learned(), estimator=PACT())
    weight = Quantizer(
        format=element_format(f"midrise{bits}"), tiling=PerRow(), fit=absmax, estimator=StraightThrough()
    )
    return _forward_only("pact", bits, activation, weight, True, True)


def _forward_only(method, bits, lhs, rhs, weights, activations) -> LinearRecipe:
    if not weights and not activations:
        raise ValueError(
            f"{method}(weights=False, activations=False) quantizes nothing. Leave the layer out by a rule."
        )
    name = f"{method} W{bits if weights else 16}A{bits if activations else 16}"
    return LinearRecipe(out=Gemm(lhs=lhs if activations else None, rhs=rhs if weights else None), name=name)
