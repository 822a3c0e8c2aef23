"""Flax: where state lives. Quantized views of NNX and Linen modules, packed models, and a table that explains them."""

from lowbit_jax.nn.verbs import (
    CODES,
    calibrate,
    calibrate_over,
    convert,
    explain,
    gptq,
    keep_codes,
    prepare,
    quantize,
    recipes,
)
from lowbit_jax.nn.weight import default_layout

__all__ = [
    "CODES",
    "calibrate",
    "calibrate_over",
    "convert",
    "default_layout",
    "explain",
    "gptq",
    "keep_codes",
    "prepare",
    "quantize",
    "recipes",
]
