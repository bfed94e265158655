"""The seconds of a run's parts add up over the processes that worked on it."""

from __future__ import annotations

import pytest

from edgecompress import clock as module
from edgecompress.clock import Clock
from edgecompress.errors import BadFileError
from edgecompress.progress import Silent


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stages: list[tuple[str, int]] = []

    def stage(self, title: str, total: int) -> None:
        self.stages.append((title, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_parts_go_on_where_a_killed_process_left_them(tmp_path, monkeypatch):
    now = iter([0.0, 2.0, 12.0, 100.0, 101.0, 104.0, 110.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    first = Clock(tmp_path / "seconds.json", Silent())
    first.stage("Fine-tune", 2)
    first.epoch(1, 2, 0.5)  # its kill takes what came after the epoch
    heard = Heard()
    again = Clock(tmp_path / "seconds.json", heard)
    again.stage("Fine-tune", 1)
    again.stage("Export", 1)
    again.note("done")
    again.tick()
    assert again.seconds == {"preparation": 3.0, "Fine-tune": 13.0, "Export": 6.0}
    assert heard.stages == [("Fine-tune", 1), ("Export", 1)] and heard.notes == ["done"]


def test_a_broken_file_is_told(tmp_path):
    (tmp_path / "seconds.json").write_text("{")
    with pytest.raises(BadFileError, match="times of a run"):
        Clock(tmp_path / "seconds.json", Silent())
