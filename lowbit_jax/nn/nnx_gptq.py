"""NNX: weights packed by GPTQ, from the inputs that their layers meet."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array

from lowbit_jax.gptq import damped
from lowbit_jax.nn.nnx import PackedWeight, attribute_of, edited, hook, layer_type, modules, weight_of
from lowbit_jax.nn.nnx_convert import convert
from lowbit_jax.nn.product import Product
from lowbit_jax.nn.site import Site, called
from lowbit_jax.nn.weight import Storage
from lowbit_jax.ops.einsum import parse

WHO = "lb.nn.gptq"


def gptq(model: nnx.Module, batches: Iterable[Any], storage: Storage, damping: float) -> nnx.Module:
    """See `lb.nn.gptq`."""
    grams = _grams(model, batches)
    for path, gram in grams.items():
        traces = np.asarray(jnp.trace(gram, axis1=-2, axis2=-1))
        if not np.all(np.isfinite(traces)):
            raise ValueError(f"{WHO}: an input of the layer {path!r} is not finite. Find it by lb.check_finite.")
        if not np.all(traces > 0):
            raise ValueError(
                f"{WHO}: the layer {path!r} met no input but zeros in these batches. Pass batches that reach it, or"
                " leave it out by a rule."
            )
    return convert(model, storage, {path: damped(gram, damping) for path, gram in grams.items()})


class _Met(nnx.Variable):
    """The sum of x^T x of a layer."""


class _Observed(nnx.Module):
    """A layer's product that adds up x^T x, its contraction axes merged as the weight's are."""

    def __init__(self, inner: Any, product: Product, stack: tuple[int, ...]):
        self.inner = inner
        self.site = nnx.static(product.site)
        self.gram = _Met(jnp.zeros((*stack, product.site.length, product.site.length), jnp.float32))

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        if isinstance(args[0], str):
            spec, lhs, rhs = args[:3]
            axes = parse(spec, lhs.ndim, rhs.ndim)[0][0][0]
        else:
            lhs, _, ((axes, _), _) = args[:3]
        x = jnp.moveaxis(lhs, axes, range(lhs.ndim - len(axes), lhs.ndim)).reshape(-1, self.site.length)
        x = x.astype(jnp.float32)
        self.gram.set_value(self.gram.get_value() + lax.dot(x.T, x, precision=lax.Precision.HIGHEST))
        return self.inner(*args, **kwargs)


def _grams(model: nnx.Module, batches: Iterable[Any]) -> dict[str, Array]:
    """By the path of each layer that is one weight's product with one input."""
    layers = {}
    for layer, paths in modules(model):
        product = hook(layer) if layer_type(layer) else None
        if product is None or isinstance(weight_of(layer), PackedWeight) or not _plain(product.site):
            continue
        quantizer = product.recipe.forward_quantizers[1]
        if quantizer is not None and quantizer.sparsity is not None:
            raise ValueError(
                f"{WHO}: {called(paths[0], type(layer))} has sparse weights ({quantizer.sparsity.describe()}), whose"
                " support would have to be chosen with the levels. Leave it out by a rule, or use lb.convert."
            )
        if quantizer is not None:
            layers |= dict.fromkeys(paths, product)

    def observe(layer: Any, product: Product) -> None:
        weight = weight_of(layer).get_value()
        stack = tuple(weight.shape[: weight.ndim - len(product.site.shape)])
        held = getattr(layer, attribute_of(layer))
        inner = held if isinstance(held, nnx.Module) else nnx.static(held)
        setattr(layer, attribute_of(layer), nnx.data(_Observed(inner, product, stack)))

    graph, met, rest = nnx.split(edited(model, layers, observe), _Met, ...)

    @jax.jit
    def run(met: Any, rest: Any, arguments: tuple) -> Any:
        copy = nnx.merge(graph, met, rest)
        copy(*arguments)
        return nnx.state(copy, _Met)

    count = 0
    for batch in batches:
        met = run(met, rest, batch if isinstance(batch, tuple) else (batch,))
        count += 1
    if not count:
        raise ValueError(f"{WHO} got no batches. Give one or more arrays, or tuples of the arguments of a call.")
    observed = [module for _, module in nnx.iter_modules(nnx.merge(graph, met, rest)) if isinstance(module, _Observed)]
    return {module.site.path: module.gram.get_value() for module in observed}


def _plain(site: Site) -> bool:
    """Whether each weight of the layer meets one input: no convolution, no table, no batch axes."""
    if site.kind == "einsum":
        assert site.spec is not None
        letters = site.spec.partition(",")[0].replace("...", "")
        return not parse(site.spec, len(letters), len(site.shape))[0][1][0]
    return site.kind == "dot_general" and site.contract[0] == 0  # a LinearGeneral's batch axes come first
