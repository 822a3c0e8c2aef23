"""Packed weights in the files of other projects."""

from lowbit_jax.io import compressed_tensors, gguf, tensors
from lowbit_jax.io.matrix import Outputs

__all__ = ["Outputs", "compressed_tensors", "gguf", "tensors"]
