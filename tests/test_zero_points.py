"""Zero points against a transcription in float64, in storage, in products and in Flax models."""

import dataclasses
import functools
import platform

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx, serialization
from jax.sharding import PartitionSpec as P

import lowbit_jax as lb
import lowbit_jax.nn.serialization  # noqa: F401  # makes flax.serialization know packed weights
from lowbit_jax import estimators, formats, rounding, scaling
from lowbit_jax.ops import pack_rhs
from lowbit_jax.ops.plane_tensor import PlaneTensor, to_planes
from lowbit_jax.optim import stochastic_rounding
from lowbit_jax.parallel import make_mesh
from lowbit_jax.parallel.collectives import gather_qtensor
from lowbit_jax.parallel.packed import qtensor_specs

NUMBERS = (((1,), (0,)), ((), ()))
UINT4 = lb.Quantizer(format=formats.UINT4, tiling=scaling.Group(32), zero_point=True)
WEIGHTS = lb.methods.get("absmax_integer", bits=4, activations=False, group=32, zero_points="weights")

# One program for each call, which compiles in a fraction of what its operations take one by one.
fakely = jax.jit(lambda quantizer, x: quantizer(x), static_argnums=0)
pack = jax.jit(lambda quantizer, x: quantizer.quantize(x), static_argnums=0)
pack_weight = jax.jit(lambda recipe, w: pack_rhs(w, NUMBERS, recipe), static_argnums=0)
unpack = jax.jit(lambda packed, dtype=None: packed.dequantize(dtype), static_argnums=1)
product = jax.jit(lambda recipe, x, w: lb.dot_general(x, w, NUMBERS, recipe=recipe), static_argnums=0)
in_planes = jax.jit(to_planes, static_argnums=(1, 2))


def uneven(seed, shape=(6, 64)):
    """Rows about 0, above, below and across it."""
    random = np.random.default_rng(seed)
    return (random.standard_normal(shape) + random.uniform(-3, 3, (shape[0], 1))).astype(np.float32)


def transcribed(x, fmt):
    """Jacob et al. 2017, eq. 1 and section 3, for each row, in float64: (x_hat, scale, zero point)."""
    x = np.asarray(x, np.float64)
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = (high - low) / (fmt.high - fmt.low)
    zero = np.clip(np.round(fmt.low - low / scale), fmt.low, fmt.high)
    return scale * (np.clip(np.round(x / scale + zero), fmt.low, fmt.high) - zero), scale, zero


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("sign", ["int", "uint"])
def test_equals_the_transcription(sign, bits):
    fmt, x = formats.get(f"{sign}{bits}"), uneven(bits)
    near, scale, zero = transcribed(x, fmt)
    quantizer = lb.Quantizer(format=fmt, zero_point=True)
    packed = pack(quantizer, jnp.asarray(x))
    np.testing.assert_allclose(packed.scales[0], scale, rtol=1e-6)
    np.testing.assert_array_equal(packed.zeros, zero - fmt.low)
    np.testing.assert_allclose(fakely(quantizer, jnp.asarray(x)), near, rtol=1e-5, atol=1e-6 * scale.max())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_errs_by_half_a_step_and_less_than_a_symmetric_grid(bits):
    fmt, x = formats.get(f"int{bits}"), jnp.asarray(uneven(1)) + 2  # most of a symmetric grid would stay empty
    quantizer = lb.Quantizer(format=fmt, zero_point=True)
    error = jnp.abs(fakely(quantizer, x) - x)
    assert jnp.all(error <= pack(quantizer, x).scales[0] * (0.5 + 0.5 + 1e-4))  # the ends move by half a step
    plain = jnp.abs(fakely(dataclasses.replace(quantizer, zero_point=False), x) - x)
    assert jnp.mean(error**2) < 0.6 * jnp.mean(plain**2)


@pytest.mark.parametrize("scale_format", [scaling.FLOAT32, scaling.BFLOAT16, scaling.CastScale("float8_e4m3fn")])
@pytest.mark.parametrize("fit", [scaling.absmax, scaling.CandidateSearch()])
def test_zero_is_a_value_and_packing_exact_whatever_the_fit_and_the_scale(fit, scale_format):
    quantizer = dataclasses.replace(UINT4, fit=fit, scale_format=scale_format)
    x = jnp.asarray(uneven(2)).at[:, ::5].set(0)
    near, packed = fakely(quantizer, x), pack(quantizer, x)
    packed.validate()
    assert jnp.all(near[:, ::5] == 0)
    np.testing.assert_array_equal(unpack(packed), near)


