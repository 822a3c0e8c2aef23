"""What all kernels have in common: 64-bit mode, what is not a tile, and calls where there is no GPU."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chips, matmul_a8, matmul_i8, planes
from pallas_kernels.block_scaled import MX_FORMATS, dequantize_mx, quantize_mx, quantize_nvfp4
from pallas_kernels.checks import MOST_ELEMENTS, NoKernel
from pallas_kernels.hadamard_backward import hadamard_backward
from pallas_kernels.hadamard_quantize import hadamard_quantize
from pallas_kernels.launch import Tile
from pallas_kernels.matmul_a16 import matmul_a16
from pallas_kernels.matmul_fp8 import matmul_fp8
from pallas_kernels.stochastic import stochastic_codes, stochastic_round

M, N, K = 3, 32, 256
ROWS, COLUMNS = jnp.ones(M, jnp.float32), jnp.ones(N, jnp.float32)
ONE = jnp.ones((), jnp.float32)


def codes(shape, dtype, high):
    return jnp.asarray(np.random.default_rng(0).integers(0, high, shape), dtype)


def calls():
    x, key = jnp.asarray(np.random.default_rng(1).standard_normal((M, K)), jnp.float32), jnp.arange(2, dtype=jnp.uint32)
    short, c8, u3 = x.astype(jnp.bfloat16), codes((M, K), jnp.int8, 128), codes((N, K), jnp.uint8, 8)
    f8 = x.astype(jnp.float8_e4m3fn)
    mask = codes((1, M, 32), jnp.int8, 128)
    words8, words16 = planes.pack(u3, 3, 8), planes.pack(u3, 3, 16)
    split = Tile(rows=16, columns=32, split=2)
    return {
        "matmul_a16": functools.partial(matmul_a16, short, words16, jnp.ones((1, N), jnp.float32), bits=3),
        "matmul_a8": functools.partial(matmul_a8.matmul_a8, c8, ROWS, words8, COLUMNS, bits=3, x_zero=0.5),
        "matmul_a8_split": functools.partial(
            matmul_a8.matmul_a8, jnp.tile(c8, (1, 2)), ROWS, planes.pack(jnp.tile(u3, (1, 2)), 3, 8), COLUMNS, bits=3,
            tile=split,
        ),
        "matmul_i8": functools.partial(matmul_i8.matmul_i8, c8, u3.astype(jnp.int8), ROWS, COLUMNS),
        "matmul_fp8": functools.partial(matmul_fp8, f8, f8, ONE, ONE),
        "hadamard_quantize": functools.partial(hadamard_quantize, short, bits=3, alpha=0.4, trust=1.2, packed=True),
        "hadamard_backward": functools.partial(hadamard_backward, short, mask),
        **{f"quantize_{f}": functools.partial(quantize_mx, short, format=f) for f in MX_FORMATS},
        "quantize_drawn": functools.partial(quantize_mx, short, format="mxfp6_e3m2", key=key),
        "quantize_nvfp4": functools.partial(quantize_nvfp4, short),
        "dequantize_mx": functools.partial(dequantize_mx, codes((M, K), jnp.uint8, 90), codes((M, 8), jnp.uint8, 90),
                                           format="mxfp8"),
        "stochastic_round": functools.partial(stochastic_round, x, key),
        "stochastic_fp8": functools.partial(stochastic_round, x, key, dtype=jnp.float8_e4m3fn),
        "stochastic_codes": functools.partial(stochastic_codes, x, ROWS, key, bits=4),
    }  # fmt: skip


CALLS = calls()


def at_once(name, **options):
    """The call as one program, which compiles in a fraction of what its operations take one by one."""
    return jax.jit(functools.partial(CALLS[name], **options))()


CUT = jax.sharding.PartitionSpec("data")


@pytest.mark.parametrize(("name", "impl"), [
    *(pytest.param(name, "xla", marks=pytest.mark.slow) for name in CALLS),
    *((name, "interpret") for name in CALLS if not name.startswith("quantize_mx") or name == "quantize_mxfp4"),
])  # fmt: skip
def test_64_bit_mode_changes_nothing(name, impl):
    narrow = at_once(name, impl=impl)
    with jax.enable_x64(True):
        wide = at_once(name, impl=impl)
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def _inside_shard_map(name, impl, **options):
    """The call as a program of one device of a mesh, its first argument cut over the mesh and the others whole."""
    call = CALLS[name]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = lambda first: jax.tree.map(jnp.atleast_1d, call.func(first, *call.args[1:], **call.keywords, impl=impl))
    return jax.shard_map(run, mesh=mesh, in_specs=CUT, out_specs=CUT, **options), call.args[0]


@pytest.mark.parametrize("name", CALLS)
def test_inside_shard_map(name):
    """A kernel's results vary over the mesh as its arguments do; JAX cannot interpret kernels where it checks that."""
    run, first = _inside_shard_map(name, "triton")
    alone = lambda: jax.tree.map(jnp.atleast_1d, CALLS[name](impl="xla"))
    told = lambda function, *arguments: jax.tree.map(lambda a: (a.shape, a.dtype), jax.eval_shape(function, *arguments))
    assert told(run, first) == told(alone)  # `out_specs` is refused for what does not vary
    if name in ("matmul_a16", "matmul_a8_split", "hadamard_quantize"):
        run, first = _inside_shard_map(name, "interpret", check_vma=False)
        for here, alone in zip(
            jax.tree.leaves(jax.jit(run)(first)), jax.tree.leaves(at_once(name, impl="interpret")), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(here), np.asarray(alone))


