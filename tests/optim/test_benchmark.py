"""The measurement runs, on sizes that say nothing about speed, and what it writes can be read again."""

import json

import pytest

from benchmarks import optim


@pytest.mark.slow
def test_report(tmp_path, monkeypatch):
    few = (optim.REFERENCE, "AdamW 8-bit", "AdamW 4-bit")
    monkeypatch.setattr(optim, "CONTENDERS", {name: optim.CONTENDERS[name] for name in few})
    config = optim.Config(
        millions=0.1, width=128, depth=1, tokens=64, rounds=1, parts=("updates", "steps"), output=tmp_path
    )
    report = json.loads(optim.main(config).read_text())
    kept = {"updates": 0, "steps": 256 * 128 / report["steps"][optim.REFERENCE]["parameters"]}  # embedding, in float32
    for table, share in kept.items():
        assert report[table][optim.REFERENCE]["ratio"]["median"] == 1.0
        assert report[table]["AdamW 8-bit"]["state_bytes"] < 8 * share + 2.1 * (1 - share)
        assert report[table]["AdamW 4-bit"]["state_bytes"] < 8 * share + 1.15 * (1 - share)
    assert "AdamW 8-bit" in (tmp_path / "optim_cpu.md").read_text()


def test_differences_are_paired():
    """Seeds that differ by 1 and contenders that differ by 0.1 +- 0.02: the standard error is that of the pairs."""
    mean, error = optim.paired([1.12, 2.08, 3.1], [1.0, 2.0, 3.0])
    assert mean == pytest.approx(0.1) and error == pytest.approx(0.02 / 3**0.5)
    assert optim.paired([1.5], [1.0]) == (0.5, None)
    table = optim.loss_table("t", {optim.REFERENCE: [1.0, 2.0, 3.0], "x": [1.12, 2.08, 3.1]})
    assert "+0.1000 ± 0.0115" in table


@pytest.mark.slow
def test_contenders_with_an_axis_and_a_reference_of_their_own(monkeypatch):
    few = (
        optim.SGD,
        "compressed mean, int8",
        "sign momentum",
        optim.ADAFACTOR,
        "Adafactor 8-bit",
        "on int8, stochastic",
    )
    few = (optim.REFERENCE, *few)
    monkeypatch.setattr(optim, "CONTENDERS", {name: optim.CONTENDERS[name] for name in few})
    found = optim.updates(optim.Config(millions=0.1, rounds=1))
    assert set(found) == set(few)
    assert found["Adafactor 8-bit"]["over"] == optim.ADAFACTOR and found[optim.SGD]["ratio"]["median"] == 1.0


@pytest.mark.slow
def test_losses_of_runs(monkeypatch):
    monkeypatch.setattr(optim.llama, "preset", lambda name, preset=optim.llama.preset, **k: preset("smoke", **k))
    found = optim.losses(
        optim.Config(steps=2, batch=2, context=16), (optim.REFERENCE, "bfloat16, stochastic"), 1e-3, 1, "warm"
    )
    assert all(3 < values[0] < 8 for values in found.values())
