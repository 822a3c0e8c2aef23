"""Which values can one element take? Frozen data only: no arrays, and nothing here imports jax.

A format is a grid of real numbers in its own units; a scale (elsewhere) says how large a unit is. All formats answer
the same questions: `levels`, `bits`, `max_finite`, `min_finite`, `reach`, `has_zero`, `top_gap`, `widest_gap`,
`symmetric`, `max_exponent`.
"""

import dataclasses
import functools
import itertools
import math
import operator
from typing import Any, TypeAlias

import ml_dtypes

MAX_CODE_BITS = 8  # a code is stored in one uint8 before packing


def whole_number(value: Any, what: str) -> int:
    """`value` as a Python int, from any integer (NumPy's too).

    Raises: TypeError for anything else, True and 4.0 too; `what` names it in the message."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{what} is {value!r}, a {type(value).__name__}; pass an integer.") from None


def settle_integers(record: Any, *fields: str) -> None:
    """Makes Python ints of the named fields of a frozen record under construction.

    Raises: TypeError for a field that holds no integer."""
    for field in fields:
        what = f"{type(record).__name__}({field}=)"
        object.__setattr__(record, field, whole_number(getattr(record, field), what))


class Grid:
    """What every element format derives from its `levels`; the subclasses say which levels there are."""

    __slots__ = ()
    name: str

    @property
    def levels(self) -> tuple[float, ...]:
        """The distinct finite values of the grid, ascending."""
        return _levels(self)

    @property
    def bits(self) -> int:
        """Width of one stored code."""
        return (len(self.levels) - 1).bit_length()

    @property
    def max_finite(self) -> float:
        """Largest value an element can hold."""
        return self.levels[-1]

    @property
    def min_finite(self) -> float:
        """Most negative value an element can hold (the smallest one, where the format has no sign)."""
        return self.levels[0]

    @property
    def has_zero(self) -> bool:
        return 0.0 in self.levels

    @property
    def top_gap(self) -> float:
        """Distance of the two largest values: the coarsest step at the edge of the grid."""
        return self.levels[-1] - self.levels[-2]

    @property
    def widest_gap(self) -> float:
        """The largest distance of two neighbors."""
        return max(high - low for low, high in itertools.pairwise(self.levels))

    @property
    def reach(self) -> float:
        """The level that the largest magnitude is put on: `max_finite`, or the low end where nothing is positive."""
        return self.max_finite if self.max_finite > 0 else -self.min_finite

    @property
    def symmetric(self) -> bool:
        """Whether the negative of every value is a value."""
        return all(low == -high for low, high in zip(self.levels, reversed(self.levels), strict=True))

    @property
    def max_exponent(self) -> int:
        """`floor(log2(reach))`, the `emax` of the OCP MX specification."""
        return math.frexp(self.reach)[1] - 1

    def _enumerate(self) -> tuple[float, ...]:
        raise NotImplementedError


@functools.cache
def _levels(fmt: Grid) -> tuple[float, ...]:
    return fmt._enumerate()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IntFormat(Grid):
    """The integers from `low` to `high`. Code: `value - low`."""

    name: str
    low: int
    high: int
    source: str

    def __post_init__(self):
        settle_integers(self, "low", "high")
        if not self.low < self.high or (self.high - self.low).bit_length() > MAX_CODE_BITS:
            raise ValueError(
                f"IntFormat {self.name!r} spans the integers {self.low}..{self.high}. It needs low < high and at most"
                f" {2**MAX_CODE_BITS} values; pass a narrower range, or keep the operand in high precision."
            )

    def _enumerate(self) -> tuple[float, ...]:
        return tuple(float(value) for value in range(self.low, self.high + 1))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MidRiseFormat(Grid):
    """`2**bits` levels at the odd halves: -(2**bits - 1)/2, ..., -1/2, 1/2, ..., (2**bits - 1)/2.

    One unit is one step, and zero is not a level. Code: `value + (2**bits - 1)/2`."""

    name: str
    bits: int = dataclasses.field()  # pyright: ignore[reportIncompatibleMethodOverride]
    source: str

    def __post_init__(self):
        settle_integers(self, "bits")
        if not 1 <= self.bits <= MAX_CODE_BITS:
            raise ValueError(f"MidRiseFormat {self.name!r} has {self.bits} bits; pass 1 to {MAX_CODE_BITS}.")

    def _enumerate(self) -> tuple[float, ...]:
        half = 2 ** (self.bits - 1)
        return tuple(k + 0.5 for k in range(-half, half))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat(Grid):
    """A small floating-point type. Code: its bit pattern, sign first.

    A code with exponent field `e > 0` and mantissa field `m` holds `2**(e - bias) * (1 + m / 2**mantissa_bits)`, one
    with `e == 0` holds `2**(1 - bias) * m / 2**mantissa_bits` (zero and the subnormals; with `subnormals=False` it is
    one more binade and there is no zero). Patterns above `max_finite` are the infinity and NaN codes."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_finite: float = dataclasses.field()  # pyright: ignore[reportIncompatibleMethodOverride]
    source: str
    signed: bool = True
    has_inf: bool = False
    has_nan: bool = False
    negative_zero: bool = True  # False: the pattern of -0 is the NaN ("fnuz"), or there is no sign
    subnormals: bool = True
    dtype_name: str | None = None  # the same format in ml_dtypes

    def __post_init__(self):
        settle_integers(self, "exponent_bits", "mantissa_bits", "bias")
        if self.has_inf and self.has_nan and not self.mantissa_bits:
            raise ValueError(
                f"FloatFormat {self.name!r} has no mantissa bits and both infinity and NaN, which share an exponent."
                " Give it one of them, or a mantissa."
            )
        if not 2 <= self.bits <= MAX_CODE_BITS or self.max_finite not in self.levels:
            raise ValueError(
                f"FloatFormat {self.name!r} has {self.bits} bits and max_finite {self.max_finite}. It needs 2 to"
                f" {MAX_CODE_BITS} bits and a max_finite that one of its codes holds (bias {self.bias})."
            )
        if not self.subnormals and (self.bits, self.mantissa_bits, self.bias, self.signed) != (8, 0, 127, False):
            raise ValueError(
                f"FloatFormat {self.name!r} has subnormals=False, which only E8M0 has (8 exponent bits, no sign, bias"
                f" 127). Pass subnormals=True, or list the values in a Codebook."
            )

    @property
    def bits(self) -> int:
        return self.exponent_bits + self.mantissa_bits + self.signed

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value; below it the step stops shrinking."""
        return 1 - self.bias if self.subnormals else -self.bias

    @property
    def nan_code(self) -> int | None:
        """The bit pattern that stands for NaN, as ml_dtypes writes it; None where the format has none."""
        if not self.has_nan:
            return None
        if self.signed and not self.negative_zero:
            return 1 << (self.bits - 1)
        all_ones = (1 << (self.bits - self.signed)) - 1
        return self.inf_code | 1 << (self.mantissa_bits - 1) if self.has_inf else all_ones

    @property
    def inf_code(self) -> int:
        """The bit pattern of +inf; that of `max_finite` where the format has no infinity (it saturates)."""
        if self.has_inf:
            return ((1 << self.exponent_bits) - 1) << self.mantissa_bits
        return sum(level > 0 for level in self.levels) - (not self.has_zero)

    @property
    def dtype(self) -> Any:
        """The ml_dtypes scalar type of the same values and bit patterns, or None."""
        return None if self.dtype_name is None else getattr(ml_dtypes, self.dtype_name)

    def _enumerate(self) -> tuple[float, ...]:
        magnitudes = (self._magnitude(code) for code in range(1 << (self.exponent_bits + self.mantissa_bits)))
        kept = sorted(magnitude for magnitude in magnitudes if magnitude <= self.max_finite)
        return tuple([-v for v in reversed(kept) if v > 0] + kept) if self.signed else tuple(kept)

    def _magnitude(self, code: int) -> float:
        exponent, mantissa = divmod(code, 1 << self.mantissa_bits)
        if exponent == 0 and self.subnormals:
            return math.ldexp(mantissa, 1 - self.bias - self.mantissa_bits)
        return math.ldexp(mantissa + (1 << self.mantissa_bits), exponent - self.bias - self.mantissa_bits)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Codebook(Grid):
    """Any ascending list of 2 to 256 values. Code: the rank of the value, 0 for the smallest.

    Rounding picks the nearest value, whatever rule the format's own hardware has, and a tie goes to the even code."""

    name: str
    values: tuple[float, ...]
    source: str

    def __post_init__(self):
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        ascending = all(low < high for low, high in zip(self.values, self.values[1:], strict=False))
        if not 2 <= len(self.values) <= 2**MAX_CODE_BITS or not ascending or not math.isfinite(sum(self.values)):
            raise ValueError(
                f"Codebook {self.name!r} needs 2 to {2**MAX_CODE_BITS} finite values in strictly ascending order, not"
                f" {len(self.values)} values {self.values[:4]}...; pass tuple(sorted(set(values)))."
            )

    def _enumerate(self) -> tuple[float, ...]:
        return self.values


Format: TypeAlias = IntFormat | MidRiseFormat | FloatFormat | Codebook


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """Element format, block shape and scale format, fixed together by a specification."""

    name: str
    element: Format
    block: int | tuple[int, int]  # elements along the contraction axis that share a scale, or (rows, columns) of a tile
    scale: FloatFormat
    scale_rounding: str  # how the scale gets into its format: a mode of `rounding.power_of_two_scale`, or "nearest"
    source: str
    tensor_scale: bool = False  # one more float32 scale for the whole tensor, above the block scales

    def __post_init__(self):
        sides = self.block if isinstance(self.block, tuple) else (self.block,)
        sides = tuple(whole_number(side, f"BlockFormat {self.name!r}: a side of its block") for side in sides)
        object.__setattr__(self, "block", sides if isinstance(self.block, tuple) else sides[0])
        if not all(side >= 1 for side in sides):
            raise ValueError(f"BlockFormat {self.name!r} has block {self.block}; every side must be an integer >= 1.")

    @property
    def bits_per_element(self) -> float:
        """Stored bits an element, its share of the block scale included, the tensor scale not."""
        size = math.prod(self.block) if isinstance(self.block, tuple) else self.block
        return self.element.bits + self.scale.bits / size
