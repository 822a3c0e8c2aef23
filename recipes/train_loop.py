"""One model, trained to its last step: the jitted step, and the loop that logs, saves, resumes and stops.

A run that is killed at any point and started again computes the same numbers to the last bit: a checkpoint holds the
parameters, the optimizer's state, the counters and the position in the data, and the metrics file is cut back to it."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils

import lowbit_jax as lb
from recipes import display, gradients, keys, llama, memory, metrics, optimizer, out_of_memory, run_directory, text
from recipes.checkpoints import Checkpoints
from recipes.init_from import Origin
from recipes.layout import Layout, fetch
from recipes.ramp import Ramp
from recipes.spikes import Spikes

MOST_SKIPS_IN_A_ROW = 25
MOST_STEPS = 2**31  # which optax counts in int32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one run needs beyond its model and corpus."""

    steps: int
    batch: int
    context: int
    learning_rate: float
    warmup: float = 0.1
    weight_decay: float = 0.1
    microbatches: int | Literal["auto"] = 1
    memory_budget: str | None = None
    batch_ramp: str | None = None
    optimizer_bits: int | str | None = None
    param_dtype: str = "float32"
    dtype: str = "auto"
    seed: int = 0
    validation_windows: int = 256
    evaluate_every: int = 100
    checkpoint_every: int = 50
    keep: int = 2
    log_every: int = 10
    tensorboard: bool = True
    skip_spikes: float | None = None
    on_save_error: Literal["stop", "continue"] = "stop"

    def __post_init__(self):
        for name in ("steps", "batch", "context", "microbatches", "validation_windows", "evaluate_every",
                     "checkpoint_every", "keep", "log_every"):  # fmt: skip
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise ValueError(f"train_loop: {name} must be at least 1, not {getattr(self, name)}.")
        if self.steps >= MOST_STEPS:
            raise ValueError(f"train_loop: --steps must be below {MOST_STEPS} (2**31), and is {self.steps}.")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"train_loop: --seed must lie between 0 and 2**63 - 1, and is {self.seed}.")
        if self.microbatches == "auto":
            memory.budget(self.memory_budget)
        elif self.memory_budget is not None:
            raise ValueError("train_loop: --memory-budget chooses the microbatches; it goes with --microbatches auto.")
        elif self.batch % self.microbatches:
            raise ValueError(
                f"train_loop: {self.batch} sequences cannot be cut into {self.microbatches} microbatches; take a"
                " divisor."
            )
        self.ramp()
        self.optimizer().schedule()  # checks the rate
        self.spikes()
        if self.on_save_error == "continue" and jax.process_count() > 1:
            raise ValueError(
                "train_loop: --on-save-error continue is for one process; several wait for each other in a save."
            )

    def spikes(self) -> Spikes | None:
        return None if self.skip_spikes is None else Spikes(z=self.skip_spikes)

    def ramp(self) -> Ramp:
        return Ramp.of(self.batch_ramp, self.batch, 1 if self.microbatches == "auto" else self.microbatches)

    def optimizer(self) -> optimizer.AdamW:
        return optimizer.AdamW(
            peak=self.learning_rate, steps=self.steps, warmup=self.warmup, weight_decay=self.weight_decay,
            bits=self.optimizer_bits, param_dtype=self.param_dtype, loss_scale=self.dtype == "float16", seed=self.seed,
        )  # fmt: skip

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
    """Too many steps in a row were not finite, or what they led to is not."""


@dataclasses.dataclass(frozen=True)
class Trained:
    model: nnx.Module
    validation_loss: float
    lines: list[dict]  # of metrics.jsonl
    tokens_per_second: float
    skipped: int


