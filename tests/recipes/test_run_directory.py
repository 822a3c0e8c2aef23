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


def train_a_step(folder: pathlib.Path) -> None:
    (folder / "quest-w4a4").mkdir()
    (folder / "quest-w4a4" / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')


class TestClaim:
    def test_the_same_settings_go_on(self, tmp_path):
        settings = run_directory.fields_that_matter(Settings(), text="abc")
        assert settings == {"seed": "0", "text": "'abc'"}
        run_directory.claim(tmp_path, settings)
        run_directory.claim(tmp_path, run_directory.fields_that_matter(Settings(out=pathlib.Path("b")), text="abc"))

    def test_other_settings_are_refused_by_name(self, tmp_path):
        run_directory.claim(tmp_path, {"seed": "0", "text": "abc"})
        train_a_step(tmp_path)
        with pytest.raises(ValueError, match="(?s)seed: there 0, now 1.*text: there abc, now xyz"):
            run_directory.claim(tmp_path, {"seed": "1", "text": "xyz"})

    @pytest.mark.parametrize(
        "made", ["quest-w4a4/checkpoints/step_00000007/", "quest-w4a4/metrics.damaged1", "packed/", "results.json"]
    )
    def test_only_what_was_trained_holds_to_its_settings(self, tmp_path, made):
        """A first start that failed leaves a lock, a configuration, tables and empty files."""
        for seed in ("0", "1"):
            run_directory.claim(tmp_path, {"seed": seed})
            (tmp_path / "quest-w4a4" / "tensorboard").mkdir(parents=True, exist_ok=True)
            for name in (".writing-00000007", "step_00000007.bak"):
                (tmp_path / "quest-w4a4" / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
            for name in ("lock", "quantized.txt", "quest-w4a4/metrics.jsonl"):
                (tmp_path / name).touch()
        assert json.loads((tmp_path / "config.json").read_text())["settings"] == {"seed": "1"}
        if made.endswith("/"):
            (tmp_path / made).mkdir(parents=True)
        else:
            (tmp_path / made).write_text("{}")
        with pytest.raises(ValueError, match="seed: there 1, now 2"):
            run_directory.claim(tmp_path, {"seed": "2"})

    def test_other_versions_are_told(self, tmp_path):
        run_directory.claim(tmp_path, {})
        train_a_step(tmp_path)
        path = tmp_path / "config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"versions": content["versions"] | {"jax": "0.0.1"}}))
        with pytest.warns(UserWarning, match="other versions .jax 0.0.1 ->"):
            run_directory.claim(tmp_path, {})

    @pytest.mark.parametrize(
        "content",
        ["{", "[]", '{"settings": {}}', '{"settings": [], "versions": {}}', '{"settings": {}, "versions": 1}'],
    )
    def test_a_broken_file(self, tmp_path, content):
        train_a_step(tmp_path)
        (tmp_path / "config.json").write_text(content)
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

    @pytest.mark.parametrize("line", [b"{", b"\xff\x00", b"[1]", b'{"loss": 2.0}', b'{"step": "3"}', b"",
                                      b'{"step": 2, "tokens_per_second": "abc"}'])  # fmt: skip
    def test_a_damaged_line_sets_the_file_aside_and_the_rest_stays(self, tmp_path, line):
        path = tmp_path / "metrics.jsonl"
        for n in (1, 2):
            path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"step": 3}\n')
            with pytest.warns(UserWarning, match=rf"metrics.jsonl, line 2 .*kept as metrics.damaged{n}.*2 good lines"):
                with metrics.Metrics(tmp_path, after_step=2, tensorboard=False):
                    pass
            assert self.lines(tmp_path) == [{"step": 1}, {"step": 2}]
            assert (tmp_path / f"metrics.damaged{n}").read_bytes().splitlines()[1] == line

    @pytest.mark.parametrize("there", [False, True])
    def test_lines_that_are_gone_are_told(self, tmp_path, there):
        path = tmp_path / "metrics.jsonl"
        if there:
            path.touch()
        with pytest.warns(UserWarning, match="metrics.jsonl has no line of the 7 steps that are done"):
            with metrics.Metrics(tmp_path, after_step=7, tensorboard=False) as log:
                log.step(8, loss=1.0)
        assert self.lines(tmp_path) == [{"step": 8, "loss": 1.0}]
        with metrics.Metrics(tmp_path, after_step=8, tensorboard=False):  # told once
            pass

    def test_a_full_disk_names_the_file_and_can_be_outlasted(self, tmp_path):
        class Full:
            refuses = True

            def __init__(self, inner):
                self.inner, self.fileno, self.close = inner, inner.fileno, inner.close

            def write(self, data):
                if self.refuses:
                    raise OSError(28, "No space left on device")
                return self.inner.write(data[:5])  # a part at a time, as the system may

        with pytest.raises(OSError, match=f"{tmp_path}/metrics.jsonl: No space left on device. Free space"):
            with metrics.Metrics(tmp_path, after_step=0, tensorboard=False) as log:
                log.steps.file = Full(log.steps.file)
                log.step(1, loss=2.0)
        with metrics.Metrics(tmp_path, after_step=0, tensorboard=False, on_error="continue") as log:
            log.steps.file = Full(log.steps.file)
            with pytest.warns(UserWarning, match="No space left .*wait in memory"):
                log.step(1, loss=2.0)
            log.step(2, loss=3.0)
            log.steps.file.refuses = False
            log.step(3, loss=4.0)
        assert [line["loss"] for line in self.lines(tmp_path)] == [2.0, 3.0, 4.0]

    def test_not_a_number_is_null(self, tmp_path):
        with metrics.Metrics(tmp_path, after_step=0, tensorboard=False) as log:
            log.step(1, loss=float("nan"), gradient_norm=float("inf"), skipped=1)
        assert self.lines(tmp_path) == [{"step": 1, "loss": None, "gradient_norm": None, "skipped": 1}]

    def test_tensorboard_files(self, tmp_path):
        pytest.importorskip("tensorboardX")
        with metrics.Metrics(tmp_path, after_step=0, tensorboard=True) as log:
            log.step(1, loss=2.0)
        assert b"loss" in next((tmp_path / "tensorboard").glob("events*")).read_bytes()
