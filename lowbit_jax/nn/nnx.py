"""NNX: a quantized view of a module, with the same parameters at the same paths.

The view is new modules around the very same Variables, as `nnx.view` makes: training it trains the original's
parameters, while the original keeps computing in full precision (`nnx.clone` the model first for independent
parameters). In a quantized layer only static attributes differ: its product and its `promote_dtype`. Learned scales and
random streams, where a recipe asks for them, live in a small module in place of the product.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from lowbit_jax.nn.bridge import way_inside
from lowbit_jax.nn.check import carried, check_owner, check_site, check_subclass
from lowbit_jax.nn.embedding import check_recipe, table_site
from lowbit_jax.nn.met import add_to, ran
from lowbit_jax.nn.nnx_embed import QuantizedEmbed
from lowbit_jax.nn.policy import Node, Policy, assign
from lowbit_jax.nn.product import KeepMaster, Product
from lowbit_jax.nn.site import (
    Site,
    called,
    check_stack,
    einsum_contraction,
    fitted_scale,
    initial_scales,
)
from lowbit_jax.ops import LinearRecipe
from lowbit_jax.ops.prepared import PreparedKernel
from lowbit_jax.qtensor import QTensor


class Scale(nnx.Param):
    """A learned scale: a parameter, by its own type so that it can have a weight decay or learning rate of its own."""


class PackedWeight(nnx.Param):
    """A weight as packed codes: its value is a `QTensor`, whose leaves are uint8 words and float scales. To train what
    lies beside it, differentiate by `nnx.All(nnx.Param, nnx.Not(PackedWeight))`."""

    def get_value(self, *, index: Any = ...) -> QTensor:
        """The QTensor; `[...]`, as layers read their kernel, is the whole of it."""
        if index is not ...:
            raise TypeError(
                f"PackedWeight[{index}]: a packed weight is read whole. Use .get_value().dequantize() first."
            )
        return super().get_value()


class PreparedWeight(nnx.Param):
    """A weight as `lb.nn.prepare` leaves it: its value is a `PreparedKernel`. The gradient by it goes back through
    `prepare`, by `jax.vjp`, and to no optimizer."""

    def get_value(self, *, index: Any = ...) -> PreparedKernel:
        """The PreparedKernel; `[...]`, as layers read their kernel, is the whole of it."""
        if index is not ...:
            raise TypeError(f"PreparedWeight[{index}]: a prepared weight is read whole. Use .get_value().values first.")
        return super().get_value()

    def replace(self, *value: Any, **metadata: Any) -> Any:
        """A partition spec, as `nnx.get_partition_spec` puts in place of the value, is that of the weight: its scales,
        which have another shape, lie on every device."""
        if value and isinstance(value[0], PartitionSpec) and self.get_value().scale is not None:
            specs: Any = value[0], PartitionSpec()
            value = (PreparedKernel(*specs),)
        return super().replace(*value, **metadata)


@dataclasses.dataclass(frozen=True, slots=True)
class LayerType:
    """Where a Flax layer keeps its product: attribute, what Flax puts there by default, and the site that it is.
    view: the class of the quantized layer, where its own has no place for a product."""

    attribute: str
    default: Any
    site: Callable[[Any, str], Site]
    view: type | None = None


def _linear(layer: nnx.Linear, path: str) -> Site:
    return Site(path, "dot_general", (layer.in_features, layer.out_features), (0,))


def _linear_general(layer: nnx.LinearGeneral, path: str) -> Site:
    batch = tuple(layer.batch_axis.values())
    shape = (*batch, *layer.in_features, *layer.out_features)
    return Site(path, "dot_general", shape, tuple(range(len(batch), len(batch) + len(layer.in_features))))


def _einsum(layer: nnx.Einsum, path: str) -> Site:
    shape, spec = tuple(layer.kernel_shape), layer.einsum_str
    return Site(path, "einsum", shape, einsum_contraction(spec, shape), spec)


def _conv(layer: nnx.Conv, path: str) -> Site:
    shape = tuple(layer.kernel_shape)
    return Site(path, "conv_general_dilated", shape, tuple(range(len(shape) - 1)))


def _embed(layer: nnx.Embed, path: str) -> Site:
    return table_site(path, layer.num_embeddings, layer.features)


LAYERS: dict[type, LayerType] = {
    nnx.Linear: LayerType("dot_general", lax.dot_general, _linear),
    nnx.LinearGeneral: LayerType("dot_general", None, _linear_general),
    nnx.Einsum: LayerType("einsum_op", jnp.einsum, _einsum),
    nnx.Conv: LayerType("conv_general_dilated", lax.conv_general_dilated, _conv),
    nnx.Embed: LayerType("product", None, _embed, QuantizedEmbed),
}


def attribute_of(layer: Any) -> str:
    """Where a layer, known to be one, keeps its product."""
    found = layer_type(layer)
    assert found is not None
    return found[1].attribute


def weight_of(layer: Any) -> nnx.Variable:
    """The parameter that enters the product of a layer, known to be one."""
    return getattr(layer, weight_name(layer))


def weight_name(layer: Any) -> str:
    return "embedding" if isinstance(layer, nnx.Embed) else "kernel"


def layer_type(module: Any) -> tuple[type, LayerType] | None:
    return next(((base, LAYERS[base]) for base in type(module).__mro__ if base in LAYERS), None)


class StatefulProduct(nnx.Module):
    """A `Product` with what its recipe must keep: learned scales (parameters) and a stream of random keys."""

    def __init__(self, product: Product, scales: dict[str, Array], rngs: nnx.RngStream | None):
        self.product = product
        for side, value in scales.items():
            setattr(self, f"{side}_scale", Scale(value))
        if rngs is not None:
            self.rngs = rngs

        self.calibrating = ""  # sides to fit in each call, a word each, which NNX keeps out of the state
        self.path = ""  # of the layer, while it is calibrated

    @property
    def __call__(self) -> Callable[..., Array]:
        return self._compute  # of a method nnx.tabulate prints the arguments, and trips over a packed weight

    def _compute(self, *args: Any, **kwargs: Any) -> Array:
        sides = [s for s in ("lhs", "rhs") if hasattr(self, f"{s}_scale")]
        scales = {side: self._scale(side, args) for side in sides}
        key = self.rngs() if hasattr(self, "rngs") else None
        return self.product.compute(args, kwargs, key=key, scales=scales or None)

    def _scale(self, side: str, args: tuple) -> Array:
        """The scale of a side, "lhs" or "rhs"; while it is calibrated, the one that the operand fits."""
        held: Scale = vars(self)[f"{side}_scale"]
        if side not in self.calibrating.split():
            return held.get_value()
        lhs, rhs = [a for a in args if not isinstance(a, str)][:2]
        start, calls, _, _, index = jnp.moveaxis(held.get_value(), -1, 0)
        arrived = lax.stop_gradient(lhs if side == "lhs" else rhs)
        fitted = fitted_scale(side, arrived, self.product.recipe, self.product.site, jnp.zeros_like(start))
        ran(f"{self.path}/{side}", start.size, jnp.stack([index.ravel()[0], calls.ravel()[0]]))
        zero, one = jnp.zeros_like(start), jnp.ones_like(start)
        for part in ([zero, one, zero, zero, zero], [zero, zero, jnp.sign(fitted), fitted, zero]):
            add_to(held, jnp.stack(part, axis=-1), "lb.calibrate", self.path)
        return jnp.where(fitted == 0, start, fitted)

    def start_calibration(self, side: str, path: str) -> None:
        """Fits the scale of a side in each call from now on. Its variable, which loops hand on with the layer, holds
        five numbers: the scale from before, of the calls their number, that of the fits (an operand of zeros fits
        none) and their sum, and which scale of a stack it is."""
        held: Scale = vars(self)[f"{side}_scale"]
        start = held.get_value().astype(jnp.float32)
        index = jnp.arange(start.size, dtype=jnp.float32).reshape(start.shape)
        held.set_value(jnp.stack([start, *[jnp.zeros_like(start)] * 3, index], axis=-1))
        self.calibrating, self.path = f"{self.calibrating} {side}", path

    def calibrated(self, side: str) -> tuple[Array, Array, Array]:
        """The mean of what the calls fitted, NaN where there was none; the numbers of calls and of fits, for each
        scale."""
        start, calls, fits, total, _ = jnp.moveaxis(vars(self)[f"{side}_scale"].get_value(), -1, 0)
        mean = jnp.where(fits == 0, start, total / jnp.maximum(fits, 1))
        return jnp.where(calls == 0, jnp.nan, mean), calls, fits


def hook(module: Any) -> Product | None:
    """The product that `quantize` put into a layer, or None."""
    found = layer_type(module)
    held = getattr(module, found[1].attribute, None) if found else None
    held = held.product if isinstance(held, StatefulProduct) else held
    return held if isinstance(held, Product) else None


def quantize(module: nnx.Module, policy: Policy, rngs: nnx.Rngs | nnx.RngStream | None, who: str) -> nnx.Module:
    """The quantized view; see `lb.quantize`."""
    found = modules(module)
    assigned = assign(policy, [describe(m, paths) for m, paths in found], who)
    products = {}
    for layer, paths in found:
        if paths[0] in assigned:
            product = _product(layer, paths[0], assigned[paths[0]], who)
            if product.recipe.needs_key and rngs is None:
                raise ValueError(
                    f"{who}: the recipe of {called(paths[0], type(layer))} rounds or rotates at random, which takes"
                    " keys. Pass"
                    " rngs=nnx.Rngs(quantize=0); each layer then owns a stream of keys."
                )
            products |= dict.fromkeys(paths, product)
    for owner, paths in found:
        inside = {product.site.weight for inner, product in products.items() if _within(inner, paths)}
        if layer_type(owner) is None and inside:
            check_owner(type(owner), inside, f"{who}: {called(paths[0], type(owner))}")
    _check_callables(found, products, who)
    if rngs is not None and not any(product.recipe.needs_key for product in products.values()):
        raise ValueError(
            f"{who} got rngs, but no recipe here rounds stochastically or draws signs, so nothing would take a key."
            " Drop the argument."
        )

    def change(layer: Any, product: Product) -> None:
        found = layer_type(layer)
        assert found is not None
        if (view := found[1].view) is not None:
            layer.__class__ = view
            layer.product = nnx.static(product)
            return
        attribute = attribute_of(layer)
        keep = KeepMaster(layer.promote_dtype)
        scales = initial_scales(product.recipe, product.site, layer.kernel.get_value())
        stream = _stream(rngs, layer, product) if rngs is not None and product.recipe.needs_key else None
        if scales or stream is not None:
            setattr(layer, attribute, nnx.data(StatefulProduct(product, scales, stream)))
        else:
            setattr(layer, attribute, nnx.static(product))
        layer.promote_dtype = keep

    return edited(module, products, change)


def _check_callables(found: list[tuple[nnx.Module, tuple[str, ...]]], products: dict[str, Any], who: str) -> None:
    """Raises ValueError for a callable kept in a module that carries along one that is, or holds, a layer to quantize:
    the view would keep the callable, and with it the original."""
    affected = {
        id(m): (m, paths) for m, paths in found if any(path in paths or _within(path, paths) for path in products)
    }
    for owner, owner_paths in found:
        for name, value in vars(owner).items():
            if (held := carried(value, affected)) is None:
                continue
            module, paths = affected[id(held)]
            raise ValueError(
                f"{who}: {called(owner_paths[0], type(owner))} keeps a callable, {name!r}, which carries"
                f" {called(paths[0], type(module))} along, and would go on computing with that in high precision. Make"
                " it a method, or build it where it is called."
            )


def _within(path: str, owners: tuple[str, ...]) -> bool:
    return any(owner == "" or path.startswith(f"{owner}/") for owner in owners)


def edited(module: nnx.Module, changes: dict[str, Any], change: Callable[[nnx.Module, Any], None]) -> nnx.Module:
    """A view of `module`, same Variables, in which `change(layer, changes[path])` was applied to each layer named."""

    def visit(path: tuple, node: Any) -> Any:
        name = "/".join(map(str, path))
        if isinstance(node, nnx.Module) and name in changes:
            change(node, changes[name])
        return node

    return nnx.recursive_map(visit, module, graph=True)


def modules(module: nnx.Module) -> list[tuple[nnx.Module, tuple[str, ...]]]:
    """Every module inside, each once, with all of its paths; hooks of ours are not modules of the model."""
    found: dict[int, tuple[nnx.Module, list[str]]] = {}
    for path, node in _walk(module, (), ()):
        found.setdefault(id(node), (node, []))[1].append("/".join(path))
    return [(node, tuple(paths)) for node, paths in found.values()]


def normed_layers(model: nnx.Module) -> dict[str, tuple[str, type]]:
    """First paths of the quantized layers whose weight a norm makes at every call, with path and class of the norm."""
    found = modules(model)
    norms = [(m, paths[0]) for m, paths in found if isinstance(m, nnx.WeightNorm | nnx.SpectralNorm)]
    inside = {id(layer): (path, type(norm)) for norm, path in norms for layer, _ in modules(norm.layer_instance)}
    return {paths[0]: inside[id(layer)] for layer, paths in found if id(layer) in inside and hook(layer) is not None}


def _walk(node: Any, path: tuple[str, ...], above: tuple[int, ...]) -> Iterator[tuple[tuple[str, ...], nnx.Module]]:
    if isinstance(node, nnx.Variable | nnx.Rngs | nnx.RngStream | StatefulProduct) or id(node) in above:
        return
    if isinstance(node, nnx.Module):
        yield path, node
    for part, child in _children(node):
        if not isinstance(child, jax.Array | np.ndarray) and not part[0].startswith("_pytree__"):
            yield from _walk(child, (*path, *part), (*above, id(node)))


def _children(node: Any) -> list[tuple[tuple[str, ...], Any]]:
    """What lies directly inside, by name; a module of a class with `pytree=False` is a leaf to JAX."""
    found = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if isinstance(node, nnx.Module) and [keys for keys, _ in found] == [()]:
        return sorted(((str(name),), child) for name, child in vars(node).items())
    name = lambda key: str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))))
    return [(tuple(map(name, keys)), child) for keys, child in found if keys]


_ELEMENTWISE = {"scale", "bias"}  # parameters by these names, and vectors, enter no product


def describe(module: nnx.Module, paths: tuple[str, ...]) -> Node:
    """The module as the rules see it."""
    kind = type(module).__name__
    if layer_type(module) is not None:
        return Node(paths, kind, layer=True, by_name=isinstance(module, nnx.Embed))
    if way := way_inside(module):
        return Node(paths, kind, bridge=way)
    own = {name: value for name, value in vars(module).items() if isinstance(value, nnx.Param)}
    opaque = [name for name, p in own.items() if name not in _ELEMENTWISE and np.ndim(p.get_value()) > 1]
    return Node(paths, kind, opaque=tuple(opaque), own_code=not type(module).__module__.startswith("flax."))


def _product(layer: Any, path: str, recipe: LinearRecipe, who: str) -> Product:
    """Checks that the layer's product can be taken over, whole; raises with its path otherwise."""
    found = layer_type(layer)
    assert found is not None
    base, kind = found
    where = f"{who}: {called(path, type(layer))}"
    if hook(layer) is not None or isinstance(weight_of(layer), PackedWeight):
        raise ValueError(
            f"{where} is quantized already. Quantize the original model, or leave this layer out by a rule."
        )
    taken = [a for a in (kind.attribute, "dot_general_cls") if getattr(layer, a, None) not in (None, kind.default)]
    if taken:
        raise ValueError(
            f"{where} has a {taken[0]} of its own, which quantizing would drop. Build it without, or leave it out."
        )
    if layer.promote_dtype is not promote_dtype:
        raise ValueError(
            f"{where} has a promote_dtype of its own, which quantizing would bypass. Leave it out by a rule."
        )
    check_subclass(layer, base, where)
    if getattr(layer, "mask", None) is not None:
        raise NotImplementedError(
            f"{where} has a mask. Quantized weights do not keep its zeros (a rotation mixes them, mid-rise grids"
            " have no zero)."
            " Leave the layer out by a rule."
        )
    if base is nnx.Einsum and layer.einsum_str is None:
        raise ValueError(f"{where} gets its einsum_str in the call. Give it when you build the layer.")
    if base is nnx.Embed:
        check_recipe(recipe, where)
        if type(layer) is not nnx.Embed:
            raise NotImplementedError(
                f"{where} is of a class of its own, which its quantized form would drop. Leave it out by a rule."
            )
    site = kind.site(layer, path)
    check_site(site, recipe, weight_of(layer).get_value(), where)
    check_stacked(layer, site, where)
    return Product(recipe, site)


