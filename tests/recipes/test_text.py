"""Text and tokens: what is read, how it is split, the order of batches, and every way the data can be wrong."""

import json
import os
import pathlib
import sys
import tomllib
import types

import numpy as np
import pytest

from recipes import text, token_files, tokenizers

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02d}.txt").write_text(f"file {i} says " + chr(65 + i) * (50 + i))
    return tmp_path


def test_stdlib_is_megabytes_of_python():
    corpus = text.load()
    assert len(corpus.train) > 5_000_000 and b"def __init__" in corpus.train[:200_000].tobytes()
    assert 0.045 < len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) < 0.08
    assert corpus.vocab_size == 256 and corpus.bytes_per_token == 1


def test_folder_is_split_by_whole_documents(folder):
    corpus = text.load(str(folder), held_out=0.1)
    kept, held = (set(part.tobytes().split(b"\0")) - {b""} for part in (corpus.train, corpus.validation))
    assert kept | held == {file.read_bytes() for file in folder.iterdir()} and not kept & held
    assert corpus.fingerprint == text.load(str(folder), held_out=0.1).fingerprint
    (folder / "07.txt").write_text("something else")
    assert corpus.fingerprint != text.load(str(folder), held_out=0.1).fingerprint


def test_glob_chooses_files(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "note.md").write_text("# a note" * 10)
    corpus = text.load(str(folder), glob="**/*.md", held_out=0.5)
    assert (corpus.train.tobytes() + corpus.validation.tobytes()).replace(b"\0", b"") == b"# a note" * 10


def test_one_file_holds_out_its_end(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 900 + "y" * 100)
    corpus = text.load(str(tmp_path / "a.txt"), held_out=0.1)
    assert corpus.train.tobytes() == b"x" * 900 + b"\0" and corpus.validation.tobytes() == b"y" * 100 + b"\0"


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_huge_document_among_many_does_not_overshoot(share):
    """Wherever it falls in the order: at most twice the share is held out, or half of the rest kept; all is there."""
    for place in range(40):
        documents = [chr(0x400 + i) * (20_000 if i == place else 80) for i in range(40)]
        kept, held = text._split(documents, share)
        sizes = [sum(map(len, part)) for part in (kept, held)]
        assert share <= sizes[1] / sum(sizes) <= min(2 * share, (1 + share) / 2)
        assert sorted("".join(kept + held)) == sorted("".join(documents))


class TestBatches:
    tokens = np.arange(4 * 40 + 1, dtype=np.uint16)

    def take(self, count, seed=0, state=None):
        batches = text.batches(self.tokens, context=4, batch=5, seed=seed)
        if state is not None:
            batches.set_state(state)
        return [next(batches) for _ in range(count)]

    def test_each_epoch_shows_every_window_once_in_its_own_order(self):
        rows = np.concatenate(self.take(16))
        assert rows.dtype == np.int32 and rows.shape == (80, 5)
        np.testing.assert_array_equal(rows - rows[:, :1], np.tile(np.arange(5), (80, 1)))
        first, second = rows[:40, 0], rows[40:, 0]
        np.testing.assert_array_equal(np.sort(first), np.arange(0, 160, 4))
        np.testing.assert_array_equal(np.sort(second), np.sort(first))
        assert (first != second).any() and (first != np.sort(first)).any()

    def test_batches_of_one_hold_the_same_rows(self):
        ones = text.batches(self.tokens, context=4, batch=1, seed=0)
        np.testing.assert_array_equal([next(ones)[0] for _ in range(45)], np.concatenate(self.take(9)))

    def test_the_seed_decides(self):
        np.testing.assert_array_equal(self.take(3), self.take(3))
        assert (np.stack(self.take(3)) != np.stack(self.take(3, seed=1))).any()

    def test_state_is_json_and_resumes(self):
        batches = text.batches(self.tokens, context=4, batch=5, seed=0)
        for _ in range(9):
            next(batches)
        state = json.loads(json.dumps(batches.get_state()))
        np.testing.assert_array_equal(self.take(4, state=state), [next(batches) for _ in range(4)])

    def test_fixed_batches_are_spread_and_full(self):
        batches = text.fixed_batches(self.tokens, context=4, batch=8, windows=20)
        assert [batch.shape for batch in batches] == [(8, 5), (8, 5)]
        starts = np.concatenate(batches)[:, 0]
        assert starts[0] == 0 and starts[-1] == 156 and (np.diff(starts) > 0).all()
        assert text.fixed_batches(self.tokens[:9], context=4, batch=8, windows=20)[0].shape == (2, 5)


