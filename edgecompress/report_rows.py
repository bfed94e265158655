"""A run report in words: every number with its unit, every latency with its evidence, and the one table of the report.

The page, the markdown and the terminal's table are drawn from the same `Row` values, so that they never disagree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgecompress.report_spec import ArtifactRow, Goal, LayerRow, RunReport
from edgecompress.runs import ORIGINAL_INT8
from edgecompress.spec import Cost, Stage, Trial, weakest

NONE = "–"
INT8_BITS = 8


@dataclass(frozen=True)
class Cell:
    """One value of the table, what stands small beside it, and the evidence if it is a latency."""

    value: str = NONE
    note: str = ""
    word: str = ""

    def __str__(self) -> str:
        beside = " ".join(part for part in (self.word, f"({self.note})" if self.note else "") if part)
        return f"{self.value} {beside}".strip()


@dataclass(frozen=True)
class Row:
    """One line of the table. ``cells`` are original, the original's int8 file, compressed; ``ratio`` compares the ends."""

    label: str
    note: str
    cells: tuple[Cell, Cell, Cell]
    ratio: Cell


def significant(value: float, digits: int = 3) -> str:
    """``value`` with so many significant digits, thousands separated, never in powers of ten."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else NONE
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def quantity(value: float) -> str:
    """A count: exact below a million, then four digits and a prefix (k is 1000)."""
    for limit, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{significant(value / limit, 4)} {sign}"
    return f"{value:,.0f}"


def rounds(report: RunReport) -> str:
    """What the alternation came to, in a sentence; empty where there was none."""
    if report.rounds is None:
        return ""
    said = ", ".join(f"{name} {report.score.text(value)}" for name, value in report.rounds.scores.items())
    return f"On select-val: {said}; the files hold {report.rounds.exported}."


def file_size(size_bytes: float) -> str:
    """Bytes: exact below ten million, then MB (1 MB is 1,000,000 B)."""
    return f"{size_bytes:,.0f} B" if size_bytes < 1e7 else f"{significant(size_bytes / 1e6, 4)} MB"


def short_size(size_bytes: float) -> str:
    """Bytes in three digits, for a headline."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= limit:
            return f"{significant(size_bytes / limit)} {unit}"
    return f"{size_bytes:,.0f} B"


def duration(us: float | None) -> str:
    """Microseconds, or milliseconds from ten thousand on."""
    if us is None or not math.isfinite(us):
        return NONE
    return f"{significant(us)} µs" if us < 1e4 else f"{significant(us / 1e3)} ms"


def percent(share: float | None, decimals: int = 2) -> str:
    """A share in [0, 1] as percent."""
    return NONE if share is None or not math.isfinite(share) else f"{100 * share:.{decimals}f} %"


def ratio(after: float | None, before: float | None) -> str:
    """``after / before`` the way budgets are written: 0.5x."""
    if after is None or not before:
        return NONE
    share = after / before
    return f"{share:.2f}x" if share >= 0.2 else f"{significant(share, 3 if share >= 0.1 else 2)}x"


def band(cost: Cost) -> str:
    """The bounds of a latency on the target, or nothing."""
    return band_of(cost.latency_low_us, cost.latency_high_us)


def band_of(low_us: float | None, high_us: float | None) -> str:
    """Two bounds in words, or nothing."""
    return "" if low_us is None or high_us is None else f"{duration(low_us)} to {duration(high_us)}"


def latency(cost: Cost) -> Cell:
    """The latency on the target, with its evidence and its band."""
    if cost.latency_us is None:
        return Cell(note="no latency model")
    return Cell(duration(cost.latency_us), band(cost), cost.latency_source)


def evidence(cost: Cost) -> str:
    """On what the kernels of a latency stand."""
    counts = {
        "measured": cost.kernels_measured,
        "interpolated": cost.kernels_interpolated,
        "estimated": cost.kernels_estimated,
    }
    total = sum(counts.values())
    return ", ".join(f"{count} of {total} kernels {word}" for word, count in counts.items() if count)


def weaker(first: Cost, second: Cost) -> str:
    """The weaker evidence of two latencies."""
    return weakest((first.latency_source, second.latency_source))


