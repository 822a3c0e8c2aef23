"""The front door: the names users rely on, and what opening it costs."""

import subprocess
import sys

import lowbit_jax as lb

CALLABLES = (
    "Quantizer quest_quantizer QTensor LinearRecipe Gemm Requantized quest dot_general einsum conv_general_dilated"
    " ragged_dot quantize convert explain calibrate check_finite"
).split()
ROOMS = "formats rounding coding packing scaling rotation sparsity estimators ops methods nn optim parallel".split()


def test_names():
    missing = [name for name in CALLABLES if not callable(getattr(lb, name, None))]
    assert not missing
    missing = [name for name in ROOMS if not hasattr(lb, name)]
    assert not missing


def test_all_is_the_public_list():
    assert sorted(lb.__all__) == sorted(set(lb.__all__))
    assert set(CALLABLES) <= set(lb.__all__)
    assert all(hasattr(lb, name) for name in lb.__all__)


def test_every_callable_has_a_docstring():
    assert not [name for name in CALLABLES if not (getattr(lb, name).__doc__ or "").strip()]


def in_a_fresh_python(code: str) -> str:
    """What `code` prints in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_cheap():
    """Less than a third of the CPU time that jax and flax take before it (in one of three tries; a sixth where nothing
    else runs), and no optional package is loaded."""
    code = """
import time, sys
start = time.process_time()
import jax, jax.numpy, flax.nnx, flax.linen
before, between = set(sys.modules), time.process_time()
import lowbit_jax
share = (time.process_time() - between) / (between - start)
extras = {"grain", "matplotlib", "tokenizers", "tensorboardX", "tyro", "triton", "qwix", "aqt", "chex", "beartype"}
assert not extras & (set(sys.modules) - before), extras & set(sys.modules)
print(share)
"""
    shares = []
    while not shares or (shares[-1] >= 1 / 3 and len(shares) < 3):
        shares.append(float(in_a_fresh_python(code)))
    assert shares[-1] < 1 / 3, shares


def test_import_starts_no_device():
    """With a platform that does not exist, the first array raises; the import does not."""
    code = """
import os
os.environ["JAX_PLATFORMS"] = "nowhere"
import lowbit_jax, jax
try:
    print(jax.devices())
except RuntimeError as error:
    print(error)
"""
    assert "'nowhere'" in in_a_fresh_python(code)
