"""Text from the packed weights of a finished run of `recipes.pretrain`.

    python -m recipes.sample runs/tiny-quest-w4a4-0123abcd --prompt "import "
    python -m recipes.sample RUN --prompt "import " --tokens 500 --temperature 0 --weights float

The prompt, seed, temperature and number of tokens of the run give the text that it printed at its end."""

import dataclasses
import pathlib
from typing import Literal

import jax
import tyro

from recipes import command, display, finished, sampling


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    run: tyro.conf.Positional[pathlib.Path]
    """Run directory of recipes.pretrain."""
    prompt: str
    """What the text goes on from, of which the model reads as much of the end as its context holds; numbers for a run
    on ids."""
    tokens: int = 200
    """How many are written."""
    temperature: float = 0.7
    """0 takes the most likely token each time."""
    seed: int = 0
    weights: Literal["packed", "float"] = "packed"
    """float: those that were trained; a run with --method none has no others."""
    cache_bits: int | None = None
    """Of the keys and values that the model keeps, 2 to 8; its own dtype unless told."""
    tokenizer: pathlib.Path | None = None
    """Where the run's tokenizer.json lies now, if it has moved; for a run on ids, the one that they were made with."""


def main(config: Sample) -> str:
    """Prints the prompt and what follows it; answers with the text."""
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"sample: --seed must lie between 0 and 2**63 - 1, and is {config.seed}.")
    model, codec = finished.load(config.run, weights=config.weights, tokenizer=config.tokenizer)
    prompt = codec.encode(config.prompt)
    sampling.check(prompt, config.tokens, config.temperature, codec.vocab_size)
    ids = sampling.generate(model, prompt, tokens=config.tokens, context=model.config.context,
                            temperature=config.temperature, vocab_size=codec.vocab_size,
                            key=jax.random.key(config.seed), cache_bits=config.cache_bits)  # fmt: skip
    text = codec.decode(ids)
    print(display.printable(text))
    return text


if __name__ == "__main__":
    command.run("sample", Sample, main, __doc__)
