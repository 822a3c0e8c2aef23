"""Flax: where state lives. Quantized views of NNX and Linen modules, packed models, and a table that explains them."""

from lowbit_jax.nn.verbs import CODES, calibrate, convert, explain, gptq, keep_codes, prepare, quantize, recipes
from lowbit_jax.nn.weight import default_layout

__all__ = [
    "CODES",
    "calibrate",
    "convert",
    "default_layout",
    "explain",
    "gptq",
    "keep_codes",
    "prepare",
    "quantize",
    "recipes",
]
