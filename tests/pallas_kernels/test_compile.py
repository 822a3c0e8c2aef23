"""Each kernel compiled for real chips, without one: no spills, the expected tensor-core instruction.

Skipped where the CUDA plugin is not installed; `.ci/run` installs it on Python 3.12 and compiles all cases."""

import json
import subprocess
import sys

import pytest

CASES = ["w4a16 bfloat16 m16 group128", "w1a8 m16", "hadamard_quantize4 bfloat16", "hadamard_backward"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A process of its own: XLA reads where to dump its code before JAX starts."""
    from importlib.util import find_spec

    if find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda13") is None:
        pytest.skip("the CUDA plugin is not installed: see pallas_kernels/README.md")

    def run(name, chip):
        path = tmp_path_factory.mktemp("report") / "rows.json"
        command = [sys.executable, "-m", "pallas_kernels.report", name, "--chip", chip, "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert path.exists(), done.stdout + done.stderr
        return json.loads(path.read_text())

    return run


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills(report, name):
    for row in report(name, "sm_90"):
        assert "error" not in row, row
        assert row["spill_bytes"] == 0 and row["good"], row


def test_unknown_chips_and_cases_are_named():
    run = lambda *words: subprocess.run(
        [sys.executable, "-m", "pallas_kernels.report", *words], capture_output=True, text=True, timeout=300
    )
    done = run("no such kernel")
    assert done.returncode == 2 and ("no case" in done.stderr or "needs" in done.stderr)
