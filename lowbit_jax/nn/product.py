"""What stands in a layer in place of its product: frozen, hashable callables that Flax holds as static attributes.

A `Product` computes the product of a `Site` by a recipe; `KeepMaster` stands in place of Flax's `promote_dtype`, so
that the quantizer sees the weight's master copy and not one rounded to the compute dtype.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lowbit_jax.nn.site import Site, naming
from lowbit_jax.nn.weight import convolution_weight
from lowbit_jax.ops import LinearRecipe, conv_general_dilated, dot_general
from lowbit_jax.ops.einsum import parse
from lowbit_jax.ops.prepared import PreparedKernel
from lowbit_jax.qtensor import QTensor


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """The quantized product of a layer that needs neither keys nor learned scales; same call as what it replaces."""

    recipe: LinearRecipe
    site: Site

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        return self.compute(args, kwargs)

    def compute(self, args: tuple, kwargs: Mapping[str, Any], key: Any = None, scales: Any = None) -> Array:
        """`args` and `kwargs` as Flax passes them to `dot_general`, `einsum_op` or `conv_general_dilated`."""
        args = tuple(self._prepared(a) if isinstance(a, PreparedKernel) else a for a in args)
        given = {name: value for name, value in kwargs.items() if name != "out_sharding" or value is not None}
        with jax.named_scope(self.site.tag), naming(self.site.path):
            return _COMPUTE[self.site.kind](self.site, *args, **given, recipe=self.recipe, key=key, scales=scales)

    def _prepared(self, kernel: PreparedKernel) -> Array | PreparedKernel:
        if not self.recipe.rhs_ready:
            raise ValueError(
                f"the layer {self.site.path!r} got a weight from lb.nn.prepare, and is of a model that is not prepared."
                " Use the model that prepare answers with, or the weights that it was given."
            )
        return kernel.values if self.site.kind == "conv_general_dilated" else kernel


def _einsum(site: Site, spec: str, lhs: Array, rhs: Array | QTensor, *, recipe, out_sharding=None, **options) -> Array:
    numbers, permutation = parse(spec, lhs.ndim, len(site.shape))
    contract = numbers[0][1]
    if contract != site.contract and (isinstance(rhs, QTensor) or recipe.rhs_ready):
        raise ValueError(
            f"this weight was quantized for {site.spec!r}, along its axes {site.contract}, and {spec!r} sums over"
            f" {contract}."
            " Call it with its own spec, or keep this layer unconverted."
        )
    if out_sharding is not None and permutation != tuple(range(len(permutation))):
        raise NotImplementedError(
            f"out_sharding with {spec!r}, whose output axes are not in the order of a dot_general. Write the output as"
            " batch, activation, weight axes, and transpose afterwards."
        )
    out = dot_general(lhs, rhs, numbers, recipe=recipe, out_sharding=out_sharding, **options)
    return jnp.transpose(out, permutation)


def _dot_general(site: Site, *args: Any, **kwargs: Any) -> Array:
    return dot_general(*args, **kwargs)


def _convolution(
    site: Site, lhs: Array, rhs: Array | QTensor, *args: Any, recipe: LinearRecipe, **kwargs: Any
) -> Array:
    if isinstance(rhs, QTensor):
        rhs, recipe = convolution_weight(rhs, recipe, site, jnp.float32), recipe.with_rhs_ready()
    return conv_general_dilated(lhs, rhs, *args, recipe=recipe, **kwargs)


_COMPUTE: dict[str, Callable[..., Array]] = {
    "dot_general": _dot_general,
    "einsum": _einsum,
    "conv_general_dilated": _convolution,
}


@dataclasses.dataclass(frozen=True, slots=True)
class KeepMaster:
    """`promote_dtype` that promotes the input and the bias as `original` would, and leaves the weight as it is stored.

    Serves both call forms of Flax: NNX's `((inputs, kernel, bias), dtype=)` and Linen's `(inputs, kernel, bias,
    dtype=)`."""

    original: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        together = len(args) == 1 and isinstance(args[0], tuple | list)
        operands: Any = args[0] if together else args
        inputs, kernel, bias = operands
        proxy = jnp.zeros((), kernel.dtype)  # takes the weight's part in choosing the dtype
        promoted = (inputs, proxy, bias)
        inputs, _, bias = self.original(promoted, **kwargs) if together else self.original(*promoted, **kwargs)
        return inputs, kernel, bias
