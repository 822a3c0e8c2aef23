"""Linen's layers: where the weight enters the product, and one call of a layer with that product quantized."""

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.linen.dtypes import promote_dtype
from jax import lax
from jaxtyping import Array

from lowbit_jax.nn.check import check_site
from lowbit_jax.nn.embedding import attend, check_recipe, lookup, table_site
from lowbit_jax.nn.product import KeepMaster, Product
from lowbit_jax.nn.site import (
    Site,
    called,
    einsum_contraction,
    fitted_scale,
    initial_activation_scale,
    initial_weight_scale,
)
from lowbit_jax.nn.weight import to_nearest
from lowbit_jax.ops import LinearRecipe
from lowbit_jax.ops.prepared import PreparedKernel
from lowbit_jax.qtensor import QTensor


def _tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _dense(layer: linen.Dense, path: str, x: Array, *_: Any) -> Site:
    return Site(path, "dot_general", (x.shape[-1], layer.features), (0,))


def _dense_general(layer: linen.DenseGeneral, path: str, x: Array, *_: Any) -> Site:
    axes = sorted(a % x.ndim for a in _tuple(layer.axis))
    batch = sorted(a % x.ndim for a in _tuple(layer.batch_dims))
    shape = (*(x.shape[a] for a in batch), *(x.shape[a] for a in axes), *_tuple(layer.features))
    return Site(path, "dot_general", shape, tuple(range(len(batch), len(batch) + len(axes))))


def _einsum(layer: linen.Einsum, path: str, x: Array, spec: str | None = None) -> Site:
    spec = (layer.einsum_str or spec or "").replace(" ", "")
    return Site(path, "einsum", tuple(layer.shape), einsum_contraction(spec, tuple(layer.shape)), spec)


