"""The command itself, in processes of its own: a smoke run, errors without tracebacks, and a real `kill -9`."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from recipes import command as recipe
from recipes.sample import Sample

REPOSITORY = pathlib.Path(__file__).parents[2]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "recipes.pretrain", "--preset", "smoke", "--no-tensorboard", *arguments]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


def run(*arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


def test_errors_are_one_message_and_a_failing_status(tmp_path):
    done = run("--data", "no/such/file", cwd=tmp_path)
    assert done.returncode == 1 and "'no/such/file' is not 'stdlib'" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_before_there_is_a_step_to_finish(capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        recipe.run("sample", Sample, interrupted, None, ["run", "--prompt", "a"])
    assert ended.value.code == 130 and capsys.readouterr().err == "sample: interrupted.\n"


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(tmp_path):
    """Killed by the system in the middle of training; the curve equals that of a run left alone, byte for byte."""
    arguments = ("--steps", "60", "--checkpoint-every", "7", "--log-every", "1", "--data", str(REPOSITORY / "recipes"))
    whole = run(*arguments, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    curve = tmp_path / "broken" / "quest-w4a4" / "metrics.jsonl"
    for steps in (10, 33):
        process = subprocess.Popen(
            command(*arguments, "--out", "broken"), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL
        )
        while process.poll() is None and not (curve.exists() and newest_step(curve) >= steps):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    again = run(*arguments, "--out", "broken", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resumes after step" in again.stdout
    assert curve.read_bytes() == (tmp_path / "whole" / "quest-w4a4" / "metrics.jsonl").read_bytes()
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "broken")]
    assert results[0]["sample"] == results[1]["sample"]
    assert results[0]["packed"]["validation_loss"] == results[1]["packed"]["validation_loss"]


def newest_step(curve: pathlib.Path) -> int:
    lines = curve.read_bytes().splitlines(keepends=True)
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)
