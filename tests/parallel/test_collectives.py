"""Packed collectives against the same sums and gathers in float, on four devices: values, gradients, bytes."""

import functools
import platform
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lowbit_jax as lb
from lowbit_jax.parallel import (
    Reduction,
    all_gather,
    all_gather_packed,
    all_reduce_packed,
    bytes_on_the_wire,
    make_mesh,
    reduce_scatter_packed,
    wire_quantizer,
)
from lowbit_jax.parallel.collectives import gather_qtensor

N = 4


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(fsdp=N)


@pytest.fixture(scope="module")
def weight():
    """Outputs of very different sizes, so that a scale of another row is seen."""
    spread = jnp.exp(2 * jax.random.normal(jax.random.key(1), (1, 128)))
    return jax.random.normal(jax.random.key(0), (256, 128)) * spread


def on_devices(function, mesh, into, out):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=into, out_specs=out, check_vma=False))


def gather(quantizer, mesh, **options):
    function = lambda w: all_gather_packed(w, quantizer, "fsdp", axis=1, contract=0, **options)
    return on_devices(function, mesh, P(None, "fsdp"), P())


ABSMAX = [
    lb.Quantizer(format=lb.formats.INT4),
    lb.Quantizer(format=lb.formats.INT8, tiling=lb.scaling.Group(32)),
    lb.Quantizer(format=lb.formats.INT3, tiling=lb.scaling.Block(16, 16)),
    lb.block_quantizer(lb.formats.MXFP4),
    lb.Quantizer(format=lb.formats.INT4, sparsity=lb.sparsity.NofM(2, 4)),
]


class TestGather:
    @pytest.mark.parametrize("quantizer", ABSMAX, ids=lambda q: f"{q.format.name} {q.tiling.describe()}")
    def test_equals_the_quantizer_on_the_whole_to_the_bit(self, mesh, weight, quantizer):
        """Largest magnitudes and roundings do not depend on the order of anything."""
        whole = gather(quantizer, mesh)(weight)
        np.testing.assert_array_equal(whole, jax.jit(functools.partial(quantizer, axis=0))(weight))

    @pytest.mark.parametrize("bits", [1, 4, 8])
    def test_equals_quest_on_the_whole(self, mesh, weight, bits):
        """The same codes; the scale is a sum of squares, within the rounding of 256 terms."""
        quantizer = lb.quest_quantizer(bits)
        whole = gather(quantizer, mesh, rotated=True)(weight)
        expected = jax.jit(functools.partial(quantizer.in_rotated_space, axis=0))(weight)
        np.testing.assert_allclose(whole, expected, rtol=256 * 2.0**-24)

    def test_along_the_contraction_axis_with_tiles_and_rotations_that_fit_the_shards(self, mesh, weight):
        quantizer = lb.Quantizer(format=lb.formats.INT4, tiling=lb.scaling.Group(32), rotation=lb.Hadamard(64))
        function = lambda w: all_gather_packed(w, quantizer, "fsdp", axis=0, contract=0)
        whole = on_devices(function, mesh, P("fsdp"), P())(weight)
        np.testing.assert_allclose(whole, quantizer(weight, axis=0), rtol=1e-5, atol=1e-5)

    def test_the_gradient_is_that_of_the_sum_over_devices(self, mesh, weight):
        quantizer = lb.quest_quantizer(4)
        cotangents = jax.random.normal(jax.random.key(2), (N, *weight.shape))

        def back(w, g):
            return jax.vjp(lambda w: all_gather_packed(w, quantizer, "fsdp", axis=1, contract=0), w)[1](g[0])[0]

        found = on_devices(back, mesh, (P(None, "fsdp"), P("fsdp")), P(None, "fsdp"))(weight, cotangents)
        expected = jax.vjp(lambda w: quantizer(w, axis=0), weight)[1](cotangents.sum(0))[0]
        assert float(jnp.mean(expected == 0)) < 0.5
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))

    @pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
    def test_bytes(self, mesh, weight, bits):
        """(b + 0.13) / 16 of what bfloat16 weights would send; with K = 256 a row's float32 scale is 1/8 bit."""
        compiled = gather(lb.quest_quantizer(bits), mesh).lower(weight).compile()
        wire = bytes_on_the_wire(compiled)
        assert wire.by_kind().keys() == {"all-gather"}
        bfloat16 = 2 * weight.size * (N - 1) / N
        assert bits / 16 * bfloat16 < wire.sent <= (bits + 0.13) / 16 * bfloat16

    @pytest.mark.parametrize(
        ("quantizer", "axis", "words"),
        [
            (lb.quest_quantizer(4), 0, "cut the rotation's blocks of 128"),
            (lb.Quantizer(), 0, "axis 0 is cut into 4 shards.*tiles of row"),
            (lb.Quantizer(tiling=lb.scaling.PerTensor()), 1, "tiles of tensor"),
            (lb.block_quantizer(lb.formats.NVFP4), 1, "one scale for the tensor"),
        ],
    )
    def test_tiles_that_no_shard_holds_whole(self, mesh, weight, quantizer, axis, words):
        spec = P("fsdp") if axis == 0 else P(None, "fsdp")
        function = lambda w: all_gather_packed(w, quantizer, "fsdp", axis=axis, contract=0)
        with pytest.raises(ValueError, match=words):
            on_devices(function, mesh, spec, P())(weight)