def layer_latency(row: LayerRow) -> Cell:
    """Both predictions of one layer with their weaker evidence; empty where the model knows no layers."""
    if row.latency is None:
        return Cell()
    before, after = row.latency
    values = ("< 0.1 µs" if part.us < 0.1 else duration(part.us) for part in row.latency)
    return Cell(" → ".join(values), "", weakest((before.source, after.source)))


def outside_us(report: RunReport) -> tuple[float, float] | None:
    """What both latencies on the target hold beside the layers (starting kernels, pooling, additions), in microseconds."""
    parts = [row.latency for row in report.layers if row.latency is not None]
    before, after = report.original.cost.latency_us, report.compressed.cost.latency_us
    if not parts or before is None or after is None:
        return None
    return before - sum(part[0].us for part in parts), after - sum(part[1].us for part in parts)


def predictions(report: RunReport) -> list[ArtifactRow]:
    """The files that were timed on this host and have a prediction for it."""
    return [file for file in report.artifacts if file.predicted_host is not None and file.host_latency_us]


def difference(value: float, reference: float) -> str:
    """How far ``value`` is from ``reference``, in percent with its sign."""
    return f"{100 * (value / reference - 1):+.0f} %"


def shipped(report: RunReport) -> str:
    """The name of the file that goes to the target."""
    names = [artifact.name for artifact in report.artifacts if artifact.format == report.target.exporter]
    return next((name for name in names if not name.startswith("original")), report.compressed.file)


def int8_alone(report: RunReport, trials: Sequence[Trial]) -> tuple[ArtifactRow | None, Cost | None]:
    """The original at 8 bits with nothing pruned: its file on this machine, and its cost from the search's first look."""
    file = next((artifact for artifact in report.artifacts if artifact.name == ORIGINAL_INT8), None)
    if file is None or report.original_int8_bytes is None:
        return None, None
    whole = report.original.cost.macs
    costs = [trial.cost for trial in trials if trial.stage == "prune" and trial.cost.macs == whole]
    return file, next((cost for cost in costs if cost.bops == whole * INT8_BITS**2), None)


def fits(report: RunReport, trial: Trial) -> bool:
    """Whether a trial keeps every budget that its stage searched under."""
    for goal in report.goals:
        metric = goal.goal.partition("=")[0].partition("@")[0]
        cost = trial.cost
        values = {
            "flops": cost.macs, "params": cost.params, "size": cost.size_bytes, "latency": cost.latency_us,
            "bops": None if trial.stage == "prune" else cost.bops,
        }  # fmt: skip
        value = values.get(metric)
        if value is not None and value > goal.limit:
            return False
    return True


def chosen(report: RunReport, trials: Sequence[Trial], stage: Stage) -> Trial | None:
    """The trial that the run built, recognised by its arm and its cost; None where the search's choice was tightened."""
    built = report.compressed.cost

    def same(trial: Trial) -> bool:
        cost = trial.cost
        counts = (cost.macs, cost.params) == (built.macs, built.params)
        return counts and trial.stage == stage and (stage == "prune" or cost.bops == built.bops)

    found = [trial for trial in trials if same(trial) and trial.arm == report.found_by.get(stage)]
    return max(found, key=lambda trial: (trial.reward, -trial.loss), default=None)


