"""One model, trained to its last step: the jitted step, and the loop that logs, saves, resumes and stops.

A run that is killed at any point and started again computes the same numbers to the last bit: a checkpoint holds the
parameters, the optimizer's state, the counters and the position in the data, and the metrics file is cut back to it."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

import lowbit_jax as lb
from recipes import display, llama, metrics, optimizer, run_directory, text
from recipes.checkpoints import Checkpoints

MOST_SKIPS_IN_A_ROW = 25


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one run needs beyond its model and corpus."""

    steps: int
    batch: int
    context: int
    learning_rate: float
    warmup: float = 0.1
    weight_decay: float = 0.1
    microbatches: int = 1
    seed: int = 0
    validation_windows: int = 256
    evaluate_every: int = 100
    checkpoint_every: int = 50
    keep: int = 2
    log_every: int = 10
    tensorboard: bool = True

    def __post_init__(self):
        for name in ("steps", "batch", "context", "microbatches", "validation_windows", "evaluate_every",
                     "checkpoint_every", "keep", "log_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"train_loop: {name} must be at least 1, not {getattr(self, name)}.")
        if self.batch % self.microbatches:
            raise ValueError(
                f"train_loop: {self.batch} sequences cannot be cut into {self.microbatches} microbatches; take a"
                " divisor."
            )
        self.optimizer().schedule()  # checks the rate

    def optimizer(self) -> optimizer.AdamW:
        return optimizer.AdamW(
            peak=self.learning_rate, steps=self.steps, warmup=self.warmup, weight_decay=self.weight_decay
        )

    @classmethod
    def of(cls, size: llama.LlamaConfig, settings=None, **more) -> "Plan":
        """Steps, batch, context and rate from a preset; what else has the same name in `settings`, and `more`."""
        names = [field.name for field in dataclasses.fields(cls)]
        values = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
        values |= {name: getattr(size, name) for name in names if hasattr(size, name)}
        return cls(**(values | more))


class Stopped(Exception):
    """A signal asked the run to stop; everything is saved."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.status = 128 + signal


class Diverged(RuntimeError):
    """Too many steps in a row gave a loss or gradient that is not finite."""


@dataclasses.dataclass(frozen=True)
class Trained:
    model: nnx.Module
    validation_loss: float
    lines: list[dict]  # of metrics.jsonl
    tokens_per_second: float
    skipped: int


def train(name: str, model: nnx.Module, corpus: text.Corpus, plan: Plan, folder: pathlib.Path,
          stop: run_directory.StopRequest | None = None, *, quantized: bool = False) -> Trained:  # fmt: skip
    """Trains `model`, from `lb.quantize` if `quantized`; goes on from the newest good checkpoint in `folder/name`."""
    corpus.check(plan.context, plan.batch)
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    state = first_state(params, plan.optimizer())
    data = text.batches(corpus.train, context=plan.context, batch=plan.batch, seed=plan.seed)
    held = text.fixed_batches(
        corpus.validation, context=plan.context, batch=plan.batch, windows=plan.validation_windows
    )
    checkpoints = Checkpoints(folder / "checkpoints", plan.keep)

    start = 0
    if found := checkpoints.latest(state):
        start, state, extra = found
        data.set_state(extra["data"])
        print(f"{name} | resumes after step {start} from {folder}")
    prepare = lb.nn.prepare if quantized else None
    step_function = make_step(graph, plan.optimizer(), plan.microbatches, prepare)
    schedule = plan.optimizer().schedule()
    progress = display.Progress(name, start=start, steps=plan.steps, tokens_per_step=plan.batch * plan.context)
    waiting = []
    with metrics.Metrics(folder, after_step=start, tensorboard=plan.tensorboard) as log, progress:
        for step in range(start + 1, plan.steps + 1):
            state, values = step_function(state, rest, next(data))
            waiting.append((step, values))
            last, asked = step == plan.steps, None if stop is None else stop.signal
            saving = last or asked is not None or step % plan.checkpoint_every == 0
            evaluating = last or step % plan.evaluate_every == 0
            if saving or evaluating or step % plan.log_every == 0:
                values = _write(log, waiting, schedule)
                speed = progress.update(step, values["loss"], int(state["skipped"]))
                log.time(step, tokens_per_second=speed)
            if evaluating:
                log.step(step, validation_loss=evaluate(nnx.merge(graph, state["params"], rest), held))
            if saving:
                log.flush()
                checkpoints.save(step, state, data=data.get_state())
            if asked is not None and not last:
                said = f"{name} stopped after step {step} of {plan.steps}; the same command goes on from there."
                raise Stopped(said, asked)
    lines = metrics.read(folder / "metrics.jsonl")
    final = next(line["validation_loss"] for line in reversed(lines) if "validation_loss" in line)
    speeds = [line["tokens_per_second"] for line in metrics.read(folder / "timing.jsonl")]
    speed = float(np.median([value for value in speeds if value] or [0.0]))
    return Trained(nnx.merge(graph, state["params"], rest), final, lines, speed, int(state["skipped"]))


def first_state(params, adamw: optimizer.AdamW) -> dict:
    moments = adamw.transformation().init(params)
    return {"params": params, "optimizer": moments, "skipped": jnp.int32(0), "in_a_row": jnp.int32(0)}


@functools.cache  # one compilation for all seeds of a model
def make_step(graph, adamw: optimizer.AdamW, microbatches: int = 1, prepare=None):
    """(state, rest, tokens) -> (state, metrics). A step that is not finite moves nothing and is counted.

    `rest` is the model's state that is not trained; `prepare` quantizes its weights once for all microbatches."""
    transform = adamw.transformation()

    def whole(params, rest, tokens):
        return jax.value_and_grad(lambda params: next_token_loss(nnx.merge(graph, params, rest), tokens))(params)

    def accumulated(params, rest, tokens):
        """Mean over the microbatches; the weights are quantized once and their gradient is taken back once."""

        def ready(params):
            model = (prepare or _as_it_is)(nnx.merge(graph, params, rest))
            prepared_graph, prepared, prepared_rest = nnx.split(model, nnx.Param, ...)
            return prepared, (prepared_graph, prepared_rest)

        prepared, back, (prepared_graph, prepared_rest) = jax.vjp(ready, params, has_aux=True)

        def one(total, tokens):
            value, gradient = jax.value_and_grad(
                lambda prepared: next_token_loss(nnx.merge(prepared_graph, prepared, prepared_rest), tokens)
            )(prepared)
            return jax.tree.map(lambda a, b: a + b / microbatches, total, (value, gradient)), None

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, prepared))
        (value, gradient), _ = jax.lax.scan(one, zero, tokens.reshape(microbatches, -1, tokens.shape[-1]))
        return value, back(gradient)[0]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, rest, tokens):
        params = state["params"]
        value, gradient = (accumulated if microbatches > 1 else whole)(params, rest, tokens)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, after = transform.update(gradient, state["optimizer"], params)
        moved = (optax.apply_updates(params, updates), after)
        params, after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, (params, state["optimizer"]))
        bad = (~finite).astype(jnp.int32)
        counters = {"skipped": state["skipped"] + bad, "in_a_row": (state["in_a_row"] + bad) * bad}
        numbers = {"loss": value, "gradient_norm": norm, **counters}
        return {"params": params, "optimizer": after, **counters}, numbers

    return step


