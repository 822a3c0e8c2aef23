"""Loss and gradient of one step: on the whole batch, in microbatches, or on each device's own share of the batch.

Each is a function (params, rest, tokens, scale) -> (loss, gradient); `scale` multiplies the loss for float16, else 1 is
not even multiplied. `rest` is the model's state that is not trained."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

import lowbit_jax as lb
from recipes.layout import Layout

Tree = Any


def next_token_loss(model: nnx.Module, tokens: Int[Array, "batch time"]) -> Float[Array, ""]:
    """Mean cross-entropy in nats of each token given those before it."""
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()


def whole(graph, params: Tree, rest: Tree, tokens: Array, scale: Array | None = None) -> tuple[Array, Tree]:
    """Of the whole batch at once."""
    loss = lambda params: _scaled(next_token_loss(nnx.merge(graph, params, rest), tokens), scale)
    return jax.value_and_grad(loss)(params)


def accumulated(graph, params: Tree, rest: Tree, tokens: Array, scale: Array | None = None, *, microbatches: int,
                prepare: Callable | None = None) -> tuple[Array, Tree]:  # fmt: skip
    """Mean over the microbatches; the weights are quantized once and their gradient is taken back once."""

    def ready(params):
        model = (prepare or _as_it_is)(nnx.merge(graph, params, rest))
        prepared_graph, prepared, prepared_rest = nnx.split(model, nnx.Param, ...)
        return prepared, (prepared_graph, prepared_rest)

    prepared, back, (prepared_graph, prepared_rest) = jax.vjp(ready, params, has_aux=True)

    def one(total, tokens):
        value, gradient = jax.value_and_grad(
            lambda prepared: _scaled(next_token_loss(nnx.merge(prepared_graph, prepared, prepared_rest), tokens), scale)
        )(prepared)
        return jax.tree.map(lambda a, b: a + b / microbatches, total, (value, gradient)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, prepared))
    (value, gradient), _ = jax.lax.scan(one, zero, tokens)
    return value, back(gradient)[0]


def on_shards(graph, params: Tree, rest: Tree, tokens: Array, scale: Array | None, errors: Tree, *, layout: Layout,
              microbatches: int) -> tuple[Array, Tree, Tree]:  # fmt: skip
    """Of each device's share, inside `shard_map`: weights gathered layer by layer, gradients summed as `layout` says.

    Answers with the loss, the gradient, and what the compression has yet to send."""
    placed = layout.shardings(params)
    cuts = layout.along(placed, "fsdp")

    def local(params, rest, tokens, scale, errors):
        def loss(params, tokens):
            model = lb.parallel.gather_layers(nnx.merge(graph, params, rest), placed, packed=layout.gather == "packed",
                                              reduction=layout.reduction)  # fmt: skip
            return _scaled(next_token_loss(model, tokens), scale) / layout.mesh.shape["fsdp"]

        def one(total, tokens):
            answer = jax.value_and_grad(loss)(params, tokens)
            return jax.tree.map(lambda a, b: a + b / microbatches, total, answer), None

        if microbatches == 1:
            value, gradient = jax.value_and_grad(loss)(params, tokens)
        else:
            zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
            (value, gradient), _ = jax.lax.scan(one, zero, tokens.reshape(microbatches, -1, tokens.shape[-1]))
        gradient = jax.tree.map(lambda g, cut: g if any(cut) else jax.lax.psum(g, "fsdp"), gradient, cuts)
        value = jax.lax.pmean(jax.lax.psum(value, "fsdp"), "data")
        if layout.compress:
            gradient, state = layout.compressor().update(gradient, errors)
            return value, gradient, state
        n = layout.mesh.shape["data"]
        return value, jax.tree.map(lambda g: layout.reduction.everywhere(g, "data") / n, gradient), errors

    whole = jax.sharding.PartitionSpec()
    spec = jax.tree.map(lambda _: whole, rest)
    error_specs = layout.error_specs(errors, params)
    mapped = jax.shard_map(
        local, mesh=layout.mesh, in_specs=(cuts, spec, layout.batch_spec, whole, error_specs),
        out_specs=(whole, cuts, error_specs), check_vma=False,
    )  # fmt: skip
    return mapped(params, rest, tokens, scale, errors)


def _scaled(loss: Array, scale: Array | None) -> Array:
    return loss if scale is None else loss * scale


def _as_it_is(model: nnx.Module) -> nnx.Module:
    return model
