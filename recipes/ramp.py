"""A batch that grows: how many sequences each step takes, and how they are cut into microbatches."""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Ramp:
    """stages: (sequences a step, first step that takes more). final: the batch after them. per_microbatch: sequences
    that are computed at once."""

    stages: tuple[tuple[int, int], ...]
    final: int
    per_microbatch: int

    @classmethod
    def of(cls, text: str | None, batch: int, microbatches: int = 1) -> "Ramp":
        """From "4x100,8x200": 4 sequences for 100 steps, 8 for the next 200, then `batch`; None: `batch` throughout.

        Raises: ValueError for other text, a batch that shrinks, or one that microbatches of the final size do not
        divide."""
        stages, step, per_microbatch = [], 1, batch // microbatches
        for part in filter(None, (text or "").split(",")):
            found = re.fullmatch(r"\s*(\d+)x(\d+)\s*", part)
            if found is None or int(found[1]) < 1 or int(found[2]) < 1:
                raise ValueError(f"ramp: {part!r} is not sequences x steps, as in 4x100,8x200.")
            size, step = int(found[1]), step + int(found[2])
            if size > batch or stages and size < stages[-1][0]:
                raise ValueError(f"ramp: {text!r} goes up to the batch of {batch}; {size} sequences do not fit there.")
            if not _cuts(per_microbatch, size):
                raise ValueError(
                    f"ramp: {size} sequences cannot be cut into microbatches of {per_microbatch} ({microbatches} of the"
                    f" final {batch}). Take multiples of {per_microbatch}, or other --microbatches."
                )
            stages.append((size, step))
        return cls(tuple(stages), batch, per_microbatch)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Each batch size of the run once, smallest first."""
        return tuple(sorted({self.final, *(size for size, _ in self.stages)}))

    @property
    def unit(self) -> int:
        """What the data comes in: the largest size that divides every batch."""
        return math.gcd(*self.sizes)

    def at(self, step: int) -> int:
        """Sequences of this step, counted from 1."""
        return next((size for size, end in self.stages if step < end), self.final)

    def microbatches(self, batch: int) -> int:
        return max(1, batch // self.per_microbatch)

    def cut_by(self, microbatches: int) -> bool:
        """Whether that many microbatches of the final batch are a size in which the smaller batches can be cut too."""
        return all(_cuts(self.final // microbatches, size) for size in self.sizes)

    def next_batch(self, data: Iterator[np.ndarray], step: int) -> np.ndarray:
        count = self.at(step) // self.unit
        return next(data) if count == 1 else np.concatenate([next(data) for _ in range(count)])


def _cuts(per_microbatch: int, size: int) -> bool:
    return size <= per_microbatch or size % per_microbatch == 0
