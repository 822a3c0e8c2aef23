"""Step time, compile time and memory of training steps, measured side by side.

Timings on a shared machine drift by more than the differences looked for. So all programs live in one process, every
round runs each of them once in a random order, and what is reported is the median of the ratios *within* a round.
"""

import dataclasses
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float


class Runs(Protocol):
    def run(self) -> None:
        """Once, and waits for it."""
        ...


@dataclasses.dataclass(slots=True, kw_only=True)
class Program:
    """One compiled training step (forward, backward, AdamW) with its state, and what compiling it cost."""

    step: Callable
    state: tuple  # (parameters, optimizer state): donated to the step and replaced by its answer
    batch: tuple
    trace_s: float
    compile_s: float
    temp_bytes: int  # what the step needs beside its arguments and results
    peak_bytes: int  # with them
    text: Callable[[], str]  # the optimized program

    def run(self) -> None:
        *state, loss = self.step(*self.state, *self.batch)
        self.state = tuple(state)
        loss.block_until_ready()


@dataclasses.dataclass(slots=True)
class Call:
    """A compiled function with its arguments."""

    compiled: Any
    arguments: tuple

    @classmethod
    def of(cls, function: Callable, *arguments: Any) -> "Call":
        return cls(jax.jit(function).lower(*arguments).compile(), arguments)

    def run(self) -> None:
        jax.block_until_ready(self.compiled(*self.arguments))

    @property
    def argument_bytes(self) -> int:
        return self.compiled.memory_analysis().argument_size_in_bytes

    @property
    def temp_bytes(self) -> int:
        return self.compiled.memory_analysis().temp_size_in_bytes


def train_step(model: nnx.Module, loss: Callable) -> tuple[Callable, tuple]:
    """`step(params, opt_state, *batch) -> (params, opt_state, loss)` and its first two arguments."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adamw(1e-4)

    def step(params, opt_state, *batch):
        value, grads = jax.value_and_grad(lambda p: loss(nnx.merge(graph, p, rest), *batch))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step, (params, optimizer.init(params))


def compile_program(model: nnx.Module, loss: Callable[..., Float[Array, ""]], batch: tuple) -> Program:
    """The model's step, compiled from nothing: no cached trace, no cached program."""
    step, state = train_step(model, loss)
    state = jax.tree.map(jnp.copy, state)  # contenders share parameters, and the step donates them
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*state, *batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    memory = compiled.memory_analysis()
    if memory is None:
        raise NotImplementedError(
            f"benchmarks: the {jax.default_backend()} backend does not tell what a program needs."
        )
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(
        step=compiled,
        state=state,
        batch=batch,
        trace_s=traced - start,
        compile_s=done - traced,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=held + memory.temp_size_in_bytes,
        text=lambda: compiled.as_text() or "",
    )


def interleaved_seconds(programs: Mapping[str, Runs], rounds: int, steps: int = 1) -> dict[str, list[float]]:
    """Wall seconds a step of each program, one value a round; the first, uncounted round warms up."""
    seconds = {name: [] for name in programs}
    order = list(programs)
    shuffle = random.Random(0).shuffle
    for number in range(rounds + 1):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            for _ in range(steps):
                programs[name].run()
            if number:
                seconds[name].append((time.perf_counter() - start) / steps)
    return seconds


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the per-round ratios."""
    low, middle, high = np.quantile(np.asarray(seconds) / np.asarray(reference), [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def environment() -> dict[str, str | int | float]:
    """What a reader must know to compare two result files."""
    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "cores": os.cpu_count() or 0,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
