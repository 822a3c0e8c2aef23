"""Products of grid values as int8: against float64, against the same recipe in float32, and what the program holds."""

import dataclasses
import functools
import platform
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.ops import int8
from lowbit_jax.ops.dot_general import pack_rhs, prepare_rhs
from lowbit_jax.sparsity import NofM

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or jax.default_backend() != "cpu",
    reason="int8 products by XLA are for x86 CPUs",
)


SHORTEST = int8._SHORTEST


@pytest.fixture(autouse=True)
def also_short_sums(monkeypatch):
    """Sums of backward products are short here, and would stay in float32."""
    monkeypatch.setattr(int8, "_SHORTEST", 4)


FORMATS = [*(f"midrise{b}" for b in range(1, 9)), "int2", "int4", "int8", "ternary", "e2m1", "e2m3"]
FEW_FORMATS = ["midrise1", "midrise4", "midrise8", "int8", "ternary", "e2m1", "e2m3"]
NUMBERS = {
    "matrix": ((12, 64), (64, 10), (((1,), (0,)), ((), ()))),
    "tokens": ((2, 6, 64), (64, 10), (((2,), (0,)), ((), ()))),
    "heads": ((12, 64), (64, 3, 2, 4), (((1,), (0,)), ((), ()))),
    "weight transposed": ((12, 64), (10, 64), (((1,), (1,)), ((), ()))),
    "weight's middle": ((12, 64), (5, 64, 2), (((1,), (1,)), ((), ()))),
    "activation's middle": ((3, 64, 4), (64, 10), (((1,), (0,)), ((), ()))),
    "two contractions": ((12, 4, 16), (4, 16, 10), (((1, 2), (0, 1)), ((), ()))),
    "experts": ((3, 4, 64), (3, 64, 10), (((2,), (1,)), ((0,), (0,)))),
    "experts inside": ((4, 3, 64), (64, 3, 10), (((2,), (0,)), ((1,), (1,)))),
    "one row": ((1, 64), (64, 10), (((1,), (0,)), ((), ()))),
    "a vector": ((64,), (64, 10), (((0,), (0,)), ((), ()))),
}


def recipe_of(fmt: str, **changes) -> lb.LinearRecipe:
    quantizer = lb.methods.quest_quantizer(format=lb.formats.get(fmt), block=16)
    return lb.LinearRecipe(out=lb.Gemm(lhs=quantizer, rhs=quantizer), **changes)


def operands(key, layout: str):
    lhs, rhs, numbers = NUMBERS[layout]
    keys = jax.random.split(key)
    return jax.random.normal(keys[0], lhs), jax.random.normal(keys[1], rhs), numbers


@functools.partial(jax.jit, static_argnames=("numbers", "recipe"))
def with_gradients(lhs, rhs, numbers, recipe):
    """The product and both cotangents of the sum of its squares."""
    product = lambda lhs, rhs: lb.dot_general(lhs, rhs, numbers, "highest", recipe=recipe)
    y, back = jax.vjp(product, lhs, rhs)
    return y, *back(y)


def program(lhs, rhs, numbers, recipe) -> str:
    return with_gradients.lower(lhs, rhs, numbers, recipe).as_text()


def int8_products(text: str) -> int:
    return len(re.findall(r"dot_general .*\(tensor<[\dx]*i8>, tensor<[\dx]*i8>\)", text))


