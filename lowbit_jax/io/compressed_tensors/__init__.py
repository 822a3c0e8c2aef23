"""Packed weights as the files of compressed-tensors, which vLLM and Hugging Face transformers read.

    lb.io.compressed_tensors.save("model", {"model.layers.0.mlp.down_proj": packed, "model.norm": gain}, config=config)
    weights = lb.io.compressed_tensors.load("model")

A folder holds `model.safetensors` and `config.json`. Every number is kept as it is, or nothing is written. Layouts, N
outputs by K inputs, codes b bits without gaps from the lowest bit on::

    integers, 1 to 8 bits    weight_packed int32 [N, ceil(K b / 32)], code = value + 2^(b-1); weight_shape int64 [2];
                             weight_scale [N, K / group]; zero points: weight_zero_point, packed along N
    int8 under int8 inputs   weight int8 [N, K]; weight_scale
    FP8                      weight E4M3 [N, K]; weight_scale, one a row, a tensor or a block
    MXFP4, MXFP6             weight_packed uint8 [N, K b / 8]; weight_scale uint8 [N, K / 32], E8M0
    MXFP8                    weight E4M3 [N, K]; weight_scale uint8 [N, K / 32], E8M0
    NVFP4                    weight_packed uint8 [N, K / 2]; weight_scale E4M3 [N, K / 16]; weight_global_scale float32
                             [1], by which the scales are divided
"""

from lowbit_jax.io.compressed_tensors.load import load
from lowbit_jax.io.compressed_tensors.save import save

__all__ = ["load", "save"]
