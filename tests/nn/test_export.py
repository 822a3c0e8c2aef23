"""`jax.export` of packed models: their weights as arguments, in files, and batches of a size that is not known yet."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import export

import lowbit_jax as lb
from lowbit_jax import estimators, formats, scaling, sparsity
from lowbit_jax.ops.exported import static_from_bytes, static_to_bytes

LAYOUTS = ["bitstream-le/1", "planes/1"]
QUANTIZERS = {
    "quest": lb.quest_quantizer(4),
    "signs": dataclasses.replace(lb.quest_quantizer(3), rotation=lb.Hadamard(block=64, signs=3)),
    "nvfp4": lb.block_quantizer(formats.NVFP4),
    "e4m3 block": lb.Quantizer(format=formats.E4M3, tiling=scaling.Block(16, 4), scale_format=scaling.BFLOAT16),
    "2:4": lb.Quantizer(format=formats.INT4, sparsity=sparsity.NofM(2, 4), fit=scaling.Percentile(99.5)),
    "lsq": lb.Quantizer(fit=scaling.Learned(), tiling=scaling.PerTensor(), estimator=estimators.LSQ()),
    "nf4": lb.Quantizer(format=formats.NF4, tiling=scaling.Group(32)),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_static_fields_survive_a_file(name):
    q, x = QUANTIZERS[name], jax.ShapeDtypeStruct((64, 16), jnp.bfloat16)
    scale = jnp.float32(0.1) if q.learned else None
    tensor = jax.eval_shape(lambda x: q.quantize(x, axis=0, scale=scale).sealed(), x)
    kind, static = jax.tree.structure(tensor).node_data()
    assert static_from_bytes(kind, static_to_bytes(kind, static)) == static


def test_every_method_of_the_catalogue_survives_a_file():
    for name in lb.methods.names():
        for gemm in (lb.methods.get(name).out,):
            if isinstance(gemm.rhs, lb.Quantizer):
                static = (gemm.rhs, -1, 64, jnp.dtype("float32"), "bitstream-le/1")
                assert static_from_bytes(lb.QTensor, static_to_bytes(lb.QTensor, static)) == static


def test_what_no_file_can_name_is_told():
    static = (lb.Quantizer(fit=lambda tiles, fmt, axes: jnp.ones(())), -1, 64, jnp.dtype("float32"), "bitstream-le/1")
    with pytest.raises(TypeError, match="holds <function .*lambda.*closes over the packed weights"):
        static_to_bytes(lb.QTensor, static)
    with pytest.raises(ValueError, match="needs Absent of elsewhere. Import that module first"):
        static_from_bytes(lb.QTensor, b'{"quantizer": {"record": "elsewhere:Absent", "fields": {}}}')
    with pytest.raises(ValueError, match="quest is no dataclass here"):
        static_from_bytes(lb.QTensor, b'{"quantizer": {"record": "lowbit_jax:quest", "fields": {}}}')


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_variables_are_arguments_of_an_exported_function(key, layout):
    pytest.importorskip("flatbuffers")
    model, x = lb.quantize(linen.Dense(8), lb.quest(4, signs=0)), jax.random.normal(key, (2, 64))
    packed, words = lb.convert(model, model.init(key, x), x, layout=layout)
    written = export.export(jax.jit(packed.apply))(words, x).serialize()
    read = export.deserialize(bytearray(written))
    np.testing.assert_array_equal(read.call(words, x), jax.jit(packed.apply)(words, x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_of_any_size(key, layout):
    """Where a kernel or int8 pays depends on sizes; of those that are not known, XLA's path is taken."""
    linear = nnx.Linear(256, 64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    packed = lb.convert(lb.quantize(linear, lb.quest(4)), layout=layout)
    x = jax.random.normal(key, (5, 256), jnp.bfloat16)
    for constraints in ((), ("b >= 1", "b <= 8")):
        (b,) = export.symbolic_shape("b", constraints=constraints)
        exported = export.export(jax.jit(packed))(jax.ShapeDtypeStruct((b, 256), jnp.bfloat16))
        y = exported.call(x)
        assert y.shape == (5, 64)
        np.testing.assert_allclose(y.astype(jnp.float32), packed(x).astype(jnp.float32), rtol=2.0**-7, atol=1e-2)


@pytest.mark.parametrize("backward", [None, 8])
def test_gradients_of_a_batch_of_any_size(key, backward):
    recipe = lb.quest(4) if backward is None else lb.quest(4, backward=backward)
    model = lb.quantize(nnx.Linear(256, 64, rngs=nnx.Rngs(0)), recipe)
    graph, state = nnx.split(model)
    loss = lambda state, x: jnp.sum(jnp.sin(nnx.merge(graph, state)(x)))
    gradients = lambda leaves, x: jax.tree.leaves(
        jax.grad(loss, (0, 1))(jax.tree.unflatten(jax.tree.structure(state), leaves), x)
    )
    (b,) = export.symbolic_shape("b")
    leaves, x = jax.tree.leaves(state), jax.random.normal(key, (96, 256))
    exported = export.export(jax.jit(gradients))(leaves, jax.ShapeDtypeStruct((b, 256), jnp.float32))
    for ours, theirs in zip(exported.call(leaves, x), jax.jit(gradients)(leaves, x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * float(jnp.abs(theirs).max()))
