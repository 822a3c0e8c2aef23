"""Products of quantized operands: the recipe of a layer and the JAX products that follow it."""

import lowbit_jax.ops.exported  # noqa: F401  # makes jax.export know packed weights
from lowbit_jax.ops.conv import conv_general_dilated
from lowbit_jax.ops.dot_general import dot_general, pack_rhs, quantize_rhs
from lowbit_jax.ops.einsum import einsum
from lowbit_jax.ops.ragged_dot import ragged_dot
from lowbit_jax.ops.recipe import FORWARD, Gemm, LinearRecipe, Requantized

__all__ = [
    "FORWARD",
    "Gemm",
    "LinearRecipe",
    "Requantized",
    "conv_general_dilated",
    "dot_general",
    "einsum",
    "pack_rhs",
    "quantize_rhs",
    "ragged_dot",
]
