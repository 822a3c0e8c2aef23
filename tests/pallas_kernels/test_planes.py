"""The layout "planes/1" against its definition, index by index."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import planes


@pytest.mark.parametrize("word_bits", [8, 16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_as_specified_and_comes_back(bits, word_bits):
    n, k = 37, 700  # neither a multiple of 32 nor of a block
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (n, k)).astype(np.uint8)
    words = planes.pack(jnp.asarray(codes), bits, word_bits)
    assert [w.shape for w in words] == list(planes.word_shapes(n, k, bits, word_bits))
    above = bits
    for word, field in zip(words, planes.FIELDS[bits], strict=True):
        above -= field
        word = np.asarray(word).view(np.uint8 if word_bits == 8 else np.uint16).astype(np.int64)
        length = 32 * word_bits // field
        for index in np.random.default_rng(0).integers(0, k, 50):
            block, plane, column = index // length, index % length // 32, index % 32
            stored = word[block, :n, column] >> (field * plane) & ((1 << field) - 1)
            np.testing.assert_array_equal(stored, codes[:, index] >> above & ((1 << field) - 1))
    np.testing.assert_array_equal(planes.unpack(words, bits, n, k), codes)
    stored_bits = sum(8 * w.nbytes for w in words) / (planes.padded_n(n) * planes.padded_k(k, bits, word_bits))
    assert stored_bits == bits  # no bit is wasted beyond the padding


def test_wrong_words_are_named():
    words = planes.pack(jnp.zeros((32, 512), jnp.uint8), 3)
    for call, error, said in [
        (lambda: planes.pack(jnp.zeros((32, 512), jnp.uint8), 9), ValueError, "bits=9"),
        (lambda: planes.pack(jnp.zeros((32, 512), jnp.int32), 3), TypeError, "int32"),
        (lambda: planes.pack(jnp.zeros((512,), jnp.uint8), 3), ValueError, r"\(512,\)"),
        (lambda: planes.pack(jnp.zeros((32, 512), jnp.uint8), 3, 32), ValueError, "word_bits=32"),
        (lambda: planes.unpack(words, 3, 32, 1024), ValueError, "1024"),
        (lambda: planes.unpack(words, 4, 32, 512), ValueError, "2 word arrays"),
        (lambda: planes.unpack(tuple(w.astype(jnp.int32) for w in words), 3, 32, 512), TypeError, "int32"),
        (lambda: planes.check_layout("reader", "planes/2"), ValueError, "planes/2"),
    ]:
        with pytest.raises(error, match=said):
            call()


def test_codes_out_of_range_are_named():
    codes = np.zeros((32, 512), np.uint8)
    codes[3, 5] = 13
    for given in (codes, jnp.asarray(codes)):
        with pytest.raises(ValueError, match="code 13; codes of 3 bits are 0 to 7"):
            planes.pack(given, 3)
    planes.pack(jnp.asarray(codes), 4)
    traced = jax.jit(lambda c: planes.pack(c, 3))(jnp.asarray(codes))  # values are not known: the low bits are kept
    assert planes.unpack(traced, 3, 32, 512)[3, 5] == 13 & 7
