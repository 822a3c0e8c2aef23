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
    q = KINDS[name]
    scale = jnp.float32(0.1) if q.learned else None
    q.quantize(jnp.zeros((0, 64)), key=jax.random.key(0) if q.uses_key else None, scale=scale).validate()


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


def test_a_seal_tells_meanings_apart():
    """By its shape alone: under jit, stacked and sliced."""
    seals = {}
    for name in KINDS:
        for length in (64, 56):
            tensor = dataclasses.replace(packed(name), length=length)
            seals[name, length] = tensor.sealed().seal.shape
    assert len(set(seals.values())) == len(seals)
    sealed = packed("quest 3").sealed()
    other = dataclasses.replace(packed("quest 3"), quantizer=lb.quest_quantizer(3, block=32)).sealed()
    np.testing.assert_array_equal(jax.jit(lambda t: t.dequantize())(sealed), packed("quest 3").dequantize())
    foreign = jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(sealed))
    for read in (foreign.elements, foreign.values, foreign.dequantize, foreign.validate):
        with pytest.raises(ValueError, match=r"seal is not.*rotation hadamard 32.*lb.convert"):
            jax.eval_shape(read) if read != foreign.validate else read()
    with pytest.raises(ValueError, match="seal"):  # of which the axis is part, but not its counting from the end
        dataclasses.replace(sealed, axis=-1).elements()
    assert dataclasses.replace(sealed, axis=-1).unsealed().elements().shape == (12, 64)


def test_a_seal_goes_along_with_stacks_and_slices():
    q = KINDS["quest 3"]
    stacked = jax.vmap(lambda x: q.quantize(x, axis=-2).sealed())(jax.random.normal(jax.random.key(0), (3, 64, 12)))
    assert stacked.seal.shape == (3, *packed("quest 3").sealed().seal.shape)
    stacked.validate()
    whole = stacked.dequantize()
    one_by_one = jax.lax.scan(lambda carry, layer: (carry, layer.dequantize()), 0, stacked)[1]
    np.testing.assert_array_equal(jax.vmap(lambda layer: layer.dequantize())(stacked), whole)
    np.testing.assert_array_equal(one_by_one, whole)
    assert stacked.nbytes == stacked.unsealed().nbytes


def test_seals_stay_those_of_files():
    """A change of the digest, or of the words in it, makes older checkpoints of packed weights unreadable."""
    seals = {name: "".join(map(str, packed(name).sealed().seal.shape)) for name in ("quest 3", "nvfp4", "2:4")}
    assert seals == {"quest 3": "2121121111121121", "nvfp4": "1121221211211111", "2:4": "1121111111221212"}
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(packed("2:4"))]
    assert names == [".words", ".scales[0]", ".marks"]  # and without a seal the tree is that of files without


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


@pytest.mark.parametrize(
    "use",
    [np.asarray, jnp.asarray, lambda q: jnp.ones((2, 64)) @ q, lambda q: np.ones((2, 64)) @ q,
     lambda q: q @ jnp.ones(12), lambda q: q * 2, lambda q: 2 * q, lambda q: q + q, lambda q: np.float32(1) - q,
     lambda q: q / jnp.ones(12), jnp.sum, lambda q: jnp.multiply(q, 2)],
)  # fmt: skip
def test_a_packed_array_is_no_array(use):
    """Neither by a bare error of Python, nor by being unpacked unasked, nor as NumPy's object array."""
    with pytest.raises(TypeError, match=r"QTensor\(float32\[64, 12\].* is packed, not an array. Use .dequantize\(\)"):
        use(packed("quest 3"))


def test_packed_arrays_are_equal_by_identity():
    a, b = packed("quest 3"), dataclasses.replace(packed("quest 3"))
    assert a == a and a != b and len({a, b, a}) == 2


def test_scales_that_were_cast_are_named():
    """What casts the floats of a model to bfloat16 must not change packed weights by the way."""
    cast = lambda t: jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, t)
    for name in ("quest 3", "nvfp4", "learned"):
        for read in (lambda t: t.values(), lambda t: t.dequantize(), jax.jit(lambda t: t.dequantize())):
            with pytest.raises(ValueError, match="scales are .*bfloat16, and .* stores .*float32; cast.*Leave packed"):
                read(cast(packed(name)))
    for name in ("mxfp4", "e4m3, block"):  # which have none
        np.testing.assert_array_equal(cast(packed(name)).dequantize(), packed(name).dequantize())
