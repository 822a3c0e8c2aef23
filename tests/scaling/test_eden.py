"""MS-EDEN's corrected scales against float64 NumPy, by the errors of a Gaussian, and at the edges."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax import methods, scaling
from tests.methods import low_precision as ref
from tests.methods.reference import rotate

LEVEL = 6 / (17 / 16 * 0.93)
MS_EDEN = methods.quartet2().grad_lhs.lhs
TURNED = dataclasses.replace(MS_EDEN, rotation=lb.Hadamard())  # without signs
BARE = dataclasses.replace(MS_EDEN, rotation=None)
fakely = jax.jit(lambda quantizer, x, key: quantizer(x, key=key), static_argnums=0)
elements = jax.jit(lambda quantizer, x, key: quantizer.elements(x, key=key), static_argnums=0)


def transcribed(x: np.ndarray, block: int):
    """Codes, E4M3 scales before and after their correction (not yet rounded), and the tensor's scale; x [rows, runs of
    16]."""
    tiles = x.reshape(len(x), -1, 16)
    amax = np.abs(tiles).max(-1, keepdims=True)
    tensor = amax.max() / (LEVEL * 255.99)
    scales = ref.cast(amax / LEVEL / tensor, ref.E4M3)
    codes = ref.cast(tiles / (scales * tensor), ref.E2M1)
    blocks = lambda terms: terms.reshape(len(x), -1, block).sum(-1)
    correction = blocks(tiles * tiles) / blocks(tiles * codes * scales * tensor)
    return codes, scales, scales * np.repeat(correction, block // 16, 1)[..., None], tensor


@pytest.mark.parametrize("length", [256, 96])
def test_equals_the_transcription(length):
    """Blocks of 128, and of 32 where 128 does not divide; rows of very different sizes. Each scale is the neighbor of
    the corrected one, below or above, that a uniform number says."""
    block, key = min(128, length & -length), jax.random.key(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, length)) * np.exp(rng.standard_normal((32, length))) * np.geomspace(1, 30, 32)[:, None]
    x = x.astype(np.float32).astype(np.float64)
    codes, before, wanted, tensor = transcribed(rotate(x, block), block)
    values, scales = (np.asarray(a, np.float64) for a in elements(TURNED, jnp.float32(x), key))
    found, values = scales.reshape(wanted.shape) / tensor, values.reshape(codes.shape)
    same = np.all(values == codes, axis=(1, 2))  # float32 may take the other side of a tie
    assert np.mean(same) > 0.9

    levels = np.unique(np.arange(127, dtype=np.uint8).view(ref.E4M3).astype(np.float64))
    above = levels[np.searchsorted(levels, wanted)]
    below = levels[np.searchsorted(levels, wanted) - 1]
    chance = (wanted - below) / (above - below)
    drawn = np.asarray(jax.random.uniform(key, wanted.shape), np.float64)
    clear = same[:, None, None] & (np.abs(drawn - chance) > 1e-4)
    assert np.mean(clear) > 0.9
    np.testing.assert_allclose(found[clear], np.where(drawn < chance, above, below)[clear], rtol=1e-5)
    assert np.any((above > before)[clear]) and len(np.unique(np.round(before, 6))) > 20


def test_errors_of_a_gaussian():
    """METHODS: .00972 of the square, and all of the length."""
    x = jax.random.normal(jax.random.key(0), (1024, 1024))
    near = fakely(MS_EDEN, x, jax.random.key(1))
    assert float(jnp.mean((near - x) ** 2) / jnp.mean(x**2)) == pytest.approx(9.72e-3, rel=0.02)
    assert float(jnp.sum(near * x) / jnp.sum(x * x)) == pytest.approx(1, abs=1e-3)
    uncorrected = dataclasses.replace(MS_EDEN, debias=None)
    assert float(jnp.sum(fakely(uncorrected, x, jax.random.key(1)) * x) / jnp.sum(x * x)) < 0.997


def test_zeros_and_faults(key):
    """A block of zeros comes back; NaN and infinity spoil their own tile, and no other's scale."""
    x = jax.random.normal(key, (4, 256)).at[1].set(0).at[2, 16:32].set(0)
    near = np.asarray(fakely(BARE, x, key))
    assert not near[1].any() and not near[2, 16:32].any() and np.isfinite(near).all()
    assert not np.asarray(fakely(MS_EDEN, jnp.zeros((2, 128)), key)).any()
    for fault in (jnp.nan, jnp.inf):
        spoiled = np.asarray(fakely(BARE, x.at[3, 40].set(fault), key))
        assert np.isnan(spoiled[3, 32:48]).all()
        assert np.isfinite(np.delete(spoiled, np.s_[32:48], 1)).all() and np.isfinite(spoiled[:3]).all()


@pytest.mark.parametrize("size", [1e-35, 1e35])
def test_sizes_at_the_ends_of_float32(key, size):
    x = jax.random.normal(key, (8, 128))
    plain, near = fakely(BARE, x, key), fakely(BARE, x * size, key)
    np.testing.assert_allclose(near / size, plain, atol=0.2)


def test_a_block_far_below_the_others(key):
    """Its elements round to 0 under the smallest scale, and have nothing to be corrected by."""
    x = jax.random.normal(key, (2, 128)).at[1].multiply(1e-7)
    assert np.isfinite(np.asarray(fakely(BARE, x, key))).all()


def test_transforms_and_dtypes(key):
    x = jax.random.normal(key, (3, 8, 256))
    keys = jax.random.split(key, 3)
    mapped = jax.jit(jax.vmap(lambda x, key: MS_EDEN(x, key=key)))(x, keys)
    for i in range(3):
        np.testing.assert_allclose(mapped[i], fakely(MS_EDEN, x[i], keys[i]), atol=1e-6)
    half = fakely(MS_EDEN, x[0].astype(jnp.bfloat16), key)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), x[0], atol=0.7)
    gradient = jax.grad(lambda x: jnp.vdot(MS_EDEN(x, key=key), x[::-1]))(x[0])
    assert np.isfinite(gradient).all()


def test_what_it_does_not_serve(key):
    with pytest.raises(ValueError, match="debias=Eden.*tiling=row.*groups"):
        lb.Quantizer(debias=scaling.Eden())
    for slots, said in [
        (dict(tiling=scaling.Group(48)), "tiling=group 48"),
        (dict(scale_format=scaling.BFLOAT16), "scale_format=bfloat16"),
        (dict(rounding=lb.rounding.stochastic), "chance is in the scales"),
        (dict(sparsity=lb.sparsity.NofM(2, 4)), "learned scales, a support or zero points"),
    ]:
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(BARE, **slots)
    with pytest.raises(ValueError, match="2\\^n|such as 32"):
        scaling.Eden(48)
    with pytest.raises(TypeError, match="lb.scaling.Eden"):
        lb.Quantizer(debias=128)
    with pytest.raises(NotImplementedError, match="debias=.*no packed form"):
        BARE.quantize(jnp.ones((2, 128)), key=key)
    with pytest.raises(ValueError, match="stochastic rounding to e4m3 got no key"):
        BARE(jnp.ones((2, 128)))
    with pytest.raises(ValueError, match="positive level"):
        scaling.AbsmaxOn(0)
