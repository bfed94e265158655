"""How the command line tells of a run: a live line on a terminal, plain lines elsewhere, or JSON lines for programs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from edgecompress import progress as listening
from edgecompress.spec import Stage, Trial

EVERY = 20  # units of work between two plain lines
STEPS_EVERY_S = 10.0  # between two plain lines about images that are read


@contextmanager
def display_for(mode: str, tensorboard: str | None = None) -> Iterator[listening.Progress]:
    """The listeners of one call: ``mode`` is auto, plain, quiet or jsonl.

    Raises:
        MissingBackendError: a folder for TensorBoard is given and it is not installed.
    """
    with ExitStack() as stack:
        first: Display | JsonLines = JsonLines() if mode == "jsonl" else Display(mode)
        stack.enter_context(first)
        shown: listening.Progress = first
        if tensorboard is not None:
            from edgecompress.cli.tensorboard import TensorBoardLog

            shown = Both(shown, stack.enter_context(TensorBoardLog(tensorboard)))
        yield shown


def emit(event: dict[str, Any]) -> None:
    """One JSON object on one line of stdout."""
    click.echo(json.dumps(event))


class Display:
    """A `progress.Progress` on stderr; use it as a context manager.

    Shows the stage, the episode or epoch, the reward, the best accuracy and the best latency, and the time left.
    """

    def __init__(self, mode: str = "auto", console: Console | None = None) -> None:
        quiet = mode == "quiet"
        self._console = console or Console(stderr=True, quiet=quiet)
        self._live = self._console.is_terminal and mode == "auto"
        rest = TextColumn("{task.fields[detail]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)), BarColumn(12),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeRemainingColumn(compact=True), rest,
            console=self._console, expand=True,
        )  # fmt: skip
        self._title = ""
        self._total = 0
        self._seen = 0
        self._detail = ""
        self._started = self._told = time.monotonic()
        self._task = None if not self._live else self._bar.add_task("", total=1, detail="", visible=False)

    def __enter__(self) -> Display:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        if self._live:
            self._bar.stop()

    def stage(self, title: str, total: int) -> None:
        self._finish()
        self._title, self._total, self._seen, self._detail = title, total, 0, ""
        self._started = self._told = time.monotonic()
        if self._task is not None:
            self._bar.reset(self._task, total=total, description=title, detail="", visible=True)

    def trial(self, stage: Stage, trial: Trial, best: Trial | None) -> None:
        detail = f"reward {trial.reward:.3f}"
        if best is not None:
            # A share lies in [0, 1]; the score of a user's own task may be any number, negative where less is better.
            share = 0 <= best.accuracy <= 1
            detail += f", best {best.accuracy:.1%}" if share else f", best {abs(best.accuracy):.4g}"
            if best.cost.latency_us is not None:
                detail += f", {best.cost.latency_us / 1000:.3g} ms {best.cost.latency_source}"
        self._advance(detail)

    def epoch(self, epoch: int, epochs: int, loss: float) -> None:
        self._advance(f"loss {loss:.3f}")

    def step(self, done: int, total: int) -> None:
        self._seen = done
        now = time.monotonic()
        if self._task is not None:
            self._bar.update(self._task, completed=done)
        elif now - self._told > STEPS_EVERY_S:
            self._told = now
            self._say(f"  {self._title}: {done:,}/{total:,}")

    def note(self, text: str) -> None:
        self._console.print(f"  {text}", style="dim", highlight=False, markup=False)

    def _advance(self, detail: str) -> None:
        self._seen, self._detail = self._seen + 1, detail
        if self._task is not None:
            self._bar.update(self._task, completed=self._seen, detail=detail)
        elif self._seen % EVERY == 0:
            self._say(f"  {self._title}: {self._seen}/{self._total}, {detail}")

    def _finish(self) -> None:
        if self._title:
            count = f"{self._seen}/{self._total}, " if self._seen else ""
            seconds = time.monotonic() - self._started
            self._say(f"{self._title}: {count}{self._detail or 'done'} ({seconds:.1f} s)")
            self._title = ""

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class JsonLines:
    """A `progress.Progress` that prints one object per event: stage, trial, epoch, step, note, and error if it ends in one.

    ``seconds`` is the time since the call began; a value that does not exist is null.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._title = ""
        self._seen = 0
        self._total = 0

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and kind is not None:
            self._emit("error", kind=kind.__name__, message=str(error))

    def stage(self, title: str, total: int) -> None:
        self._title, self._total, self._seen = title, total, 0
        self._emit("stage", title=title, total=total)

    def trial(self, stage: Stage, trial: Trial, best: Trial | None) -> None:
        self._seen += 1
        self._emit(
            "trial", stage=stage, number=self._seen, of=self._total, arm=trial.arm, **_numbers(trial),
            best=None if best is None else _numbers(best),
        )  # fmt: skip

    def epoch(self, epoch: int, epochs: int, loss: float) -> None:
        self._emit("epoch", stage=self._title, number=epoch, of=epochs, loss=_finite(loss))

    def step(self, done: int, total: int) -> None:
        self._emit("step", stage=self._title, number=done, of=total)

    def note(self, text: str) -> None:
        self._emit("note", text=text)

    def _emit(self, event: str, **values: Any) -> None:
        emit({"event": event, "seconds": round(time.monotonic() - self._started, 3), **values})


def _numbers(trial: Trial) -> dict[str, Any]:
    cost = trial.cost
    return {
        "reward": _finite(trial.reward), "accuracy": _finite(trial.accuracy), "loss": _finite(trial.loss),
        "macs": cost.macs, "size_bytes": cost.size_bytes, "latency_us": _finite(cost.latency_us),
        "latency_source": None if cost.latency_us is None else cost.latency_source,
    }  # fmt: skip


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


class Both:
    """Two listeners that hear the same."""

    def __init__(self, first: listening.Progress, second: listening.Progress) -> None:
        self._both = (first, second)

    def stage(self, title: str, total: int) -> None:
        for listener in self._both:
            listener.stage(title, total)

    def trial(self, stage: Stage, trial: Trial, best: Trial | None) -> None:
        for listener in self._both:
            listener.trial(stage, trial, best)

    def epoch(self, epoch: int, epochs: int, loss: float) -> None:
        for listener in self._both:
            listener.epoch(epoch, epochs, loss)

    def step(self, done: int, total: int) -> None:
        for listener in self._both:
            listener.step(done, total)

    def note(self, text: str) -> None:
        for listener in self._both:
            listener.note(text)
