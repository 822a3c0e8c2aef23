"""What low-bit optimizers cost and what they keep: time over optax's AdamW, bytes, and the loss of a small Llama.

    python -m benchmarks.optim                          # the tables in benchmarks/results/optim_<backend>.md
    python -m benchmarks.optim --parts quality stall    # these anew, the others kept as the files have them

Two ratios over the same optimizer of optax in float32, interleaved in one process (`benchmarks/timing.py`): of the
update alone, on gradients at hand, which is what the wrapper adds; and of a whole training step of the Llama, which is
what a user waits for. Losses are compared within a seed.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lowbit_jax as lb
from benchmarks.models import WORKLOADS
from benchmarks.timing import environment, interleaved_seconds, ratio
from recipes import gradients, llama, optimizer, text

REFERENCE = "float32 AdamW"
MUON, ADAFACTOR, LION, SGD = "float32 Muon", "float32 Adafactor", "float32 Lion", "float32 SGD"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    millions: float = 10.5
    """Parameters of the update that is timed alone, in five matrices."""
    width: int = 512
    """Width of the Llama whose whole step is timed; 6 layers."""
    depth: int = 6
    tokens: int = 1024
    """Tokens of that step."""
    rounds: int = 12
    steps: int = 300
    """Of each training run of the tiny Llama."""
    batch: int = 4
    context: int = 64
    learning_rate: float = 3e-3
    small_rate: float = 2e-5
    """Constant rate of the runs that show the stall."""
    seeds: int = 4
    """Of the runs of each contender, paired: the same start and the same batches."""
    parts: tuple[str, ...] = ("updates", "steps", "quality", "stall")
    """What to measure; the rest is kept from the output's JSON file."""
    output: pathlib.Path = pathlib.Path("benchmarks/results")


@dataclasses.dataclass(frozen=True, slots=True)
class Contender:
    """`make(rate)` is the whole optimizer; parameters are kept in `dtype`; its time is told over that of `over`.

    axis: it exchanges gradients over the axis "data", here of one device: what packing and unpacking costs."""

    make: Callable[[Any], optax.GradientTransformation]
    dtype: str = "float32"
    over: str = REFERENCE
    axis: bool = False


CONTENDERS = {
    REFERENCE: Contender(optax.adamw),
    "AdamW 8-bit": Contender(lb.optim.adamw_low_bit),
    "AdamW 4-bit": Contender(lambda rate: lb.optim.adamw_low_bit(rate, bits=4)),
    "AdamW E4M3": Contender(lambda rate: lb.optim.adamw_low_bit(rate, bits="e4m3")),
    "AdamW COAT": Contender(lambda rate: lb.optim.adamw_low_bit(rate, bits="coat")),
    LION: Contender(lambda rate: optax.lion(rate, b2=0.99), over=LION),
    "Lion 8-bit": Contender(lb.optim.lion_low_bit, over=LION),
    ADAFACTOR: Contender(lambda rate: optax.adafactor(rate, momentum=0.9), over=ADAFACTOR),
    "Adafactor 8-bit": Contender(lb.optim.adafactor_low_bit, over=ADAFACTOR),
    MUON: Contender(optax.contrib.muon, over=MUON),
    "Muon 8-bit": Contender(lb.optim.muon_low_bit, over=MUON),
    SGD: Contender(lambda rate: optax.sgd(rate, momentum=0.9), over=SGD),
    "compressed mean, int8": Contender(
        lambda rate: optax.chain(lb.optim.compressed_mean("data", "int8"), optax.sgd(rate, momentum=0.9)),
        over=SGD,
        axis=True,
    ),
    "sign momentum": Contender(
        lambda rate: optax.chain(lb.optim.sign_momentum("data"), optax.scale(-rate)), over=SGD, axis=True
    ),
    "skip_nonfinite": Contender(lambda rate: lb.optim.skip_nonfinite(optax.adamw(rate))),
    "dynamic_loss_scale": Contender(lambda rate: lb.optim.dynamic_loss_scale(optax.adamw(rate))),
    "bfloat16, nearest": Contender(optax.adamw, "bfloat16"),
    "bfloat16, master weights": Contender(lambda rate: lb.optim.master_weights(optax.adamw(rate)), "bfloat16"),
    "bfloat16, stochastic": Contender(lambda rate: lb.optim.stochastic_rounding(optax.adamw(rate)), "bfloat16"),
    "bfloat16, stochastic, 8-bit": Contender(
        lambda rate: lb.optim.stochastic_rounding(lb.optim.adamw_low_bit(rate)), "bfloat16"
    ),
    **{
        f"on {fmt.name}, master weights": Contender(
            lambda rate, fmt=fmt: lb.optim.master_weights(optax.adamw(rate), fmt), "bfloat16"
        )
        for fmt in (lb.formats.INT8, lb.formats.E4M3, lb.formats.TERNARY)
    },
    "on int8, stochastic": Contender(
        lambda rate: lb.optim.stochastic_rounding(optax.adamw(rate), lb.formats.INT8), "bfloat16"
    ),
}


