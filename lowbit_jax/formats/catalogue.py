"""Named formats, each with the document its numbers were read from. A new format is one constant here."""

import difflib

from lowbit_jax.formats.base import BlockFormat, Codebook, FloatFormat, Format, IntFormat, MidRiseFormat
from lowbit_jax.formats.lloyd_max import lloyd_max_levels
from lowbit_jax.formats.tapered import dynamic_tree_values, hif8_values, log_values, posit_values

_MX = "OCP Microscaling Formats (MX) v1.0, 2023"
_OFP8 = "OCP 8-bit Floating Point Specification (OFP8) v1.0, 2023, table 1; Micikevicius et al. 2022, arXiv:2209.05433"
_FNUZ = "Noune et al. 2022, arXiv:2206.02915 (no -0, no infinity, NaN in place of -0); float8 types of ml_dtypes"


def _twos_complement(bits: int) -> IntFormat:
    half = 2 ** (bits - 1)
    return IntFormat(name=f"int{bits}", low=-half, high=half - 1, source="two's complement")


def _unsigned(bits: int) -> IntFormat:
    return IntFormat(name=f"uint{bits}", low=0, high=2**bits - 1, source="binary")


def _mid_tread(bits: int) -> IntFormat:
    top = 2 ** (bits - 1) - 1
    return IntFormat(
        name=f"midtread{bits}", low=-top, high=top, source="Gersho and Gray 1992, section 5.4: odd, centered"
    )


def _mid_rise(bits: int) -> MidRiseFormat:
    return MidRiseFormat(name=f"midrise{bits}", bits=bits, source="Panferov et al. 2025 (QuEST), arXiv:2502.05003")


def _lloyd_max(bits: int) -> Codebook:
    source = "computed in lloyd_max.py; Max 1960, IRE Trans. Inf. Theory 6(1), table 1"
    return Codebook(name=f"lloyd_max{bits}", values=lloyd_max_levels(bits), source=source)


INT1, INT2, INT3, INT4, INT5, INT6, INT7, INT8 = map(_twos_complement, range(1, 9))
UINT1, UINT2, UINT3, UINT4, UINT5, UINT6, UINT7, UINT8 = map(_unsigned, range(1, 9))
MIDTREAD2, MIDTREAD3, MIDTREAD4, MIDTREAD5, MIDTREAD6, MIDTREAD7, MIDTREAD8 = map(_mid_tread, range(2, 9))
MIDRISE1, MIDRISE2, MIDRISE3, MIDRISE4, MIDRISE5, MIDRISE6, MIDRISE7, MIDRISE8 = map(_mid_rise, range(1, 9))
TERNARY = IntFormat(name="ternary", low=-1, high=1, source="Li et al. 2016 (TWN), arXiv:1605.04711")
BINARY = MIDRISE1  # ±1/2 of a step; the sign with a scale

