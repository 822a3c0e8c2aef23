"""Files of a finished run, read by a Llama that we did not write, give the logits of the run's own model."""

import json

import numpy as np
import pytest

from lowbit_jax.io import compressed_tensors
from recipes import command, export, finished, hugging_face, pretrain
from recipes.export import Export
from recipes.pretrain import Pretrain
from tests.recipes.hf_llama import floats, llama

safetensors = pytest.importorskip("safetensors")
gguf = pytest.importorskip("gguf")

TEXT = "the square of 7 is 49 \n"
CLOSE = 2e-5  # float32 against float64, or another order of float32 sums, in logits of about 1
ROUNDED = 3e-3  # scales in float16, each off by up to 2^-11 of itself


def trained(folder, **changes) -> Pretrain:
    folder.mkdir(exist_ok=True)
    (folder / "words.txt").write_text("".join(f"the square of {i} is {i * i} \n" for i in range(2000)))
    config = Pretrain(preset="smoke", steps=3, data=str(folder / "words.txt"), out=folder / "run", tensorboard=False,
                      sample_tokens=10, prompt="the square of ", **changes)  # fmt: skip
    pretrain.main(config)
    return config


@pytest.fixture(scope="module")
def weights_only(tmp_path_factory) -> Pretrain:
    """Int4 weights in groups of 32, but one layer by QuEST without its rotation."""
    return trained(tmp_path_factory.mktemp("weights"), method="absmax_integer", weight_only=True,
                   options=("bits=4", "group=32"), rules=("blocks/mlp/down=straight_through:4",))  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Pretrain:
    """The default method, rotated, with quantized activations."""
    return trained(tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Pretrain:
    return trained(tmp_path_factory.mktemp("fp8"), method="fp8", options=("scaling=row",))


@pytest.fixture(scope="module")
def unquantized(tmp_path_factory) -> Pretrain:
    return trained(tmp_path_factory.mktemp("unquantized"), method="none")


def logits(run: Pretrain, weights="packed") -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and what the run's own model answers."""
    model, codec = finished.load(run.out, weights=weights)
    tokens = np.asarray(codec.encode(TEXT))
    return tokens, np.asarray(model(tokens[None]))[0]


def exported(run: Pretrain, folder, **options):
    export.main(Export(run=run.out, folder=folder, **options))
    return folder


def test_floats(weights_only, tmp_path, capsys):
    folder = exported(weights_only, tmp_path / "hf", to="safetensors")
    tokens, expected = logits(weights_only)
    np.testing.assert_allclose(llama(*floats(folder), tokens), expected, atol=CLOSE)
    assert np.abs(expected).max() > 0.1
    assert "21" in (shown := capsys.readouterr().out) and "on disk" in shown and "differ" not in shown


def test_packed(weights_only, tmp_path):
    folder = exported(weights_only, tmp_path / "ct")
    read = compressed_tensors.load(folder)
    dense = {
        name if name.endswith(".weight") else f"{name}.weight": np.asarray(
            leaf if isinstance(leaf, np.ndarray) else leaf.dequantize()
        )
        for name, leaf in read.items()
    }
    tokens, expected = logits(weights_only)
    told = json.loads((folder / "config.json").read_text())
    np.testing.assert_allclose(llama(dense, told, tokens), expected, atol=CLOSE)
    groups = told["quantization_config"]["config_groups"].values()
    assert sorted(len(group["targets"]) for group in groups) == [2, 12], "the rule's two layers have another scheme"
    other = exported(weights_only, tmp_path / "hf", to="safetensors")
    exact, _ = floats(other)
    for name, array in exact.items():
        np.testing.assert_array_equal(dense[name], array)
    assert (folder / "model.safetensors").stat().st_size < 0.5 * (other / "model.safetensors").stat().st_size


def test_gguf(weights_only, tmp_path):
    with pytest.raises(ValueError, match=r"q_proj would become .*CastScale\('float16'\)"):
        exported(weights_only, tmp_path / "gguf", to="gguf")
    folder = exported(weights_only, tmp_path / "gguf", to="gguf", round_scales=True)
    tokens, expected = logits(weights_only)
    found = llama(*of_gguf(folder / "model.gguf"), tokens, neighbors=True)
    np.testing.assert_allclose(found, expected, atol=ROUNDED)


def of_gguf(path) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of a file by Hugging Face's names, and its sizes."""
    reader = gguf.GGUFReader(path)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    layers = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
              "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
              "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
              "ffn_norm": "post_attention_layernorm"}  # fmt: skip
    arrays = {}
    for tensor in reader.tensors:
        first, *rest = tensor.name.removesuffix(".weight").split(".")
        name = names[first] if not rest else f"model.layers.{rest[0]}.{layers[rest[1]]}"
        arrays[f"{name}.weight"] = gguf.dequantize(tensor.data, tensor.tensor_type)
    field = lambda key: reader.fields[f"llama.{key}"].contents()
    told = {
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("rope.dimension_count"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base"),
        "num_hidden_layers": field("block_count"),
    }
    tokens, kinds = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert tokens[ord("a")] == "a" and len(tokens) == len(kinds) == len(arrays["lm_head.weight"])
    assert reader.fields["tokenizer.ggml.merges"].contents() == [], "readers look for it, though bytes merge nothing"
    assert reader.fields["general.quantization_version"].contents() == 2
    return arrays, told


def test_unquantized(unquantized, tmp_path):
    tokens, expected = logits(unquantized, "float")
    folder = exported(unquantized, tmp_path / "hf", to="safetensors")
    np.testing.assert_allclose(llama(*floats(folder), tokens), expected, atol=CLOSE)
    folder = exported(unquantized, tmp_path / "gguf", to="gguf")
    found = llama(*of_gguf(folder / "model.gguf"), tokens, neighbors=True)
    np.testing.assert_allclose(found, expected, atol=CLOSE)
    with pytest.raises(ValueError, match="trained with the method 'none'"):
        exported(unquantized, tmp_path / "ct")


def test_rotations_and_activations_are_not_lost_in_silence(both, tmp_path, capsys):
    for to in ("compressed-tensors", "gguf"):
        with pytest.raises(
            ValueError, match=f"q_proj are rotated .*, which files --to {to} cannot say. --to safetensors"
        ):
            exported(both, tmp_path / "ct", to=to)
    with pytest.raises(ValueError, match="midrise4 by row in training, which files --to safetensors cannot say"):
        exported(both, tmp_path / "hf", to="safetensors")
    folder = exported(both, tmp_path / "hf", to="safetensors", activations="float")
    assert "the answers differ" in capsys.readouterr().out
    arrays, _ = floats(folder)
    model, _ = finished.load(both.out, weights="packed")
    whole = np.asarray(model.blocks.mlp.gate_up.kernel.get_value().dequantize())
    found = [arrays[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    np.testing.assert_array_equal(np.concatenate(found), whole[1].T)
    assert not (tmp_path / "ct").exists()


def test_activations_are_named(fp8, tmp_path):
    folder = exported(fp8, tmp_path / "ct")
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert told["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"


def test_static_scales_are_those_of_each_layer(tmp_path):
    run = trained(tmp_path, method="static_integer")
    folder = exported(run, tmp_path / "ct")
    read = compressed_tensors.load(folder)
    model, _ = finished.load(run.out)
    held = np.abs(np.asarray(model.blocks.mlp.down.dot_general.lhs_scale.get_value()))
    found = [float(read[f"model.layers.{number}.mlp.down_proj.input_scale"][0]) for number in range(2)]
    assert found == held.tolist() and found[0] != found[1]


def test_dtype(weights_only, tmp_path):
    arrays, told = floats(exported(weights_only, tmp_path / "hf", to="safetensors", dtype="bfloat16"))
    assert {array.dtype.name for array in arrays.values()} == {"bfloat16"} and told["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="--round-scales has no effect --to safetensors"):
        exported(weights_only, tmp_path / "other", to="safetensors", round_scales=True)
    with pytest.raises(ValueError, match="--dtype bfloat16 has no effect --to gguf"):
        exported(weights_only, tmp_path / "gguf", to="gguf", dtype="bfloat16")


def test_weights_of_a_bfloat16_run_are_not_rounded_twice(tmp_path, capsys):
    run = trained(tmp_path, method="absmax_integer", weight_only=True, param_dtype="bfloat16")
    model, _ = finished.load(run.out)
    kernel = model.blocks.mlp.down.kernel.get_value()
    exact = np.asarray(kernel.dequantize(np.float32))
    assert kernel.dtype == "bfloat16" and (exact != np.asarray(kernel.dequantize(), np.float32)).any()
    arrays, _ = floats(exported(run, tmp_path / "hf", to="safetensors"))
    np.testing.assert_array_equal(arrays["model.layers.1.mlp.down_proj.weight"], exact[1].T)
    assert "rounded" not in capsys.readouterr().out
    exported(run, tmp_path / "hf16", to="safetensors", dtype="bfloat16")
    assert "All weights are rounded to bfloat16." in capsys.readouterr().out


def test_integers_that_readers_round_otherwise(tmp_path, capsys):
    run = trained(tmp_path, method="absmax_integer", bits=4)
    with pytest.raises(NotImplementedError, match="q_proj are int4 by absmax, which readers .*--activations float"):
        exported(run, tmp_path / "ct")
    exported(run, tmp_path / "ct", activations="float")
    eight = trained(tmp_path / "eight", method="absmax_integer")
    capsys.readouterr()
    exported(eight, tmp_path / "ct8")
    assert "on 127 or on 127.5: answers differ a little" in capsys.readouterr().out


def test_a_tokenizer_adds_nothing_that_training_did_not_see(tmp_path):
    library = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[UNK]", "<s>", "the", "square", "of", "is", *map(str, range(100))])}
    inner = library.Tokenizer(library.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = library.pre_tokenizers.Whitespace()
    inner.post_processor = library.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.save(str(tmp_path / "tokenizer.json"))
    run = trained(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), method="none")
    folder = exported(run, tmp_path / "hf", to="safetensors")
    assert inner.encode("the square").ids == [1, 2, 3]
    assert library.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("the square").ids == [2, 3]
    with pytest.raises(NotImplementedError, match="vocabulary of tokenizer.json is not written to GGUF"):
        exported(run, tmp_path / "gguf", to="gguf")


def test_bytes_have_a_tokenizer(weights_only, tmp_path):
    library = pytest.importorskip("tokenizers")
    folder = exported(weights_only, tmp_path / "hf", to="safetensors")
    codec = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "é\n\ttwo  spaces, \x00 and ☃"
    ids = codec.encode(text).ids
    assert ids == list(text.encode()) and codec.decode(ids) == text
    assert codec.id_to_token(0) == json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]


def test_byte_names_are_those_of_the_library():
    library = pytest.importorskip("tokenizers")
    assert sorted(hugging_face.byte_names()) == sorted(library.pre_tokenizers.ByteLevel.alphabet())


def test_the_command(weights_only, tmp_path, capsys, monkeypatch):
    arguments = [str(weights_only.out), str(tmp_path / "out")]
    command.run("export", Export, export.main, export.__doc__, arguments)
    assert "int4" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        command.run("export", Export, export.main, export.__doc__, arguments)
    assert "export: " in str(stopped.value) and "is not written over" in str(stopped.value)
    with pytest.raises(SystemExit) as stopped:
        command.run("export", Export, export.main, None, [*arguments, "--to", "safetensors", "--round-scales"])
    assert str(stopped.value).startswith("export: --round-scales has no effect"), "named once"


@pytest.mark.parametrize("options", [{}, {"to": "safetensors"}, {"to": "gguf", "round_scales": True}])
def test_hugging_face_opens_it(weights_only, options, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers, torch and compressed-tensors are not installed")
    transformers = pytest.importorskip("transformers")
    if not options:
        pytest.importorskip("compressed_tensors")
    folder = exported(weights_only, tmp_path / "model", **options)
    how = {"gguf_file": "model.gguf"} if options.get("to") == "gguf" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
    tokens, expected = logits(weights_only)
    with torch.no_grad():
        found = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    np.testing.assert_allclose(found, expected, atol=ROUNDED if how else 2e-5)
    codec = transformers.AutoTokenizer.from_pretrained(folder, **how)
    assert codec(TEXT)["input_ids"] == tokens.tolist()


@pytest.mark.parametrize("activations, alike", [("same", True), ("float", False)])
def test_hugging_face_quantizes_activations_alike(fp8, activations, alike, tmp_path):
    """Between two levels the last bit decides, for all later tokens too: half of the tokens are to be alike."""
    torch = pytest.importorskip("torch", reason="transformers, torch and compressed-tensors are not installed")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    folder = exported(fp8, tmp_path / "model", activations=activations)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, expected = logits(fp8)
    with torch.no_grad():
        found = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    error = np.median(np.abs(found - expected).max(-1))
    assert error < 2e-5 if alike else error > 1e-3
