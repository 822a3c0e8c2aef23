"""Text from a model, one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int


def generate(
    model: nnx.Module, prompt: np.ndarray, *, tokens: int, context: int, temperature: float, vocab_size: int, key: Array
) -> np.ndarray:
    """The prompt and `tokens` more ids below `vocab_size` (a model may have logits for more), drawn from
    softmax(logits / temperature); 0 takes the most likely.

    Every token is a full forward pass over a window of `context` ids: no cache, so any ids-to-logits model will do."""
    prompt = np.asarray(prompt, np.int32)[-context:]
    window = np.zeros((1, context), np.int32)
    window[0, : len(prompt)] = prompt
    graph, state = nnx.split(model)
    drawn = _draw(graph, state, jnp.asarray(window), jnp.asarray(len(prompt)), key, jnp.float32(temperature),
                  vocab_size, tokens)  # fmt: skip
    return np.concatenate([prompt, np.asarray(drawn)])


def check(prompt: np.ndarray, tokens: int, temperature: float, vocab_size: int) -> None:
    """Raises: ValueError for what cannot be sampled."""
    if len(prompt) == 0 or tokens < 1 or not 0 <= temperature < np.inf or np.max(prompt) >= vocab_size:
        raise ValueError(
            f"sampling: {len(prompt)} prompt ids below {vocab_size}, {tokens} new tokens, temperature {temperature}. It"
            " needs a prompt within the vocabulary, at least one new token and a finite temperature of 0 or more."
        )


@functools.partial(jax.jit, static_argnames=("graph", "vocab_size", "tokens"))
def _draw(
    graph, state, window: Int[Array, "1 context"], length, key, temperature, vocab_size: int, tokens: int
) -> Int[Array, "tokens"]:
    context = window.shape[1]

    def step(carry, key):
        window, length = carry
        logits = nnx.merge(graph, state, copy=True)(window)[0, length - 1, :vocab_size]  # NNX ties variables to a trace
        drawn = jax.random.categorical(key, logits / jnp.where(temperature > 0, temperature, 1))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)
        full = length == context  # then the window moves on by one
        window = jnp.where(full, jnp.roll(window, -1, axis=1), window)
        length = jnp.where(full, length, length + 1)
        return (window.at[0, length - 1].set(token), length), token

    return jax.lax.scan(step, (window, length), jax.random.split(key, tokens))[1]
