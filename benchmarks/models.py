"""What is trained in a measurement: a residual MLP, and the Llama-type decoder of the recipes."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from recipes.llama import Llama, LlamaConfig

_CONTEXT = 256  # tokens a sequence; 3-D inputs, since Qwix's int4 products of 2-D ones do not compile on a CPU
_VOCAB = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model with random data of its kind. `layers` are the attributes that hold the products to quantize."""

    build: Callable[[int, int], nnx.Module]  # (width, depth)
    batch: Callable[[int, int], tuple]  # (tokens a step, width); its first entry is the model's input
    loss: Callable[..., Float[Array, ""]]  # (model, *batch)
    layers: tuple[str, ...]


class Mlp(nnx.Module):
    """`depth` residual blocks x + down(silu(up(x))), four times wider inside."""

    def __init__(self, width: int, depth: int, rngs: nnx.Rngs):
        linear = lambda size_in, size_out: nnx.Linear(size_in, size_out, use_bias=False, rngs=rngs)
        self.up = nnx.List([linear(width, 4 * width) for _ in range(depth)])
        self.down = nnx.List([linear(4 * width, width) for _ in range(depth)])

    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nnx.silu(up(x)))
        return x


def sequences(tokens: int) -> tuple[int, int]:
    """How `tokens` are laid out: (batch, time)."""
    time = min(tokens, _CONTEXT)
    if tokens % time:
        raise ValueError(f"benchmarks: {tokens} tokens are not whole sequences of {time}; pass a multiple of {time}.")
    return tokens // time, time


def _mlp_batch(tokens: int, width: int) -> tuple[Float[Array, "batch time width"], Float[Array, "batch time width"]]:
    keys = jax.random.split(jax.random.key(1))
    shape = (*sequences(tokens), width)
    return jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape)


def _mlp_loss(model: nnx.Module, x, y) -> Float[Array, ""]:
    return jnp.mean((model(x) - y) ** 2)


def _llama(width: int, depth: int) -> nnx.Module:
    """Heads of 64, feed-forward 8/3 of the width in whole blocks of 128."""
    heads = max(width // 64, 1)
    config = LlamaConfig(
        layers=depth, width=width, heads=heads, kv_heads=heads, ffn=-(-8 * width // 3 // 128) * 128,
        context=_CONTEXT, batch=1, learning_rate=1e-3, steps=1,
    )  # fmt: skip
    return Llama(config, _VOCAB, rngs=nnx.Rngs(0))


def _llama_batch(tokens: int, width: int) -> tuple[Int[Array, "batch time"], Int[Array, "batch time"]]:
    del width
    tokens_key, targets_key = jax.random.split(jax.random.key(1))
    draw = lambda key: jax.random.randint(key, sequences(tokens), 0, _VOCAB)
    return draw(tokens_key), draw(targets_key)


def _llama_loss(model: nnx.Module, tokens, targets) -> Float[Array, ""]:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(tokens), targets))


WORKLOADS = {
    "mlp": Workload(
        build=lambda width, depth: Mlp(width, depth, nnx.Rngs(0)),
        batch=_mlp_batch,
        loss=_mlp_loss,
        layers=("up", "down"),
    ),
    "llama": Workload(build=_llama, batch=_llama_batch, loss=_llama_loss, layers=("qkv", "out", "gate_up", "down")),
}
