"""Roundings at every decision point of every format: the grid, the midpoints, and both neighbors of each."""

import fractions
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax import formats, rounding
from lowbit_jax.formats import BlockFormat, Codebook, FloatFormat, IntFormat, MidRiseFormat

# Left out to compile less: the same code as formats that are in, with another constant.
SAME = (
    "uint2 uint3 uint5 uint6 uint7 midtread3 midtread5 midtread6 midtread7 lloyd_max5 lloyd_max6 lloyd_max7 posit8_es1"
).split()
ELEMENTS = [
    fmt for fmt in map(formats.get, formats.names()) if not isinstance(fmt, BlockFormat) and fmt.name not in SAME
]
WITH_DTYPE = [fmt for fmt in ELEMENTS if isinstance(fmt, FloatFormat) and fmt.dtype is not None]
FEW = [formats.get(name) for name in "int4 midrise1 midrise3 e2m1 e3m0 e4m3 e8m0 nf4 lloyd_max2".split()]
over_elements = pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda fmt: fmt.name)
over_floats = pytest.mark.parametrize("fmt", WITH_DTYPE, ids=lambda fmt: fmt.name)
DRAWN = list(dict.fromkeys(FEW + WITH_DTYPE + [formats.INT1, formats.UINT8, formats.MIDRISE8, formats.HIF8]))
over_few = pytest.mark.parametrize("fmt", FEW, ids=lambda fmt: fmt.name)
nearest = jax.jit(rounding.nearest, static_argnums=1)
stochastic = jax.jit(rounding.stochastic, static_argnums=1)


def grid_of(fmt) -> np.ndarray:
    return np.array(fmt.levels, np.float32)


def decision_points(fmt) -> np.ndarray:
    """Grid, midpoints and both neighbors of each in float32, inside the grid; no denormals, which XLA flushes."""
    grid = grid_of(fmt)
    ties = ((grid[1:].astype(np.float64) + grid[:-1]) / 2).astype(np.float32)
    points = np.concatenate([grid, ties])
    points = np.concatenate([points, np.nextafter(points, -np.inf), np.nextafter(points, np.inf)])
    normal = (np.abs(points) >= np.finfo(np.float32).tiny) | (points == 0)
    return points[normal & (points >= grid[0]) & (points <= grid[-1])]


def beyond(fmt) -> np.ndarray:
    top = np.float32(max(abs(fmt.max_finite), abs(fmt.min_finite)))
    far = np.array([np.nextafter(top, np.float32(np.inf)), 3e38, np.inf], np.float32)
    return np.concatenate([far, -far])


def numbers_of_all_sizes(fmt) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = np.ldexp(rng.uniform(1, 2, 4096), rng.integers(-30, 20, 4096)) * rng.choice([-1, 1], 4096)
    return x[(x >= fmt.min_finite) & (x <= fmt.max_finite)].astype(np.float32)


@functools.cache
def points(fmt) -> tuple[np.ndarray, ...]:
    return decision_points(fmt), numbers_of_all_sizes(fmt), beyond(fmt), np.float32([np.nan, -np.nan])


@functools.partial(jax.jit, static_argnums=1)
def certain(x, fmt):
    return rounding.nearest(x, fmt), rounding.toward_zero(x, fmt)


@functools.cache
def rounded(fmt, which: str) -> list[np.ndarray]:
    """What one rounding makes of each kind of points: one compilation a format serves all tests."""
    x = np.concatenate(points(fmt))
    if which == "stochastic":
        y = np.stack([stochastic(x, fmt, jax.random.key(seed)) for seed in range(3)])
    else:
        y = np.asarray(certain(x, fmt)[which == "toward_zero"])
    return np.split(y, np.cumsum([len(part) for part in points(fmt)])[:-1], axis=-1)