@pytest.mark.parametrize("tile", [{}, {"rows": 16}, 3], ids=str)
@pytest.mark.parametrize("name", [name for name in CALLS if not name.endswith("_split")])
def test_a_tile_is_a_tile(name, tile):
    with pytest.raises(TypeError, match=r"got tile of type (dict|int); it takes a Tile"):
        CALLS[name](impl="interpret", tile=tile)


@pytest.mark.parametrize("name", CALLS)
def test_tiles_of_eight_rows_are_for_products_of_few_rows(name):
    call = functools.partial(at_once, name, impl="interpret", tile=Tile(rows=8, columns=32))
    if name.startswith(("matmul_a16", "matmul_a8")):
        wide = at_once(name, impl="interpret", tile=Tile(rows=16, columns=32))
        np.testing.assert_allclose(np.asarray(call(), np.float32), np.asarray(wide, np.float32), rtol=2**-7)
    else:
        with pytest.raises(ValueError, match=r"got tile\.rows=8.*from 16 on"):
            call()


@pytest.mark.parametrize(
    "name", [name for name in CALLS if not name.startswith(("matmul_a", "matmul_fp8", "hadamard_backward"))]
)
def test_kernels_that_do_not_split_refuse_to(name):
    with pytest.raises(ValueError, match=r"got tile\.split=2\. .*take split=1"):
        CALLS[name](impl="interpret", tile=Tile(rows=16, columns=32, split=2))


@pytest.mark.parametrize("fields", [dict(stages=2.5), dict(warps=True), dict(rows=16.0), dict(columns="64")], ids=str)
def test_tiles_are_of_integers(fields):
    with pytest.raises(ValueError, match=r"Tile got .*integers"):
        Tile(**fields)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
@pytest.mark.parametrize("name", CALLS)
def test_no_gpu_is_said_with_a_way_out(name):
    with pytest.raises(NoKernel, match=r"needs an NVIDIA GPU.*impl='xla'"):
        CALLS[name]()


def test_codes_without_rows_are_not_packed():
    with pytest.raises(ValueError, match=r"shape \(0, 64\).*at least one output channel"):
        planes.pack(jnp.zeros((0, 64), jnp.uint8), 4)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float64, "nothing"], ids=str)
