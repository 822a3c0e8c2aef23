"""Run in a process of its own: one step's loss and gradients of the Llama recipe on meshes of 8 virtual devices.

    python -m tests.recipes.every_mesh '{"bits": 4, "meshes": [[2, 2, 2]], "gather": "float"}'

Prints JSON: for each mesh the differences to one device, and what was sent. A plain module, so that pytest's own
process keeps its devices."""

import json
import os
import sys

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowbit_jax as lb
from recipes import gradients, llama
from recipes.layout import Layout

jax.config.update("jax_disable_most_optimizations", True)
# One query head a group: heads of a group answer alike at the first position, and their rotation is exactly zero in
# places, where the order of a sum decides what a mid-rise grid makes of it.
SIZE = dataclasses.replace(llama.preset("smoke"), width=128, heads=8, kv_heads=8, ffn=256, batch=8)
TOKENS = np.random.default_rng(0).integers(0, 250, (8, 33)).astype(np.int32)


def model(bits, weight_only):
    made = llama.build(SIZE, 256, dtype="float32", remat="full")
    if bits is None:
        return made
    return lb.quantize(made, rules=[("blocks", lb.quest(bits, activations=not weight_only))])


def one_device(graph, params, rest):
    step = jax.jit(lambda params, tokens: gradients.whole(graph, params, rest, tokens))
    return lambda tokens: step(params, tokens)


def on_mesh(graph, params, rest, shape, **options):
    """A function of a batch as `one_device` gives it, and what its program sends."""
    layout = Layout(mesh=lb.parallel.make_mesh(dict(zip(lb.parallel.AXES, shape, strict=True))), **options)
    merged = layout.attach(nnx.merge(graph, params, rest))
    graph = nnx.split(merged, nnx.Param, ...)[0]
    placed = layout.shardings(params)

    def step(params, tokens):
        if layout.on_shards:
            return gradients.on_shards(graph, params, rest, tokens, None, (), layout=layout, microbatches=1)[:2]
        value, gradient = gradients.whole(graph, params, rest, tokens)
        return value, jax.lax.with_sharding_constraint(gradient, placed)

    put = layout.place(params, placed)
    compiled = jax.jit(step).lower(put, layout.batch(TOKENS)).compile()
    return lambda tokens: compiled(put, layout.batch(tokens)), lb.parallel.bytes_on_the_wire(compiled)


def difference(expected, found) -> tuple[float, float]:
    """Of the losses, and the largest of the gradients of a parameter relative to its norm."""
    pairs = zip(jax.tree.leaves(expected[1]), map(np.asarray, jax.tree.leaves(found[1])), strict=True)
    return abs(float(found[0] - expected[0])), max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) for a, b in pairs)


def without_decision_points(one, mesh, close: float) -> tuple[np.ndarray, list[int]]:
    """The batch with its rows at decision points replaced by others, and which they were.

    A row is at one when eight copies of it, in the same two programs, differ by more than the order of sums does: an
    activation rounded to the other side there, and all that reads it followed."""
    alone = [np.repeat(TOKENS[row : row + 1], len(TOKENS), axis=0) for row in range(len(TOKENS))]
    apart = [row for row, tokens in enumerate(alone) if max(difference(one(tokens), mesh(tokens))) > close]
    kept = [row for row in range(len(TOKENS)) if row not in apart]
    return TOKENS[[kept[row % len(kept)] if row in apart else row for row in range(len(TOKENS))]], apart


def main(bits=None, weight_only=False, meshes=(), close=1e-4, **options) -> list[dict]:
    """`meshes`: shapes, or pairs of a shape and more options for it."""
    graph, params, rest = nnx.split(model(bits, weight_only), nnx.Param, ...)
    one = one_device(graph, params, rest)
    expected, rows = one(TOKENS), []
    for shape in meshes:
        shape, more = shape if isinstance(shape[-1], dict) else (shape, {})
        mesh, wire = on_mesh(graph, params, rest, shape, **options | more)
        found = mesh(TOKENS)
        (loss_error, gradient_error), apart = difference(expected, found), []
        if max(loss_error, gradient_error) > close and bits is not None and not (options | more).get("reduce"):
            tokens, apart = without_decision_points(one, mesh, close)
            loss_error, gradient_error = difference(one(tokens), mesh(tokens))
        placed = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(found[1])}
        rows.append({"mesh": shape, "loss": float(expected[0]), "loss_error": loss_error,
                     "gradient_error": gradient_error, "apart": apart, "sent": wire.sent, "by_kind": wire.by_kind(),
                     "by_dtype": {kind: wire.of(dtypes=[kind]).sent for kind in ("u8", "u16", "f32")},
                     "cuts": sorted(placed)})  # fmt: skip
    return rows


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