def neighbors(fmt, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    grid = grid_of(fmt)
    lower = np.clip(np.searchsorted(grid, x, side="right") - 1, 0, len(grid) - 1)
    upper = np.clip(np.searchsorted(grid, x, side="left"), 0, len(grid) - 1)
    return grid[lower], grid[upper]


@over_floats
def test_nearest_is_bit_exact_with_ml_dtypes(fmt):
    """All but the sign of zero, which the "fnuz" types drop and `coding.encode` drops for them."""
    for x, y in zip(points(fmt)[:2], rounded(fmt, "nearest")[:2], strict=True):
        expected = x.astype(fmt.dtype).astype(np.float32)
        np.testing.assert_array_equal(y, expected)
        if fmt.negative_zero:
            np.testing.assert_array_equal(np.signbit(y), np.signbit(expected))


def test_nearest_to_e8m0_among_float32_denormals_too():
    bits = np.array([1 << 22, (1 << 22) + 1, 3 << 21, (3 << 21) - 1, (3 << 21) + 1, (1 << 23) - 1], np.uint32)
    x = bits.view(np.float32)
    expected = x.astype(formats.E8M0.dtype).view(np.uint8)
    found = np.asarray(nearest(x, formats.E8M0)).view(np.uint32)
    np.testing.assert_array_equal(found, np.where(expected == 0, 1 << 22, expected.astype(np.uint32) << 23))


@over_elements
def test_nearest_is_nearest_by_exhaustive_search(fmt):
    x, y, grid = points(fmt)[0].astype(np.float64), rounded(fmt, "nearest")[0], grid_of(fmt).astype(np.float64)
    assert np.isin(y, grid).all()
    np.testing.assert_array_equal(np.abs(x - y), np.abs(x[:, None] - grid).min(axis=1))


@over_elements
def test_beyond_the_grid_all_roundings_saturate_and_nan_stays(fmt):
    edge = np.where(points(fmt)[2] > 0, np.float32(fmt.max_finite), np.float32(fmt.min_finite))
    for which in ("nearest", "toward_zero") + ("stochastic",) * (fmt in DRAWN):
        far, nan = rounded(fmt, which)[2:]
        np.testing.assert_array_equal(far, np.broadcast_to(edge, far.shape))
        assert np.isnan(nan).all()


@over_elements
def test_toward_zero_is_the_neighbor_of_smaller_magnitude(fmt):
    for x, y in zip(points(fmt)[:2], rounded(fmt, "toward_zero")[:2], strict=True):
        lower, upper = neighbors(fmt, x)
        inward = np.where(np.abs(lower) <= np.abs(upper), lower, upper)
        same_sign = np.where(x > 0, upper, lower)  # between two levels of unlike sign, where the grid has no zero
        np.testing.assert_array_equal(y, np.where((lower < 0) & (upper > 0), same_sign, inward))


@pytest.mark.parametrize("fmt", DRAWN, ids=lambda fmt: fmt.name)
def test_stochastic_takes_only_the_two_neighbors_and_keeps_the_grid(fmt):
    for x, y in zip(points(fmt)[:2], rounded(fmt, "stochastic")[:2], strict=True):
        lower, upper = neighbors(fmt, x)
        assert ((y == lower) | (y == upper)).all()


def test_ties_go_where_the_docstring_says():
    halves = np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    np.testing.assert_array_equal(nearest(halves, formats.INT4), [-2, -2, 0, 0, 2, 2])
    integers = np.float32([-3, -2, -1, 0, 1, 2, 3])
    np.testing.assert_array_equal(nearest(integers, formats.MIDRISE4), [-2.5, -2.5, -0.5, -0.5, 1.5, 1.5, 3.5])
    thirds = Codebook(name="thirds", values=(0.0, 1.0, 3.0, 7.0), source="this test")
    np.testing.assert_array_equal(nearest(np.float32([0.5, 2.0, 5.0]), thirds), [0.0, 3.0, 3.0])
    np.testing.assert_array_equal(nearest(np.float32([0.125, 3.0, -6.0]), formats.E3M0), [0.0, 4.0, -8.0])


@pytest.mark.parametrize("bits", range(1, 9))
def test_mid_rise_is_the_formula_of_quest(bits, key):
    """round(clip(u, ±max) + 1/2) - 1/2 in float64, ties to even; float32 inputs of all sizes and the ties."""
    fmt = formats.get(f"midrise{bits}")
    x = np.concatenate([np.asarray(jax.random.normal(key, (4096,))) * 2**bits / 3, np.arange(-130, 130) / 2])
    x = x.astype(np.float32)
    expected = np.round(np.clip(x.astype(np.float64), fmt.min_finite, fmt.max_finite) + 0.5) - 0.5
    np.testing.assert_array_equal(nearest(x, fmt), np.clip(expected, fmt.min_finite, fmt.max_finite))


def test_mid_rise_keeps_the_sign_of_the_smallest_normal_numbers():
    tiny = np.finfo(np.float32).tiny
    np.testing.assert_array_equal(nearest(np.float32([tiny, -tiny]), formats.MIDRISE1), [0.5, -0.5])
    np.testing.assert_array_equal(nearest(np.float32([1 - 2**-24]), formats.MIDRISE2), [0.5])


@over_few
def test_stochastic_is_unbiased_with_the_variance_of_two_points(fmt, key):
    """E[y] = u, Var[y] = (upper - u)(u - lower), for u inside each kind of cell."""
    grid = grid_of(fmt).astype(np.float64)
    cells = np.unique(np.linspace(0, len(grid) - 2, 5).astype(int)) if fmt is not formats.E8M0 else [126, 127, 130]
    draws = 1 << 16
    for i, share in zip(cells, [0.5, 0.1, 0.73, 0.999, 0.31], strict=False):
        lower, upper = grid[i], grid[i + 1]
        u = np.float32(lower + share * (upper - lower))
        y = np.asarray(stochastic(jnp.full((draws,), u), fmt, jax.random.fold_in(key, int(i)))).astype(np.float64)
        deviation = math.sqrt((upper - u) * (u - lower) / draws)
        assert abs(y.mean() - u) < 5 * deviation
        assert set(np.unique(y)) <= {lower, upper}


@over_few
def test_stochastic_is_a_function_of_the_key(fmt, key):
    u = np.random.default_rng(0).uniform(fmt.min_finite / 2, min(fmt.max_finite, 9), 256).astype(np.float32)
    np.testing.assert_array_equal(stochastic(u, fmt, key), stochastic(u.copy(), fmt, jax.random.key(0)))
    assert (stochastic(u, fmt, key) != stochastic(u, fmt, jax.random.key(1))).any()


@pytest.mark.parametrize("fmt", [formats.INT4, formats.E2M1, formats.NF4], ids=lambda fmt: fmt.name)
def test_under_vmap_as_row_by_row(fmt, key):
    u = jax.random.normal(key, (4, 32)) * fmt.max_finite / 2
    keys = jax.random.split(key, 4)
    for function in (nearest, stochastic):
        mapped = jax.vmap(lambda row, k, f=function: f(row, fmt, k))(u, keys)
        np.testing.assert_array_equal(mapped[3], function(u[3], fmt, keys[3]))


@pytest.mark.parametrize("fmt", [formats.MIDRISE8, formats.E2M1, formats.NF4], ids=lambda fmt: fmt.name)
def test_bfloat16_rounds_as_its_float32_value(fmt):
    u = np.random.default_rng(0).normal(0, fmt.max_finite / 2, 256).astype(jnp.bfloat16)
    rounded = nearest(u, fmt)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, nearest(u.astype(np.float32), fmt).astype(jnp.bfloat16))


