"""What long work tells while it runs. The command line draws it; the library is silent by default."""

from __future__ import annotations

from typing import Protocol

from edgecompress.spec import Stage, Trial


class Progress(Protocol):
    """Listens to a run."""

    def stage(self, title: str, total: int) -> None:
        """A part with ``total`` units of work begins."""
        ...

    def trial(self, stage: Stage, trial: Trial, best: Trial | None) -> None:
        """A policy was evaluated; ``best`` keeps the budgets."""
        ...

    def epoch(self, epoch: int, epochs: int, loss: float) -> None:
        """An epoch of training ended."""
        ...

    def step(self, done: int, total: int) -> None:
        """``done`` of ``total`` units of a part that has neither policies nor epochs."""
        ...

    def note(self, text: str) -> None:
        """A fact that the user should see."""
        ...


class Silent:
    """Says nothing."""

    def stage(self, title: str, total: int) -> None: ...

    def trial(self, stage: Stage, trial: Trial, best: Trial | None) -> None: ...

    def epoch(self, epoch: int, epochs: int, loss: float) -> None: ...

    def step(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...
