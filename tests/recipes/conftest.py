"""Recipes stand on Optax and Flax layers, which promote dtypes implicitly; the library's own tests stay strict."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield
