"""Packed weights in `flax.serialization`: `to_bytes`, `from_bytes`, and the state dicts beneath them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from lowbit_jax.ops.plane_tensor import PlaneTensor
from lowbit_jax.qtensor import NO_SEAL, QTensor

_HOLDS = "holds"


def _arrays(packed: QTensor) -> list[str]:
    """Names of the fields that are arrays of a file. The seal is none: the meaning is there in words."""
    absent = {"seal"} if packed.quantizer.zero_point else {"seal", "zeros"}
    return [f.name for f in dataclasses.fields(packed) if not f.metadata.get("static") and f.name not in absent]


def _meaning(packed: QTensor) -> dict[str, str]:
    """What the arrays stand for, which they do not say themselves."""
    return {"shape": f"{jnp.dtype(packed.dtype).name}{list(packed.shape)}", **packed.meaning()}


def _to_state(packed: QTensor) -> dict[str, Any]:
    arrays = {name: serialization.to_state_dict(getattr(packed, name)) for name in _arrays(packed)}
    return {_HOLDS: _meaning(packed), **arrays}


def _from_state(template: QTensor, state: Any) -> QTensor:
    """Raises: ValueError where the file holds another kind of weight than the template, or arrays of other shapes."""
    who = f"flax.serialization: the packed weight at {serialization.current_path()!r}"
    if not isinstance(state, Mapping) or _HOLDS not in state:
        raise ValueError(f"{who}: the file holds no packed weight there. Restore it into the variables it was saved"
                         " from, and convert those.")  # fmt: skip
    told, meant = state[_HOLDS], _meaning(template)
    for name in {**meant, **told}:
        if (found := told.get(name)) != (wanted := meant.get(name)):
            raise ValueError(
                f"{who}: the file holds the {name} {found}, the template has {wanted}. Restore into what lb.convert"
                " makes of the same model, recipe and layout."
            )
    arrays = {
        name: serialization.from_state_dict(getattr(template, name), state[name], name=name)
        for name in _arrays(template)
    }
    shape = lambda leaf: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    for name, restored in arrays.items():
        found, wanted = (list(map(shape, jax.tree.leaves(a))) for a in (restored, getattr(template, name)))
        if found != wanted:
            raise ValueError(
                f"{who}: the file holds {name} of {', '.join(found) or 'nothing'}, the template has"
                f" {', '.join(wanted) or 'nothing'}. The file is damaged, or of another version."
            )
    seal = NO_SEAL if isinstance(template.seal, tuple) else np.zeros(template.seal.shape, np.uint8)
    return dataclasses.replace(template, **arrays, seal=seal)


for _kind in (QTensor, PlaneTensor):
    serialization.register_serialization_state(_kind, _to_state, _from_state, override=True)