def rows(report: RunReport, trials: Sequence[Trial] = ()) -> list[Row]:
    """The one table: original, int8 alone, compressed and the ratio of compressed to original.

    Args:
        trials: where the cost of the unpruned network at 8 bits on the target is taken from; without, it is left open.
    """
    before, after, score = report.original, report.compressed, report.score
    file, cost = int8_alone(report, trials)
    params, macs = (before.cost.params, before.cost.macs) if file else (None, None)

    def counted(label: str, note: str, first: float, middle: float | None, last: float) -> Row:
        whole = Cell(NONE if middle is None else quantity(middle))
        return Row(label, note, (Cell(quantity(first)), whole, Cell(quantity(last))), Cell(ratio(last, first)))

    result = [
        Row(
            score.title,
            f"{score.note} on the test split".strip(),
            (
                Cell(score.text(before.accuracy), before.file),
                Cell(score.text(file.accuracy), file.name) if file else Cell(),
                Cell(score.text(after.accuracy), after.file),
            ),
            Cell(score.difference(after.accuracy, before.accuracy)),
        ),
        counted("Parameters", "elements", before.cost.params, params, after.cost.params),
        counted("Non-zeros", "parameters that are not zero", before.cost.nonzeros, params, after.cost.nonzeros),
        counted("MACs", "dense multiply-adds", before.cost.macs, macs, after.cost.macs),
        counted("Sparse MACs", "on non-zero weights", before.cost.sparse_macs, macs, after.cost.sparse_macs),
        counted("BOPs", "MACs x weight bits x input bits", before.cost.bops, cost.bops if cost else None, after.cost.bops),
        Row(
            "Average weight bits",
            "weighted by layer size",
            (
                Cell(f"{before.average_weight_bits:.2f} bit"),
                Cell(f"{INT8_BITS:.2f} bit" if file else NONE),
                Cell(f"{after.average_weight_bits:.2f} bit"),
            ),
            Cell(ratio(after.average_weight_bits, before.average_weight_bits)),
        ),
    ]  # fmt: skip
    return result + _sizes(report) + _latencies(report, file, cost)


def _sizes(report: RunReport) -> list[Row]:
    """Bytes of the file that goes to the target first, then of every other exported file."""
    before, target = report.original.cost.size_bytes, shipped(report)
    size = report.original_int8_bytes
    int8 = Cell() if size is None else Cell(file_size(size), ORIGINAL_INT8)

    def row(label: str, note: str, size_bytes: int, middle: Cell) -> Row:
        cells = (Cell(file_size(before)), middle, Cell(file_size(size_bytes)))
        return Row(label, note, cells, Cell(ratio(size_bytes, before)))

    result = [row("Size to deploy", target, report.compressed.cost.size_bytes, int8)]
    for artifact in report.artifacts:
        if artifact.name not in (target, report.original.file, ORIGINAL_INT8):
            result.append(row("Size of the file", artifact.name, artifact.size_bytes, Cell()))
    return result


def _latencies(report: RunReport, file: ArtifactRow | None, cost: Cost | None) -> list[Row]:
    before, after = report.original, report.compressed

    def host(us: float | None, p90_us: float | None = None) -> Cell:
        note = f"p90 {duration(p90_us)}" if p90_us is not None else ""
        return Cell(duration(us), note, "measured") if us is not None else Cell()

    lost = before.cost.latency_us is None or after.cost.latency_us is None
    return [
        Row(
            "Latency on this host",
            "ONNX Runtime, batch 1, 1 thread, median",
            (
                host(before.host_latency_us, before.host_latency_p90_us),
                host(report.original_int8_us if file else None),
                host(after.host_latency_us, after.host_latency_p90_us),
            ),
            Cell(ratio(after.host_latency_us, before.host_latency_us), "", "measured"),
        ),
        Row(
            f"Latency on {report.target.device}",
            f"{report.target.runtime} {report.target.runtime_version}, batch 1",
            (latency(before.cost), latency(cost) if cost else Cell(), latency(after.cost)),
            Cell()
            if lost
            else Cell(ratio(after.cost.latency_us, before.cost.latency_us), "", weaker(before.cost, after.cost)),
        ),
    ]


def goal_value(goal: Goal, value: float) -> str:
    """A goal's value or limit in its unit."""
    if goal.unit == "points":
        return f"{value:.2f} points"
    if goal.unit == "us":
        return duration(value)
    return file_size(value) if goal.unit == "B" else f"{quantity(value)} {goal.unit}"


def verdict(goals: Sequence[Goal]) -> str:
    """How many goals were kept, in words."""
    missed = sum(not goal.holds for goal in goals)
    if not goals:
        return "No goal was set"
    if missed:
        return f"{missed} of {len(goals)} goals missed"
    return {1: "The goal was kept", 2: "Both goals kept"}.get(len(goals), f"All {len(goals)} goals kept")