@pytest.mark.parametrize("fmt", FEW_FORMATS)
def test_each_grid_against_float64(key, fmt):
    """y = sum x_hat w_hat in float64 from the fake-quantized operands, to the rounding of the scales' products."""
    lhs, rhs, numbers = operands(key, "matrix")
    recipe = recipe_of(fmt)
    y, dlhs, drhs = with_gradients(lhs, rhs, numbers, recipe)
    assert int8_products(program(lhs, rhs, numbers, recipe)) >= 1
    quantizer = recipe.out.lhs
    x_hat = np.asarray(quantizer.in_rotated_space(lhs), np.float64)
    w_hat = np.asarray(quantizer.in_rotated_space(rhs, axis=0), np.float64)
    exact = x_hat @ w_hat
    np.testing.assert_allclose(y, exact, atol=4e-7 * (np.abs(x_hat) @ np.abs(w_hat)).max())
    expected = with_gradients(lhs, rhs, numbers, recipe.with_implementation("reference"))
    for found, wanted in zip((dlhs, drhs), expected[1:], strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(("layout", "fmt"), [
    *((layout, "midrise4") for layout in NUMBERS),
    *((layout, "midrise8") for layout in ("matrix", "activation's middle", "experts inside", "one row", "a vector")),
])  # fmt: skip
def test_each_layout_as_in_float32(key, layout, fmt):
    lhs, rhs, numbers = operands(key, layout)
    recipe = recipe_of(fmt)
    found = with_gradients(lhs, rhs, numbers, recipe)
    expected = with_gradients(lhs, rhs, numbers, recipe.with_implementation("reference"))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize(("layout", "fmt"), [
    *((layout, "midrise4") for layout in ("matrix", "tokens", "heads", "experts", "experts inside")),
    ("tokens", "midrise8"), ("experts inside", "midrise8"),
])  # fmt: skip
def test_int8_backward_products_are_those_of_float32(key, layout, fmt):
    """`lb.quest(4, backward=8)`: the same codes, multiplied as integers."""
    lhs, rhs, numbers = operands(key, layout)
    base = lb.quest(4, backward=8)
    quantizer = lb.methods.quest_quantizer(format=lb.formats.get(fmt), block=16)
    recipe = dataclasses.replace(base, out=lb.Gemm(lhs=quantizer, rhs=quantizer))
    assert int8_products(program(lhs, rhs, numbers, recipe)) >= 3
    found = with_gradients(lhs, rhs, numbers, recipe)
    expected = with_gradients(lhs, rhs, numbers, recipe.with_implementation("reference"))
    for a, b in zip(found, expected, strict=True):
        # y differs in its last bits, and with it, at a tie, a code of the cotangent: one part in 127 of one term
        np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max())
        assert np.mean(np.abs(a - b)) < 2e-4 * np.abs(b).max()


@pytest.mark.parametrize(("layout", "fmt", "backward"), [
    *((layout, "midrise4", None) for layout in NUMBERS if layout not in ("one row", "a vector")),
    *(("tokens", fmt, 8) for fmt in ("midrise1", "midrise8", "int8", "ternary", "e2m1")),
])  # fmt: skip
def test_a_weight_that_came_quantized_is_multiplied_as_int8(key, layout, fmt, backward):
    """Its codes are its values over its scales: the product and the gradients of one that is quantized inside."""
    lhs, rhs, numbers = operands(key, layout)
    quantizer = lb.methods.quest_quantizer(format=lb.formats.get(fmt), block=16)
    recipe = dataclasses.replace(lb.quest(4, backward=backward), out=lb.Gemm(lhs=quantizer, rhs=quantizer))
    prepare = jax.jit(lambda rhs: prepare_rhs(rhs, numbers, recipe))
    product = lambda lhs, ready: lb.dot_general(lhs, ready, numbers, "highest", recipe=recipe.with_rhs_ready())

    @jax.jit
    def once(lhs, rhs):
        ready, through = jax.vjp(prepare, rhs)
        y, back = jax.vjp(product, lhs, ready)
        dlhs, dready = back(y)
        return y, dlhs, *through(dready)

    assert int8_products(jax.jit(product).lower(lhs, prepare(rhs)).as_text()) >= 1
    for a, b in zip(once(lhs, rhs), with_gradients(lhs, rhs, numbers, recipe), strict=True):
        np.testing.assert_allclose(a, b, atol=(2e-2 if backward else 2e-5) * np.abs(b).max())


def test_a_prepared_weight_is_not_taken_for_the_original(key):
    lhs, rhs, numbers = operands(key, "matrix")
    out = lb.Gemm(lhs=lb.Quantizer(), rhs=lb.Quantizer())
    recipe = lb.LinearRecipe(out=out, grad_lhs=lb.Gemm(), grad_rhs=lb.Gemm())
    with pytest.raises(ValueError, match="wants the original weight"):
        lb.dot_general(lhs, prepare_rhs(rhs, numbers, recipe), numbers, recipe=recipe.with_rhs_ready())


