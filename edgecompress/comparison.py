"""Several finished runs side by side, and what keeps their numbers from being compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompress import report_rows as words
from edgecompress.errors import UsageError
from edgecompress.report_spec import RunReport
from edgecompress.runs import RunFolder


@dataclass(frozen=True)
class Compared:
    """A run and the name that tells it from the others."""

    name: str
    report: RunReport


@dataclass(frozen=True)
class Quantity:
    """A column: its heading, its value in a run, and what stands small below it."""

    title: str
    value: Callable[[RunReport], str]
    below: Callable[[RunReport], str]


def read_runs(paths: Sequence[Path]) -> list[Compared]:
    """Read the reports of finished runs, in the order given.

    Raises:
        BadFileError: a run is missing, broken or did not finish. UsageError: one run is named twice.
    """
    found = [path.resolve() for path in paths]
    twice = next((path for path, whole in zip(paths, found, strict=True) if found.count(whole) > 1), None)
    if twice is not None:
        raise UsageError(f"The run {twice} is named twice; name each run once.")
    reports = [RunFolder(path).report() for path in paths]
    names = [report.name for report in reports]
    return [
        Compared(report.name if names.count(report.name) == 1 else str(path), report)
        for path, report in zip(paths, reports, strict=True)
    ]


def _arms(report: RunReport) -> str:
    return ", ".join(dict.fromkeys(arm for arm in report.found_by.values() if arm != "skipped")) or words.NONE


def _own_score(report: RunReport) -> str:
    """What is measured where that is not accuracy."""
    return "" if report.score.name == "accuracy" else f"{report.score.name}, "


def _on_target(report: RunReport) -> words.Cell:
    return words.latency(report.compressed.cost)


QUANTITIES = (
    Quantity("device", lambda r: r.target.name, lambda r: r.target.runtime),
    Quantity(
        "accuracy", lambda r: r.score.text(r.compressed.accuracy),
        lambda r: _own_score(r) + r.score.difference(r.compressed.accuracy, r.original.accuracy),
    ),
    Quantity(
        "bytes", lambda r: words.file_size(r.compressed.cost.size_bytes),
        lambda r: words.ratio(r.compressed.cost.size_bytes, r.original.cost.size_bytes),
    ),
    Quantity("latency on device", lambda r: _on_target(r).value, lambda r: _on_target(r).word),
    Quantity(
        "latency on host", lambda r: words.duration(r.compressed.host_latency_us),
        lambda r: "measured",
    ),
    Quantity(
        "MACs", lambda r: words.quantity(r.compressed.cost.macs),
        lambda r: words.ratio(r.compressed.cost.macs, r.original.cost.macs),
    ),
    Quantity(
        "parameters", lambda r: words.quantity(r.compressed.cost.params),
        lambda r: words.ratio(r.compressed.cost.params, r.original.cost.params),
    ),
    Quantity("bits", lambda r: f"{r.compressed.average_weight_bits:.2f}", lambda r: "average"),
    Quantity("found by", _arms, lambda r: ""),
    Quantity("goals", lambda r: words.verdict(r.goals), lambda r: ""),
)  # fmt: skip


def remarks(runs: Sequence[Compared]) -> list[str]:
    """Why numbers of these runs must not be compared, one sentence each."""
    facts: tuple[tuple[str, str, Callable[[RunReport], str]], ...] = (
        ("data", "accuracies are not comparable", lambda r: r.config.data),
        ("score", "accuracies are not comparable", lambda r: r.score.name),
        ("network", "ratios are to different originals", lambda r: r.config.model),
        ("device", "latencies on the device are not comparable", lambda r: r.target.name),
        ("host", "latencies on the host are not comparable", lambda r: r.provenance.get("machine", "?")),
    )
    result = []
    for what, consequence, value in facts:
        values = dict.fromkeys(value(run.report) for run in runs)
        if len(values) > 1:
            result.append(f"The runs differ in {what} ({', '.join(values)}): {consequence}.")
    sources = dict.fromkeys(run.report.compressed.cost.latency_source for run in runs)
    if len(sources) > 1:
        result.append(f"Latencies on the device stand on different evidence ({', '.join(sources)}).")
    return result


def as_dicts(runs: Sequence[Compared]) -> list[dict[str, Any]]:
    """The numbers in their own units: accuracy in [0, 1], bytes, microseconds, counts."""
    return [
        {
            "run": run.name,
            "model": run.report.config.model,
            "data": run.report.config.data,
            "target": run.report.target.name,
            "score": run.report.score.name,
            "accuracy": run.report.compressed.accuracy,
            "original_accuracy": run.report.original.accuracy,
            "size_bytes": run.report.compressed.cost.size_bytes,
            "latency_us": run.report.compressed.cost.latency_us,
            "latency_source": run.report.compressed.cost.latency_source
            if run.report.compressed.cost.latency_us
            else None,
            "host_latency_us": run.report.compressed.host_latency_us,
            "macs": run.report.compressed.cost.macs,
            "params": run.report.compressed.cost.params,
            "average_weight_bits": run.report.compressed.average_weight_bits,
            "found_by": run.report.found_by,
            "goals_missed": [goal.goal for goal in run.report.goals if not goal.holds],
        }
        for run in runs
    ]


def markdown(runs: Sequence[Compared]) -> str:
    """A GitHub table, one line per run."""
    from edgecompress.report_text import markdown_cell

    lines = [f"| run | {' | '.join(quantity.title for quantity in QUANTITIES)} |", f"|---|{'--:|' * len(QUANTITIES)}"]
    for run in runs:
        cells = [run.name]
        for quantity in QUANTITIES:
            below = quantity.below(run.report)
            cells.append(quantity.value(run.report) + (f" ({below})" if below else ""))
        lines.append(f"| {' | '.join(markdown_cell(cell) for cell in cells)} |")
    return "\n".join([*lines, "", *(f"- {markdown_cell(remark)}" for remark in remarks(runs)), ""])
