"""Supports: exact density, the largest kept, ties settled, and the compressed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax.scaling import Group
from lowbit_jax.sparsity import NofM, PairsNofM, compress, expand

SUPPORTS = [NofM(2, 4), NofM(1, 4), PairsNofM(2, 4)]

mask_of = jax.jit(lambda support, x, axis=-1: support.mask(x, axis), static_argnums=(0, 2))


@functools.partial(jax.jit, static_argnums=(0, 2))
def both_forms(quantizer, x, axis=-1):
    """Fake quantization and what comes back from packed codes."""
    return quantizer(x, axis=axis), quantizer.quantize(x, axis=axis).dequantize()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("support", SUPPORTS, ids=lambda s: s.describe())
def test_keeps_the_largest_of_each_group(key, support, axis):
    x = jax.random.normal(key, (32, 48))
    mask = np.asarray(mask_of(support, x, axis))
    rows = np.moveaxis(np.asarray(x), axis, -1)
    got = np.moveaxis(mask, axis, -1)
    for values, kept in zip(rows.reshape(-1, support.group), got.reshape(-1, support.group), strict=True):
        score = (values**2).reshape(-1, support.run).sum(1)
        best = np.sort(np.argsort(-score)[: support.kept // support.run])
        np.testing.assert_array_equal(np.flatnonzero(kept[:: support.run]), best)
        assert kept.sum() == support.kept


@pytest.mark.parametrize("support", SUPPORTS, ids=lambda s: s.describe())
def test_ties_keep_the_exact_count(support):
    mask = mask_of(support, jnp.ones((3, 16)))
    assert (np.asarray(mask).reshape(-1, support.group).sum(1) == support.kept).all()


@pytest.mark.parametrize("support", SUPPORTS, ids=lambda s: s.describe())
def test_compressed_codes_come_back(key, support):
    codes = np.asarray(jax.random.randint(key, (5, 64), 0, 16)).astype(np.uint8)
    x = jax.random.normal(jax.random.split(key)[1], (5, 64))

    @jax.jit
    def there_and_back(codes, x):
        mask = support.mask(x, 1)
        kept, marks = compress(codes, mask, support)
        return mask, kept, marks, *expand(kept, marks, support)

    mask, kept, marks, back, back_mask = map(np.asarray, there_and_back(codes, x))
    assert kept.shape == (5, 64 * support.kept // support.group) and marks.shape == (5, 64 // support.run)
    np.testing.assert_array_equal(back_mask, mask)
    np.testing.assert_array_equal(np.where(mask, back, 0), np.where(mask, codes, 0))


@pytest.mark.parametrize("support", SUPPORTS, ids=lambda s: s.describe())
def test_an_axis_that_is_not_there(support):
    for axis in (2, -3):
        with pytest.raises(ValueError, match=f"NofM: axis {axis} of an array of 2 dimensions"):
            support.mask(jnp.ones((8, 8)), axis)
    with pytest.raises(ValueError, match="0 dimensions. Reshape"):
        support.mask(jnp.ones(()), 0)


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"2:4 cuts axis 1 of length 6.*leaves 2"):
        NofM(2, 4).mask(jnp.ones((2, 6)), 1)
    with pytest.raises(ValueError, match="at least 1"):
        NofM(5, 4)


@pytest.mark.parametrize("support", SUPPORTS, ids=lambda s: s.describe())
def test_no_rows(support):
    quantizer = lb.Quantizer(sparsity=support)
    assert [form.shape for form in both_forms(quantizer, jnp.zeros((0, 64)))] == [(0, 64)] * 2
    assert [form.shape for form in both_forms(quantizer, jnp.zeros((64, 0)), 0)] == [(64, 0)] * 2


@pytest.mark.parametrize("support", SUPPORTS, ids=lambda s: s.describe())
def test_nan_counts_as_the_largest(support):
    """Kept, so that it is seen, and the count stays exact: fake and packed agree in the tiles beside it."""
    x = jnp.arange(1.0, 17).reshape(2, 8).at[0, 0].set(jnp.nan)
    mask = np.asarray(mask_of(support, x))
    assert mask[0, 0] and (mask.reshape(-1, support.group).sum(1) == support.kept).all()
    np.testing.assert_array_equal(*both_forms(lb.Quantizer(tiling=Group(2), sparsity=support), x))


@pytest.mark.parametrize("power", [-125, -90, -70, 0, 65, 90, 124])
def test_pairs_of_any_magnitude(power):
    x = jnp.asarray([[1.0, 1, 5, 5], [3, 4, 0, 4], [3, 4, 5, 0]]) * 2.0**power
    expected = [[False, False, True, True], [True, True, False, False], [True, True, False, False]]
    np.testing.assert_array_equal(mask_of(PairsNofM(1, 2), x), expected)