def train(name: str, model: nnx.Module, corpus: text.Corpus, plan: Plan, folder: pathlib.Path,
          stop: run_directory.StopRequest | None = None, *, quantized: bool = False,
          layout: Layout | None = None, origin: Origin | None = None) -> Trained:  # fmt: skip
    """Trains `model`, from `lb.quantize` if `quantized`; goes on from the newest good checkpoint in `folder/name`, or
    starts from that of another run, `origin`.

    With a `layout` the state lies on its mesh; several processes run this together, and the first one writes."""
    corpus.check(plan.context, plan.batch)
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    ramp = plan.ramp()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    state = first_state(params, plan.optimizer(), layout, plan.spikes())
    data = text.batches(corpus.train, context=plan.context, batch=ramp.unit, seed=plan.seed)
    held = text.fixed_batches(
        corpus.validation, context=plan.context, batch=plan.batch, windows=plan.validation_windows
    )
    checkpoints = Checkpoints(folder / "checkpoints", plan.keep)

    start, state = _restored(name, state, data, checkpoints, folder, origin)
    if layout is None:
        state = jax.tree.map(jnp.asarray, state)
    else:
        state = layout.place(state, layout.state_shardings(state))
        rest = layout.everywhere(rest)
    if not _finite(state["params"]):
        raise ValueError(f"train_loop: {name} would start from parameters that are not finite (after step {start}).")
    steps = Steps(graph, plan, ramp, lb.nn.prepare if quantized else None, layout)
    steps.choose_microbatches(state, rest)
    schedule = plan.optimizer().schedule()
    progress = display.Progress(name, start=start, steps=plan.steps, tokens_per_step=plan.batch * plan.context)
    waiting = []
    log_class = metrics.Metrics if jax.process_index() == 0 else metrics.Silent
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    needs = lambda: memory.step_bytes(steps.compiled_step(max(ramp.sizes), like, rest))
    one_step = f"{name}: a step of {plan.batch} x {plan.context} tokens"
    with (
        log_class(folder, after_step=start, tensorboard=plan.tensorboard, on_error=plan.on_save_error) as log,
        progress,
        out_of_memory.explained(one_step, needs),
    ):
        for step in range(start + 1, plan.steps + 1):
            tokens = ramp.next_batch(data, step)
            tokens = tokens if layout is None else layout.batch(tokens)
            state, values = steps.at(step)(state, keys.of_number(rest, step), tokens)
            if step == start + 1:
                jax.block_until_ready(values)
                progress.compiled(step)
            waiting.append((step, values))
            last, asked = step == plan.steps, _asked(stop, step, plan)
            saving = last or asked is not None or step % plan.checkpoint_every == 0
            evaluating = last or step % plan.evaluate_every == 0
            if saving or evaluating or step % plan.log_every == 0:
                values = _write(log, waiting, schedule, progress.say, plan.skip_spikes is not None)
                progress.tokens_per_step = ramp.at(step) * plan.context
                speed = progress.update(step, values["loss"], values["skipped"])
                log.time(step, tokens_per_second=speed)
            if evaluating:
                now = nnx.merge(graph, state["params"], rest)
                log.step(step, validation_loss=evaluate(now, held, layout))
            if saving:
                log.flush()
                save(checkpoints, step, state, data.get_state(), plan.on_save_error, progress.say)
            if asked is not None and not last:
                said = f"{name} stopped after step {step} of {plan.steps}; the same command goes on from there."
                raise Stopped(said, asked)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"metrics of {name}")
    lines = metrics.read(folder / "metrics.jsonl")
    found = [line for line in lines if "validation_loss" in line and line["step"] == plan.steps]
    final = found[-1]["validation_loss"] if found else evaluate(nnx.merge(graph, state["params"], rest), held, layout)
    _check_final(name, final, state, plan.steps)
    speeds = [line.get("tokens_per_second") for line in metrics.read(folder / "timing.jsonl")]
    speed = float(np.median([value for value in speeds if value] or [0.0]))
    if layout is None:
        trained = nnx.merge(graph, state["params"], rest)
    else:
        trained = layout.detach(nnx.merge(graph, fetch(state["params"]), fetch(rest)))
    return Trained(trained, final, lines, speed, int(state["skipped"]))


def _restored(
    name: str, state: dict, data: Any, checkpoints: Checkpoints, folder: pathlib.Path, origin: Origin | None
) -> tuple[int, dict]:
    """The step that is done, and the state after it: of the newest checkpoint, of another run, or at the start."""
    if found := checkpoints.latest(state, a_device="errors"):
        start, state, extra = found
        data.set_state(extra["data"])
        print(f"{name} | resumes after step {start} from {folder}")
        return start, state
    if origin is not None:
        state, said = origin.state(state)
        print(f"{name} | {said}")
    return 0, state


def _check_final(name: str, loss: float | None, state: dict, steps: int) -> None:
    """Raises Diverged for a loss that is not finite; tells of skipped steps at the end."""
    skipped, in_a_row = int(state["skipped"]), int(state["in_a_row"])
    if loss is None or not np.isfinite(loss):
        raise Diverged(
            f"{name}: the held-out loss after step {steps} is not finite; {skipped} steps were skipped, the last"
            f" {in_a_row} among them. Lower --learning-rate, or use --dtype float32."
        )
    if in_a_row:
        print(f"{name} | the last {in_a_row} steps were skipped; what follows is of step {steps - in_a_row}")