def test_tiles_of_zeros_of_one_value_and_not_finite_ones():
    x = jnp.asarray(uneven(3, (8, 32))).at[0].set(0).at[1].set(5).at[2].set(-5).at[3, 4].set(jnp.nan)
    x = x.at[4, 5].set(jnp.inf).at[5, 6].set(-jnp.inf).at[6].set(3e38).at[6, 0].set(-3e38)
    near = np.asarray(fakely(lb.Quantizer(format=formats.UINT4, zero_point=True), x))
    assert np.all(near[0] == 0)
    np.testing.assert_allclose(near[1:3], x[1:3], rtol=1e-6)
    assert np.all(np.isnan(near[3:6]))
    assert np.all(np.isfinite(near[6:]))


@pytest.mark.parametrize("estimator", [estimators.ClippedStraightThrough(), estimators.Trust()], ids=str)
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_the_gradient_passes_where_nothing_is_clipped(estimator, offset):
    """A whole zero point moves the ends of a tile up to half a step beyond the grid: they are rounded, not clipped."""
    x = jnp.asarray(uneven(4, (32, 32))) + offset
    gradient = lambda q: jax.jit(jax.grad(lambda x: jnp.sum(q(x) * 2)))(x)
    quantizer = lb.Quantizer(format=formats.UINT3, zero_point=True, estimator=estimator)
    assert jnp.all(gradient(quantizer) == 2)
    narrow = gradient(dataclasses.replace(quantizer, fit=scaling.CandidateSearch((0.5,))))
    assert 0.05 < jnp.mean(narrow == 0) < 0.6


@pytest.mark.parametrize("draw", ["uniform", "exponential", "normal"])
def test_a_search_never_errs_more_than_its_first_candidate(draw):
    random = np.random.default_rng(14)
    x = jnp.asarray(getattr(random, draw)(size=(64, 64)) + (5 if draw == "uniform" else 0), jnp.float32)
    absmax = lb.Quantizer(format=formats.INT4, zero_point=True)
    error = lambda q: np.sum((np.asarray(fakely(q, x)) - np.asarray(x)) ** 2, axis=1)
    plain, searched = error(absmax), error(dataclasses.replace(absmax, fit=scaling.CandidateSearch()))
    assert np.all(searched <= plain * (1 + 1e-5)) and searched.sum() < plain.sum()


def test_stochastic_rounding_is_right_in_the_mean(key):
    """At the ends of a tile, too, which lie inside of the grid wherever its zero is."""
    quantizer = lb.Quantizer(format=formats.INT2, zero_point=True, rounding=rounding.stochastic)
    x = jnp.asarray(np.linspace(-0.4, 1.1, 16, dtype=np.float32))[None] + jnp.linspace(0, 0.4, 5)[:, None]
    draws = jax.jit(jax.vmap(lambda k: quantizer(x, key=k)))(jax.random.split(key, 4000))
    np.testing.assert_allclose(draws.mean(0), x, atol=4.5 * 0.75 / 2 / 4000**0.5)  # steps of up to .75


def test_storage_counts_a_byte_a_tile_and_survives_files_and_trees():
    packed = pack(UINT4, jnp.asarray(uneven(5, (8, 64))))
    assert packed.nbytes == 8 * 64 // 2 + 16 * 4 + 16
    assert "zero_point" in packed.meaning()
    again = serialization.from_bytes(jax.tree.map(jnp.zeros_like, packed), serialization.to_bytes(packed))
    for tree in (again, jax.tree.map(lambda leaf: leaf, packed), jax.jit(lambda p: p)(packed.sealed())):
        np.testing.assert_array_equal(unpack(tree), unpack(packed))
    halves = jax.tree.map(lambda leaf: leaf[:4], packed)
    np.testing.assert_array_equal(unpack(halves), unpack(packed)[:4])


def test_files_with_and_without_them_are_not_taken_for_each_other():
    x = jnp.asarray(uneven(5, (8, 64)))
    with_zeros, without = pack(UINT4, x), pack(dataclasses.replace(UINT4, zero_point=False), x)
    for template, other in ((with_zeros, without), (without, with_zeros)):
        with pytest.raises(ValueError, match="zero_point"):
            serialization.from_bytes({"w": template}, serialization.to_bytes({"w": other}))


