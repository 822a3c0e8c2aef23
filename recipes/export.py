"""The model of a finished run of `recipes.pretrain` in the files of other programs.

    python -m recipes.export RUN FOLDER                         # packed, for vLLM and Hugging Face transformers
    python -m recipes.export RUN FOLDER --to gguf               # packed, for llama.cpp
    python -m recipes.export RUN FOLDER --to safetensors        # the quantized weights as floats

Files hold the very numbers of the packed weights, or none are written. What they cannot hold are rotations (train with
--options block=none, or export --to safetensors) and, but for compressed-tensors, quantized activations."""

import collections
import dataclasses
import json
import pathlib
from typing import Any, Literal

import numpy as np
import tyro

import lowbit_jax as lb
from recipes import command, display, finished, gguf_file, hugging_face, llama, tokenizers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    run: tyro.conf.Positional[pathlib.Path]
    """Run directory of recipes.pretrain."""
    folder: tyro.conf.Positional[pathlib.Path]
    """Where the files go; it is made."""
    to: Literal["compressed-tensors", "gguf", "safetensors"] = "compressed-tensors"
    activations: Literal["same", "float"] = "same"
    """same: quantized as in training, or an error where the files cannot say so. float: in high precision, so that the
    model answers otherwise than it was trained."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the arrays that are not packed, and of scales."""
    round_scales: bool = False
    """Scales that are no values of --dtype (GGUF: of float16) are rounded; without, they are an error."""
    tokenizer: pathlib.Path | None = None
    """Where the run's tokenizer.json lies now, if it has moved; for a run on ids, the one that they were made with."""


def main(config: Export) -> None:
    """Writes the files and prints what they hold."""
    config = dataclasses.replace(config, run=config.run.expanduser(), folder=config.folder.expanduser())
    packed = finished.Description.read(config.run).scheme.method != "none"
    if not packed and config.to == "compressed-tensors":
        raise ValueError(
            "export: the run was trained with the method 'none', and compressed-tensors are packed weights. Export it"
            " --to safetensors, or --to gguf."
        )
    if config.to == "gguf" and config.dtype != "float32":
        raise ValueError(
            f"export: --dtype {config.dtype} has no effect --to gguf, whose arrays are float32. Leave it out."
        )
    if config.round_scales and config.to == "safetensors":
        raise ValueError("export: --round-scales has no effect --to safetensors, which hold no scales. Leave it out.")
    model, codec = finished.load(config.run, weights="packed" if packed else "float", tokenizer=config.tokenizer)
    layers = hugging_face.layers(model)
    _refuse_rotations(layers, config)
    inputs = _inputs(model, layers, config)
    if config.to == "gguf":
        kinds = gguf_file.write(config.folder, model, layers, codec, round_scales=config.round_scales)
    else:
        kinds = _safetensors(config, model, layers, codec, inputs)
    _show(config.folder, kinds, model, inputs)
    if config.to == "safetensors" and config.dtype != "float32":
        print(f"All weights are rounded to {config.dtype}.")


Layers = dict[str, hugging_face.Layer]


def _refuse_rotations(layers: Layers, config: Export) -> None:
    """Raises ValueError where the files cannot say that weights are rotated."""
    for name, layer in layers.items():
        weight = layer.weight
        rotation = weight.packed.quantizer.rotation if isinstance(weight, lb.io.Outputs) else None
        if rotation is not None and config.to != "safetensors":
            raise ValueError(
                f"export: the weights of {name} are rotated ({rotation.describe()}), which files --to {config.to}"
                " cannot say. --to safetensors --activations float writes them as floats, turned back; a run with"
                " --options block=none has none to turn."
            )


def _inputs(model: llama.Llama, layers: Layers, config: Export) -> dict[str, lb.Quantizer]:
    """The quantizers of activations that the files are to name, by layer.

    Raises: ValueError where they cannot name any and --activations float was not asked for."""
    recipes = lb.nn.recipes(model)
    found = {name: recipes[layer.path].out.lhs for name, layer in layers.items() if layer.path in recipes}
    found = {name: quantizer for name, quantizer in found.items() if isinstance(quantizer, lb.Quantizer)}
    if config.activations == "float":
        return {}
    if found and config.to != "compressed-tensors":
        name, quantizer = next(iter(found.items()))
        raise ValueError(
            f"export: the activations of {name} are {quantizer.format.name} by {quantizer.tiling.describe()} in"
            f" training, which files --to {config.to} cannot say. --activations float leaves them in high precision:"
            " the model then answers otherwise than it was trained."
        )
    return found


def _safetensors(
    config: Export, model: llama.Llama, layers: Layers, codec: tokenizers.Tokenizer, inputs: dict[str, lb.Quantizer]
) -> dict[str, str]:
    """Writes a folder that Hugging Face's transformers open; answers with the format of each tensor."""
    leaves = {name: layer.weight for name, layer in layers.items()} | hugging_face.arrays(model)
    told = hugging_face.config(model, codec.separator)
    texts = hugging_face.tokenizer_files(codec)
    if config.to == "compressed-tensors":
        lb.io.compressed_tensors.save(
            config.folder,
            leaves,
            config=told,
            inputs=inputs or None,
            input_scales=hugging_face.input_scales(model, layers) if inputs else None,
            dtype=config.dtype,
            round_scales=config.round_scales,
            texts=texts,
        )
        return {name: _format(leaf, config.dtype) for name, leaf in leaves.items()}
    floats = lambda leaf: leaf if isinstance(leaf, np.ndarray) else leaf.dequantize(np.float32)
    arrays = {
        f"{name}.weight": lb.io.tensors.cast(floats(leaf), config.dtype, f"export: {name}")
        for name, leaf in leaves.items()
    }
    texts |= {"config.json": json.dumps(told | {"dtype": config.dtype}, indent=2)}
    lb.io.tensors.write(config.folder, arrays, texts, "export")
    return dict.fromkeys(arrays, config.dtype)


def _format(leaf: hugging_face.Leaf, dtype: str) -> str:
    return dtype if isinstance(leaf, np.ndarray) else leaf.packed.quantizer.format.name


def _show(folder: pathlib.Path, kinds: dict[str, str], model: llama.Llama, inputs: dict[str, Any]) -> None:
    counts = collections.Counter(kinds.values())
    rows = [[kind, str(count)] for kind, count in counts.most_common()]
    display.table(f"{folder}", ["format", "tensors"], rows)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    print(f"{display.size(size)} on disk")
    quantized = any(recipe.out.lhs is not None for recipe in lb.nn.recipes(model).values())
    if any(q.format.name == "int8" and not (q.zero_point or q.learned) for q in inputs.values()):
        print("Readers put the largest magnitude of int8 activations on 127 or on 127.5: answers differ a little.")
    if quantized and not inputs:
        print("Activations are in high precision there, and were quantized in training: the answers differ.")


if __name__ == "__main__":
    command.run("export", Export, main, __doc__)
