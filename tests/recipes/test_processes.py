"""Real processes on this machine, with Gloo between them: one curve, one checkpoint, and what follows when one dies."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from recipes import metrics
from tests.recipes import one_of_processes

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    lines = (f"the square of {i} is {i * i}, and {i} is {'odd' if i % 2 else 'even'}\n" for i in range(3000))
    (tmp_path / "words.txt").write_text("".join(lines))
    return tmp_path


def launch(folder, count: int, *, local_devices: int = 1, **options) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    flags = f"--xla_force_host_platform_device_count={local_devices}"
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    place = [str(folder), f"localhost:{port}", str(count)]
    return [
        subprocess.Popen([sys.executable, "-m", "tests.recipes.one_of_processes", *place, str(i), json.dumps(options)],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=REPOSITORY)
        for i in range(count)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[str]:
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)[-4000:]
    return outputs


def curve(folder) -> list[float]:
    return [line["loss"] for line in metrics.read(folder / "run" / "metrics.jsonl") if "loss" in line]


def fresh(folder, name):
    other = folder / name
    other.mkdir()
    (other / "words.txt").write_text((folder / "words.txt").read_text())
    return other


def here(folder, **options) -> None:
    """The same in this process, which has four devices."""
    one_of_processes.main(str(folder), "", 1, 0, **options)


@pytest.mark.slow
def test_two_processes_train_the_curve_of_one_and_one_goes_on_from_their_checkpoint(folder, capsys):
    """Weights cut between the processes; then the same run goes on in one process of four devices, cut another way."""
    outputs = finish(launch(folder, 2, steps=4, mesh="fsdp=2"))
    assert all('"devices": 2' in output for output in outputs)
    alone = fresh(folder, "alone")
    here(alone, steps=4, mesh="data=1")
    np.testing.assert_allclose(curve(folder), curve(alone), rtol=2e-3)
    here(folder, steps=6, mesh="data=2,tensor=2")
    assert "resumes after step 4" in capsys.readouterr().out and len(curve(folder)) == 6


@pytest.mark.slow
def test_four_processes(folder):
    finish(launch(folder, 4, steps=8, mesh="data=2,fsdp=2"))
    alone = fresh(folder, "alone")
    finish(launch(alone, 1, steps=8, mesh="data=1"))
    np.testing.assert_allclose(curve(folder), curve(alone), rtol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed_the_other_ends_and_the_run_goes_on(folder, victim):
    """The survivor does not wait for ever; the same command again gives the curve of a run left alone, to the bit."""
    processes = launch(folder, 2, steps=120, mesh="data=2")
    checkpoints = folder / "run" / "checkpoints"
    deadline = time.monotonic() + 200
    while not list(checkpoints.glob("step_*6")) and time.monotonic() < deadline:
        time.sleep(0.05)
    processes[victim].send_signal(signal.SIGKILL)
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert processes[victim].returncode == -signal.SIGKILL
    assert processes[1 - victim].returncode != 0, outputs[1 - victim][-2000:]
    saved = max(int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*"))
    assert 0 < saved < 120
    again = finish(launch(folder, 2, steps=120, mesh="data=2"))
    assert f"resumes after step {saved}" in again[0]
    alone = fresh(folder, "alone")
    finish(launch(alone, 2, steps=120, mesh="data=2"))
    assert curve(folder) == curve(alone)
