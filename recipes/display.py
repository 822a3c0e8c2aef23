"""What a person sees while a model trains: a progress bar on a terminal, plain lines elsewhere."""

import sys
import time

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

    def update(self, step: int, loss: float, skipped: int) -> float:
        """Shows the state after `step`; answers with tokens a second since the last call (0 at the first)."""
        now = time.monotonic()
        if self.mark is not None and step > self.mark[1]:
            speed = (step - self.mark[1]) / max(now - self.mark[0], 1e-9)
            self.speed = speed if not self.speed else 0.7 * self.speed + 0.3 * speed
        else:
            speed = 0.0
        self.mark = (now, step)
        tokens = self.speed * self.tokens_per_step
        left = f"{_clock((self.steps - step) / self.speed)} left" if self.speed else "time left unknown"
        note = f"loss {loss:.4f} | {tokens:,.0f} tokens/s | {left}" + (f" | {skipped} steps skipped" if skipped else "")
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


def _bar() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[note]}"), console=rich.console.Console(),
    )  # fmt: skip


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
