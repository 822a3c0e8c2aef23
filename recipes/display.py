"""What a person sees while a model trains: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
import warnings
from collections.abc import Iterator

import rich.console
import rich.progress


class Progress:
    """Loss, tokens a second, time left. The speed is over the last `update`s, compile time left out."""

    def __init__(self, name: str, *, start: int, steps: int, tokens_per_step: int):
        self.name, self.steps, self.tokens_per_step = name, steps, tokens_per_step
        self.mark: tuple[float, int] | None = None
        self.speed = 0.0  # steps a second
        self.last_line = start
        self.bar = _bar() if sys.stdout.isatty() else None

    def __enter__(self) -> "Progress":
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=self.steps, note="compiling")
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, line: str) -> None:
        """One line of its own, above the bar."""
        line = f"{self.name} | {line}"
        if self.bar is not None:
            self.bar.console.print(line)
        else:
            print(line, flush=True)

    def compiled(self, step: int) -> None:
        """The first step of this process is computed: the speed is that of the steps after it."""
        self.mark = (time.monotonic(), step)

    def update(self, step: int, loss: float, skipped: int) -> float:
        """Shows the state after `step`; answers with tokens a second since the last call (0 when nothing is known)."""
        now = time.monotonic()
        if self.mark is not None and step > self.mark[1]:
            speed = (step - self.mark[1]) / max(now - self.mark[0], 1e-9)
            self.speed = speed if not self.speed else 0.7 * self.speed + 0.3 * speed
        else:
            speed = 0.0
        self.mark = (now, step)
        note = f"loss {loss:.4f}"
        if self.speed:
            note += f" | {self.speed * self.tokens_per_step:,.0f} tokens/s"
            note += f" | {clock((self.steps - step) / self.speed)} left" if step < self.steps else ""
        note += f" | {skipped} steps skipped" if skipped else ""
        if self.bar is not None:
            self.bar.update(self.task, completed=step, note=note)
        elif step == self.steps or step - self.last_line >= self.steps // 20:
            print(f"{self.name} | step {step}/{self.steps} | {note}", flush=True)
            self.last_line = step
        return speed * self.tokens_per_step


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A small table on the standard output, at any width of the terminal."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    print(f"\n{title}")
    for row in [columns, ["-" * width for width in widths], *rows]:
        print(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )


def size(count: int) -> str:
    power = min(3, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.{2 if power else 0}f} {('B', 'kB', 'MB', 'GB')[power]}"


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Inside, a warning is one line of text, without the place in the source."""

    def show(message, category, *_, **__) -> None:
        kind = "" if category is UserWarning else f"{category.__name__}: "
        print(f"warning: {kind}{message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _bar() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[note]}"), console=rich.console.Console(),
    )  # fmt: skip


def printable(text: str) -> str:
    """The text with what a terminal would obey or cannot show as replacement characters."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