@pytest.mark.parametrize("name", ["int4", "midrise4", "e2m1", "e4m3", "nf4"])
def test_float64_where_it_is_enabled(name):
    fmt = formats.get(name)
    with jax.enable_x64(True):
        u = np.linspace(fmt.min_finite, min(fmt.max_finite, 500.0), 777)
        rounded = np.asarray(rounding.nearest(jnp.asarray(u), fmt))
    assert rounded.dtype == np.float64
    grid = np.array(fmt.levels)
    np.testing.assert_array_equal(np.abs(rounded - u), np.abs(u[:, None] - grid).min(axis=1))


def test_empty_and_scalar_arrays(key):
    for fmt in FEW:
        for function in (rounding.nearest, rounding.toward_zero, rounding.stochastic):
            for x in (jax.ShapeDtypeStruct((0, 3), jnp.float32), jax.ShapeDtypeStruct((), jnp.bfloat16)):
                answer = jax.eval_shape(lambda u, f=function, fmt=fmt: f(u, fmt, key), x)
                assert (answer.shape, answer.dtype) == (x.shape, x.dtype)
    assert nearest(jnp.zeros((0, 3)), formats.E2M1).shape == (0, 3)
    assert nearest(jnp.float32(5.1), formats.E2M1) == 6.0


def test_wrong_calls_say_what_they_need():
    u = jnp.zeros((2,))
    with pytest.raises(ValueError, match="stochastic rounding to e2m1 got no key"):
        rounding.stochastic(u, formats.E2M1)
    for function in (rounding.nearest, rounding.toward_zero, rounding.stochastic):
        with pytest.raises(TypeError):
            function(u, formats.MXFP4, jax.random.key(0))
        with pytest.raises(TypeError):
            function(jnp.zeros((2,), jnp.int32), formats.INT4, jax.random.key(0))


