"""Optax: parameters, moments and gradients in few bits, each as a gradient transformation.

master_weights, stochastic_rounding   parameters in 16 bits or fewer, with a float32 copy or without any
low_bit_state, adamw_low_bit, ...     moments in 8 or 4 bits
skip_nonfinite, dynamic_loss_scale    steps that are not finite
compressed_mean, sign_momentum, ...   gradients exchanged in few bits
decay_mask, label_learned_steps       which parameters are treated alike
"""

from lowbit_jax.optim.codebooks import LINEAR4_WITHOUT_ZERO, UNSIGNED_DYNAMIC_TREE8
from lowbit_jax.optim.compression import (
    COMPRESSORS,
    CompressionState,
    OneBitAdamState,
    SignMomentumState,
    compressed_mean,
    compression_specs,
    scale_by_one_bit_adam,
    sign_momentum,
)
from lowbit_jax.optim.groups import decay_mask, label_learned_steps
from lowbit_jax.optim.landing import apply_updates, unpacked
from lowbit_jax.optim.loss_scale import LossScaleState, current_loss_scale, dynamic_loss_scale, scale_loss, unscale
from lowbit_jax.optim.low_bit_state import (
    LowBitState,
    decode_state,
    encode_state,
    explain_state,
    low_bit_state,
)
from lowbit_jax.optim.master_weights import (
    MasterWeightsState,
    master_weights,
    params_from_master,
    with_master,
)
from lowbit_jax.optim.moments import EMBEDDINGS, FIELDS
from lowbit_jax.optim.nonfinite import SkipNonfiniteState, all_finite, skip_nonfinite, skipped
from lowbit_jax.optim.optimizers import (
    adafactor_low_bit,
    adam_low_bit,
    adamw_low_bit,
    lion_low_bit,
    muon_low_bit,
)
from lowbit_jax.optim.placement import state_shardings
from lowbit_jax.optim.state_codecs import Blockwise, Companded, RankOne, StateCodec, Stored
from lowbit_jax.optim.stochastic_rounding import StochasticRoundingState, stochastic_rounding
from lowbit_jax.optim.trees import PackedUpdate

__all__ = [
    "COMPRESSORS",
    "EMBEDDINGS",
    "FIELDS",
    "LINEAR4_WITHOUT_ZERO",
    "UNSIGNED_DYNAMIC_TREE8",
    "Blockwise",
    "Companded",
    "CompressionState",
    "LossScaleState",
    "LowBitState",
    "MasterWeightsState",
    "OneBitAdamState",
    "PackedUpdate",
    "RankOne",
    "SignMomentumState",
    "SkipNonfiniteState",
    "StateCodec",
    "StochasticRoundingState",
    "Stored",
    "adafactor_low_bit",
    "adam_low_bit",
    "adamw_low_bit",
    "all_finite",
    "apply_updates",
    "compressed_mean",
    "compression_specs",
    "current_loss_scale",
    "decay_mask",
    "decode_state",
    "dynamic_loss_scale",
    "encode_state",
    "explain_state",
    "label_learned_steps",
    "lion_low_bit",
    "low_bit_state",
    "master_weights",
    "muon_low_bit",
    "params_from_master",
    "scale_by_one_bit_adam",
    "scale_loss",
    "sign_momentum",
    "skip_nonfinite",
    "skipped",
    "state_shardings",
    "stochastic_rounding",
    "unpacked",
    "unscale",
    "with_master",
]
