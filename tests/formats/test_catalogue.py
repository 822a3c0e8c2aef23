"""The other named formats: integers, mid-rise, codebooks and block formats, against their definitions elsewhere."""

from statistics import NormalDist

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import formats
from lowbit_jax.formats import BlockFormat, Codebook, IntFormat, MidRiseFormat


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_and_mid_rise_of_every_width(bits):
    signed, unsigned, mid_rise = (formats.get(f"{kind}{bits}") for kind in ("int", "uint", "midrise"))
    assert (signed.bits, unsigned.bits, mid_rise.bits) == (bits, bits, bits)
    assert signed.levels == tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert unsigned.levels == tuple(range(2**bits))
    np.testing.assert_array_equal(mid_rise.levels, (2 * np.arange(2**bits) - 2**bits + 1) / 2)
    assert mid_rise.symmetric and not mid_rise.has_zero and not signed.symmetric
    assert mid_rise.top_gap == signed.top_gap == 1.0
    if bits >= 4:  # the range of the integer dtype of the same width
        info = jnp.iinfo(f"int{bits}") if bits in (4, 8) else None
        assert info is None or (signed.low, signed.high) == (info.min, info.max)


@pytest.mark.parametrize("bits", range(2, 9))
def test_mid_tread_is_the_symmetric_part_of_twos_complement(bits):
    tread = formats.get(f"midtread{bits}")
    assert tread.levels == formats.get(f"int{bits}").levels[1:]
    assert tread.symmetric and tread.has_zero and tread.bits == bits


def test_ternary_and_binary():
    assert formats.TERNARY.levels == (-1.0, 0.0, 1.0) and formats.TERNARY.bits == 2
    assert formats.BINARY.levels == (-0.5, 0.5) and formats.BINARY.bits == 1
    assert formats.BINARY.top_gap == 2 * formats.BINARY.max_finite


