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
from recipes import keys
from recipes.layout import Layout

Tree = Any


def next_token_loss(model: nnx.Module, tokens: Int[Array, "batch time"]) -> Float[Array, ""]:
    """Mean cross-entropy in nats of each token given those before it."""
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()


def whole(graph, params: Tree, rest: Tree, tokens: Array, scale: Array | None = None) -> tuple[Array, Tree]:
    """Of the whole batch at once."""
    loss = lambda params: _scaled(next_token_loss(merged(graph, params, rest), tokens), scale)
    return jax.value_and_grad(loss)(params)


def accumulated(graph, params: Tree, rest: Tree, tokens: Array, scale: Array | None = None, *, microbatches: int,
                prepare: Callable | None = None) -> tuple[Array, Tree]:  # fmt: skip
    """Mean over the microbatches, summed in float32; the weights are quantized once and their gradient is taken back
    once."""

    def ready(params):
        model = (prepare or _as_it_is)(merged(graph, params, rest))
        prepared_graph, prepared, prepared_rest = nnx.split(model, nnx.Param, ...)
        return prepared, (prepared_graph, prepared_rest)

    prepared, back, (prepared_graph, prepared_rest) = jax.vjp(ready, params, has_aux=True)

    def loss(prepared, tokens, number):
        model = merged(prepared_graph, prepared, keys.of_number(prepared_rest, number))
        return _scaled(next_token_loss(model, tokens), scale)

    value, gradient = _mean(loss, prepared, tokens)
    if prepare is None:
        return value, gradient
    return value, back(jax.tree.map(lambda g, p: g.astype(p.dtype), gradient, prepared))[0]


def on_shards(graph, params: Tree, rest: Tree, tokens: Array, scale: Array | None, errors: Tree, *, layout: Layout,
              microbatches: int) -> tuple[Array, Tree, Tree]:  # fmt: skip
    """Of each device's share, inside `shard_map`: weights gathered layer by layer, gradients summed as `layout` says.

    Answers with the loss, the gradient, and what the compression has yet to send, in units of the unscaled gradient; a
    gradient that is not finite on one device is NaN on all and leaves that as it was."""
    placed = layout.shardings(params)
    cuts = layout.along(placed, "fsdp")

    def local(params, rest, tokens, scale, errors):
        rest = keys.of_number(rest, jax.lax.axis_index(("data", "fsdp")))

        def loss(params, tokens, number=0):
            model = merged(graph, params, keys.of_number(rest, number))
            model = lb.parallel.gather_layers(model, placed, packed=layout.gather == "packed",
                                              reduction=layout.reduction, shards=layout.ways)  # fmt: skip
            return _scaled(next_token_loss(model, tokens), scale) / layout.mesh.shape["fsdp"]

        if microbatches == 1:
            value, gradient = jax.value_and_grad(loss)(params, tokens)
        else:
            value, gradient = _mean(loss, params, tokens.reshape(microbatches, -1, tokens.shape[-1]))
        gradient = jax.tree.map(lambda g, cut: g if any(cut) else jax.lax.psum(g, "fsdp"), gradient, cuts)
        value = jax.lax.pmean(jax.lax.psum(value, "fsdp"), "data")
        if layout.compress:
            return value, *_compressed(gradient, errors, scale, layout)
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


def _mean(loss: Callable, params: Tree, tokens: Array) -> tuple[Array, Tree]:
    """Mean of loss(params, tokens, number) and its gradient over the leading axis of `tokens`, in float32."""
    microbatches = tokens.shape[0]

    def one(total, cut):
        answer = jax.value_and_grad(loss)(params, *cut)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32) / microbatches, total, answer), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    return jax.lax.scan(one, zero, (tokens, jnp.arange(microbatches)))[0]


def _compressed(gradient: Tree, errors: Tree, scale: Array | None, layout: Layout) -> tuple[Tree, Tree]:
    """The gradient's mean over `data` in few bits, in the units it came in, and the new errors.

    Whether it is finite is asked over the whole mesh, so that no shard of a parameter moves on alone; errors outlive
    the loss scale of a step, so it is taken out before."""
    good = jax.lax.pmin(lb.optim.all_finite(gradient, "data").astype(jnp.int32), "fsdp") > 0
    inverse = 1.0 if scale is None else 1 / scale
    true = jax.tree.map(lambda g: jnp.where(good, g * inverse, jnp.nan), gradient)
    mean, state = layout.compressor().update(true, errors)
    return (mean if scale is None else jax.tree.map(lambda g: g * scale, mean)), state


def _scaled(loss: Array, scale: Array | None) -> Array:
    return loss if scale is None else loss * scale


def merged(graph, params: Tree, rest: Tree) -> nnx.Module:
    """The model of this trace: `rest` may come from outside of it, and counters of its random keys move."""
    return nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, rest))


def _as_it_is(model: nnx.Module) -> nnx.Module:
    return model
