"""Writing: which layout a packed weight goes to, and what the configuration says of it."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array

from lowbit_jax import coding, packing
from lowbit_jax.formats.base import FloatFormat
from lowbit_jax.formats.catalogue import E2M1, E2M3, E4M3
from lowbit_jax.io import tensors
from lowbit_jax.io.compressed_tensors.inputs import Inputs, by_name
from lowbit_jax.io.matrix import Integers, Matrix, Outputs, outputs_of, rounded_scales
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import Block, Group, PerTensor, PowerOfTwo, TwoLevel

CONFIG = "config.json"
Dtype = Literal["float32", "bfloat16", "float16"]
_WHO = "lb.io.compressed_tensors.save"
MX = {E2M1: "mxfp4-pack-quantized", E2M3: "mxfp6-pack-quantized", E4M3: "mxfp8-quantized"}


@dataclasses.dataclass(frozen=True, slots=True)
class _Module:
    """A layer as the files have it: its tensors by their own names, the format, and what the configuration says."""

    tensors: dict[str, np.ndarray]
    format: str
    weights: dict[str, Any]
    inputs: dict[str, Any] | None = None

    @property
    def scheme(self) -> dict[str, Any]:
        return {"format": self.format, "weights": self.weights, "input_activations": self.inputs}


def save(
    folder: str | os.PathLike,
    weights: Mapping[str, QTensor | Outputs | Array | np.ndarray],
    *,
    config: Mapping[str, Any] | None = None,
    inputs: Quantizer | Mapping[str, Quantizer | None] | None = None,
    input_scales: Mapping[str, Array | np.ndarray] | None = None,
    dtype: Dtype = "float32",
    round_scales: bool = False,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes packed layers and plain arrays to `folder`, which is made.

    weights: by module. A packed one is a layer, of which the reader makes x W^T; its axes beside the contraction are
    merged into outputs. A plain array is the parameter `weight` of its module, in the reader's layout (a `Linear`'s
    [outputs, inputs]), unless its name ends in `.weight` or `.bias` and so is a parameter's. config: the model's own
    (architecture, sizes). inputs: the quantizer of the activations, for all layers or by their names; readers know
    absmax of tokens, tensors and groups, and fit it anew at each call, or a learned scale of a tensor, which
    input_scales holds by name. None: activations stay in high precision.
    dtype: of the model: arrays are cast to it, and scales must be values of it, unless round_scales. texts: more files
    of the folder, as a tokenizer's.

    Raises: FileExistsError when there are weights already; NotImplementedError for a rotation (readers of these files
    do not turn activations), and for what the files have no place for; ValueError for scales that `dtype` would change,
    and as `QTensor.validate`; ImportError without the package safetensors."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{_WHO}(dtype={dtype!r}): it is 'float32', 'bfloat16' or 'float16'.")
    _check_kinds(weights, inputs)
    layers = {name: outputs_of(leaf) for name, leaf in weights.items() if isinstance(leaf, QTensor | Outputs)}
    if not layers:
        raise ValueError(f"{_WHO}: no weight is packed. Pack layers by lb.convert, or write plain safetensors.")
    scales, told = _Scales(dtype, round_scales), by_name(inputs, input_scales, layers, _WHO)
    modules = {name: _module(name, leaf, told.get(name), scales) for name, leaf in layers.items()}
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in weights.items():
        if name in modules:
            keys = {f"{name}.{local}": array for local, array in modules[name].tensors.items()}
        else:
            keys = {_parameter(name): tensors.cast(np.asarray(leaf), dtype, f"{_WHO}: {name}")}
        if twice := sorted(set(keys) & set(arrays)):
            raise ValueError(f"{_WHO}: there are two arrays for {twice[0]!r}. Name each module once.")
        arrays |= keys
    whole = dict(config or {}) | {"dtype": dtype, "quantization_config": _configuration(modules, set(weights))}
    try:
        files = dict(texts or {}) | {CONFIG: json.dumps(whole, indent=2)}
    except TypeError as error:
        raise TypeError(f"{_WHO}(config=): {error}. It holds what JSON has: texts, numbers, lists, dicts.") from error
    tensors.write(pathlib.Path(folder), arrays, files, _WHO)


def _parameter(name: str) -> str:
    """The parameter of a module that a plain array is."""
    return name if name.endswith((".weight", ".bias")) else f"{name}.weight"


def _check_kinds(weights: Any, inputs: Any) -> None:
    """Raises TypeError for what is no weight, no name and no quantizer."""
    for name, leaf in weights.items():
        if not isinstance(name, str) or not hasattr(leaf, "dtype") and not isinstance(leaf, Outputs):
            raise TypeError(
                f"{_WHO}: {name!r} goes with a {type(leaf).__name__}; weights are packed or arrays, by the name of"
                " their module."
            )
    for quantizer in inputs.values() if isinstance(inputs, Mapping) else [inputs]:
        if not isinstance(quantizer, Quantizer | None):
            raise TypeError(f"{_WHO}(inputs={quantizer!r}): give a Quantizer, such as recipe.out.lhs, or None.")


def _module(name: str, outputs: Outputs, inputs: Inputs | None, scales: "_Scales") -> _Module:
    quantizer = outputs.packed.quantizer
    if name.endswith((".weight", ".bias")):
        raise ValueError(f"{_WHO}: {name!r} is packed, and goes by the name of its module, without what follows it.")
    if quantizer.rotation is not None:
        raise NotImplementedError(
            f"{_WHO}: {name} is rotated ({quantizer.rotation.describe()}), and readers do not turn what comes in."
            " Train without the rotation (lb.quest(block=None)), or write packed.dequantize() as a plain array."
        )
    matrix = Matrix.of(name, outputs, _WHO)
    told = None if inputs is None else inputs.arguments
    form = _as_floats(matrix, scales) or _as_integers(matrix, told, scales)
    if form is None:
        raise NotImplementedError(
            f"{_WHO}: {name} is {quantizer.format.name} by {quantizer.tiling.describe()} with scales in"
            f" {quantizer.scale_format.describe()}, for which these files have no layout. They hold integers of up to 8"
            " bits, mid-rise grids of up to 7, FP8 (e4m3), MXFP8, MXFP6 (e2m3), MXFP4 and NVFP4; write"
            " packed.dequantize() as a plain array instead."
        )
    if inputs is not None and inputs.scale is not None:
        form = dataclasses.replace(form, tensors=form.tensors | {"input_scale": scales.stored(inputs.scale, name)})
    return dataclasses.replace(form, inputs=told)


def _as_floats(matrix: Matrix, kept: "_Scales") -> _Module | None:
    quantizer = matrix.quantizer
    fmt, scales = quantizer.format, quantizer.scale_format
    if not isinstance(fmt, FloatFormat):
        return None
    group = matrix.group if isinstance(quantizer.tiling, Group | Block) else None
    arguments = {"num_bits": fmt.bits, "type": "float", "symmetric": True, "dynamic": False}
    if fmt in MX and isinstance(scales, PowerOfTwo) and scales.times == 1 and group == 32:
        codes = matrix.by_output(matrix.packed.scales[0])
        told = arguments | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        return _Module(_float_codes(matrix) | {"weight_scale": codes}, MX[fmt], told)
    if fmt == E2M1 and isinstance(scales, TwoLevel) and scales.format == E4M3 and group == 16:
        tile, tensor = matrix.packed.scales
        told = arguments | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
        own = {
            "weight_scale": matrix.by_output(tile),
            "weight_global_scale": 1 / np.asarray(tensor, np.float32).reshape(1),
        }
        return _Module(_float_codes(matrix) | own, "nvfp4-pack-quantized", told)
    if fmt == E4M3:
        strategy, stored = _fp8_strategy(matrix)
        own = {"weight_scale": kept.stored(stored, matrix.name)}
        return _Module(_float_codes(matrix) | own, "float-quantized", arguments | strategy)
    return None


def _float_codes(matrix: Matrix) -> dict[str, np.ndarray]:
    """E4M3 elements as such, narrower ones packed."""
    fmt = matrix.quantizer.format
    if fmt == E4M3:
        return {"weight": matrix.elements.astype(ml_dtypes.float8_e4m3fn)}
    codes = coding.encode(jnp.asarray(matrix.elements), fmt)
    return {"weight_packed": np.asarray(packing.pack(codes, fmt.bits))}


def _fp8_strategy(matrix: Matrix) -> tuple[dict[str, Any], np.ndarray]:
    tiling, scales = matrix.quantizer.tiling, matrix.scales
    match tiling:
        case PerTensor():
            return {"strategy": "tensor"}, scales[:1, 0]
        case Block():
            first, last = matrix.outputs.start, matrix.outputs.stop
            if first % tiling.other or (last - first) % tiling.other:
                raise ValueError(
                    f"{_WHO}: {matrix.name} is the outputs {first} to {last} of a layer, which cut its blocks of"
                    f" {tiling.other} outputs. Quantize the parts as layers of their own."
                )
            return {"strategy": "block", "block_structure": [tiling.other, tiling.size]}, scales[:: tiling.other]
        case Group():
            return {"strategy": "group", "group_size": tiling.size}, scales
        case _:
            return {"strategy": "channel"}, scales


def _as_integers(matrix: Matrix, inputs: dict[str, Any] | None, kept: "_Scales") -> _Module | None:
    integers = Integers.of(matrix)
    if integers is None:
        return None
    groups = integers.scales.shape[1]
    strategy = {"strategy": "channel"} if groups == 1 else {"strategy": "group", "group_size": matrix.group}
    arguments = {"num_bits": integers.bits, "type": "int", "symmetric": integers.zeros is None, "dynamic": False}
    own = {"weight_scale": kept.stored(integers.scales, matrix.name)}
    if integers.bits == 8 and integers.zeros is None and inputs is not None and inputs["type"] == "int":
        return _Module({"weight": integers.values} | own, "int-quantized", arguments | strategy)
    own["weight_packed"] = _words(integers.values, integers.bits)
    own["weight_shape"] = np.asarray(integers.values.shape, np.int64)
    if integers.zeros is not None:
        own["weight_zero_point"] = np.ascontiguousarray(_words(integers.zeros.T, integers.bits).T)
    return _Module(own, "pack-quantized", arguments | strategy)


def _words(values: np.ndarray, bits: int) -> np.ndarray:
    """Rows of two's complement as int32 words, each code counted from the lowest value."""
    codes = (values.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    rows = np.asarray(packing.pack(jnp.asarray(codes), bits))
    return np.pad(rows, [(0, 0), (0, -rows.shape[1] % 4)]).view("<i4")


@dataclasses.dataclass(frozen=True, slots=True)
class _Scales:
    """How scales are stored: in the dtype, exactly or rounded."""

    dtype: str
    rounded: bool

    def stored(self, scales: np.ndarray, name: str) -> np.ndarray:
        """Raises ValueError where the dtype would change a scale, and that was not asked for, or lies out of range."""
        cast, changed = rounded_scales(scales, self.dtype, self.rounded)
        if changed is None:
            return cast
        raise ValueError(
            f"{_WHO}(dtype={self.dtype!r}): the scale {scales[changed]} of {name} would become {cast[changed]}, and the"
            f" weights others. Quantize with scale_format=lb.scaling.CastScale({self.dtype!r}), which training then"
            " computes with, save in float32, or pass round_scales=True, for scales that it holds to all of its bits."
        )


def _configuration(modules: Mapping[str, _Module], names: set[str]) -> dict[str, Any]:
    """`quantization_config`. One scheme goes by the class `Linear`, with the other modules ignored, which all servers
    read; several go by the names of their layers."""
    schemes: dict[str, list[str]] = {}
    for name, module in modules.items():
        schemes.setdefault(json.dumps(module.scheme, sort_keys=True), []).append(name)
    alone = len(schemes) == 1
    groups = {
        f"group_{number}": {"targets": ["Linear"] if alone else members, **json.loads(scheme)}
        for number, (scheme, members) in enumerate(schemes.items())
    }
    formats = {module.format for module in modules.values()}
    others = {name.removesuffix(".weight").removesuffix(".bias") for name in names} - set(modules)
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": sorted(others),
        "config_groups": groups,
    }