def test_nf4_is_its_published_construction():
    """Quantiles of N(0, 1) on either side of zero, 8 above and 7 below, divided by the largest.

    The outermost quantile is the mean of 1 - 1/32 and 1 - 1/30 (Dettmers et al. 2023, appendix E)."""
    edge = (1 - 1 / 32 + 1 - 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(edge, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(edge, 0.5, 8)[:-1]]
    expected = np.sort(np.array([*above, 0.0, *below])) / max(above)
    np.testing.assert_allclose(formats.NF4.levels, expected, atol=3e-7)  # published in float32, edge to 7 digits


def test_hif8_has_the_binades_of_its_abstract():
    """arXiv:2409.16626: 7 exponents of 3 mantissa bits, 8 of 2, 16 of 1, and 7 more powers of two: 38 binades."""
    positive = np.array([level for level in formats.HIF8.levels if level > 0])
    exponents, counts = np.unique(np.frexp(positive)[1] - 1, return_counts=True)
    by_exponent = dict(zip(exponents.tolist(), counts.tolist(), strict=True))
    assert by_exponent.pop(15) == 1  # the other value of this binade is the infinity
    assert sorted(by_exponent) == list(range(-22, 15))
    assert [list(by_exponent.values()).count(count) for count in (8, 4, 2, 1)] == [7, 8, 15, 7]
    assert len(formats.HIF8.levels) == 256 - 3 and formats.HIF8.symmetric  # without NaN and two infinities


@pytest.mark.parametrize(("name", "useed"), [("posit8", 16.0), ("posit8_es1", 4.0)])
def test_posits_reach_useed_to_the_sixth_and_are_densest_at_one(name, useed):
    """Posit Standard 2022, section 3: maxpos = useed**(n - 2); 1/useed .. 1 and 1 .. useed each take a quarter."""
    levels = np.array(formats.get(name).levels)
    positive = levels[levels > 0]
    assert len(levels) == 255 and formats.get(name).symmetric and formats.get(name).has_zero
    assert positive.max() == useed**6 and positive.min() == useed**-6
    assert ((positive >= 1) & (positive < useed)).sum() == ((positive >= 1 / useed) & (positive < 1)).sum() == 32
    powers = positive[np.frexp(positive)[0] == 0.5]
    np.testing.assert_array_equal(1 / powers[::-1], powers)


def test_posit_es1_values_of_two_regimes():
    """Bit patterns 0.10.e.ffff and 0.110.e.fff, read by hand."""
    levels = np.array(formats.POSIT8_ES1.levels)
    np.testing.assert_array_equal(levels[(levels >= 1) & (levels < 2)], 1 + np.arange(16) / 16)
    np.testing.assert_array_equal(levels[(levels >= 8) & (levels < 16)], 8 + np.arange(8))


def test_lns8_is_geometric_with_eight_steps_an_octave():
    positive = np.array(formats.LNS8.levels[128:])
    np.testing.assert_allclose(positive[8:] / positive[:-8], 2.0, rtol=1e-15)
    assert len(positive) == 128 and positive[-1] == 1.0 and not formats.LNS8.has_zero


def test_dynamic_tree_is_the_map_of_4_bit_optimizers():
    """The signed 4-bit map as low-bit optimizers list it (Li et al. 2023, arXiv:2309.01507)."""
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    expected = [-v for v in reversed(positive)] + [0.0, *positive, 1.0]
    np.testing.assert_allclose(formats.DYNAMIC_TREE4.levels, expected, atol=1e-15)
    assert len(formats.DYNAMIC_TREE8.levels) == 256


@pytest.mark.parametrize(
    ("name", "bits", "block"),
    [
        ("mxfp8", 8.25, 32),
        ("mxfp8_e5m2", 8.25, 32),
        ("mxfp6_e2m3", 6.25, 32),
        ("mxfp6_e3m2", 6.25, 32),
        ("mxfp4", 4.25, 32),
        ("mxint8", 8.25, 32),
        ("nvfp4", 4.5, 16),
        ("msfp12", 4.5, 16),
        ("msfp16", 8.5, 16),
        ("hbfp8", 8 + 8 / 576, (24, 24)),
    ],
)
def test_block_formats_store_the_bits_of_their_specification(name, bits, block):
    fmt = formats.get(name)
    assert isinstance(fmt, BlockFormat)
    assert (fmt.bits_per_element, fmt.block) == (bits, block)
    assert fmt.tensor_scale == (name == "nvfp4")


def test_names_are_unique_and_lead_back():
    for name in formats.names():
        fmt = formats.get(name.upper())
        assert fmt.name == name or name == "binary"
        assert hash(fmt) == hash(formats.get(name)) and fmt.source
    assert formats.get("float8_e4m3fn") is formats.E4M3


def test_an_unknown_name_lists_its_neighbors():
    with pytest.raises(ValueError, match=r"No format is called 'mxpf4'\. Near: mxfp4"):
        formats.get("mxpf4")
    with pytest.raises(ValueError, match="Near: "):
        formats.get("???")


def test_a_number_is_no_name():
    with pytest.raises(TypeError, match=r"formats.get\(4\): .*'int4', 'midrise4'"):
        formats.get(4)


def test_records_that_cannot_be_are_refused():
    with pytest.raises(TypeError, match=r"IntFormat\(low=\) is 0.5"):
        IntFormat(name="half", low=0.5, high=3, source="none")
    with pytest.raises(ValueError, match=r"'backwards' spans the integers 3\.\.-3"):
        IntFormat(name="backwards", low=3, high=-3, source="none")
    with pytest.raises(ValueError, match="at most 256"):
        IntFormat(name="int9", low=-256, high=255, source="none")
    with pytest.raises(ValueError, match="has 9 bits; pass 1 to 8"):
        MidRiseFormat(name="midrise9", bits=9, source="none")
    for values in [(0.0,), (1.0, 0.0), (0.0, 0.0), (0.0, float("inf")), (0.0, float("nan"))]:
        with pytest.raises(ValueError, match="strictly ascending"):
            Codebook(name="bad", values=values, source="none")
    with pytest.raises(ValueError, match="every side"):
        BlockFormat(
            name="bad", element=formats.INT8, block=0, scale=formats.E8M0, scale_rounding="floor", source="none"
        )
