"""A Llama from Hugging Face as a run, which `recipes.pretrain` starts from and `recipes.sample` writes with.

    python -m recipes.import_hf MODEL RUN        # MODEL: a folder with config.json, *.safetensors and tokenizer.json
    python -m recipes.sample RUN --weights float --prompt "import "
    python -m recipes.pretrain --preset RUN --init-from RUN --tokenizer MODEL/tokenizer.json \\
        --data texts --bits 4 --steps 500 --learning-rate 1e-5 --batch 8 --context 512

Weights of any floating dtype become float32 masters; those in compressed-tensors are dequantized. Embeddings that the
model shares with its head become two, of which the head trains on its own."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
import tyro
from flax import nnx

import lowbit_jax as lb
from recipes import checkpoints, command, display, finished, hugging_face, llama, run_directory, tokenizers

_WHO = "import_hf"
_TRAINED = llama.PRESETS["tiny"]  # what such a file does not say: a batch, a rate, how to draw fresh weights


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    model: tyro.conf.Positional[pathlib.Path]
    """Folder of the model."""
    run: tyro.conf.Positional[pathlib.Path]
    """Run directory to make."""
    context: int | None = None
    """Positions of the run; those that the model was trained with unless given."""


def main(config: Import) -> None:
    """Writes the run and prints what it holds."""
    folder, run = config.model.expanduser(), config.run.expanduser()
    if (run / "config.json").exists():
        raise FileExistsError(f"{_WHO}: {run} is a run already, and is not written over. Give a new directory.")
    told = _read(folder / "config.json")
    size = sizes(told, context=config.context)
    tied, vocab_size = told.get("tie_word_embeddings", False), int(told["vocab_size"])
    if not isinstance(tied, bool):
        raise ValueError(f"{_WHO}: its config.json has tie_word_embeddings {tied!r}; it is true or false.")
    description = _description(folder, size, vocab_size)
    tensors = parameters(folder, told)
    counted = sum(leaf.size for leaf in tensors.values())
    model = nnx.eval_shape(lambda: llama.build(size, vocab_size, dtype="float32"))
    _, shapes = nnx.split(model, nnx.Param)
    params = _filled(shapes, stacked(tensors, size, tied=tied))
    with run_directory.locked(run), description.of_finished(run):
        saved = checkpoints.Checkpoints(run / "unquantized" / "checkpoints")
        saved.save(size.steps, {"params": params})
        run_directory.claim(run, {"imported": repr(str(folder.resolve()))})
    print(f"{run}: {size.layers} layers of width {size.width}, {size.block_params:,} parameters in the blocks")
    print(f"{counted:,} numbers of {display.size(4 * counted)} in float32, tokenizer: {description.tokenizer}")


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(told, dict):
            return told
        reason = "it holds no table"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ValueError(
        f"{_WHO}: {path} is no configuration of a model: {reason}. Give the folder of a Hugging Face model."
    )


def sizes(told: dict[str, Any], *, context: int | None = None) -> llama.LlamaConfig:
    """Sizes of the model by its `config.json`.

    Raises: ValueError where it is no Llama that `recipes.llama` computes, or lacks a size."""
    for name, wanted in _WANTED.items():
        if (found := told.get(name, wanted[0])) not in wanted:
            raise ValueError(
                f"{_WHO}: its config.json has {name} {found!r}, and recipes.llama computes {wanted[0]!r}. Import"
                " another model."
            )
    heads, width, positions = (
        _whole(told, name) for name in ("num_attention_heads", "hidden_size", "max_position_embeddings")
    )
    if width % heads:
        raise ValueError(f"{_WHO}: its width {width} is no multiple of its {heads} heads. Import another model.")
    size = dataclasses.replace(
        _TRAINED,
        layers=_whole(told, "num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=_whole(told, "num_key_value_heads", heads),
        ffn=_whole(told, "intermediate_size"),
        context=positions if context is None else context,
        steps=0,
        norm_eps=_positive(told, "rms_norm_eps", 1e-6),
        **_rotary(told),
    )
    _whole(told, "vocab_size")
    if size.context > positions or size.context < 1:
        raise ValueError(f"{_WHO}: --context {context}: the model was trained with {positions} positions.")
    if told.get("head_dim") not in (None, size.head_dim):
        raise ValueError(
            f"{_WHO}: its heads have {told['head_dim']} entries, and recipes.llama takes width / heads,"
            f" {size.head_dim}. Import another model."
        )
    return size


def _whole(told: dict[str, Any], name: str, otherwise: int | None = None) -> int:
    found = told.get(name)
    found = otherwise if found is None else found
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(
            f"{_WHO}: its config.json has {name} {found!r}; it is a whole number from 1. The file is damaged."
        )
    return found


def _positive(told: dict[str, Any], name: str, otherwise: float | None = None) -> float:
    found = told.get(name)
    found = otherwise if found is None else found
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
        raise ValueError(f"{_WHO}: its config.json has {name} {found!r}; it is a positive number. The file is damaged.")
    return float(found)


_WANTED = {  # the first is what a configuration that does not say means
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
}


def _rotary(told: dict[str, Any]) -> dict[str, Any]:
    """Base of the positions' angles and their scaling, which transformers 5 has under one name and 4 under two."""
    parts = [told.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{_WHO}: its config.json has {parts} for the scaling of positions, which are tables.")
    rope = parts[0] | parts[1]
    theta = _positive(rope if "rope_theta" in rope else told, "rope_theta", 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise ValueError(f"{_WHO}: its positions are scaled by {kind!r}, and recipes.llama knows 'llama3'.")
    return {"rope_theta": theta, "rope_scaling": tuple(_positive(rope, name) for name in hugging_face.ROPE_SCALING)}


def parameters(folder: pathlib.Path, told: dict[str, Any]) -> dict[str, np.ndarray]:
    """Name of a parameter -> its array, float32."""
    if told.get("quantization_config") is not None:
        read = lb.io.compressed_tensors.load(folder)
        dense = {f"{name}.weight": leaf.dequantize() for name, leaf in read.items() if isinstance(leaf, lb.QTensor)}
        arrays = {name: leaf for name, leaf in read.items() if not isinstance(leaf, lb.QTensor)} | dense
    else:
        arrays = lb.io.tensors.read(folder, _WHO)
    with np.errstate(over="ignore"):
        found = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    if bad := sorted(name for name, array in found.items() if not np.isfinite(array).all()):
        raise ValueError(f"{_WHO}: {bad[0]} holds NaN, or numbers beyond float32. The files are damaged.")
    return found


def stacked(tensors: dict[str, np.ndarray], size: llama.LlamaConfig, *, tied: bool) -> dict[str, np.ndarray]:
    """The parameters of `recipes.llama` by their paths, layers on a leading axis. Takes them out of `tensors`, so that
    the model is not held twice.

    Raises: ValueError for parameters that are missing, left over or of another shape."""

    def take(name: str, *shape: int) -> np.ndarray:
        found = tensors.pop(f"{name}.weight", None)
        if found is None or found.shape != shape:
            told = "is not there" if found is None else f"has the shape {found.shape}"
            raise ValueError(f"{_WHO}: {name}.weight {told}, and config.json makes it {shape}. The files do not fit.")
        return found

    def norms(name: str) -> np.ndarray:
        return np.stack([take(f"model.layers.{number}.{name}", size.width) for number in range(size.layers)])

    def kernels(inputs: int, *parts: tuple[str, int]) -> np.ndarray:
        """[layers, inputs, outputs] of matrices side by side, by their names and outputs."""
        ends = np.cumsum([count for _, count in parts])
        found = np.empty((size.layers, inputs, ends[-1]), np.float32)
        for number in range(size.layers):
            for (name, count), end in zip(parts, ends, strict=True):
                found[number, :, end - count : end] = take(f"model.layers.{number}.{name}", count, inputs).T
        return found

    width, kv, ffn = size.width, size.kv_heads * size.head_dim, size.ffn
    vocabulary = len(tensors.get("model.embed_tokens.weight", ()))
    embedding = take("model.embed_tokens", vocabulary, width)
    head = embedding if tied and "lm_head.weight" not in tensors else take("lm_head", vocabulary, width)
    found = {
        "embed/embedding": embedding,
        "blocks/attention_norm/scale": norms("input_layernorm"),
        "blocks/attention/qkv/kernel": kernels(
            width, ("self_attn.q_proj", width), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)
        ),
        "blocks/attention/out/kernel": kernels(width, ("self_attn.o_proj", width)),
        "blocks/mlp_norm/scale": norms("post_attention_layernorm"),
        "blocks/mlp/gate_up/kernel": kernels(width, ("mlp.gate_proj", ffn), ("mlp.up_proj", ffn)),
        "blocks/mlp/down/kernel": kernels(ffn, ("mlp.down_proj", width)),
        "norm/scale": take("model.norm", width),
        "lm_head/kernel": np.ascontiguousarray(head.T),
    }
    rest = [name for name in tensors if not name.endswith(("rotary_emb.inv_freq", "input_scale"))]
    if rest:
        raise ValueError(f"{_WHO}: {sorted(rest)[0]} is no parameter of a Llama without biases. Import another model.")
    return found


def _filled(shapes: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The state of a model with these arrays in place of its shapes."""
    filled = []
    for path, leaf in nnx.to_flat_state(shapes):
        name, shape = "/".join(map(str, path)), tuple(leaf.get_value().shape)
        array = arrays[name]
        if array.shape != shape:
            raise ValueError(f"{_WHO}: {name} would be {array.shape}, and config.json makes it {shape}.")
        filled.append((path, leaf.replace(array)))
    return nnx.from_flat_state(filled)


def _description(folder: pathlib.Path, size: llama.LlamaConfig, vocab_size: int) -> finished.Description:
    path = folder / "tokenizer.json"
    codec = tokenizers.TokenizerFile(path) if path.is_file() else tokenizers.Ids(vocab_size)
    if codec.vocab_size > vocab_size:
        raise ValueError(f"{_WHO}: {path} has {codec.vocab_size} ids, and config.json {vocab_size}. They do not fit.")
    return finished.Description.of_imported(
        name=folder.resolve().name, size=size, vocab_size=vocab_size, codec=codec,
        tokenizer=str(path.resolve()) if path.is_file() else "ids",
    )  # fmt: skip


if __name__ == "__main__":
    command.run("import_hf", Import, main, __doc__)
