"""Models in Hugging Face's files become runs that answer what a Llama that we did not write answers."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lowbit_jax as lb
from recipes import command, export, finished, import_hf, llama, pretrain, sample, token_files
from recipes.export import Export
from recipes.import_hf import Import
from recipes.pretrain import Pretrain
from recipes.sample import Sample
from tests.recipes import hf_llama

safetensors = pytest.importorskip("safetensors")

CONFIG = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 500.0, "vocab_size": 40,
}  # fmt: skip
SCALED = {
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip
TOKENS = np.arange(50) * 7 % 40
CLOSE = 2e-4  # float32 against float64, or another order of float32 sums, in logits of about 10


def parameters(seed: int = 0, dtype=np.float32) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    normal = lambda *shape: (0.3 * draw.normal(size=shape)).astype(dtype)
    found = {"model.embed_tokens.weight": normal(40, 32), "lm_head.weight": normal(40, 32)}
    for at in ("model.layers.0", "model.layers.1"):
        outputs = {"q": 32, "k": 16, "v": 16, "o": 32}
        found |= {f"{at}.self_attn.{name}_proj.weight": normal(n, 32) for name, n in outputs.items()}
        found |= {f"{at}.mlp.{name}_proj.weight": normal(48, 32) for name in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = normal(32, 48)
        norms = ("input_layernorm", "post_attention_layernorm")
        found |= {f"{at}.{name}.weight": (1 + normal(32)).astype(dtype) for name in norms}
    return found | {"model.norm.weight": (1 + normal(32)).astype(dtype)}


def written(folder, arrays=None, **changes):
    """A model in a folder; None leaves an entry out."""
    told = {name: value for name, value in (CONFIG | changes).items() if value is not None}
    texts = {"config.json": json.dumps(told)}
    lb.io.tensors.write(folder, parameters() if arrays is None else arrays, texts, "test")
    return folder, told


def imported(folder, run, **options):
    import_hf.main(Import(model=folder, run=run, **options))
    model, codec = finished.load(run, weights="float")
    return model, codec


@pytest.mark.parametrize("changes", [{}, SCALED, {"rope_theta": None}], ids=["plain", "scaled", "default base"])
def test_logits_are_those_of_the_files(changes, tmp_path):
    folder, told = written(tmp_path / "hf", **changes)
    model, codec = imported(folder, tmp_path / "run")
    expected = hf_llama.llama(parameters(), {"rope_theta": 10_000.0} | told, TOKENS)
    np.testing.assert_allclose(np.asarray(model(TOKENS[None]))[0], expected, atol=CLOSE)
    assert np.abs(expected).max() > 1 and codec.name == "ids" and model.config.context == 64
    if changes == SCALED:
        other = hf_llama.llama(parameters(), CONFIG, TOKENS)
        assert np.abs(other - expected).max() > 1e-2


def test_what_a_float32_of_positions_cannot_tell_from_the_formula():
    table = np.asarray(llama.rotary_table(5, 16, 500.0, (8.0, 1.0, 4.0, 32.0)))
    told = CONFIG | SCALED | {"head_dim": 16}
    angle = np.arange(5)[:, None] * hf_llama.frequencies(told)
    np.testing.assert_allclose(table, [np.cos(angle), np.sin(angle)], atol=1e-6)


def test_tied_embeddings_of_bfloat16_in_several_files(tmp_path):
    arrays = parameters(dtype=ml_dtypes.bfloat16)
    del arrays["lm_head.weight"]
    names = sorted(arrays)
    told = CONFIG | {"tie_word_embeddings": True}
    index = {}
    for number, part in enumerate((names[:5], names[5:])):
        lb.io.tensors.write(tmp_path / str(number), {name: arrays[name] for name in part}, {}, "test")
        (tmp_path / "hf").mkdir(exist_ok=True)
        (tmp_path / str(number) / "model.safetensors").rename(tmp_path / "hf" / f"model-{number}.safetensors")
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "hf/config.json").write_text(json.dumps(told))
    model, _ = imported(tmp_path / "hf", tmp_path / "run")
    floats = {name: array.astype(np.float32) for name, array in arrays.items()}
    expected = hf_llama.llama(floats | {"lm_head.weight": floats["model.embed_tokens.weight"]}, told, TOKENS)
    np.testing.assert_allclose(np.asarray(model(TOKENS[None]))[0], expected, atol=CLOSE)


def test_packed_models_are_dequantized(tmp_path):
    arrays, quantizer = parameters(), lb.methods.get("absmax_integer", bits=4, group=16).out.rhs
    linear = [name for name in arrays if "_proj" in name]
    packed = {name.removesuffix(".weight"): quantizer.quantize(jnp.asarray(arrays[name])) for name in linear}
    plain = {name: array for name, array in arrays.items() if name not in linear}
    lb.io.compressed_tensors.save(tmp_path / "hf", packed | plain, config=CONFIG)
    model, _ = imported(tmp_path / "hf", tmp_path / "run")
    floats = plain | {f"{name}.weight": np.asarray(leaf.dequantize()) for name, leaf in packed.items()}
    np.testing.assert_allclose(
        np.asarray(model(TOKENS[None]))[0], hf_llama.llama(floats, CONFIG, TOKENS), atol=CLOSE
    )  # fmt: skip


def test_what_was_exported_is_imported(tmp_path, capsys):
    folder, _ = written(tmp_path / "hf", **SCALED)
    model, _ = imported(folder, tmp_path / "run")
    export.main(Export(run=tmp_path / "run", folder=tmp_path / "out", to="safetensors"))
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert told["rope_scaling"]["original_max_position_embeddings"] == 32
    assert "32.0" not in (tmp_path / "out/config.json").read_text(), "readers ask for an integer"
    again, _ = imported(tmp_path / "out", tmp_path / "again")
    np.testing.assert_array_equal(again(TOKENS[None]), model(TOKENS[None]))
    assert again.config == model.config
    with pytest.raises(NotImplementedError, match="scaling of positions"):
        export.main(Export(run=tmp_path / "run", folder=tmp_path / "gguf", to="gguf"))
    capsys.readouterr()
    text = sample.main(Sample(run=tmp_path / "run", prompt="1 2 3", tokens=4, temperature=0.0, weights="float"))
    assert text.startswith("1 2 3 ") and len(text.split()) == 7


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "qwen2"}, "has model_type 'qwen2', and recipes.llama computes 'llama'"),
        ({"attention_bias": True}, "has attention_bias True"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "positions are scaled by 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "positions are scaled by 'linear'"),
        ({"head_dim": 16}, "its heads have 16 entries"),
        ({"hidden_size": None}, "has hidden_size None; it is a whole number from 1"),
        ({"vocab_size": "many"}, "has vocab_size 'many'; it is a whole number from 1"),
        ({"intermediate_size": 64}, r"gate_proj.weight has the shape \(48, 32\), and config.json makes it \(64, 32\)"),
        ({"num_hidden_layers": 3}, "model.layers.2.* is not there"),
        ({"num_hidden_layers": 1}, "model.layers.1.* is no parameter of a Llama without biases"),
        ({"vocab_size": 41}, r"embed/embedding would be \(40, 32\)"),
        ({"num_key_value_heads": 4}, "k_proj.weight has the shape"),
        ({"num_attention_heads": 0}, "has num_attention_heads 0; it is a whole number from 1"),
        ({"num_attention_heads": 5}, "its width 32 is no multiple of its 5 heads"),
        ({"num_hidden_layers": -1}, "has num_hidden_layers -1"),
        ({"vocab_size": 40.7}, "has vocab_size 40.7"),
        ({"rms_norm_eps": float("nan")}, "has rms_norm_eps nan; it is a positive number"),
        ({"rope_theta": -5.0}, "has rope_theta -5.0"),
        ({"rope_theta": float("inf")}, "has rope_theta inf"),
        ({"rope_parameters": SCALED["rope_parameters"] | {"factor": 0}}, "has factor 0"),
        ({"rope_parameters": ["llama3"]}, "for the scaling of positions, which are tables"),
        ({"tie_word_embeddings": "false"}, "has tie_word_embeddings 'false'; it is true or false"),
    ],
)
def test_what_is_no_such_llama(changes, words, tmp_path):
    folder, _ = written(tmp_path / "hf", **changes)
    with pytest.raises(ValueError, match=words):
        import_hf.main(Import(model=folder, run=tmp_path / "run"))
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_numbers_that_are_none(value, tmp_path):
    arrays = parameters(dtype=np.float64)
    arrays["model.norm.weight"][3] = value
    folder, _ = written(tmp_path / "hf", arrays)
    with pytest.raises(ValueError, match="model.norm.weight holds NaN, or numbers beyond float32"):
        import_hf.main(Import(model=folder, run=tmp_path / "run"))


def test_a_tokenizer_of_another_model(tmp_path):
    library = pytest.importorskip("tokenizers")
    folder, _ = written(tmp_path / "hf", quantization_config=None)
    inner = library.Tokenizer(library.models.WordLevel({str(i): i for i in range(41)}, unk_token="0"))
    inner.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="has 41 ids, and config.json 40"):
        import_hf.main(Import(model=folder, run=tmp_path / "run"))


def test_bad_folders_and_options(tmp_path):
    with pytest.raises(ValueError, match="config.json is no configuration of a model"):
        import_hf.main(Import(model=tmp_path, run=tmp_path / "run"))
    folder, _ = written(tmp_path / "hf")
    with pytest.raises(ValueError, match="--context 65: the model was trained with 64 positions"):
        import_hf.main(Import(model=folder, run=tmp_path / "run", context=65))
    model, _ = imported(folder, tmp_path / "run", context=16)
    assert model.config.context == 16
    with pytest.raises(FileExistsError, match="is a run already, and is not written over"):
        import_hf.main(Import(model=folder, run=tmp_path / "run"))


def test_the_command(tmp_path, capsys):
    folder, _ = written(tmp_path / "hf")
    command.run("import_hf", Import, import_hf.main, import_hf.__doc__, [str(folder), str(tmp_path / "run")])
    assert "2 layers of width 32" in capsys.readouterr().out


def test_a_model_of_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason="transformers and torch are not installed")
    transformers = pytest.importorskip("transformers")
    sizes = {name: value for name, value in (CONFIG | SCALED).items() if name not in ("model_type", "rope_theta")}
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.3)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    model, _ = imported(tmp_path / "hf", tmp_path / "run")
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    np.testing.assert_allclose(np.asarray(model(TOKENS[None]))[0], expected, atol=CLOSE)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("ids") / "ids.bin"
    token_files.write(path, np.random.default_rng(0).integers(0, 40, 4000), vocab_size=40)
    return path


class TestTraining:
    """What starts from an imported model."""

    def test_it_starts_from_the_imported_weights(self, text, tmp_path, capsys):
        folder, _ = written(tmp_path / "hf", **SCALED)
        model, _ = imported(folder, tmp_path / "run")
        config = Pretrain(
            preset=str(tmp_path / "run"), init_from=tmp_path / "run", out=tmp_path / "trained", data=str(text),
            tokenizer="ids", method="none", steps=2, batch=4, context=32, learning_rate=1e-12, weight_decay=0.0,
            tensorboard=False, sample_tokens=4,
        )  # fmt: skip
        answer = pretrain.main(config)
        trained, _ = finished.load(tmp_path / "trained", weights="float")
        np.testing.assert_allclose(trained(TOKENS[None]), model(TOKENS[None]), atol=1e-4)
        assert answer["runs"]["unquantized"]["validation_loss"] > 3 and trained.vocab_size == 40

    def test_in_few_bits(self, text, tmp_path):
        folder, _ = written(tmp_path / "hf")
        imported(folder, tmp_path / "run")
        config = Pretrain(
            preset=str(tmp_path / "run"), init_from=tmp_path / "run", data=str(text), tokenizer="ids", bits=4, steps=8,
            batch=4, context=32, learning_rate=3e-3, tensorboard=False, sample_tokens=4, out=tmp_path / "trained",
        )  # fmt: skip
        answer = pretrain.main(config)
        losses = [answer["packed"]["validation_loss"], answer["runs"]["quest-w4a4"]["validation_loss"]]
        assert all(3.5 < loss < 6 for loss in losses)
        assert abs(losses[0] - losses[1]) < 0.1  # heads of a group answer alike at first, on the edge of two levels

    def test_settings_that_do_not_fit_the_model(self, text, tmp_path):
        folder, _ = written(tmp_path / "hf")
        imported(folder, tmp_path / "run")
        config = Pretrain(preset=str(tmp_path / "run"), data=str(text), tokenizer="ids", tensorboard=False)
        with pytest.raises(ValueError, match="was imported and has no number of steps. Pass --steps"):
            pretrain.main(config)
        more = dataclasses.replace(config, steps=2, tokenizer="bytes", data="stdlib")
        with pytest.raises(ValueError, match="has 256 different ids, and the model 40"):
            pretrain.main(more)
        with pytest.raises(ValueError, match="has no preset"):
            pretrain.main(dataclasses.replace(config, preset=str(tmp_path / "nowhere")))
