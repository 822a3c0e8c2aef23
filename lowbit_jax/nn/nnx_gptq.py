"""NNX: weights packed by GPTQ, from the inputs that their layers meet."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array

from lowbit_jax.gptq import damped
from lowbit_jax.nn.met import LOSES, add_to, call_arguments, no_batches, ran, runs, several
from lowbit_jax.nn.nnx import PackedWeight, Scale, attribute_of, edited, hook, layer_type, modules, weight_of
from lowbit_jax.nn.nnx_calibrate import Call, refuse_traced, split_arrays
from lowbit_jax.nn.nnx_convert import convert
from lowbit_jax.nn.product import Product
from lowbit_jax.nn.site import Site, called
from lowbit_jax.nn.weight import Storage
from lowbit_jax.ops.einsum import parse

WHO = "lb.nn.gptq"


def gptq(model: nnx.Module, batches: Iterable[Any], storage: Storage, damping: float) -> nnx.Module:
    """See `lb.nn.gptq`."""
    met = _grams(model, batches)
    counted = runs()
    for path, (gram, calls) in met.items():
        traces, calls = np.asarray(jnp.trace(gram, axis1=-2, axis2=-1)), np.asarray(calls)
        if calls.sum() < counted.get(path, 0):
            raise ValueError(f"{WHO}: not all runs of the layer {path!r} in these batches left their inputs: {LOSES}.")
        if not np.all(calls > 0):
            raise ValueError(
                f"{WHO}: these batches do not run the layer {path!r}{_of_stack(calls == 0)}. Pass batches that do, or"
                " leave it out by a rule."
            )
        if not np.all(np.isfinite(traces)):
            raise ValueError(
                f"{WHO}: the sum of x^T x of the layer {path!r}{_of_stack(~np.isfinite(traces))} is not finite in"
                " float32: an input x is not finite (find it by lb.check_finite), or about 1e19 and larger."
            )
        if not np.all(traces > 0):
            raise ValueError(
                f"{WHO}: the layer {path!r}{_of_stack(traces <= 0)} met no input but zeros (or below 1e-19) in these"
                " batches. Pass others, or leave it out by a rule."
            )
    return convert(model, storage, {path: damped(gram, damping) for path, (gram, _) in met.items()})


def _of_stack(which: np.ndarray | np.bool) -> str:
    """The first layer of a stack of which that is true, in words."""
    return f" (number {', '.join(map(str, np.argwhere(which)[0]))} of its stack)" if which.ndim else ""


class _Met(Scale):
    """What a layer met; handed on by transformations as its learned scales are."""


class _Observed(nnx.Module):
    """A layer's product that adds up x^T x, its contraction axes merged as the weight's are."""

    def __init__(self, inner: Any, product: Product, stack: tuple[int, ...]):
        self.inner = inner
        self.site = nnx.static(product.site)
        self.gram = _Met(jnp.zeros((*stack, product.site.length, product.site.length), jnp.float32))
        index = jnp.arange(math.prod(stack), dtype=jnp.float32).reshape(stack)
        self.calls = _Met(jnp.stack([index, jnp.zeros_like(index)], axis=-1))  # which layer of a stack, and how often

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        if isinstance(args[0], str):
            spec, lhs, rhs = args[:3]
            axes = parse(spec, lhs.ndim, rhs.ndim)[0][0][0]
        else:
            lhs, _, ((axes, _), _) = args[:3]
        x = jnp.moveaxis(lhs, axes, range(lhs.ndim - len(axes), lhs.ndim)).reshape(-1, self.site.length)
        x = lax.stop_gradient(x).astype(jnp.float32)
        gram = lax.dot(x.T, x, precision=lax.Precision.HIGHEST)
        ran(self.site.path, 1, self.calls.get_value())
        add_to(self.calls, jnp.asarray([0.0, 1.0], jnp.float32), WHO, self.site.path)
        add_to(self.gram, gram, WHO, self.site.path)
        return self.inner(*args, **kwargs)


def _grams(model: nnx.Module, batches: Iterable[Any]) -> dict[str, tuple[Array, Array]]:
    """Sum of x^T x and number of runs, by the path of each layer that is one weight's product with one input."""
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
            site = dataclasses.replace(product.site, path=paths[0])  # a part quantized by itself has its own
            layers |= dict.fromkeys(paths, dataclasses.replace(product, site=site))

    def observe(layer: Any, product: Product) -> None:
        weight = weight_of(layer).get_value()
        stack = tuple(weight.shape[: weight.ndim - len(product.site.shape)])
        held = getattr(layer, attribute_of(layer))
        inner = held if isinstance(held, nnx.Module) else nnx.static(held)
        setattr(layer, attribute_of(layer), nnx.data(_Observed(inner, product, stack)))

    graph, met, rest = nnx.split(edited(model, layers, observe), _Met, ...)

    @functools.partial(jax.jit, static_argnums=3)
    def run(met: Any, rest: Any, arrays: list, call: Call) -> Any:
        copy = nnx.merge(graph, met, rest)
        call(copy, arrays)
        return nnx.state(copy, _Met)

    count = 0
    runs()  # forgets those of a call that raised
    for batch in several(batches, WHO):
        refuse_traced(WHO, model, batch)
        arrays, call = split_arrays(WHO, *call_arguments(batch))
        met = run(met, rest, arrays, call)
        count += 1
    if not count:
        raise ValueError(no_batches(WHO))
    observed = [module for _, module in nnx.iter_modules(nnx.merge(graph, met, rest)) if isinstance(module, _Observed)]
    return {module.site.path: (module.gram.get_value(), module.calls.get_value()[..., 1]) for module in observed}


def _plain(site: Site) -> bool:
    """Whether each weight of the layer meets one input: no convolution, no table, no batch axes."""
    if site.kind == "einsum":
        assert site.spec is not None
        letters = site.spec.partition(",")[0].replace("...", "")
        return not parse(site.spec, len(letters), len(site.shape))[0][1][0]
    return site.kind == "dot_general" and site.contract[0] == 0  # a LinearGeneral's batch axes come first