class TestFaults:
    def test_missing(self):
        with pytest.raises(ValueError, match="'no/such/place' is not 'stdlib'"):
            text.load("no/such/place")

    def test_empty_file_and_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"found no file in .* that fits '\*\*/\*'"):
            text.load(str(tmp_path))
        (tmp_path / ".hidden.md").write_text("hidden")
        with pytest.raises(ValueError, match=r"found no file in .* that fits '\*.md' .* start with a dot"):
            text.load(str(tmp_path), glob="*.md")
        (tmp_path / "a.txt").touch()
        with pytest.raises(ValueError, match="holds no text"):
            text.load(str(tmp_path / "a.txt"))

    @pytest.mark.parametrize("glob", ["", "/etc/*.txt"])
    def test_a_glob_that_is_none(self, folder, glob):
        with pytest.raises(ValueError, match=f"the glob '{glob}' is no pattern".replace("*", r"\*")):
            text.load(str(folder), glob=glob)

    def test_not_utf8(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
        with pytest.raises(ValueError, match=r"a.txt is not UTF-8: byte 0xe9 at offset 3"):
            text.load(str(tmp_path / "a.txt"))

    def test_a_folder_bears_few_broken_files_and_says_so(self, folder, capsys):
        (folder / "bad.txt").write_bytes(b"\xff")
        corpus = text.load(str(folder))
        assert "left out 1 of 41 files" in capsys.readouterr().out and len(corpus.train) > 1000
        (folder / "bad2.txt").write_bytes(b"\xff")
        (folder / "bad3.txt").write_bytes(b"\xff")
        with pytest.raises(ValueError, match="3 of 43 files so far"):
            text.load(str(folder))

    @pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8")
    def test_a_name_that_is_not_utf8_can_be_printed(self, tmp_path, capsys):
        folder = tmp_path / os.fsdecode(b"\xfetexts")
        folder.mkdir()
        for i in range(25):
            (folder / f"{i:02d}.txt").write_text(f"file {i}")
        (folder / os.fsdecode(b"\xff.txt")).write_bytes(b"\xff")
        corpus = text.load(str(folder))
        assert r"\xfetexts/\xff.txt is not UTF-8" in capsys.readouterr().out  # a strict UTF-8 stream
        assert r"\xfetexts (25 documents" in corpus.note

    def test_too_small_names_both_numbers(self, folder):
        corpus = text.load(str(folder))
        with pytest.raises(ValueError, match=r"training part .* has \d+ tokens; 16 sequences of 1000 need 16001"):
            corpus.check(context=1000, batch=16)
        with pytest.raises(ValueError, match="held-out part"):
            corpus.check(context=400, batch=1)

    @pytest.mark.parametrize("options", [{"glob": "*.txt"}, {"hf_bytes": 5}, {"held_out": 0.0}, {"held_out": 1.5},
                                         {"tokenizer": "ids"}, {"tokenizer": "missing.json"}])  # fmt: skip
    def test_options_without_effect_raise(self, options):
        with pytest.raises(ValueError, match="recipes"):
            text.load("stdlib", **options)


class TestHuggingFace:
    """Through a stand-in for the package `datasets`, which is optional and needs a network."""

    def install(self, monkeypatch, rows):
        def load_dataset(name, *, split, streaming):
            assert (name, split, streaming) == ("someone/texts", "train", True)
            if rows is None:
                raise ConnectionError("no route")
            return rows

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))

    def test_rows_up_to_the_limit(self, monkeypatch):
        self.install(monkeypatch, [{"text": f"{i:04d} é"} for i in range(1000)])
        corpus = text.load("hf:someone/texts", hf_bytes=700)
        documents = (corpus.train.tobytes() + corpus.validation.tobytes()).split(b"\0")[:-1]
        assert sorted(documents) == [f"{i:04d} é".encode() for i in range(100)]  # 7 bytes each

    def test_rows_without_text_are_skipped(self, monkeypatch):
        self.install(monkeypatch, [{"text": None}, *({"text": f"row {i}"} for i in range(30)), {"text": None}])
        assert "30 documents" in text.load("hf:someone/texts").note

    @pytest.mark.parametrize(
        ("rows", "words"), [(None, "no route"), ([{"body": "x"}], "column 'text'.*has body"), ([], "has no rows")]
    )
    def test_unreachable_or_without_text(self, monkeypatch, rows, words):
        self.install(monkeypatch, rows)
        with pytest.raises(ValueError, match=words):
            text.load("hf:someone/texts")

    def test_package_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"pip install 'lowbit_jax\[recipes,hf\]'"):
            text.load("hf:someone/texts")
        extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert extras["hf"][0].startswith("datasets")


