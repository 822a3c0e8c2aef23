"""QuEST: Hadamard normalization, a Gaussian MSE-optimal fit for each row, and the trust estimator."""

import functools

import numpy as np

from lowbit_jax.estimators import StraightThrough, Trust
from lowbit_jax.formats.base import BlockFormat, Format
from lowbit_jax.formats.catalogue import E2M1, INT8, element_format
from lowbit_jax.ops.recipe import FORWARD, Gemm, LinearRecipe
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.rotation import Hadamard
from lowbit_jax.scaling import PerRow, absmax, rms_optimal
from lowbit_jax.sparsity import NofM, PairsNofM, Support

SUPPORTS: dict[str, Support] = {"4:8": PairsNofM(2, 4), "2:4": NofM(2, 4)}


def quest_quantizer(
    bits: int | str = 4,
    *,
    block: int | None = 128,
    signs: int | None = None,
    sparsity: Support | str | None = None,
    format: Format | None = None,
) -> Quantizer:
    """The operand quantizer of QuEST.

    h = x H;  x_hat = round(h; rms(h) alpha*) on the grid of `bits`: mid-rise for 1 to 8, or E2M1 for "e2m1"; the
    gradient passes where |x_hat - h| <= T, half the top gap of the grid, and is rotated back. At 1 bit the limit is
    the tuned |h| <= 1.30 alpha* rms (1.25 without rotation). `block=None` leaves out the rotation; `signs`, a seed,
    flips fixed random signs before it, which rows of one sign need (behind a ReLU their sum falls on one coefficient);
    `sparsity` is "4:8" (pairs, as in the paper), "2:4" or a support; `format` puts another grid in place of the bits'.
    Source: Panferov et al. 2025, arXiv:2502.05003. alpha* is computed to the last bit, which the released constants are
    not; E2M1 takes half of its own top gap for T, where the released code kept a value of other levels.
    Raises: ValueError for other bits or supports, and for signs without a rotation."""
    if block is None and signs is not None:
        raise ValueError(f"quest_quantizer(block=None, signs={signs}): signs belong to a rotation. Give a block.")
    fmt = _grid(bits) if format is None else format
    if isinstance(fmt, BlockFormat) or not hasattr(fmt, "levels"):
        raise TypeError(f"quest_quantizer(format={fmt!r}): QuEST fits one scale a row, so give an element format.")
    one_bit = fmt.bits == 1 and fmt.symmetric
    outer = (1.25 if block is None else 1.30) if one_bit else None
    return Quantizer(
        format=fmt,
        tiling=PerRow(),
        fit=rms_optimal,
        rotation=None if block is None else Hadamard(block=block, signs=signs),
        sparsity=_support(sparsity),
        estimator=Trust(outer=outer),
    )


def quest(
    bits: int | str = 4,
    *,
    weights: bool = True,
    activations: bool = True,
    block: int | None = 128,
    signs: int | None = None,
    sparsity: Support | str | None = None,
    format: Format | None = None,
    backward: int | None = None,
) -> LinearRecipe:
    """QuEST for a linear layer: both operands by `quest_quantizer`, backward products of the cotangent with the
    quantized operands. `weights=False` or `activations=False` keeps that operand in high precision (the other is then
    un-rotated explicitly); `sparsity` is of the weights only. `backward=8` rounds the cotangent to int8, one scale a
    row of each backward product, after the other operand's scales went into it (`Gemm.fold`), so that all three
    products multiply integers; the paper keeps it in 16 bits.

    Source: Panferov et al. 2025, arXiv:2502.05003, algorithm 1.
    Raises: ValueError as `quest_quantizer`, when nothing is left to quantize, when sparse weights are asked for
    together with `weights=False`, and for a backward width that is not 8 or whose products have an operand in high
    precision."""
    if not weights and not activations:
        raise ValueError(
            "quest(weights=False, activations=False) quantizes nothing. Leave the layer out by a rule instead."
        )
    if sparsity is not None and not weights:
        raise ValueError(
            f"quest(weights=False, sparsity={sparsity!r}): the support is of the weights. Keep weights=True."
        )
    operand = functools.partial(quest_quantizer, bits, block=block, signs=signs, format=format)
    lhs = operand() if activations else None
    rhs = operand(sparsity=sparsity) if weights else None
    label = bits if format is None else format.name
    name = f"quest W{label if weights else 16}A{label if activations else 16}" + (f"G{backward}" if backward else "")
    cotangent = _cotangent(backward, weights and activations)
    return LinearRecipe(
        out=Gemm(lhs=lhs, rhs=rhs),
        grad_lhs=Gemm(lhs=cotangent, rhs=FORWARD, fold=cotangent is not None),
        grad_rhs=Gemm(lhs=FORWARD, rhs=cotangent, fold=cotangent is not None),
        name=name + (f" {rhs.sparsity.describe()}" if rhs and rhs.sparsity else ""),
    )


def _cotangent(bits: int | None, both: bool) -> Quantizer | None:
    """The cotangent's quantizer in both backward products."""
    if bits is None:
        return None
    if bits != 8 or isinstance(bits, bool):
        raise ValueError(f"quest(backward={bits!r}): the cotangent is 8 bits wide, or in high precision with None.")
    if not both:
        raise ValueError(
            "quest(backward=8): an integer product needs both operands quantized. Keep weights=True and"
            " activations=True, or leave out backward."
        )
    return Quantizer(format=INT8, tiling=PerRow(), fit=absmax, estimator=StraightThrough())


def _grid(bits: int | str) -> Format:
    if isinstance(bits, str) and bits.lower() == "e2m1":
        return E2M1
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer) or not 1 <= bits <= 8:
        raise ValueError(
            f"quest(bits={bits!r}): QuEST has grids for 1 to 8 bits and 'e2m1'. For another grid pass format=."
        )
    return element_format(f"midrise{int(bits)}")


def _support(sparsity: Support | str | None) -> Support | None:
    if not isinstance(sparsity, str):
        return sparsity  # `Quantizer` says what may stand there
    if sparsity not in SUPPORTS:
        raise ValueError(f"quest(sparsity={sparsity!r}): the supports by name are {', '.join(map(repr, SUPPORTS))}.")
    return SUPPORTS[sparsity]