def test_without_zero_points_a_tree_has_no_place_for_them():
    plain = pack(dataclasses.replace(UINT4, zero_point=False), jnp.ones((2, 64)))
    assert len(jax.tree.leaves(plain)) == 2 and len(jax.tree.leaves(pack(UINT4, jnp.ones((2, 64))))) == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda zeros: None, "there are none"),
        (lambda zeros: zeros.astype(jnp.int32), "int32"),
        (lambda zeros: zeros[:1], r"\[1, 2, 1\]"),
        (lambda zeros: zeros.at[1, 0].set(16), "code 16"),
    ],
)
def test_damaged_zero_points_are_told(damage, message):
    packed = pack(UINT4, jnp.asarray(uneven(6, (2, 64))))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(packed, zeros=damage(packed.zeros)).validate()


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (dict(format=formats.MIDRISE4), "not integers"),
        (dict(format=formats.E4M3), "not integers"),
        (dict(fit=scaling.rms_optimal), "rms_optimal"),
        (dict(fit=scaling.mean_abs), "mean_abs"),
        (dict(fit=scaling.Percentile(99)), "CandidateSearch"),
        (dict(rounding=rounding.toward_zero), "toward_zero"),
        (dict(fit=scaling.Learned(), estimator=estimators.LSQ()), "learned"),
        (dict(sparsity=lb.sparsity.NofM(2, 4)), "support"),
        (dict(scale_format=scaling.PowerOfTwo()), "CastScale"),
    ],
    ids=["mid-rise", "float", "rms", "mean", "percentile", "toward zero", "learned", "sparse", "e8m0"],
)
def test_refuses_what_has_no_place_for_them(slots, message):
    with pytest.raises(ValueError, match=message):
        lb.Quantizer(zero_point=True, **slots)


def test_refuses_words_and_steps_on_the_grid():
    with pytest.raises(TypeError, match="zero_point=3"):
        lb.Quantizer(zero_point=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="zero points"):
        stochastic_rounding(optax.sgd(0.1), UINT4, key=jax.random.key(0))
    with pytest.raises(ValueError, match="zero_points='rows'"):
        lb.methods.get("absmax_integer", zero_points="rows")
    with pytest.raises(ValueError, match="activations stay"):
        lb.methods.get("absmax_integer", activations=False, zero_points="both")


def operands(dtype=jnp.float32, k=128, n=24):
    x = jnp.asarray(uneven(7, (5, k)), dtype)
    return x, jnp.asarray(uneven(8, (n, k)).T)


@pytest.mark.parametrize("bits, which", [(2, "weights"), (4, "activations"), (4, "both"), (8, "both")])
def test_products_and_their_gradients(bits, which):
    """Straight-through: y = x_hat w_hat, dx = g w_hat^T, dw = x_hat^T g, all from the transcription."""
    recipe = lb.methods.get("absmax_integer", bits=bits, zero_points=which)
    x, w = operands()
    fmt = formats.get(f"int{bits}")
    symmetric = lambda a: np.asarray(fakely(lb.Quantizer(format=fmt), jnp.asarray(a)), np.float64)
    x_hat = transcribed(x, fmt)[0] if which != "weights" else symmetric(x)
    w_hat = (transcribed(w.T, fmt)[0] if which != "activations" else symmetric(w.T)).T
    g = np.random.default_rng(9).standard_normal((5, w.shape[1]))

    @jax.jit
    def run(x, w, g):
        y, back = jax.vjp(lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=recipe), x, w)
        return y, *back(g)

    expected = x_hat @ w_hat, g @ w_hat.T, x_hat.T @ g
    for got, wanted in zip(run(x, w, jnp.asarray(g, jnp.float32)), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="int8 products are for x86")