def next_token_loss(model: nnx.Module, tokens: Int[Array, "batch time"]) -> Float[Array, ""]:
    """Mean cross-entropy in nats of each token given those before it."""
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()


def _as_it_is(model: nnx.Module) -> nnx.Module:
    return model


_loss = jax.jit(next_token_loss)


def evaluate(model: nnx.Module, batches: list[np.ndarray]) -> float:
    """Mean loss over held-out batches of one size, in nats a token."""
    return float(np.mean([float(_loss(model, batch)) for batch in batches]))


def _write(log: metrics.Metrics, waiting: list, schedule: optax.Schedule) -> dict:
    """Fetches and writes the steps that wait; answers with the last one."""
    for step, values in waiting:
        values = {name: value.item() for name, value in jax.device_get(values).items()}
        in_a_row, skipped = values.pop("in_a_row"), values.pop("skipped")
        note = {"skipped": skipped} if in_a_row else {}  # only a skipped step says so
        log.step(step, **values, learning_rate=np.asarray(schedule(step - 1 - skipped)).item(), **note)
        if in_a_row >= MOST_SKIPS_IN_A_ROW:
            log.flush()
            raise Diverged(
                f"{in_a_row} steps in a row up to step {step} had a loss or gradient that is not finite; all skipped."
                " Lower --learning-rate, or use --dtype float32; the last checkpoint is good."
            )
    waiting.clear()
    return values
