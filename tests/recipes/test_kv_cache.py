"""Sampling with cached keys and values: the same text as by whole windows, and caches in few bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from recipes import kv_cache, llama, sampling

CONTEXT = 8
SIZE = llama.preset("smoke", context=CONTEXT)


@pytest.fixture(scope="module")
def model():
    """With a head that is not nearly flat, so that greedy text is decided by more than rounding."""
    return llama.build(SIZE, 128, dtype="float32")


def packed(model, recipe):
    return lb.convert(lb.quantize(model, rules=[("blocks", recipe)]))


whole = nnx.jit(lambda model, tokens: model(tokens))


@nnx.jit(static_argnames=("bits", "first"))
def step_by_step(model, tokens, bits, first):
    """The logits of each position: `first` of them at once, then one at a time."""
    cache = model.init_cache(*tokens.shape, bits)
    logits, cache = model.extend(tokens[:, :first], cache, jnp.int32(0))
    found = [logits]
    for at in range(first, tokens.shape[1]):
        logits, cache = model.extend(tokens[:, at : at + 1], cache, jnp.int32(at))
        found.append(logits)
    return jnp.concatenate(found, axis=1)


@pytest.fixture
def tokens(key):
    return jax.random.randint(key, (2, CONTEXT), 0, 128)


RECIPES = {  # grids with a zero for activations: on others the first position is decided by rounding (recipes/LOG.md)
    "float": None,
    "w4": lb.quest(4, activations=False),
    "w8a8": lb.methods.get("absmax_integer", bits=8),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_positions_one_by_one_answer_as_all_at_once(model, tokens, recipe):
    form = model if recipe is None else packed(model, recipe)
    expected = np.asarray(whole(form, tokens))
    got = np.asarray(step_by_step(form, tokens, None, 3))
    np.testing.assert_allclose(got, expected, atol=(1e-4 if recipe is None else 0.02) * np.abs(expected).max())


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.25), (2, 1.5)])
def test_few_bits_stay_near_and_their_bytes_are_few(model, tokens, bits, most):
    expected = np.asarray(whole(model, tokens))
    got = np.asarray(step_by_step(model, tokens, bits, 5))
    error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert 1e-5 < error < most
    count = lambda cache: sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    heads = 2 * SIZE.layers * 3 * CONTEXT * SIZE.kv_heads  # keys and values of 3 sequences
    assert count(model.init_cache(3, CONTEXT, bits)) == heads * (SIZE.head_dim * bits // 8 + 2)
    assert count(model.init_cache(3, CONTEXT)) == heads * SIZE.head_dim * 4


@pytest.mark.parametrize("bits", [1, 9, "4"])
def test_other_widths_are_refused(model, bits):
    with pytest.raises(ValueError, match=f"kv_cache: {bits!r} bits"):
        model.init_cache(1, CONTEXT, bits)


def test_tiles_of_several_tokens_read_whole_windows(model):
    """One token cannot be cut into them."""
    recipe = lb.methods.jetfire()
    tile = dataclasses.replace(recipe.out.lhs, tiling=lb.scaling.Block(8, 8))
    tiled = lb.quantize(model, rules=[("blocks", lb.LinearRecipe(out=lb.Gemm(lhs=tile)))])
    options = dict(tokens=2, context=8, temperature=0, vocab_size=64, key=jax.random.key(0))
    assert len(sampling.generate(tiled, np.asarray([1, 2]), **options)) == 4
    with pytest.raises(ValueError, match="reads whole windows.*tiles of several tokens"):
        sampling.generate(tiled, np.asarray([1, 2]), cache_bits=4, **options)


def test_more_tokens_than_positions_are_refused(model):
    with pytest.raises(ValueError, match="Llama.extend: 9 tokens, and the cache has 8 positions"):
        model.extend(jnp.zeros((1, 9), jnp.int32), model.init_cache(1, 8), jnp.int32(0))


class Windows(nnx.Module):
    """The model behind a wall: sampling sees no `extend`."""

    def __init__(self, model):
        self.model = model

    def __call__(self, ids):
        return self.model(ids)


def drawn(model, prompt, tokens, temperature=0.0, **options):
    return sampling.generate(model, np.asarray(prompt), tokens=tokens, context=CONTEXT, temperature=temperature,
                             vocab_size=100, key=jax.random.key(3), **options)  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_that_of_whole_windows_until_they_are_full(model, temperature):
    prompt = [5, 17, 60]
    count = CONTEXT - len(prompt) + 1  # the last is drawn from a full window
    expected = drawn(Windows(model), prompt, count, temperature)
    np.testing.assert_array_equal(drawn(model, prompt, count, temperature), expected)


def test_beyond_its_context_it_goes_on_from_the_later_half(model):
    """A full window is read again from its middle: the same as a new start with those ids."""
    prompt = list(range(10, 14))
    ids = drawn(model, prompt, 16)
    assert len(ids) == 20
    end = CONTEXT + 1  # ids when it was first full, and the one drawn then
    again = drawn(model, ids[end - CONTEXT // 2 - 1 : end], 20 - end)
    np.testing.assert_array_equal(again[-(20 - end) :], ids[end:])


def test_a_prompt_as_long_as_the_context(model):
    ids = drawn(model, range(CONTEXT), 3)
    assert len(ids) == CONTEXT + 3


def test_a_prompt_longer_than_the_context(model):
    """It comes back whole, and what follows is what follows its last ids."""
    prompt = np.arange(CONTEXT + 7)
    ids, short = drawn(model, prompt, 5), drawn(model, prompt[-CONTEXT:], 5)
    np.testing.assert_array_equal(ids, [*prompt, *short[-5:]])


def test_bits_of_the_cache_reach_the_text(model):
    """At 8 bits the same beginning; other widths are refused."""
    plain = drawn(model, [1, 2, 3], 5)
    np.testing.assert_array_equal(drawn(model, [1, 2, 3], 5, cache_bits=8)[:5], plain[:5])
    with pytest.raises(ValueError, match="kv_cache"):
        drawn(model, [1, 2, 3], 4, cache_bits=16)
    with pytest.raises(ValueError, match="this Windows reads whole windows"):
        drawn(Windows(model), [1, 2, 3], 4, cache_bits=8)


def test_a_quantizer_for_each_head_dim():
    for dim in (16, 48, 128):
        quantizer = kv_cache.quantizer(4, dim)
        assert quantizer is not None and quantizer.rotation is not None
        assert dim % quantizer.rotation.block == 0
    assert kv_cache.quantizer(None, 64) is None


def test_half_precision(tokens):
    model = llama.build(dataclasses.replace(SIZE, layers=1), 128, dtype="bfloat16")
    expected = np.asarray(whole(model, tokens), np.float32)
    got = np.asarray(step_by_step(model, tokens, None, 6), np.float32)
    np.testing.assert_allclose(got, expected, atol=0.05 * np.abs(expected).max())