@pytest.fixture(scope="module")
def terms():
    return jax.random.normal(jax.random.key(3), (N, 24, 100)) * jnp.exp(jnp.linspace(-3, 3, 24))[None, :, None]


class TestSums:
    def bound(self, terms, bits, hops):
        """Half a step a term: the step is the largest magnitude of a block (here: of the whole, to be simple) over
        2^(bits-1) - 1, one bfloat16 rounding apart; the second hop rounds the sum once more."""
        steps = jnp.abs(terms).max(axis=(1, 2)) / (2 ** (bits - 1) - 1)
        total = jnp.abs(terms).sum(0).max() / (2 ** (bits - 1) - 1)
        return float(1.02 * (steps.sum() / 2 + (total / 2 if hops == 2 else 0)))

    @pytest.mark.parametrize("bits", [4, 8])
    def test_reduce_scatter(self, mesh, terms, bits):
        quantizer = wire_quantizer(bits, block=25)
        function = lambda x: reduce_scatter_packed(x[0], quantizer, "fsdp", axis=0)
        found = on_devices(function, mesh, P("fsdp"), P("fsdp"))(terms)
        error = np.abs(found - terms.sum(0))
        assert 0 < error.max() <= self.bound(terms, bits, 1)
        assert error[:6].max() < error[18:].max() / 20, "a block's scale is its own"

    @pytest.mark.parametrize("bits", [4, 8])
    def test_all_reduce_in_two_hops(self, mesh, terms, bits):
        """Every device has the same bits, as parameters that drift apart would not."""
        quantizer = wire_quantizer(bits)
        function = lambda x: all_reduce_packed(x[0], quantizer, "fsdp")[None]
        found = np.asarray(on_devices(function, mesh, P("fsdp"), P("fsdp"))(terms))
        np.testing.assert_array_equal(found, np.broadcast_to(found[:1], found.shape))
        assert 0 < np.abs(found[0] - terms.sum(0)).max() <= self.bound(terms, bits, 2)

    def test_what_the_grid_holds_is_summed_exactly(self, mesh):
        terms = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (N, 8, 128)), jnp.float32).at[:, :, 0].set(127)
        function = lambda x: reduce_scatter_packed(x[0], wire_quantizer(8), "fsdp", axis=0)
        np.testing.assert_array_equal(on_devices(function, mesh, P("fsdp"), P("fsdp"))(terms), terms.sum(0))

    def test_stochastic_rounding_has_the_right_mean(self, mesh):
        """0.3 of a step, 4 devices, 4096 elements: the mean of the sums within 5 standard errors of 1.2."""
        terms = jnp.full((N, 32, 128), 0.3).at[:, :, 0].set(7.0)
        quantizer = wire_quantizer(4, stochastic=True)
        function = lambda x: reduce_scatter_packed(x[0], quantizer, "fsdp", axis=0, key=jax.random.key(0))
        found = np.asarray(on_devices(function, mesh, P("fsdp"), P("fsdp"))(terms))[:, 1:]
        assert len(np.unique(found)) == N + 1, "the devices draw independently"
        assert abs(found.mean() - 1.2) < 5 * (N * 0.21) ** 0.5 / found.size**0.5

    @pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
    def test_what_is_not_finite_stays_so_in_its_block_alone(self, mesh, terms, bad):
        function = lambda x: all_reduce_packed(x[0], wire_quantizer(8, block=100), "fsdp")
        found = np.asarray(on_devices(function, mesh, P("fsdp"), P())(terms.at[2, 5, 7].set(bad)))
        assert not np.isfinite(found[5, 7])
        assert np.isfinite(np.delete(found, 5, axis=0)).all()

    def test_bytes_of_int8_gradients(self, mesh, terms):
        """At most 0.55 of bfloat16's for the scatter, and of the two hops of a bfloat16 all-reduce."""
        quantizer, size = wire_quantizer(8), terms[0].size
        scatter = on_devices(lambda x: reduce_scatter_packed(x[0], quantizer, "fsdp", axis=1), mesh, P("fsdp"),
                             P(None, "fsdp"))  # fmt: skip
        both = on_devices(lambda x: all_reduce_packed(x[0], quantizer, "fsdp"), mesh, P("fsdp"), P())
        share = (N - 1) / N
        sent = bytes_on_the_wire(scatter.lower(terms).compile())
        assert sent.by_kind().keys() == {"all-to-all"} and 0.5 < sent.sent / (2 * size * share) <= 0.55
        sent = bytes_on_the_wire(both.lower(terms).compile())
        assert sent.by_kind().keys() == {"all-to-all", "all-gather"} and 0.5 < sent.sent / (4 * size * share) <= 0.55
        assert set(sent.of(kind="all-gather").collectives[0].dtypes) <= {"u8", "u16"}

    @pytest.mark.parametrize("bits", [3, 8])
    @pytest.mark.parametrize("size", [1, 20, 400, 2048, 2052])
    def test_no_bytes_for_what_is_not_there(self, mesh, size, bits):
        """`bits + 16 / block` bits an element for parts of every size, where `block` is that of a part in equal blocks
        of at most 128, and never more than floats. A part within one block is rounded as if it were padded to it."""
        terms = jnp.asarray(np.random.default_rng(size).normal(size=(N, size)), jnp.float32)
        function = on_devices(lambda x: all_reduce_packed(x[0], wire_quantizer(bits), "fsdp"), mesh, P("fsdp"), P())
        sent = bytes_on_the_wire(function.lower(terms).compile()).sent / (2 * (N - 1) / N)
        part = -(-size // N)
        blocks = -(-part // 128)
        codes = blocks * -(-part // blocks)
        assert codes - part < blocks
        assert sent == min(4 * size, N * (-(-codes * bits // 8) + 2 * blocks))
        if sent == 4 * size:
            np.testing.assert_allclose(function(terms), terms.sum(0), rtol=1e-6)
        elif blocks == 1:
            parts = jnp.pad(terms, ((0, 0), (0, N * part - size))).reshape(N, N, part)
            padded = function(jnp.pad(parts, ((0, 0), (0, 0), (0, 128 - part))).reshape(N, -1))
            np.testing.assert_array_equal(function(terms), padded.reshape(N, 128)[:, :part].reshape(-1)[:size])

    @pytest.mark.parametrize("size", [4, 40, 1100])
    def test_bytes_of_a_scatter_of_any_size(self, mesh, size):
        terms = jnp.asarray(np.random.default_rng(size).normal(size=(N, size)), jnp.bfloat16)
        function = lambda x: reduce_scatter_packed(x[0], wire_quantizer(8), "fsdp", axis=0)
        function = on_devices(function, mesh, P("fsdp"), P("fsdp"))
        sent = bytes_on_the_wire(function.lower(terms).compile())
        if size == 4:  # a scale for each code
            assert sent.by_kind().keys() <= {"reduce-scatter", "all-reduce"}
        else:
            blocks = -(-size // N // 128)
            assert sent.sent == (N - 1) / N * (size + (1 if size == 1100 else 0) * N + 2 * N * blocks)
        steps = float(jnp.abs(terms).max()) / 127
        found, expected = (np.asarray(x, np.float32) for x in (function(terms), terms.astype(jnp.float32).sum(0)))
        np.testing.assert_allclose(found, expected, atol=1.02 * N * steps / 2, rtol=2.0**-7)

    def test_nothing_and_one_number(self, mesh):
        quantizer = wire_quantizer(8)
        empty = jnp.ones((N, 0, 8), jnp.bfloat16)
        scatter = on_devices(lambda x: reduce_scatter_packed(x[0], quantizer, "fsdp", axis=1), mesh, P("fsdp"),
                             P(None, "fsdp"))  # fmt: skip
        both = on_devices(lambda x: all_reduce_packed(x[0], quantizer, "fsdp"), mesh, P("fsdp"), P())
        for function in (scatter, both):
            assert function(empty).shape == (0, 8) and function(empty).dtype == empty.dtype
            assert not bytes_on_the_wire(function.lower(empty).compile()).collectives
        assert float(both(jnp.arange(4.0))) == 6
        one = on_devices(lambda x: reduce_scatter_packed(x[0], quantizer, "fsdp", axis=0), mesh, P("fsdp"), P())
        with pytest.raises(ValueError, match="reduce_scatter_packed got a scalar.*4 parts.*lax.psum"):
            one(jnp.arange(4.0))

    def test_parts_that_do_not_come_out(self, mesh):
        function = lambda x: reduce_scatter_packed(x[0], wire_quantizer(8), "fsdp", axis=0)
        with pytest.raises(
            ValueError, match="axis 0 of length 10 cannot be cut into 4 parts.*2 are left over. Pad by 2"
        ):
            on_devices(function, mesh, P("fsdp"), P("fsdp"))(jnp.ones((N, 10, 3)))

    def test_widths(self):
        for bits in (1, 9):
            with pytest.raises(ValueError, match=f"bits={bits}.*2 to 8"):
                wire_quantizer(bits)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: all_reduce_packed(x, wire_quantizer(8), "fsdp"), "all_reduce_packed got int32; .*lax.psum, which"),
        (lambda x: reduce_scatter_packed(x, wire_quantizer(8), "fsdp", axis=0), "reduce_scatter_packed got int32"),
        (lambda x: Reduction(wire_quantizer(8)).everywhere(x, "fsdp"), "all_reduce_packed got int32"),
        (lambda x: all_gather_packed(x, lb.Quantizer(), "fsdp", axis=0, contract=1), "all_gather_packed got int32"),
    ],
)
def test_integers_are_refused(mesh, function, words):
    """Their sum would come rounded, and what that leaves behind the point cut off."""
    with pytest.raises(TypeError, match=words):
        on_devices(function, mesh, P(), P())(jnp.full((N, 300), 300))


@pytest.mark.parametrize("axis", [2, -3])
@pytest.mark.parametrize(
    ("who", "function"),
    [
        ("all_gather", lambda x, axis: all_gather(x, "fsdp", axis)),
        ("Reduction.scatter", lambda x, axis: Reduction().scatter(x, "fsdp", axis)),
        ("reduce_scatter_packed", lambda x, axis: reduce_scatter_packed(x, wire_quantizer(8), "fsdp", axis=axis)),
        ("all_gather_packed", lambda x, axis: all_gather_packed(x, lb.Quantizer(), "fsdp", axis=axis, contract=0)),
        ("all_gather_packed", lambda x, axis: all_gather_packed(x, lb.Quantizer(), "fsdp", axis=1, contract=axis)),
        ("gather_qtensor", lambda x, axis: gather_qtensor(lb.Quantizer().quantize(x), "fsdp", axis=axis).words),
    ],
)
def test_an_axis_that_is_not_there(mesh, who, function, axis):
    with pytest.raises(ValueError, match=f"{who}: axis {axis} of an array of 2 dimensions. Give an axis from -2 to 1"):
        on_devices(lambda x: function(x, axis), mesh, P(), P())(jnp.ones((8, 8)))


def test_a_float_gather_with_packed_gradients(mesh, weight):
    cotangents = jax.random.normal(jax.random.key(2), (N, *weight.shape))

    def back(w, g):
        return jax.vjp(lambda w: all_gather(w, "fsdp", 1, Reduction(wire_quantizer(8))), w)[1](g[0])[0]

    mapped = on_devices(back, mesh, (P(None, "fsdp"), P("fsdp")), P(None, "fsdp"))
    expected = cotangents.sum(0)
    error = np.linalg.norm(mapped(weight, cotangents) - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.02
    assert bytes_on_the_wire(mapped.lower(weight, cotangents).compile()).by_kind().keys() == {"all-to-all"}


def test_a_sum_over_a_cut_contraction_is_one_collective_of_the_size_of_the_scales(mesh, weight):
    """A fit reads the whole row: the shards exchange one number a row, and not the row."""
    quantizer = lb.Quantizer(format=lb.formats.INT4, fit=lb.scaling.rms_optimal)
    cut = NamedSharding(mesh, P("fsdp", None))
    function = jax.jit(functools.partial(quantizer, axis=0), in_shardings=cut, out_shardings=cut)
    wire = bytes_on_the_wire(function.lower(weight).compile())
    assert [(c.kind, c.array_bytes) for c in wire.collectives] == [("all-reduce", 4 * 128)]
    np.testing.assert_allclose(function(weight), quantizer(weight, axis=0), rtol=256 * 2.0**-24)
    largest = jax.jit(functools.partial(lb.Quantizer(), axis=0), in_shardings=cut, out_shardings=cut)
    np.testing.assert_array_equal(largest(weight), jax.jit(functools.partial(lb.Quantizer(), axis=0))(weight))


def test_a_gathered_weight_is_sealed_as_the_longer_one(key, mesh):
    """Its length is part of what its seal says."""
    q = lb.Quantizer(format=lb.formats.INT4, tiling=lb.scaling.Group(32))
    x = jax.random.normal(key, (8, 32 * N))
    seal = q.quantize(x).sealed().seal.shape

    def whole(x):
        gathered = gather_qtensor(q.quantize(x).sealed(), "fsdp", axis=1)
        assert gathered.seal.shape == seal
        return gathered.dequantize()

    np.testing.assert_array_equal(on_devices(whole, mesh, P(None, "fsdp"), P())(x), q.quantize(x).dequantize())


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="int8 products by XLA are for x86 CPUs"
)
def test_a_gathered_weight_is_multiplied_as_codes():
    """Its scales came with its words: the same result as of the whole layer, by an int8 product."""
    layer = lb.quantize(nnx.Linear(128, 64, use_bias=False, rngs=nnx.Rngs(0)), lb.quest(4))
    mesh = lb.parallel.make_mesh(fsdp=2)
    graph, params = nnx.split(layer)
    placed = jax.tree.map(lambda _: NamedSharding(mesh, P(None, "fsdp")), params)
    x = jax.random.normal(jax.random.key(0), (8, 128))

    def local(params, x):
        return lb.parallel.gather_layers(nnx.merge(graph, params), placed)(x)

    specs = jax.tree.map(lambda _: P(None, "fsdp"), params)
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs, P("fsdp")), out_specs=P("fsdp")))
    assert re.search(r"dot_general .*xi8>, tensor<[\dx]*xi8>\)", run.lower(params, x).as_text())
    np.testing.assert_allclose(run(params, x), layer(x), atol=1e-5)