class TestTokenFiles:
    @pytest.fixture
    def path(self, tmp_path):
        token_files.write(tmp_path / "t.bin", np.arange(1000) % 300, vocab_size=300, text_bytes=4000)
        return tmp_path / "t.bin"

    def test_round_trip(self, path):
        corpus = text.load(str(path), tokenizer="ids", held_out=0.1)
        np.testing.assert_array_equal(np.concatenate([corpus.train, corpus.validation]), np.arange(1000) % 300)
        assert len(corpus.train) == 900 and corpus.bytes_per_token == 4 and corpus.vocab_size == 384

    def test_layout_is_little_endian_uint16_or_uint32(self, path):
        assert path.read_bytes()[:8] == b"\0\0\1\0\2\0\3\0"
        token_files.write(path, np.asarray([70_000]), vocab_size=70_001)
        assert path.read_bytes() == (70_000).to_bytes(4, "little")

    def test_no_index(self, path):
        path.with_suffix(".json").unlink()
        with pytest.raises(ValueError, match='has no index. Write .*t.json such as {"version": 1'):
            text.load(str(path), tokenizer="ids")

    def test_cut_short(self, path):
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match="1999 bytes, and its index promises 1000 ids of 2 bytes"):
            text.load(str(path), tokenizer="ids")

    def test_id_outside_the_vocabulary(self, path):
        index = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(index | {"vocab_size": 299}))
        with pytest.raises(ValueError, match="holds the id 299 at position 299"):
            text.load(str(path), tokenizer="ids")

    def test_tokenizer_with_fewer_words(self, path):
        with pytest.raises(ValueError, match="vocabulary of 300 and the tokenizer 'bytes' one of 256"):
            text.load(str(path))

    def test_a_folder_may_be_named_so(self, tmp_path):
        (tmp_path / "x.bin").mkdir()
        (tmp_path / "x.bin" / "a.txt").write_text("text in a folder")
        assert "1 documents" in text.load(str(tmp_path / "x.bin")).note

    @pytest.mark.parametrize(
        "change", [{"tokens": "1000"}, {"tokens": 1000.0}, {"vocab_size": "300"}, {"vocab_size": None},
                   {"vocab_size": 0}, {"bytes": "many"}, {"bytes": -1}]
    )  # fmt: skip
    def test_fields_that_are_no_numbers(self, path, change):
        index = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=f"t.json has the {next(iter(change))} .*must be a whole number"):
            token_files.read(path)

    def test_a_vocabulary_beyond_int32(self, path):
        index = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(index | {"vocab_size": 99999999999}))
        with pytest.raises(ValueError, match="vocab_size 99999999999; ids are read as int32, so it can be 2147483648"):
            token_files.read(path)

    @pytest.mark.parametrize("index", ["{", "[]", "{}", "5", "null",
                                       '{"version": 2, "dtype": "uint16", "tokens": 1, "vocab_size": 1}',
                                       '{"version": 1, "dtype": "int9", "tokens": 1, "vocab_size": 1}'])  # fmt: skip
    def test_broken_index(self, path, index):
        path.with_suffix(".json").write_text(index)
        with pytest.raises(ValueError, match="t.json"):
            token_files.read(path)

    def test_write_takes_the_name_as_text_and_the_ids_as_a_list(self, tmp_path):
        token_files.write(str(tmp_path / "v1.5.bin"), [3, 1, 2], vocab_size=4)
        ids, index = token_files.read(str(tmp_path / "v1.5.bin"))
        assert ids.tolist() == [3, 1, 2] and index["tokens"] == 3

    @pytest.mark.parametrize(
        ("name", "ids", "error", "words"),
        [("t.json", [1, 2], ValueError, "t.json is not named .bin. Pass .*t.bin"),
         ("t", [1, 2], ValueError, "t is not named .bin. Pass .*t.bin"),
         ("t.bin", [[1, 2]], ValueError, r"ids of shape \(1, 2\)"), ("t.bin", 1, ValueError, r"ids of shape \(\)"),
         ("t.bin", [0.7, 1.0], TypeError, "integers, not float64"), ("t.bin", [True], TypeError, "integers, not bool")],
    )  # fmt: skip
    def test_write_refuses_what_it_could_not_read_back(self, tmp_path, name, ids, error, words):
        with pytest.raises(error, match=words):
            token_files.write(tmp_path / name, ids, vocab_size=5)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("size", [0, 2**31 + 1])
    def test_write_refuses_a_vocabulary_that_cannot_be_read_back(self, tmp_path, size):
        with pytest.raises(ValueError, match=f"a vocabulary of {size}; 1 to 2147483648"):
            token_files.write(tmp_path / "t.bin", [], vocab_size=size)

    def test_write_refuses_ids_outside(self, tmp_path):
        with pytest.raises(ValueError, match="ids from 0 to 5 in a vocabulary of 5"):
            token_files.write(tmp_path / "t.bin", np.arange(6), vocab_size=5)


