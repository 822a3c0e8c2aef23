"""Methods that round stochastically in the recipes: keys by step, microbatch and device, and runs that are resumed."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import lowbit_jax as lb
from recipes import display, gradients, keys, llama, pretrain, schemes
from recipes.layout import Layout
from tests.recipes.test_pretrain import Killed, curve, settings

SCHEME = schemes.Scheme(method="quartet")


def small(layout=None):
    """A model whose backward is stochastic, split into (graph, params, rest)."""
    make = lambda: llama.build(llama.preset("smoke"), 256)
    model = make() if layout is None else layout.attach(layout.build(make))
    return nnx.split(SCHEME.quantized(model), nnx.Param, ...)


def batch(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, (rows, 33)).astype(np.int32)


def mean_of_parts(split, tokens, rests):
    """Mean loss and gradient of equal parts of the tokens, each with keys of its own."""
    graph, params, _ = split
    parts = [
        jax.jit(gradients.whole, static_argnums=0)(graph, params, rest, part)
        for rest, part in zip(rests, np.split(tokens, len(rests)), strict=True)
    ]
    return jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), 0), *parts)


def assert_close(found, wanted):
    """To sums in another order; another draw is .8 of the gradient away."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b)


def test_keys_are_those_of_their_number():
    _, _, rest = small()
    numbers = lambda tree: [np.asarray(leaf) for leaf in jax.tree.leaves(keys.as_numbers(tree))]
    same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(numbers(a), numbers(b), strict=True))
    assert same(keys.of_number(rest, 3), keys.of_number(rest, 3))
    assert not same(keys.of_number(rest, 3), keys.of_number(rest, 4))
    assert same(keys.from_numbers(keys.as_numbers(rest), rest), rest)
    assert keys.of_number({"a": np.ones(2)}, 3)["a"].sum() == 2  # nothing to draw


def test_each_microbatch_draws_its_own_keys():
    graph, params, rest = split = small()
    tokens = batch(2)
    cut = lambda params, tokens: gradients.accumulated(graph, params, rest, tokens, microbatches=2)
    found = jax.jit(cut)(params, tokens.reshape(2, 1, -1))
    assert_close(found, mean_of_parts(split, tokens, [keys.of_number(rest, i) for i in range(2)]))


def test_each_device_draws_its_own_keys():
    layout = Layout(mesh=lb.parallel.make_mesh(data=2))
    graph, params, rest = small(layout)
    shards = lambda params, tokens: gradients.on_shards(graph, params, rest, tokens, None, (), layout=layout,
                                                        microbatches=1)[:2]  # fmt: skip
    tokens = batch(2)
    found = jax.jit(shards)(params, layout.batch(tokens))
    plain = small()
    assert_close(found, mean_of_parts(plain, tokens, [keys.of_number(keys.of_number(plain[2], i), 0) for i in (0, 1)]))


@pytest.mark.slow
def test_a_killed_run_draws_the_same_keys_again(tmp_path, monkeypatch):
    """The curve of a run that died is that of one that did not, to the last bit."""
    died = dataclasses.replace(settings(tmp_path, method="quartet", steps=6), checkpoint_every=2, log_every=1)
    whole = dataclasses.replace(died, out=tmp_path / "whole")
    pretrain.main(whole)
    update = display.Progress.update

    def dying(self, step, *values):
        if step == 5:
            raise Killed
        return update(self, step, *values)

    with monkeypatch.context() as patch:
        patch.setattr(display.Progress, "update", dying)
        with pytest.raises(Killed):
            pretrain.main(died)
    monkeypatch.setattr(pretrain.deliver.Delivery, "make", lambda *_: None)
    pretrain.main(died)
    assert curve(died, "quartet") == curve(whole, "quartet")
