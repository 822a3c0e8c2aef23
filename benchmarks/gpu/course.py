"""How far a run has come, told in its report: what is done now and how long that may take, so that the process that
started it sees a kernel that hangs; what was done and what there was no time for, so that the next one goes on."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

PATIENCE = 90.0  # seconds that a step may take unless it says otherwise


def fresh() -> dict:
    """The parts of a report that a `Course` writes."""
    return {"left_out": [], "done": [], "doing": None}


@dataclasses.dataclass(slots=True, kw_only=True)
class Course:
    """Of one process. until: on the clock of `time.perf_counter`. save: writes the report."""

    rounds: int
    until: float = math.inf
    only: Sequence[str] = ()  # "part:text": of this part what has the text in its name; of parts not named, everything
    met: set[str] = dataclasses.field(default_factory=set)  # of these, what has met something
    report: dict = dataclasses.field(default_factory=fresh)
    save: Callable[[], None] = lambda: None
    part: str = ""

    def now(self, what: str, patience: float = PATIENCE) -> None:
        """Tells that `what` begins, which may take `patience` seconds."""
        self.report["doing"] = {"part": self.part, "what": what, "patience": patience}
        self.save()

    def over(self) -> bool:
        return time.perf_counter() > self.until

    def wants(self, what: str) -> bool:
        """Whether `what` is to be measured: not where that was done, or ended a process, or was not asked for, and not
        when time is up."""
        mine = [each for each in self.only if each.startswith(f"{self.part}:")]
        asked = [each for each in mine if each.partition(":")[2] in what]
        self.met.update(asked)
        if name(self.part, what) in self.report["done"] or (mine and not asked):
            return False
        if self.over() and what not in self.report["left_out"]:
            self.report["left_out"].append(what)
        return not self.over()

    def finished(self) -> None:
        """What was told last is done."""
        self.report["done"].append(name(self.part, self.report["doing"]["what"]))


def name(part: str, what: str) -> str:
    """Of a step, in the list of those that are done."""
    return f"{part}: {what}"
