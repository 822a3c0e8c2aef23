"""The files read by a transcription of their layout in NumPy, bit by bit, hold the very weights that were packed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lowbit_jax as lb
from lowbit_jax.io import compressed_tensors
from lowbit_jax.scaling import Group, PerTensor
from tests.io import files

safetensors = pytest.importorskip("safetensors")

DTYPES = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I64": "<i8", "I8": "i1", "U8": "u1", "BF16": ml_dtypes.bfloat16,
          "F8_E4M3": ml_dtypes.float8_e4m3fn}  # fmt: skip


def raw(folder) -> tuple[dict[str, np.ndarray], dict]:
    found = safetensors.deserialize((folder / "model.safetensors").read_bytes())
    arrays = {name: np.frombuffer(bytes(e["data"]), DTYPES[e["dtype"]]).reshape(e["shape"]) for name, e in found}
    return arrays, json.loads((folder / "config.json").read_text())


def codes(rows: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Fields of `bits` bits of each row of bytes, from the lowest bit of the first byte on."""
    ones = np.unpackbits(np.ascontiguousarray(rows).view(np.uint8), axis=1, bitorder="little")[:, : bits * count]
    return (ones.reshape(len(rows), count, bits).astype(np.int64) << np.arange(bits)).sum(-1)


def small_float(code: np.ndarray, exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """OCP MX v1.0, section 5.3: sign, exponent (bias 1), mantissa; no infinities."""
    sign = np.where(code >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    exponent, fraction = code >> mantissa_bits & 2**exponent_bits - 1, code % 2**mantissa_bits / 2**mantissa_bits
    return sign * np.where(exponent == 0, fraction, (1 + fraction) * 2.0 ** (exponent - 1))


def transcribed(folder, name: str = "layer") -> np.ndarray:
    """[outputs, inputs], by the description of the layouts in `lowbit_jax.io.compressed_tensors`."""
    arrays, told = raw(folder)
    group = told["quantization_config"]["config_groups"]["group_0"]
    form, arguments = group["format"], group["weights"]
    own = {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}
    scale = own["weight_scale"]
    if form == "pack-quantized":
        bits, (rows, columns) = arguments["num_bits"], own["weight_shape"]
        assert own["weight_packed"].shape == (rows, -(-columns * bits // 32))
        values = codes(own["weight_packed"], bits, columns) - 2 ** (bits - 1)
        if not arguments["symmetric"]:
            zeros = codes(own["weight_zero_point"].T, bits, rows).T - 2 ** (bits - 1)
            values = values - np.repeat(zeros, columns // zeros.shape[1], axis=1)
    elif form in ("int-quantized", "float-quantized", "mxfp8-quantized"):
        values = own["weight"]
    elif form == "mxfp6-pack-quantized":
        values = small_float(codes(own["weight_packed"], 6, own["weight_packed"].shape[1] * 4 // 3), 2, 3)
    else:
        values = small_float(codes(own["weight_packed"], 4, own["weight_packed"].shape[1] * 2), 2, 1)
    if scale.dtype == np.uint8:
        scale = 2.0 ** (scale.astype(np.float64) - 127)
    scale = scale.astype(np.float32)
    if "weight_global_scale" in own:
        scale = scale / own["weight_global_scale"]
    scale = np.atleast_2d(scale)
    scale = np.repeat(scale, values.shape[0] // scale.shape[0], axis=0)
    return values.astype(np.float32) * np.repeat(scale, values.shape[1] // scale.shape[1], axis=1)


def packed(q: lb.Quantizer, seed: int = 0) -> lb.QTensor:
    return q.quantize(files.weight(seed), axis=0)


def tolerance(name: str) -> float:
    """The tensor scale of NVFP4 is written as a reciprocal, rounded: two roundings of float32."""
    return 2e-7 if name.startswith("nvfp4") else 0


@pytest.mark.parametrize("name", files.ALL)
def test_the_files_hold_the_weight(name, tmp_path):
    layer = packed(files.ALL[name])
    compressed_tensors.save(tmp_path, {"layer": layer})
    expected = np.asarray(layer.dequantize(jnp.float32)).T
    assert np.abs(expected[3]).max() == 0 < np.abs(expected[4]).max()
    np.testing.assert_allclose(transcribed(tmp_path), expected, rtol=tolerance(name), atol=0)


@pytest.mark.parametrize("name", files.ALL)
def test_what_is_written_is_read(name, tmp_path):
    layer = packed(files.ALL[name])
    compressed_tensors.save(tmp_path, {"layer": layer, "norm": files.weight()[:, 0], "layer.bias": jnp.ones(3)})
    found = compressed_tensors.load(tmp_path)
    assert set(found) == {"layer", "norm.weight", "layer.bias"}
    back = found["layer"]
    assert back.shape == (files.N, files.K)
    expected = np.asarray(layer.dequantize(jnp.float32)).T
    np.testing.assert_allclose(np.asarray(back.dequantize(jnp.float32)), expected, rtol=tolerance(name), atol=0)
    np.testing.assert_array_equal(found["norm.weight"], files.weight()[:, 0])


@pytest.mark.parametrize("bits", [1, 3, 4, 7])
def test_bits_of_a_weight_are_those_of_the_file(bits, tmp_path):
    compressed_tensors.save(tmp_path, {"layer": packed(files.ALL[f"int{bits} by rows"])})
    arrays, _ = raw(tmp_path)
    assert arrays["layer.weight_packed"].nbytes == files.N * files.K * bits // 8


def test_what_was_read_multiplies(tmp_path):
    layer = packed(files.ALL["int4 by groups"])
    compressed_tensors.save(tmp_path, {"layer": layer})
    back = compressed_tensors.load(tmp_path)["layer"]
    x = jax.random.normal(jax.random.key(0), (5, files.K))
    recipe = lb.LinearRecipe(out=lb.Gemm(rhs=back.quantizer))
    y = lb.dot_general(x, back, (((1,), (1,)), ((), ())), recipe=recipe)
    expected = np.asarray(x, np.float64) @ np.asarray(layer.dequantize(), np.float64)
    np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["int4 by groups", "uint4, zero points", "blocks", "fp8 by tensor", "fp8 by blocks",
                                  "nvfp4 in squares", "mxfp8"])  # fmt: skip
def test_parts_of_a_layer(name, tmp_path):
    layer = packed(files.ALL[name])
    expected = np.asarray(layer.dequantize(jnp.float32)).T
    parts = {"q": (0, 8), "k": (8, 16), "v": (16, 24)}
    compressed_tensors.save(tmp_path, {part: lb.io.Outputs(layer, *ends) for part, ends in parts.items()})
    for part, (start, stop) in parts.items():
        rtol = tolerance(name)
        np.testing.assert_allclose(transcribed(tmp_path, part), expected[start:stop], rtol=rtol, atol=0)
        np.testing.assert_array_equal(lb.io.Outputs(layer, start, stop).dequantize(), expected[start:stop])


@pytest.mark.parametrize("name", ["int4 by groups", "int3 by rows", "uint4, zero points", "ternary", "blocks"])
def test_layers_with_axes_merged_and_stacks_cut(name, tmp_path):
    """A LinearGeneral of two axes of outputs, one of three layers on a leading axis."""
    kernel = files.weight(1, (3, files.K, 2, 8))
    stack = jax.vmap(lambda w: files.ALL[name].quantize(w, axis=0))(kernel)
    layer = jax.tree.map(lambda leaf: leaf[1], stack)
    compressed_tensors.save(tmp_path, {"layer": layer})
    expected = np.asarray(layer.dequantize(jnp.float32)).reshape(files.K, -1).T
    np.testing.assert_array_equal(transcribed(tmp_path), expected)


@pytest.mark.parametrize("name", ["int4 by groups", "int8 by rows", "uint4, zero points", "mid-rise of 4 bits"])
def test_the_layout_of_kernels(name, tmp_path):
    from lowbit_jax.ops.plane_tensor import to_planes

    layer = packed(files.ALL[name])
    planes = to_planes(layer, 16)
    assert planes.layout == "planes/1"
    compressed_tensors.save(tmp_path, {"layer": planes})
    np.testing.assert_array_equal(transcribed(tmp_path), np.asarray(layer.dequantize(jnp.float32)).T)


def test_one_scheme_goes_by_the_class_and_several_by_names(tmp_path):
    four, eight = packed(files.ALL["int4 by groups"]), packed(files.ALL["fp8 by rows"])
    plain = {"embed": jnp.ones((4, 4)), "a.bias": jnp.ones(4)}
    compressed_tensors.save(tmp_path / "one", {"a": four, "b": four, **plain}, config={"model_type": "own"})
    _, told = raw(tmp_path / "one")
    assert told["model_type"] == "own"
    group = told["quantization_config"]["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"] and group["weights"]["group_size"] == 64
    assert told["quantization_config"]["ignore"] == ["embed"], "a is quantized, though it has a bias"
    compressed_tensors.save(tmp_path / "two", {"a": four, "b": eight, **plain})
    _, told = raw(tmp_path / "two")
    assert told["quantization_config"]["format"] == "mixed-precision"
    targets = [g["targets"] for g in told["quantization_config"]["config_groups"].values()]
    assert targets == [["a"], ["b"]]
    found = compressed_tensors.load(tmp_path / "two")
    for name, layer in {"a": four, "b": eight}.items():
        np.testing.assert_array_equal(found[name].dequantize(), np.asarray(layer.dequantize()).T)


@pytest.mark.parametrize(
    "inputs, told",
    [
        (files.quantizer("int8"), {"num_bits": 8, "type": "int", "strategy": "token"}),
        (files.quantizer("int4", zero_point=True), {"num_bits": 4, "type": "int", "symmetric": False}),
        (files.quantizer("int8", zero_point=True), {"num_bits": 8, "strategy": "token", "symmetric": False}),
        (files.quantizer("e4m3", PerTensor()), {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        (files.quantizer("e4m3", Group(128)), {"type": "float", "strategy": "group", "group_size": 128}),
        (files.block("mxfp4"), {"num_bits": 4, "strategy": "group", "scale_dtype": "torch.uint8"}),
    ],
)
def test_activations_are_told(inputs, told, tmp_path):
    compressed_tensors.save(tmp_path, {"layer": packed(files.ALL["fp8 by rows"])}, inputs=inputs)
    _, config = raw(tmp_path)
    found = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    assert found.items() >= (told | {"dynamic": True}).items()


def test_static_scales_of_activations(tmp_path):
    static = lb.methods.get("static_integer").out.lhs
    layers = {name: packed(files.ALL["int8 by rows"]) for name in "ab"}
    scales = {"a": jnp.float32(0.25), "b": jnp.asarray([-0.5])}  # a learned scale acts by its magnitude
    compressed_tensors.save(tmp_path, layers, inputs=static, input_scales=scales)
    arrays, config = raw(tmp_path)
    told = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    assert told == {"dynamic": False, "symmetric": True, "num_bits": 8, "type": "int", "strategy": "tensor"}
    assert [arrays[f"{name}.input_scale"].tolist() for name in "ab"] == [[0.25], [0.5]]
    assert compressed_tensors.load(tmp_path)["a.input_scale"] == 0.25
    save = lambda **options: compressed_tensors.save(tmp_path / "other", layers, **options)
    with pytest.raises(ValueError, match=r"have a scale that the layer holds. Give it by input_scales="):
        save(inputs=static, input_scales={"a": jnp.float32(1)})
    with pytest.raises(ValueError, match=r"the activations of b have no scale of their own"):
        save(inputs={"a": static}, input_scales=scales)
    with pytest.raises(ValueError, match="'c' is none of the packed layers"):
        save(inputs=static, input_scales=scales | {"c": 1})
    for bad in (0, jnp.nan, jnp.ones(2)):
        with pytest.raises(ValueError, match="of a is .*; it is one finite number, not 0"):
            save(inputs=static, input_scales=scales | {"a": bad})
    with pytest.raises(NotImplementedError, match="activations of a are midrise8 by tensor"):
        save(inputs=lb.methods.get("lsq", bits=8).out.lhs, input_scales=scales)


def test_int8_under_int8_inputs_is_not_packed(tmp_path):
    layer = packed(files.ALL["int8 by rows"])
    compressed_tensors.save(tmp_path, {"layer": layer}, inputs={"layer": files.quantizer("int8")})
    arrays, config = raw(tmp_path)
    assert arrays["layer.weight"].dtype == np.int8
    assert config["quantization_config"]["format"] == "int-quantized"
    np.testing.assert_array_equal(transcribed(tmp_path), np.asarray(layer.dequantize()).T)
    found = compressed_tensors.load(tmp_path)["layer"]
    np.testing.assert_array_equal(found.dequantize(), np.asarray(layer.dequantize()).T)


def test_scales_are_kept_or_refused(tmp_path):
    layer = packed(files.ALL["int4 by groups"])
    with pytest.raises(ValueError, match=r"the scale .* of layer would become .*CastScale\('bfloat16'\)"):
        compressed_tensors.save(tmp_path, {"layer": layer}, dtype="bfloat16")
    assert not list(tmp_path.iterdir())
    exact = packed(files.ALL["bfloat16 scales"])
    compressed_tensors.save(tmp_path / "exact", {"layer": exact}, dtype="bfloat16")
    np.testing.assert_array_equal(transcribed(tmp_path / "exact"), np.asarray(exact.dequantize()).T)
    compressed_tensors.save(tmp_path / "rounded", {"layer": layer}, dtype="bfloat16", round_scales=True)
    error = np.abs(transcribed(tmp_path / "rounded") - np.asarray(layer.dequantize()).T)
    assert 0 < error.max() < 2**-8 * np.abs(np.asarray(layer.dequantize())).max()
    large = files.quantizer("int4").quantize(files.weight() * 1e8, axis=0)
    with pytest.raises(ValueError, match="would become inf"):
        compressed_tensors.save(tmp_path / "huge", {"layer": large}, dtype="float16", round_scales=True)
    for small in (1e-8, 1e-3):  # zero in float16, and subnormal, with fewer bits
        tiny = files.quantizer("int8").quantize(files.weight() * small, axis=0)
        with pytest.raises(ValueError, match="of layer would become .* to all of its bits"):
            compressed_tensors.save(tmp_path / "tiny", {"layer": tiny}, dtype="float16", round_scales=True)
    with pytest.raises(ValueError, match="norm holds 100000.0, which is infinite in float16"):
        weights = {"layer": packed(files.half(files.quantizer("int4"))), "norm": jnp.full(3, 1e5)}
        compressed_tensors.save(tmp_path / "norm", weights, dtype="float16")


REFUSED = {
    "rotated": (lb.quest_quantizer(4), NotImplementedError, r"layer is rotated \(hadamard 128\)"),
    "8-bit mid-rise": (files.quantizer("midrise8"), NotImplementedError, "mid-rise grids of up to 7"),
    "codebook": (files.quantizer("nf4", Group(64)), NotImplementedError, "layer is nf4 by group 64"),
    "e5m2": (files.quantizer("e5m2"), NotImplementedError, "layer is e5m2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_files_cannot_hold(name, tmp_path):
    q, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        compressed_tensors.save(tmp_path, {"layer": packed(q)})
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path):
    layer = packed(files.ALL["int4 by groups"])
    save = lambda weights, **options: compressed_tensors.save(tmp_path, weights, **options)
    with pytest.raises(ValueError, match="no weight is packed"):
        save({"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="it is 'float32', 'bfloat16' or 'float16'"):
        save({"a": layer}, dtype="int8")
    with pytest.raises(ValueError, match="'b' is none of the packed layers"):
        save({"a": layer}, inputs={"b": None})
    with pytest.raises(ValueError, match="goes by the name of its module"):
        save({"a.weight": layer})
    with pytest.raises(ValueError, match="two arrays for 'a.weight'"):
        save({"b": layer, "a": jnp.ones(3), "a.weight": jnp.ones(3)})
    for bits, zeros in ((7, False), (2, False)):
        with pytest.raises(NotImplementedError, match=f"a are int{bits} by absmax, which readers .* half way between"):
            save({"a": layer}, inputs=files.quantizer(f"int{bits}", zero_point=zeros))
    for weights in ({"a": layer, "b": "text"}, {"a": layer, "b": None}, {"a": layer, 3: jnp.ones(3)}):
        with pytest.raises(TypeError, match="goes with a .*; weights are packed or arrays"):
            save(weights)
    with pytest.raises(TypeError, match=r"inputs='int8'\): give a Quantizer"):
        save({"a": layer}, inputs="int8")
    with pytest.raises(TypeError, match=r"save\(config=\): .*float32.* It holds what JSON has"):
        save({"a": layer}, config={"x": np.float32(1)})
    with pytest.raises(NotImplementedError, match="activations of a are midrise4 by row"):
        save({"a": layer}, inputs=lb.quest_quantizer(4, block=None))
    with pytest.raises(ValueError, match="the layer has 24 outputs"):
        lb.io.Outputs(layer, 8, 25)
    with pytest.raises(ValueError, match="cut its blocks of 8 outputs"):
        save({"a": lb.io.Outputs(packed(files.ALL["fp8 by blocks"]), 4, 12)})
    damaged = dataclasses.replace(layer, scales=(layer.scales[0].at[0].set(jnp.nan),))
    with pytest.raises(ValueError, match="save: a: the scale at"):
        save({"a": damaged})
    assert not list(tmp_path.iterdir())
    save({"a": layer})
    with pytest.raises(FileExistsError, match="is not written over"):
        save({"a": layer})
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


def test_a_folder_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """As a kill between two files leaves it: what was written waits beside, and the next try removes it."""
    layer, folder = packed(files.ALL["int4 by groups"]), tmp_path / "model"
    kill = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", kill)
        with pytest.raises(KeyboardInterrupt):
            compressed_tensors.save(folder, {"a": layer})
    assert not folder.exists()
    (tmp_path / ".writing-model").mkdir()
    (tmp_path / ".writing-model/half").write_text("")
    compressed_tensors.save(folder, {"a": layer}, texts={"note.txt": "é"})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "note.txt").read_bytes() == "é".encode()
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1, "one may read all files or none"


def test_damaged_and_foreign_folders(tmp_path):
    layer = packed(files.ALL["int4 by groups"])
    with pytest.raises(ValueError, match="there is no such file"):
        compressed_tensors.load(tmp_path)
    compressed_tensors.save(tmp_path, {"layer": layer})
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    told, data = json.loads(config.read_text()), path.read_bytes()

    def changed(**changes):
        config.write_text(json.dumps(told | {"quantization_config": told["quantization_config"] | changes}))
        return compressed_tensors.load(tmp_path)

    with pytest.raises(ValueError, match="its method is 'gptq'"):
        changed(quant_method="gptq")
    group = told["quantization_config"]["config_groups"]["group_0"]
    with pytest.raises(ValueError, match="is in the format 'marlin-24'"):
        changed(config_groups={"g": group | {"format": "marlin-24"}})
    with pytest.raises(ValueError, match="the strategy 'token'"):
        changed(config_groups={"g": group | {"weights": group["weights"] | {"strategy": "token"}}})
    with pytest.raises(ValueError, match="codes of 3 bits take int32"):
        changed(config_groups={"g": group | {"weights": group["weights"] | {"num_bits": 3}}})
    with pytest.raises(ValueError, match="no group of config.json is for layer"):
        changed(config_groups={"g": group | {"targets": ["other"]}})
    assert set(changed(config_groups={"g": group | {"targets": ["re:lay.*"]}})) == {"layer"}
    for groups in ([], {}, {"g": []}, {"g": group | {"targets": [1]}}, {"g": group | {"targets": ["re:("]}},
                   {"g": group | {"format": ["x"]}}, {"g": {"targets": ["Linear"]}}):  # fmt: skip
        with pytest.raises(ValueError, match="its quantization_config has (no config_groups|a (group|damaged group))"):
            changed(config_groups=groups)
    for other in ("transform_config", "sparsity_config"):
        with pytest.raises(ValueError, match=f"has a {other}, which is not read here"):
            changed(**{other: {"config_groups": {"R": {}}}})
    for weights in ({"num_bits": 12}, {"group_size": 7}):
        with pytest.raises(ValueError, match="layer, in the format 'pack-quantized', cannot be read"):
            changed(config_groups={"g": group | {"weights": group["weights"] | weights}})
    config.write_text(json.dumps(told))
    path.write_bytes(data[:-40])
    with pytest.raises(ValueError, match="no safetensors file, or damaged"):
        compressed_tensors.load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="there is no .*model.safetensors"):
        compressed_tensors.load(tmp_path)


def test_groups_out_of_order_and_zero_points_that_nobody_told(tmp_path):
    from safetensors.numpy import save_file

    compressed_tensors.save(tmp_path / "zeros", {"layer": packed(files.ALL["uint4, zero points"])})
    arrays, told = raw(tmp_path / "zeros")
    told["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True
    (tmp_path / "zeros/config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="it has zero points, and its configuration says symmetric"):
        compressed_tensors.load(tmp_path / "zeros")
    compressed_tensors.save(tmp_path / "order", {"layer": packed(files.ALL["int4 by groups"])})
    arrays, _ = raw(tmp_path / "order")
    neighbors = np.arange(files.K, dtype=np.int32) // 64
    for index, fits in ((neighbors, True), (neighbors[::-1].copy(), False)):
        path = tmp_path / "order/model.safetensors"
        save_file({name: array.copy() for name, array in arrays.items()} | {"layer.weight_g_idx": index}, path)
        if fits:
            assert set(compressed_tensors.load(tmp_path / "order")) == {"layer"}
        else:
            with pytest.raises(ValueError, match="its groups are not of neighboring inputs"):
                compressed_tensors.load(tmp_path / "order")


def test_models_in_several_files(tmp_path):
    layer = packed(files.ALL["int4 by groups"])
    compressed_tensors.save(tmp_path / "a", {"a": layer})
    compressed_tensors.save(tmp_path / "b", {"b": layer})
    (tmp_path / "a/model.safetensors").rename(tmp_path / "a/model-1.safetensors")
    (tmp_path / "b/model.safetensors").rename(tmp_path / "a/model-2.safetensors")
    index = {"weight_map": {"a.weight_packed": "model-1.safetensors", "b.weight_packed": "model-2.safetensors"}}
    (tmp_path / "a/model.safetensors.index.json").write_text(json.dumps(index))
    found = compressed_tensors.load(tmp_path / "a")
    assert set(found) == {"a", "b"}
    (tmp_path / "a/model-2.safetensors").unlink()
    with pytest.raises(ValueError, match="there is no .*model-2"):
        compressed_tensors.load(tmp_path / "a")
    (tmp_path / "a/model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="does not say which files there are"):
        compressed_tensors.load(tmp_path / "a")
