"""The measurements run, on sizes that say nothing about speed, and what they write can be read again."""

import json

import jax
import pytest

from benchmarks import breakdown, int8_products, packed, train_step
from benchmarks.contenders import contenders
from benchmarks.models import WORKLOADS
from benchmarks.timing import compile_program, ratio


@pytest.fixture(autouse=True)
def as_elsewhere(monkeypatch):
    """Optax, Qwix and AQT promote implicitly; the strict rules of the other tests are for our own code. And compiled
    functions of other tests stay, where a measurement would begin from nothing."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_ratio_is_taken_within_a_round():
    """A machine that slows down threefold between rounds does not change the ratio 2."""
    assert ratio([2.0, 6.0, 2.0], [1.0, 3.0, 1.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


@pytest.mark.parametrize(("model", "scaling"), [("mlp", (32,)), ("llama", ())])
def test_train_step_report(model, scaling, tmp_path):
    config = train_step.Config(
        models=(model,), widths=(128,), depths=(1,), tokens=64, scaling=scaling, rounds=2, compiles=1,
        only=("quest_w4a4",), output=tmp_path,
    )  # fmt: skip
    report = json.loads(train_step.main(config).read_text())
    rows = report["tables"][0]["rows"]
    assert set(rows) == {"float32", "quest_w4a4"}
    assert rows["float32"]["step_ratio"]["median"] == 1.0
    assert all(row["step_ms"] > 0 and row["peak_mib"] > row["temp_mib"] > 0 for row in rows.values())
    page = (tmp_path / "train_step_cpu.md").read_text()
    assert "quest_w4a4" in page and ("Cost a token" in page) == bool(scaling)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the peers
@pytest.mark.parametrize("name", [n for n in contenders() if n != "float32"])
def test_contender_quantizes_the_named_layers_and_nothing_is_left_out(name):
    """Every contender's output differs from float32's by a 4-bit error: it neither passes through nor breaks."""
    work = WORKLOADS["mlp"]
    x, _ = work.batch(32, 128)
    model = work.build(128, 1)
    quantized_model = contenders()[name](model, x, work.layers)
    plain, quantized = (jax.jit(lambda m, x: m(x) - x)(m, x) for m in (model, quantized_model))
    error = float(((plain - quantized) ** 2).mean() / (plain**2).mean()) ** 0.5
    assert 0.05 < error < 0.5


def test_unknown_contender(tmp_path):
    with pytest.raises(ValueError, match="no contender .'gptq'.*quest_w4a4"):
        train_step.measure(train_step.Config(only=("gptq",), output=tmp_path))


def test_every_operation_has_an_owner():
    work = WORKLOADS["mlp"]
    batch = work.batch(32, 128)
    program = compile_program(contenders()["quest_w4a4"](work.build(128, 1), batch[0], work.layers), work.loss, batch)
    found = breakdown.accounts(program)
    assert {"product", "optimizer"} <= set(found)
    assert any("rotation" in name for name in found)
    assert all(seconds > 0 for seconds in found.values())


def test_int8_report(tmp_path, monkeypatch):
    monkeypatch.setattr(int8_products, "SIZES", ((16, 64, 8), (16, 8, 8)))
    int8_products.main(int8_products.Config(rounds=2, output=tmp_path))
    rows = json.loads((tmp_path / "int8_products_cpu.json").read_text())["rows"]
    assert [row["size"] for row in rows] == ["16 x 64 x 8", "16 x 8 x 8"] and not rows[1]["taken"]
    for row in rows:
        assert row["int8_ms"] > 0 and int8_products.markdown_row(row) in (tmp_path / "int8_products_cpu.md").read_text()


def test_packed_report(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "RECIPES", {"w4a4": packed.RECIPES["w4a4"]})
    packed.main(packed.Config(width=128, rows=(2,), rounds=2, output=tmp_path))
    rows = json.loads((tmp_path / "packed_cpu.json").read_text())["rows"]
    assert {row["layout"] for row in rows} == set(packed.LAYOUTS)
    for row in rows:
        assert row["packed_ms"] > 0 and row["packed_mib"] < row["float_mib"] / 4
        assert packed.markdown_row(row) in (tmp_path / "packed_cpu.md").read_text()
