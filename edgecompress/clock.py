"""Where the time of a run goes, over all processes that worked on it."""

from __future__ import annotations

import time
from pathlib import Path

from edgecompress.files import read_document, write_document
from edgecompress.progress import Progress
from edgecompress.spec import Document, Stage, Trial

PREPARATION = "preparation"


class PartSeconds(Document):
    """Seconds by the title of a part, in the order in which the parts began."""

    seconds: dict[str, float]


class Clock:
    """A `Progress` that passes on what it hears and adds up the seconds of every part in a file.

    A part lasts until the next one begins. The file is written whenever something is finished; what a kill cuts off after
    that is not counted: it is done again.

    Raises:
        BadFileError: the file is broken.
    """

    def __init__(self, path: Path, listener: Progress) -> None:
        self._path, self._listener, self._part = path, listener, PREPARATION
        self._last = time.monotonic()
        self.seconds = dict(read_document(path, PartSeconds, "times of a run").seconds) if path.exists() else {}

    def tick(self) -> None:
        """What was done since the last time belongs to the part that is on."""
        now = time.monotonic()
        self.seconds[self._part] = round(self.seconds.get(self._part, 0.0) + now - self._last, 3)
        self._last = now
        write_document(self._path, PartSeconds(seconds=self.seconds))

    def stage(self, title: str, total: int) -> None:
        self.tick()
        self._part = title
        self._listener.stage(title, total)

    def trial(self, stage: Stage, trial: Trial, best: Trial | None) -> None:
        self.tick()
        self._listener.trial(stage, trial, best)

    def epoch(self, epoch: int, epochs: int, loss: float) -> None:
        self.tick()
        self._listener.epoch(epoch, epochs, loss)

    def step(self, done: int, total: int) -> None:
        self._listener.step(done, total)

    def note(self, text: str) -> None:
        self._listener.note(text)
