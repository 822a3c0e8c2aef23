"""What a packed array that comes from elsewhere is checked for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax import estimators, formats, rounding, scaling, sparsity

KINDS = {
    "quest 3": lb.quest_quantizer(3),
    "ternary, tensor": lb.Quantizer(format=formats.TERNARY, tiling=scaling.PerTensor(), fit=scaling.mean_abs),
    "e4m3, block": lb.Quantizer(format=formats.E4M3, tiling=scaling.Block(16, 4), scale_format=scaling.BFLOAT16),
    "nvfp4": lb.block_quantizer(formats.NVFP4),
    "mxfp4": lb.block_quantizer(formats.MXFP4),
    "2:4": lb.Quantizer(format=formats.INT4, sparsity=sparsity.NofM(2, 4)),
    "4:8 mid-rise": lb.quest_quantizer(4, sparsity="4:8"),
    "stochastic": lb.Quantizer(format=formats.AF4, rounding=rounding.stochastic),
    "learned": lb.Quantizer(fit=scaling.Learned(), tiling=scaling.PerTensor(), estimator=estimators.LSQ()),
}


@functools.cache
def packed(name, stack=()):
    q, key = KINDS[name], jax.random.key(0)
    options = dict(key=key if q.uses_key else None, scale=jnp.float32(0.1) if q.learned else None)
    quantize = lambda x: q.quantize(x, axis=-2, **options)
    return jax.jit(jax.vmap(quantize) if stack else quantize)(jax.random.normal(key, (*stack, 64, 12)))


@pytest.mark.parametrize("name", KINDS)
def test_what_quantize_gives_is_valid(name):
    for tensor in (packed(name), jax.tree.map(np.asarray, packed(name))):  # as a checkpoint may hand it out
        tensor.validate()
        assert np.isfinite(tensor.dequantize()).all()


@pytest.mark.parametrize("name", ["quest 3", "ternary, tensor", "nvfp4"])
@pytest.mark.parametrize("count", [3, 12])  # 12: as many as columns, with which a scale of a layer must not be mixed up
def test_stacks_and_slices_of_them_are_valid(name, count):
    stacked = packed(name, (count,))
    stacked.validate()
    whole = stacked.dequantize()
    for i in (0, count - 1):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        one.validate()
        np.testing.assert_array_equal(one.dequantize(), whole[i])


def test_another_layout_is_not_read():
    foreign = dataclasses.replace(packed("quest 3"), layout="bitstream-be/9")
    for read in (foreign.elements, foreign.values, foreign.dequantize, foreign.validate):
        with pytest.raises(ValueError, match=r"'bitstream-be/9'; it reads 'bitstream-le/1'"):
            read()


def changed(name, **fields):
    base = packed(name)
    return dataclasses.replace(base, **{n: make(getattr(base, n)) for n, make in fields.items()})


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("ternary, tensor", dict(words=lambda w: w.at[2, 1].set(0b00110000)), r"layer: code 3 at \(2, 6\).*3 codes"),
        ("stochastic", dict(words=lambda w: w.astype(jnp.int8)), r"words are int8\[12, 32\].*uint8"),
        ("quest 3", dict(words=lambda w: w[:, 1:]), r"words are uint8\[12, 23\].*64 codes of 3 bits.*24"),
        ("quest 3", dict(words=lambda w: w[:-1]), r"scales are float32\[1, 12\]; an array of shape \(64, 11\)"),
        ("quest 3", dict(length=lambda n: n - 1, scales=lambda s: s), r"row \(0,\) has bits set behind"),
        ("e4m3, block", dict(words=lambda w: w.at[3, 9].set(0x7F)), r"element at \(3, 9\) is nan"),
        ("quest 3", dict(scales=lambda s: (s[0].at[0, 4].set(jnp.inf),)), r"scale at \(0, 4\) is inf"),
        ("quest 3", dict(scales=lambda s: (s[0].at[0, 4].set(-1.0),)), r"scale at \(0, 4\) is -1.0"),
        ("mxfp4", dict(scales=lambda s: (s[0].at[1, 0, 2].set(255),)), r"scale at \(1, 0, 2\) is nan"),
        ("quest 3", dict(scales=lambda s: (s[0].astype(jnp.bfloat16),)), r"scales are bfloat16"),
        ("2:4", dict(marks=lambda m: m.at[1, 0].set(0b00110111)), r"group \(1, 0\) keeps 3 of its 4"),
    ],
)
def test_damage_is_named(name, fields, words):
    damaged = changed(name, **fields)
    with pytest.raises(ValueError, match=words):
        damaged.validate("layer")


def test_values_must_be_known():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda q: q.validate())(packed("quest 3"))
    with pytest.raises(TypeError, match="ShapeDtypeStruct"):
        jax.eval_shape(lambda: packed("quest 3")).validate()


def test_a_class_with_a_layout_of_its_own(key):
    """One that overrides `elements` alone is judged by them; with `_codes` by its codes."""
    planes = pytest.importorskip("lowbit_jax.ops.plane_tensor")
    pack = lambda x: planes.to_planes(lb.quest_quantizer(4).quantize(x, axis=0), 16)
    own = jax.jit(pack)(jax.random.normal(key, (128, 32)))
    own.validate()
    with pytest.raises(ValueError, match="scale at"):
        dataclasses.replace(own, scales=(own.scales[0].at[0, 3].set(jnp.nan),)).validate()


def test_one_whose_words_are_no_arrays_is_listed():
    tensor = packed("quest 3")
    shown = repr(jax.tree.map(lambda leaf: jax.sharding.PartitionSpec("data"), tensor))
    assert "midrise3" in shown and "words=PartitionSpec('data',)" in shown.replace("P(", "PartitionSpec(", 1)
    for other in (lambda leaf: leaf.shape, lambda leaf: leaf.sharding, lambda leaf: 0, lambda leaf: None):
        assert repr(jax.tree.map(other, tensor)).startswith("QTensor(midrise3, words=")
    assert (
        repr(tensor)
        == repr(jax.eval_shape(lambda: tensor))
        == "QTensor(float32[64, 12], midrise3, 336 bytes, 3.50 bits per element)"
    )
