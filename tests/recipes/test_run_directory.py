"""One process a directory, one configuration a directory, one curve a run."""

import dataclasses
import json
import os
import pathlib
import signal

import pytest

from recipes import metrics, run_directory


@dataclasses.dataclass(frozen=True)
class Settings:
    seed: int = 0
    out: pathlib.Path = dataclasses.field(default=pathlib.Path("a"), metadata={"numbers": False})


class TestLock:
    def test_a_second_one_is_refused_and_told_by_whom(self, tmp_path):
        with run_directory.locked(tmp_path / "run"):
            with pytest.raises(RuntimeError, match=f"in use by process {os.getpid()}"):
                with run_directory.locked(tmp_path / "run"):
                    pass
        with run_directory.locked(tmp_path / "run"):  # and free again
            pass

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="cannot be written: .*Choose another --out"):
            with run_directory.locked(tmp_path / "file" / "run"):
                pass


class TestClaim:
    def test_the_same_settings_go_on(self, tmp_path):
        settings = run_directory.fields_that_matter(Settings(), text="abc")
        assert settings == {"seed": "0", "text": "'abc'"}
        run_directory.claim(tmp_path, settings)
        run_directory.claim(tmp_path, run_directory.fields_that_matter(Settings(out=pathlib.Path("b")), text="abc"))

    def test_other_settings_are_refused_by_name(self, tmp_path):
        run_directory.claim(tmp_path, {"seed": "0", "text": "abc"})
        with pytest.raises(ValueError, match="(?s)seed: there 0, now 1.*text: there abc, now xyz"):
            run_directory.claim(tmp_path, {"seed": "1", "text": "xyz"})

    def test_other_versions_are_told(self, tmp_path):
        run_directory.claim(tmp_path, {})
        path = tmp_path / "config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"versions": content["versions"] | {"jax": "0.0.1"}}))
        with pytest.warns(UserWarning, match="other versions .jax 0.0.1 ->"):
            run_directory.claim(tmp_path, {})

    def test_a_broken_file(self, tmp_path):
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ValueError, match="is not what a run writes there"):
            run_directory.claim(tmp_path, {})


def test_stop_request_notes_the_signal_and_puts_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    with run_directory.StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


class TestMetrics:
    def lines(self, folder):
        return metrics.read(folder / "metrics.jsonl")

    def test_cut_back_to_the_checkpoint(self, tmp_path):
        with metrics.Metrics(tmp_path, after_step=0, tensorboard=False) as log:
            for step in range(1, 6):
                log.step(step, loss=step / 3)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "lo')  # a kill in the middle of a line
        with metrics.Metrics(tmp_path, after_step=3, tensorboard=False) as log:
            log.step(4, loss=4.5)
        assert self.lines(tmp_path) == [{"step": s, "loss": s / 3} for s in (1, 2, 3)] + [{"step": 4, "loss": 4.5}]

    def test_not_a_number_is_null(self, tmp_path):
        with metrics.Metrics(tmp_path, after_step=0, tensorboard=False) as log:
            log.step(1, loss=float("nan"), gradient_norm=float("inf"), skipped=1)
        assert self.lines(tmp_path) == [{"step": 1, "loss": None, "gradient_norm": None, "skipped": 1}]

    def test_tensorboard_files(self, tmp_path):
        pytest.importorskip("tensorboardX")
        with metrics.Metrics(tmp_path, after_step=0, tensorboard=True) as log:
            log.step(1, loss=2.0)
        assert b"loss" in next((tmp_path / "tensorboard").glob("events*")).read_bytes()
