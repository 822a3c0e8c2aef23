"""Packing against `numpy.packbits`, at every width and at sizes that fill no byte."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_jax import packing

WIDTHS = range(1, 9)


def expected_bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """The layout by its definition: all bits of a row in order, least significant first, eight to a byte."""
    stream = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits), axis=-1, bitorder="little")


def draw(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> np.ndarray:
    return rng.integers(0, 2**bits, shape, dtype=np.uint8)


@functools.partial(jax.jit, static_argnums=1)
def there_and_back(codes, bits):
    words = packing.pack(codes, bits)
    return words, packing.unpack(words, bits, codes.shape[-1])


@settings(max_examples=20, deadline=None, database=None)  # each example compiles its shape
@given(bits=st.integers(1, 8), rows=st.integers(0, 3), size=st.integers(0, 257), seed=st.integers(0, 2**32 - 1))
def test_packs_to_the_bit_stream_and_back(bits, rows, size, seed):
    codes = draw(np.random.default_rng(seed), (rows, size), bits)
    words, back = there_and_back(jnp.asarray(codes), bits)
    assert words.dtype == back.dtype == jnp.uint8
    np.testing.assert_array_equal(words, expected_bytes(codes, bits))
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_sizes_around_a_group(bits):
    """One compilation for all of them."""
    rows = [draw(np.random.default_rng(size), (5, size), bits) for size in (1, 2, 7, 8, 9, 13, 16)]
    both = jax.jit(lambda arrays: [there_and_back(codes, bits) for codes in arrays])(rows)
    for codes, (words, back) in zip(rows, both, strict=True):
        assert words.shape == (5, packing.packed_size(codes.shape[1], bits))
        np.testing.assert_array_equal(words, expected_bytes(codes, bits))
        np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_at_every_place_of_a_group(bits):
    """A shift that drops or smears a bit shows in one of these."""
    codes = np.stack([np.roll(np.arange(256) % 2**bits, shift) for shift in range(8)]).astype(np.uint8)
    words, back = there_and_back(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(words, expected_bytes(codes, bits))
    np.testing.assert_array_equal(back, codes)


def test_any_leading_axes_and_vmap():
    codes = draw(np.random.default_rng(0), (2, 3, 11), 3)
    words = packing.pack(jnp.asarray(codes), 3)
    assert words.shape == (2, 3, 5)
    np.testing.assert_array_equal(words, expected_bytes(codes, 3))
    np.testing.assert_array_equal(jax.vmap(lambda row: packing.pack(row, 3))(jnp.asarray(codes)), words)
    np.testing.assert_array_equal(packing.pack(jnp.asarray(codes[0, 0]), 3), words[0, 0])
    np.testing.assert_array_equal(packing.unpack(words, 3, 11), codes)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (4, 0), (2, 0, 3)])
def test_empty_arrays(shape):
    words = packing.pack(jnp.zeros(shape, jnp.uint8), 3)
    assert words.shape == (*shape[:-1], packing.packed_size(shape[-1], 3))
    assert packing.unpack(words, 3, shape[-1]).shape == shape


def test_bits_above_the_width_do_not_reach_the_neighbors():
    np.testing.assert_array_equal(packing.pack(jnp.full((8,), 0xFF, jnp.uint8), 3), [0xFF, 0xFF, 0xFF])
    np.testing.assert_array_equal(packing.pack(jnp.asarray([0xF9, 0], jnp.uint8), 3), [1])


def test_golden_bytes_of_the_layout():
    """Files name this layout: a change of these bytes is a change of `LAYOUT`."""
    assert packing.LAYOUT == "bitstream-le/1"
    np.testing.assert_array_equal(packing.pack(jnp.asarray([1, 2, 3, 4, 5], jnp.uint8), 3), [0b11010001, 0b01011000])
    np.testing.assert_array_equal(packing.pack(jnp.asarray([0xA, 0xB, 0xC], jnp.uint8), 4), [0xBA, 0x0C])


def test_wrong_calls_say_what_they_need():
    codes = jnp.zeros((4,), jnp.uint8)
    with pytest.raises(ValueError, match="bits=9; it stores codes of 1 to 8 bits"):
        packing.pack(codes, 9)
    with pytest.raises(ValueError, match="bits=0"):
        packing.unpack(codes, 0, 4)
    with pytest.raises(ValueError, match="rows of 4 bytes for 4 codes of 4 bits, which take 2"):
        packing.unpack(codes, 4, 4)
    with pytest.raises(ValueError, match="size=-1; a row has 0 codes or more"):
        packing.unpack(codes[:0], 4, -1)
    with pytest.raises(TypeError, match="pass an integer"):
        packing.unpack(codes, 4, 8.0)
    with pytest.raises(TypeError):
        packing.pack(codes.astype(jnp.int32), 4)
    with pytest.raises(TypeError):
        packing.pack(jnp.uint8(3), 4)
