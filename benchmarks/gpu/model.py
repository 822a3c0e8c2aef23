"""A whole model: the training step of QuEST over bfloat16's, and the forward of one token with packed weights."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowbit_jax as lb
from benchmarks.gpu.speed import seconds
from recipes import llama, train_loop


def build(preset: str, bits: int | None, implementation: str, dtype=jnp.bfloat16) -> nnx.Module:
    """The preset's model in bfloat16 compute, its blocks quantized."""
    size = llama.preset(preset)
    model = llama.Llama(size, 256, rngs=nnx.Rngs(0), dtype=dtype)
    if bits is None:
        return model
    return lb.quantize(model, rules=[("blocks", lb.quest(bits).with_implementation(implementation))])


def training(
    preset: str, batch: int, context: int, rounds: int, kinds: dict[str, tuple[int | None, str]]
) -> list[dict]:
    """Milliseconds a step, and the ratio over bfloat16, of each kind: (bits, implementation)."""
    plan = train_loop.Plan.of(llama.preset(preset), batch=batch, context=context)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, context + 1)), jnp.int32)
    states, programs, compile_s = {}, {}, {}
    for name, (bits, implementation) in kinds.items():
        graph, params, rest = nnx.split(build(preset, bits, implementation), nnx.Param, ...)
        state = jax.tree.map(jnp.copy, train_loop.first_state(params, plan.optimizer()))
        step = train_loop.make_step(graph, plan.optimizer())
        start = time.perf_counter()
        compiled = step.lower(state, rest, tokens).compile()
        compile_s[name] = time.perf_counter() - start
        states[name] = state

        def run(name=name, compiled=compiled, rest=rest):
            states[name], numbers = compiled(states[name], rest, tokens)
            return numbers["loss"]

        programs[name] = run
    times = seconds(programs, rounds)
    base = np.asarray(times[next(iter(kinds))])
    return [
        {"step": name, "preset": preset, "tokens": batch * context, "ms": 1e3 * float(np.median(times[name])),
         "ratio": float(np.median(base / np.asarray(times[name]))), "compile_s": compile_s[name]}
        for name in kinds
    ]  # fmt: skip


def one_token(preset: str, batch: int, rounds: int, widths: tuple[int, ...], implementation: str) -> list[dict]:
    """Forward of one token a sequence (no attention cache): the products of a decode step, packed over bfloat16."""
    tokens = jnp.zeros((batch, 1), jnp.int32)
    programs = {}
    for bits in (None, *widths):
        model = build(preset, bits, "reference")
        if bits is not None:
            model = lb.convert(model, layout="planes/1", implementation=implementation)
        graph, state = nnx.split(model)
        if bits is None:
            state = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, state)
        run = jax.jit(lambda state, tokens, graph=graph: nnx.merge(graph, state)(tokens))
        programs["bfloat16" if bits is None else f"w{bits}a{bits}"] = functools.partial(run, state, tokens)
    times = seconds(programs, rounds)
    base = np.asarray(times["bfloat16"])
    return [
        {"model": name, "preset": preset, "batch": batch, "ms": 1e3 * float(np.median(t)),
         "tokens_a_second": batch / float(np.median(t)), "ratio": float(np.median(base / np.asarray(t)))}
        for name, t in times.items()
    ]  # fmt: skip
