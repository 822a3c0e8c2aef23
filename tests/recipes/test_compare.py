"""The comparison: intervals from a table of Student's t, differences paired by seed, cells that are not run twice."""

import dataclasses
import pathlib
import types

import numpy as np
import pytest

from recipes import compare, schemes, train_loop


def test_interval_against_the_printed_table():
    """t(0.975) is 12.706 with one degree of freedom and 4.303 with two."""
    assert compare.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / np.sqrt(3)), rel=1e-3)
    assert compare.interval([1.0, 3.0]) == pytest.approx((2.0, 12.706), rel=1e-3)
    assert compare.interval([5.0]) == (5.0, None)


def test_differences_are_paired():
    """Seeds differ by 1, methods by exactly 0.1 and 0.3: the pairs leave no spread."""
    cells = [schemes.Scheme(method="none"), *(schemes.Scheme(method=name, bits=2) for name in ("quest", "lsq"))]
    losses = {"none": [1.0, 2.0, 3.0], "quest-w2a2": [1.1, 2.1, 3.1], "lsq-w2a2": [1.3, 2.3, 3.3]}
    none, quest, lsq = compare.summary(cells, losses)
    assert none["above_unquantized"] is none["above_quest"] is quest["above_quest"] is None
    assert quest["above_unquantized"] == pytest.approx((0.1, 0), abs=1e-9)
    assert lsq["above_unquantized"] == pytest.approx((0.3, 0), abs=1e-9)
    assert lsq["above_quest"] == pytest.approx((0.2, 0), abs=1e-9)
    assert none["loss"][1] > 1


def test_a_small_comparison(tmp_path, capsys, monkeypatch):
    (tmp_path / "words.txt").write_text("".join(f"the square of {i} is {i * i}\n" for i in range(3000)))
    config = compare.Compare(preset="smoke", steps=4, bits=(2,), methods=("quest",), seeds=2,
                             data=str(tmp_path / "words.txt"), out=tmp_path / "out")  # fmt: skip
    rows = compare.main(config)
    assert [row["name"] for row in rows] == ["none", "quest-w2a2"]
    assert "±" in capsys.readouterr().out
    assert (tmp_path / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(train_loop, "make_step", lambda *_: None)  # any further step would fail
    assert compare.main(config) == rows


def test_a_first_start_that_failed_does_not_hold_the_corrected_command(tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text("the square of a number " * 2000)
    config = compare.Compare(preset="smoke", steps=4, bits=(3,), methods=("quest",), seeds=1,
                             data=str(tmp_path / "words.txt"), out=tmp_path / "out")  # fmt: skip

    def refused(*_, **__):
        raise ValueError("no step of this kind")

    with monkeypatch.context() as patch:
        patch.setattr(train_loop, "make_step", refused)
        with pytest.raises(ValueError, match="no step of this kind"):
            compare.main(config)
    assert (tmp_path / "out" / "config.json").exists()
    assert [row["name"] for row in compare.main(dataclasses.replace(config, bits=(2,)))] == ["none", "quest-w2a2"]


@pytest.mark.parametrize(("dtype", "scaled"), [("float16", True), ("auto", False), ("float32", False)])
def test_float16_comes_with_a_loss_scale(tmp_path, monkeypatch, dtype, scaled):
    plans = []

    def train(name, model, corpus, plan, *_, **__):
        plans.append(plan)
        return types.SimpleNamespace(validation_loss=1.0)

    monkeypatch.setattr(train_loop, "train", train)
    monkeypatch.setattr(compare.llama, "build", lambda *_, **__: None)
    monkeypatch.setattr(compare.schemes.Scheme, "apply", lambda *_: None)
    (tmp_path / "words.txt").write_text("a word " * 2000)
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = compare.main(compare.Compare(preset="smoke", bits=(), schemes=("fp8:scaling=row",), seeds=1, dtype=dtype,
                                        data="~/words.txt", out=pathlib.Path("~/out")))  # fmt: skip
    assert (tmp_path / "out" / "compare.json").exists()
    assert [plan.optimizer().loss_scale for plan in plans] == [scaled, scaled]
    assert [row["name"] for row in rows] == ["none", "fp8-by-row"]


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"schemes": ("fp8", "fp8")}, "fp8-by-tensor would run twice"),
        (
            {"schemes": ("fp8", "fp8:scaling=tensor")},
            "fp8-by-tensor, also named fp8-by-tensor-scaling=tensor, would run",
        ),
        ({"bits": (4,), "methods": ("quest",), "schemes": ("quest:bits=4",)}, "quest-w4a4 would run twice"),
        ({"bits": (4,), "methods": ("lsq", "quest"), "schemes": ("quest",)}, "quest-w4a4 would run twice"),
    ],
)
def test_cells_of_one_recipe_are_refused(cells, words, tmp_path):
    small = {"preset": "smoke", "steps": 1, "seeds": 1, "bits": (), "data": __file__}
    with pytest.raises(ValueError, match=words):
        compare.main(compare.Compare(**small | cells, out=tmp_path))


def test_widths_among_the_schemes_are_points_of_the_plot(tmp_path, monkeypatch):
    """Those with other options on a line of their own; what is no number of bits on none."""
    drawn = {}
    monkeypatch.setattr(compare.plots, "by_bits", lambda path, series, **_: drawn.update(series))
    cells = [schemes.Scheme(method="none"), schemes.Scheme(bits=4), schemes.Scheme.of("quest:bits=3"),
             schemes.Scheme.of("quest:bits=3,signs=0"), schemes.Scheme.of("lsq:bits=3"),
             schemes.Scheme.of("quest:bits=e2m1"), schemes.Scheme.of("fp8")]  # fmt: skip
    losses = {scheme.name: [float(i)] for i, scheme in enumerate(cells)}
    rows = compare.summary(cells, losses)
    compare.show(rows, tmp_path, compare.Compare(), types.SimpleNamespace(note="words"))
    assert drawn == {"quest": [(4, 1.0, 0.0), (3, 2.0, 0.0)], "quest:signs=0": [(3, 3.0, 0.0)], "lsq": [(3, 4.0, 0.0)]}
    assert rows[4]["above_quest"] == (2.0, None)


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="at least one seed"):
        compare.main(compare.Compare(seeds=0))
