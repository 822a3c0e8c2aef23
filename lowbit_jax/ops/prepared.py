"""A weight that was rotated and quantized before its product, once for many of them."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class PreparedKernel:
    """What `lb.nn.prepare` leaves of a weight: rotated and quantized, of the same shape and dtype.

    scale: that of each row or of the tensor, with an axis of length 1 for the contraction (axes that are contracted
    together are merged), for products that multiply codes; None where such a scale is not all that codes lack.
    A node of its own in the tree, so that its gradient, which belongs to this array and not to the weight, fits no
    parameter and no optimizer of the model."""

    values: Float[Array, "*s"]
    scale: Float[Array, "*#s"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def of(self, who: str, ready: bool) -> tuple[Float[Array, "*s"], Float[Array, "*#s"] | None]:
        """Values and scales, for a product whose recipe says that its weight is `ready`.

        Raises: ValueError, as `who`, for another recipe, which would quantize the values again."""
        if not ready:
            raise ValueError(
                f"{who} got a prepared weight, and a recipe that would quantize it again. Use recipe.with_rhs_ready(),"
                " or the weight itself."
            )
        return self.values, self.scale

    def __radd__(self, weight: Any) -> Any:  # where optax adds an update to a weight
        raise TypeError(
            "lb.nn.prepare: this gradient is of the prepared weight, which is rotated and quantized, and not of the"
            " weight. Call prepare inside the function that is differentiated, and differentiate by the model itself."
        )
