"""A Llama in float64 that reads Hugging Face's files, in NumPy."""

import json

import ml_dtypes
import numpy as np
import pytest

safetensors = pytest.importorskip("safetensors")


def frequencies(told) -> np.ndarray:
    """Radians a position, of each pair; with the scaling of Llama 3.1 as its authors released it."""
    head, rope = told["head_dim"], told.get("rope_parameters", {})
    found = told["rope_theta"] ** (-np.arange(0, head, 2) / head)
    if rope.get("rope_type", "default") == "default":
        return found
    low, high = (rope["original_max_position_embeddings"] / rope[f"{end}_freq_factor"] for end in ("low", "high"))
    scaled = []
    for frequency in found:
        length = 2 * np.pi / frequency
        if length < high:
            scaled.append(frequency)
        elif length > low:
            scaled.append(frequency / rope["factor"])
        else:
            smooth = rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            scaled.append((1 - smooth) * frequency / rope["factor"] + smooth * frequency)
    return np.asarray(scaled)


def llama(parameters, told, tokens: np.ndarray, neighbors: bool = False) -> np.ndarray:
    """A Llama in float64 by Hugging Face's names. neighbors: positions turn the pairs (2i, 2i + 1) of a head, as in
    llama.cpp, and not (i, i + half)."""
    heads, kv_heads, head = told["num_attention_heads"], told["num_key_value_heads"], told["head_dim"]
    p = {name: array.astype(np.float64) for name, array in parameters.items()}

    def norm(x, name):
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + told["rms_norm_eps"])
        return x / scale * p[f"{name}.weight"]

    def turned(x):
        angle = np.arange(len(x))[:, None] * frequencies(told)
        turn = np.exp(1j * angle)[:, None]
        if neighbors:
            z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
            return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)
        z = (x[..., : head // 2] + 1j * x[..., head // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    x = p["model.embed_tokens.weight"][tokens]
    for number in range(told["num_hidden_layers"]):
        at = f"model.layers.{number}"
        linear = lambda x, name, at=at: x @ p[f"{at}.{name}.weight"].T
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (linear(h, f"self_attn.{part}_proj").reshape(len(x), -1, head) for part in "qkv")
        q, k = turned(q), turned(k)
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", shares / shares.sum(-1, keepdims=True), v)
        x = x + linear(mixed.reshape(len(x), -1), "self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm")
        gate, up = linear(h, "mlp.gate_proj"), linear(h, "mlp.up_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, "mlp.down_proj")
    return norm(x, "model.norm") @ p["lm_head.weight"].T


def floats(folder) -> tuple[dict[str, np.ndarray], dict]:
    dtypes = {"F32": "<f4", "BF16": ml_dtypes.bfloat16}
    found = safetensors.deserialize((folder / "model.safetensors").read_bytes())
    arrays = {name: np.frombuffer(bytes(e["data"]), dtypes[e["dtype"]]).reshape(e["shape"]) for name, e in found}
    return arrays, json.loads((folder / "config.json").read_text())
