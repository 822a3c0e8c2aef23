"""The inline assembly against its jnp twin and against the layout's definition, over every word."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import unpack
from pallas_kernels.planes import COLUMNS, FIELDS
from tests.pallas_kernels import ptx

WIDTHS = range(1, 9)


@pytest.fixture
def assembly_on_cpu(monkeypatch):
    monkeypatch.setattr(plgpu, "elementwise_inline_asm", ptx.run)


def every_word(bits, word_bits):
    """A word array a field: all words in the first, random ones in the others."""
    dtype = np.int16 if word_bits == 16 else np.int8
    every = np.arange(1 << word_bits).astype(np.uint16 if word_bits == 16 else np.uint8).view(dtype)
    random = np.random.default_rng(bits)
    others = [random.permutation(every) for _ in FIELDS[bits][1:]]
    return [a.reshape(-1, COLUMNS) for a in (every, *others)]


def codes(words, bits, planes, word_bits):
    """Bits [f p, f p + f) of each word, the first field on top: the definition."""
    code, unsigned = 0, np.uint16 if word_bits == 16 else np.uint8
    for word, field, plane in zip(words, FIELDS[bits], planes, strict=True):
        part = word.view(unsigned).astype(np.int64) >> (field * plane) & ((1 << field) - 1)
        code = code << field | part
    return code


def all_planes(bits, word_bits):
    finest = word_bits // min(FIELDS[bits])
    return [[c % (word_bits // field) for field in FIELDS[bits]] for c in range(finest)]


@pytest.mark.parametrize("midrise", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bits", WIDTHS)
def test_planes_to_floats(bits, dtype, midrise, assembly_on_cpu):
    words = every_word(bits, 16)
    zero = ((1 << bits) - 1) / 2 if midrise else 1 << (bits - 1)
    assert unpack.offset(bits, midrise) == zero
    for planes in all_planes(bits, 16):
        expected = unpack.gain(midrise) * (codes(words, bits, planes, 16) - zero)
        run = lambda words, assembly, planes=planes: unpack.to_float(
            words, bits, planes, dtype, midrise=midrise, assembly=assembly
        )
        np.testing.assert_array_equal(np.asarray(run(words, True), np.float64), expected)
        np.testing.assert_array_equal(np.asarray(run([jnp.asarray(w) for w in words], False), np.float64), expected)


@pytest.mark.parametrize("word_bits", [8, 16])
@pytest.mark.parametrize("bits", WIDTHS)
def test_part_of_a_block_is_its_planes(bits, word_bits, assembly_on_cpu):
    """Words moved down by whole planes show the planes above as the lowest, whatever is left on top."""
    words, step = every_word(bits, word_bits), 32 * word_bits // 8  # the shortest block of any field
    unsigned = np.uint16 if word_bits == 16 else np.uint8
    for i, field in enumerate(FIELDS[bits]):
        per_turn = step // 32
        for turn in range(word_bits // field // per_turn):
            expected = [words[i].view(unsigned) >> field * (turn * per_turn + p) & (1 << field) - 1
                        for p in range(per_turn)]  # fmt: skip
            for assembly in (True, False):
                moved = unpack.moved_down(words[i] if assembly else jnp.asarray(words[i]), turn * per_turn * field,
                                          assembly=assembly)  # fmt: skip
                got = [np.asarray(moved).view(unsigned) >> field * p & (1 << field) - 1 for p in range(per_turn)]
                np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_planes_to_int8(bits, assembly_on_cpu):
    words = every_word(bits, 8)
    for planes in all_planes(bits, 8):
        expected = codes(words, bits, planes, 8) - (128 if bits == 8 else 0)
        by_assembly = unpack.to_int8(words, bits, planes, assembly=True)
        twin = unpack.to_int8([jnp.asarray(w) for w in words], bits, planes, assembly=False)
        np.testing.assert_array_equal(by_assembly, expected)
        np.testing.assert_array_equal(np.asarray(twin), expected)
