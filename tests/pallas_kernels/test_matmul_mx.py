"""Products with microscaled weights: the reference against float64 here, the raw Triton kernel by Triton's interpreter
and its lowering where Triton and jax-triton are installed."""

import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import chips, matmul_mx, tuning
from pallas_kernels.block_scaled import quantize_mx
from pallas_kernels.checks import NoKernel
from pallas_kernels.matmul_mx import matmul_mx as product

ELEMENTS = {"mxfp4": ml_dtypes.float4_e2m1fn, "mxfp8": ml_dtypes.float8_e4m3fn, "mxfp8_e5m2": ml_dtypes.float8_e5m2}
EPS = 2.0**-23


def microscaled(rows, k, format, seed):
    """(words, scales, float64 values by ml_dtypes)."""
    x = np.random.default_rng(seed).standard_normal((rows, k)).astype(np.float32)
    x *= np.repeat(np.exp2(np.random.default_rng(seed + 1).integers(-9, 9, (rows, k // 32))), 32, axis=1)
    words, scales = quantize_mx(jnp.asarray(x), format=format, impl="xla")
    raw = np.asarray(words)
    codes = np.stack([raw & 15, raw >> 4], -1).reshape(rows, k) if format == "mxfp4" else raw
    values = codes.view(ELEMENTS[format]).astype(np.float64)
    return words, scales, values * np.repeat(np.exp2(np.asarray(scales, np.float64) - 127), 32, axis=1)


@pytest.mark.parametrize("x_format", [None, "mxfp4", "mxfp8"])
@pytest.mark.parametrize("format", list(ELEMENTS))
def test_reference_is_the_sum_of_the_specification(format, x_format):
    m, n, k = 5, 33, 96
    words, scales, w = microscaled(n, k, format, 0)
    if x_format is None:
        x = jnp.asarray(np.random.default_rng(3).standard_normal((m, k)), jnp.bfloat16)
        options, values = {}, np.asarray(x, np.float64)
    else:
        x, x_scales, values = microscaled(m, k, x_format, 5)
        options = {"x_format": x_format, "x_scales": x_scales}
    y = product(x, words, scales, format=format, out_dtype=jnp.float32, impl="xla", **options)
    across = product(
        x, words, scales.T, format=format, out_dtype=jnp.float32, impl="xla", scales_across=True, **options
    )
    np.testing.assert_array_equal(y, across)
    bound = k * EPS * (np.abs(values) @ np.abs(w).T)
    assert (np.abs(np.asarray(y, np.float64) - values @ w.T) <= bound).all()


def test_a_nan_scale_is_seen():
    words, scales, _ = microscaled(4, 64, "mxfp4", 0)
    y = product(jnp.ones((2, 64), jnp.bfloat16), words, scales.at[1, 0].set(255), format="mxfp4", impl="xla")
    np.testing.assert_array_equal(np.isnan(np.asarray(y, np.float32)), [[False, True, False, False]] * 2)


BAD = {
    "an unknown format": (dict(format="mxfp6_e2m3"), "format='mxfp6_e2m3'"),
    "scales of x without a format": (dict(x_scales=jnp.zeros((2, 2), jnp.uint8)), "Give both, or neither"),
    "float16": (dict(x=jnp.ones((2, 64), jnp.float16)), "float16"),
    "K of no whole blocks": (dict(x=jnp.ones((2, 48), jnp.bfloat16)), "blocks of 32"),
    "words of another K": (dict(words=jnp.zeros((4, 16), jnp.uint8)), "words"),
    "scales across that are not": (dict(scales_across=True), "scales"),
    "an integer result": (dict(out_dtype=jnp.int8), "out_dtype=int8"),
    "interpretation": (dict(impl="interpret"), "no interpretation"),
    "an empty x": (dict(x=jnp.ones((0, 64), jnp.bfloat16)), "empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    words, scales, _ = microscaled(4, 64, "mxfp4", 0)
    options = dict(x=jnp.ones((2, 64), jnp.bfloat16), words=words, scales=scales, format="mxfp4", impl="xla")
    changed, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        product(**(options | changed))


def test_without_jax_triton_the_error_says_what_to_install():
    if matmul_mx.why_not() is None:
        pytest.skip("jax-triton is installed")
    words, scales, _ = microscaled(4, 64, "mxfp4", 0)
    with pytest.raises(NoKernel, match="jax-triton"):
        product(jnp.ones((2, 64), jnp.bfloat16), words, scales, format="mxfp4")


def test_default_tiles_cover_the_multiprocessors_or_cut_no_further():
    for m, n, k in ((1, 4096, 4096), (16, 14336, 4096), (300, 4096, 4096), (1, 64, 32)):
        tile = matmul_mx.default_tile(m, n, k, "mxfp4")
        programs = -(-n // tile.columns) * -(-m // tile.rows) * tile.split
        turns = -(-k // matmul_mx.STEP) // tile.split
        assert m > 64 or programs >= tuning.PROGRAMS or tile.split == 8 or turns < 8


def test_kernel_equals_float64_in_tritons_interpreter():
    """Sums of at most 288 products in float32, of values that are exact: within K eps of the sum of magnitudes."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (the extra 'triton')")
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < (3, 9):
        pytest.skip(f"the interpreter of triton {version} has no dot_scaled")
    script = pathlib.Path(__file__).with_name("interpret_mx.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [script.parents[2], *sys.path]))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(errors) == 7 and max(errors) <= 288 * EPS


def test_lowered_program_holds_the_kernel():
    if why := matmul_mx.why_not():
        pytest.skip(why)
    shape = lambda *size, dtype=jnp.uint8: jax.ShapeDtypeStruct(size, dtype)
    run = jax.jit(lambda x, w, s: product(x, w, s, format="mxfp4"))
    with chips.abstract_gpu("sm_90"):
        lowered = run.trace(shape(4, 256, dtype=jnp.bfloat16), shape(64, 128), shape(64, 8)).lower(
            lowering_platforms=("cuda",)
        )
    assert "triton_kernel_call" in lowered.as_text()