def test_a_prepared_weight_is_not_quantized_again(key):
    lhs, rhs, numbers = operands(key, "matrix")
    with pytest.raises(ValueError, match="would quantize it again"):
        lb.dot_general(lhs, prepare_rhs(rhs, numbers, lb.quest(4)), numbers, recipe=lb.quest(4))


def test_a_cotangent_rounds_stochastically_alike(key):
    """The same draws, multiplied as int8 or as values."""
    lhs, rhs, numbers = operands(key, "tokens")
    base = lb.methods.switchback()
    noisy = dataclasses.replace(base.grad_lhs.lhs, rounding=lb.rounding.stochastic)
    recipe = dataclasses.replace(base, grad_lhs=lb.Gemm(lhs=noisy, rhs=lb.FORWARD))
    loss = lambda lhs, recipe: (lb.dot_general(lhs, rhs, numbers, recipe=recipe, key=key) * 0.37).sum()
    run = jax.jit(jax.grad(loss), static_argnums=1)
    assert int8_products(run.lower(lhs, recipe).as_text()) >= 1
    np.testing.assert_allclose(run(lhs, recipe), run(lhs, recipe.with_implementation("reference")), atol=1e-4)


def test_which_weights_bring_their_scales():
    """Not those of groups, of learned scales, of a rotation that is undone."""
    w = jax.random.normal(jax.random.key(0), (64, 10))
    scale_of = lambda recipe: (
        prepare_rhs(w, NUMBERS["matrix"][2], recipe, scale=recipe.learned and jnp.ones(()) or None).scale
    )
    for recipe in (lb.quest(4), lb.quest(4, sparsity="2:4"), lb.methods.fp8(), lb.methods.switchback()):
        assert scale_of(recipe) is not None
    for recipe in (lb.quest(4, activations=False), lb.methods.lsq(4), lb.methods.nf4(), lb.LinearRecipe()):
        assert scale_of(recipe) is None


@pytest.mark.parametrize("layout", ["matrix", "tokens", "weight transposed", "two contractions", "experts"])
def test_a_weight_of_one_scale_meets_the_cotangent_as_int8(key, layout):
    """SwitchBack: its codes serve the output and the activation's gradient; the weight's gradient reads the
    activation itself."""
    lhs, rhs, numbers = operands(key, layout)
    recipe = lb.methods.switchback()
    assert int8_products(program(lhs, rhs, numbers, recipe)) == 2
    found = with_gradients(lhs, rhs, numbers, recipe)
    expected = with_gradients(lhs, rhs, numbers, recipe.with_implementation("reference"))
    for a, b in zip(found, expected, strict=True):
        # as above; a code of the cotangent is one part in 127
        np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max())
        assert np.mean(np.abs(a - b)) < 2e-4 * np.abs(b).max()


@pytest.mark.parametrize(("rows", "bits", "axis"), [(1, 4, 0), (12, 4, 1), (12, 1, 0), (1, 8, 1), (12, 8, 0)])
def test_packed_weights(key, rows, bits, axis):
    x, w = jax.random.normal(key, (rows, 64)), jax.random.normal(key, (64, 10) if axis == 0 else (10, 64))
    numbers = (((1,), (axis,)), ((), ()))
    recipe = lb.quest(bits, block=16)
    packed = pack_rhs(w, numbers, recipe)
    run = jax.jit(jax.value_and_grad(lambda x, w: (lb.dot_general(x, w, numbers, recipe=recipe) ** 2).sum()))
    assert int8_products(run.lower(x, packed).as_text()) >= 1
    (found, dx), (expected, wanted) = run(x, packed), run(x, w)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    np.testing.assert_allclose(dx, wanted, atol=2e-5 * np.abs(wanted).max())


def noisy(u, fmt, key=None):
    """A user's rounding whose answers are off the grid."""
    return jnp.clip(u + 0.25, fmt.min_finite, fmt.max_finite)


