"""What decays, and what is a learned step, in the trees of both Flax interfaces."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx

import lowbit_jax as lb
from lowbit_jax.optim.moments import is_stored
from lowbit_jax.optim.trees import named_leaves

TREE = {
    "embed": {"embedding": jnp.ones((8, 4))},
    "blocks": {
        "attention": {"qkv": {"kernel": jnp.ones((4, 12)), "bias": jnp.ones(12)}},
        "input_norm": {"scale": jnp.ones((2, 4))},
        "mlp": {"kernel": jnp.ones((4, 8)), "lhs_scale": jnp.ones(()), "rhs_scale": jnp.ones(())},
    },
    "lm_head": {"kernel": jnp.ones((4, 8))},
}


def true_paths(mask):
    return {name for name, value in named_leaves(mask).items() if value}


def test_decay_mask():
    matrices = {"blocks/attention/qkv/kernel", "blocks/mlp/kernel"}
    steps = {"blocks/mlp/lhs_scale", "blocks/mlp/rhs_scale"}
    assert true_paths(lb.optim.decay_mask()(TREE)) == matrices | steps
    assert true_paths(lb.optim.decay_mask(learned_steps=False)(TREE)) == matrices
    assert "lm_head/kernel" in true_paths(lb.optim.decay_mask(excluded=("norm",))(TREE))
    with pytest.raises(ValueError, match="nothing would decay among a"):
        lb.optim.decay_mask()({"a": jnp.ones(3)})


def test_parts_of_names_do_not_count():
    stacked = {
        "input_layernorm": {"weight": 0},
        "rmsnorm": {"w": 0},
        "ln_1": {"g": 0},
        "classifier_head": {"kernel": 0},
    }
    decayed = {"multi_head_attention": {"query": {"kernel": 0}}, "heads_proj": {"kernel": 0}, "scaled_attn": {"w": 0}}
    tree = jax.tree.map(lambda _: jnp.ones((4, 64)), stacked | decayed)
    assert true_paths(lb.optim.decay_mask()(tree)) == set(named_leaves(decayed))


def test_norms_are_words_or_the_ends_of_words():
    norms = "RMSNorm_0 LayerNorm norm1 first_norm attention_norm rmsnorm BatchNorm_3 q_norm norms LayerNormalization_0"
    others = "normal_proj renormalize normalizer abnormal_gate normed_proj"
    tree = {name: {"kernel": jnp.ones((4, 64))} for name in f"{norms} {others}".split()}
    assert true_paths(lb.optim.decay_mask()(tree)) == {f"{name}/kernel" for name in others.split()}


def test_embeddings_are_those_of_low_bit_states():
    """One list says what an embedding is: these keep their moments in float32, and do not decay."""
    matrix, names = jnp.ones((64, 64)), ("tok_emb", "emb", "Embed_0", "wte", "pos_embed", "q")
    tree = {name: {"table": matrix} for name in names}
    assert true_paths(lb.optim.decay_mask()(tree)) == {"q/table"}
    state = lb.optim.adamw_low_bit(1e-3).init(tree)
    stored = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_stored) if is_stored(leaf)]
    assert len(stored) == 2  # both moments of q


def test_decays_what_it_says():
    tx = optax.adamw(1.0, weight_decay=0.5, mask=lb.optim.decay_mask())
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, TREE), tx.init(TREE), TREE)
    assert true_paths(jax.tree.map(lambda u: bool(jnp.any(u)), updates)) == true_paths(lb.optim.decay_mask()(TREE))


def test_learned_steps_of_both_interfaces_have_their_own_optimizer():
    x = jnp.ones((2, 64))
    view = lb.quantize(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), lb.methods.get("lsq", bits=4))
    dense = lb.quantize(linen.Dense(32), lb.methods.get("lsq", bits=4))
    for params in (nnx.state(view, nnx.Param), dense.init(jax.random.key(0), x)["params"]):
        labels = lb.optim.label_learned_steps()(params)
        found = sorted(label for label in jax.tree.leaves(labels))
        assert found == ["step", "step", "weight", "weight"]
        tx = optax.multi_transform({"weight": optax.sgd(0.0), "step": optax.sgd(1.0)}, lb.optim.label_learned_steps())
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        moved = {name for name, u in named_leaves(updates).items() if jnp.any(u != 0)}
        assert len(moved) == 2 and all("_scale" in name for name in moved)
