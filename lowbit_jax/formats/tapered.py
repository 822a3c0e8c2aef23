"""Value lists of formats whose precision shrinks away from one; each becomes a `Codebook` in the catalogue."""

import math

import numpy as np


def posit_values(bits: int, exponent_bits: int) -> tuple[float, ...]:
    """Every real value of a posit, ascending (NaR left out).

    After the sign, a run of equal bits is the regime r, closed by the opposite bit; then up to `exponent_bits` of
    exponent e and the fraction f: `2**(r * 2**exponent_bits + e) * (1 + f)`.
    Source: Gustafson and Yonemoto 2017, "Beating Floating Point at its Own Game"; the Posit Standard 2022."""
    positive = []
    for code in range(1, 1 << (bits - 1)):
        pattern = format(code, f"0{bits - 1}b")
        run = len(pattern) - len(pattern.lstrip(pattern[0]))
        regime = run - 1 if pattern[0] == "1" else -run
        rest = pattern[run + 1 :]
        exponent = int(rest[:exponent_bits].ljust(exponent_bits, "0") or "0", 2)
        fraction = rest[exponent_bits:]
        mantissa = 1 + int(fraction, 2) / 2 ** len(fraction) if fraction else 1.0
        positive.append(math.ldexp(mantissa, regime * 2**exponent_bits + exponent))
    return mirrored(positive, zero=True)


def hif8_values() -> tuple[float, ...]:
    """Every finite value of HiFloat8, ascending.

    Exponents 0..3 in magnitude carry 3 mantissa bits, 4..7 carry 2, 8..15 carry 1 (the pattern 1.5 * 2**15 is the
    infinity); seven denormals 2**-22 .. 2**-16 carry none.
    Source: Luo et al. 2024, arXiv:2409.16626."""
    positive = [math.ldexp(1.0, exponent) for exponent in range(-22, -15)]
    for exponent in range(-15, 16):
        mantissa_bits = 3 if abs(exponent) <= 3 else 2 if abs(exponent) <= 7 else 1
        positive += [math.ldexp(1 + m / 2**mantissa_bits, exponent) for m in range(2**mantissa_bits)]
    return mirrored([value for value in positive if value <= 2.0**15], zero=True)


def log_values(steps_per_octave: int, count: int) -> tuple[float, ...]:
    """`±2**(-k / steps_per_octave)` for k below `count`, ascending: a logarithmic number system without zero.

    Source: Zhao et al. 2021, LNS-Madam, arXiv:2106.13914, section 3 (there the exponents count upwards)."""
    return mirrored([2.0 ** (-k / steps_per_octave) for k in range(count)], zero=False)


def dynamic_tree_values(bits: int) -> tuple[float, ...]:
    """The signed dynamic-tree data type on [-1, 1], ascending: decades that get a bit less of fraction each.

    The decade `10**(i - last)` holds `2**i` values of each sign, the midpoints of equal parts of [0.1, 1]; zero and one
    are added, so that there is a 1 but no -1.
    Source: Dettmers 2016, arXiv:1511.04561, figure 1, with the decimal exponents of Dettmers et al. 2022,
    arXiv:2110.02861, section 2.1, as `create_dynamic_map` of bitsandbytes has them."""
    last = bits - 2
    positive = []
    for i in range(bits - 1):
        edges = np.linspace(0.1, 1.0, 2**i + 1)
        positive += (10.0 ** (i - last) * (edges[:-1] + edges[1:]) / 2).tolist()
    return tuple(sorted([*mirrored(positive, zero=True), 1.0]))


def mirrored(positive: list[float], *, zero: bool) -> tuple[float, ...]:
    """The values, their negatives, and zero if asked for, ascending."""
    return tuple(sorted([-v for v in positive] + [0.0] * zero + positive))
