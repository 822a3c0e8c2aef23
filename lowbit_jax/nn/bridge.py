"""Flax's bridge (`flax.nnx.bridge`), a module of one API in a model of the other: `lb.quantize` does not enter it."""

import sys
from typing import Any

_WAYS = {
    "ToNNX": "bridge.ToNNX(lb.quantize(linen_module, recipe), rngs=rngs)",
    "ToLinen": "bridge.ToLinen(lambda rngs: lb.quantize(Model(rngs=rngs), recipe))",
}


def way_inside(module: Any) -> str:
    """How to quantize what a bridge holds, as code; empty for any other module."""
    library = sys.modules.get("flax.nnx.bridge")
    kinds = {} if library is None else {name: getattr(library, name, None) for name in _WAYS}
    return next((_WAYS[name] for name, kind in kinds.items() if kind is not None and isinstance(module, kind)), "")


def quantized_inside(module: Any) -> bool:
    """Whether a `ToNNX` holds a Linen module that was quantized."""
    return hasattr(type(vars(module).get("to_nnx__module")), "_lowbit")
