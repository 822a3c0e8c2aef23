"""Linen: the quantized products of one call. How a weight is used is known only where the model is traced."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen
from flax.core import FrozenDict, freeze

from lowbit_jax.nn.linen import Run, quantization, quantization_of, under_norm, watching
from lowbit_jax.nn.linen_layers import Calibration, calibrating
from lowbit_jax.nn.linen_origin import Origin, mark, of_slices, origins
from lowbit_jax.nn.policy import Node, parents
from lowbit_jax.nn.site import Site, called, check_stack
from lowbit_jax.ops import LinearRecipe
from lowbit_jax.qtensor import QTensor

Sites = dict[str, tuple[Site, LinearRecipe]]


@dataclasses.dataclass
class Traced:
    """What one call of a quantized model meets: its quantized products by path, the axes that each use of a weight
    sums over, those whose weight a norm makes at every call, every module, and where each weight, by its path, and each
    learned scale, by its path and name, come from (`int`: the number of a leaf of the variables)."""

    sites: Sites = dataclasses.field(default_factory=dict)
    contracts: dict[str, set[tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    normed: set[str] = dataclasses.field(default_factory=set)
    nodes: dict[str, Node] = dataclasses.field(default_factory=dict)
    origins: dict[str, set[Origin]] = dataclasses.field(default_factory=dict)


def packable_sites(model: Any, variables: Any, args: tuple, kwargs: Mapping[str, Any], who: str) -> Sites:
    """The quantized products of one call, by path, whose weights can be kept in another form."""
    traced = checked_trace(model, variables, args, kwargs, who)
    if normed := [name for name in _names(variables) if "/kernel/" in f"/{name}"] or sorted(traced.normed):
        raise ValueError(
            f"{who}: {normed[0]!r} belongs to a weight that a norm (linen.WeightNorm, SpectralNorm) makes at each call:"
            " there is nothing to keep. Leave its layer out by a rule, or fold the norm into it first."
        )
    numbers = numbered(variables)
    for path, (site, recipe) in traced.sites.items():
        where = f"{who}: {called(path, traced.nodes[path].kind)}"
        check_stack(linen.meta.unbox(inside(variables["params"], path)[site.weight]).shape, site.shape, where)
        if recipe.out.rhs is None:
            continue
        if len(used := traced.contracts[path]) > 1:
            raise ValueError(
                f"{where} is called with products that sum over different axes of its weight"
                f" ({' and '.join(map(str, sorted(used)))}), and codes are kept along one choice of them. Leave it out"
                " by a rule, or give each product a layer of its own."
            )
        arrived = {of_slices(origin, len(site.shape)) for origin in traced.origins.get(path, set())}
        for origin in arrived - {*jax.tree.leaves(inside(numbers, path)[site.weight])}:
            raise ValueError(
                f"{where} does not receive its weight as it is stored: what arrives {told(origin)}, as under"
                " nn.map_variables, or where layers are stacked on another axis than 0. The stored weight cannot be"
                " kept in another form then. Leave the layer out by a rule, or store the weight as the layer uses it."
            )
    return traced.sites


def numbered(variables: Any) -> Any:
    """The numbers of the leaves in the place of the parameters."""
    leaves, tree = jax.tree.flatten(variables)
    return tree.unflatten(range(len(leaves)))["params"]


def told(origin: int | str) -> str:
    """Of what does not arrive as it is stored."""
    return "is another parameter" if isinstance(origin, int) else f"is made by `{origin}` in the call"


def checked_trace(model: Any, variables: Any, args: tuple, kwargs: Mapping[str, Any], who: str) -> Traced:
    """Traces the call. Raises: ValueError and TypeError, in the name of `who`, for a model that is not quantized or is
    prepared or packed, for what are no variables, without inputs, and when the call leaves quantized layers out."""
    if quantization(model) is None:
        raise ValueError(f"{who}: this {type(model).__name__} is not quantized. Call lb.quantize on it first.")
    if quantization_of(model).form != "training":
        raise ValueError(f"{who}: this {type(model).__name__} is prepared. Use the model that you prepared.")
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise TypeError(f"{who}(model, variables, *args): give the variables of model.init, with 'params' among them.")
    if isinstance(model, linen.Dense) and not args and "kernel" in variables["params"]:
        shape = np.shape(linen.meta.unbox(variables["params"]["kernel"]))
        args = (jax.ShapeDtypeStruct((1, shape[0]), model.param_dtype),)
    if not args and not kwargs:
        raise TypeError(
            f"{who}(model, variables, *args): a Linen model shows how it uses its weights only in a call. Pass the"
            " inputs of"
            " one, or jax.ShapeDtypeStruct of their shapes."
        )
    traced = trace(Call.of(model, args, kwargs), variables)
    for path, (site, _) in traced.sites.items():
        if isinstance(linen.meta.unbox(inside(variables["params"], path)[site.weight]), QTensor):
            raise ValueError(f"{who}: the layer {path!r} is packed already. Use the variables of the training form.")
    others = {path for path, node in traced.nodes.items() if not node.layer}  # such as ConvTranspose
    bridges = {path for path, node in traced.nodes.items() if node.bridge}
    known = traced.sites.keys() | others
    wanted = quantization_of(model).recipe
    holders = [(p, wanted(p)) for p in _holders(variables["params"], "kernel")]
    holders += [(p, wanted(p, by_name=True)) for p in _holders(variables["params"], "embedding")]
    unseen = [p for p, recipe in holders if p not in known and not bridges & {*parents(p)} and recipe is not None]
    if unseen:
        raise ValueError(
            f"{who}: this call does not reach {', '.join(map(repr, unseen[:4]))}. Pass inputs (and `method=`) that"
            " run the"
            " whole model, or leave these out by a rule."
        )
    return traced


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """`model.apply` as a function of variables and inputs; `inputs`: its arguments and keywords, without the keys.
    mutable: the collections that it may write, as Flax has them."""

    model: linen.Module
    inputs: tuple[tuple, dict[str, Any]]
    rngs: dict[str, Any]
    mutable: Any = True

    @classmethod
    def of(cls, model: linen.Module, args: tuple, kwargs: Mapping[str, Any]) -> "Call":
        options = dict(kwargs)
        rngs = {"params": jax.random.key(0)} | dict(options.pop("rngs", None) or {})
        return cls(model, (args, options), rngs)

    def __call__(self, variables: Any, inputs: tuple[tuple, dict[str, Any]]) -> Any:
        args, options = inputs
        return self.model.apply(variables, *args, rngs=self.rngs, mutable=self.mutable, **options)

    def init(self) -> Any:
        """Abstract variables, as `model.init` would make them."""
        make = lambda rngs, inputs: self.model.init(rngs, *inputs[0], **inputs[1])
        return abstract_call(make, self.rngs, self.inputs)


def trace(call: Call, variables: Any) -> Traced:
    """What the call meets, on shapes."""
    traced, runs = Traced(), list[Run]()

    def met(site: Site, recipe: LinearRecipe, layer: Any) -> None:
        traced.sites[site.path] = site, recipe
        traced.contracts.setdefault(site.path, set()).add(site.contract)
        if layer.has_variable("params", site.weight):
            stored = jax.tree.leaves(layer.get_variable("params", site.weight))
            if len(stored) == 1:
                mark(stored[0], site.path)
        for name in (f"{side}_scale" for side in recipe.learned):
            if layer.has_variable("params", name):
                mark(linen.meta.unbox(layer.get_variable("params", name)), f"{site.path}/{name}")
        if under_norm():
            traced.normed.add(site.path)

    with watching(met, runs), calibrating(Calibration()):
        traced.origins = origins(array_call(jax.make_jaxpr, call, variables, call.inputs))
    for run in runs:
        traced.nodes |= run.nodes
    return traced


def abstract_call(function: Callable[..., Any], variables: Any, inputs: Any) -> Any:
    """`function(variables, inputs)` on shapes."""
    return array_call(lambda f: functools.partial(jax.eval_shape, f), function, variables, inputs)


def array_call(transform: Callable[..., Any], function: Callable[..., Any], variables: Any, inputs: Any) -> Any:
    """`transform(function)(variables, inputs)`, where what is no array in `inputs` is not traced."""
    is_array = lambda a: hasattr(a, "shape") and hasattr(a, "dtype")
    leaves, tree = jax.tree.flatten(inputs)
    arrays = [a if is_array(a) else None for a in leaves]
    rebuild = lambda given: tree.unflatten([g if is_array(a) else a for g, a in zip(given, leaves, strict=True)])
    return transform(lambda v, given: function(v, rebuild(given)))(variables, arrays)


def _holders(tree: Any, weight: str, path: tuple[str, ...] = ()) -> list[str]:
    """Paths of the modules that own a parameter of this name."""
    if not isinstance(tree, Mapping):
        return []
    own = ["/".join(path)] if weight in tree and not isinstance(tree[weight], Mapping) else []
    return own + [p for name, value in tree.items() for p in _holders(value, weight, (*path, str(name)))]


def _names(tree: Any) -> list[str]:
    """The names of variables; a norm around a layer writes a path into one, such as Dense_0/kernel/scale."""
    if not isinstance(tree, Mapping):
        return []
    return [n for name, value in tree.items() for n in (_names(value) if isinstance(value, Mapping) else [str(name)])]


def inside(params: Any, path: str) -> Any:
    for part in path.split("/") if path else ():
        params = params[part]
    return params


def with_layers(variables: Any, sites: Sites, change: Callable[..., dict[str, Any]]) -> Any:
    """`variables` with `change(site, recipe, layer)` in place of the parameters of each layer in `sites`."""

    def visit(tree: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        new = {name: visit(value, (*path, name)) for name, value in tree.items()}
        found = sites.get("/".join(path))
        return new if found is None else change(*found, new)

    new = {name: visit(tree, ()) if name == "params" else tree for name, tree in variables.items()}
    return freeze(new) if isinstance(variables, FrozenDict) else new
