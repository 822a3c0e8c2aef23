"""FP8 products by XLA: chosen where a GPU has the tensor cores, the same numbers as on the quantized values."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax import formats
from lowbit_jax.methods import fp8
from lowbit_jax.ops import backend
from lowbit_jax.ops.dot_general import pack_rhs, prepare_rhs
from pallas_kernels.chips import abstract_gpu

NUMBERS = {
    "matrix": ((32, 64), (64, 48), (((1,), (0,)), ((), ()))),
    "tokens": ((2, 16, 64), (64, 48), (((2,), (0,)), ((), ()))),
    "heads": ((32, 64), (64, 3, 16), (((1,), (0,)), ((), ()))),
    "weight transposed": ((32, 64), (48, 64), (((1,), (1,)), ((), ()))),
    "two contractions": ((32, 4, 16), (4, 16, 48), (((1, 2), (0, 1)), ((), ()))),
    "experts": ((3, 16, 64), (3, 64, 32), (((2,), (1,)), ((0,), (0,)))),
}


def alike(**slots) -> lb.LinearRecipe:
    """Both forward operands by row of the same quantizer, a high-precision backward."""
    quantizer = dataclasses.replace(fp8("row").out.lhs, **slots)
    return lb.LinearRecipe(out=lb.Gemm(lhs=quantizer, rhs=quantizer))


METHODS = {
    "tensor": (fp8(), 3),
    "tensor, powers of two": (fp8(power_of_two=True), 3),
    "tensor, no weight gradient": (fp8(weight_gradient=False), 2),
    "row": (fp8("row"), 3),
    "row, no weight gradient": (fp8("row", weight_gradient=False), 2),
    "forward": (alike(), 1),
    "forward, rotated": (alike(rotation=lb.Hadamard()), 1),
}


@pytest.fixture
def tensor_cores(monkeypatch):
    """XLA's CPU backend multiplies FP8 too, slowly."""
    monkeypatch.setattr(backend, "has_fp8", lambda: True)


def operands(key, layout: str, dtype=jnp.float32):
    lhs, rhs, numbers = NUMBERS[layout]
    keys = jax.random.split(key)
    return jax.random.normal(keys[0], lhs, dtype), jax.random.normal(keys[1], rhs), numbers


def with_gradients(numbers, recipe):
    """The product and both cotangents of the sum of its squares, jitted anew: what `tensor_cores` says is not a part of
    the cache's key."""

    def run(lhs, rhs):
        y, back = jax.vjp(lambda lhs, rhs: lb.dot_general(lhs, rhs, numbers, "highest", recipe=recipe), lhs, rhs)
        return y, *back(y)

    return jax.jit(run)


def fp8_products(text: str) -> int:
    return len(re.findall(r"dot_general .*\(tensor<[\dx]*f8E\dM\d\w*>, tensor<[\dx]*f8E\dM\d\w*>\)", text))


@pytest.mark.parametrize(("method", "layout"), [
    *(("tensor", layout) for layout in NUMBERS), *(("row", layout) for layout in ("heads", "experts")),
    *((method, "tokens") for method in METHODS if method != "tensor"),
])  # fmt: skip
def test_the_same_numbers_as_on_the_values(key, tensor_cores, layout, method):
    """The operands' codes are equal; sums differ in float32 rounding, and by it, at a tie, one code of a cotangent."""
    lhs, rhs, numbers = operands(key, layout)
    recipe, count = METHODS[method]
    assert fp8_products(with_gradients(numbers, recipe).lower(lhs, rhs).as_text()) == count
    found = with_gradients(numbers, recipe)(lhs, rhs)
    expected = with_gradients(numbers, recipe.with_implementation("reference"))(lhs, rhs)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-6 * np.abs(expected[0]).max())
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=3e-2 * np.abs(b).max())
        assert np.mean(np.abs(a - b)) < 2e-5 * np.abs(b).max()