POSITIVE = np.concatenate(
    [
        np.float32([2.0**k for k in (-126, -3, 0, 5, 126)]),
        np.nextafter(np.float32([2.0**k for k in (-125, 0, 7)]), np.float32(0)),
        np.float32([1.5, 3.0, math.sqrt(2), np.nextafter(np.float32(math.sqrt(2)), np.float32(2)), 6.0, 7.0, 448.0]),
        np.exp(np.random.default_rng(0).normal(0, 9, 500)).astype(np.float32),
    ]
)


def exponent_by_mode(x: float, mode: str) -> int:
    """By rational arithmetic on the value of a float32."""
    value, k = fractions.Fraction(x), math.frexp(x)[1] - 1
    low = fractions.Fraction(2) ** k
    match mode:
        case "floor":
            return k
        case "ceil":
            return k + (value > low)
        case "nearest":
            return k + (value - low >= 2 * low - value)
        case "log":
            return k + (value * value >= 2 * low * low)
    raise AssertionError(mode)


@pytest.mark.parametrize("mode", rounding.POWER_OF_TWO_MODES)
def test_powers_of_two_are_exact(mode):
    found = jax.jit(rounding.power_of_two, static_argnums=1)(POSITIVE, mode)
    np.testing.assert_array_equal(found, [2.0 ** exponent_by_mode(float(x), mode) for x in POSITIVE])


def test_powers_of_two_at_the_ends_of_float32():
    x = np.float32([0.0, 1e-45, 2.0**-127, 3.4e38, np.inf, np.nan])
    for mode in rounding.POWER_OF_TWO_MODES:
        low, denormal, smallest, high, infinite, nan = np.asarray(rounding.power_of_two(jnp.asarray(x), mode))
        assert low == denormal == smallest == 2.0**-126 and high == 2.0**127
        assert infinite == np.inf and np.isnan(nan)


@pytest.mark.parametrize("fmt", [formats.E2M1, formats.E4M3, formats.E5M2, formats.INT8], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("mode", rounding.SCALE_MODES)
def test_block_scales_are_those_of_their_definition(fmt, mode):
    """OCP MX v1.0 section 6.3 for floor; `ceil(log2(amax / max_finite))` for rceil; for even, amax is first rounded
    half up to the mantissa bits of the element, which may carry into the next binade."""
    emax = math.frexp(fmt.max_finite)[1] - 1
    amax = POSITIVE[(POSITIVE > 1e-30) & (POSITIVE < 1e30)]
    found = np.asarray(rounding.power_of_two_scale(jnp.asarray(amax), fmt, mode))
    for x, scale in zip(amax.tolist(), found.tolist(), strict=True):
        value = fractions.Fraction(x)
        if mode == "rceil":
            assert value <= fractions.Fraction(scale) * fractions.Fraction(fmt.max_finite)
            assert value > fractions.Fraction(scale) / 2 * fractions.Fraction(fmt.max_finite)
            continue
        if mode == "even":
            mantissa_bits = fmt.mantissa_bits if isinstance(fmt, FloatFormat) else 6
            step = fractions.Fraction(2) ** (math.frexp(x)[1] - 1 - mantissa_bits)
            rounded = math.floor(value / step + fractions.Fraction(1, 2)) * step
            expected = exponent_by_mode(float(rounded), "floor")
        else:
            expected = exponent_by_mode(x, mode)
        assert scale == 2.0 ** (expected - emax)


def test_block_scales_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="mode 'round'; pass one of floor, ceil"):
        rounding.power_of_two(jnp.ones((1,)), "round")
    with pytest.raises(ValueError, match="mode 'down'; pass one of"):
        rounding.power_of_two_scale(jnp.ones((1,)), formats.E2M1, "down")
    with pytest.raises(ValueError, match="nf4 has none"):
        rounding.power_of_two_scale(jnp.ones((1,)), formats.NF4, "even")


def test_the_element_kinds_are_all_covered():
    kinds = {type(fmt) for fmt in ELEMENTS}
    assert kinds == {IntFormat, MidRiseFormat, FloatFormat, Codebook}
