"""A device that runs out of memory: what was needed, what there is, and the flags that help."""

import re

import jax
import jax.numpy as jnp
import pytest

from recipes import out_of_memory


def test_a_real_one_is_explained():
    """2^50 bytes, which no machine has."""
    huge = jax.jit(lambda: jnp.zeros((1 << 48,), jnp.float32))
    with pytest.raises(out_of_memory.OutOfMemory) as told:
        with out_of_memory.explained("a step of 4 x 32 tokens", lambda: 3_000_000_000):
            huge().block_until_ready()
    words = str(told.value)
    assert re.search(r"a step of 4 x 32 tokens needs an estimated 3.00 GB on each device, and it has [\d.]+ GB", words)
    for knob in ("--microbatches", "--remat", "--batch"):
        assert knob in words


def test_a_model_has_another_way_out():
    huge = jax.jit(lambda: jnp.zeros((1 << 48,), jnp.float32))
    with pytest.raises(out_of_memory.OutOfMemory, match="the model needs .*smaller --preset") as told:
        with out_of_memory.explained("the model", lambda: 1 << 50, out_of_memory.OF_A_MODEL):
            huge().block_until_ready()
    assert "--microbatches" not in str(told.value)


def test_an_estimate_that_fails_in_the_same_way():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.\nmore")

    def fails():
        raise error

    with pytest.raises(out_of_memory.OutOfMemory, match=r"more than can be compiled .*\(Out of memory .* 7 bytes\)"):
        with out_of_memory.explained("a step", fails):
            raise error


def test_other_errors_pass():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        with out_of_memory.explained("a step", lambda: 0):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")
