"""The decoder of `recipes.llama` as Hugging Face's Llama: names of its parameters, configuration, tokenizer."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np

import lowbit_jax as lb
from recipes import llama, tokenizers

Leaf = lb.io.Outputs | np.ndarray
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """A product of the decoder. path: of the layer in our model. number: in its stack, of those that are stacked.
    weight: packed, or an array [outputs, inputs]."""

    path: str
    number: int | None
    weight: Leaf


def layers(model: llama.Llama) -> dict[str, Layer]:
    """By the names of modules."""
    size = model.config
    q, kv, ffn = size.heads * size.head_dim, size.kv_heads * size.head_dim, size.ffn
    parts = {
        "blocks/attention/qkv": {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv},
        "blocks/attention/out": {"self_attn.o_proj": size.width},
        "blocks/mlp/gate_up": {"mlp.gate_proj": ffn, "mlp.up_proj": ffn},
        "blocks/mlp/down": {"mlp.down_proj": size.width},
    }
    stacks = {path: _held(model, path, "kernel") for path in parts}
    found = {}
    for number in range(size.layers):
        for path, outputs in parts.items():
            kernel, start = jax.tree.map(lambda leaf, number=number: leaf[number], stacks[path]), 0
            for name, count in outputs.items():
                weight = _outputs(kernel, start, start + count)
                found[f"model.layers.{number}.{name}"] = Layer(path, number, weight)
                start += count
    head = _outputs(_held(model, "lm_head", "kernel"), 0, model.vocab_size)
    return found | {"lm_head": Layer("lm_head", None, head)}


def input_scales(model: llama.Llama, layers: dict[str, Layer]) -> dict[str, np.ndarray]:
    """The learned scale of the activations, of the layers that hold one."""
    found = {}
    for name, layer in layers.items():
        scale = getattr(_module(model, layer.path).dot_general, "lhs_scale", None)
        if scale is not None:
            held = np.asarray(scale.get_value())
            found[name] = held if layer.number is None else held[layer.number]
    return found


def arrays(model: llama.Llama) -> dict[str, np.ndarray]:
    """Name of a module -> the parameter of those that are no product: embedding and norms."""
    norms = {"input_layernorm": "blocks/attention_norm", "post_attention_layernorm": "blocks/mlp_norm"}
    found = {"model.embed_tokens": _float(_held(model, "embed", "embedding"))}
    for number in range(model.config.layers):
        found |= {
            f"model.layers.{number}.{name}": np.asarray(_held(model, path, "scale"))[number]
            for name, path in norms.items()
        }
    return found | {"model.norm": np.asarray(_held(model, "norm", "scale"))}


def config(model: llama.Llama, separator: int | None) -> dict[str, Any]:
    """What `config.json` says of the model. separator: the token that ends a document."""
    size = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": size.width,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": size.context,
        "rms_norm_eps": size.norm_eps,
        "rope_theta": size.rope_theta,
        "rope_parameters": {"rope_theta": size.rope_theta, **_scaling(size)},  # as transformers 5 names it, and 4
        **({} if size.rope_scaling is None else {"rope_scaling": _scaling(size)}),
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": separator,
    }


def _scaling(size: llama.LlamaConfig) -> dict[str, Any]:
    if size.rope_scaling is None:
        return {"rope_type": "default"}
    factor, low, high, positions = size.rope_scaling
    return {"rope_type": "llama3"} | dict(zip(ROPE_SCALING, (factor, low, high, int(positions)), strict=True))


def tokenizer_files(codec: tokenizers.Tokenizer) -> dict[str, str]:
    """`tokenizer.json` and what goes with it; nothing for bare ids."""
    if isinstance(codec, tokenizers.Ids):
        return {}
    inner = codec.inner if isinstance(codec, tokenizers.TokenizerFile) else _bytes()
    file = json.loads(inner.to_str()) | {"post_processor": None}  # which would add tokens that training never saw
    told: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    if codec.separator is not None:
        told["eos_token"] = inner.id_to_token(codec.separator)
    return {"tokenizer.json": json.dumps(file, ensure_ascii=False), "tokenizer_config.json": json.dumps(told, indent=1)}


def byte_names() -> list[str]:
    """How byte-level tokenizers write each of the 256 bytes: those that print as themselves, the others in turn from
    code point 256 on."""
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in prints else chr(next(others)) for byte in range(256)]


def _bytes() -> Any:
    """A tokenizer of the `tokenizers` package whose ids are the bytes of the text."""
    import tokenizers as library

    vocabulary = {name: byte for byte, name in enumerate(byte_names())}
    inner = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = library.decoders.ByteLevel()
    return inner


def _module(model: llama.Llama, path: str) -> Any:
    module: Any = model
    for attribute in path.split("/"):
        module = getattr(module, attribute)
    return module


def _held(model: llama.Llama, path: str, name: str) -> Any:
    return getattr(_module(model, path), name).get_value()


def _outputs(kernel: Any, start: int, stop: int) -> Leaf:
    if isinstance(kernel, lb.QTensor):
        return lb.io.Outputs(kernel, start, stop)
    return np.ascontiguousarray(np.asarray(kernel).T[start:stop])


def _float(leaf: Any) -> np.ndarray:
    return np.asarray(leaf.dequantize() if isinstance(leaf, lb.QTensor) else leaf)
