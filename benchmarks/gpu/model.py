"""A whole model: the training step of QuEST over bfloat16's, and the forward of one token with packed weights."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lowbit_jax as lb
from benchmarks.gpu import profile
from benchmarks.gpu.course import Course
from benchmarks.gpu.speed import seconds
from recipes import llama, train_loop


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a training step computes with: recipe None is bfloat16."""

    name: str
    recipe: lb.LinearRecipe | None = None

    def quantized(self, model: nnx.Module) -> nnx.Module:
        return model if self.recipe is None else lb.quantize(model, rules=[("blocks", self.recipe)])


KINDS = (
    Kind(name="bfloat16"),
    Kind(name="quest w8a8", recipe=lb.quest(8)),
    Kind(name="quest w4a4", recipe=lb.quest(4)),
    Kind(name="quest w4a4, int8 backward", recipe=lb.quest(4, backward=8)),
    Kind(name="quest w8a8, int8 backward", recipe=lb.quest(8, backward=8)),
    Kind(name="switchback", recipe=lb.methods.switchback()),
    Kind(name="fp8 by tensor", recipe=lb.methods.fp8()),
    Kind(name="fp8 by row", recipe=lb.methods.fp8("row")),
)


ONE_TOKEN = {"w4a16": lb.quest(4, activations=False), "w4a4": lb.quest(4), "w2a2": lb.quest(2)}
COMPILING = 240.0  # seconds that all programs of a part may take
STEPS = 32  # tokens that one program decodes


def build(preset: str, dtype=jnp.bfloat16, attention: str = "auto") -> llama.Llama:
    """The preset's model with bfloat16 compute."""
    return llama.Llama(llama.preset(preset), 256, rngs=nnx.Rngs(0), dtype=dtype, attention=attention)


def training_step(kind: Kind, preset: str, batch: int, context: int, attention: str = "auto") -> tuple[Any, tuple]:
    """The jitted training step, and the shapes of its arguments: the state, what does not train, tokens."""
    plan = train_loop.Plan.of(llama.preset(preset), batch=batch, context=context)
    model = nnx.eval_shape(lambda: kind.quantized(build(preset, attention=attention)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    state = jax.eval_shape(lambda params: train_loop.first_state(params, plan.optimizer()), params)
    tokens = jax.ShapeDtypeStruct((batch, context + 1), jnp.int32)
    return train_loop.make_step(graph, plan.optimizer()), (state, rest, tokens)


def first(preset: str, batch: int, context: int) -> tuple[Any, Any, Any]:
    """(state, what does not train, tokens) of a step; the state serves every kind."""
    plan = train_loop.Plan.of(llama.preset(preset), batch=batch, context=context)

    def made():
        _, params, rest = nnx.split(build(preset), nnx.Param, ...)
        return jax.tree.map(jnp.copy, train_loop.first_state(params, plan.optimizer())), rest

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, context + 1)), jnp.int32)
    return *jax.jit(made)(), tokens


def training(preset: str, batch: int, context: int, course: Course, kinds: Sequence[Kind] = KINDS) -> Iterator[dict]:
    """One row a kind as soon as it is timed: milliseconds a step and the ratio over the first. When all are, as long as
    there is time, a row gets the kernels that take most of it."""
    rows = []
    try:
        for row in _training(preset, batch, context, course, kinds, "auto"):
            rows.append(row)
            yield row
        return
    except Exception as error:
        if rows or "dnn" not in str(error).lower():
            raise
        said = f"{type(error).__name__}: {str(error)[:1000]}"  # cuDNN is not part of JAX
        print(f"training: {said}; again with XLA's attention", flush=True)
    yield from _training(preset, batch, context, course, kinds, "xla")


def _training(preset, batch, context, course, kinds, attention) -> Iterator[dict]:
    """All kinds train one state in turn: several would not fit beside each other."""

    def compiled(kind: Kind):
        step, arguments = training_step(kind, preset, batch, context, attention)
        start = time.perf_counter()
        program = step.lower(*arguments).compile()
        return program, time.perf_counter() - start, program.memory_analysis()

    wanted = [kind for kind in kinds if course.wants(kind.name)]
    first_too = [*wanted, *(kind for kind in kinds[:1] if wanted and kind not in wanted)]  # the ratios are over it
    with ThreadPoolExecutor() as pool:
        made = {}
        for kind, job in [(kind, pool.submit(compiled, kind)) for kind in first_too]:
            course.now(f"compiling {kind.name}", COMPILING)
            made[kind.name] = job.result()
    if not made:
        return
    course.now("drawing the state")
    state, rest, tokens = first(preset, batch, context)
    held = [state]

    def run(program):
        held[0], numbers = program(held[0], rest, tokens)
        return numbers["loss"]

    programs = {name: functools.partial(run, program) for name, (program, *_) in made.items()}
    base, rows = kinds[0].name, []
    for kind in wanted:
        name, (_, compile_s, memory) = kind.name, made[kind.name]
        if not course.wants(name):
            continue
        course.now(name)
        times = seconds({each: programs[each] for each in (base, name)}, course.rounds, calls=2)
        ratios = np.asarray(times[base]) / np.asarray(times[name])
        rows.append({
            "step": name, "preset": preset, "attention": attention, "tokens": batch * context,
            "loss": float(programs[name]()), "ms": 1e3 * float(np.median(times[name])),
            "ratio": float(np.median(ratios)), "compile_s": compile_s,
            "temp_gib": None if memory is None else memory.temp_size_in_bytes / 2**30,
        })  # fmt: skip
        yield rows[-1]
    for row in rows:
        if not course.over():
            course.now(f"profiling {row['step']}")
            row |= kernels_of(programs[row["step"]], 80)


