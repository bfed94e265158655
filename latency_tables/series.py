"""Measure a series of kernels into a table: in random order, watched by an anchor, doubtful ones once more."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgecompress.latency_tables import agent
from edgecompress.latency_tables.interpolate import family_of
from edgecompress.latency_tables.measure import Progress, measure_kernel
from edgecompress.latency_tables.table import KernelKey, Row, Table, append_row, read_table

ANCHOR = KernelKey("conv", 64, 64, 3, 3, 1, 1, 1, 14, 14, 14, 14, "fp32", "fp32")
ANCHOR_S = 0.1
SUSPECT = 0.1  # above its family, at which a point is measured again
SWEEP = range(48, 97)  # widths at which the divisor is looked for
GAIN = 1.05  # in time per channel pair, that a divisor must be worth


@dataclass(frozen=True)
class Done:
    """How a series of points ended; ``anchors_us`` is what the anchor took, in order."""

    measured: int
    skipped: int
    unsupported: tuple[KernelKey, ...]
    anchors_us: tuple[float, ...] = ()

    @property
    def drift(self) -> float:
        """The anchor's largest departure from its fastest time."""
        return max(self.anchors_us) / min(self.anchors_us) - 1 if self.anchors_us else 0.0


def measure_points(
    points: Sequence[KernelKey],
    table: Table,
    *,
    time_cap_s: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Done:
    """Measure every point that ``table`` does not hold yet and append it at once: a kill loses at most one.

    The order is random, and `agent.measure_series` watches it with an anchor. At the end, points far above their family
    are measured once more.

    Args:
        time_cap_s: seconds for one point after its warm-up.
        progress: called with points done, points to do, and the seconds left as far as can be told.
    """
    held = {key for key, row in table.rows.items() if row.status in ("ok", "unsupported")}
    todo = [key for key in dict.fromkeys(points) if key not in held]
    np.random.default_rng(seed).shuffle(todo)
    threads = table.provenance.setting.threads
    done: dict[KernelKey, Row] = {}
    start = time.perf_counter()
    seen: set[KernelKey] = set()

    def measured(key: KernelKey, cap_s: float = time_cap_s) -> dict[str, Any]:
        return vars(measure_kernel(key, threads=threads, time_cap_s=cap_s, seed=seed))

    def write(key: KernelKey, values: dict[str, Any]) -> None:
        done[key] = Row(**values)
        append_row(table, done[key])
        seen.add(key)
        if progress is not None:
            progress(len(seen), len(todo), (time.perf_counter() - start) / len(seen) * (len(todo) - len(seen)))

    def anchor_us() -> float:
        return float(measured(ANCHOR, max(time_cap_s, ANCHOR_S))["median_us"])

    anchors = agent.measure_series(todo, measured, write, anchor_us, agent.ANCHOR_EVERY, agent.DRIFT)
    for key in _suspects(read_table(table.path).usable, done):
        again = measured(key)
        if again["median_us"] < done[key].median_us:  # another process only ever adds time: the shorter is right
            write(key, again)
    unsupported = tuple(key for key, row in done.items() if row.status == "unsupported")
    return Done(len(todo), len(set(points)) - len(todo), unsupported, tuple(anchors))


def _suspects(rows: Mapping[KernelKey, Row], done: Mapping[KernelKey, Row]) -> list[KernelKey]:
    """New rows that lie over `SUSPECT` above what the other rows of their family say."""
    families: dict[tuple[object, ...], list[Row]] = {}
    for row in rows.values():
        families.setdefault(row.key.family, []).append(row)
    found = []
    for own in families.values():
        family = family_of(own)
        if family is not None:
            found += [row.key for row, ratio in zip(own, family.departures, strict=True) if ratio > 1 + SUSPECT]
    return [key for key in found if key in done]


def measure_divisor(dtype: str, *, threads: int = 1, time_cap_s: float = 0.2) -> int:
    """Find the channel divisor of this device: a 3x3 convolution at every width of `SWEEP`, input and output alike."""
    times = {}
    for width in SWEEP:
        key = ANCHOR._replace(in_channels=width, out_channels=width, weight_dtype=dtype, activation_dtype=dtype)
        times[width] = measure_kernel(key, threads=threads, time_cap_s=time_cap_s).median_us
    return divisor_of(times)


def divisor_of(times_us: Mapping[int, float]) -> int:
    """The largest of 32, 16, 8, 4, 2 whose multiples cost at least 5 % less per channel pair than the widths half-way
    between them; 1 if none does."""
    for divisor in (32, 16, 8, 4, 2):
        whole = [us / width**2 for width, us in times_us.items() if width % divisor == 0]
        between = [us / width**2 for width, us in times_us.items() if width % divisor == divisor // 2]
        if whole and between and float(np.median(between)) > GAIN * float(np.median(whole)):
            return divisor
    return 1
