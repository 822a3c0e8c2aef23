"""The benchmark of gradient directions says when rotation does not win by what it must."""

import dataclasses

import numpy as np
import pytest

from benchmarks import gradient_alignment


def row(bits, quest, plain):
    return {"bits": bits, "cosine": {"quest": quest, "no rotation": plain}}


def test_margins_are_paired_and_judged_at_two_to_four_bits():
    rows = [row(1, [0.0, 0.0], [0.0, 0.0]), row(2, [0.3, 0.5], [0.25, 0.35]), row(4, [0.9, 0.8], [0.75, 0.75]),
            row(8, [1.0, 1.0], [1.0, 1.0])]  # fmt: skip
    found = gradient_alignment.margins(rows)
    assert found[2] == pytest.approx([0.05, 0.15]) and found[4] == pytest.approx([0.15, 0.05])
    assert gradient_alignment.too_small([row(2, [0.3, 0.5], [0.15, 0.35])]) == []
    assert gradient_alignment.too_small([row(3, [0.5], [0.41])]) == [
        "gradient_alignment: at 3 bits rotation wins by 0.090, and 0.1 is the least."
    ]
    assert len(gradient_alignment.too_small([row(3, [np.nan], [0.1])])) == 1


def test_the_table_and_the_status(tmp_path, monkeypatch, capsys):
    config = gradient_alignment.Config(seeds=2, output=tmp_path)
    report = {"environment": {"backend": "cpu"}, "config": dataclasses.asdict(config) | {"output": None},
              "rows": [row(2, [0.3, 0.5], [0.25, 0.45])]}  # fmt: skip
    monkeypatch.setattr(gradient_alignment, "measure", lambda _: report)
    assert gradient_alignment.main(config) == gradient_alignment.too_small(report["rows"]) != []
    assert "| 2 | 0.400 (0.300 to 0.500) | 0.350 (0.250 to 0.450) | 0.050 (0.050 to 0.050) |" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}


@pytest.mark.parametrize("change", [{"seeds": 0}, {"steps": 0}, {"steps": 401}])
def test_settings_without_a_checkpoint(change):
    with pytest.raises(ValueError, match="at least one seed, and steps from 1"):
        gradient_alignment.measure(gradient_alignment.Config(**change))
