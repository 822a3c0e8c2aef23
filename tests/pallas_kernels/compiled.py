"""A function of arrays and static options, compiled once for all tests that call it alike."""

import inspect
from collections.abc import Callable

import jax

STATIC = {"format", "scale_mode", "dtype", "out_dtype", "bits", "grid", "through", "cast", "tile", "impl", "fmt"}


def compiled(function: Callable) -> Callable:
    return jax.jit(function, static_argnames=sorted(STATIC & set(inspect.signature(function).parameters)))
