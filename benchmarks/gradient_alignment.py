"""How well a quantized model's gradient points where the full-precision one does, at one trained checkpoint.

    python -m benchmarks.gradient_alignment             # some three minutes on 2 cores

A tiny Llama is trained in float32 on the text of the standard library; then, at those weights and on one held-out
batch, the gradient of each block matrix under each method is compared with the unquantized one. The number is the
mean cosine over the matrices. Rotation must win by 0.1 or more at 2 to 4 bits; the depth dependence that QuEST's
figure 3 shows needs a model trained with the method, and is not in one step (Panferov et al. 2025,
arXiv:2502.05003)."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

import lowbit_jax as lb
from benchmarks.timing import environment
from lowbit_jax.estimators import StraightThrough
from recipes import llama, text, train_loop
from recipes.gradients import next_token_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    preset: str = "tiny"
    steps: int = 250
    """Float32 training steps before the comparison."""
    bits: tuple[int, ...] = (1, 2, 3, 4, 8)
    seed: int = 0
    output: pathlib.Path = pathlib.Path("benchmarks/results")


def methods(bits: int) -> dict[str, lb.LinearRecipe]:
    """QuEST, then the same with one part taken away or replaced at a time."""
    plain = lb.quest_quantizer(bits, block=None)
    without_mask = dataclasses.replace(plain, estimator=StraightThrough())
    return {
        "quest": lb.quest(bits),
        "no rotation": lb.quest(bits, block=None),
        "no rotation, no mask": lb.LinearRecipe(out=lb.Gemm(lhs=without_mask, rhs=without_mask)),
        "absmax straight-through": lb.methods.get("straight_through", bits=bits),
    }


def trained(config: Config, corpus: text.Corpus) -> nnx.Module:
    """The float32 checkpoint."""
    size = llama.preset(config.preset, steps=config.steps)
    model = llama.build(size, corpus.vocab_size, dtype="float32", seed=config.seed)
    plan = train_loop.Plan.of(size, seed=config.seed)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    step, state = train_loop.make_step(graph, plan.optimizer()), train_loop.first_state(params, plan.optimizer())
    data = text.batches(corpus.train, context=size.context, batch=size.batch, seed=config.seed)
    for _ in range(config.steps):
        state, values = step(state, rest, next(data))
    print(f"float32 checkpoint after {config.steps} steps: training loss {float(values['loss']):.3f}", flush=True)
    return nnx.merge(graph, state["params"], rest)


def gradients(model: nnx.Module, tokens: jax.Array) -> dict[str, jax.Array]:
    """Path -> gradient of each matrix in the blocks, float32 [layers, in, out]."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    grads = jax.jit(jax.grad(lambda p: next_token_loss(nnx.merge(graph, p, rest), tokens)))(params)
    flat = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(grads)}
    return {path: leaf for path, leaf in flat.items() if path.startswith("blocks") and path.endswith("kernel")}


def cosine(a: Mapping[str, jax.Array], b: Mapping[str, jax.Array]) -> float:
    """Mean over matrices, one a layer, of their gradients' cosine."""
    per_layer = []
    for path in a:
        u, v = (g.astype(jnp.float32).reshape(g.shape[0], -1) for g in (a[path], b[path]))
        per_layer.append(jnp.sum(u * v, 1) / jnp.sqrt(jnp.sum(u * u, 1) * jnp.sum(v * v, 1)))
    return float(jnp.mean(jnp.concatenate(per_layer)))


def measure(config: Config) -> dict:
    corpus = text.load("stdlib")
    size = llama.preset(config.preset)
    model = trained(config, corpus)
    tokens = text.fixed_batches(corpus.validation, context=size.context, batch=size.batch, windows=size.batch)[0]
    exact = gradients(model, tokens)
    rows = []
    for bits in config.bits:
        recipes = methods(bits)
        found = {
            name: cosine(gradients(lb.quantize(model, rules=[("blocks", r)]), tokens), exact)
            for name, r in recipes.items()
        }
        rows.append({"bits": bits, "cosine": found})
    return {"environment": environment(), "config": dataclasses.asdict(config) | {"output": None}, "rows": rows}


def markdown(report: Mapping) -> str:
    names = list(report["rows"][0]["cosine"])
    lines = [
        "# Gradient cosine with the full-precision gradient\n",
        f"Made by `python -m benchmarks.gradient_alignment`, after {report['config']['steps']} float32 steps.\n",
        "| bits | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    lines += [f"| {r['bits']} | " + " | ".join(f"{r['cosine'][n]:.3f}" for n in names) + " |" for r in report["rows"]]
    return "\n".join(lines) + "\n"


def main(config: Config) -> dict:
    report = measure(config)
    page = markdown(report)
    print(page)
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / f"gradient_alignment_{report['environment']['backend']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(page)
    return report


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
