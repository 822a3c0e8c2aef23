"""Packed weights as arguments and results of functions that `jax.export` serializes.

The file of such a function holds the tree of its arguments, and with it what a packed weight has beside its arrays.
"""

import dataclasses
import importlib
import json
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import export

from lowbit_jax.ops.plane_tensor import PlaneTensor
from lowbit_jax.qtensor import QTensor


def static_to_bytes(kind: type[QTensor], values: tuple) -> bytes:
    """The static fields of a packed tensor, for `jax.export`: JSON, in which records and functions go by their names.

    Raises: TypeError for what has no name, as a lambda in the quantizer."""
    told = {name: _to_json(value) for name, value in zip(_static(kind), values, strict=True)}
    return json.dumps(told).encode()


def static_from_bytes(kind: type[QTensor], data: bytes) -> tuple:
    """Back from `static_to_bytes`; makes records of dataclasses alone, and imports nothing but this library.

    Raises: ValueError for names that are not known here."""
    told = json.loads(data)
    return tuple(_from_json(told[name]) for name in _static(kind))


def _static(kind: type[QTensor]) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.metadata.get("static")]


def _to_json(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is tuple:
        return [_to_json(v) for v in value]
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"record": _name_of(type(value)), "fields": fields}
    return {"name": _name_of(value)}


def _from_json(told: Any) -> Any:
    if isinstance(told, list):
        return tuple(map(_from_json, told))
    if not isinstance(told, dict):
        return told
    if "dtype" in told:
        return jnp.dtype(told["dtype"])
    if "name" in told:
        return _named(told["name"])
    kind = _named(told["record"])
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"jax.export: {told['record']} is no dataclass here. The file is of another version.")
    return kind(**{name: _from_json(value) for name, value in told["fields"].items()})


def _name_of(value: Any) -> str:
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module and name and _found(module, name) is value:
        return f"{module}:{name}"
    raise TypeError(
        f"jax.export: a packed weight's quantizer holds {value!r}, which no module has under its name, so no file can"
        " name it. Define it in a module, or export a function that closes over the packed weights."
    )


def _named(told: str) -> Any:
    module, _, name = told.partition(":")
    if module.partition(".")[0] == __name__.partition(".")[0]:
        importlib.import_module(module)
    if (value := _found(module, name)) is None:
        raise ValueError(f"jax.export: a packed weight of the file needs {name} of {module}. Import that module first.")
    return value


def _found(module: str, name: str) -> Any:
    found = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _register(kind: type[QTensor]) -> None:
    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"lowbit_jax.{kind.__name__}",
        serialize_auxdata=lambda values: static_to_bytes(kind, values),
        deserialize_auxdata=lambda data: static_from_bytes(kind, bytes(data)),
    )


for _kind in (QTensor, PlaneTensor):
    _register(_kind)
