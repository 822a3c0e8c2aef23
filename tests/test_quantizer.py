"""The quantizer as a whole: fake quantization, packed codes and NumPy agree, whatever the slots."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax import estimators, formats, rounding, scaling, sparsity

SLOTS = {
    "default": {},
    "quest4": None,
    "per tensor": dict(tiling=scaling.PerTensor()),
    "group": dict(tiling=scaling.Group(16), format=formats.INT3),
    "block": dict(tiling=scaling.Block(16, 4), format=formats.E4M3),
    "codebook": dict(tiling=scaling.Group(32), format=formats.NF4),
    "odd bits": dict(format=formats.MIDRISE5, fit=scaling.rms_optimal),
    "bf16 scale": dict(scale_format=scaling.BFLOAT16, format=formats.INT4),
    "e8m0 scale": dict(scale_format=scaling.PowerOfTwo("rceil"), tiling=scaling.Group(32), format=formats.E2M1),
    "two-level": dict(scale_format=scaling.TwoLevel(), tiling=scaling.Group(16), format=formats.E2M1),
    "2:4 mid-rise": dict(sparsity=sparsity.NofM(2, 4), format=formats.MIDRISE4, fit=scaling.rms_optimal),
    "4:8 rotated": dict(sparsity=sparsity.PairsNofM(2, 4), format=formats.MIDRISE4, rotation=lb.Hadamard(64)),
    "zero points": dict(zero_point=True, format=formats.UINT4, tiling=scaling.Group(16), scale_format=scaling.BFLOAT16),
    "rotated zero points": dict(zero_point=True, format=formats.INT3, rotation=lb.Hadamard(32)),
    "signs": dict(rotation=lb.Hadamard(32, signs=3), format=formats.INT8),
    "ternary": dict(format=formats.TERNARY, fit=scaling.mean_abs, tiling=scaling.PerTensor()),
}


def make(name: str) -> lb.Quantizer:
    return lb.quest_quantizer(4) if SLOTS[name] is None else lb.Quantizer(**SLOTS[name])


def spread_rows(key, shape=(8, 64)):
    x = np.asarray(jax.random.normal(key, shape))
    return jnp.asarray(x * np.geomspace(0.02, 20, shape[0], dtype=np.float32).reshape(-1, *[1] * (len(shape) - 1)))


# One program for each call, which compiles in a fraction of what its operations take one by one.
fakely = jax.jit(lambda quantizer, x, axis=-1: quantizer(x, axis=axis), static_argnums=(0, 2))
pack = jax.jit(
    lambda quantizer, x, axis=-1, scale=None: quantizer.quantize(x, axis=axis, scale=scale), static_argnums=(0, 2)
)
unpack = jax.jit(lambda packed: packed.dequantize())


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("name", SLOTS)
def test_packed_codes_equal_fake_quantization(key, name, axis):
    quantizer, x = make(name), spread_rows(key, (64, 64))
    packed = pack(quantizer, x, axis)
    fake = np.asarray(fakely(quantizer, x, axis))
    np.testing.assert_allclose(unpack(packed), fake, rtol=2e-6, atol=2e-6 * np.abs(fake).max())
    assert packed.shape == x.shape and packed.dtype == x.dtype
    assert packed.words.dtype == jnp.uint8
    scale_bits = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves((packed.scales, packed.zeros))) / x.size
    assert packed.bits_per_element == pytest.approx(quantizer.element_bits() + scale_bits)


@pytest.mark.parametrize("name", [n for n in SLOTS if n not in ("block", "two-level", "codebook")])
def test_requantizing_is_idempotent(key, name):
    """On the grid already: with the same scale the same codes come back (fits that read the data need not agree)."""
    quantizer = dataclasses.replace(
        make(name),
        rotation=None,
        sparsity=None,
        fit=scaling.Learned(),
        tiling=scaling.PerTensor(),
        estimator=estimators.LSQ(),
        zero_point=False,
    )
    packed = pack(quantizer, spread_rows(key), scale=jnp.float32(0.37))
    again = pack(quantizer, unpack(packed), scale=jnp.float32(0.37))
    np.testing.assert_array_equal(packed.words, again.words)


@pytest.mark.parametrize("size", [1, 2, 7, 31, 257])
@pytest.mark.parametrize("bits", range(1, 9))
def test_any_width_and_odd_size(key, bits, size):
    quantizer = lb.quest_quantizer(bits)
    x = spread_rows(key, (3, size))
    packed, back, fake = jax.jit(lambda x: ((p := quantizer.quantize(x)), p.dequantize(), quantizer(x)))(x)
    assert packed.words.shape == (3, -(-size * bits // 8))
    np.testing.assert_allclose(back, fake, rtol=3e-6, atol=3e-6 * np.abs(np.asarray(x)).max())


def test_mid_rise_error_is_half_a_step_inside_the_grid(key):
    x = jax.random.normal(key, (16, 128))
    for bits in (2, 4, 8):
        quantizer = lb.Quantizer(format=formats.get(f"midrise{bits}"))
        step = np.abs(np.asarray(x)).max(1, keepdims=True) / ((2**bits - 1) / 2)
        assert (np.abs(quantizer(x) - x) <= step / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_of_zeros_comes_back_as_zeros_with_a_finite_gradient(bits):
    for quantizer in (lb.quest_quantizer(bits), lb.Quantizer(format=formats.get(f"midrise{bits}"))):
        x = jnp.asarray(np.float32([[0.0], [1.0]]).repeat(128, axis=1))

        @jax.jit
        def all_forms(x, quantizer=quantizer):
            slope = jax.grad(lambda x: jnp.sum(quantizer(x) ** 2))(x)
            return quantizer(x), quantizer.quantize(x).dequantize(), slope

        fake, back, slope = map(np.asarray, all_forms(x))
        np.testing.assert_array_equal(fake[0], 0)
        np.testing.assert_array_equal(back[0], 0)
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["default", "quest4", "group", "e8m0 scale", "bf16 scale"])
def test_a_bad_element_spoils_its_own_tile_only(key, name, bad):
    x = np.array(spread_rows(key))
    clean = fakely(make(name), x)
    x[2, 5] = bad
    spoiled = np.asarray(fakely(make(name), x))
    others = np.ones(x.shape, bool)
    tile = {"group": slice(0, 16), "e8m0 scale": slice(0, 32)}.get(name, slice(None))
    others[2, tile] = False
    np.testing.assert_array_equal(spoiled[others], np.asarray(clean)[others])
    assert not np.isfinite(spoiled[2, tile]).all()


@pytest.mark.parametrize("name", ["default", "quest4", "group"])
def test_bfloat16_keeps_its_dtype_and_float32_statistics(key, name):
    x = spread_rows(key).astype(jnp.bfloat16)
    fake = fakely(make(name), x)
    assert fake.dtype == jnp.bfloat16
    np.testing.assert_array_equal(fake, fakely(make(name), x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_stochastic_rounding_needs_a_key_and_is_unbiased(key):
    quantizer = lb.Quantizer(format=formats.INT4, rounding=rounding.stochastic, tiling=scaling.PerTensor())
    x = jax.random.uniform(key, (32,), minval=-1.0, maxval=1.0)
    with pytest.raises(ValueError, match="key"):
        quantizer(x)
    draws = jax.vmap(lambda k: quantizer(x, key=k))(jax.random.split(key, 4000))
    step = float(jnp.abs(x).max()) / 7
    np.testing.assert_allclose(draws.mean(0), x, atol=5 * step / 2 / 4000**0.5 + 1e-6)
    np.testing.assert_array_equal(quantizer(x, key=key), quantizer(x, key=key))


def test_transformations(key):
    """Rows differ by the order of the rotations' sums: 64 terms, each within 2^-24 of the row's largest value."""
    quantizer = lb.quest_quantizer(3)
    x = spread_rows(key, (4, 6, 64))
    expected = quantizer(x)

    def assert_close(found, expected):
        bound = 64 * 2.0**-24 * jnp.max(jnp.abs(expected), axis=-1, keepdims=True)
        assert np.all(np.abs(found - expected) <= bound)

    assert_close(jax.jit(quantizer)(x), expected)
    assert_close(jax.vmap(quantizer)(x), expected)
    _, scanned = jax.lax.scan(lambda c, row: (c, quantizer(row)), 0, x)
    assert_close(scanned, expected)
    loss = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))))(x)
    assert_close(loss(jax.checkpoint(quantizer)), loss(quantizer))


def test_a_packed_array_is_a_pytree(key):
    packed = pack(lb.quest_quantizer(4), spread_rows(key))
    through = jax.jit(lambda q: q)(packed)
    np.testing.assert_array_equal(unpack(through), unpack(packed))
    stacked = jax.jit(jax.vmap(lb.quest_quantizer(4).quantize))(jnp.stack([spread_rows(key)] * 3))
    assert stacked.shape == (3, 8, 64)
    _, rows = jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, stacked)
    np.testing.assert_array_equal(rows, unpack(stacked))
    assert "QTensor(float32[8, 64], midrise4" in repr(packed)


def test_equal_quantizers_do_not_retrace(key):
    traces = []

    @jax.jit
    def run(x):
        traces.append(1)
        return lb.quest_quantizer(4)(x)

    for _ in range(3):
        run(jnp.ones((2, 8)))
    assert len(traces) == 1 and hash(lb.quest_quantizer(4)) == hash(lb.quest_quantizer(4))


def test_empty_arrays_and_single_elements():
    for shape in ((0, 16), (4, 0), (1, 1)):
        x = jnp.ones(shape)
        assert fakely(lb.quest_quantizer(4), x).shape == shape
        assert unpack(pack(lb.Quantizer(format=formats.INT4), x)).shape == shape


BAD_TILES = [
    *(
        dict(format=formats.get(n))
        for n in "int4 uint3 ternary midrise1 midrise4 e2m1 e4m3 e5m2 nf4 lloyd_max2".split()
    ),
    *(
        dict(format=fmt, tiling=tiling, fit=fit)
        for fmt, fit in ((formats.MIDRISE3, scaling.rms_optimal), (formats.INT4, scaling.Percentile(50)))
        for tiling in (scaling.PerTensor(), scaling.Group(16), scaling.Block(16, 2))
    ),
    dict(format=formats.MIDRISE4, fit=scaling.rms_optimal, rotation=lb.Hadamard(16)),
    dict(format=formats.INT4, fit=scaling.mean_abs, scale_format=scaling.BFLOAT16, sparsity=sparsity.NofM(2, 4)),
    dict(format=formats.E2M1, tiling=scaling.Group(16), scale_format=scaling.TwoLevel()),
    dict(format=formats.E2M1, tiling=scaling.Group(16), scale_format=scaling.PowerOfTwo()),
    dict(fit=scaling.Learned(), estimator=estimators.LSQ(), tiling=scaling.PerTensor()),
]


@pytest.mark.parametrize(
    "slots", BAD_TILES, ids=lambda s: " ".join(str(getattr(v, "name", v))[:20] for v in s.values())
)
def test_packed_equals_fake_on_rows_with_infinities_and_nans(key, slots):
    """An infinity has no sign left once its scale is infinite too: the whole tile is NaN, in both forms."""
    quantizer = lb.Quantizer(**slots)
    x = spread_rows(key, (8, 64)).at[1, 3].set(jnp.inf).at[2, 60].set(-jnp.inf).at[7].set(0)
    if not quantizer.learned:
        x = x.at[4, 5].set(jnp.nan).at[5, 1].set(jnp.nan).at[5, 2].set(jnp.inf)
    scale = jnp.float32(0.1) if quantizer.learned else None
    both = jax.jit(lambda x: (quantizer(x, scale=scale), quantizer.quantize(x, scale=scale).dequantize()))
    fake, back = map(np.asarray, both(x))
    np.testing.assert_array_equal(back, fake)
    assert not np.isinf(fake).any()


def test_a_learned_scale_beyond_its_format_saturates():
    """In the fake form as in the packed one, with its gradient; 448 is the largest value of E4M3."""
    scale_format, estimator = scaling.CastScale("float8_e4m3fn"), estimators.LSQ()
    quantizer = lb.Quantizer(format=formats.INT4, fit=scaling.Learned(), estimator=estimator, scale_format=scale_format)
    x, scale = jnp.full((1, 4), 1e10), jnp.full((1,), 1e10)
    fake, slope = jax.jit(jax.value_and_grad(lambda scale: quantizer(x, scale=scale).mean()))(scale)
    assert fake == quantizer.quantize(x, scale=scale).dequantize().mean() == 448 * 7
    assert slope[0] > 0


def test_a_nan_in_a_tile_of_a_learned_scale():
    """It has no code: packed it spoils the tile, while the fake form keeps it to itself."""
    quantizer = dataclasses.replace(lb.methods.get("lsq").out.lhs, tiling=scaling.PerRow())
    x, scale = jnp.ones((2, 8)).at[1, 3].set(jnp.nan), jnp.full((2,), 0.5)
    assert np.isnan(quantizer(x, scale=scale)).sum() == 1
    back = quantizer.quantize(x, scale=scale).dequantize()
    assert np.isnan(back[1]).all() and np.isfinite(back[0]).all()


class TestLearnedScale:
    quantizer = lb.methods.get("lsq", bits=3).out.lhs

    def pull(self, x, scale):
        y, back = jax.vjp(lambda s: self.quantizer(x, scale=s), jnp.float32(scale))
        return y, float(back(x)[0])

    def test_acts_by_its_magnitude(self, key):
        x = jax.random.normal(key, (4, 16))
        (y, slope), (mirrored, mirrored_slope) = self.pull(x, 0.3), self.pull(x, -0.3)
        np.testing.assert_array_equal(y, mirrored)
        assert slope == -mirrored_slope != 0
        packed = self.quantizer.quantize(x, scale=jnp.float32(-0.3))
        packed.validate()
        np.testing.assert_array_equal(packed.dequantize(), y)

    def test_zero_is_lifted_again(self, key):
        """All elements lie above the grid, so a larger scale brings the result nearer to x: the slope points up."""
        x = jax.random.normal(key, (4, 16))
        y, slope = self.pull(x, 0.0)
        assert np.isfinite(y).all() and slope > 0


def test_slots_are_checked():
    """Each message names what to pass instead."""
    cases = {
        "lb.Hadamard()": dict(rotation="hadamard"),
        r"lb.Hadamard\(block=128\)": dict(rotation=128),
        r"lb.sparsity.NofM\(2, 4\)": dict(sparsity="2:4"),
        r"lb.sparsity.PairsNofM\(2, 4\)": dict(sparsity="4:8"),
        r"lb.scaling.PowerOfTwo\(\)": dict(scale_format="e8m0"),
        r"here lb.scaling.PowerOfTwo\(\)": dict(scale_format=formats.E8M0),
        r"the class. Give an object of it, as PowerOfTwo\(": dict(scale_format=scaling.PowerOfTwo),
        r"as Percentile\(": dict(fit=scaling.Percentile),
        "here lb.scaling.rms_optimal": dict(fit="rms_optimal"),
        "here lb.rounding.stochastic": dict(rounding="stochastic"),
        r"lb.formats.get\('int4'\)": dict(format="int4"),
        r"lb.scaling.PerRow\(\)": dict(tiling="row"),
        r"Group\(32\)": dict(tiling=32),
        r"as Hadamard\(": dict(rotation=lb.Hadamard),
        r"as NofM\(": dict(sparsity=sparsity.NofM),
        r"StraightThrough\(\)": dict(estimator="trust"),
        "class. Give an object": dict(format=formats.IntFormat),
    }
    for words, slots in cases.items():
        with pytest.raises(TypeError, match=rf"Quantizer\({next(iter(slots))}=.*{words}"):
            lb.Quantizer(**slots)


def test_options_that_could_not_take_effect():
    for estimator in (estimators.LSQ(), estimators.PACT()):
        with pytest.raises(ValueError, match=r"gradient would go nowhere. Use fit=Learned\(\)"):
            lb.Quantizer(estimator=estimator)
    for estimator in (estimators.Trust(), estimators.StraightThrough(), estimators.ClippedStraightThrough()):
        with pytest.raises(ValueError, match=r"nothing would be learned. Use LSQ\(\) or PACT\(\)"):
            lb.Quantizer(fit=scaling.Learned(), estimator=estimator)
    assert not lb.Quantizer().uses_key and lb.Quantizer(rounding=rounding.stochastic).uses_key


@pytest.mark.parametrize("name", lb.methods.names())
def test_every_method_can_be_made(name):
    recipe, again = lb.methods.get(name), lb.methods.get(name)
    assert isinstance(recipe, lb.LinearRecipe) and recipe == again and hash(recipe) == hash(again)


def test_bad_arguments_say_the_way_out():
    x, stochastic = jnp.ones((2, 48)), lb.Quantizer(rounding=rounding.stochastic)
    cases: list[Any] = [
        (TypeError, "block_quantizer", lambda: lb.Quantizer(format=formats.MXFP4)),
        (TypeError, "give a format", lambda: lb.Quantizer(format="int4")),
        (TypeError, r"as PerRow\(", lambda: lb.Quantizer(tiling=scaling.PerRow)),
        (TypeError, r"as Trust\(", lambda: lb.Quantizer(estimator=estimators.Trust)),
        (TypeError, "Cast first", lambda: lb.Quantizer()(jnp.ones((2, 2), jnp.int32))),
        (ValueError, "scalar", lambda: lb.Quantizer()(jnp.float32(1))),
        (ValueError, "leaves 16.*Pad by 16", lambda: lb.Quantizer(tiling=scaling.Group(32))(x)),
        (ValueError, "axis 5", lambda: lb.Quantizer()(x, axis=5)),
        (ValueError, "reads the scale off the data", lambda: lb.Quantizer()(x, scale=jnp.float32(1))),
        (ValueError, "initial_scale", lambda: lb.methods.get("lsq").out.lhs(x)),
        (ValueError, "nothing to hold", lambda: lb.Quantizer().initial_scale(x)),
        (ValueError, "1 to 8 bits", lambda: lb.quest(9)),
        (ValueError, "1 to 8 bits", lambda: lb.quest("int4")),
        (ValueError, "quantizes nothing", lambda: lb.quest(4, weights=False, activations=False)),
        (ValueError, "4:8", lambda: lb.quest(4, sparsity="3:4")),
        (ValueError, "of the weights", lambda: lb.quest(4, weights=False, sparsity="2:4")),
        (TypeError, "block format", lambda: lb.block_quantizer(formats.INT4)),
        (TypeError, "axis is 1.0, a float; pass an integer", lambda: lb.Quantizer()(x, axis=1.0)),
        (ValueError, "names no axis", lambda: lb.Quantizer()(x, axis=())),
        (ValueError, "names an axis twice", lambda: lb.Quantizer()(x, axis=(1, -1))),
        (TypeError, "got a list; .*jnp.asarray", lambda: lb.Quantizer()([[1.0, 2.0]])),
        (TypeError, "quantized already", lambda: lb.Quantizer()(lb.Quantizer().quantize(x))),
        (TypeError, r"got 3 for a key; .*jax.random.key\(3\)", lambda: stochastic(x, key=3)),
        (TypeError, "got a .*NdArray for a key|got a ndarray for a key", lambda: stochastic(x, key=np.zeros(2))),
        (ValueError, r"pact\(bits=9\)", lambda: lb.methods.get("pact", bits=9)),
        (ValueError, r"lsq\(bits=4.0\)", lambda: lb.methods.get("lsq", bits=4.0)),
        (TypeError, "int4.*midrise4", lambda: formats.get(4)),
        (TypeError, r"Hadamard\(block=\) is 128.0", lambda: lb.Hadamard(block=128.0)),
        (ValueError, "seed", lambda: lb.Hadamard(signs=-1)),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()


def test_integers_of_numpy_are_integers():
    four, axis = np.int64(4), np.int32(-1)
    for method in ("lsq", "pact", "straight_through", "absmax_integer"):
        assert lb.methods.get(method, bits=four) == lb.methods.get(method, bits=4)
    assert lb.Hadamard(block=np.int64(64)) == lb.Hadamard(block=64)
    assert sparsity.NofM(np.int64(2), np.int64(4)) == sparsity.NofM(2, 4)
    assert formats.MidRiseFormat(name="m", bits=four, source="") == formats.MidRiseFormat(name="m", bits=4, source="")
    x = jnp.ones((2, 48))
    assert lb.Quantizer().quantize(x, axis=axis).axis == -1
    np.testing.assert_array_equal(lb.Quantizer()(x, axis=axis), lb.Quantizer()(x))


def test_numpy_arrays_and_integers():
    """float64 where JAX computes in 32 bits, and NumPy's integers for widths."""
    x = np.linspace(-1, 1, 64).reshape(2, 32)
    packed = lb.Quantizer().quantize(x)
    assert packed.dtype == jnp.float32 == packed.dequantize().dtype == lb.Quantizer()(x).dtype
    assert lb.quest(np.int64(4)) == lb.quest(4)
    with pytest.raises(ValueError, match=r"source\('foo'\).*quest"):
        lb.methods.source("foo")


def test_a_learned_scale_has_the_shape_of_the_tiles():
    quantizer = lb.Quantizer(tiling=scaling.Group(2), fit=scaling.Learned(), estimator=estimators.LSQ())
    x = jnp.ones((2, 6))
    for shape in ((2, 3), (2, 3, 1), ()):
        assert quantizer(x, scale=jnp.ones(shape)).shape == x.shape
    with pytest.raises(ValueError, match="scale of shape .3, 2.; this tiling has 6 tiles"):
        quantizer(x, scale=jnp.ones((3, 2)))
