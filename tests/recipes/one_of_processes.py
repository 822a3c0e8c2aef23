"""Run as one of several processes: the recipe's training loop on a small model, on a mesh of all their devices.

    python -m tests.recipes.one_of_processes <folder> <coordinator> <processes> <index> '{"steps": 8}'

Prints the resumed and the last step; the curve and the checkpoints are in the folder."""

import json
import pathlib
import sys

import jax

import lowbit_jax as lb

jax.config.update("jax_disable_most_optimizations", True)


def main(folder: str, coordinator: str, processes: int, index: int, steps: int = 8, mesh: str = "data=-1",
         **options) -> None:  # fmt: skip
    if processes > 1:
        lb.parallel.start(coordinator, processes, index, timeout_s=100, heartbeat_s=10)
    import dataclasses

    from recipes import llama, text, train_loop
    from recipes.layout import Layout

    size = dataclasses.replace(llama.preset("smoke"), kv_heads=2, batch=8, steps=steps)
    corpus = text.load(str(pathlib.Path(folder) / "words.txt"))
    layout = Layout(mesh=lb.parallel.make_mesh(mesh), **options)
    model = layout.attach(layout.build(lambda: llama.build(size, corpus.vocab_size, dtype="float32")))
    model = lb.quantize(model, rules=[("blocks", lb.quest(4))])
    plan = train_loop.Plan.of(size, checkpoint_every=2, evaluate_every=steps, log_every=1, tensorboard=False)
    done = train_loop.train("run", model, corpus, plan, pathlib.Path(folder), quantized=True, layout=layout)
    print(json.dumps({"loss": done.lines[-1]["validation_loss"], "devices": layout.mesh.size}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), **json.loads(sys.argv[5]))
