"""What a platform multiplies faster than the values of a grid: their codes, in a dtype that it has a product for."""

from typing import Any, Protocol

from jaxtyping import Array, Float

from lowbit_jax import rounding
from lowbit_jax.formats.base import Format
from lowbit_jax.ops.recipe import LinearRecipe
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.rotation import Hadamard
from lowbit_jax.scaling import PerRow, PerTensor


class Coder(Protocol):
    """A dtype for grid values, and their products: the modules `ops.int8`, `ops.int8_kernel` and `ops.fp8`."""

    def holds(self, quantizer: Quantizer | None, rotated: bool) -> bool:
        """Whether what this quantizer makes is codes times a scale that leaves the sum. rotated: so is the partner."""
        ...

    def multiplies(
        self, lhs: tuple[int, ...], rhs: tuple[int, ...], formats: tuple[Format, Format], numbers: tuple
    ) -> bool:
        """Whether `product` of arrays of these shapes is possible, and taken to be faster, where this is traced for."""
        ...

    def encode(self, values: Float[Array, "*s"], fmt: Format) -> Array: ...

    def decode(self, codes: Array, fmt: Format) -> Float[Array, "*s"]:
        """The grid values, float32."""
        ...

    def product(
        self, lhs: Array, rhs: Array, formats: tuple[Format, Format], numbers: tuple, precision: Any
    ) -> Float[Array, "*out"]:
        """`lax.dot_general` of the grid values that the codes stand for, float32."""
        ...


def keeps_scale(recipe: LinearRecipe) -> bool:
    """Whether a weight that comes quantized for this recipe brings scales that are all that its codes lack."""
    quantizer = recipe.forward_quantizers[1]
    return quantizer is not None and not quantizer.learned and leaves_the_sum(quantizer, recipe.shared_rotation)


def leaves_the_sum(quantizer: Quantizer, rotated: bool) -> bool:
    """Whether the quantizer makes grid values with one scale a row or a tensor, rotated only where its partner is. A
    rounding or a rotation of the user's own may leave the grid."""
    own = type(quantizer).in_rotated_space is Quantizer.in_rotated_space  # `lb.nn.keep_codes` has another one
    own &= quantizer.rounding in (rounding.nearest, rounding.stochastic, rounding.toward_zero)
    own &= isinstance(quantizer.rotation, Hadamard | None)
    return own and isinstance(quantizer.tiling, PerRow | PerTensor) and (rotated or not quantizer.rotation)