def kernels_of(run: Callable, most: int, steps: int = 1) -> dict:
    """Milliseconds of a step on the device, and of the kernels that take most of it; None where the profiler does not
    work. steps: of one run."""
    try:
        kernels = profile.kernel_seconds(run)
    except Exception as error:  # CUPTI may be absent or locked; the times by the clock are there
        return {"device_ms": None, "kernels_ms": {}, "profiler": f"{type(error).__name__}: {error}"}
    longest = {name: round(1e3 * t / steps, 4) for name, t in list(kernels.items())[:most]}
    return {"device_ms": 1e3 * sum(kernels.values()) / steps, "kernels_ms": longest}


def packed(preset: str, recipe: lb.LinearRecipe | None) -> llama.Llama:
    """The preset's model, its blocks packed for the kernels that the recipe asks for; as it is without one."""
    model = build(preset)
    if recipe is None:
        return model
    return lb.convert(lb.quantize(model, rules=[("blocks", recipe)]), layout="planes/1")


def one_token(preset: str, batch: int, course: Course, recipes: Mapping[str, lb.LinearRecipe] = ONE_TOKEN
              ) -> Iterator[dict]:  # fmt: skip
    """Forward of one token a sequence (no attention cache): the products of a decode step, packed over bfloat16. One
    program decodes `STEPS` tokens, each the likeliest after the one before.

    The layers are separate arguments, one after the other: a loop over stacked ones copies each layer's weights out of
    the stack before a kernel reads them."""
    if not course.wants("the forward"):
        return
    tokens = jnp.zeros((batch, 1), jnp.int32)

    def ready(recipe: lb.LinearRecipe | None) -> Callable:
        run, state = laid_out(preset, recipe)
        return functools.partial(jax.jit(decoded(run)).lower(state, tokens).compile(), state, tokens)

    course.now("packing and compiling", COMPILING)
    wanted = {"bfloat16": None, **recipes}
    with ThreadPoolExecutor() as pool:
        programs = dict(zip(wanted, pool.map(ready, wanted.values()), strict=True))
    course.now("the forward")
    times = seconds(programs, course.rounds)
    base = np.asarray(times["bfloat16"])
    rows = [{
        "model": name, "preset": preset, "batch": batch, "ms": 1e3 * float(np.median(t)) / STEPS,
        "tokens_a_second": batch * STEPS / float(np.median(t)), "ratio": float(np.median(base / np.asarray(t))),
    } for name, t in times.items()]  # fmt: skip
    yield from rows
    for row in rows:
        if not course.over():
            course.now(f"profiling {row['model']}")
            row |= kernels_of(programs[row["model"]], 20, STEPS)


def decoded(run: Callable) -> Callable:
    """`(state, tokens) -> the tokens of each step`, [steps, batch], by `run` of one token."""

    def all_of_them(state, tokens):
        def step(tokens, _):
            following = jnp.argmax(run(state, tokens), -1).astype(tokens.dtype)
            return following, following[:, 0]

        return jax.lax.scan(step, tokens, length=STEPS)[1]

    return all_of_them


def laid_out(preset: str, recipe: lb.LinearRecipe | None) -> tuple[Callable, tuple]:
    """What `unrolled` gives of the model, made by one program."""
    runs = []

    def made():
        run, state = unrolled(packed(preset, recipe))
        runs.append(run)
        if recipe is not None:
            return state
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, state)

    state = jax.jit(made)()
    return runs[0], state


def unrolled(model: llama.Llama) -> tuple[Callable, tuple]:
    """`(state, tokens) -> logits` with every layer written out, and the state: that of each layer, and the rest."""
    graph, stacked = nnx.split(model.blocks)
    count = model.config.layers
    layers = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(count)]
    outer = nnx.split((model.embed, model.norm, model.lm_head))

    def run(state, tokens):
        layers, rest = state
        embed, norm, head = nnx.merge(outer[0], rest)
        x = embed(tokens)
        rotary = llama.rotary_table(tokens.shape[1], model.config.head_dim, model.config.rope_theta)
        for layer in layers:
            x = nnx.merge(graph, layer)(x, rotary)
        return head(norm(x))

    return run, (layers, outer[1])
