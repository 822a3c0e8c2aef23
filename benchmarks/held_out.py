"""What a form of a model costs: its loss on held-out windows of the text that a finished run was trained on, above that
of the model as it is."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from recipes import finished, text

Logits = Callable[[Int[Array, "batch time"]], Float[Array, "batch time vocab"]]


@dataclasses.dataclass(frozen=True, slots=True)
class HeldOut:
    """Batches [batch, context + 1] of ids, and the loss of each window, in nats a token."""

    batches: list[np.ndarray]
    losses: np.ndarray

    @classmethod
    def of(cls, corpus: text.Corpus, model: Any, windows: int, logits: Logits) -> "HeldOut":
        batches = text.fixed_batches(
            corpus.validation, context=model.config.context, batch=model.config.batch, windows=windows
        )
        return cls(batches, _losses(batches, logits))

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    def above(self, logits: Logits) -> dict[str, float]:
        """The mean over windows of how much larger the loss is, and its standard error, in nats a token."""
        above = _losses(self.batches, logits) - self.losses
        return {"above": float(above.mean()), "standard_error": float(above.std() / len(above) ** 0.5)}


def corpus_of(run: pathlib.Path) -> text.Corpus:
    """The text that a finished run was trained on."""
    described = finished.Description.read(run)
    return text.load(described.data, tokenizer=described.tokenizer)


def cell(found: dict[str, float]) -> str:
    """What `HeldOut.above` found, for a table."""
    return f"{found['above']:+.4f} ± {found['standard_error']:.4f}"


@jax.jit
def _loss_of_each(logits: Float[Array, "batch time vocab"], tokens: Int[Array, "batch positions"]) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(-1)


def _losses(batches: list[np.ndarray], logits: Logits) -> np.ndarray:
    return np.concatenate([_loss_of_each(logits(jnp.asarray(b[:, :-1])), jnp.asarray(b)) for b in batches])
