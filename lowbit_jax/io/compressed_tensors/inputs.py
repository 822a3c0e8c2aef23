"""What the configuration says of a layer's activations, which readers quantize at each call."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from lowbit_jax.formats.base import IntFormat
from lowbit_jax.formats.catalogue import E2M1, E2M3, E4M3, element_format
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import CastScale, Group, PerRow, PerTensor, PowerOfTwo, absmax, absmax_edge


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """arguments: of the configuration. scale: the one number of a static scale, held in the file."""

    arguments: dict[str, Any]
    scale: np.ndarray | None = None


def by_name(
    quantizers: Any, scales: Mapping[str, Array | np.ndarray] | None, layers: Mapping[str, Any], who: str
) -> dict[str, Inputs]:
    """Of the layers whose activations are quantized.

    Raises: ValueError for names that are no layers, and for scales that are missing, to no purpose, or no positive
    number; NotImplementedError for a fit that readers do not make."""
    found = quantizers if isinstance(quantizers, Mapping) else dict.fromkeys(layers, quantizers)
    scales = scales or {}
    if unknown := sorted((set(found) | set(scales)) - set(layers)):
        raise ValueError(f"{who}(inputs=): {unknown[0]!r} is none of the packed layers {sorted(layers)[:3]}...")
    inputs = {
        name: _of(name, quantizer, scales.get(name), who) for name, quantizer in found.items() if quantizer is not None
    }
    if spare := sorted(set(scales) - {name for name, own in inputs.items() if own.scale is not None}):
        raise ValueError(
            f"{who}(input_scales=): the activations of {spare[0]} have no scale of their own. Leave it out."
        )
    return inputs


def _of(name: str, quantizer: Quantizer, scale: Any, who: str) -> Inputs:
    fmt, tiling, scales = quantizer.format, quantizer.tiling, quantizer.scale_format
    arguments: dict[str, Any] = {"dynamic": True, "symmetric": not quantizer.zero_point, "num_bits": fmt.bits}
    bare = quantizer.rotation is None and quantizer.sparsity is None
    fitted = bare and quantizer.fit in (absmax, absmax_edge)
    whole = isinstance(fmt, IntFormat) and fmt == element_format(f"int{fmt.bits}") and fmt.bits > 1
    plain = isinstance(scales, CastScale) and (whole or fmt == E4M3)
    arguments |= {"type": "int" if whole else "float"}
    match tiling:
        case PerTensor() if bare and plain and quantizer.learned:
            return Inputs(arguments | {"strategy": "tensor", "dynamic": False}, _static(name, scale, who))
        case _ if fitted and whole and fmt.bits < 8 and not quantizer.zero_point:
            raise NotImplementedError(
                f"{who}: the activations of {name} are {fmt.name} by absmax, which readers of these files scale and"
                f" round otherwise: they put the largest magnitude on {2 ** (fmt.bits - 1) - 0.5}, half way between"
                " two levels. Use zero points or a static scale for activations below 8 bits, or give no inputs"
                " (recipes.export: --activations float)."
            )
        case PerRow() if fitted and plain:
            return Inputs(arguments | {"strategy": "token"})
        case PerTensor() if fitted and plain:
            return Inputs(arguments | {"strategy": "tensor"})
        case Group() if fitted and plain and not quantizer.zero_point:
            return Inputs(arguments | {"strategy": "group", "group_size": tiling.size})
        case Group(32) if fitted and fmt in (E2M1, E2M3, E4M3) and isinstance(scales, PowerOfTwo) and scales.times == 1:
            return Inputs(arguments | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"})
    raise NotImplementedError(
        f"{who}: the activations of {name} are {fmt.name} by {tiling.describe()}, a fit that readers of these"
        " files do not make: they know absmax of int8 and FP8 by token, tensor or group, of fewer bits with zero"
        " points, static scales of a tensor, and MX formats. Give no inputs (recipes.export: --activations float) for"
        " weights alone: the model then computes with activations in high precision, and answers otherwise than it was"
        " trained."
    )


def _static(name: str, scale: Any, who: str) -> np.ndarray:
    if scale is None:
        raise ValueError(
            f"{who}: the activations of {name} have a scale that the layer holds. Give it by"
            " input_scales={name: scale}, of an NNX layer its dot_general.lhs_scale."
        )
    held = np.abs(np.asarray(scale, np.float32)).reshape(-1)
    if held.shape != (1,) or not np.isfinite(held).all() or not held.all():
        raise ValueError(f"{who}: the scale of the activations of {name} is {scale}; it is one finite number, not 0.")
    return held
