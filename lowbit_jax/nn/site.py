"""Where a weight enters a product of a layer, and what a recipe needs there."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lowbit_jax.ops import LinearRecipe
from lowbit_jax.ops.einsum import parse
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import Learned
from lowbit_jax.scaling.fit import largest_magnitude

Kind = Literal["dot_general", "einsum", "conv_general_dilated", "embedding"]


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """The product of one layer. path: of the layer in its model. shape: of the weight of one layer, without the leading
    axes of layers stacked for a scan. contract: axes of the weight that the product sums over. spec: the einsum's,
    without blanks."""

    path: str
    kind: Kind
    shape: tuple[int, ...]
    contract: tuple[int, ...]
    spec: str | None = None

    @property
    def tag(self) -> str:
        """Name scope of the product, found again in the compiled program by `lb.explain`."""
        return f"lowbit[{self.path.replace('/', '.')}]"

    @property
    def weight(self) -> str:
        """Name of the layer's parameter."""
        return "embedding" if self.kind == "embedding" else "kernel"

    @property
    def length(self) -> int:
        """Elements that one sum runs over."""
        return int(np.prod([self.shape[a] for a in self.contract], dtype=np.int64))

    @property
    def numbers(self):
        """Dimension numbers whose right side is the weight's; the left side stands in for any activation."""
        return (self.contract, self.contract), ((), ())


def called(path: str, kind: type | str) -> str:
    """A layer in an error message."""
    name = kind if isinstance(kind, str) else kind.__name__
    return f"the layer {path!r} ({name})" if path else f"this {name}"


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Adds the layer's path to an error on its way up."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        if path:
            error.add_note(f"This was in the quantized layer {path!r}.")
        raise


def einsum_contraction(spec: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of the weight (the second operand) that `spec` sums over."""
    letters = spec.partition(",")[0].replace("...", "").replace(" ", "")
    numbers, _ = parse(spec, len(letters), len(shape))
    return numbers[0][1]


def operand(recipe: LinearRecipe, side: Literal["lhs", "rhs"]) -> Quantizer:
    """The quantizer of an operand of the forward product that has one."""
    quantizer = getattr(recipe.out, side)
    assert isinstance(quantizer, Quantizer)
    return quantizer


def initial_scales(recipe: LinearRecipe, site: Site, kernel: Array) -> dict[str, Array]:
    """Starting values of the learned scales: the weight's from the weight, the activation's from a unit Gaussian.

    Shapes for the shape of a kernel (`nnx.eval_shape`).
    Raises: ValueError when an activation's scale has more than one entry (it would depend on the batch)."""
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda kernel: initial_scales(recipe, site, kernel), kernel)
    scales = {}
    if "lhs" in recipe.learned:
        scale = initial_activation_scale(recipe, site)
        scales["lhs"] = jnp.broadcast_to(scale, kernel.shape[: kernel.ndim - len(site.shape)])
    if "rhs" in recipe.learned:
        scales["rhs"] = stacked(lambda k: initial_weight_scale(k, recipe, site), kernel, site)(kernel)
    return scales


def initial_activation_scale(recipe: LinearRecipe, site: Site) -> Array:
    """From a unit Gaussian: the same whatever batch a model is initialized with."""
    size = site.shape[-2] if site.kind == "conv_general_dilated" else site.length
    gaussian = jax.random.normal(jax.random.key(0), (256, size), jnp.float32)
    scale = operand(recipe, "lhs").initial_scale(gaussian)
    check_activation_scale(scale, recipe, site)
    return scale


def initial_weight_scale(kernel: Array, recipe: LinearRecipe, site: Site) -> Array:
    (*others, last) = site.contract
    axis = site.contract if others else last
    return operand(recipe, "rhs").initial_scale(kernel, axis=axis)


def fitted_scale(side: str, arrived: Array, recipe: LinearRecipe, site: Site, held: Array) -> Array:
    """The learned scale of one layer fitted to the operand that arrives; |held| where that is all zeros, which fits no
    scale."""
    if side == "rhs":
        fit = lambda recipe: initial_weight_scale(arrived, recipe, site)
    else:
        rows = arrived.reshape(-1, arrived.shape[-1]) if site.kind == "conv_general_dilated" else arrived
        fit = lambda recipe: operand(recipe, "lhs").initial_scale(rows)
    scale, size = fit(recipe), fit(_of_magnitudes(recipe, side))
    return jnp.where(size == 0, jnp.abs(held), scale.astype(held.dtype))


def _of_magnitudes(recipe: LinearRecipe, side: str) -> LinearRecipe:
    """The recipe with the largest magnitude of a tile for the first value of a learned scale."""
    quantizer = dataclasses.replace(getattr(recipe.out, side), fit=Learned(_magnitude))
    return LinearRecipe(out=dataclasses.replace(recipe.out, **{side: quantizer}))


def _magnitude(tiles: Array, fmt: Any, axes: tuple[int, ...]) -> Array:
    return largest_magnitude(tiles, axes)


def check_activation_scale(scale: Array, recipe: LinearRecipe, site: Site) -> None:
    if scale.ndim:
        raise ValueError(
            f"the layer {site.path!r}: a learned activation scale needs one entry for the tensor;"
            f" {recipe.name or 'this recipe'}"
            f" tiles it by {operand(recipe, 'lhs').tiling}. Use tiling=PerTensor()."
        )


def stacked(function: Callable[..., Any], kernel: Array, site: Site) -> Callable[..., Any]:
    """`function(kernel, ...)` for the weight of one layer, mapped over the leading axes of layers stacked for a scan.

    Raises: ValueError when the trailing axes are not the layer's."""
    check_stack(tuple(kernel.shape), site.shape)
    for _ in range(kernel.ndim - len(site.shape)):
        function = jax.vmap(function)
    return function


def check_stack(stored: tuple[int, ...], own: tuple[int, ...], where: str = "", what: str = "weight") -> None:
    """Raises ValueError, as told by `where`, for a stored shape whose trailing axes are not the layer's own."""
    if len(stored) < len(own) or stored[len(stored) - len(own) :] != own:
        raise ValueError(
            f"{where}{': ' if where else ''}the stored {what} has the shape {stored}, the configuration says {own},"
            " after leading axes of stacked layers. Stack layers on axis 0, as nnx.vmap does."
        )
