"""Blocks of GGUF, read by the package gguf, are the very weights that were packed."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowbit_jax as lb
from lowbit_jax.io import gguf
from lowbit_jax.scaling import Group, PerTensor, mean_abs, rms_optimal
from tests.io import files

library = pytest.importorskip("gguf")

HELD = {
    "ternary": ("TQ2_0", files.half(files.quantizer("ternary", PerTensor(), fit=mean_abs))),
    "1-bit mid-rise": ("TQ2_0", files.half(files.quantizer("midrise1", fit=rms_optimal))),
    "1-bit mid-rise by groups": ("Q4_0", files.half(files.quantizer("midrise1", Group(64), fit=rms_optimal))),
    "int4": ("Q4_0", files.half(files.quantizer("int4", Group(32)))),
    "3-bit mid-rise": ("Q4_0", files.half(files.quantizer("midrise3", fit=rms_optimal))),
    "4-bit mid-rise": ("Q5_0", files.half(files.quantizer("midrise4", fit=rms_optimal))),
    "e2m1 by rows": ("Q5_0", files.half(files.quantizer("e2m1", fit=rms_optimal))),
    "int8": ("Q8_0", files.half(files.quantizer("int8", Group(64)))),
    "7-bit mid-rise": ("Q8_0", files.half(files.quantizer("midrise7"))),
    "sparse": ("Q4_0", files.half(lb.quest_quantizer(3, block=None, sparsity="2:4"))),
    "mxfp4": ("MXFP4", files.block("mxfp4")),
}


def read(kind: str, rows: np.ndarray) -> np.ndarray:
    return library.dequantize(rows, library.GGMLQuantizationType[kind])


@pytest.mark.parametrize("name", HELD)
def test_blocks_hold_the_weight(name):
    kind, quantizer = HELD[name]
    packed = quantizer.quantize(files.weight(), axis=0)
    found, rows = gguf.blocks(packed)
    assert found == kind
    np.testing.assert_array_equal(read(kind, rows), np.asarray(packed.dequantize(jnp.float32)).T)


@settings(deadline=None, max_examples=6)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_any_size(bits, groups, outputs, seed):
    values = np.random.default_rng(seed).normal(size=(32 * groups, outputs)).astype(np.float32)
    packed = files.half(files.quantizer(f"int{bits}", Group(32))).quantize(jnp.asarray(values), axis=0)
    np.testing.assert_array_equal(read(*gguf.blocks(packed)), np.asarray(packed.dequantize(jnp.float32)).T)


def test_parts_of_a_layer():
    packed = HELD["int4"][1].quantize(files.weight(), axis=0)
    kind, rows = gguf.blocks(lb.io.Outputs(packed, 5, 11))
    np.testing.assert_array_equal(read(kind, rows), np.asarray(packed.dequantize(jnp.float32)).T[5:11])


def test_scales_are_kept_or_refused():
    packed = files.quantizer("int4", Group(32)).quantize(files.weight(), axis=0)
    with pytest.raises(ValueError, match="of output 0 of up would become .* float16"):
        gguf.blocks(packed, "up")
    error = np.abs(read(*gguf.blocks(packed, round_scales=True)) - np.asarray(packed.dequantize()).T)
    assert 0 < error.max() < 2**-11 * np.abs(np.asarray(packed.dequantize())).max() * 1.01
    with pytest.raises(ValueError, match="would become inf"):
        gguf.blocks(files.quantizer("int4").quantize(files.weight() * 1e8, axis=0), round_scales=True)
    with pytest.raises(ValueError, match="would become 0.0, .* to all of its bits"):
        gguf.blocks(files.quantizer("int4").quantize(files.weight() * 1e-8, axis=0), round_scales=True)


@pytest.mark.parametrize(
    "quantizer, kind, words",
    [
        (lb.quest_quantizer(4), NotImplementedError, "up is rotated"),
        (files.quantizer("uint4", Group(32), zero_point=True), NotImplementedError, "up has zero points"),
        (files.quantizer("nf4", Group(32)), NotImplementedError, "no type of GGUF holds up, nf4"),
        (files.half(files.quantizer("int4", Group(16))), ValueError, "a scale for each 16 inputs, and a block is 32"),
    ],
)
def test_what_blocks_cannot_hold(quantizer, kind, words):
    with pytest.raises(kind, match=words):
        gguf.blocks(quantizer.quantize(files.weight(), axis=0), "up")
