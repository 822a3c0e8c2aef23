"""Flax: where state lives. Quantized views of NNX and Linen modules, packed models, and a table that explains them."""

from lowbit_jax.nn.verbs import calibrate, convert, explain, prepare, quantize

__all__ = ["calibrate", "convert", "explain", "prepare", "quantize"]
