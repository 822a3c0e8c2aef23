"""The decoder of `recipes.llama` as a GGUF file, which llama.cpp reads."""

import os
import pathlib
from typing import Any

import numpy as np

import lowbit_jax as lb
from recipes import hugging_face, llama, tokenizers

NAME = "model.gguf"
_LAYERS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(
    folder: pathlib.Path, model: llama.Llama, layers: dict[str, hugging_face.Layer], codec: tokenizers.Tokenizer,
    *, round_scales: bool,
) -> dict[str, str]:  # fmt: skip
    """Writes the file; answers with the GGML type of each tensor. layers: `hugging_face.layers(model)`.

    Raises: FileExistsError where it is already; ImportError without the package gguf; as `lb.io.gguf.blocks`."""
    library = _gguf()
    path = folder / NAME
    if path.exists():
        raise FileExistsError(f"export: {path} is there already, and is not written over. Give a new folder.")
    tensors = {name: _blocks(name, layer.weight, model, round_scales) for name, layer in layers.items()}
    tensors |= {name: ("F32", array.astype(np.float32)) for name, array in hugging_face.arrays(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    hidden = folder / f".writing-{NAME}"
    writer = _writer_of(library)(hidden, "llama")
    try:
        _describe(writer, library, model)
        _tokens(writer, library, codec, model.vocab_size)
        for name, (kind, array) in tensors.items():
            raw = None if kind == "F32" else library.GGMLQuantizationType[kind]
            writer.add_tensor(f"{_renamed(name)}.weight", array, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)
    return {name: kind for name, (kind, _) in tensors.items()}


def _blocks(name: str, leaf: hugging_face.Leaf, model: llama.Llama, round_scales: bool) -> tuple[str, np.ndarray]:
    if isinstance(leaf, np.ndarray):
        kind, rows = "F32", leaf.astype(np.float32)
    else:
        kind, rows = lb.io.gguf.blocks(leaf, name, round_scales=round_scales)
    heads = {"q_proj": model.config.heads, "k_proj": model.config.kv_heads}.get(name.rpartition(".")[2])
    return kind, rows if heads is None else _neighbors(rows, heads)


def _neighbors(rows: np.ndarray, heads: int) -> np.ndarray:
    """Outputs of a head in the order of llama.cpp, which turns neighbors by a position and not i and i + half."""
    return np.ascontiguousarray(rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape))


def _renamed(name: str) -> str:
    if name in _OTHERS:
        return _OTHERS[name]
    number, _, layer = name.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_LAYERS[layer]}"


def _describe(writer: Any, library: Any, model: llama.Llama) -> None:
    size = model.config
    if size.rope_scaling is not None:
        raise NotImplementedError(
            "export: the scaling of positions of Llama 3 is not written to GGUF. Export --to safetensors, and convert"
            " that by llama.cpp's convert_hf_to_gguf.py."
        )
    writer.add_context_length(size.context)
    writer.add_embedding_length(size.width)
    writer.add_block_count(size.layers)
    writer.add_feed_forward_length(size.ffn)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_layer_norm_rms_eps(size.norm_eps)
    writer.add_rope_dimension_count(size.head_dim)
    writer.add_rope_freq_base(size.rope_theta)
    writer.add_vocab_size(model.vocab_size)
    writer.add_file_type(library.LlamaFileType.GUESSED)
    writer.add_quantization_version(library.GGML_QUANT_VERSION)


def _tokens(writer: Any, library: Any, codec: tokenizers.Tokenizer, vocab_size: int) -> None:
    """The vocabulary, filled up to the model's. Bytes are a byte-level tokenizer that merges nothing.

    Raises: NotImplementedError for the vocabulary of a tokenizer.json, which says too little for these files."""
    if isinstance(codec, tokenizers.Ids):
        writer.add_tokenizer_model("no_vocab")
        return
    if not isinstance(codec, tokenizers.Bytes):
        raise NotImplementedError(
            f"export: the vocabulary of {codec.name} is not written to GGUF, whose readers must know how a tokenizer"
            " cuts words. Export --to safetensors, and convert that by llama.cpp's convert_hf_to_gguf.py."
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    spare = vocab_size - 256
    writer.add_token_list([*hugging_face.byte_names(), *(f"[PAD{number}]" for number in range(spare))])
    writer.add_token_types([library.TokenType.NORMAL] * 256 + [library.TokenType.UNUSED] * spare)
    text = library.GGUFValueType.STRING
    writer.add_key_value(library.Keys.Tokenizer.MERGES, [], library.GGUFValueType.ARRAY, sub_type=text)
    writer.add_eos_token_id(codec.separator)


def _writer_of(library: Any) -> Any:
    """The package's writer, which knows no empty arrays: readers look for the list of merges, and bytes have none."""

    class Writer(library.GGUFWriter):
        def _pack_val(self, val: Any, vtype: Any, *args: Any, **kwargs: Any) -> bytes:
            sub_type = kwargs.get("sub_type")
            if vtype != library.GGUFValueType.ARRAY or len(val) or sub_type is None:
                return super()._pack_val(val, vtype, *args, **kwargs)
            return self._pack("I", vtype) + self._pack("I", sub_type) + self._pack("Q", 0)

    return Writer


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("export --to gguf writes with the package gguf: pip install 'lowbit_jax[export]'.") from error
    return gguf
