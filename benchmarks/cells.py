"""Results that take long, kept one by one: several processes share them, and a fresh clone goes on from the committed ones."""

from __future__ import annotations

import fcntl
import fnmatch
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgecompress.files import written_whole

Cell = dict[str, Any]


class Cells:
    """Finished cells by name, each a file below ``folder``; ``committed`` holds all of them, one a line, sorted.

    A cell is computed by one process: another that asks for it meanwhile passes it by.
    """

    def __init__(self, folder: Path, committed: Path | None) -> None:
        self.folder, self.committed = folder, committed
        self._locks = folder / "locks"
        self._locks.mkdir(parents=True, exist_ok=True)

    def all(self) -> dict[str, Cell]:
        """Every finished cell: what this machine computed before what was committed."""
        found: dict[str, Cell] = {}
        if self.committed is not None and self.committed.exists():
            found |= json.loads(self.committed.read_text())["cells"]
        for path in (self.folder / "cells").rglob("*.json"):
            cell = json.loads(path.read_text())
            found[cell.pop("name")] = cell
        return found

    def __call__(self, name: str, compute: Callable[[], Cell | None]) -> Cell | None:
        """The cell of this name, computed now if nobody has; None where another process is at it, or where what it needs is
        not there yet."""
        known = self.all().get(name)
        if known is not None:
            return known
        with claimed(self._locks / name.replace("/", "--")) as mine:
            if not mine:
                print(f"     {name}: another process is at it", flush=True)
                return None
            known = self.all().get(name)
            if known is not None:
                return known
            start = time.monotonic()
            computed = compute()
            if computed is None:
                print(f"     {name}: what it needs is not there yet", flush=True)
                return None
            cell = computed | {"seconds": round(time.monotonic() - start, 1)}
            self.replace(name, cell)
            print(f"     {name}: {json.dumps(cell)}", flush=True)
        self.publish()
        return cell

    def replace(self, name: str, cell: Cell) -> None:
        """Put another cell in the place of a finished one; several at once are published together by the caller."""
        path = self.folder / "cells" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps({"name": name} | cell) + "\n")

    def forget(self, pattern: str) -> list[str]:
        """Drop the cells whose names match, so that they are computed anew."""
        kept = self.all()
        gone = fnmatch.filter(kept, pattern)
        for name in gone:
            (self.folder / "cells" / f"{name}.json").unlink(missing_ok=True)
            del kept[name]
        self._write(kept)
        return gone

    def publish(self) -> None:
        """Write the committed file anew."""
        if self.committed is None:
            return
        with (self._locks / "publish").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            self._write(self.all())

    def _write(self, cells: dict[str, Cell]) -> None:
        if self.committed is None:
            return
        lines = (f"{json.dumps(name)}: {json.dumps(cells[name], sort_keys=True)}" for name in sorted(cells))
        self.committed.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.committed) as temporary:
            temporary.write_text('{"cells": {\n' + ",\n".join(lines) + "\n}}\n")


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Hold the lock file ``path`` while the block runs; False, without waiting, where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