def test_bfloat16_against_float64(key, tensor_cores):
    """Closer to the exact product of the quantized operands than one that rounds their values to bfloat16 first."""
    lhs, rhs, numbers = operands(key, "matrix", jnp.bfloat16)
    recipe = fp8("row")
    y, dlhs, drhs = with_gradients(numbers, recipe)(lhs, rhs)
    assert (y.dtype, dlhs.dtype, drhs.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    values = lambda x, axis: np.asarray(recipe.out.lhs(x.astype(jnp.float32), axis=axis), np.float64)
    exact = values(lhs, 1) @ values(rhs, 0)
    error = np.abs(np.asarray(y, np.float64) - exact)
    assert error.max() <= 2**-8 * np.abs(exact).max()
    by_values = with_gradients(numbers, recipe.with_implementation("reference"))(lhs, rhs)[0]
    assert error.mean() <= np.abs(np.asarray(by_values, np.float64) - exact).mean()
    g = y.astype(jnp.float32)
    np.testing.assert_allclose(drhs, values(lhs, 0).T @ values(g, 0), atol=2**-8 * np.abs(drhs).max())


@pytest.mark.parametrize(("chip", "count"), [("sm_80", 0), ("sm_89", 3), ("sm_90", 3), ("sm_100", 3)])
def test_where_the_gpu_has_them(key, chip, count):
    lhs, rhs, numbers = operands(key, "tokens", jnp.bfloat16)
    traced = jax.ShapeDtypeStruct(lhs.shape, lhs.dtype), jax.ShapeDtypeStruct(rhs.shape, rhs.dtype)
    with abstract_gpu(chip):
        lowered = with_gradients(numbers, fp8()).trace(*traced).lower(lowering_platforms=("cuda",))
    assert fp8_products(lowered.as_text()) == count


def test_not_on_a_cpu(key):
    lhs, rhs, numbers = operands(key, "matrix")
    assert fp8_products(with_gradients(numbers, fp8()).lower(lhs, rhs).as_text()) == 0


@pytest.mark.parametrize(("shapes", "recipe"), [
    (((32, 64), (64, 40)), fp8()),  # 40 columns
    (((8, 64), (64, 48)), fp8()),  # 8 rows
    (((32, 24), (24, 48)), fp8()),  # sums of 24
    (((128, 128), (128, 128)), fp8("block")),  # scales vary inside the sum
    (((32, 64), (64, 48)), alike(format=formats.E5M2)),
    (((32, 64), (64, 48)), alike(format=formats.get("e3m4"))),
    (((32, 64), (64, 48)), fp8().with_implementation("reference")),
])  # fmt: skip
def test_what_stays_on_values(tensor_cores, shapes, recipe):
    lowered = with_gradients(NUMBERS["matrix"][2], recipe).lower(*map(jnp.ones, shapes))
    assert fp8_products(lowered.as_text()) == 0


def test_not_finite_values_stay_in_their_rows(key, tensor_cores):
    lhs, rhs, numbers = operands(key, "matrix")
    y = with_gradients(numbers, fp8("row"))(lhs.at[3, 5].set(jnp.nan).at[7, 0].set(jnp.inf), rhs)[0]
    bad = np.isnan(np.asarray(y)).all(1)
    assert bad[[3, 7]].all() and np.isfinite(np.asarray(y)[~bad]).all() and bad.sum() == 2


def test_what_is_kept_has_one_byte_an_element(key, tensor_cores):
    """The codes of both operands, instead of their values in bfloat16; no mask, as nothing is clipped."""
    x, w, numbers = operands(key, "matrix", jnp.bfloat16)
    _, back = jax.vjp(lambda x, w: lb.dot_general(x, w, numbers, recipe=fp8()), x, w)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(back))
    assert kept < 1.05 * (x.size + w.size)


def test_a_weight_that_came_quantized(key, tensor_cores):
    lhs, rhs, numbers = operands(key, "tokens")
    ready, back = jax.vjp(lambda rhs: prepare_rhs(rhs, numbers, fp8()), rhs)
    run = with_gradients(numbers, fp8().with_rhs_ready())
    assert fp8_products(run.lower(lhs, ready).as_text()) == 3
    y, dlhs, dready = run(lhs, ready)
    for a, b in zip((y, dlhs, *back(dready)), with_gradients(numbers, fp8())(lhs, rhs), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-2 * np.abs(b).max())
        assert np.mean(np.abs(a - b)) < 2e-5 * np.abs(b).max()


def test_no_second_derivative(key, tensor_cores):
    """The codes carry no tangent: an error, not a silent zero."""
    lhs, rhs, numbers = operands(key, "matrix")
    loss = lambda x: (lb.dot_general(x, rhs, numbers, recipe=fp8()) ** 2).sum()
    with pytest.raises(NotImplementedError, match="second derivative"):
        jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())(lhs)


def test_over_a_mesh(key, tensor_cores):
    """XLA cuts the product, the activation over data, the weight over its outputs; a scale is of all parts."""
    lhs, rhs, numbers = operands(key, "tokens")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    put = lambda x, *spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
    run = with_gradients(numbers, fp8())
    for a, b in zip(run(put(lhs, "data"), put(rhs, None, "tensor")), run(lhs, rhs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("axis", [0, 1])
def test_packed_weights(key, tensor_cores, axis):
    x, w = jax.random.normal(key, (32, 64)), jax.random.normal(key, (64, 48) if axis == 0 else (48, 64))
    numbers, recipe = (((1,), (axis,)), ((), ())), fp8("row")
    packed = pack_rhs(w, numbers, recipe)
    run = jax.jit(jax.value_and_grad(lambda x, w: (lb.dot_general(x, w, numbers, recipe=recipe) ** 2).sum()))
    assert fp8_products(run.lower(x, packed).as_text()) >= 1
    np.testing.assert_allclose(run(x, packed)[0], run(x, w)[0], rtol=2e-5)


def test_a_model_trains_alike(key, tensor_cores):
    """Twenty steps of a small MLP, in FP8 products and on the quantized values."""
    x, y = jax.random.normal(key, (32, 32)), jax.random.normal(key, (32, 16))

    def losses(recipe):
        model = lb.quantize(
            nnx.Sequential(nnx.Linear(32, 64, rngs=nnx.Rngs(0)), nnx.silu, nnx.Linear(64, 16, rngs=nnx.Rngs(1))), recipe
        )
        graph, params = nnx.split(model)
        loss = lambda p: ((nnx.merge(graph, p)(x) - y) ** 2).mean()
        step = jax.jit(lambda p: (loss(p), jax.tree.map(lambda w, g: w - 0.3 * g, p, jax.grad(loss)(p))))
        found = []
        for _ in range(20):
            value, params = step(params)
            found.append(float(value))
        return found

    found, expected = losses(fp8()), losses(fp8().with_implementation("reference"))
    assert found[-1] < 0.6 * found[0]
    np.testing.assert_allclose(found, expected, rtol=2e-2)