E2M1 = FloatFormat(
    name="e2m1", exponent_bits=2, mantissa_bits=1, bias=1, max_finite=6.0, dtype_name="float4_e2m1fn", source=_MX
)
E3M0 = FloatFormat(
    name="e3m0",
    exponent_bits=3,
    mantissa_bits=0,
    bias=3,
    max_finite=16.0,
    source="Chmiel et al. 2021 (LUQ), arXiv:2112.10769: FP4 1-3-0; the bias is ours, any other is another scale",
)
E2M3 = FloatFormat(
    name="e2m3", exponent_bits=2, mantissa_bits=3, bias=1, max_finite=7.5, dtype_name="float6_e2m3fn", source=_MX
)
E3M2 = FloatFormat(
    name="e3m2", exponent_bits=3, mantissa_bits=2, bias=3, max_finite=28.0, dtype_name="float6_e3m2fn", source=_MX
)
E3M4 = FloatFormat(
    name="e3m4",
    exponent_bits=3,
    mantissa_bits=4,
    bias=3,
    max_finite=15.5,
    has_inf=True,
    has_nan=True,
    dtype_name="float8_e3m4",
    source="LLVM APFloat Float8E3M4 (IEEE 754 conventions)",
)
E4M3 = FloatFormat(
    name="e4m3",
    exponent_bits=4,
    mantissa_bits=3,
    bias=7,
    max_finite=448.0,
    has_nan=True,
    dtype_name="float8_e4m3fn",
    source=_OFP8,
)
E4M3_IEEE = FloatFormat(
    name="e4m3_ieee",
    exponent_bits=4,
    mantissa_bits=3,
    bias=7,
    max_finite=240.0,
    has_inf=True,
    has_nan=True,
    dtype_name="float8_e4m3",
    source="LLVM APFloat Float8E4M3 (IEEE 754 conventions)",
)
E5M2 = FloatFormat(
    name="e5m2",
    exponent_bits=5,
    mantissa_bits=2,
    bias=15,
    max_finite=57344.0,
    has_inf=True,
    has_nan=True,
    dtype_name="float8_e5m2",
    source=_OFP8,
)
E4M3FNUZ = FloatFormat(
    name="e4m3fnuz",
    exponent_bits=4,
    mantissa_bits=3,
    bias=8,
    max_finite=240.0,
    has_nan=True,
    negative_zero=False,
    dtype_name="float8_e4m3fnuz",
    source=_FNUZ,
)
E4M3B11FNUZ = FloatFormat(
    name="e4m3b11fnuz",
    exponent_bits=4,
    mantissa_bits=3,
    bias=11,
    max_finite=30.0,
    has_nan=True,
    negative_zero=False,
    dtype_name="float8_e4m3b11fnuz",
    source="Sun et al. 2019 (HFP8), NeurIPS, the bias of its inference format; float8 types of ml_dtypes",
)
E5M2FNUZ = FloatFormat(
    name="e5m2fnuz",
    exponent_bits=5,
    mantissa_bits=2,
    bias=16,
    max_finite=57344.0,
    has_nan=True,
    negative_zero=False,
    dtype_name="float8_e5m2fnuz",
    source=_FNUZ,
)
E8M0 = FloatFormat(
    name="e8m0",
    exponent_bits=8,
    mantissa_bits=0,
    bias=127,
    max_finite=2.0**127,
    signed=False,
    has_nan=True,
    negative_zero=False,
    subnormals=False,
    dtype_name="float8_e8m0fnu",
    source=_MX + ", section 5.4.1",
)