class TestTokenizers:
    def test_bytes(self):
        tokens = tokenizers.load("bytes")
        ids = tokens.encode("naïve €")
        np.testing.assert_array_equal(ids, list("naïve €".encode()))
        assert tokens.decode(ids) == "naïve €" and tokens.decode(ids[:3]) == "na\ufffd"

    def test_tokenizer_file(self, tmp_path):
        library = pytest.importorskip("tokenizers")
        words = {"[UNK]": 0, "low": 1, "bit": 2, "</s>": 3}
        inner = library.Tokenizer(library.models.WordLevel(words, unk_token="[UNK]"))
        inner.pre_tokenizer = library.pre_tokenizers.Whitespace()
        inner.save(str(tmp_path / "tokenizer.json"))
        tokens = tokenizers.load(str(tmp_path / "tokenizer.json"))
        np.testing.assert_array_equal(tokens.encode("low bit what"), [1, 2, 0])
        assert (tokens.vocab_size, tokens.separator, tokens.decode(np.asarray([1, 2]))) == (4, 3, "low bit")
        (tmp_path / "a.txt").write_text("low bit " * 100)
        corpus = text.load(str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "tokenizer.json"), held_out=0.5)
        assert corpus.vocab_size == 128 and corpus.bytes_per_token == pytest.approx(4, abs=0.1)

    def words(self, path, words, **settings):
        library = pytest.importorskip("tokenizers")
        inner = library.Tokenizer(library.models.WordLevel(words, unk_token="[UNK]"))
        inner.pre_tokenizer = library.pre_tokenizers.Whitespace()
        for name, options in settings.items():
            getattr(inner, name)(**options)
        inner.save(str(path))
        return tokenizers.load(str(path))

    def test_the_length_a_file_was_made_for_does_not_cut_or_pad(self, tmp_path):
        lengths = {"enable_truncation": {"max_length": 2}, "enable_padding": {"length": 9}}
        tokens = self.words(tmp_path / "t.json", {"[UNK]": 0, "low": 1, "bit": 2}, **lengths)
        np.testing.assert_array_equal(tokens.encode("low bit low"), [1, 2, 1])

    def test_ids_with_gaps_stay_what_they_are(self, tmp_path):
        tokens = self.words(tmp_path / "t.json", {"[UNK]": 0, "low": 1, "bit": 300})
        assert tokens.vocab_size == 301
        np.testing.assert_array_equal(text._join(["low bit", "bit"], tokens), [1, 300, 300])

    def test_ids_beyond_the_vocabulary_are_told(self):
        class Small(tokenizers.Bytes):
            vocab_size = 100

        with pytest.raises(ValueError, match="the tokenizer 'bytes' wrote the id 119, and its vocabulary has 100"):
            text._join(["low"], Small())

    def test_a_text_that_cannot_be_encoded(self, tmp_path):
        tokens = self.words(tmp_path / "t.json", {"low": 0})  # and no [UNK]
        with pytest.raises(ValueError, match="t.json cannot encode the text that starts with 'low bit': .*--tokenizer"):
            tokens.encode("low bit")

    def test_not_a_tokenizer_file(self, tmp_path):
        pytest.importorskip("tokenizers")
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match="cannot read .*tokenizer.json"):
            tokenizers.load(str(tmp_path / "tokenizer.json"))

    def test_ids_read_numbers(self):
        tokens = tokenizers.Ids(10)
        np.testing.assert_array_equal(tokens.encode("3 1 4"), [3, 1, 4])
        with pytest.raises(ValueError, match="reads numbers, not text such as 'def '"):
            tokens.encode("def ")
        for outside in ("-5", "10", "99999999999"):
            with pytest.raises(ValueError, match=f"ids from 0 to 9, not {outside};"):
                tokens.encode(f"3 {outside}")
