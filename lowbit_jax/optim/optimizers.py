"""Ready-made optimizers with low-bit states: those of optax, wrapped in `low_bit_state`.

Arguments named as in optax; `bits` and `min_size` as in `low_bit_state`, whose `first`, `second` and `fields` go in
`codecs`. Under `optax.inject_hyperparams`
pass `static_args=("bits", "min_size")`.
"""

from collections.abc import Mapping
from typing import Any

import optax

from lowbit_jax.optim.low_bit_state import low_bit_state


def adam_low_bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    bits: int | str = 8,
    min_size: int = 4096,
    codecs: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with both moments in few bits.

    Source: Dettmers et al. 2022, arXiv:2110.02861 (8 bits); Li et al. 2023, arXiv:2309.01507 (4 bits)."""
    return optax.chain(
        low_bit_state(optax.scale_by_adam(b1, b2, eps), bits, min_size=min_size, elementwise=True, **(codecs or {})),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw_low_bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any = None,
    *,
    bits: int | str = 8,
    min_size: int = 4096,
    codecs: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with both moments in few bits; `mask` picks what decays, as in `optax.adamw`."""
    return optax.chain(
        low_bit_state(optax.scale_by_adam(b1, b2, eps), bits, min_size=min_size, elementwise=True, **(codecs or {})),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def lion_low_bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 1e-3,
    mask: Any = None,
    *,
    bits: int | str = 8,
    min_size: int = 4096,
    codecs: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion with its momentum in few bits."""
    return optax.chain(
        low_bit_state(optax.scale_by_lion(b1, b2), bits, min_size=min_size, elementwise=True, **(codecs or {})),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def adafactor_low_bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float | None = 0.9,
    bits: int | str = 8,
    min_size: int = 4096,
    codecs: Mapping[str, Any] | None = None,
    **adafactor: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adafactor with its momentum, and the second moments that it does not factor, in few bits.

    The row and column averages of the factored ones are small and stay in float32. Other arguments go to
    `optax.adafactor`."""
    return low_bit_state(
        optax.adafactor(learning_rate, momentum=momentum, **adafactor), bits, min_size=min_size, **(codecs or {})
    )


def muon_low_bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    bits: int | str = 8,
    min_size: int = 4096,
    codecs: Mapping[str, Any] | None = None,
    **muon: Any,
) -> optax.GradientTransformationExtraArgs:
    """Muon with its momentum, and the moments of the Adam that takes its other parameters, in few bits.

    Other arguments go to `optax.contrib.muon`."""
    return low_bit_state(optax.contrib.muon(learning_rate, **muon), bits, min_size=min_size, **(codecs or {}))