@dataclasses.dataclass(frozen=True)
class Turned:
    """A user's rotation."""

    def apply(self, x, axis):
        return jnp.flip(x, axis).astype(jnp.float32)

    undo = apply

    def describe(self, length=None):
        return "turned"


def of_users_parts(**parts) -> lb.LinearRecipe:
    quantizer = lb.Quantizer(**parts)
    return lb.LinearRecipe(out=lb.Gemm(lhs=quantizer, rhs=quantizer))


@pytest.mark.parametrize("make", [
    lambda: lb.quest(4).with_implementation("reference"),
    lambda: lb.quest(4, activations=False),
    lambda: lb.quest(8, sparsity="2:4"),  # a zero off the support is no 8-bit mid-rise level
    lambda: lb.methods.lsq(4),
    lambda: of_users_parts(rounding=noisy),
    lambda: of_users_parts(rotation=Turned()),
    lambda: lb.LinearRecipe(out=lb.Gemm(lhs=lb.Quantizer(format=lb.formats.get("nf4")), rhs=lb.Quantizer())),
    lambda: lb.LinearRecipe(out=lb.Gemm(lhs=lb.Quantizer(tiling=lb.scaling.Group(32)), rhs=lb.Quantizer())),
    lambda: lb.LinearRecipe(out=lb.Gemm(lhs=lb.Quantizer(rotation=lb.Hadamard()), rhs=lb.Quantizer())),
])  # fmt: skip
def test_what_stays_in_float32(key, make):
    lhs, rhs, numbers = operands(key, "matrix")
    recipe = make()
    scales = {side: jnp.ones(()) for side in recipe.learned}
    run = jax.jit(lambda lhs, rhs: lb.dot_general(lhs, rhs, numbers, recipe=recipe, scales=scales))
    assert int8_products(run.lower(lhs, rhs).as_text()) == 0


def test_a_contraction_that_could_overflow_stays_in_float32(key):
    """134,000 products of 127 by 127 exceed 2^31; of 1-bit levels they do not."""
    x = jax.ShapeDtypeStruct((2, 134_000), jnp.float32)
    w = jax.ShapeDtypeStruct((134_000, 2), jnp.float32)
    count = lambda recipe: int8_products(
        jax.jit(lambda x, w: lb.dot_general(x, w, NUMBERS["matrix"][2], recipe=recipe)).lower(x, w).as_text()
    )
    absmax = lb.LinearRecipe(out=lb.Gemm(lhs=lb.Quantizer(), rhs=lb.Quantizer()))
    assert count(absmax) == 0 and count(lb.quest(1)) >= 1


@pytest.mark.parametrize(("length", "count"), [(32, 0), (64, 1)])
def test_short_sums_stay_in_float32(monkeypatch, length, count):
    monkeypatch.setattr(int8, "_SHORTEST", SHORTEST)
    run = jax.jit(lambda x, w: lb.dot_general(x, w, NUMBERS["matrix"][2], recipe=lb.quest(4)))
    assert int8_products(run.lower(jnp.ones((8, length)), jnp.ones((length, 8))).as_text()) == count


@pytest.mark.parametrize("method", ["quest4", "quest8", "absmax"])
@pytest.mark.parametrize("shape", [(12, 64), (64, 512)], ids=str)  # XLA drops NaN from the maximum of the larger one
def test_rows_that_are_not_finite_stay_their_own(key, method, shape):
    absmax = lb.LinearRecipe(out=lb.Gemm(lhs=lb.Quantizer(), rhs=lb.Quantizer()))
    recipe = {"quest4": lb.quest(4, block=16), "quest8": lb.quest(8, block=16), "absmax": absmax}[method]
    numbers = NUMBERS["matrix"][2]
    lhs, rhs = jax.random.normal(key, shape), jax.random.normal(key, (shape[1], 10))
    bad = lhs.at[1, 3].set(jnp.nan).at[2, 5].set(jnp.inf).at[4].set(0)
    y = np.asarray(jax.jit(lambda x, w: lb.dot_general(x, w, numbers, recipe=recipe))(bad, rhs))
    assert np.isnan(y[1]).all() and np.isnan(y[2]).all()
    np.testing.assert_array_equal(y[4], 0)
    assert np.isfinite(np.delete(y, [1, 2], axis=0)).all()


