"""Which axis is cut over what, by the path of a leaf; packed weights with their scales; what the rules refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lowbit_jax as lb
from lowbit_jax.parallel import DECODER, Rules, make_mesh, shardings, table


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(fsdp=2, tensor=2)


def tree(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def specs(placed):
    return jax.tree.map(lambda s: s.spec, placed)


class TestRules:
    def test_the_last_axes_are_cut_and_layers_stacked_before_them_are_not(self, mesh):
        rules = Rules.of(("kernel", (None, ("tensor", "fsdp"))))
        placed = shardings({"a": tree(kernel=(8, 16)), "b": tree(kernel=(3, 8, 16), bias=(16,))}, mesh, rules)
        assert specs(placed) == {
            "a": {"kernel": P(None, ("tensor", "fsdp"))},
            "b": {"kernel": P(None, None, ("tensor", "fsdp")), "bias": P()},
        }

    def test_the_first_rule_decides_and_names_end_paths_at_a_slash(self, mesh):
        rules = Rules.of(("up/kernel", (None, "tensor")), ("kernel", ("fsdp", None)))
        placed = shardings({"up": tree(kernel=(4, 4)), "cup": tree(kernel=(4, 4))}, mesh, rules)
        assert specs(placed) == {"up": {"kernel": P(None, "tensor")}, "cup": {"kernel": P("fsdp", None)}}

    def test_logical_names(self, mesh):
        rules = Rules.of(("w", ("in", "out")), logical={"in": None, "out": ("tensor", "fsdp")})
        assert specs(shardings(tree(w=(4, 4)), mesh, rules)) == {"w": P(None, ("tensor", "fsdp"))}

    def test_equal_rules_are_one_static_argument(self):
        make = lambda: Rules.of(("w", ["in", None]), logical={"in": "fsdp"})
        assert make() == make() and hash(make()) == hash(make())

    @pytest.mark.parametrize(
        ("rules", "words"),
        [
            ((("w", (None, "tensr")),), "'w' names the axis 'tensr'.*Did you mean 'tensor'"),
            ((("v", (None, "tensor")),), r"\['v'\] name no leaf.*leaves: \['w'\]"),
            ((("w", ("tensor",)), ("w", ("fsdp",))), r"\['w'\] name no leaf.*an earlier rule"),
            ((("w", ("tensor", "tensor")),), "uses an axis of the mesh twice"),
            ((("w", (None, None, "tensor")),), "cuts 3 axes, and the leaf 'w' has 2"),
        ],
    )
    def test_rules_that_cannot_be(self, mesh, rules, words):
        with pytest.raises(ValueError, match=words):
            shardings(tree(w=(8, 8)), mesh, Rules.of(*rules))

    def test_rules_that_are_none(self):
        with pytest.raises(TypeError, match="is not .pattern, cuts."):
            Rules((("w", "tensor"),))
        with pytest.raises(ValueError, match="not a regular expression"):
            Rules.of(("*w", ("tensor",)))

    def test_a_mesh_that_does_not_divide_says_which_by_how_much_and_what_would(self, mesh):
        with pytest.raises(ValueError) as caught:
            shardings({"mlp": tree(w=(8, 18))}, mesh, Rules.of(("w", (None, ("tensor", "fsdp")))))
        for words in ("'mlp/w' has shape (8, 18)", "axis 1 of length 18", "4 parts (tensor=2 x fsdp=2)",
                      "2 are left over", "[1, 2, 3, 6, 9]", "padding by 2"):  # fmt: skip
            assert words in str(caught.value)

    def test_the_table(self, mesh):
        params = {"mlp": tree(w=(8, 16)), "norm": tree(scale=(8,))}
        lines = table(params, shardings(params, mesh, Rules.of(("w", (None, "tensor"))))).splitlines()
        assert lines[1].split() == ["mlp/w", "8x16", "-,", "tensor", "256"]
        assert lines[2].split() == ["norm/scale", "8", "whole", "32"]


class TestPackedWeights:
    """The codes and scales of a weight lie where its elements lie: each device can decode its own part alone."""

    @pytest.mark.parametrize(
        ("quantizer", "cuts"),
        [
            (lb.quest_quantizer(4), (None, "tensor")),
            (lb.quest_quantizer(4), ("tensor", None)),
            (lb.quest_quantizer(3), ("fsdp", "tensor")),
            (lb.Quantizer(tiling=lb.scaling.PerTensor()), ("fsdp", "tensor")),
            (lb.Quantizer(format=lb.formats.INT4, tiling=lb.scaling.Group(16)), ("fsdp", "tensor")),
            (lb.block_quantizer(lb.formats.NVFP4), ("tensor", None)),
            (lb.Quantizer(format=lb.formats.INT8, tiling=lb.scaling.Block(16, 16)), ("fsdp", "tensor")),
        ],
        ids=lambda x: f"{x.format.name} {x.tiling.describe()}" if isinstance(x, lb.Quantizer) else str(x),
    )
    def test_a_device_decodes_its_part_alone(self, mesh, key, quantizer, cuts):
        weight = jax.random.normal(key, (256, 64)) * jnp.exp(jax.random.normal(jax.random.key(1), (1, 64)))
        packed = jax.jit(lambda w: quantizer.quantize(w, axis=0))(weight)
        values = jax.jit(lambda packed: packed.values())
        placed = shardings({"w": packed}, mesh, Rules.of(("w", cuts)))["w"]
        assert placed.words.spec == P(cuts[1], cuts[0])
        put = jax.tree.map(jax.device_put, packed, placed)
        whole = np.asarray(values(packed))
        index = NamedSharding(mesh, P(*cuts)).devices_indices_map(whole.shape)
        for n, device in enumerate(mesh.devices.flat):
            own = [next(s.data for s in leaf.addressable_shards if s.device == device) for leaf in jax.tree.leaves(put)]
            part = jax.tree.structure(put).unflatten(own)
            length = 256 // (1 if cuts[0] is None else 2)
            part = type(part)(**{**{f: getattr(part, f) for f in part.__dataclass_fields__}, "length": length})
            np.testing.assert_array_equal(np.asarray(values(part)), whole[index[device]], err_msg=f"device {n}")

    def test_stacked_layers(self, mesh, key):
        stacked = jax.random.normal(key, (3, 128, 64))
        packed = jax.jit(jax.vmap(lambda w: lb.quest_quantizer(4).quantize(w, axis=0)))(stacked)
        placed = shardings({"w": packed}, mesh, Rules.of(("w", (None, "tensor"))))["w"]
        assert placed.words.spec == P(None, "tensor", None) and placed.scales[0].spec == P(None, None, "tensor")

    def test_a_cut_through_a_tile_is_refused(self, mesh, key):
        quantizer = lb.block_quantizer(lb.formats.MXFP4)
        packed = jax.eval_shape(lambda w: quantizer.quantize(w, axis=0), jax.random.normal(key, (96, 8)))
        with pytest.raises(ValueError, match="'w': its contraction axis of 96 cannot be cut into 2 parts.*32 elements"):
            shardings({"w": packed}, mesh, Rules.of(("w", ("tensor", None))))


class TestModels:
    """Rules see a quantized and a packed model as they see the original."""

    def test_quantizing_and_packing_keep_the_cuts(self, mesh):
        class Decoder(nnx.Module):
            def __init__(self, rngs):
                self.embed = nnx.Embed(64, 128, rngs=rngs)
                self.up = nnx.Linear(128, 256, use_bias=False, rngs=rngs)
                self.down = nnx.Linear(256, 128, use_bias=False, rngs=rngs)

            def __call__(self, ids):
                return self.down(self.up(self.embed(ids)))

        model = Decoder(nnx.Rngs(0))
        place = lambda m: shardings(nnx.state(m, nnx.Param), mesh, DECODER)
        before = jax.tree.leaves(place(model))
        quantized = lb.quantize(model, lb.quest(4))
        assert jax.tree.leaves(place(quantized)) == before
        assert [s.spec for s in before] == [P("tensor", "fsdp"), P("tensor", "fsdp"), P(None, ("tensor", "fsdp"))]
        packed = lb.convert(quantized)
        forward = nnx.jit(lambda model, ids: model(ids))
        put = jax.tree.map(jax.device_put, nnx.state(packed, nnx.Param), place(packed))
        assert put["up"]["kernel"].get_value().words.sharding.spec == P(("tensor", "fsdp"), None)
        ids = jnp.arange(8)[None]
        expected = forward(packed, ids)
        nnx.update(packed, put)
        np.testing.assert_allclose(forward(packed, ids), expected, atol=1e-5)

    def test_metadata_of_the_parameters_stays(self, mesh):
        with jax.set_mesh(mesh):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "tensor"))
            layer = nnx.Linear(128, 64, kernel_init=init, rngs=nnx.Rngs(0))
            before = nnx.get_partition_spec(nnx.state(layer))["kernel"].get_value()
            after = nnx.get_partition_spec(nnx.state(lb.quantize(layer, lb.quest(4))))["kernel"].get_value()
        assert before == after == P(None, "tensor")


def test_a_seal_lies_on_every_device(key, mesh):
    """`lb.convert` seals its weights; the seal is small, and no part of the array."""
    packed = {"w": lb.quest_quantizer(4).quantize(jax.random.normal(key, (64, 32)), axis=0).sealed()}
    placed = shardings(packed, mesh, Rules((("w", (None, "tensor")),)))
    assert placed["w"].seal.spec == P() and placed["w"].words.spec[0] == "tensor"
    moved = jax.device_put(packed, placed)["w"]
    np.testing.assert_array_equal(moved.dequantize(), packed["w"].dequantize())
