"""Reading: layers as packed tensors, from the layouts that this package writes."""

import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lowbit_jax import packing
from lowbit_jax.formats.base import FloatFormat
from lowbit_jax.formats.catalogue import E2M1, E4M3, element_format
from lowbit_jax.io import tensors
from lowbit_jax.io.compressed_tensors.save import CONFIG, MX
from lowbit_jax.qtensor import QTensor
from lowbit_jax.quantizer import Quantizer
from lowbit_jax.scaling import Block, CastScale, Group, PerRow, PerTensor, PowerOfTwo, TwoLevel, absmax

_WHO = "lb.io.compressed_tensors.load"


def load(folder: str | os.PathLike) -> dict[str, QTensor | np.ndarray]:
    """What `save` wrote, or another program in the same layouts: packed layers by module, other arrays by parameter.

    A layer is a `QTensor` of [outputs, inputs] whose last axis is contracted, `lb.dot_general(x, layer, (((-1,), (1,)),
    ((), ())), recipe=...)`; what the configuration says of the inputs is not in it (a static scale is the array
    `<layer>.input_scale`). Words, scales and zero points are checked. NVFP4's tensor scale is the reciprocal of the
    file's, rounded.

    Raises: ValueError for a folder without these files, damaged or of another method, and for formats and strategies
    that are not listed in this module."""
    folder = pathlib.Path(folder)
    told = _read_configuration(folder / CONFIG)
    arrays = tensors.read(folder, _WHO)
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        name, _, local = key.rpartition(".")
        modules.setdefault(name, {})[local] = array
    packed = {name: own for name, own in modules.items() if "weight_scale" in own}
    found = {name: _layer(name, own, _scheme_of(name, told)) for name, own in packed.items()}
    parts = {f"{name}.{local}" for name in found for local in _LOCAL}
    return found | {key: array for key, array in arrays.items() if key not in parts}


_LOCAL = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
    "weight_g_idx",
)


def _read_configuration(path: pathlib.Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["quantization_config"]
        if told["quant_method"] != "compressed-tensors":
            reason = f"its method is {told['quant_method']!r}"
        elif reason := _what_is_wrong(told):
            reason = f"its quantization_config {reason}"
        else:
            return told
    except FileNotFoundError:
        reason = "there is no such file"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error!r}"
    raise ValueError(
        f"{_WHO}: {path} is no configuration of a model in compressed-tensors: {reason}. Give the folder that"
        f" holds {CONFIG} and {tensors.FILE}."
    )


def _what_is_wrong(told: Mapping[str, Any]) -> str | None:
    """Of a configuration by this method, in words."""
    for other in ("transform_config", "sparsity_config"):
        if told.get(other):
            return f"has a {other}, which is not read here: the weights would stand for others"
    groups = told.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return "has no config_groups"
    for group in groups.values():
        try:
            form = group.get("format") or told["format"]
            words = isinstance(form, str) and isinstance(group["weights"], dict)
            if not words or not all(isinstance(target, str) for target in group["targets"]):
                return "has a group without format, weights or targets"
            _ = [re.compile(target[3:]) for target in group["targets"] if target.startswith("re:")]
        except (AttributeError, KeyError, TypeError, re.error) as error:
            return f"has a damaged group ({error!r})"
    return None


