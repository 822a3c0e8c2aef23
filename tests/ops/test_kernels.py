"""Products through the kernels, interpreted, against the same products by XLA; and who is told what cannot run."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

import lowbit_jax as lb
from lowbit_jax.ops import backend, integer_product, pack_rhs, packed_product, quantize_rhs
from lowbit_jax.ops.dot_general import prepare_rhs
from lowbit_jax.ops.packed_product import word_bits
from lowbit_jax.ops.plane_tensor import to_planes
from lowbit_jax.scaling import Group
from pallas_kernels import both_ways, planes, tuning
from pallas_kernels.matmul_a16 import MOST_OF_A_GROUP, matmul_a16
from tests.methods import reference as quest_reference

NUMBERS = (((2,), (0,)), ((), ()))
GROUPED = lb.LinearRecipe(out=lb.Gemm(rhs=lb.Quantizer(tiling=Group(64), format=lb.formats.get("int4"))))
RECIPES = {
    "quest W1A1": lb.quest(1),
    "quest W4A4": lb.quest(4),
    "quest W3A16": lb.quest(3, activations=False),
    "bitnet": lb.methods.get("bitnet"),
    "int4 groups": GROUPED,
}


def operands(dtype=jnp.bfloat16, k=256, free=(6, 8)):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((3, 5, k)), dtype)
    return x, jnp.asarray(random.standard_normal((k, *free)) * 0.1, jnp.float32)


@functools.partial(jax.jit, static_argnames=("recipe", "numbers"))
def gradients(x, w, g, recipe, numbers=NUMBERS):
    """The product and what its backward answers to the cotangent g, in one program."""
    y, back = jax.vjp(lambda x, w: lb.dot_general(x, w, numbers, recipe=recipe), x, w)
    return y, *back(g)


pack = jax.jit(lambda recipe, w: pack_rhs(w, NUMBERS, recipe), static_argnums=0)
in_planes = jax.jit(to_planes, static_argnums=(1, 2))


def assert_close(a, b, tolerance):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("name", RECIPES)
def test_packed_products(name):
    recipe = RECIPES[name]
    x, w = operands()
    packed = pack(recipe, w)
    run = jax.jit(lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=recipe))
    values = jax.jit(lambda packed: packed.values())
    by_xla = jax.jit(lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=recipe.with_implementation("reference")))
    expected, whole = {"auto": run(x, packed), "reference": by_xla(x, packed)}, values(packed)
    planes = in_planes(packed, word_bits(recipe.out.lhs))
    assert planes.shape == packed.shape and planes.layout == "planes/1"
    np.testing.assert_array_equal(values(planes), whole)
    for implementation in ("auto", "reference", "interpret"):
        planes = dataclasses.replace(planes, implementation=implementation)
        y = run(x, planes)
        assert y.dtype == x.dtype
        if implementation == "interpret":
            assert_close(y, expected["reference"], 2.0**-6)  # two roundings to bfloat16
        else:
            np.testing.assert_array_equal(y, expected[implementation])


def test_gradients_through_a_packed_product_are_the_references():
    x, w = operands()
    packed = pack(lb.quest(4), w)
    planes = in_planes(packed, 8, "interpret")
    loss = lambda x, w: jnp.sum(lb.dot_general(x, w, NUMBERS, recipe=lb.quest(4)).astype(jnp.float32) * 0.5)
    gradient = jax.jit(jax.grad(loss))
    assert_close(gradient(x, planes), gradient(x, packed), 0)


def folded(g, s, e):
    """sum_n Q(g[m, n] s[n]) e[n, k] in float64, Q absmax int8 of each row."""
    weighted = g * s[None, :]
    step = np.abs(weighted).max(1, keepdims=True) / 127
    return np.round(weighted / step) * step @ e


def quest_in_float64(x, w, g, bits, block, backward):
    """(y, dx, dw) of x [M, K], w [N, K] and the cotangent g [M, N]."""
    if backward is None:
        return quest_reference.linear(x, w, g, bits, block)
    alpha = quest_reference.alpha_star(bits)
    outer = {None: 1.25}.get(block, 1.30) if bits == 1 else None
    hats, masks, steps = [], [], []
    for u in (x, w):
        hat, mask = quest_reference.quantize(u, bits, alpha, block, outer)
        hats.append(hat)
        masks.append(mask)
        steps.append(2 * alpha / (2**bits - 1) * np.sqrt(np.mean(u**2, axis=-1)))
    grids = [hat / step[:, None] for hat, step in zip(hats, steps, strict=True)]
    dx, dw = folded(g, steps[1], grids[1]), folded(g.T, steps[0], grids[0])
    back = lambda d, mask: quest_reference.rotate(d * mask, block)
    return hats[0] @ hats[1].T, back(dx, masks[0]), back(dw, masks[1])


@pytest.mark.parametrize(("bits", "block", "backward"), [
    (1, 128, None), (4, 128, None), (4, 128, 8), (8, None, 8),
])  # fmt: skip
def test_integer_training_products(bits, block, backward):
    """Forward and both gradients of the fused kernels, and of XLA, against the same in float64 NumPy.

    Both round to bfloat16 twice on the way: the product and its rotation, or the operands and the product."""
    x, w = operands(free=(3, 8))
    g = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 3, 8)), jnp.bfloat16)
    flat = lambda a, *shape: np.asarray(a, np.float64).reshape(*shape)
    y, dx, dw = quest_in_float64(flat(x, 15, 256), flat(w, 256, 24).T, flat(g, 15, 24), bits, block, backward)
    expected = y.reshape(g.shape), dx.reshape(x.shape), dw.T.reshape(w.shape)
    for implementation in ("reference", "interpret"):
        recipe = lb.quest(bits, block=block, backward=backward).with_implementation(implementation)
        for got, exact, like in zip(gradients(x, w, g, recipe), expected, (x, x, w), strict=True):
            assert got.dtype == like.dtype
            assert_close(got, exact, 2.0**-6)


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
def test_a_row_that_is_not_finite_is_nan_on_every_path(implementation):
    x, w = operands(free=(32,))
    x = x.at[0, 1, 7].set(jnp.nan).at[0, 2, 3].set(jnp.inf).at[1, 4, 0].set(3e19)
    recipe = lb.quest(4)
    planes = in_planes(pack(recipe, w), 8, implementation)
    for y in (lb.dot_general(x, w, NUMBERS, recipe=recipe.with_implementation(implementation)),
              lb.dot_general(x, planes, NUMBERS, recipe=recipe)):  # fmt: skip
        rows = np.isnan(np.asarray(y, np.float32))
        assert np.argwhere(rows.all(-1)).tolist() == [[0, 1], [0, 2], [1, 4]] and rows.sum() == 3 * 32
        assert np.isfinite(np.asarray(y, np.float32)[~rows]).all()


def test_a_weight_whose_contraction_is_last():
    """Nothing is transposed on the way: rows along the last axis, gradients in the same layout."""
    x, w = operands(k=128, free=(16,))
    recipe = lb.quest(4, backward=8).with_implementation("interpret")
    g = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 16)), jnp.bfloat16)
    y, *back = gradients(x, w.T, g, recipe, (((2,), (1,)), ((), ())))
    exact, *exact_back = gradients(x, w, g, recipe)
    assert_close(y, exact, 0)
    for got, expected in zip(back, exact_back, strict=True):
        assert_close(got.T if got.ndim == 2 else got, expected, 2.0**-6)


def test_long_contractions_are_summed_in_parts(monkeypatch):
    """More tokens than an int32 sum holds: float32 sums of integer ones."""
    x, w = operands(free=(16,))
    g = jnp.ones((3, 5, 16), jnp.bfloat16)
    recipe = lb.quest(4, backward=8).with_implementation("interpret")
    gradient = lambda w: jax.vjp(lambda w: lb.dot_general(x, w, NUMBERS, recipe=recipe), w)[1](g)[0]

    def run():
        """The result and how many kernels the program has; a function of its own, so that it is traced anew."""
        traced = jax.jit(lambda w: gradient(w)).trace(w)
        return traced.lower().compile()(w), str(traced.jaxpr).count("pallas_call[")

    whole, once = run()
    monkeypatch.setattr(integer_product, "_too_large", lambda *_: None)
    monkeypatch.setattr(integer_product, "_TERMS", 6)  # 15 tokens: three parts
    parted, kernels = run()
    assert kernels > once
    assert_close(parted, whole, 2.0**-8)


def test_a_prepared_weight_leaves_the_activation_to_the_kernel():
    x, w = operands(free=(16,))
    g = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 16)), jnp.bfloat16)
    recipe = lb.quest(4)
    ready = jax.jit(lambda w: quantize_rhs(w, NUMBERS, recipe))(w)
    prepared = recipe.with_rhs_ready()
    found, wanted = (gradients(x, ready, g, prepared.with_implementation(i)) for i in ("interpret", "reference"))
    for got, expected in zip(found, wanted, strict=True):
        assert got.dtype == expected.dtype
        assert_close(got, expected, 2.0**-6)
    with pytest.raises(NotImplementedError, match="codes are not at hand"):
        r = lb.quest(4, backward=8).with_rhs_ready().with_implementation("interpret")
        lb.dot_general(x, ready, NUMBERS, recipe=r)


@pytest.mark.parametrize(("bits", "backward"), [(1, None), (4, 8), (8, 8)])
def test_a_prepared_weight_brings_its_codes(bits, backward):
    """By its scales: the same product and gradients as of a weight that is quantized inside."""
    x, w = operands(free=(16,))
    g = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 16)), jnp.bfloat16)
    recipe = lb.quest(bits, backward=backward).with_implementation("interpret")
    ready, back = jax.vjp(jax.jit(lambda w: prepare_rhs(w, NUMBERS, recipe)), w)
    run = jax.jit(lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=recipe.with_rhs_ready()))
    assert str(jax.make_jaxpr(run)(x, ready)).count("matmul_i8") >= 1
    y, pull = jax.vjp(run, x, ready)
    dx, dready = pull(g)
    for got, expected in zip((y, dx, *back(dready)), gradients(x, w, g, recipe), strict=True):
        assert got.dtype == expected.dtype
        assert_close(got, expected, 2.0**-6)


def test_a_training_product_keeps_codes_and_bits():
    """What the backward is given: half a byte an element of each operand at 4 bits, and one bit of mask."""
    x, w = operands(k=512, free=(64,))
    recipe = lb.quest(4).with_implementation("interpret")
    back = jax.eval_shape(
        lambda x, w: jax.vjp(lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=recipe), x, w)[1], x, w
    )
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))
    elements = (32 + 64) * 512  # 15 rows are stored as 32
    assert kept <= elements * 5 / 8 + 4 * (15 + 64) + 64


def test_what_cannot_run_says_why():
    x, w = operands()
    recipe = lb.quest(4)
    packed, sparse, floats = (pack(r, w) for r in (recipe, lb.quest(4, sparsity="2:4"), lb.quest("e2m1")))
    run = lambda x, w, recipe=recipe: lb.dot_general(x, w, NUMBERS, recipe=recipe)
    for call, error, said in [
        (lambda: run(x, in_planes(packed, 8, "kernel")), NotImplementedError, "NVIDIA GPU"),
        (lambda: run(x, w, recipe.with_implementation("kernel")), NotImplementedError, "NVIDIA GPU"),
        (lambda: run(x.astype(jnp.float32), w, recipe.with_implementation("kernel")), NotImplementedError, "float32"),
        (lambda: run(x, w, lb.quest("e2m1").with_implementation("kernel")), NotImplementedError, "uniform grids"),
        (lambda: run(x, w.astype(jnp.float8_e5m2), recipe.with_implementation("interpret")), NotImplementedError,
         "the weight is float8_e5m2, and the kernels know bfloat16"),
        (lambda: run(x.astype(jnp.float8_e5m2), in_planes(packed, 8, "interpret")), NotImplementedError,
         "the result is float8_e5m2"),
        (lambda: run(x, in_planes(packed, 16, "interpret")), NotImplementedError, "16-bit activations"),
        (lambda: to_planes(packed, 8, "gpu"), ValueError, "'gpu'"),
        (lambda: to_planes(sparse, 8), ValueError, "sparse"),
        (lambda: to_planes(floats, 8), ValueError, "e2m1"),
        (lambda: recipe.with_implementation("fast"), ValueError, "'fast'"),
    ]:  # fmt: skip
        with pytest.raises(error, match=said):
            call()


def lowered_for(mesh, function, *arguments):
    with use_abstract_mesh(mesh):
        jitted = jax.jit(lambda *a: function(*a))
        return jitted.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def gpu(kind):
    return AbstractMesh((), (), abstract_device=AbstractDevice(kind, 132, "gpu"))


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize("backward", [None, 8])
def test_training_for_cuda_is_kernels(backward):
    """The choice is made by the platform that a program is lowered for; no GPU is needed to see it."""
    x, w = operands(k=256, free=(64,))
    recipe = lb.quest(4, backward=backward)
    product = lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=recipe)

    def train(x, w):
        y, back = jax.vjp(product, x, w)
        return y, *back(jnp.ones((3, 5, 64), jnp.bfloat16))

    here, there = jax.jit(train).trace(x, w).lower().as_text(), lowered_for(gpu("NVIDIA H200"), train, x, w)
    for kernel in ("hadamard_quantize4", "matmul_i8", "hadamard_backward"):
        assert kernel in there and kernel not in here
    dots = [line for line in there.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) == (2 if backward is None else 0)
    assert all("xbf16>" in line and "xi8>" not in line for line in dots)


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
def test_the_cotangents_kernel_runs_where_it_was_measured_to_be_faster(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWBIT_JAX_TUNING", str(tmp_path / "tuning.json"))
    x, w = operands(k=256, free=(64,))

    def train(x, w):
        y, back = jax.vjp(lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=lb.quest(4, backward=8)), x, w)
        return back(y)

    assert "quantize_both_ways" not in lowered_for(gpu("NVIDIA H200"), train, x, w)
    tile = {"rows": 16, "columns": 64, "warps": 4, "stages": 1, "split": 1}
    tuning.store({both_ways.tuning_key(15, 64, jnp.bfloat16): tile}, "NVIDIA H200")
    text = lowered_for(gpu("NVIDIA H200"), train, x, w)
    assert "quantize_both_ways_maxima" in text and "quantize_both_ways_codes" in text


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
def test_packed_products_for_cuda_are_kernels():
    x, w = operands(k=256, free=(64,))
    packed = in_planes(pack(lb.quest(4), w), 8)
    product = lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=lb.quest(4))
    here = jax.jit(product).trace(x, packed).lower().as_text()
    there = lowered_for(gpu("NVIDIA H200"), product, x, packed)
    for kernel in ("hadamard_quantize4", "matmul_w4a8"):
        assert kernel in there and kernel not in here


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*dtype float64.*:UserWarning")
@pytest.mark.parametrize("weight", ["trained", "quest W4A4", "quest W3A16"])
def test_dtypes_that_kernels_do_not_know_are_xlas(weight):
    """What a CPU computes is computed on a GPU too."""
    x, w = operands(k=256, free=(64,))
    recipe = lb.quest(4) if weight == "trained" else RECIPES[weight]
    rhs = w if weight == "trained" else in_planes(pack(recipe, w), word_bits(recipe.out.lhs))

    def traced(x, rhs, out=None):
        function = lambda x, rhs: lb.dot_general(x, rhs, NUMBERS, preferred_element_type=out, recipe=recipe)
        with use_abstract_mesh(gpu("NVIDIA H200")):
            found = jax.jit(function).trace(x, rhs).jaxpr
        assert found.out_avals[0].dtype == jax.eval_shape(function, x, rhs).dtype
        return "pallas_call" in str(found)

    assert traced(x, rhs) and traced(x, rhs, jnp.float16)
    for out in (jnp.float64, jnp.int32, jnp.float8_e4m3fn):
        assert not traced(x, rhs, out)
    assert not traced(x.astype(jnp.float8_e4m3fn), rhs, jnp.float32)
    assert not traced(x.astype(jnp.float8_e5m2), rhs)
    if weight == "trained":
        assert not traced(x, w.astype(jnp.float8_e4m3fn))


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
def test_groups_that_run_out_of_registers_are_xlas():
    recipe = dataclasses.replace(GROUPED, out=lb.Gemm(rhs=dataclasses.replace(GROUPED.out.rhs, tiling=Group(2048))))
    x, w = operands(k=4096, free=(64,))
    packed = in_planes(pack(recipe, w), 16)
    product = lambda x, w: lb.dot_general(x, w, NUMBERS, recipe=recipe)
    assert "matmul_w4a16" not in lowered_for(gpu("NVIDIA H200"), product, x, packed)
    words = planes.pack(jnp.zeros((32, 4096), jnp.uint8), 4)
    assert packed_product._MOST_OF_A_GROUP == MOST_OF_A_GROUP == 1024
    with pytest.raises(ValueError, match="group=2048.*above 1024"):
        matmul_a16(jnp.ones((1, 4096), jnp.bfloat16), words, jnp.ones((2, 32)), bits=4, group=2048)


class TestWhere:
    """Which GPUs, and which programs, "auto" takes a kernel for."""

    @pytest.mark.parametrize(
        ("kind", "said"),
        [("NVIDIA H200", None), ("NVIDIA L4", None), ("Tesla T4", "capability 7.5.*need 8.0"),
         ("Tesla V100-SXM2-16GB", "capability 7.0"), ("NVIDIA GeForce RTX 2080 Ti", "capability 7.5"),
         ("AMD Instinct MI300X", "not one of NVIDIA's")],
    )  # fmt: skip
    def test_abstract_gpus(self, kind, said):
        x, w = operands()
        with use_abstract_mesh(gpu(kind)):
            assert backend.sees_gpu() == backend.takes_kernel(x, w) == (said is None)
            if said is not None:
                with pytest.raises(NotImplementedError, match=said):
                    lb.dot_general(x, w, NUMBERS, recipe=lb.quest(4).with_implementation("kernel"))

    @pytest.mark.parametrize(
        ("capability", "sees"), [("9.0", True), ("8.0", True), ("7.5", False), ("gfx942", False), (None, True)]
    )
    def test_real_gpus(self, monkeypatch, capability, sees):
        device = types.SimpleNamespace(device_kind="NVIDIA H200", compute_capability=capability)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])
        assert backend.sees_gpu() == sees

    def test_programs_over_a_mesh(self, monkeypatch):
        """XLA cannot cut a kernel: not under jit over a mesh, but inside shard_map, where each device runs its own."""
        monkeypatch.setattr(backend, "sees_gpu", lambda: True)
        seen = []

        def look(x):
            seen.append(backend.why_partitioned(x))
            return x

        x = jnp.ones((4, 8))
        whole = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        single = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
        put = lambda mesh: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        cut = PartitionSpec("data")
        jax.jit(look)(put(whole))
        assert "data=2, tensor=2" in seen[-1] and "shard_map" in seen[-1]
        jax.jit(jax.shard_map(look, mesh=whole, in_specs=cut, out_specs=cut))(x)
        assert seen[-1] is None
        jax.jit(jax.shard_map(look, mesh=whole, in_specs=cut, out_specs=cut, axis_names={"data"}))(x)
        assert "(tensor=2)" in seen[-1]
        jax.jit(look)(put(single))
        assert seen[-1] is None
        jax.jit(look)(x)
        assert f"{jax.device_count()} devices" in seen[-1]
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        assert backend.why_partitioned(x) is None and backend.takes_kernel(x)

    def test_auto_falls_back_and_kernel_is_honored(self, monkeypatch):
        monkeypatch.setattr(backend, "sees_gpu", lambda: True)
        monkeypatch.setattr(backend, "why_no_gpu", lambda: None)
        monkeypatch.setattr(backend, "why_partitioned", lambda *_: "over a mesh")
        run = lambda implementation: backend.choose(
            lambda impl, x: impl, lambda x: "xla", 1.0, implementation=implementation, why_not=None, who="test"
        )
        assert run("auto") == "xla" and run("kernel") == "triton"
