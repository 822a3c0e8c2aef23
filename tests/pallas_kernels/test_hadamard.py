"""The fused rotation, fit, rounding and packing, and its way back, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

from pallas_kernels import planes
from pallas_kernels.checks import NoKernel
from pallas_kernels.hadamard_backward import hadamard_backward
from pallas_kernels.hadamard_quantize import hadamard_quantize


def rotated(x, block):
    if block is None:
        return x
    return (x.reshape(len(x), -1, block) @ hadamard(block) / np.sqrt(block)).reshape(x.shape)


def bits_of(mask, m, k):
    padded = jnp.pad(mask, ((0, 0), (0, planes.padded_n(m) - m), (0, 0)))
    return np.asarray(planes.unpack((padded,), 1, m, k))


@pytest.mark.parametrize(
    ("bits", "m", "k", "block", "dtype", "axis", "midrise"),
    [
        (4, 20, 384, 128, jnp.bfloat16, 1, True),
        (1, 16, 256, 64, jnp.float16, 1, True),
        (8, 16, 256, None, jnp.bfloat16, 1, False),
        (3, 16, 512, 32, jnp.float32, 0, True),
    ],
)
def test_codes_scales_and_masks(bits, m, k, block, dtype, axis, midrise):
    random = np.random.default_rng(bits)
    x = jnp.asarray(random.standard_normal((m, k)) * np.exp(random.standard_normal((m, 1))), dtype).at[1].set(0)
    alpha, trust, half = 0.6, 2.0 ** (bits - 1), 0.5 if midrise else 0.0
    exact = np.asarray(x, np.float64)
    scale = np.sqrt((exact**2).mean(1)) * alpha
    v = rotated(exact, block) / np.where(scale == 0, 1, scale)[:, None]
    codes = np.clip(np.round(v + half) - 2 * half, -(1 << bits - 1), (1 << bits - 1) - 1)
    at_tie = np.abs(v + half - np.floor(v + half) - 0.5) < 2e-4  # the order of sums decides there
    at_limit = np.abs(np.abs(v) - trust) < 2e-4
    assert at_tie.mean() < 0.1 and len(np.unique(codes[2:])) > 1
    for impl in ("interpret", "xla"):
        got, got_scale, mask = hadamard_quantize(
            x if axis == 1 else x.T, bits=bits, alpha=alpha, block=block, midrise=midrise, trust=trust, axis=axis,
            impl=impl,
        )  # fmt: skip
        np.testing.assert_allclose(got_scale, scale, rtol=1e-6)
        np.testing.assert_array_equal(np.where(at_tie, codes, got), codes)
        np.testing.assert_array_equal(
            np.where(at_limit, 0, bits_of(mask, m, k)), np.where(at_limit, 0, np.abs(v) <= trust)
        )
        assert not (
            (np.asarray(got[1], np.float32) + half) * np.asarray(got_scale[1])
        ).any()  # a row of zeros comes back as zeros


@pytest.mark.parametrize(("block", "dtype"), [(128, jnp.bfloat16), (32, jnp.float16), (None, jnp.bfloat16)])
def test_gradients_are_masked_and_rotated_back(block, dtype):
    m, k = 20, 384
    random = np.random.default_rng(0)
    g = jnp.asarray(random.standard_normal((m, k)), dtype)
    kept = random.integers(0, 2, (m, k)).astype(np.uint8)
    [words] = planes.pack(jnp.asarray(kept), 1, 8)
    expected = rotated(np.asarray(g, np.float64) * kept, block)
    for impl in ("interpret", "xla"):
        dx = hadamard_backward(g, words[:, :m], block=block, impl=impl)
        assert dx.dtype == dtype
        np.testing.assert_allclose(np.asarray(dx, np.float64), expected, atol=float(jnp.finfo(dtype).eps) * 6)
        exact = hadamard_backward(g, words[:, :m], block=block, out_dtype=jnp.float32, impl=impl)
        np.testing.assert_allclose(exact, expected, atol=1e-5)


def test_no_kernel_and_bad_calls_say_why():
    x = jnp.zeros((4, 96), jnp.bfloat16)
    shape = jax.ShapeDtypeStruct
    with pytest.raises(NoKernel, match="K=96"):
        hadamard_quantize(x, bits=4, alpha=0.3, block=32)
    for options, said in [
        (dict(bits=9, alpha=0.3), "bits=9"),
        (dict(bits=4, alpha=0.3, block=128), "block=128"),
        (dict(bits=4, alpha=0.0, block=32), "alpha=0.0"),
        (dict(bits=4, alpha=0.3, block=32, axis=2), "axis=2"),
    ]:
        with pytest.raises(ValueError, match=said):
            hadamard_quantize(x, impl="xla", **options)
    with pytest.raises(ValueError, match="mask of shape"):
        jax.eval_shape(hadamard_backward, shape((4, 256), jnp.bfloat16), shape((2, 4, 32), jnp.int8))