def _scheme_of(name: str, told: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The format of a layer and its arguments: those of the group that names it, or else of the one for its class."""
    for matches in (
        lambda t: t == name,
        lambda t: t.startswith("re:") and re.match(t[3:], name),
        lambda t: t == "Linear",
    ):
        for group in told["config_groups"].values():
            if any(matches(target) for target in group["targets"]):
                return group.get("format") or told["format"], group["weights"]
    raise ValueError(f"{_WHO}: no group of {CONFIG} is for {name}, which has scales. The files do not belong together.")


def _layer(name: str, own: Mapping[str, np.ndarray], scheme: tuple[str, dict[str, Any]]) -> QTensor:
    """The packed weight of one module."""
    form, arguments = scheme
    reader = _READERS.get(form)
    if reader is None:
        raise ValueError(f"{_WHO}: {name} is in the format {form!r}; formats read are {', '.join(_READERS)}.")
    try:
        _check_order(own, arguments)
        packed = reader(own, arguments)
        packed.validate("its weight")
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{_WHO}: {name}, in the format {form!r}, cannot be read: {error}; it has {', '.join(sorted(own))}. The"
            " files are damaged, do not belong together, or are of a kind that is not read here."
        ) from error
    return packed.sealed()


def _check_order(own: Mapping[str, np.ndarray], arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for groups that are not of neighbors, and zero points that the configuration does not know."""
    if "weight_g_idx" in own:
        index = own["weight_g_idx"]
        if (index != np.arange(len(index)) // max(int(arguments.get("group_size") or len(index)), 1)).any():
            raise ValueError("its groups are not of neighboring inputs (weight_g_idx)")
    if "weight_zero_point" in own and arguments.get("symmetric", True):
        if own["weight_zero_point"].any():
            raise ValueError("it has zero points, and its configuration says symmetric")


def _packed(words: np.ndarray, scales: tuple, quantizer: Quantizer, length: int, zeros: Any = None) -> QTensor:
    return QTensor(
        words=jnp.asarray(words), scales=tuple(map(jnp.asarray, scales)), marks=None, quantizer=quantizer, axis=-1,
        length=length, dtype=jnp.dtype("float32"), zeros=None if zeros is None else jnp.asarray(zeros),
    )  # fmt: skip


def _tiling(arguments: Mapping[str, Any]) -> PerRow | PerTensor | Group | Block:
    match arguments.get("strategy"), arguments.get("group_size"), arguments.get("block_structure"):
        case "channel", _, _:
            return PerRow()
        case "tensor", _, _:
            return PerTensor()
        case "group" | "tensor_group", int(size), _ if size > 0:
            return Group(size)
        case "block", _, [int(rows), int(columns)]:
            return Block(columns, rows)
    raise ValueError(
        f"the strategy {arguments.get('strategy')!r} (group_size {arguments.get('group_size')!r},"
        f" block_structure {arguments.get('block_structure')!r}) is none of channel, tensor, group, tensor_group and"
        " block."
    )


def _in_view(tiling: Any, tiles: np.ndarray) -> np.ndarray:
    """[tiles of outputs, tiles of inputs] in the view of a tiling of [outputs, inputs]."""
    match tiling:
        case PerTensor():
            return tiles.reshape(1, 1)
        case Group():
            return tiles[:, :, None]
        case Block():
            return tiles[:, None, :, None]
    return tiles


def _read_integers(own: Mapping[str, np.ndarray], arguments: Mapping[str, Any]) -> QTensor:
    bits, tiling = arguments["num_bits"], _tiling(arguments)
    symmetric, scale = arguments.get("symmetric", True), own["weight_scale"]
    if isinstance(tiling, PerTensor):  # one scale, written for each row too
        tiling, scale = PerRow(), np.broadcast_to(scale.reshape(-1, 1), (int(own["weight_shape"][0]), 1))
    quantizer = Quantizer(
        format=element_format(f"int{bits}"), tiling=tiling, fit=absmax, scale_format=CastScale(scale.dtype.name),
        zero_point=not symmetric,
    )  # fmt: skip
    rows, length = map(int, own["weight_shape"])
    zeros = None
    if not symmetric:
        along = _codes(own["weight_zero_point"].T, rows, bits)
        zeros = _in_view(tiling, np.asarray(packing.unpack(jnp.asarray(along), bits, rows)).T)
    return _packed(_codes(own["weight_packed"], length, bits), (_in_view(tiling, scale),), quantizer, length, zeros)


def _codes(words: np.ndarray, length: int, bits: int) -> np.ndarray:
    """Rows of int32 words as rows of bytes."""
    size, rows = packing.packed_size(length, bits), np.ascontiguousarray(words).view(np.uint8)
    if words.dtype != np.int32 or rows.shape[1] != -(-size // 4) * 4:
        raise ValueError(
            f"words are {words.dtype}{list(words.shape)}, and {length} codes of {bits} bits take int32"
            f" [..., {-(-size // 4)}]. The file is damaged or of an older layout with gaps: save it anew with"
            " compressed-tensors 0.15 or later."
        )
    return rows[:, :size]


def _read_int8(own: Mapping[str, np.ndarray], arguments: Mapping[str, Any]) -> QTensor:
    bits, tiling, scale = arguments["num_bits"], _tiling(arguments), own["weight_scale"]
    if not arguments.get("symmetric", True):
        raise ValueError("zero points beside int8 weights that are not packed are not read here.")
    quantizer = Quantizer(
        format=element_format(f"int{bits}"), tiling=tiling, fit=absmax, scale_format=CastScale(scale.dtype.name)
    )
    codes = (own["weight"].astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    words = np.asarray(packing.pack(jnp.asarray(codes), bits))
    return _packed(words, (_in_view(tiling, scale),), quantizer, codes.shape[1])


def _read_fp8(own: Mapping[str, np.ndarray], arguments: Mapping[str, Any]) -> QTensor:
    weight, scale, tiling = own["weight"], own["weight_scale"], _tiling(arguments)
    quantizer = Quantizer(format=E4M3, tiling=tiling, fit=absmax, scale_format=CastScale(scale.dtype.name))
    return _packed(_fp8_bytes(weight), (_in_view(tiling, scale),), quantizer, weight.shape[1])


def _fp8_bytes(weight: np.ndarray) -> np.ndarray:
    if weight.dtype != ml_dtypes.float8_e4m3fn:
        raise ValueError(f"FP8 weights are stored as float8_e4m3fn, not {weight.dtype}.")
    return weight.view(np.uint8)


def _read_mx(fmt: FloatFormat) -> Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], QTensor]:
    def read(own: Mapping[str, np.ndarray], arguments: Mapping[str, Any]) -> QTensor:
        scale = own["weight_scale"]
        words = _fp8_bytes(own["weight"]) if fmt == E4M3 else own["weight_packed"]
        quantizer = Quantizer(format=fmt, tiling=Group(32), fit=absmax, scale_format=PowerOfTwo())
        return _packed(words, (scale[:, :, None],), quantizer, 32 * scale.shape[1])

    return read


def _read_nvfp4(own: Mapping[str, np.ndarray], arguments: Mapping[str, Any]) -> QTensor:
    scale, tensor = own["weight_scale"], own["weight_global_scale"]
    quantizer = Quantizer(format=E2M1, tiling=Group(16), fit=absmax, scale_format=TwoLevel())
    scales = scale[:, :, None], 1 / tensor.astype(np.float32).reshape(())
    return _packed(own["weight_packed"], scales, quantizer, 16 * scale.shape[1])


_READERS = {
    "pack-quantized": _read_integers,
    "int-quantized": _read_int8,
    "float-quantized": _read_fp8,
    "naive-quantized": _read_fp8,
    "nvfp4-pack-quantized": _read_nvfp4,
    **{form: _read_mx(fmt) for fmt, form in MX.items()},
}
