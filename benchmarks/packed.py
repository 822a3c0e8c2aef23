"""What a packed layer costs where no kernel runs: its time beside its parts (float product, dequantization), its bytes.

    python -m benchmarks.packed                 # the table in benchmarks/results/packed_<backend>.md

The claim to check: a packed layer takes no longer than the float layer and the dequantization together, and reads the
packed bytes only. Times are medians of interleaved rounds (`benchmarks/timing.py`); bytes are the compiler's.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

import lowbit_jax as lb
from benchmarks.report import write
from benchmarks.timing import Call, environment, interleaved_seconds

RECIPES = {
    "w4a16": lb.quest(4, activations=False),
    "w4a16 without rotation": lb.quest(4, activations=False, block=None),
    "w3a16 without rotation": lb.quest(3, activations=False, block=None),
    "w1a16 without rotation": lb.quest(1, activations=False, block=None),
    "w4a4": lb.quest(4),
    "w8a8": lb.quest(8),
}
LAYOUTS = ("bitstream-le/1", "planes/1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    width: int = 2048
    """Inputs and outputs of the layer."""
    rows: tuple[int, ...] = (1, 64)
    rounds: int = 15
    output: pathlib.Path = pathlib.Path("benchmarks/results")


def calls(recipe: lb.LinearRecipe, layout: str, rows: int, width: int) -> dict[str, Call]:
    """The float layer, the training form's activation side alone where it has one, the packed layer, and the
    dequantization alone."""
    layer = nnx.Linear(width, width, use_bias=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (rows, width))
    packed = lb.convert(lb.quantize(layer, recipe), layout=layout)
    run = lambda graph: lambda state, x: nnx.merge(graph, state)(x)
    found = {}
    for name, model in (("float", layer), ("packed", packed)):
        graph, state = nnx.split(model)
        found[name] = Call.of(run(graph), state, x)
    weight = packed.kernel.get_value()
    found["dequantize"] = Call.of(lambda w: w.values(jnp.float32), weight)
    quantizer, of_weight = recipe.forward_quantizers
    rotation = None if of_weight is None else of_weight.rotation
    if quantizer is not None:
        found["activation"] = Call.of(quantizer.in_rotated_space, x)
    elif rotation is not None:
        found["activation"] = Call.of(rotation.apply, x)
    return found


def measure(config: Config) -> list[dict]:
    """One row a recipe, layout and number of rows."""
    found = []
    for name, recipe in RECIPES.items():
        for layout in LAYOUTS:
            for rows in config.rows:
                programs = calls(recipe, layout, rows, config.width)
                seconds = interleaved_seconds(programs, config.rounds, steps=5)
                each = {program: np.asarray(s) for program, s in seconds.items()}
                parts = each["float"] + each["dequantize"] + each.get("activation", 0.0)
                found.append({
                    "layer": name, "layout": layout, "rows": rows, "width": config.width,
                    **{f"{program}_ms": 1e3 * float(np.median(s)) for program, s in each.items()},
                    "over_parts": float(np.median(each["packed"] / parts)),
                    "float_mib": programs["float"].argument_bytes / 2**20,
                    "packed_mib": programs["packed"].argument_bytes / 2**20,
                    "packed_temp_mib": programs["packed"].temp_bytes / 2**20,
                })  # fmt: skip
                print(markdown_row(found[-1]), flush=True)
    return found


COLUMNS = ("layer", "layout", "rows", "float_ms", "dequantize_ms", "activation_ms", "packed_ms", "over_parts",
           "float_mib", "packed_mib", "packed_temp_mib")  # fmt: skip


def markdown_row(row: dict) -> str:
    cell = lambda v: f"{v:.2f}" if isinstance(v, float) else "" if v is None else str(v)
    return "| " + " | ".join(cell(row.get(name)) for name in COLUMNS) + " |"


def main(config: Config) -> None:
    """Measures and writes the JSON file and the table."""
    report = {"environment": environment(), "config": dataclasses.asdict(config) | {"output": None}}
    report["rows"] = measure(config)
    write(config.output, "packed", report, markdown(report))


def markdown(report: dict) -> str:
    """The table with what a reader must know."""
    told = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    head = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|\n"
    return (
        f"# Packed layers where no kernel runs\n\nMade by `python -m benchmarks.packed`. {told}.\n\nMilliseconds;"
        " `over_parts` is the packed layer over the sum of the float layer, the dequantization alone and the"
        " activation's rotation or quantization alone. MiB: arguments of the program, and its temporaries.\n\n"
        + head
        + "\n".join(map(markdown_row, report["rows"]))
        + "\n"
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
