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
    for table in ("updates", "steps"):
        assert report[table][optim.REFERENCE]["ratio"]["median"] == 1.0
        assert report[table]["AdamW 8-bit"]["state_bytes"] < 2.1
        assert report[table]["AdamW 4-bit"]["state_bytes"] < 1.15
    assert "AdamW 8-bit" in (tmp_path / "optim_cpu.md").read_text()


@pytest.mark.slow
def test_losses_of_runs(monkeypatch):
    monkeypatch.setattr(optim.llama, "preset", lambda name, preset=optim.llama.preset, **k: preset("smoke", **k))
    found = optim.losses(
        optim.Config(steps=2, batch=2, context=16), (optim.REFERENCE, "bfloat16, stochastic"), 1e-3, 1, "warm"
    )
    assert all(3 < values[0] < 8 for values in found.values())
