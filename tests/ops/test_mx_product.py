"""Products with microscaled weights: what the kernel is handed, when it is chosen, and what is said when it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax.ops import backend, mx_product, pack_rhs
from pallas_kernels import chips, matmul_mx
from pallas_kernels.matmul_mx import matmul_mx as kernel

NUMBERS = (((2,), (0,)), ((), ()))
WEIGHTS = lb.LinearRecipe(out=lb.Gemm(rhs=lb.block_quantizer(lb.formats.MXFP4)), name="mxfp4")
BOTH = lb.LinearRecipe(
    out=lb.Gemm(lhs=lb.block_quantizer(lb.formats.MXFP4), rhs=lb.block_quantizer(lb.formats.MXFP4)), name="mxfp4 both"
)


pack = jax.jit(pack_rhs, static_argnums=(1, 2))
product = jax.jit(lb.dot_general, static_argnums=2, static_argnames="recipe")


def operands(dtype=jnp.bfloat16):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((3, 5, 128)), dtype)
    return x, jnp.asarray(random.standard_normal((128, 6, 8)) * np.geomspace(0.01, 1, 48).reshape(6, 8), jnp.float32)


@pytest.fixture
def kernels_by_xla(monkeypatch):
    """The door, with the reference behind `impl="jax-triton"`, so that what reaches the kernel can be computed."""
    monkeypatch.setattr(matmul_mx, "matmul_mx", lambda *a, impl, **o: kernel(*a, impl="xla", **o))
    monkeypatch.setattr(matmul_mx, "why_not", lambda: None)
    monkeypatch.setattr(backend, "why_no_gpu", lambda: None)


@pytest.mark.parametrize("recipe", [WEIGHTS, BOTH], ids=lambda r: r.name)
def test_words_and_scales_as_they_are_stored_give_the_product(recipe, kernels_by_xla):
    x, w = operands()
    packed = pack(w, NUMBERS, recipe)
    expected = product(x, packed, NUMBERS, recipe=recipe.with_implementation("reference"))
    y = product(x, packed, NUMBERS, recipe=recipe.with_implementation("kernel"))
    assert y.shape == (3, 5, 6, 8) and y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(y, np.float32), np.asarray(expected, np.float32), rtol=2**-7, atol=2**-7 * np.abs(expected).max()
    )


def test_a_weight_whose_contraction_axis_is_last(kernels_by_xla):
    x, w = operands()
    numbers = (((2,), (1,)), ((), ()))
    packed = pack(w.reshape(128, 48).T, numbers, WEIGHTS)
    words, scales, across = mx_product.matrix_of(packed)
    assert words.shape == (48, 64) and scales.shape == (48, 4) and not across
    y = product(x, packed, numbers, recipe=WEIGHTS.with_implementation("kernel"))
    expected = product(x, packed, numbers, recipe=WEIGHTS.with_implementation("reference"))
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(expected, np.float32), rtol=2**-7, atol=0.05)


@pytest.mark.parametrize(
    ("dtype", "recipe", "words"),
    [
        (jnp.float32, WEIGHTS, "the activation is float32"),
        (jnp.bfloat16, lb.LinearRecipe(out=lb.Gemm(rhs=lb.quest_quantizer(4))), "no kernel reads weights of midrise4"),
    ],
)
def test_a_kernel_asked_for_by_name_says_why_it_cannot(dtype, recipe, words, kernels_by_xla):
    x, w = operands(dtype)
    with pytest.raises(NotImplementedError, match=words):
        lb.dot_general(x, pack_rhs(w, NUMBERS, recipe), NUMBERS, recipe=recipe.with_implementation("kernel"))


def test_interpretation_is_refused(kernels_by_xla):
    x, w = operands()
    with pytest.raises(NotImplementedError, match="no interpretation"):
        lb.dot_general(x, pack_rhs(w, NUMBERS, WEIGHTS), NUMBERS, recipe=WEIGHTS.with_implementation("interpret"))


def test_what_is_missing_here_is_named():
    x, w = operands()
    with pytest.raises(NotImplementedError, match="jax-triton|NVIDIA GPU"):
        lb.dot_general(x, pack_rhs(w, NUMBERS, WEIGHTS), NUMBERS, recipe=WEIGHTS.with_implementation("kernel"))


def test_fp8_elements_need_a_chip_that_has_them(monkeypatch):
    monkeypatch.setattr(matmul_mx, "why_not", lambda: None)
    with chips.abstract_gpu("sm_80"):
        assert backend.why_no_mx("mxfp4", None) is None and "8.9" in (backend.why_no_mx("mxfp8", None) or "")
    with chips.abstract_gpu("sm_90"):
        assert backend.why_no_mx("mxfp8", "mxfp8") is None


def test_other_quantizers_are_not_taken_for_microscaled():
    assert mx_product.mx_format(lb.block_quantizer(lb.formats.MXFP8)) == "mxfp8"
    for quantizer in (lb.quest_quantizer(4), lb.block_quantizer(lb.formats.NVFP4), lb.Quantizer(), None):
        assert mx_product.mx_format(quantizer) is None
    rotated = lb.Quantizer(format=lb.formats.E2M1, tiling=lb.scaling.Group(32),
                           scale_format=lb.scaling.PowerOfTwo(), rotation=lb.Hadamard(32))  # fmt: skip
    assert mx_product.mx_format(rotated) is None


def test_programs_for_a_gpu_hold_the_kernel():
    if why := matmul_mx.why_not():
        pytest.skip(why)
    x, w = operands()
    packed = pack_rhs(w, NUMBERS, WEIGHTS)
    run = jax.jit(lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=WEIGHTS))
    with chips.abstract_gpu("sm_90"):
        assert "triton_kernel_call" in run.trace(x, packed).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton_kernel_call" not in run.lower(x, packed).as_text()