@dataclasses.dataclass(slots=True)
class Program:
    """A compiled step; what it answers are the arguments of its next call."""

    step: Any
    state: tuple

    def run(self) -> None:
        self.state = jax.block_until_ready(self.step(*self.state))


def cast(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda p: p.astype(dtype), params)


def state_bytes(init: Callable, params: Any) -> float:
    """Bytes of state for each parameter, as the compiler allocates them."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return memory(jax.jit(init).lower(params).compile()).output_size_in_bytes / count


def memory(compiled: Any) -> Any:
    """What the compiler says a program needs. Raises: NotImplementedError where the backend does not tell."""
    found = compiled.memory_analysis()
    if found is None:
        raise NotImplementedError(f"benchmarks: the {jax.default_backend()} backend does not tell what programs need.")
    return found


def updates(config: Config) -> dict[str, dict]:
    """Name -> time of an update of `millions` parameters over the reference's, bytes of state, bytes of temporaries."""
    rows = max(8, int(config.millions * 1e6 / 5 / 2048) // 8 * 8)
    names = [f"w{i}" for i in range(5)]
    keys = dict(zip(names, jax.random.split(jax.random.key(0), 5), strict=True))
    params = {name: 0.02 * jax.random.normal(key, (rows, 2048)) for name, key in keys.items()}
    found = {}
    for family in dict.fromkeys(contender.over for contender in CONTENDERS.values()):
        own = {name: c for name, c in CONTENDERS.items() if c.over == family}
        rounds = config.rounds if family != MUON else max(1, config.rounds // 6)  # products of matrices: slow, steady
        found |= _family(own, family, params, rounds)
    return found


def _family(contenders: Mapping[str, Contender], reference: str, params: Any, rounds: int) -> dict[str, dict]:
    """The contenders that are told over one reference, timed in turns."""
    programs, facts = {}, {}
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    for name, contender in contenders.items():
        tx, own = contender.make(1e-3), cast(params, contender.dtype)
        init = tx.init

        def step(params, state, grads, tx=tx):  # gradients are dead after it, as in a training step
            moved, state = tx.update(grads, state, params)
            return optax.apply_updates(params, moved), state, jax.tree.map(lambda m, g: m.astype(g.dtype), moved, grads)

        if contender.axis:
            specs = lb.optim.compression_specs(jax.eval_shape(tx.init, own), "data")
            over_mesh = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
            init = over_mesh(tx.init, in_specs=P(), out_specs=specs)
            step = over_mesh(step, in_specs=(P(), specs, P()), out_specs=(P(), specs, P()))
        arguments = own, jax.jit(init)(own), jax.tree.map(lambda p: 0.1 * p + 0.001, own)
        compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*arguments).compile()
        programs[name] = Program(compiled, jax.tree.map(jnp.copy, arguments))
        facts[name] = {
            "over": reference,
            "state_bytes": state_bytes(init, own),
            "temp_mib": memory(compiled).temp_size_in_bytes / 2**20,
        }
    return _timed(programs, facts, rounds, reference)


def whole_steps(config: Config) -> dict[str, dict]:
    """Name -> time of a training step of the Llama over the reference's."""
    work = WORKLOADS["llama"]
    batch = work.batch(config.tokens, config.width)
    graph, params, rest = nnx.split(work.build(config.width, config.depth), nnx.Param, ...)
    programs, facts = {}, {}
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    for name in (REFERENCE, "AdamW 8-bit", "AdamW 4-bit"):
        tx = CONTENDERS[name].make(1e-4)

        def step(params, state, tx=tx):
            grads = jax.grad(lambda p: work.loss(nnx.merge(graph, p, rest), *batch))(params)
            moved, state = tx.update(grads, state, params)
            return optax.apply_updates(params, moved), state

        arguments = params, tx.init(params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
        programs[name] = Program(compiled, jax.tree.map(jnp.copy, arguments))
        facts[name] = {"parameters": count, "temp_mib": memory(compiled).temp_size_in_bytes / 2**20,
                       "state_bytes": state_bytes(tx.init, params)}  # fmt: skip
    return _timed(programs, facts, config.rounds, REFERENCE)


def _timed(programs: Mapping[str, Program], facts: Mapping[str, dict], rounds: int, reference: str) -> dict[str, dict]:
    seconds = interleaved_seconds(programs, rounds)
    return {
        name: {
            "ms": 1e3 * float(np.median(seconds[name])),
            "fastest_ms": 1e3 * min(seconds[name]),
            "ratio": ratio(seconds[name], seconds[reference]),
            **facts[name],
        }
        for name in programs
    }


def losses(config: Config, names: tuple[str, ...], rate: Any, seeds: int, decay: str) -> dict[str, list[float]]:
    """Name -> held-out loss of the tiny Llama after `steps` steps, one for each seed."""
    corpus = text.load("stdlib")
    size = llama.preset("tiny", batch=config.batch, context=config.context, steps=config.steps)
    held = text.fixed_batches(corpus.validation, context=size.context, batch=config.batch, windows=128)
    found: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(seeds):
        graph, start, rest = nnx.split(llama.build(size, corpus.vocab_size, seed=seed), nnx.Param, ...)
        if decay == "warm":  # the stall is shown on a model that has learned something
            start = _train(graph, start, rest, optax.adamw(config.learning_rate), corpus, size, seed + 100)
        for name in names:
            params = cast(start, CONTENDERS[name].dtype)
            params = _train(graph, params, rest, CONTENDERS[name].make(rate), corpus, size, seed)
            loss = float(np.mean([_evaluate(graph, cast(params, "float32"), rest, tokens) for tokens in held]))
            found[name].append(loss)
            print(f"{name}, seed {seed}: {loss:.4f}", flush=True)
    return found


def _train(graph: Any, params: Any, rest: Any, tx: Any, corpus: text.Corpus, size: Any, seed: int) -> Any:
    data = text.batches(corpus.train, context=size.context, batch=size.batch, seed=seed)
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)

    def loss(params, tokens):
        return gradients.next_token_loss(nnx.merge(graph, cast(params, "float32"), rest), tokens)

    def step(params, state, tokens):
        moved, state = tx.update(jax.grad(loss)(params, tokens), state, params)
        return optax.apply_updates(params, moved), state

    step = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(size.steps):
        params, state = step(params, state, next(data))
    return params


@jax.jit
def _loss_of(model: nnx.Module, tokens: Any) -> Any:
    return gradients.next_token_loss(model, tokens)  # pyright: ignore[reportArgumentType]


def _evaluate(graph: Any, params: Any, rest: Any, tokens: Any) -> float:
    return float(_loss_of(nnx.merge(graph, params, rest), tokens))


def measure(config: Config, kept: dict) -> dict:
    """The whole report, as the JSON file holds it: the parts asked for, and `kept` with them."""
    report = kept | {"environment": environment(), "config": dataclasses.asdict(config) | {"output": None}}
    quality = (REFERENCE, "AdamW 8-bit", "AdamW 4-bit", "bfloat16, stochastic, 8-bit")
    stall = (REFERENCE, "bfloat16, nearest", "bfloat16, master weights", "bfloat16, stochastic")
    rate = optimizer.one_cycle(config.learning_rate, config.steps)
    measurements = {
        "updates": lambda: updates(config),
        "steps": lambda: whole_steps(config),
        "quality": lambda: losses(config, quality, rate, config.seeds, "cold"),
        "stall": lambda: losses(config, stall, config.small_rate, config.seeds, "warm"),
    }
    for part in config.parts:
        if part not in measurements:
            raise ValueError(f"benchmarks.optim has no part {part!r}; it has {', '.join(measurements)}.")
        report[part] = measurements[part]()
        print(json.dumps(report[part]), flush=True)
    return report


def time_table(title: str, rows: Mapping[str, Mapping]) -> str:
    columns = ("", "ms", "fastest ms", "ratio (quartiles)", "over", "state bytes a parameter", "temp MiB")
    lines = [f"\n### {title}\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, row in rows.items():
        r = row["ratio"]
        lines.append(
            f"| {name} | {row['ms']:.0f} | {row['fastest_ms']:.0f} | {r['median']:.2f} ({r['low']:.2f} to"
            f" {r['high']:.2f}) | {row.get('over', REFERENCE)} | {row['state_bytes']:.3f} | {row['temp_mib']:.1f} |"
        )
    return "\n".join(lines)


def loss_table(title: str, rows: Mapping[str, list[float]]) -> str:
    """Losses by seed, and the mean of the differences to float32 within a seed with its standard error."""
    lines = [
        f"\n### {title}\n",
        "| | held-out loss, nats, by seed | mean | over float32, paired |",
        "|---|---|---|---|",
    ]
    for name, values in rows.items():
        told = ", ".join(f"{v:.4f}" for v in values)
        mean, error = paired(values, rows[REFERENCE])
        spread = "" if name == REFERENCE or error is None else f" ± {error:.4f}"
        lines.append(f"| {name} | {told} | {np.mean(values):.4f} | {mean:+.4f}{spread} |")
    return "\n".join(lines)


def paired(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float | None]:
    """(mean difference within a seed, its standard error; None for one seed)."""
    differences = np.asarray(values) - np.asarray(reference)
    count = len(differences)
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(count)) if count > 1 else None


def markdown(report: Mapping) -> str:
    """The report as a page."""
    config = report["config"]
    told = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    parts = [f"# Low-bit optimizers\n\nMade by `python -m benchmarks.optim`, settings in the JSON file. {told}."]
    if "updates" in report:
        parts.append(time_table(f"Update alone, {config['millions']} million parameters", report["updates"]))
    if "steps" in report:
        size = report["steps"][REFERENCE]["parameters"] / 1e6
        title = f"Whole training step, Llama of {size:.1f} million parameters, {config['tokens']} tokens"
        parts.append(time_table(title, report["steps"]))
    if "quality" in report:
        title = f"Tiny Llama after {config['steps']} steps, one-cycle rate to {config['learning_rate']:g}"
        parts.append(loss_table(title, report["quality"]))
    if "stall" in report:
        title = f"{config['steps']} more steps at the constant rate {config['small_rate']:g}"
        parts.append(loss_table(title, report["stall"]))
    return "\n".join(parts) + "\n"


def main(config: Config) -> pathlib.Path:
    """Measures, prints, writes; returns the JSON file."""
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / f"optim_{jax.default_backend()}.json"
    report = measure(config, json.loads(path.read_text()) if path.exists() else {})
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    print(f"\n{path} and {path.with_suffix('.md')}")
    return path


if __name__ == "__main__":
    main(tyro.cli(Config))
