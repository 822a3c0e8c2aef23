"""lowbit_jax: train and run neural networks at 1 to 8 bits in JAX and Flax.

import lowbit_jax as lb
dense = lb.quantize(nnx.Linear(512, 2048, rngs=rngs), lb.quest(4))
"""

from lowbit_jax import (
    coding,
    estimators,
    formats,
    io,
    methods,
    nn,
    ops,
    optim,
    packing,
    parallel,
    rotation,
    rounding,
    scaling,
    sparsity,
)
from lowbit_jax.methods.quest import quest, quest_quantizer
from lowbit_jax.nn import calibrate, convert, explain, quantize
from lowbit_jax.ops import (
    FORWARD,
    Gemm,
    LinearRecipe,
    Requantized,
    conv_general_dilated,
    dot_general,
    einsum,
    ragged_dot,
)
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer, block_quantizer
from lowbit_jax.rotation import Hadamard
from lowbit_jax.scaling import check_finite

__version__ = "0.1.0"

__all__ = [
    "FORWARD",
    "Gemm",
    "Hadamard",
    "LinearRecipe",
    "QTensor",
    "Quantizer",
    "Requantized",
    "block_quantizer",
    "calibrate",
    "check_finite",
    "coding",
    "conv_general_dilated",
    "convert",
    "dot_general",
    "einsum",
    "estimators",
    "explain",
    "formats",
    "io",
    "methods",
    "nn",
    "ops",
    "optim",
    "packing",
    "parallel",
    "quantize",
    "quest",
    "quest_quantizer",
    "ragged_dot",
    "rotation",
    "rounding",
    "scaling",
    "sparsity",
]
