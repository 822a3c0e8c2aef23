"""Text from a model, one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

import lowbit_jax as lb
from recipes.llama import Llama


def generate(
    model: nnx.Module, prompt: np.ndarray, *, tokens: int, context: int, temperature: float, vocab_size: int,
    key: Array, cache_bits: int | None = None,
) -> np.ndarray:  # fmt: skip
    """The prompt and `tokens` more ids below `vocab_size` (a model may have logits for more), drawn from
    softmax(logits / temperature); 0 takes the most likely. Of a prompt longer than `context` the model reads the last
    `context` ids.

    A `Llama` caches keys and values, in `cache_bits` (2 to 8; None: its own dtype), and reads each token once; where
    `context` positions are full it reads the later half of them again and goes on. Other models, one that is laid out
    over a mesh, and one that is quantized in tiles of several tokens, read a window of the last `context` ids for every
    token.
    Raises: ValueError for `cache_bits` of a model that caches nothing, and outside 2 to 8."""
    prompt = np.asarray(prompt, np.int32)
    read = prompt[-context:]
    window = np.zeros((context,), np.int32)
    window[: len(read)] = read
    graph, state = nnx.split(model)
    caches = isinstance(model, Llama) and model.placement is None and _reads_single_tokens(graph, state)
    if cache_bits is not None and not caches:
        raise ValueError(
            f"sampling: cache_bits={cache_bits}, and this {type(model).__name__} reads whole windows, without a cache."
            " Leave it out, or pass a Llama that lies on one device and whose activations are not quantized in tiles of"
            " several tokens."
        )
    drawn = _draw(graph, state, jnp.asarray(window), jnp.asarray(len(read)), key, jnp.float32(temperature), caches,
                  cache_bits, vocab_size, tokens)  # fmt: skip
    return np.concatenate([prompt, np.asarray(drawn)])


def _reads_single_tokens(graph, state) -> bool:
    """Whether the model's quantizers can cut one token."""

    def read(state):
        model = nnx.merge(graph, state)
        return model.extend(jnp.zeros((1, 1), jnp.int32), model.init_cache(1, 1), jnp.int32(0))[0]

    try:
        jax.eval_shape(read, state)
    except lb.scaling.UnevenTiles:
        return False
    return True


def check(prompt: np.ndarray, tokens: int, temperature: float, vocab_size: int) -> None:
    """Raises: ValueError for what cannot be sampled."""
    strange = [int(i) for i in prompt if not 0 <= i < vocab_size]
    outside = f", among them {strange[0]}" if strange else ""
    if len(prompt) == 0 or tokens < 1 or not 0 <= temperature < np.inf or outside:
        raise ValueError(
            f"sampling: {len(prompt)} prompt ids{outside}, {tokens} new tokens, temperature {temperature}. It needs a"
            f" prompt within the vocabulary of {vocab_size}, at least one new token and a finite temperature of 0 or"
            " more."
        )


@functools.partial(jax.jit, static_argnames=("graph", "caches", "cache_bits", "vocab_size", "tokens"))
def _draw(
    graph, state, window: Int[Array, "context"], length, key, temperature, caches: bool, cache_bits: int | None,
    vocab_size: int, tokens: int,
) -> Int[Array, "tokens"]:  # fmt: skip
    context = window.shape[0]
    left_out = context - context // 2 if caches else 1  # ids, when the window is full
    model = lambda: nnx.merge(graph, state, copy=True)  # NNX ties variables to a trace

    def read(window, length, cache, anew):
        """Logits after the last id, and the cache; `anew`: it holds none of the window yet."""
        if not caches:
            return model()(window[None])[0, length - 1], cache

        def whole(cache):
            logits, cache = model().extend(window[None], cache, jnp.int32(0))
            return logits[0, length - 1], cache

        def last(cache):
            logits, cache = model().extend(window[None, length - 1][:, None], cache, length - 1)
            return logits[0, 0], cache

        return jax.lax.cond(anew, whole, last, cache)

    def step(carry, key):
        window, length, cache, anew = carry
        logits, cache = read(window, length, cache, anew)
        logits = logits[:vocab_size]
        drawn = jax.random.categorical(key, logits / jnp.where(temperature > 0, temperature, 1))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)
        full = length == context
        window = jnp.where(full, jnp.roll(window, -left_out), window)
        length = jnp.where(full, length - left_out, length)
        return (window.at[length].set(token), length + 1, cache, full), token

    cache = model().init_cache(1, context, cache_bits) if caches else ()
    return jax.lax.scan(step, (window, length, cache, jnp.asarray(True)), jax.random.split(key, tokens))[1]
