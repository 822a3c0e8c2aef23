"""What is not finite ends in a sentence and never in the parameters: settings, updates, checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from recipes import checkpoints, llama, optimizer, train_loop


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Overflowing(optimizer.AdamW):
    """AdamW whose updates are not finite although the gradient is."""

    stays_finite = False

    def transformation(self) -> optax.GradientTransformation:
        spoiled = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u.at[..., :1].set(jnp.nan), updates))
        return optax.chain(optimizer.AdamW(peak=self.peak, steps=self.steps).transformation(), spoiled)


def test_an_update_that_is_not_finite_moves_nothing_and_is_counted():
    graph, params, rest = nnx.split(llama.build(llama.preset("smoke"), 256), nnx.Param, ...)
    adamw = Overflowing(peak=1e-3, steps=10)
    state = train_loop.first_state(params, adamw)
    before = jax.tree.map(np.array, state)
    tokens = np.random.default_rng(0).integers(0, 250, (4, 17)).astype(np.int32)
    state, numbers = train_loop.make_step(graph, adamw)(state, rest, tokens)
    assert np.isfinite(numbers["loss"]) and np.isfinite(numbers["gradient_norm"])
    assert (int(state["skipped"]), int(state["in_a_row"])) == (1, 1)
    for name in ("params", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state[name]), before[name])


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e-8, 1.0, 1e18, 1e19])
def test_a_finite_gradient_gives_a_finite_update(size):
    """The largest and smallest gradients whose norm is finite, in turn with ordinary ones, at the limits of what
    `stays_finite` vouches for; nobody looks at these updates."""
    adamw = optimizer.AdamW(peak=1.0, steps=10, weight_decay=1.0, clip=1e9)
    assert adamw.stays_finite
    params = {"blocks/kernel": jnp.asarray([0.0, 1e-45, -1.0, 1e30], jnp.float32)}
    transform = adamw.transformation()
    update, state = jax.jit(transform.update), transform.init(params)
    for factor in (size, 1.0, size, 0.0, size, size):
        gradient = {"blocks/kernel": factor * jnp.asarray([1.0, -1.0, 0.5, 0.0], jnp.float32)}
        assert jnp.isfinite(optax.tree.norm(gradient))
        updates, state = update(gradient, state, params)
        assert np.isfinite(updates["blocks/kernel"]).all() and np.isfinite(jax.tree.leaves(state)[1]).all()
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("settings", [{"bits": 8}, {"param_dtype": "bfloat16"}, {"weight_decay": 1.5}, {"clip": 1e10}])
def test_other_updates_are_looked_at(settings):
    assert optimizer.AdamW(peak=1e-3, steps=10).stays_finite
    assert not optimizer.AdamW(peak=1e-3, steps=10, **settings).stays_finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_settings_of_the_optimizer(bad):
    for settings in ({"peak": bad}, {"weight_decay": bad}, {"clip": bad}, {"clip": 0.0}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match="finite"):
            optimizer.AdamW(**({"peak": 1e-3, "steps": 10} | settings)).schedule()


def test_a_checkpoint_never_holds_a_parameter_that_is_not_finite(tmp_path):
    store = checkpoints.Checkpoints(tmp_path / "c")
    state = {"params": {"kernel": jnp.ones((3, 5))}, "count": jnp.int32(1)}
    train_loop.save(store, 5, state, {})
    spoiled = {"params": {"kernel": jnp.ones((3, 5)).at[2, 1].set(jnp.inf)}, "count": jnp.int32(1)}
    with pytest.raises(train_loop.Diverged, match=r"after step 10 are not finite.*not saved.*\[5\]"):
        train_loop.save(store, 10, spoiled, {})
    assert store.steps() == [5]
