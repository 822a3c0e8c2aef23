"""Linen: the same module, whose layers compute quantized products while any of its methods runs.

Submodules made in a compact method exist only while it runs, so nothing can be exchanged beforehand. The quantized
module is of a subclass of its class, by the same name and with the same fields, whose methods run under a
`flax.linen.intercept_methods` of their own; submodules made in `setup` become such subclasses too, so that they can be
called directly. Within the module a layer keeps its parameters and its own `__call__`: only its `dot_general` (or the
like) and `promote_dtype` are others for the length of the call. Nothing outside the module is touched.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import linen

from lowbit_jax.nn.bridge import way_inside
from lowbit_jax.nn.check import check_owner, check_subclass
from lowbit_jax.nn.linen_layers import (
    adopt_packed_table,
    layer_base,
    own_call,
    quantized_call,
    quantized_embed,
    uses_weight,
)
from lowbit_jax.nn.policy import Node, Policy, bridges_told, check_rule, parents, unmatched
from lowbit_jax.nn.site import called, naming
from lowbit_jax.ops import LinearRecipe

WHO = "lb.quantize"


@dataclasses.dataclass(frozen=True, slots=True)
class Quantization:
    """What a quantized class carries. `form` "ready": weights come rotated and quantized (`lb.nn.prepare`)."""

    policy: Policy
    form: Literal["training", "ready"] = "training"

    def recipe(self, path: str, by_name: bool = False) -> LinearRecipe | None:
        recipe = self.policy.recipe(path, by_name)
        if recipe is None or self.form == "training" or not recipe.rhs_once:
            return recipe
        return recipe.with_rhs_ready()


@dataclasses.dataclass
class Run:
    """One outermost call of a quantized module: what was met on the way."""

    quantization: Quantization
    root: tuple[str, ...]
    nodes: dict[str, Node] = dataclasses.field(default_factory=dict)
    entered: dict[str, type] = dataclasses.field(default_factory=dict)
    norms: int = 0  # norms of weights that it is within

    def bridged(self, path: str) -> bool:
        """Whether the path lies in a bridge to NNX."""
        return any(p in self.nodes and self.nodes[p].bridge for p in parents(path))

    def path(self, module: linen.Module) -> str | None:
        """Path below the quantized module; None for a module that was passed in from outside."""
        full = path_of(module)
        return "/".join(full[len(self.root) :]) if full[: len(self.root)] == self.root else None


def path_of(module: Any) -> tuple[str, ...]:
    return module.scope.path


class _Active(threading.local):
    def __init__(self):
        self.runs: list[Run] = []
        self.watchers: list[Callable[..., None]] = []
        self.kept: list[list[Run]] = []
        self.token = 0


_active = _Active()
_trace_key = jax.make_user_context(None)  # makes what nn.jit keeps of a quantized trace apart from the unquantized
_reached: set[tuple[type, Quantization]] = set()  # classes whose __call__ was seen to arrive at the layer's own


def quantize(module: linen.Module, policy: Policy, who: str = WHO) -> linen.Module:
    """The quantized module; see `lb.quantize`."""
    if quantization(module) is not None:
        raise ValueError(f"{who}: this {type(module).__name__} is quantized already. Quantize the original module.")
    if way_inside(module):
        raise ValueError(f"{who} found no layer that it can quantize.{bridges_told([_node(module, '')])}")
    return with_quantization(module, Quantization(policy))


def with_quantization(module: linen.Module, chosen: Quantization) -> linen.Module:
    bound = module.scope is not None
    new = copy.copy(module) if bound else module.clone(parent=None)
    base = getattr(type(module), "_lowbit_base", type(module))
    object.__setattr__(new, "__class__", quantized_class(base, chosen, None))
    return new


def quantization_of(module: Any) -> Quantization:
    """Of a module that is known to be quantized."""
    return type(module)._lowbit


def quantization(module: Any) -> Quantization | None:
    return getattr(type(module), "_lowbit", None)


@functools.cache
def quantized_class(base: type, chosen: Quantization, root: tuple[str, ...] | None) -> type:
    """The subclass of `base` whose methods run quantized; one for the same arguments, so that modules compare equal.

    `root` is the path of the quantized module that a submodule belongs to; None for that module itself."""
    if not hasattr(linen.Module, "_call_wrapped_method"):
        raise NotImplementedError(
            "lb.quantize needs linen.Module._call_wrapped_method, which this version of Flax lacks."
        )

    def _call_wrapped_method(self, function, args, kwargs):
        with _running(self, root, function.__name__):
            return base._call_wrapped_method(self, function, args, kwargs)

    def setup(self):
        base.setup(self)
        _adopt(self, chosen, root)

    def __post_init__(self):
        base.__post_init__(self)
        _adopt(self, chosen, root)

    def __reduce__(self):
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init and f.name != "parent"}
        return _rebuild, (base, chosen, fields)

    members = dict(_call_wrapped_method=_call_wrapped_method, __reduce__=__reduce__)
    members |= {name: _lifted_method(base, name, root) for name in _lifted(base)}
    members |= {
        name: _applying(getattr(base, name), root) for name in ("apply", "init", "init_with_output", "lazy_init")
    }
    members = {name: linen.nowrap(member) for name, member in members.items()}
    members |= dict(setup=setup, __post_init__=__post_init__, _lowbit=chosen, _lowbit_base=base)
    members |= dict(__module__=base.__module__, __qualname__=base.__qualname__, __doc__=base.__doc__)
    return type(base.__name__, (base,), members)


def _lifted(base: type) -> list[str]:
    """Methods that nn.scan, nn.remat and the like made of a class: Flax lets them bypass `_call_wrapped_method`."""
    is_lifted = lambda f: (
        hasattr(f, "method_handler_wrapped") and hasattr(getattr(f, "__wrapped__", None), "method_handler_wrapped")
    )
    return [name for name in dir(base) if is_lifted(inspect.getattr_static(base, name, None))]


def _lifted_method(base: type, name: str, root: tuple[str, ...] | None) -> Callable:
    lifted = getattr(base, name)

    @functools.wraps(lifted)
    def method(self, *args, **kwargs):
        with _running(self, root, name):
            return lifted(self, *args, **kwargs)

    return method


def _applying(verb: Callable, root: tuple[str, ...] | None) -> Callable:
    """`apply` and its kin: a function given as `method=` runs quantized, a lifted one too, which bypasses the class."""

    @functools.wraps(verb)
    def run(self, *args, method=None, **kwargs):
        return verb(self, *args, method=_quantized_method(method, root) if callable(method) else method, **kwargs)

    return run


def _quantized_method(method: Callable, root: tuple[str, ...] | None) -> Callable:
    method = getattr(method, "__func__", method)

    @functools.wraps(method)
    def run(module, *args, **kwargs):
        if quantization(module) is None:
            return method(module, *args, **kwargs)
        with _running(module, root, getattr(method, "__name__", "method")):
            return method(module, *args, **kwargs)

    return run


def _rebuild(base: type, chosen: Quantization, fields: dict[str, Any]) -> linen.Module:
    return quantized_class(base, chosen, None)(**fields)


def _adopt(module: linen.Module, chosen: Quantization, root: tuple[str, ...] | None) -> None:
    """Turns the submodules of `setup` and of fields into quantized ones, so that calls from outside are quantized."""
    if module.scope is None:
        return
    root = module.scope.path if root is None else root
    pending = [value for name, value in vars(module).items() if name not in ("parent", "_parent_ref", "_state")]
    while pending:
        value = pending.pop()
        if isinstance(value, linen.Module):
            inside = value.scope is not None and value.scope.path[: len(root)] == root and value is not module
            if inside and quantization(value) is None:
                object.__setattr__(value, "__class__", quantized_class(type(value), chosen, root))
                _adopt(value, chosen, root)
        elif isinstance(value, Mapping):
            pending += list(value.values())
        elif isinstance(value, tuple | list):
            pending += list(value)


@contextlib.contextmanager
def _running(module: linen.Module, root: tuple[str, ...] | None, method: str) -> Iterator[None]:
    """Quantizes what runs meanwhile, unless a method further out does already; then checks the rules."""
    chosen = quantization_of(module)
    checked = root is None and method != "setup" and type(module.scope).__name__ != "TestScope"  # Flax's own dry run
    if module.scope is None:  # Flax explains what to do
        yield
        return
    root = module.scope.path if root is None else root
    top = _active.runs[-1] if _active.runs else None
    if top is not None and top.quantization == chosen and top.root == root:
        yield
        return
    if top is not None and top.quantization.recipe(top.path(module) or "") is not None:
        raise ValueError(
            f"{WHO}: {'/'.join(module.scope.path)!r} was quantized before it was put into a model that is quantized"
            " as a whole."
            " Put in the original module, or leave its path out by a rule of the outer call."
        )
    run = Run(chosen, root)
    _active.runs.append(run)
    try:
        token = _active.token if _active.watchers else None  # a watcher sees no product that nn.jit kept
        with linen.intercept_methods(functools.partial(_intercept, run)), _trace_key((chosen, token)):
            yield
        if checked:
            _check(run, module)
    except (ValueError, AssertionError) as error:
        if learned := _without_axis(error, run):
            raise ValueError(
                f"{WHO}: {called(learned, run.nodes[learned].kind)} learns scales, of one entry a layer, which have no"
                " place in a stack on another axis than 0. Stack it by variable_axes={'params': 0}, or give it a method"
                " that reads its scales off the data, such as lb.quest(4)."
            ) from error
        raise
    finally:
        _active.runs.pop()
        for kept in _active.kept:
            kept.append(run)


def _without_axis(error: Exception, run: Run) -> str:
    """The last layer met that learns scales, where nn.vmap or nn.scan found no such axis in a parameter; else empty."""
    frames = [f.filename.replace("\\", "/") for f in traceback.extract_tb(error.__traceback__)]
    raised_in = next((name for name in reversed(frames) if "/jax/" not in name and "/numpy/" not in name), "")
    if "/flax/core/" not in raised_in or str(error) and "is out of bounds for array of dimension" not in str(error):
        return ""
    recipes = {path: run.quantization.recipe(path, node.by_name) for path, node in run.nodes.items() if node.layer}
    return next((path for path, recipe in reversed(recipes.items()) if recipe is not None and recipe.learned), "")


def _intercept(run: Run, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    module, path = context.module, run.path(context.module)
    if _active.runs[-1] is not run or path is None:
        return call(*args, **kwargs)
    if context.method_name == "setup":
        return None if adopt_packed_table(module) else call(*args, **kwargs)
    base, method = layer_base(module), context.method_name
    if base is None or not uses_weight(base, method):
        norm = isinstance(module, linen.WeightNorm | linen.SpectralNorm)
        run.norms += norm
        try:
            result = call(*args, **kwargs)
        finally:
            run.norms -= norm
        if path not in run.nodes:
            run.nodes[path] = _node(module, path)
            inside = {
                "embedding" if node.by_name else "kernel"
                for p, node in run.nodes.items()
                if node.layer and (not path or p.startswith(f"{path}/")) and run.quantization.recipe(p, node.by_name)
            }
            if base is None and inside:
                check_owner(type(module), inside, f"{WHO}: {called(path, type(module))}")
        return result
    node = run.nodes[path] = _node(module, path)
    recipe = run.quantization.recipe(path, node.by_name)
    if recipe is None:
        return call(*args, **kwargs)
    check_subclass(module, base, f"{WHO}: {called(path, type(module))}")
    if context.orig_method.func is not own_call(base, method):
        # A subclass or a lifted class: the layer's own call comes through here later.
        run.entered.setdefault(path, type(module))
        return call(*args, **kwargs)
    if path in run.entered:
        _reached.add((run.entered.pop(path), run.quantization))
    with naming(path):
        if base is linen.Embed:
            bound = inspect.signature(own_call(base, method)).bind(module, *args, **kwargs)
            return quantized_embed(module, path, recipe, method, list(bound.arguments.values())[1], _active.watchers)
        return quantized_call(module, base, path, recipe, call, args, kwargs, _active.watchers)


_ELEMENTWISE = {"scale", "bias"}  # parameters by these names, and vectors, enter no product


def _node(module: Any, path: str) -> Node:
    """The module as the rules see it."""
    kind, way = type(module), way_inside(module)
    if way or layer_base(module) is not None:
        return Node((path,), kind.__name__, layer=not way, by_name=layer_base(module) is linen.Embed, bridge=way)
    own_code = not kind.__module__.startswith("flax.")
    return Node((path,), kind.__name__, opaque=_opaque(module), own_code=own_code)


def _opaque(module: Any) -> tuple[str, ...]:
    """Names of its own parameters that enter products, where it is no layer."""
    own = module.variables.get("params", {})
    return tuple(
        name
        for name, value in own.items()
        if not isinstance(value, Mapping) and name not in _ELEMENTWISE and np.ndim(linen.meta.unbox(value)) > 1
    )


def _check(run: Run, module: linen.Module) -> None:
    """The rules against what the trace met and what the parameters name."""
    missing = {p: t for p, t in run.entered.items() if (t, run.quantization) not in _reached}
    if missing:
        path, kind = next(iter(missing.items()))
        raise ValueError(
            f"{WHO}: {called(path, kind)} never called {layer_base_of(kind).__name__}.__call__, so"
            " its product"
            " stayed in high precision. Let it call super().__call__, or leave it out by a rule."
        )
    policy = run.quantization.policy
    unseen = {p for p in _module_paths(module.variables.get("params", {})) - set(run.nodes) if not run.bridged(p)}
    nodes = list(run.nodes.values())
    everything = [*nodes, *(Node((p,), "module") for p in sorted(unseen))]
    taken: dict[int, int] = {}
    for node in nodes:
        if node.layer and (index := policy.deciding(node.paths[0], node.by_name)) is not None:
            taken[index] = taken.get(index, 0) + 1
    for index, (pattern, _) in enumerate(policy.rules):
        if not any(policy.names(index, node.paths[0]) for node in everything):
            raise ValueError(unmatched(pattern, [node.paths[0] for node in everything], WHO))
        if not any(policy.deciding(path) == index for path in unseen):
            check_rule(policy, index, nodes, taken.get(index, 0), WHO)
    told = module.is_initializing() or bool(module.variables.get("params"))  # or a method that needs no parameters
    if told and not unseen and not any(n.layer and policy.recipe(n.paths[0], n.by_name) for n in nodes):
        raise ValueError(
            f"{WHO}: this {type(module).__name__} has no layer left to quantize. It quantizes Dense, DenseGeneral,"
            " Einsum, Conv, Embed where a rule names it, and the models and attention made of them; in code of your own"
            f" call lb.dot_general.{bridges_told(nodes)}"
        )


def under_norm() -> bool:
    """Whether what runs gets its weight from a linen.WeightNorm or SpectralNorm."""
    return any(run.norms for run in _active.runs)


def layer_base_of(kind: type) -> type:
    return next(b for b in kind.__mro__ if layer_base(b) is b)


def _module_paths(tree: Any, path: tuple[str, ...] = ()) -> set[str]:
    """Paths of the modules that own or hold parameters."""
    if not isinstance(tree, Mapping):
        return set()
    inside = {p for name, value in tree.items() for p in _module_paths(value, (*path, str(name)))}
    return inside | {"/".join(path)}


@contextlib.contextmanager
def watching(watcher: Callable[..., None], runs: list[Run] | None = None) -> Iterator[None]:
    """Calls `watcher(site, recipe, layer)` for each quantized product traced meanwhile; `runs` collects the runs."""
    kept: list[Run] = [] if runs is None else runs
    _active.watchers.append(watcher)
    _active.kept.append(kept)
    _active.token += 1
    try:
        yield
    finally:
        _active.watchers.remove(watcher)
        _active.kept = [k for k in _active.kept if k is not kept]
