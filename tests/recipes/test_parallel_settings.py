"""What the flags of parallel training mean and refuse: layouts, growing batches, microbatches by memory, optimizers."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from recipes import checkpoints, gradients, llama, memory, optimizer, pretrain, train_loop
from recipes.layout import Layout, fetch
from recipes.ramp import Ramp

SMALL = llama.preset("smoke")


def batch(seed: int, rows: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, (rows, 17)).astype(np.int32)


def build(layout=None, bits=4):
    make = lambda: llama.build(dataclasses.replace(SMALL, kv_heads=SMALL.heads), 256)
    model = make() if layout is None else layout.attach(layout.build(make))
    return model if bits is None else lb.quantize(model, rules=[("blocks", lb.quest(bits))])


def steps_of(layout=None, count=2, bits=None, moments=None, **options):
    """Losses and the last state of `count` steps; bits are the model's, `moments` those of the optimizer's."""
    graph, params, rest = nnx.split(build(layout, bits), nnx.Param, ...)
    adamw = optimizer.AdamW(peak=1e-2, steps=10, bits=moments, **options)
    state = train_loop.first_state(params, adamw, layout)
    if layout is not None:
        state, rest = layout.place(state, layout.state_shardings(state)), layout.everywhere(rest)
    step = train_loop.make_step(graph, adamw, 1, None, layout)
    losses = []
    for i in range(count):
        state, numbers = step(state, rest, batch(i) if layout is None else layout.batch(batch(i)))
        losses.append(float(numbers["loss"]))
    return losses, state


def fetched(monkeypatch) -> list:
    """From now on gets an entry for each array whose value this process asks for."""
    fetches, kind = [], type(jnp.zeros(1))
    value = kind._value
    monkeypatch.setattr(kind, "_value", property(lambda array: fetches.append(array.shape) or value.fget(array)))
    return fetches


@pytest.fixture(scope="module")
def plain():
    return steps_of()


class TestLayout:
    def test_steps_on_a_mesh(self, plain, monkeypatch):
        """One trace and one program for all of them, and nothing is fetched between them."""
        layout, traces = Layout(mesh=lb.parallel.make_mesh(fsdp=2, tensor=2)), []
        counted = lambda model, tokens, loss=gradients.next_token_loss: traces.append(1) or loss(model, tokens)
        monkeypatch.setattr(gradients, "next_token_loss", counted)
        graph, params, rest = nnx.split(build(layout, None), nnx.Param, ...)
        adamw = optimizer.AdamW(peak=1e-2, steps=10)
        state = train_loop.first_state(params, adamw, layout)
        state, rest = layout.place(state, layout.state_shardings(state)), layout.everywhere(rest)
        step, waiting = train_loop.make_step(graph, adamw, 1, None, layout), []
        for i in range(3):
            state, numbers = step(state, rest, layout.batch(batch(i)))
            waiting.append(numbers["loss"])
            if i == 0:
                fetches = fetched(monkeypatch)
        assert (len(traces), step._cache_size(), fetches) == (1, 1, [])
        losses = [float(loss) for loss in waiting[:2]]
        assert fetches, "this is how a fetch is seen"
        np.testing.assert_allclose(losses, plain[0], rtol=1e-5)
        moment = state["optimizer"][1].mu["blocks"]["mlp"]["down"]["kernel"][...]
        assert moment.sharding == state["params"]["blocks"]["mlp"]["down"]["kernel"][...].sharding
        assert moment.sharding.shard_shape(moment.shape)[2] == moment.shape[2] // 2

    def test_low_bit_moments_start_where_they_stay(self):
        """Their words are never whole on a device: a quarter of them on each of four."""
        layout = Layout(mesh=lb.parallel.make_mesh(fsdp=2, tensor=2))
        graph, params, _ = nnx.split(build(layout, None), nnx.Param, ...)
        state = train_loop.first_state(params, optimizer.AdamW(peak=1e-2, steps=10, bits=8), layout)
        places = jax.tree.leaves(layout.state_shardings(state)["optimizer"])
        words = [leaf for leaf in jax.tree.leaves(state["optimizer"]) if leaf.dtype == jnp.uint8]
        assert words
        for leaf in words:
            assert leaf.addressable_shards[0].data.size == leaf.size // 4
        for leaf, place in zip(jax.tree.leaves(state["optimizer"]), places, strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)

    def test_a_checkpoint_and_the_model_at_the_end_stay_off_the_devices(self, tmp_path):
        """What is read is NumPy, of which `place` gives each device its part; what is fetched is NumPy, keys apart."""
        layout = Layout(mesh=lb.parallel.make_mesh(fsdp=4))
        tree = {"w": jnp.arange(64.0).reshape(8, 8), "count": jnp.int32(3)}
        store = checkpoints.Checkpoints(tmp_path / "c")
        store.save(1, tree)
        _, found, _ = store.latest(tree)
        assert {type(leaf) for leaf in jax.tree.leaves(found)} == {np.ndarray}
        place = jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec(None, "fsdp"))
        placed = layout.place({"w": found["w"]}, {"w": place})["w"]
        assert {shard.data.shape for shard in placed.addressable_shards} == {(8, 2)}
        back = fetch({"w": placed, "key": jax.random.key(3)})
        assert type(back["w"]) is np.ndarray
        np.testing.assert_array_equal(back["w"], tree["w"])
        assert back["key"] == jax.random.key(3)

    def test_a_model_is_the_same_wherever_it_is_made(self):
        there = build(Layout(mesh=lb.parallel.make_mesh(fsdp=2, tensor=2)), bits=None)
        for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (build(bits=None), there)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)

    @pytest.mark.parametrize("compress", ["int8", pytest.param("sign", marks=pytest.mark.slow)])
    def test_compressed_gradients_keep_what_they_did_not_send(self, plain, compress):
        losses, state = steps_of(Layout(mesh=lb.parallel.make_mesh(data=2, fsdp=2), compress=compress))
        np.testing.assert_allclose(losses, plain[0], rtol=0.01)
        assert losses[0] == pytest.approx(plain[0][0], rel=1e-5)
        errors = jax.tree.leaves(state["errors"])
        assert all(e.shape[0] == 2 for e in errors) and any(float(jnp.abs(e).max()) > 0 for e in errors)

    def test_the_optimizer_waits_in_the_hosts_memory(self, plain):
        losses, state = steps_of(Layout(mesh=lb.parallel.make_mesh(data=2), offload=True))
        np.testing.assert_allclose(losses, plain[0], rtol=1e-5)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state["optimizer"])}
        assert kinds == {"pinned_host"} and state["skipped"].sharding.memory_kind == "device"

    @pytest.mark.parametrize(
        ("sizes", "options", "words"),
        [
            ({"tensor": 2, "fsdp": 2}, {"gather": "packed"}, "tensor=2, whose sums XLA places"),
            ({"data": 2}, {"gather": "packed"}, "over the axis fsdp, which is 1 long"),
            ({"data": 1}, {"reduce": 8}, "--reduce takes effect among devices"),
            ({"data": 2, "replica": 2}, {}, "replica=2 cuts neither batch nor weights"),
            ({"data": 2, "replica": 1}, {}, "replica=1 cuts neither batch nor weights"),
            ({"fsdp": 2}, {"compress": "int8"}, "--compress takes effect over the axis data"),
            ({"data": 2}, {"compress": "int8", "reduce": 8}, "Take one"),
        ],
    )
    def test_what_cannot_take_effect(self, sizes, options, words):
        with pytest.raises(ValueError, match=words):
            Layout(mesh=lb.parallel.make_mesh(**sizes), **options)

    def test_no_host_memory(self, monkeypatch):
        class Device:
            def addressable_memories(self):
                return [type("Memory", (), {"kind": "device"})]

        mesh = type("Mesh", (), {"devices": np.asarray([Device()]), "shape": {"data": 1, "fsdp": 1, "tensor": 1}})
        with pytest.raises(ValueError, match="pinned_host memory, and this backend has device"):
            Layout(mesh=mesh(), offload=True)

    def test_a_batch_that_does_not_come_out(self):
        layout = Layout(mesh=lb.parallel.make_mesh(data=2, fsdp=2))
        with pytest.raises(
            ValueError, match="batch of 12 .*into 4 parts .data=2 x fsdp=2. of 2.* 4 are left.* such as 16"
        ):
            layout.check_batch(12, 2)

    def test_one_device_needs_no_layout(self):
        assert pretrain.layout_of(pretrain.Pretrain()) is None
        assert pretrain.layout_of(pretrain.Pretrain(offload_optimizer=True)).mesh.size == 1
        layout = pretrain.layout_of(pretrain.Pretrain(mesh="data=2,fsdp=2", gather="packed", reduce="int4"))
        assert (layout.gather, layout.reduce, layout.mesh.size) == ("packed", 4, 4)


class TestRamp:
    def test_sizes_of_the_steps(self):
        ramp = Ramp.of("4x2,8x3", 16, microbatches=2)
        assert [ramp.at(step) for step in range(1, 8)] == [4, 4, 8, 8, 8, 16, 16]
        assert (ramp.sizes, ramp.unit) == ((4, 8, 16), 4)
        assert [ramp.microbatches(size) for size in ramp.sizes] == [1, 1, 2]

    def test_every_sequence_comes_once(self):
        data = iter(np.arange(100).reshape(-1, 2))
        ramp = Ramp.of("2x2,4x1", 6)
        assert np.concatenate([ramp.next_batch(data, step) for step in range(1, 6)]).tolist() == list(range(20))

    def test_none(self):
        ramp = Ramp.of(None, 12, 3)
        assert (ramp.at(1), ramp.unit, ramp.microbatches(12)) == (12, 12, 3)

    @pytest.mark.parametrize(
        ("text", "words"),
        [("4", "is not sequences x steps"), ("0x5", "is not sequences x steps"), ("4x", "is not sequences x steps"),
         ("32x5", "goes up to the batch of 16"), ("8x5,4x5", "goes up"), ("12x5", "microbatches of 8")],
    )  # fmt: skip
    def test_what_is_none(self, text, words):
        with pytest.raises(ValueError, match=words):
            Ramp.of(text, 16, 2)


class TestMemory:
    @pytest.mark.parametrize(("text", "count"), [("2GB", 2e9), ("512 MB", 512e6), ("1e9", 1e9), ("1.5g", 1.5e9)])
    def test_amounts(self, text, count):
        assert memory.budget(text) == count

    @pytest.mark.parametrize("text", ["much", "-1GB", "0", "2 apples", ".", "1e400GB", "1e300TB"])
    def test_what_is_no_amount(self, text):
        with pytest.raises(ValueError, match="is not an amount of memory"):
            memory.budget(text)

    def test_a_device_that_does_not_tell(self):
        with pytest.raises(ValueError, match="Pass --memory-budget"):
            memory.budget(None)

    def compiled(self, n):
        """A program of 150 bytes, and 1000 more over the number of microbatches."""
        sizes = {"argument": 90, "output": 110, "alias": 50, "temp": 1000 // n}
        stats = types.SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
        return types.SimpleNamespace(memory_analysis=lambda: stats, n=n)

    def test_the_fewest_microbatches_that_fit(self, capsys):
        chosen = memory.choose(self.compiled, 8, 400)
        assert (chosen.microbatches, chosen.bytes, chosen.compiled.n) == (4, 400, 4)
        assert "microbatches: 4" in capsys.readouterr().out
        with pytest.raises(ValueError, match="even 8 microbatches of one sequence take 275 B.*--remat full"):
            memory.choose(self.compiled, 8, 274)

    def test_a_ramp_is_cut_too(self, monkeypatch):
        """Halves of 12 fit, but 8 sequences are no multiple of 6; thirds cut both."""
        plan = train_loop.Plan.of(SMALL, batch=12, batch_ramp="8x1", microbatches="auto", memory_budget="650")
        steps = train_loop.Steps(None, plan, plan.ramp(), None, None)
        monkeypatch.setattr(steps, "compiled_step", lambda batch, state, rest, n: self.compiled(n))
        steps.choose_microbatches({}, None)
        assert [(size, steps.ramp.microbatches(size)) for size in steps.ramp.sizes] == [(8, 2), (12, 3)]

    def test_a_ramp_that_the_devices_do_not_divide_is_refused_at_the_start(self):
        plan = train_loop.Plan.of(SMALL, batch=8, batch_ramp="3x1", microbatches="auto", memory_budget="1GB")
        steps = train_loop.Steps(None, plan, plan.ramp(), None, Layout(mesh=lb.parallel.make_mesh(data=2)))
        with pytest.raises(ValueError, match="a batch of 3 sequences cannot be cut into 2 parts"):
            steps.choose_microbatches({}, None)

    @pytest.mark.slow
    def test_more_microbatches_take_less_memory(self):
        graph, params, rest = nnx.split(build(bits=None), nnx.Param, ...)
        adamw = optimizer.AdamW(peak=1e-2, steps=10)
        state = jax.eval_shape(lambda: train_loop.first_state(params, adamw))
        cut = lambda n: train_loop.make_step(graph, adamw, n).lower(state, rest, batch(0)).compile()
        sizes = {n: memory.step_bytes(cut(n)) for n in (1, 2, 8)}
        arguments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        assert sizes[1] > sizes[2] > sizes[8] > arguments, "parameters and moments are there once"

    def test_a_budget_without_auto(self):
        with pytest.raises(ValueError, match="goes with --microbatches auto"):
            train_loop.Plan.of(SMALL, memory_budget="1GB")


class TestOptimizer:
    @pytest.mark.slow
    def test_low_bit_moments(self, plain):
        losses, state = steps_of(moments=8)
        np.testing.assert_allclose(losses, plain[0], rtol=0.02)
        size = lambda state: sum(leaf.nbytes for leaf in jax.tree.leaves(state["optimizer"]))
        assert size(state) < 0.4 * size(plain[1])

    def test_parameters_in_bfloat16(self, plain):
        losses, state = steps_of(param_dtype="bfloat16")
        assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("bfloat16")}
        np.testing.assert_allclose(losses, plain[0], rtol=0.02)

    def test_a_loss_scale_halves_and_the_step_is_skipped(self):
        """An infinite embedding makes every step that reads it not finite; the scale goes down, nothing else moves."""
        model = build(bits=None)
        model.embed.embedding[...] = model.embed.embedding[...].at[255].set(jnp.inf)
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        adamw = optimizer.AdamW(peak=1e-2, steps=10, loss_scale=True)
        true = gradients.next_token_loss(model, batch(0))
        state = train_loop.first_state(params, adamw)
        step = train_loop.make_step(graph, adamw)
        state, numbers = step(state, rest, batch(0))
        assert float(numbers["loss"]) == pytest.approx(float(true), rel=1e-5) and numbers["loss_scale"] == 2**15
        before = jax.tree.map(np.array, state["params"])
        poisoned = batch(1)
        poisoned[2, 5] = 255
        state, numbers = step(state, rest, poisoned)
        assert (int(state["skipped"]), float(lb.optim.current_loss_scale(state["optimizer"]))) == (1, 2**14)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state["params"]), before)


class TestChecksumOfParts:
    def test_any_cut_gives_the_same_sum_and_any_flip_another(self):
        rng = np.random.default_rng(0)
        for dtype in (np.float32, np.uint8, np.int32):
            x = rng.integers(0, 255, (6, 8, 10)).astype(dtype)
            whole = checkpoints.sum64_of_part(x, x.shape)
            cuts = [(slice(a, a + 3), slice(b, b + 4), slice(None)) for a in (0, 3) for b in (0, 4)]
            assert sum(checkpoints.sum64_of_part(x[c], x.shape, c) for c in cuts) % 2**64 == whole
            flipped = x.copy()
            flipped.reshape(-1).view(np.uint8)[rng.integers(x.nbytes)] ^= 1
            swapped = x.copy()
            swapped[0, 0, :2] = swapped[0, 0, 1::-1]
            assert checkpoints.sum64_of_part(flipped, x.shape) != whole
            assert (swapped == x).all() or checkpoints.sum64_of_part(swapped, x.shape) != whole
        assert checkpoints.sum64_of_part(np.float32(2.0), ()) != checkpoints.sum64_of_part(np.float32(3.0), ())
