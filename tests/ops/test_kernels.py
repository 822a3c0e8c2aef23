"""Products through the kernels, interpreted, against the same products by XLA; and who is told what cannot run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import lowbit_jax as lb
from lowbit_jax.ops import pack_rhs
from lowbit_jax.ops.packed_product import word_bits
from lowbit_jax.ops.plane_tensor import to_planes
from lowbit_jax.scaling import Group

NUMBERS = (((2,), (0,)), ((), ()))
GROUPED = lb.LinearRecipe(out=lb.Gemm(rhs=lb.Quantizer(tiling=Group(64), format=lb.formats.get("int4"))))
RECIPES = {
    "quest W1A1": lb.quest(1),
    "quest W4A4": lb.quest(4),
    "quest W3A16": lb.quest(3, activations=False),
    "bitnet": lb.methods.get("bitnet"),
    "int4 groups": GROUPED,
}


def operands(dtype=jnp.bfloat16, k=256, free=(6, 8)):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((3, 5, k)), dtype)
    return x, jnp.asarray(random.standard_normal((k, *free)) * 0.1, jnp.float32)


def close(a, b, tolerance):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("name", RECIPES)
def test_packed_products(name):
    recipe = RECIPES[name]
    x, w = operands()
    packed = pack_rhs(w, NUMBERS, recipe)
    run = jax.jit(lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=recipe))
    expected = run(x, packed)
    for implementation in ("auto", "reference", "interpret"):
        planes = to_planes(packed, word_bits(recipe.out.lhs), implementation)
        assert planes.shape == packed.shape and planes.layout == "planes/1"
        np.testing.assert_array_equal(planes.values(), packed.values())
        y = run(x, planes)
        assert y.dtype == expected.dtype
        close(y, expected, 2.0**-6 if implementation == "interpret" else 0)  # two roundings to bfloat16


def test_gradients_through_a_packed_product_are_the_references():
    x, w = operands()
    packed = pack_rhs(w, NUMBERS, lb.quest(4))
    loss = lambda x, w: jnp.sum(lb.dot_general(x, w, NUMBERS, recipe=lb.quest(4)).astype(jnp.float32) * 0.5)
    expected = jax.grad(loss)(x, packed)
    close(jax.grad(loss)(x, to_planes(packed, 8, "interpret")), expected, 0)


@pytest.mark.parametrize(("bits", "block"), [(1, 128), (4, 128), (8, None)])
def test_integer_training_products(bits, block):
    """Forward and both gradients of the fused kernels against fake quantization multiplied by XLA."""
    x, w = operands()
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 6, 8)), jnp.bfloat16)
    found = {}
    for implementation in ("reference", "interpret"):
        recipe = lb.quest(bits, block=block).with_implementation(implementation)
        y, back = jax.vjp(lambda x, w, r=recipe: lb.dot_general(x, w, NUMBERS, recipe=r), x, w)
        found[implementation] = (y, *back(cotangent))
    for got, expected in zip(found["interpret"], found["reference"], strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        close(got, expected, 2.0**-6)


def test_a_training_product_keeps_codes_and_bits():
    """What the backward is given: half a byte an element of each operand at 4 bits, and one bit of mask."""
    x, w = operands(k=512, free=(64,))
    recipe = lb.quest(4).with_implementation("interpret")
    _, back = jax.vjp(lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=recipe), x, w)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(back))
    elements = (32 + 64) * 512  # 15 rows are stored as 32
    assert kept <= elements * 5 / 8 + 4 * (15 + 64) + 64


def test_what_cannot_run_says_why():
    x, w = operands()
    recipe = lb.quest(4)
    packed = pack_rhs(w, NUMBERS, recipe)
    sparse = pack_rhs(w, NUMBERS, lb.quest(4, sparsity="2:4"))
    floats = pack_rhs(w, NUMBERS, lb.quest("e2m1"))
    run = lambda x, w, recipe=recipe: lb.dot_general(x, w, NUMBERS, recipe=recipe)
    for call, error, said in [
        (lambda: run(x, to_planes(packed, 8, "kernel")), NotImplementedError, "NVIDIA GPU"),
        (lambda: run(x, w, recipe.with_implementation("kernel")), NotImplementedError, "NVIDIA GPU"),
        (lambda: run(x.astype(jnp.float32), w, recipe.with_implementation("kernel")), NotImplementedError, "float32"),
        (lambda: run(x, w, lb.quest("e2m1").with_implementation("kernel")), NotImplementedError, "uniform grids"),
        (lambda: run(x, to_planes(packed, 16, "interpret")), NotImplementedError, "16-bit activations"),
        (lambda: to_planes(packed, 8, "gpu"), ValueError, "'gpu'"),
        (lambda: to_planes(sparse, 8), ValueError, "sparse"),
        (lambda: to_planes(floats, 8), ValueError, "e2m1"),
        (lambda: recipe.with_implementation("fast"), ValueError, "'fast'"),
    ]:
        with pytest.raises(error, match=said):
            call()


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
def test_programs_for_cuda_hold_the_kernels_and_others_do_not():
    """The choice is made by the platform that a program is lowered for; no GPU is needed to see it."""
    x, w = operands(k=256, free=(64,))
    packed = to_planes(pack_rhs(w, NUMBERS, lb.quest(4)), 8)
    product = lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=lb.quest(4))
    train = lambda x, w: jax.vjp(product, x, w)[1](jnp.ones((3, 5, 64), jnp.bfloat16))
    gpu = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))
    for function, arguments, kernels in (
        (product, (x, packed), ("hadamard_quantize4", "matmul_w4a8")),
        (train, (x, w), ("hadamard_quantize4", "hadamard_backward")),
    ):
        here = jax.jit(function).trace(*arguments).lower().as_text()
        with use_abstract_mesh(gpu):
            there = (
                jax.jit(lambda *a, f=function: f(*a)).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
            )
        for kernel in kernels:
            assert kernel in there and kernel not in here
