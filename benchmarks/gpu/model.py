"""A whole model: the training step of QuEST over bfloat16's, and the forward of one token with packed weights."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowbit_jax as lb
from benchmarks.gpu.speed import seconds
from recipes import llama, train_loop


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a training step computes with: bits None is bfloat16; backward 8 has int8 cotangents."""

    name: str
    bits: int | None = None
    backward: int | None = None
    implementation: str = "auto"

    def quantized(self, model: nnx.Module) -> nnx.Module:
        if self.bits is None:
            return model
        recipe = lb.quest(self.bits, backward=self.backward).with_implementation(self.implementation)
        return lb.quantize(model, rules=[("blocks", recipe)])


KINDS = (
    Kind(name="bfloat16"),
    Kind(name="quest w8a8", bits=8),
    Kind(name="quest w4a4", bits=4),
    Kind(name="quest w4a4, int8 backward", bits=4, backward=8),
    Kind(name="quest w8a8, int8 backward", bits=8, backward=8),
    Kind(name="quest w4a4 by XLA", bits=4, implementation="reference"),
)


def build(preset: str, dtype=jnp.bfloat16) -> nnx.Module:
    """The preset's model with bfloat16 compute."""
    return llama.Llama(llama.preset(preset), 256, rngs=nnx.Rngs(0), dtype=dtype)


def training_step(kind: Kind, preset: str, batch: int, context: int) -> tuple[Any, tuple]:
    """The jitted training step, and its arguments: the state, what of the model does not train, tokens."""
    plan = train_loop.Plan.of(llama.preset(preset), batch=batch, context=context)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, context + 1)), jnp.int32)
    graph, params, rest = nnx.split(kind.quantized(build(preset)), nnx.Param, ...)
    state = jax.tree.map(jnp.copy, train_loop.first_state(params, plan.optimizer()))
    return train_loop.make_step(graph, plan.optimizer()), (state, rest, tokens)


def training(preset: str, batch: int, context: int, rounds: int, kinds: Sequence[Kind] = KINDS) -> list[dict]:
    """Milliseconds a step of each kind, and the ratio over the first."""
    states, programs, compile_s, temporaries = {}, {}, {}, {}
    for kind in kinds:
        step, (states[kind.name], *rest) = training_step(kind, preset, batch, context)
        start = time.perf_counter()
        compiled = step.lower(states[kind.name], *rest).compile()
        compile_s[kind.name] = time.perf_counter() - start
        memory = compiled.memory_analysis()
        temporaries[kind.name] = None if memory is None else memory.temp_size_in_bytes / 2**30

        def run(name=kind.name, compiled=compiled, rest=rest):
            states[name], numbers = compiled(states[name], *rest)
            return numbers["loss"]

        programs[kind.name] = run
    times = seconds(programs, rounds)
    base = np.asarray(times[kinds[0].name])
    return [
        {"step": name, "preset": preset, "tokens": batch * context, "ms": 1e3 * float(np.median(times[name])),
         "ratio": float(np.median(base / np.asarray(times[name]))), "compile_s": compile_s[name],
         "temp_gib": temporaries[name]}
        for name in programs
    ]  # fmt: skip


def one_token(
    preset: str, batch: int, rounds: int, recipes: dict[str, lb.LinearRecipe], implementation: str
) -> list[dict]:
    """Forward of one token a sequence (no attention cache): the products of a decode step, packed over bfloat16."""
    tokens = jnp.zeros((batch, 1), jnp.int32)
    programs = {}
    for name, recipe in {"bfloat16": None, **recipes}.items():
        model = build(preset)
        if recipe is not None:
            quantized = lb.quantize(model, rules=[("blocks", recipe.with_implementation("reference"))])
            model = lb.convert(quantized, layout="planes/1", implementation=implementation)
        graph, state = nnx.split(model)
        if recipe is None:
            state = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, state)
        run = jax.jit(lambda state, tokens, graph=graph: nnx.merge(graph, state)(tokens))
        programs[name] = functools.partial(run, state, tokens)
    times = seconds(programs, rounds)
    base = np.asarray(times["bfloat16"])
    return [
        {"model": name, "preset": preset, "batch": batch, "ms": 1e3 * float(np.median(t)),
         "tokens_a_second": batch / float(np.median(t)), "ratio": float(np.median(base / np.asarray(t)))}
        for name, t in times.items()
    ]  # fmt: skip
