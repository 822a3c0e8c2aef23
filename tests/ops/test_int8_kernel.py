"""int8 products on GPUs of what XLA quantized: chosen where the kernel runs, the same numbers as on the values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from lowbit_jax.ops import backend, int8
from lowbit_jax.ops.dot_general import prepare_rhs
from pallas_kernels.chips import abstract_gpu

NUMBERS = {
    "matrix": ((130, 160), (160, 144), (((1,), (0,)), ((), ()))),
    "tokens": ((2, 80, 160), (160, 144), (((2,), (0,)), ((), ()))),
    "heads": ((130, 160), (160, 3, 48), (((1,), (0,)), ((), ()))),
    "weight transposed": ((130, 160), (144, 160), (((1,), (1,)), ((), ()))),
    "activation's middle": ((2, 160, 80), (160, 144), (((1,), (0,)), ((), ()))),
    "two contractions": ((130, 4, 40), (4, 40, 144), (((1, 2), (0, 1)), ((), ()))),
}
# products by the kernel, forward and backward
METHODS = {
    "absmax": (lb.methods.get("absmax_integer", bits=8), 1),
    "absmax, zero points": (lb.methods.get("absmax_integer", bits=4, zero_points="both"), 1),
    "switchback": (lb.methods.switchback(), 2),
    "bitnet": (lb.methods.bitnet(), 1),
    "signs": (lb.quest(4, signs=0), 1),
    "8 bits, signs": (lb.quest(8, signs=0), 1),  # mid-rise codes with an offset
    "sparse": (lb.quest(4, sparsity="2:4"), 1),
    "int8 backward": (lb.quest(4, signs=0, backward=8), 3),
}


def operands(key, layout: str, dtype=jnp.bfloat16):
    lhs, rhs, numbers = NUMBERS[layout]
    keys = jax.random.split(key)
    return jax.random.normal(keys[0], lhs, dtype), jax.random.normal(keys[1], rhs), numbers


def with_gradients(numbers, recipe):
    def run(lhs, rhs):
        y, back = jax.vjp(lambda lhs, rhs: lb.dot_general(lhs, rhs, numbers, recipe=recipe), lhs, rhs)
        return y, *back(y)

    return run


def kernels(function, *arguments) -> int:
    return str(jax.make_jaxpr(function)(*arguments)).count("pallas_call[")


@pytest.fixture
def gpu(monkeypatch):
    """Programs are traced as for a GPU, and run on the CPU by the kernel's XLA twin."""
    monkeypatch.setattr(backend, "takes_kernel", lambda *_: True)
    monkeypatch.setattr(int8, "multiplies", lambda *_: False)


@pytest.mark.parametrize(("method", "layout"), [
    *((method, "tokens") for method in METHODS), *(("switchback", layout) for layout in NUMBERS if layout != "tokens"),
])  # fmt: skip
def test_the_same_numbers_as_on_the_values(key, gpu, method, layout):
    lhs, rhs, numbers = operands(key, layout)
    recipe, count = METHODS[method]
    assert kernels(with_gradients(numbers, recipe), lhs, rhs) == count
    found = jax.jit(with_gradients(numbers, recipe))(lhs, rhs)
    expected = jax.jit(with_gradients(numbers, recipe.with_implementation("reference")))(lhs, rhs)
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max())
        assert np.mean(np.abs(a - b)) < 2e-3 * np.abs(b).max()


def test_float32_to_the_rounding_of_sums(key, gpu):
    lhs, rhs, numbers = operands(key, "heads", jnp.float32)
    for method in ("absmax", "8 bits, signs"):
        recipe = METHODS[method][0]
        found = jax.jit(with_gradients(numbers, recipe))(lhs, rhs)
        expected = jax.jit(with_gradients(numbers, recipe.with_implementation("reference")))(lhs, rhs)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_a_prepared_weight(key, gpu):
    lhs, rhs, numbers = operands(key, "tokens")
    recipe = METHODS["absmax"][0]
    run = with_gradients(numbers, recipe.with_rhs_ready())
    ready = prepare_rhs(rhs, numbers, recipe)
    assert kernels(run, lhs, ready) == 1
    y = jax.jit(run)(lhs, ready)[0]
    np.testing.assert_array_equal(y, jax.jit(with_gradients(numbers, recipe))(lhs, rhs)[0])


@pytest.mark.parametrize("method", ["absmax", "8 bits, signs"])
def test_the_kernel_by_name(key, method):
    """Its own steps, interpreted; without a GPU "kernel" says why not, as does what no kernel computes."""
    lhs, rhs, numbers = operands(key, "matrix")
    recipe = METHODS[method][0]
    found = jax.jit(with_gradients(numbers, recipe.with_implementation("interpret")))(lhs, rhs)
    expected = jax.jit(with_gradients(numbers, recipe.with_implementation("reference")))(lhs, rhs)
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max())
    with pytest.raises(NotImplementedError, match="need an NVIDIA GPU"):
        lb.dot_general(lhs, rhs, numbers, recipe=recipe.with_implementation("kernel"))
    with pytest.raises(NotImplementedError, match="no integer product"):
        lb.dot_general(lhs[:100], rhs, numbers, recipe=recipe.with_implementation("interpret"))


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_chosen_by_the_gpu_traced_for(key, chip):
    lhs, rhs, numbers = operands(key, "tokens")
    run = with_gradients(numbers, METHODS["switchback"][0])
    assert kernels(run, lhs, rhs) == 0
    with abstract_gpu(chip):
        assert kernels(run, lhs, rhs) == 2


@pytest.mark.parametrize(("shapes", "recipe"), [
    (((100, 64), (64, 144)), METHODS["absmax"][0]),  # few rows
    (((130, 64), (64, 144)), METHODS["absmax"][0].with_implementation("reference")),
    (((130, 64), (64, 144)), lb.methods.get("absmax_integer", bits=8, group=32)),
    (((130, 64), (64, 144)), lb.methods.lsq(4)),
])  # fmt: skip
def test_what_stays_on_values(gpu, shapes, recipe):
    scales = {side: jnp.ones(()) for side in recipe.learned}
    run = lambda x, w: lb.dot_general(x, w, NUMBERS["matrix"][2], recipe=recipe, scales=scales)
    assert kernels(run, *map(jnp.ones, shapes)) == 0


def test_explained():
    layer = lb.quantize(nnx.Linear(256, 256, rngs=nnx.Rngs(0)), METHODS["absmax"][0])
    assert "matmul_i8 on a GPU" in str(lb.explain(layer))
    grouped = dataclasses.replace(METHODS["absmax"][0].out.lhs, tiling=lb.scaling.Group(32))
    layer = lb.quantize(nnx.Linear(256, 256, rngs=nnx.Rngs(0)), lb.LinearRecipe(out=lb.Gemm(lhs=grouped, rhs=grouped)))
    assert "matmul_i8" not in str(lb.explain(layer))