def save(checkpoints: Checkpoints, step: int, state: dict, data: dict, on_error: str = "stop",
         say: Callable[[str], None] = print) -> None:  # fmt: skip
    """A checkpoint, of finite parameters only. With "continue", a disk that refuses it is told and training goes on.

    Raises: Diverged when a parameter is not finite; OSError from the disk."""
    if not _finite(state["params"]):
        raise Diverged(
            f"The parameters after step {step} are not finite, and were not saved (checkpoints:"
            f" {checkpoints.steps() or 'none'}). Lower --learning-rate, or use --dtype float32."
        )
    try:
        checkpoints.save(step, state, data=data)
    except OSError as error:
        if on_error != "continue":
            raise
        say(f"step {step} was not saved, training goes on: {error}")


class Steps:
    """The compiled step for each batch size of a run."""

    def __init__(self, graph, plan: Plan, ramp: Ramp, prepare: Callable | None, layout: Layout | None):
        self.graph, self.plan, self.ramp, self.prepare, self.layout = graph, plan, ramp, prepare, layout
        self.compiled: dict[int, Callable] = {}

    def at(self, step: int) -> Callable:
        batch = self.ramp.at(step)
        return self.compiled.get(batch) or self.cut(batch, self.ramp.microbatches(batch))

    def cut(self, batch: int, microbatches: int) -> Callable:
        if self.layout is not None:
            self.layout.check_batch(batch, microbatches)
        prepare = self.prepare if microbatches > 1 else None
        return make_step(self.graph, self.plan.optimizer(), microbatches, prepare, self.layout, self.plan.spikes())

    def compiled_step(self, batch: int, state: dict, rest: Any, microbatches: int | None = None) -> Any:
        """The program of one step, from the shapes of its arguments."""
        tokens = np.zeros((batch, self.plan.context + 1), np.int32)
        tokens = tokens if self.layout is None else self.layout.batch(tokens)
        return self.cut(batch, microbatches or self.ramp.microbatches(batch)).lower(state, rest, tokens).compile()

    def choose_microbatches(self, state: dict, rest: Any) -> None:
        """With "auto", the fewest whose step fits the memory of a device and whose size cuts every batch of the ramp.
        Checks the batches in any case."""
        largest = max(self.ramp.sizes)
        for batch in self.ramp.sizes:
            self.cut(batch, self.ramp.microbatches(batch))
        if self.plan.microbatches != "auto":
            return
        ways = 1 if self.layout is None else self.layout.ways
        compile_cut = lambda n: self.compiled_step(largest, state, rest, n)
        limit = memory.budget(self.plan.memory_budget)
        chosen = memory.choose(compile_cut, largest // ways, limit, self.ramp.cut_by)
        self.ramp = dataclasses.replace(self.ramp, per_microbatch=largest // chosen.microbatches)
        self.compiled[largest] = chosen.compiled


def first_state(params, adamw: optimizer.AdamW, layout: Layout | None = None, spikes: Spikes | None = None) -> dict:
    """The state before the first step, or only its shapes and dtypes when `params` are abstract.

    With a `layout` the optimizer's state is made where it belongs, and never whole on one device."""
    params = adamw.stored(params)
    init = adamw.transformation().init
    if layout is not None:
        placed = layout.state_shardings({"params": params, "optimizer": jax.eval_shape(init, params)}, offload=False)
        moments = jax.jit(init, out_shardings=placed["optimizer"])(params)
    else:
        moments = init(params)
        if adamw.loss_scale:  # its counters start as one buffer, which cannot be donated twice
            moments = jax.tree.map(jnp.copy, moments)
    state = {"params": params, "optimizer": moments, "skipped": jnp.int32(0), "in_a_row": jnp.int32(0)}
    if spikes is not None:
        state["spikes"] = spikes.start()
    return state | ({"errors": layout.first_errors(params)} if layout is not None and layout.compress else {})


@functools.cache  # one compilation for all seeds of a model
def make_step(graph, adamw: optimizer.AdamW, microbatches: int = 1, prepare=None, layout: Layout | None = None,
              spikes: Spikes | None = None):  # fmt: skip
    """(state, rest, tokens) -> (state, metrics). A step that is not finite, or a spike, moves nothing and is counted.

    `rest` is the model's state that is not trained; `prepare` quantizes its weights once for all microbatches."""
    transform = adamw.transformation()

    def gradient_of(params, rest, tokens, scale, errors):
        if layout is not None and layout.on_shards:
            return gradients.on_shards(graph, params, rest, tokens, scale, errors, layout=layout,
                                       microbatches=microbatches)  # fmt: skip
        if microbatches == 1:
            return *gradients.whole(graph, params, rest, tokens, scale), errors
        tokens = tokens.reshape(microbatches, -1, tokens.shape[-1])
        tokens = tokens if layout is None else layout.cut_microbatches(tokens)
        answer = gradients.accumulated(graph, params, rest, tokens, scale, microbatches=microbatches, prepare=prepare)
        return *answer, errors

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, rest, tokens):
        params, before, errors = state["params"], state["optimizer"], state.get("errors", ())
        if layout is not None and layout.offload:
            here = layout.state_shardings(state, offload=False)["optimizer"]
            before = jax.tree.map(jax.device_put, before, here)
        scale = lb.optim.current_loss_scale(before) if adamw.loss_scale else None
        value, gradient, left = gradient_of(params, rest, tokens, scale, errors)
        norm = optax.tree.norm(gradient)
        finite_gradient = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, after = transform.update(gradient, before, params)
        good = finite_gradient if adamw.stays_finite else finite_gradient & lb.optim.all_finite(updates)
        if scale is not None:
            value, norm = value / scale, norm / scale
        if spikes is not None:
            spike, seen = spikes.judge(state["spikes"], value, norm, good)
            good &= ~spike
        # a loss scale holds the optimizer's state back itself where the gradient is not finite, and lowers the scale
        keeps_after = good if scale is None else good | ~finite_gradient
        choose = lambda which, new, old: jax.tree.map(lambda n, o: jnp.where(which, n, o), new, old)
        params = choose(good, optax.apply_updates(params, updates), params)
        after = choose(keeps_after, after, before)
        bad = (~good).astype(jnp.int32)
        counters = {"skipped": state["skipped"] + bad, "in_a_row": (state["in_a_row"] + bad) * bad}
        numbers = {"loss": value, "gradient_norm": norm, **counters}
        if scale is not None:
            numbers["loss_scale"] = scale
        answer = {"params": params, "optimizer": after, **counters}
        if "errors" in state:
            answer["errors"] = choose(good, left, errors)
        if spikes is not None:
            answer["spikes"] = seen
        return (answer if layout is None else layout.constrained(answer)), numbers

    return step


_loss = jax.jit(gradients.next_token_loss)
_finite = jax.jit(lb.optim.all_finite)


def evaluate(model: nnx.Module, batches: list[np.ndarray], layout: Layout | None = None) -> float:
    """Mean loss over held-out batches of one size, in nats a token."""
    placed = batches if layout is None else map(layout.batch, batches)
    return float(np.mean([float(_loss(model, batch)) for batch in placed]))


def _asked(stop: run_directory.StopRequest | None, step: int, plan: Plan) -> int | None:
    """The signal that asks the run to stop; several processes agree on one after each `log_every` steps."""
    signal = None if stop is None else stop.signal
    if jax.process_count() == 1 or step % plan.log_every:
        return signal if jax.process_count() == 1 else None
    return int(np.max(multihost_utils.process_allgather(np.int32(signal or 0)))) or None


def _write(log: metrics.Metrics, waiting: list, schedule: optax.Schedule, say: Callable[[str], None] = print,
           spikes: bool = False) -> dict:  # fmt: skip
    """Fetches and writes the steps that wait; answers with the last one."""
    for step, values in waiting:
        values = {name: value.item() for name, value in jax.device_get(values).items()}
        in_a_row, skipped = values.pop("in_a_row"), values.pop("skipped")
        note = {"skipped": skipped} if in_a_row else {}  # only a skipped step says so
        if in_a_row:
            scale = f", loss scale {values['loss_scale']:g}" if "loss_scale" in values else ""
            finite = np.isfinite([values["loss"], values["gradient_norm"]]).all()
            why = ", a spike" if finite and spikes else ""
            say(
                f"step {step} was skipped{why}: loss {values['loss']:.4g}, gradient norm"
                f" {values['gradient_norm']:.4g}{scale} ({in_a_row} in a row, {skipped} in all); nothing moved"
            )
        log.step(step, **values, learning_rate=np.asarray(schedule(step - 1 - skipped + bool(in_a_row))).item(), **note)
        if in_a_row >= MOST_SKIPS_IN_A_ROW:
            log.flush()
            raise Diverged(
                f"{in_a_row} steps in a row up to step {step} had a loss, gradient or update that is not finite; all"
                " skipped. Lower --learning-rate, or use --dtype float32; the last checkpoint is good."
            )
    waiting.clear()
    return values | {"skipped": skipped}
