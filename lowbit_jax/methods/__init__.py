"""The literature as data: one function a method, each returns a `LinearRecipe`; here the names and their sources."""

import difflib
import inspect
from collections.abc import Callable

from lowbit_jax.methods.custom import block_scaled, mxfp4_backward, nf4, nvfp4, quartet, quartet2, tetrajet
from lowbit_jax.methods.floating_point import fp8
from lowbit_jax.methods.integer import absmax_integer, bitnet, jetfire, static_integer, switchback
from lowbit_jax.methods.qat import lsq, pact, straight_through
from lowbit_jax.methods.quest import quest, quest_quantizer
from lowbit_jax.ops.recipe import LinearRecipe

_REGISTRY: dict[str, Callable[..., LinearRecipe]] = {
    "quest": quest,
    "lsq": lsq,
    "pact": pact,
    "straight_through": straight_through,
    "absmax_integer": absmax_integer,
    "static_integer": static_integer,
    "bitnet": bitnet,
    "switchback": switchback,
    "jetfire": jetfire,
    "fp8": fp8,
    "block_scaled": block_scaled,
    "nvfp4": nvfp4,
    "quartet": quartet,
    "quartet2": quartet2,
    "tetrajet": tetrajet,
    "mxfp4_backward": mxfp4_backward,
    "nf4": nf4,
}


def names() -> tuple[str, ...]:
    """The methods of the catalogue."""
    return tuple(_REGISTRY)


def get(name: str, **options) -> LinearRecipe:
    """The recipe of a method by its name; `options` are the arguments of its function.

    Raises: ValueError for an unknown name (with near matches), TypeError for an unknown option."""
    method = _method("get", name)
    legal = inspect.signature(method).parameters
    if unknown := sorted(set(options) - set(legal)):
        known = f"Its options are {', '.join(legal)}." if legal else "It has no options."
        raise TypeError(f"lb.methods.get({name!r}): no option {', '.join(unknown)}. {known}")
    return method(**options)


def _method(who: str, name: str) -> Callable[..., LinearRecipe]:
    if name not in _REGISTRY:
        near = difflib.get_close_matches(str(name).lower(), _REGISTRY, n=3, cutoff=0.3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"lb.methods.{who}({name!r}): no such method.{hint} The methods are {', '.join(_REGISTRY)}.")
    return _REGISTRY[name]


def source(name: str) -> str:
    """Where a method comes from: what stands after `Source:` in its docstring. Raises: ValueError as `get`."""
    text = (inspect.getdoc(_method("source", name)) or "").partition("Source:")[2].partition("\n\n")[0]
    return " ".join(text.partition("Raises:")[0].split())


__all__ = [
    "absmax_integer",
    "bitnet",
    "block_scaled",
    "fp8",
    "get",
    "jetfire",
    "lsq",
    "mxfp4_backward",
    "names",
    "nf4",
    "nvfp4",
    "pact",
    "quartet",
    "quartet2",
    "quest",
    "quest_quantizer",
    "source",
    "static_integer",
    "straight_through",
    "switchback",
    "tetrajet",
]