def _conv(layer: linen.Conv, path: str, x: Array, *_: Any) -> Site:
    shape = (*_tuple(layer.kernel_size), x.shape[-1] // layer.feature_group_count, layer.features)
    return Site(path, "conv_general_dilated", shape, tuple(range(len(shape) - 1)))


def _embed(layer: linen.Embed, path: str, *_: Any) -> Site:
    return table_site(path, layer.num_embeddings, layer.features)


@dataclasses.dataclass(frozen=True, slots=True)
class LayerType:
    """Fields that hold the product (the second takes a class and wins over the first), and the site."""

    fields: tuple[str, ...]
    site: Callable[..., Site]


LAYERS: dict[type, LayerType] = {
    linen.Dense: LayerType(("dot_general", "dot_general_cls"), _dense),
    linen.DenseGeneral: LayerType(("dot_general", "dot_general_cls"), _dense_general),
    linen.Einsum: LayerType((), _einsum),
    linen.Conv: LayerType(("conv_general_dilated", "conv_general_dilated_cls"), _conv),
    linen.Embed: LayerType((), _embed),
}


def layer_base(module: Any) -> type | None:
    """The Flax layer that a module, or a class, is."""
    kind = module if isinstance(module, type) else type(module)
    return next((base for base in kind.__mro__ if base in LAYERS), None)


@functools.cache
def own_call(base: type, method: str = "__call__") -> Callable:
    """The function that Flax runs for the layer's own `__call__`, or another method."""
    return inspect.unwrap(getattr(base, method), stop=lambda f: not hasattr(f, "method_handler_wrapped"))


def uses_weight(base: type | None, method: str) -> bool:
    """Whether the method of a Flax layer is one that takes its product."""
    return base is not None and (method == "__call__" or (base is linen.Embed and method == "attend"))


def quantized_embed(layer: linen.Embed, path: str, recipe: LinearRecipe, method: str, x: Array, watchers: Any) -> Array:
    """`layer(ids)`, or `layer.attend(query)`, with its table quantized; raises where it cannot be."""
    where = f"lb.quantize: {called(path, linen.Embed)}"
    _check_layer(layer, linen.Embed, where)
    check_recipe(recipe, where)
    site, table = _embed(layer, path), linen.meta.unbox(layer.embedding)
    if isinstance(table, QTensor):
        recipe = to_nearest(recipe)
    else:
        check_site(site, recipe, jax.ShapeDtypeStruct(site.shape, layer.param_dtype), where)
    recipe = dataclasses.replace(recipe, rhs_ready=False)  # `lb.nn.prepare` leaves tables as they are
    for watcher in watchers:
        watcher(site, recipe, layer)
    if method == "__call__":
        return lookup(table, x, recipe, site, layer.dtype or table.dtype)
    query, _ = layer.promote_dtype(x, jnp.zeros((), table.dtype), dtype=layer.dtype)
    assert query is not None, "it was given"
    return attend(query, table, recipe, site)


def adopt_packed_table(layer: Any) -> bool:
    """Whether the table of an Embed is packed, which its own `setup` would take for one of the wrong shape; then it is
    set here."""
    if layer_base(layer) is not linen.Embed or not layer.has_variable("params", "embedding"):
        return False
    table = linen.meta.unbox(layer.get_variable("params", "embedding"))
    if isinstance(table, QTensor):
        object.__setattr__(layer, "embedding", table)
    return isinstance(table, QTensor)


def quantized_call(
    layer: Any, base: type, path: str, recipe: LinearRecipe, call: Callable, args: tuple, kwargs: dict, watchers: Any
) -> Array:
    """One call of the layer's own `__call__`, its product replaced; raises where it cannot be."""
    where = f"lb.quantize: {called(path, base)}"
    _check_layer(layer, base, where)
    bound = inspect.signature(own_call(base)).bind(layer, *args, **kwargs)
    arguments = list(bound.arguments.values())[1:]
    site = LAYERS[base].site(layer, path, *arguments)
    stored = (
        linen.meta.unbox(layer.get_variable("params", "kernel")) if layer.has_variable("params", "kernel") else None
    )
    if isinstance(stored, QTensor):
        recipe = to_nearest(recipe)
    else:
        check_site(site, recipe, jax.ShapeDtypeStruct(site.shape, layer.param_dtype), where)
    for watcher in watchers:
        watcher(site, recipe, layer)
    product = BoundProduct(Product(recipe, site), layer)
    changes: dict[str, Any] = dict(promote_dtype=KeepMaster(layer.promote_dtype))
    if LAYERS[base].fields:
        changes[LAYERS[base].fields[0]] = product
    if isinstance(stored, QTensor | PreparedKernel):
        changes["param"] = functools.partial(_stored_param, layer.param, stored)
    with _changed(layer, changes):
        return call(*args, **kwargs) if base is not linen.Einsum else einsum_call(layer, product, *arguments)


def _check_layer(layer: Any, base: type, where: str) -> None:
    taken = [
        name
        for name in LAYERS[base].fields
        if getattr(layer, name) not in (None, lax.dot_general, lax.conv_general_dilated)
    ]
    if taken:
        raise ValueError(
            f"{where} has a {taken[0]} of its own, which quantizing would drop. Build it without, or leave it out."
        )
    if layer.promote_dtype is not promote_dtype:
        raise ValueError(
            f"{where} has a promote_dtype of its own, which quantizing would bypass. Leave it out by a rule."
        )
    if getattr(layer, "mask", None) is not None:
        raise NotImplementedError(
            f"{where} has a mask. Quantized weights do not keep its zeros (a rotation mixes them, mid-rise grids"
            " have no zero)."
            " Leave the layer out by a rule."
        )


def _stored_param(param: Callable, stored: QTensor | PreparedKernel, name: str, *args: Any, **kwargs: Any) -> Any:
    return stored if name == "kernel" else param(name, *args, **kwargs)


@contextlib.contextmanager
def _changed(layer: Any, changes: dict[str, Any]) -> Iterator[None]:
    """Other attributes on this one bound instance, for the length of a call."""
    missing = object()
    before = {name: vars(layer).get(name, missing) for name in changes}
    for name, value in changes.items():
        object.__setattr__(layer, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__delattr__(layer, name) if value is missing else object.__setattr__(layer, name, value)


@dataclasses.dataclass
class BoundProduct:
    """A `Product` with its learned scales in the `params` of its layer and its keys from the stream "quantize"."""

    product: Product
    layer: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        recipe = self.product.recipe
        lhs, rhs = [a for a in args if not isinstance(a, str)][:2]
        scales = {}
        if "lhs" in recipe.learned:
            scales["lhs"] = self._scale("lhs", lhs)
        if "rhs" in recipe.learned and not isinstance(rhs, QTensor) and not recipe.rhs_ready:
            scales["rhs"] = self._scale("rhs", rhs)
        key = self.layer.make_rng("quantize") if recipe.needs_key else None
        return self.product.compute(args, kwargs, key=key, scales=scales or None)

    def _scale(self, side: str, arrived: Array) -> Array:
        """The learned scale of a side; one that is not there yet starts as in NNX, or is fitted by `lb.calibrate`."""
        recipe, site, layer, name = self.product.recipe, self.product.site, self.layer, f"{side}_scale"
        start = lambda: (
            initial_activation_scale(recipe, site) if side == "lhs" else initial_weight_scale(arrived, recipe, site)
        )
        calibration, arrived = _current.calibration, lax.stop_gradient(arrived)
        entry = (site.path, side)
        if calibration is not None and entry in calibration.stored:
            return self._fitted(side, arrived)
        if calibration is not None and entry in calibration.reported:
            held = layer.get_variable("params", name)
            scale = calibration.report(entry, fitted_scale(side, arrived, recipe, site, jnp.zeros_like(held)))
            return jnp.where(scale == 0, held, scale)
        if layer.has_variable("params", name):
            return layer.param(name, lambda _: start())
        if calibration is not None:
            return start()
        if layer.is_mutable_collection("params") and layer.has_rng("params"):
            # Not a `param`: it would draw a key, and Flax's lifted transformations count the keys of a layer before
            # they hand out the first, so that the other parameters would start apart from those of the float model.
            return layer.variable("params", name, start).value
        raise ValueError(missing_scale("lb.quantize", site.path, side))

    def _fitted(self, side: str, arrived: Array) -> Array:
        """The scale that the operand fits, for this call; in `params` stands the mean of what the calls so far fitted.
        An operand of zeros fits none."""
        recipe, site, layer = self.product.recipe, self.product.site, self.layer
        before, mean, count = calibration_names(side)
        start = layer.get_variable("params", before)
        fitted = fitted_scale(side, arrived, recipe, site, jnp.zeros_like(start))
        fits = layer.get_variable("params", count, jnp.zeros_like(start)) + jnp.sign(fitted)
        held = layer.get_variable("params", mean, start)
        layer.put_variable("params", mean, jnp.where(fitted == 0, held, held + (fitted - held) / jnp.maximum(fits, 1)))
        layer.put_variable("params", count, fits)
        return jnp.where(fitted == 0, start, fitted)


def missing_scale(who: str, path: str, side: str) -> str:
    """The error for a learned scale that the variables lack, as those of the float model do."""
    return (
        f"{who}: the layer {path!r} has no {side}_scale among its params. The recipe learns it: get variables that have"
        " it from lb.calibrate(model, variables, *inputs), or from init of the quantized model."
    )


def calibration_names(side: str) -> tuple[str, str, str]:
    """Where `lb.calibrate` keeps the scale from before, the mean of what it fits anew, and of how many calls."""
    return f"{side}_scale_before", f"{side}_scale", f"{side}_scale_fits"


@dataclasses.dataclass
class Calibration:
    """What becomes of the learned scales, named by (path, side), while `lb.calibrate` runs the model, or a verb traces
    it: some are fitted and stored in `params`, some fitted and reported, once a time that the layer runs; the others
    stay, and those that are not there are not made (the branches of nn.cond have to make the same)."""

    stored: frozenset[tuple[str, str]] = frozenset()
    reported: dict[tuple[str, str], list[Any]] = dataclasses.field(default_factory=dict)

    def report(self, entry: tuple[str, str], scale: Array) -> Array:
        """The scale, told on its way: `flax.linen.scan` allows no effect in its body that nothing depends on."""

        def told(scale: Any) -> Any:
            self.reported[entry].append(np.array(scale))
            return scale

        return jax.pure_callback(told, jax.typeof(scale), scale, vmap_method="sequential")


class _Current(threading.local):
    calibration: Calibration | None = None


_current = _Current()


@contextlib.contextmanager
def calibrating(calibration: Calibration) -> Iterator[None]:
    _current.calibration = calibration
    try:
        yield
    finally:
        _current.calibration = None


def einsum_call(layer: linen.Einsum, product: BoundProduct, inputs: Any, einsum_str: str | None = None) -> Array:
    """`linen.Einsum.__call__` with `product` in place of its fixed `jnp.einsum`; same parameters in the same order."""
    spec = product.product.site.spec or ""
    kernel = layer.param("kernel", layer.kernel_init, layer.shape, layer.param_dtype)
    bias = bias_shape = None
    if layer.use_bias:
        shape, bias_shape = layer._get_bias_shape(spec, inputs, kernel)
        bias = layer.param("bias", layer.bias_init, shape, layer.param_dtype)
    inputs, kernel, bias = layer.promote_dtype(inputs, kernel, bias, dtype=layer.dtype)
    preferred = (
        {} if layer.preferred_element_type is None else dict(preferred_element_type=layer.preferred_element_type)
    )
    y = product(spec, inputs, kernel, precision=layer.precision, **preferred)
    return y if bias is None else y + jnp.reshape(bias, bias_shape)