NF4 = Codebook(
    name="nf4",
    values=(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    source="Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, appendix E",
)
AF4 = Codebook(
    name="af4",
    values=(
        -1.0,
        -0.69441008,
        -0.51243739,
        -0.3736951,
        -0.25607552,
        -0.14982478,
        -0.04934812,
        0.0,
        0.04273164,
        0.12934483,
        0.21961274,
        0.31675666,
        0.42563882,
        0.55496234,
        0.72424863,
        1.0,
    ),
    source="Yoshida 2023, arXiv:2306.06965, the code for blocks of 64",
)
LLOYD_MAX1, LLOYD_MAX2, LLOYD_MAX3, LLOYD_MAX4, LLOYD_MAX5, LLOYD_MAX6, LLOYD_MAX7, LLOYD_MAX8 = map(
    _lloyd_max, range(1, 9)
)
POSIT8 = Codebook(name="posit8", values=posit_values(8, 2), source="Posit Standard 2022: 8 bits, es = 2")
POSIT8_ES1 = Codebook(
    name="posit8_es1",
    values=posit_values(8, 1),
    source="Gustafson and Yonemoto 2017: posit(8, 1), as early training work",
)
LNS8 = Codebook(
    name="lns8", values=log_values(8, 128), source="Zhao et al. 2021 (LNS-Madam), arXiv:2106.13914, gamma = 8"
)
HIF8 = Codebook(name="hif8", values=hif8_values(), source="Luo et al. 2024 (HiFloat8), arXiv:2409.16626")
DYNAMIC_TREE4 = Codebook(
    name="dynamic_tree4",
    values=dynamic_tree_values(4),
    source="Li et al. 2023, 4-bit optimizer states, arXiv:2309.01507",
)
DYNAMIC_TREE8 = Codebook(
    name="dynamic_tree8",
    values=dynamic_tree_values(8),
    source="Dettmers et al. 2022, 8-bit optimizers, arXiv:2110.02861",
)


def _mx(name: str, element: Format) -> BlockFormat:
    return BlockFormat(
        name=name, element=element, block=32, scale=E8M0, scale_rounding="floor", source=_MX + ", section 5 and 6.3"
    )


def _block_floating_point(name: str, element: Format, block: int | tuple[int, int], source: str) -> BlockFormat:
    return BlockFormat(name=name, element=element, block=block, scale=E8M0, scale_rounding="floor", source=source)


_HBFP = "Drumond et al. 2018 (HBFP), arXiv:1804.01526 (its shared exponent has 10 bits, ours the 8 of E8M0)"
_BOOSTER = "Harma et al. 2022 (Accuracy Boosters), arXiv:2211.10737 (shared exponent of 8 bits here)"
_MSFP = "Rouhani et al. 2020 (MSFP), NeurIPS: sign and magnitude, 8-bit shared exponent, 16 elements"

MXFP8 = _mx("mxfp8", E4M3)
MXFP8_E5M2 = _mx("mxfp8_e5m2", E5M2)
MXFP6_E2M3 = _mx("mxfp6_e2m3", E2M3)
MXFP6_E3M2 = _mx("mxfp6_e3m2", E3M2)
MXFP4 = _mx("mxfp4", E2M1)
MXINT8 = _mx("mxint8", INT8)  # the specification's element is this integer / 64, its scale 64 times ours
NVFP4 = BlockFormat(
    name="nvfp4",
    element=E2M1,
    block=16,
    scale=E4M3,
    scale_rounding="nearest",
    tensor_scale=True,
    source="NVIDIA 2025, Pretraining Large Language Models with NVFP4, arXiv:2509.25149, section 2",
)
HBFP8 = _block_floating_point("hbfp8", MIDTREAD8, (24, 24), _HBFP)
HBFP4 = _block_floating_point("hbfp4", MIDTREAD4, 64, _BOOSTER)
HBFP6 = _block_floating_point("hbfp6", MIDTREAD6, 64, _BOOSTER)
MSFP12 = _block_floating_point("msfp12", MIDTREAD4, 16, _MSFP)
MSFP13 = _block_floating_point("msfp13", MIDTREAD5, 16, _MSFP)
MSFP14 = _block_floating_point("msfp14", MIDTREAD6, 16, _MSFP)
MSFP15 = _block_floating_point("msfp15", MIDTREAD7, 16, _MSFP)
MSFP16 = _block_floating_point("msfp16", MIDTREAD8, 16, _MSFP)

_BY_NAME: dict[str, Format | BlockFormat] = {
    constant.lower(): fmt for constant, fmt in list(globals().items()) if isinstance(fmt, Format | BlockFormat)
}
__all__ = [constant.upper() for constant in _BY_NAME]  # pyright: ignore[reportUnsupportedDunderAll]


def names() -> tuple[str, ...]:
    """Every name `get` knows, sorted."""
    return tuple(sorted(_BY_NAME))


def element_format(name: str) -> Format:
    """`get` for the library's own names of formats that have no block."""
    found = get(name)
    assert not isinstance(found, BlockFormat), name
    return found


def get(name: str) -> Format | BlockFormat:
    """The format of that name, upper or lower case, or of that ml_dtypes type name.

    Raises: ValueError when no format has the name; it lists the nearest ones. TypeError for what is not a name."""
    if not isinstance(name, str):
        hint = f" For {name} bits that is 'int{name}', 'midrise{name}' ..." if isinstance(name, int) else ""
        raise TypeError(f"formats.get({name!r}): a format goes by its name, a string such as 'int4'.{hint}")
    found = _BY_NAME.get(name.lower())
    if found is None:
        found = next((fmt for fmt in _BY_NAME.values() if getattr(fmt, "dtype_name", None) == name.lower()), None)
    if found is None:
        near = difflib.get_close_matches(name.lower(), _BY_NAME, n=5, cutoff=0.4) or names()[:5]
        raise ValueError(f"No format is called {name!r}. Near: {', '.join(near)}; all: lowbit_jax.formats.names().")
    return found
