"""Ready-made optimizers with low-bit states: those of optax, wrapped in `low_bit_state`.

Arguments named as in optax; `bits`, `min_size` and `keep` as in `low_bit_state`, whose `first`, `second` and `fields`
go in `codecs`. Under `optax.inject_hyperparams` pass `static_args=("bits", "min_size")`, with "mask" where that is a
function (optax takes functions for schedules), and `hyperparam_dtype=jnp.float32` if the parameters have 16 bits.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from lowbit_jax.optim.low_bit_state import low_bit_state
from lowbit_jax.optim.moments import EMBEDDINGS


def _with_arguments_of(factory: Callable, *without: str) -> Callable[[Callable], Callable]:
    """Shows the arguments of `factory` in place of the `**` ones that are handed on to it, to readers and to
    `optax.inject_hyperparams`, which calls by name."""

    def show(function: Callable) -> Callable:
        own = inspect.signature(function)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        others = [
            p.replace(kind=p.KEYWORD_ONLY)
            for p in inspect.signature(factory).parameters.values()
            if p.name not in own.parameters and p.name not in without
        ]
        function.__signature__ = own.replace(parameters=[*named, *others])  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return show


def adam_low_bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    bits: int | str = 8,
    min_size: int = 4096,
    keep: Sequence[str] = EMBEDDINGS,
    codecs: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with both moments in few bits.

    Source: Dettmers et al. 2022, arXiv:2110.02861 (8 bits); Li et al. 2023, arXiv:2309.01507 (4 bits)."""
    _check_precise(b1=b1, b2=b2, eps=eps)
    adam = optax.adam(learning_rate, b1, b2, eps)
    return low_bit_state(adam, bits, min_size=min_size, keep=keep, **(codecs or {}))


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
    keep: Sequence[str] = EMBEDDINGS,
    codecs: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with both moments in few bits; `mask` picks what decays, as in `optax.adamw`."""
    _check_precise(b1=b1, b2=b2, eps=eps)
    adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)
    return low_bit_state(adamw, bits, min_size=min_size, keep=keep, **(codecs or {}))


def lion_low_bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 1e-3,
    mask: Any = None,
    *,
    bits: int | str = 8,
    min_size: int = 4096,
    keep: Sequence[str] = EMBEDDINGS,
    codecs: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion with its momentum in few bits."""
    _check_precise(b1=b1, b2=b2)
    lion = optax.lion(learning_rate, b1, b2, weight_decay=weight_decay, mask=mask)
    return low_bit_state(lion, bits, min_size=min_size, keep=keep, **(codecs or {}))


@_with_arguments_of(optax.adafactor, "dtype_momentum")  # which optax.inject_hyperparams takes for a schedule
def adafactor_low_bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float | None = 0.9,
    bits: int | str = 8,
    min_size: int = 4096,
    keep: Sequence[str] = EMBEDDINGS,
    codecs: Mapping[str, Any] | None = None,
    **adafactor: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adafactor with its momentum, and the second moments that it does not factor, in few bits.

    The row and column averages of the factored ones are small and stay in float32. Other arguments go to
    `optax.adafactor`; under `optax.inject_hyperparams` its `min_dim_size_to_factor` is another of the static ones."""
    return low_bit_state(
        optax.adafactor(learning_rate, momentum=momentum, **adafactor),
        bits,
        min_size=min_size,
        keep=keep,
        **(codecs or {}),
    )


@_with_arguments_of(optax.contrib.muon)
def muon_low_bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    bits: int | str = 8,
    min_size: int = 4096,
    keep: Sequence[str] = EMBEDDINGS,
    codecs: Mapping[str, Any] | None = None,
    **muon: Any,
) -> optax.GradientTransformationExtraArgs:
    """Muon with its momentum, and the moments of the Adam that takes its other parameters, in few bits.

    Other arguments go to `optax.contrib.muon`."""
    _check_precise(**{name: muon[name] for name in ("beta", "eps", "adam_b1", "adam_b2") if name in muon})
    return low_bit_state(
        optax.contrib.muon(learning_rate, **muon), bits, min_size=min_size, keep=keep, **(codecs or {})
    )


def _check_precise(**numbers: Any) -> None:
    """Raises ValueError for decay rates in 16 bits, which round 0.999 to 1."""
    for name, value in numbers.items():
        if hasattr(value, "dtype") and jnp.dtype(value.dtype).itemsize < 4:
            raise ValueError(
                f"lb.optim: {name} is a {value.dtype}, in which 0.999 is 1 (bfloat16) and 1e-8 is 0 (float16). Under"
                " optax.inject_hyperparams pass hyperparam_dtype=jnp.float32."
            )
