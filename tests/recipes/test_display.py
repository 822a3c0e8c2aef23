"""What a person reads: no figures that are not known, warnings as plain lines, errors with the file they are about."""

import dataclasses
import errno
import warnings

import pytest

from recipes import command, display, plots


def test_the_first_line_of_a_short_run_tells_no_speed(capsys):
    with display.Progress("run", start=4, steps=6, tokens_per_step=100) as progress:
        assert progress.update(6, 2.5, 0) == 0
    assert capsys.readouterr().out == "run | step 6/6 | loss 2.5000\n"


def test_speed_and_time_left_once_they_are_known(capsys, monkeypatch):
    now = iter([10.0, 12.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(now))
    with display.Progress("run", start=0, steps=100, tokens_per_step=100) as progress:
        progress.compiled(1)
        assert progress.update(21, 2.5, 3) == 1000
    assert (
        capsys.readouterr().out == "run | step 21/100 | loss 2.5000 | 1,000 tokens/s | 0:00:08 left | 3 steps skipped\n"
    )


def test_a_warning_is_one_line_without_source(capsys):
    with display.plain_warnings():
        warnings.simplefilter("always")
        warnings.warn("the first", stacklevel=1)
        warnings.warn("the second", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: the first\nwarning: DeprecationWarning: the second\n"


def test_a_title_with_dollars_is_drawn_as_it_is(tmp_path):
    title = "tiny, /data/$set_{/of$ (3 documents)"  # no formula
    plots.curves(tmp_path / "curves.png", {"run": [{"step": 1, "loss": 2.0}]}, title=title)
    plots.by_bits(tmp_path / "bits.png", {"quest": [(4, 2.0, 0.1)]}, baseline=1.9, title=title)
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in ("curves.png", "bits.png"))


@dataclasses.dataclass(frozen=True)
class Nothing:
    pass


@pytest.mark.parametrize(
    ("error", "words"),
    [(OSError(errno.ENOSPC, "No space left on device", "/a/file"), "No space left on device: /a/file"),
     (OSError("in words of our own"), "in words of our own"), (ValueError("wrong"), "wrong")],
)  # fmt: skip
def test_an_error_is_one_message(error, words):
    def fails(_):
        raise error

    with pytest.raises(SystemExit) as ended:
        command.run("it", Nothing, fails, None, [])
    assert str(ended.value).splitlines()[0] == f"it: {words}"