def check_stacked(layer: Any, site: Site, where: str) -> None:
    """Raises ValueError, as told by `where`, for layers stacked on another axis than 0, as far as shapes show it: the
    bias tells the axes of square kernels apart."""
    kernel = weight_of(layer).get_value()
    check_stack(tuple(kernel.shape), site.shape, where)
    bias = getattr(layer, "bias", None)
    shape = () if bias is None else bias.get_value().shape
    own = tuple(size for axis, size in enumerate(site.shape) if axis not in site.contract)
    if site.kind != "einsum" and len(shape) - len(own) == len(kernel.shape) - len(site.shape):
        check_stack(shape, own, where, "bias")


def _stream(rngs: nnx.Rngs | nnx.RngStream, layer: Any, product: Product) -> nnx.RngStream:
    """A stream for this layer; one for each of a stack."""
    try:
        source = rngs.quantize if isinstance(rngs, nnx.Rngs) else rngs
    except AttributeError as error:
        raise ValueError(
            f"lb.quantize(rngs=): these Rngs have no stream 'quantize' and no default ({error})."
            " Pass nnx.Rngs(quantize=0)."
        ) from error
    stack = layer.kernel.get_value().shape[: layer.kernel.get_value().ndim - len(product.site.shape)]
    own = source.fork()
    return own.split(stack) if stack else own