@pytest.mark.parametrize("bits, which", [(4, "weights"), (7, "both"), (8, "activations")])
def test_distances_of_up_to_seven_bits_are_multiplied_as_int8(bits, which):
    recipe = lb.methods.get("absmax_integer", bits=bits, zero_points=which)
    x, w = operands()
    packed = pack_weight(recipe, w)
    for rhs in (w, packed):
        text = product.lower(recipe, x, rhs).as_text()
        assert ("xi8>" in text.split("dot_general", 1)[1].split("\n", 1)[0]) == (bits < 8)
        wanted = product(recipe.with_implementation("reference"), x, rhs)
        np.testing.assert_allclose(product(recipe, x, rhs), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("bits", "group", "dtype"),
    [(3, 32, jnp.float16), (4, None, jnp.bfloat16), (8, 64, jnp.bfloat16)],
)
def test_the_kernel_takes_them(bits, group, dtype):
    recipe = lb.methods.get("absmax_integer", bits=bits, activations=False, group=group, zero_points="weights")
    x, w = operands(dtype)
    packed = pack_weight(recipe, w)
    planes = in_planes(packed, 16, "interpret")
    planes.validate()
    np.testing.assert_array_equal(unpack(planes), unpack(packed))
    got = product(recipe, x, planes)
    wanted = np.asarray(x, np.float64) @ np.asarray(unpack(packed, jnp.float32), np.float64)
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, atol=2.0**-7 * np.abs(wanted).max())


def test_int8_activations_leave_the_kernel_and_say_why():
    recipe = lb.methods.get("absmax_integer", bits=4, zero_points="weights")
    x, w = operands(jnp.bfloat16)
    planes = in_planes(pack_weight(recipe, w), 8)
    by_xla = product(recipe, x, planes)
    wanted = np.asarray(product(recipe, x, w), np.float32)
    np.testing.assert_allclose(np.asarray(by_xla, np.float32), wanted, atol=2.0**-7 * np.abs(wanted).max())
    with pytest.raises(NotImplementedError, match="zero point"):
        lb.dot_general(x, dataclasses.replace(planes, implementation="interpret"), NUMBERS, recipe=recipe)


@pytest.mark.parametrize("layout", ["bitstream-le/1", "planes/1"])
def test_nnx_models_convert(layout):
    model = lb.quantize(nnx.Linear(64, 32, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), WEIGHTS)
    assert "zero point" in str(lb.explain(model))
    model.kernel.set_value(model.kernel.get_value() + 0.2)
    x = jnp.asarray(uneven(10, (3, 64)), jnp.bfloat16)
    packed = lb.convert(model, layout=layout)
    weight = packed.kernel.get_value()
    assert weight.zeros is not None and isinstance(weight, PlaneTensor) == (layout == "planes/1")
    run = nnx.jit(lambda m, x: m(x))
    np.testing.assert_allclose(
        np.asarray(run(packed, x), np.float32), np.asarray(run(model, x), np.float32), atol=2.0**-7 * 8
    )


def test_linen_models_convert(key):
    dense, x = lb.quantize(linen.Dense(32), WEIGHTS), jnp.asarray(uneven(11, (3, 64)))
    variables = dense.init(key, x)
    packed, packed_variables = lb.convert(dense, variables, x)
    assert packed_variables["params"]["kernel"].zeros is not None
    got = jax.jit(packed.apply)(packed_variables, x)
    np.testing.assert_allclose(got, jax.jit(dense.apply)(variables, x), atol=1e-5)


def test_unsigned_weights_need_them():
    recipe = lambda q: lb.LinearRecipe(out=lb.Gemm(rhs=q))
    layer = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    lb.quantize(layer, recipe(UINT4))
    with pytest.raises(ValueError, match="zero_point=True"):
        lb.quantize(layer, recipe(dataclasses.replace(UINT4, zero_point=False)))


def test_second_derivatives_follow_the_estimator():
    quantizer = lb.Quantizer(format=formats.INT4, zero_point=True, estimator=estimators.StraightThrough())
    x = jnp.asarray(uneven(12, (2, 16)))
    hessian_vector = jax.jit(lambda x, v: jax.jvp(jax.grad(lambda x: jnp.sum(quantizer(x) ** 3)), (x,), (v,))[1])
    v = jnp.ones_like(x)
    np.testing.assert_allclose(hessian_vector(x, v), 6 * fakely(quantizer, x), rtol=1e-5)


def test_shards_gather_to_the_whole():
    mesh, w = make_mesh(fsdp=4), jnp.asarray(uneven(13, (16, 64)))
    whole = UINT4.quantize(w)
    specs = qtensor_specs(whole, P("fsdp", None), mesh)
    assert len(specs) == len(jax.tree.leaves(whole)) and specs[-1] == P("fsdp", None, None)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("fsdp", None), out_specs=P(), check_vma=False)
    def gathered(shard):
        return gather_qtensor(UINT4.quantize(shard), "fsdp", axis=0).dequantize()

    np.testing.assert_array_equal(gathered(w), whole.dequantize())
