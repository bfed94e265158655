"""Measure a series of kernels into a table: in random order, watched by an anchor, doubtful ones once more."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from edgecompress.latency_tables.agent import STEADY
from edgecompress.latency_tables.interpolate import family_of
from edgecompress.latency_tables.measure import measure_kernel
from edgecompress.latency_tables.table import KernelKey, Row, Table, append_row, read_table

ANCHOR = KernelKey("conv", 64, 64, 3, 3, 1, 1, 1, 14, 14, 14, 14, "fp32", "fp32")
ANCHOR_EVERY = 20
ANCHOR_S = 0.1
DRIFT = 0.05  # of the anchor, beyond which its points are measured again
WORST = 5  # percent of the points, by dispersion, that are measured again
SUSPECT = 0.1  # above its family, at which a point is measured again
SWEEP = range(48, 97)  # widths at which the divisor is looked for
GAIN = 1.05  # in time per channel pair, that a divisor must be worth

Progress = Callable[[int, int, float], None]


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

    The order is random, so that a drift of the machine does not look like a trend over channels. Every `ANCHOR_EVERY`
    points one fixed kernel is measured: where it is over `DRIFT` slower than at its fastest, the points since the last
    anchor are measured once more, and marked ``contended`` if the anchor is slow again. At the end the `WORST` share of
    the points, by dispersion, is measured once more.

    Args:
        time_cap_s: seconds for one point after its warm-up.
        progress: called with points done, points to do, and the seconds left as far as can be told.
    """
    held = {key for key, row in table.rows.items() if row.status in ("ok", "unsupported")}
    todo = [key for key in dict.fromkeys(points) if key not in held]
    np.random.default_rng(seed).shuffle(todo)
    series = _Series(table, time_cap_s, seed)
    start = time.perf_counter()
    for first in range(0, len(todo), ANCHOR_EVERY):
        block = todo[first : first + ANCHOR_EVERY]
        for number, key in enumerate(block, start=first + 1):
            series.take(key)
            if progress is not None:
                progress(number, len(todo), (time.perf_counter() - start) / number * (len(todo) - number))
        series.guard(block)
    for key in _worst(series.done):
        series.take(key)
    for key in _suspects(read_table(table.path).usable, series.done):
        series.take_if_faster(key)
    unsupported = tuple(key for key, row in series.done.items() if row.status == "unsupported")
    return Done(len(todo), len(set(points)) - len(todo), unsupported, tuple(series.anchors_us))


@dataclass
class _Series:
    """Points as they are measured, each appended to the table at once, and the anchor between them."""

    table: Table
    time_cap_s: float
    seed: int
    done: dict[KernelKey, Row] = field(default_factory=dict)
    anchors_us: list[float] = field(default_factory=list)

    def take(self, key: KernelKey) -> None:
        self._keep(self._measured(key, self.time_cap_s))

    def take_if_faster(self, key: KernelKey) -> None:
        """Another process only ever adds time: of two measurements that disagree, the shorter is right."""
        again = self._measured(key, self.time_cap_s)
        if again.median_us < self.done[key].median_us:
            self._keep(again)

    def guard(self, block: Sequence[KernelKey]) -> None:
        """Measure ``block`` once more if the anchor has become slow; mark it if the anchor stays so."""
        if not self._anchor_is_slow():
            return
        for key in block:
            self.take(key)
        if self._anchor_is_slow():
            for key in block:
                if self.done[key].status == "ok":
                    self._keep(replace(self.done[key], status="contended"))

    def _anchor_is_slow(self) -> bool:
        self.anchors_us.append(self._measured(ANCHOR, max(self.time_cap_s, ANCHOR_S)).median_us)
        return self.anchors_us[-1] > min(self.anchors_us) * (1 + DRIFT)

    def _measured(self, key: KernelKey, time_cap_s: float) -> Row:
        threads = self.table.provenance.setting.threads
        return measure_kernel(key, threads=threads, time_cap_s=time_cap_s, seed=self.seed)

    def _keep(self, row: Row) -> None:
        self.done[row.key] = row
        append_row(self.table, row)


def _worst(rows: Mapping[KernelKey, Row]) -> list[KernelKey]:
    """The points with the largest dispersion, beyond what counting whole microseconds explains."""
    noise = {key: (row.mad_us - 1) / max(row.median_us, 1) for key, row in rows.items() if row.status == "ok"}
    ordered = sorted((key for key, value in noise.items() if value > STEADY), key=lambda key: -noise[key])
    return ordered[: -(-len(rows) * WORST // 100)]


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