def test_gradients_are_not_integers(dtype):
    with pytest.raises(TypeError, match="hadamard_backward got out_dtype"):
        CALLS["hadamard_backward"](impl="xla", out_dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "capability"),
    [("NVIDIA H200", (9, 0)), ("NVIDIA H100 80GB HBM3", (9, 0)), ("NVIDIA GH200 480GB", (9, 0)),
     ("NVIDIA A100-SXM4-40GB", (8, 0)), ("NVIDIA A10G", (8, 6)), ("NVIDIA L40S", (8, 9)),
     ("NVIDIA RTX 6000 Ada Generation", (8, 9)), ("NVIDIA RTX A6000", (8, 6)), ("NVIDIA GeForce RTX 4090", (8, 9)),
     ("NVIDIA GB200", (10, 0)), ("NVIDIA B300", (10, 3)), ("NVIDIA Something New", (8, 0)), ("gfx942", (0, 0))],
)  # fmt: skip
def test_the_capability_of_abstract_gpus(kind, capability):
    device = jax.sharding.AbstractDevice(kind, 100, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert chips.traced_capability() == capability


def test_the_chips_are_named():
    for name, chip in chips.CHIPS.items():
        with chips.abstract_gpu(name):
            assert chips.traced_capability() == chip.capability


def test_fp8_is_refused_where_the_compiler_would_abort():
    a, s = jax.ShapeDtypeStruct((16, 128), jnp.float8_e4m3fn), jax.ShapeDtypeStruct((), jnp.float32)
    x = jax.ShapeDtypeStruct((16, 128), jnp.bfloat16)
    taken = lambda **options: str(jax.make_jaxpr(functools.partial(matmul_fp8, **options))(a, a, s, s))
    with chips.abstract_gpu("sm_80"):
        assert taken() == taken(through="bits")
        for through in ("float8", "float16"):
            with pytest.raises(NoKernel, match=r"8\.9.*8\.0.*through='bits'"):
                taken(through=through)
        with pytest.raises(NoKernel, match=r"8\.9.*8\.0.*Drop the argument"):
            jax.eval_shape(functools.partial(quantize_mx, format="mxfp8", cast=True), x)
    with chips.abstract_gpu("sm_90"):
        assert taken() == taken(through="float8")
        jax.eval_shape(functools.partial(quantize_mx, format="mxfp8", cast=True), x)


def test_weights_are_unpacked_first_only_where_matmul_i8_takes_them(monkeypatch):
    monkeypatch.setattr(matmul_i8, "best", lambda m, n, k: "mosaic")
    assert matmul_a8._unpacks_first(512, 4096, 4096) and not matmul_a8._unpacks_first(511, 4096, 4096)
    assert not matmul_a8._unpacks_first(512, 128, matmul_i8.LONGEST + 1)
    assert not matmul_a8._unpacks_first(512, MOST_ELEMENTS // 4096 + 1, 4096)
    k, shape = 1 << 17, jax.ShapeDtypeStruct  # more than matmul_i8 takes, and matmul_a8 takes it in 4 bits
    words = [shape(size, jnp.int8) for size in planes.word_shapes(N, k, 4, 8)]
    arguments = shape((512, k), jnp.int8), shape((512,), jnp.float32), words, shape((N,), jnp.float32)
    with chips.abstract_gpu("sm_90"):
        assert jax.eval_shape(functools.partial(matmul_a8.matmul_a8, bits=4), *arguments).shape == (512, N)


def test_explain_names_a_kernel_where_auto_takes_it(monkeypatch):
    backend = pytest.importorskip("lowbit_jax.ops.backend")
    from lowbit_jax.nn import kernels

    monkeypatch.setattr(backend, "why_no_gpu", lambda: None)
    monkeypatch.setattr(backend, "why_partitioned", lambda *operands: "JAX has 2 devices")
    assert kernels._chosen("matmul_i8", "auto") == "xla (matmul_i8 on one device)"
    assert kernels._chosen("matmul_i8", "kernel") == "matmul_i8"
    monkeypatch.setattr(backend, "why_partitioned", lambda *operands: None)
    assert kernels._chosen("matmul_i8", "auto") == "matmul_i8"


def test_lists_and_fractions_are_refused():
    call = CALLS["matmul_a16"]
    x, words, scales = call.args
    with pytest.raises(TypeError, match=r"quantize_mx got x of type list; it takes arrays: pass jnp\.asarray\(x\)"):
        quantize_mx(x.tolist(), format="mxfp8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="group='64', a str"):
        matmul_a16(x, words, scales, bits=3, group="64")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="block=128.0, a float"):
        hadamard_quantize(x, bits=3, alpha=0.4, block=128.0)  # pyright: ignore[reportArgumentType]


def wrong(name, *arguments, **options):
    call = CALLS[name]
    return call.func(*(arguments or call.args), **call.keywords | options, impl="xla")


@pytest.mark.parametrize(("call", "error", "said"), [
    (lambda: wrong("matmul_fp8", *CALLS["matmul_fp8"].args[:2], 1.0, ONE), TypeError,
     "matmul_fp8 got x_scales of type float; it takes arrays"),
    (lambda: jax.eval_shape(lambda o: wrong("matmul_i8", x_offset=o), ONE), TypeError,
     "matmul_i8 got x_offset of type .*Tracer; it takes one plain number"),
    (lambda: wrong("matmul_i8", w_offset=math.nan), ValueError, "matmul_i8 got w_offset=nan. It is a finite number"),
    (lambda: wrong("hadamard_quantize", alpha="1"), TypeError, "hadamard_quantize got alpha of type str"),
    (lambda: wrong("hadamard_quantize", trust="1"), TypeError, "hadamard_quantize got trust of type str"),
    (lambda: jax.eval_shape(lambda a: wrong("hadamard_quantize", alpha=a), ONE), TypeError, "alpha of type .*Tracer"),
    (lambda: jax.eval_shape(lambda t: wrong("hadamard_quantize", trust=t), ONE), TypeError, "trust of type .*Tracer"),
    (lambda: wrong("stochastic_round", dtype="foo"), TypeError, "_round got dtype='foo'; it returns bfloat16"),
    (lambda: wrong("dequantize_mx", dtype="foo"), TypeError, "dequantize_mx got dtype='foo'; it returns bfloat16"),
    (lambda: wrong("quantize_mxfp4", format=["mxfp4"]), ValueError, r"format=\['mxfp4'\]. It is one of mxfp8, "),
    (lambda: wrong("quantize_mxfp4", scale_mode=["even"]), ValueError, r"scale_mode=\['even'\]. It is one of floor"),
])  # fmt: skip
def test_arguments_of_another_kind_are_named(call, error, said):
    with pytest.raises(error, match=said):
        call()


@pytest.mark.parametrize("call", [
    lambda x, key: quantize_mx(x, format="mxfp8"),
    lambda x, key: quantize_nvfp4(x),
    lambda x, key: stochastic_round(x, key),
    lambda x, key: stochastic_codes(x, jnp.ones(x.shape[0], jnp.float32), key, bits=4),
    lambda x, key: dequantize_mx(x.astype(jnp.uint8), jnp.ones((len(x), 2**10), jnp.uint8), format="mxfp8"),
    lambda x, key: matmul_fp8(*[x.astype(jnp.float8_e4m3fn)] * 2, ONE, ONE),
])  # fmt: skip
def test_arrays_beyond_32_bit_offsets_are_refused(call):
    x, key = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    with pytest.raises(ValueError, match=f"2147483648 elements; kernels count up to {MOST_ELEMENTS}"):
        jax.eval_shape(call, x, key)


@pytest.mark.parametrize(("call", "shape", "counted"), [
    (lambda x, key: quantize_mx(x, format="mxfp8"), (2**26 - 1, 32), "(67108864, 32)"),
    (lambda x, key: dequantize_mx(x.astype(jnp.uint8), jnp.ones((len(x), 1), jnp.uint8), format="mxfp8"),
     (2**26 - 1, 32), "(67108864, 32)"),
    (lambda x, key: stochastic_round(x, key), (2**24 - 1, 127), "(16777216, 128)"),
    (lambda x, key: matmul_fp8(x[:16].astype(jnp.float8_e4m3fn), x.astype(jnp.float8_e4m3fn), ONE, ONE),
     (2**16 + 1, 2**15 - 1), "(65600, 32768)"),
    (lambda x, key: matmul_fp8(*[x.astype(jnp.float8_e4m3fn)] * 2, ONE, ONE, tile=Tile(rows=64, split=8)),
     (2**15, 1024), "(8, 32768, 32768)"),
])  # fmt: skip
def test_offsets_are_counted_as_the_kernel_sees_the_arrays(call, shape, counted):
    """Padded to whole tiles, and before the parts of a sum are added."""
    assert math.prod(shape) <= MOST_ELEMENTS
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    with pytest.raises(ValueError, match=re.escape(f"of shape {counted}, ") + ".*kernels count up to"):
        jax.eval_shape(call, jax.ShapeDtypeStruct(shape, jnp.float32), key)


@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")
@pytest.mark.parametrize("shape", [(1, 1 << 24), (1 << 23, 32)], ids=["wide", "long"])
@pytest.mark.parametrize("call", [
    lambda x, key: quantize_mx(x, format="mxfp8"),
    lambda x, key: quantize_nvfp4(x, jnp.ones(())),
    lambda x, key: stochastic_round(x, key),
    lambda x, key: stochastic_codes(x, jnp.ones(x.shape[0], jnp.float32), key, bits=4),
    lambda x, key: dequantize_mx(x.astype(jnp.uint8), jnp.ones((len(x), x.shape[1] // 32), jnp.uint8), format="mxfp8"),
])  # fmt: skip
def test_grids_fit_a_launch(call, shape):
    """CUDA takes 65535 programs along y and z; JAX folds a longer axis into x."""
    x, key = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    with chips.abstract_gpu("sm_90"):
        text = jax.jit(call).trace(x, key).lower(lowering_platforms=("cuda",)).as_text()
    grids = {axis: int(size) for axis, size in re.findall(r"grid_([xyz]) = (\d+)", text)}
    assert grids["x"] * grids["y"] >= shape[0] * shape[1] >> 14 and max(grids["y"], grids["z"]) <= 65535
