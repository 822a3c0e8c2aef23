"""Steps whose loss or gradient norm leaps out of its recent range: found by z-score, inside the jitted step."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

SMALLEST_Z = 3.0
FLOORS = (0.05, 0.25)  # smallest standard deviation of log loss and log gradient norm; two steps alone tell little


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spikes:
    """A step is a spike when log loss or log gradient norm lies `z` standard deviations above its running mean.

    Mean and variance are of all steps seen at first, then of the last 1 / (1 - decay) or so. A spike enters them cut to
    the limit that it broke: one outlier hardly moves them, but each of several in a row raises limit and spread by a
    factor, so that after a lasting shift of level a few steps are skipped and not all. What is not finite never enters.

    first: steps seen before any is judged."""

    z: float
    decay: float = 0.95
    first: int = 2

    def __post_init__(self):
        if not SMALLEST_Z <= self.z < float("inf"):
            raise ValueError(
                f"spikes: --skip-spikes {self.z} must be a finite number of standard deviations, {SMALLEST_Z:g} or"
                " more: below, ordinary steps would be skipped. 6 is a common choice."
            )

    def start(self) -> dict[str, Array]:
        """The counter and statistics before the first step."""
        return {"count": jnp.zeros((), jnp.int32), "mean": jnp.zeros(2), "variance": jnp.zeros(2)}

    def judge(self, seen: dict[str, Array], loss: Float[Array, ""], norm: Float[Array, ""], finite: Bool[Array, ""]
              ) -> tuple[Bool[Array, ""], dict[str, Array]]:  # fmt: skip
        """Whether this step is a spike, and the statistics after it."""
        values = jnp.log(jnp.maximum(jnp.stack([loss, norm]).astype(jnp.float32), jnp.finfo(jnp.float32).tiny))
        deviation = jnp.maximum(jnp.sqrt(seen["variance"]), jnp.asarray(FLOORS))
        judged = seen["count"] >= self.first
        limit = jnp.where(judged, seen["mean"] + self.z * deviation, jnp.inf)
        spike = finite & jnp.any(values > limit)
        weight = jnp.maximum(1 - self.decay, 1 / (seen["count"] + 1))
        off = jnp.minimum(values, limit) - seen["mean"]
        after = {
            "count": seen["count"] + 1,
            "mean": seen["mean"] + weight * off,
            "variance": (1 - weight) * (seen["variance"] + weight * off**2),
        }
        return spike, {name: jnp.where(finite, after[name], seen[name]) for name in seen}
