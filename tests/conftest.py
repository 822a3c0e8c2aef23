"""What every test runs under: the CPU, strict dtypes and ranks, several devices to shard over, and one `key`.

`pyproject.toml` makes warnings errors; `tests/typechecker.py` tells how to check the shapes in every signature too.
"""

import gc
import os
import pathlib
import threading

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # expected values are those of float32 products; a GPU may use TF32

import jax
import pytest
from jax._src.interpreters import mlir

import tests.typechecker  # noqa: F401  # found by name by --jaxtyping-packages

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time; this halves it
# A program that an earlier test compiled is read from here: a folder for each process, as JAX writes without locks.
_compiled = pathlib.Path(__file__).parents[1] / ".pytest_cache" / f"jax-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
jax.config.update("jax_compilation_cache_dir", str(_compiled))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
if jax.__version_info__ < (0, 11):  # the older of its code generators takes 0.6 of the time; JAX 0.12 has one only
    # One module of LLVM for a program, and not some for threads, takes 0.85 of what is left.
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
# One context of MLIR a thread: JAX makes one for each program, 4 ms of work and a megabyte that lives as long as it.
_of_thread, _make = threading.local(), mlir.make_ir_context
mlir.make_ir_context = lambda: vars(_of_thread).get("context") or vars(_of_thread).setdefault("context", _make())
# Collecting garbage at each 700 new objects takes a twentieth of the time, and tracing leaves little.
gc.set_threshold(50_000, 20, 20)
if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 4)  # a 2 x 2 mesh


@pytest.fixture
def key() -> jax.Array:
    """A fixed random key: a test that needs another one splits it."""
    return jax.random.key(0)
