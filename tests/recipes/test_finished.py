"""A finished run, opened again: it writes the very text that its training printed, and says why where it cannot."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

import lowbit_jax as lb
from benchmarks import kv_cache, post_training
from lowbit_jax.nn import weight
from recipes import command, deliver, finished, pretrain, sample, token_files
from recipes.pretrain import Pretrain
from recipes.sample import Sample

WORDS = ["[UNK]", "the", "square", "of", "is", *map(str, range(100))]


def trained(folder, **changes) -> Pretrain:
    """A run of three steps."""
    (folder / "words.txt").write_text("".join(f"the square of {i} is {i * i} \n" for i in range(2000)))
    config = Pretrain(preset="smoke", steps=3, data=str(folder / "words.txt"), out=folder / "run", tensorboard=False,
                      sample_tokens=50, prompt="the square of ", seed=7)  # fmt: skip
    config = dataclasses.replace(config, **changes)
    pretrain.main(config)
    return config


def same_again(config: Pretrain, **changes) -> Sample:
    assert config.out is not None and config.prompt is not None
    again = Sample(run=config.out, prompt=config.prompt, tokens=config.sample_tokens, seed=config.seed,
                   temperature=config.temperature)  # fmt: skip
    return dataclasses.replace(again, **changes)


def printed_by(config: Pretrain) -> str:
    return json.loads((config.out / "results.json").read_text())["sample"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Pretrain:
    """A run with rules on the ids of a tokenizer.json."""
    library = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("words")
    inner = library.Tokenizer(library.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = library.pre_tokenizers.Whitespace()
    inner.save(str(folder / "tokenizer.json"))
    return trained(folder, tokenizer=str(folder / "tokenizer.json"), rules=("blocks/mlp/down=quest:8",))


@pytest.fixture(scope="module")
def unquantized(tmp_path_factory) -> Pretrain:
    """A run in high precision."""
    return trained(tmp_path_factory.mktemp("unquantized"), method="none")


@pytest.fixture
def copy(words, tmp_path):
    """That run, moved to another folder."""
    shutil.copytree(words.out, tmp_path / "moved")
    return tmp_path / "moved"


def change(run, **fields) -> None:
    content = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(content | fields))


class TestTheSameText:
    def test_from_packed_weights(self, words, copy):
        assert sample.main(same_again(words)) == printed_by(words)
        assert sample.main(same_again(words, run=copy, seed=8)) != printed_by(words)
        assert sample.main(same_again(words, cache_bits=8)).startswith("the square of ")
        with pytest.raises(ValueError, match="kv_cache: 9 bits"):
            sample.main(same_again(words, cache_bits=9))

    def test_what_few_bits_of_keys_and_values_cost_is_measured(self, words, tmp_path, capsys):
        config = kv_cache.Config(run=words.out, bits=(8, 2), windows=8, rounds=1, output=tmp_path)
        report = json.loads(kv_cache.main(config).read_text())
        exact, eight, two = report["rows"]
        assert abs(exact["above"]) < 1e-4 and abs(eight["above"]) < abs(two["above"]) + 0.01
        assert two["bytes"] < eight["bytes"] < exact["bytes"] and report["ratio"]["median"] > 0
        assert "| 2 bits |" in capsys.readouterr().out

    def test_learned_steps_bfloat16_bare_ids_and_the_layout_of_another_machine(self, tmp_path, monkeypatch):
        ids = np.random.default_rng(0).integers(0, 300, 4000).astype(np.uint32)
        token_files.write(tmp_path / "ids.bin", ids, vocab_size=300)
        with monkeypatch.context() as patch:
            patch.setattr(weight, "default_layout", lambda: weight.PLANES)
            patch.setattr(lb.nn, "default_layout", lambda: weight.PLANES)
            config = trained(tmp_path, data=str(tmp_path / "ids.bin"), tokenizer="ids", method="lsq", bits=2,
                             dtype="bfloat16", param_dtype="bfloat16", prompt="1 2 299", sample_tokens=8)  # fmt: skip
        assert json.loads((config.out / "run.json").read_text())["layout"] == weight.PLANES
        assert sample.main(same_again(config)) == printed_by(config)
        _, codec = finished.load(config.out)
        assert codec.vocab_size == 300

    def test_what_packing_after_training_costs_is_measured(self, words, unquantized, tmp_path, monkeypatch):
        measured = post_training.Config(run=unquantized.out, bits=(3,), windows=8, calibration=8, output=tmp_path)
        few = dict(list(post_training.recipes(3).items())[1:2])
        monkeypatch.setattr(post_training, "recipes", lambda bits: few)
        monkeypatch.setattr(post_training, "activations", lambda bits, all=post_training.activations: {
            name: row for name, row in all(bits).items() if bits == 4 and "percentile" not in name
        })  # fmt: skip
        report = json.loads(post_training.main(measured).read_text())
        rows = report["rows"]
        assert [row["bits"] for row in report["activations"]] == [4, 4, 4]
        assert all(0 < abs(row["above"]["above"]) < 1 for row in report["activations"])
        assert len(rows) == 1 and all(3 < row["bits_per_weight"] < 5 for row in rows)
        assert all(abs(row[how]["above"]) < 1 for row in rows for how in ("nearest", "gptq"))
        with pytest.raises(ValueError, match="trained with the method 'quest'"):
            post_training.main(dataclasses.replace(measured, run=words.out))

    def test_unquantized_from_the_last_checkpoint(self, unquantized, tmp_path):
        shutil.copytree(unquantized.out, tmp_path / "run")
        config = dataclasses.replace(unquantized, out=tmp_path / "run")
        with pytest.raises(ValueError, match="method 'none' and has no packed weights. .*--weights float"):
            finished.load(config.out)
        assert sample.main(same_again(config, weights="float")) == printed_by(config)
        size = json.loads((config.out / "run.json").read_text())["model_config"]
        change(config.out, model_config=size | {"steps": 5})
        with pytest.raises(ValueError, match="is of step 3, and the run has 5. Run its command again"):
            finished.load(config.out, weights="float")
        shutil.rmtree(config.out / "unquantized" / "checkpoints" / "step_00000003")
        with pytest.raises(ValueError, match="holds no checkpoint that verifies"):
            finished.load(config.out, weights="float")

    def test_the_command(self, words, capsys):
        command.run("sample", Sample, sample.main, None, [str(words.out), "--prompt", "the", "--tokens", "3"])
        assert len(capsys.readouterr().out.split()) == 4
        with pytest.raises(SystemExit, match="sample: finished: there is no run directory nowhere"):
            command.run("sample", Sample, sample.main, None, ["nowhere", "--prompt", "the"])

    @pytest.mark.parametrize("fields", [{"prompt": ""}, {"tokens": 0}, {"temperature": -1.0}, {"seed": -1}])
    def test_senseless_settings(self, words, fields):
        with pytest.raises(ValueError, match="sampling: |--seed must lie"):
            sample.main(same_again(words, **fields))


def test_float_weights_compute_nearly_as_the_packed_ones(words):
    """Both are products of the same codes; sums in another order, over at most 128 terms, at logits of order 1."""
    (packed, codec), (trained, _) = finished.load(str(words.out)), finished.load(words.out, weights="float")
    ids = codec.encode("the square of 9 is 81")
    assert packed(ids[None]).shape == (1, 6, 128)
    np.testing.assert_allclose(packed(ids[None]), trained(ids[None]), atol=1e-4)
    size = lambda model: sum(leaf.nbytes for leaf in jax.tree.leaves(deliver.nnx.state(model.blocks)))
    assert size(packed) < size(trained) / 3


class TestFaults:
    def test_no_run(self, words, tmp_path):
        with pytest.raises(ValueError, match="there is no run directory .*nowhere"):
            finished.load(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="is no run directory, it has no config.json. Pass what"):
            finished.load(tmp_path)
        with pytest.raises(ValueError, match=f"Did you mean {words.out}"):
            finished.load(words.out / "packed")
        with pytest.raises(ValueError, match="weights are 'packed' or 'float', not 'int8'"):
            finished.load(words.out, weights="int8")

    def test_not_finished_or_from_before(self, words, copy):
        """The way out is tried: the same command trains nothing and makes the run whole."""
        (copy / "run.json").unlink()
        with pytest.raises(ValueError, match="has no run.json, .* not finished, or older .*Run its command again"):
            finished.load(copy)
        pretrain.main(dataclasses.replace(words, out=copy))
        assert sample.main(same_again(words, run=copy)) == printed_by(words)

    def test_killed_while_it_packs_again(self, words, copy, monkeypatch):
        monkeypatch.setattr(deliver, "show", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(dataclasses.replace(words, out=copy))
        with pytest.raises(ValueError, match="has no run.json"):
            finished.load(copy)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_stopped_by_a_signal_while_it_packs_again(self, words, copy, monkeypatch, number):
        """The command ends with the status of the signal, and what it left is no finished run; it goes on."""
        entropy = deliver.unigram_entropy
        told = lambda corpus: os.kill(os.getpid(), number) or entropy(corpus)
        main = lambda _: pretrain.main(dataclasses.replace(words, out=copy))
        with monkeypatch.context() as patch:
            patch.setattr(deliver, "unigram_entropy", told)
            with pytest.raises(SystemExit) as ended:
                command.run("pretrain", Pretrain, main, None, [])
        assert ended.value.code == 128 + number
        with pytest.raises(ValueError, match="has no run.json"):
            finished.load(copy)
        main(None)
        assert sample.main(same_again(words, run=copy)) == printed_by(words)

    def test_weights_that_are_gone_or_damaged(self, copy):
        (copy / "float" / "manifest.json").write_text("{")
        with pytest.raises(ValueError, match="the weights in .*float are damaged.* Run the same command again"):
            finished.load(copy, weights="float")
        shutil.rmtree(copy / "packed")
        with pytest.raises(ValueError, match="packed is gone. Run the command of the run again"):
            finished.load(copy)

    def test_another_version(self, copy):
        change(copy, version=2)
        with pytest.raises(ValueError, match="run.json is of version 2, and these recipes read version 1"):
            finished.load(copy)

    @pytest.mark.parametrize(
        "fields",
        [{"scheme": []}, {"model_config": {"layers": 1}}, {"new": 1}, {"scheme": {}}, {"vocab_size": -5},
         {"vocab_size": 256.0}, {"dtype": "float33"}, {"param_dtype": None}, {"layout": 3}],
    )  # fmt: skip
    def test_a_file_that_no_run_wrote(self, copy, fields):
        change(copy, **fields)
        with pytest.raises(ValueError, match="run.json is not what recipes.pretrain writes there"):
            finished.load(copy)
        (copy / "run.json").write_text("{")
        with pytest.raises(ValueError, match="run.json is not what recipes.pretrain writes there"):
            finished.load(copy)

    @pytest.mark.parametrize("fields", [{"layers": 0}, {"width": "64"}, {"learning_rate": None}, {"init": 1}])
    def test_a_model_that_no_run_has(self, copy, fields):
        size = json.loads((copy / "run.json").read_text())["model_config"]
        change(copy, model_config=size | fields)
        with pytest.raises(ValueError, match=f"run.json is not what .*{next(iter(fields))}"):
            finished.load(copy)

    def test_weights_of_another_model_than_the_file_says(self, copy):
        scheme = json.loads((copy / "run.json").read_text())["scheme"]
        for other, weights in ({"bits": 3}, "packed"), ({"method": "lsq", "bits": 2}, "float"):
            change(copy, scheme=scheme | other)
            with pytest.raises(
                ValueError, match=rf"{weights} (stores|and this run).*\. Its run.json was changed"
            ) as told:
                finished.load(copy, weights=weights)
            assert ".." not in str(told.value) and "--out" not in str(told.value)


class TestTokenizer:
    def test_moved(self, words, copy, tmp_path):
        change(copy, tokenizer=str(tmp_path / "gone" / "tokenizer.json"))
        with pytest.raises(ValueError, match="the tokenizer of the run is not at .*gone/tokenizer.json. .*--tokenizer"):
            finished.load(copy)
        assert sample.main(same_again(words, run=copy, tokenizer=words.tokenizer)) == printed_by(words)

    def test_changed(self, words, copy, tmp_path):
        other = tmp_path / "tokenizer.json"
        other.write_text(open(words.tokenizer).read().replace('"the"', '"and"'))
        change(copy, tokenizer=str(other))
        with pytest.raises(ValueError, match="is not the file that the run was trained with"):
            finished.load(copy)

    def test_of_bytes_and_of_ids(self, words, copy):
        change(copy, tokenizer="bytes", tokenizer_sha256=None)
        with pytest.raises(ValueError, match="the run was trained on bytes"):
            finished.load(copy, tokenizer=words.tokenizer)
        change(copy, tokenizer="ids")
        assert finished.load(copy)[1].decode(np.asarray([1, 2])) == "1 2"
        assert finished.load(copy, tokenizer=words.tokenizer)[1].decode(np.asarray([1, 2])) == "the square"
        change(copy, vocab_size=100)
        with pytest.raises(ValueError, match="a vocabulary of 105, and the model one of 100"):
            finished.load(copy, tokenizer=words.tokenizer)
