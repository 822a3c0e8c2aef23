"""Which gradient crosses a rounding? Each estimator is a frozen record with one signature, all through one
custom_vjp."""

from lowbit_jax.estimators.base import Estimator, quantize_through
from lowbit_jax.estimators.learned import LSQ, PACT
from lowbit_jax.estimators.straight_through import ClippedStraightThrough, StraightThrough
from lowbit_jax.estimators.trust import Trust

__all__ = [
    "LSQ",
    "PACT",
    "ClippedStraightThrough",
    "Estimator",
    "StraightThrough",
    "Trust",
    "quantize_through",
]