def largest_finite(tiles, fmt, axes):
    """A user's fit, which does not see NaN."""
    finite = jnp.where(jnp.isnan(tiles), 0.0, jnp.abs(tiles))
    return jnp.max(finite, axis=axes, keepdims=True) / fmt.max_finite


@pytest.mark.parametrize("base", [None, lb.scaling.CandidateSearch(base=largest_finite)], ids=["own", "searched"])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_nan_that_a_fit_of_the_users_own_does_not_see(key, implementation, base):
    lhs, rhs, numbers = operands(key, "matrix")
    quantizer = lb.Quantizer(fit=base or largest_finite)
    recipe = lb.LinearRecipe(out=lb.Gemm(lhs=quantizer, rhs=quantizer), implementation=implementation)
    y, dlhs, drhs = with_gradients(lhs.at[1, 3].set(jnp.nan), rhs, numbers, recipe)
    assert np.isnan(y[1]).all() and np.isfinite(np.delete(y, 1, axis=0)).all()
    assert np.isnan(drhs).mean() > 0.5  # the others lie a rounding above the grid, where no gradient passes
    packed = pack_rhs(rhs.at[3, 2].set(jnp.nan), numbers, recipe)
    y = np.asarray(lb.dot_general(lhs, packed, numbers, recipe=recipe))
    assert np.isnan(y[:, 2]).all() and np.isfinite(np.delete(y, 2, axis=1)).all()


def test_a_sparse_cotangent_off_the_integers(key):
    """8-bit mid-rise codes of a cotangent with a support: its zeros are no level, so these stay in float32."""
    lhs, rhs, numbers = jax.random.normal(key, (12, 64)), jax.random.normal(key, (64, 64)), NUMBERS["matrix"][2]
    base = lb.quest(4, block=16)
    sparse = lb.Quantizer(format=lb.formats.get("midrise8"), sparsity=NofM(2, 4))
    folded = dict(grad_lhs=lb.Gemm(lhs=sparse, rhs=lb.FORWARD, fold=True))
    recipe = dataclasses.replace(base, **folded)
    found = with_gradients(lhs, rhs, numbers, recipe)
    expected = with_gradients(lhs, rhs, numbers, recipe.with_implementation("reference"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def test_a_large_activation_meets_a_small_weight():
    """The sum of codes is 10^6: times the activation's scale alone it would overflow."""
    recipe = lb.LinearRecipe(out=lb.Gemm(lhs=lb.Quantizer(), rhs=lb.Quantizer()))
    x, w = jnp.full((4, 64), 2.0**118), jnp.full((64, 4), 2.0**-118)
    np.testing.assert_allclose(with_gradients(x, w, NUMBERS["matrix"][2], recipe)[0], 64.0, rtol=1e-6)


def test_small_operands_keep_their_product(key):
    """Scales of 10^-19 and 10^-20: their product underflows, times a sum of codes it does not."""
    lhs, rhs, numbers = operands(key, "matrix")
    lhs, rhs, recipe = lhs * 1e-17, rhs * 1e-18, lb.methods.get("absmax_integer", bits=8)
    y = with_gradients(lhs, rhs, numbers, recipe)[0]
    wanted = with_gradients(lhs, rhs, numbers, recipe.with_implementation("reference"))[0]
    np.testing.assert_allclose(y, wanted, atol=1e-3 * np.abs(wanted).max(), rtol=0)  # whose terms underflow
    assert np.abs(wanted).max() < 1e-33


def test_reference_reaches_every_product(key):
    """Quantized backward products and packed weights too, also those of a converted layer."""
    lhs, rhs, numbers = jax.random.normal(key, (64, 64)), jax.random.normal(key, (64, 64)), NUMBERS["matrix"][2]
    out = lb.Gemm(lhs=lb.Quantizer(), rhs=lb.Quantizer())
    recipe = lb.LinearRecipe(out=out, grad_lhs=out, grad_rhs=out)
    assert int8_products(program(lhs, rhs, numbers, recipe)) == 3
    assert int8_products(program(lhs, rhs, numbers, recipe.with_implementation("reference"))) == 0
    for implementation, count in (("auto", 1), ("reference", 0)):
        layer = lb.quantize(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), recipe.with_implementation(implementation))
        for layout in ("bitstream-le/1", "planes/1"):
            packed = lb.convert(layer, layout=layout)
            assert int8_products(jax.jit(lambda x, packed=packed: packed(x)).lower(lhs).as_text()) == count


def test_half_precision_operands_and_results(key):
    lhs, rhs, numbers = operands(key, "tokens")
    y, dlhs, drhs = with_gradients(lhs.astype(jnp.bfloat16), rhs, numbers, lb.quest(4, block=16))
    assert (y.dtype, dlhs.dtype, drhs.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    expected = with_gradients(
        lhs.astype(jnp.bfloat16), rhs, numbers, lb.quest(4, block=16).with_implementation("reference")
    )
    for a, b in zip((y, dlhs, drhs), expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max())


def test_under_vmap_scan_and_remat(key):
    recipe, numbers = lb.quest(4, block=16), NUMBERS["matrix"][2]
    x = jax.random.normal(key, (3, 12, 64))
    w = jax.random.normal(key, (3, 64, 64)) / 8
    layer = lambda x, w: lb.dot_general(x, w, numbers, recipe=recipe)
    reference = lambda x, w: lb.dot_general(x, w, numbers, recipe=recipe.with_implementation("reference"))

    def losses(layer):
        batched = lambda x, w: (jax.vmap(layer)(x, w) ** 2).sum()
        shared = lambda x, w: (jax.vmap(layer, in_axes=(0, None))(x, w[0]) ** 2).sum()
        stacked = lambda x, w: (jax.lax.scan(lambda x, w: (jax.checkpoint(layer)(x, w), None), x[0], w)[0] ** 2).sum()
        return [jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, w) for f in (batched, shared, stacked)]

    for found, expected in zip(jax.tree.leaves(losses(layer)), jax.tree.leaves(losses(reference)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_weight_that_examples_share_has_one_gradient(key):
    """The cotangents of 64 examples are summed before they are masked and rotated, not one by one."""
    x, w = jax.random.normal(key, (64, 128)), jax.random.normal(key, (128, 256))
    layer = lambda x, w: lb.dot_general(x, w, NUMBERS["a vector"][2], recipe=lb.quest(4))
    loss = lambda w: (jax.vmap(layer, in_axes=(0, None))(x, w) ** 2).sum()
    used = jax.jit(jax.grad(loss)).lower(w).compile().memory_analysis()
    assert used is not None and used.temp_size_in_bytes < 8 * w.nbytes


@pytest.mark.parametrize("layout", NUMBERS)
def test_the_compiled_products_are_int8(key, layout):
    """XLA upcasts what it has no fast product for to int32, which is five times slower than float32."""
    lhs, rhs, numbers = operands(key, layout)
    recipe = dataclasses.replace(lb.quest(4, backward=8), out=recipe_of("midrise4").out)
    text = with_gradients.lower(lhs, rhs, numbers, recipe).compile().as_text()
    assert not re.findall(r"s32\[[\d,]*\]\S* dot\(%\S*convert", text)


@pytest.mark.parametrize("fmt", FORMATS)
def test_integers_and_back(fmt):
    grid = lb.formats.get(fmt)
    levels = jnp.asarray(grid.levels, jnp.float32)
    integers = int8.encode(levels, grid)
    assert len(set(np.asarray(integers).tolist())) == len(grid.levels)
    np.testing.assert_array_equal(int8.decode(integers, grid), levels)


def test_formats_without_an_int8_grid():
    assert all(int8.grid(lb.formats.get(name)) is None for name in ("nf4", "e3m2", "e4m3", "uint8"))
