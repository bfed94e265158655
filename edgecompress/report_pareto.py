"""The Pareto set of a search in the report: the trials that no other one beats in everything, and how to take another."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgecompress import report_rows as words
from edgecompress.pareto import pareto_set
from edgecompress.report_spec import RunReport
from edgecompress.spec import Cost, Stage, Trial, weakest

_COLUMNS: tuple[tuple[str, str, Callable[[Cost], float | None], Callable[[float], str]], ...] = (
    ("flops", "dense MACs", lambda cost: cost.macs, words.quantity),
    ("params", "parameters", lambda cost: cost.params, words.quantity),
    ("size", "bytes", lambda cost: cost.size_bytes, words.short_size),
    ("bops", "BOPs", lambda cost: cost.bops, words.quantity),
    ("latency", "latency", lambda cost: cost.latency_us, words.duration),
)


@dataclass(frozen=True)
class Row:
    """One trial of the set: the score that the search believes in, its costs as text, and whether it was built and keeps the budgets."""

    trial: Trial
    score: str
    costs: tuple[str, ...]
    colour: int
    built: bool
    fits: bool


@dataclass(frozen=True)
class Front:
    """The table of one stage. ``commands`` are what to type to see the set again, and in stage 1 to build another of it."""

    headings: tuple[str, ...]
    rows: tuple[Row, ...]
    commands: tuple[str, ...]


def front(
    report: RunReport, trials: Sequence[Trial], stage: Stage, built: Trial | None, colours: Mapping[str, int]
) -> Front:
    """The Pareto set of ``trials``, all of ``stage``; of the costs those that differ, and those that a budget limits."""
    found = pareto_set(trials)
    limited = {goal.goal.partition("=")[0].partition("@")[0] for goal in report.goals}
    shown = []
    for name, title, cost_of, write in _COLUMNS:
        if name == "bops" and stage == "prune":  # before any bits are chosen
            continue
        values = {cost_of(trial.cost) for trial in found}
        if None not in values and any(values) and (len(values) > 1 or name in limited):
            word = f", {weakest(trial.cost.latency_source for trial in found)}" if name == "latency" else ""
            shown.append((title + word, cost_of, write))
    rows = tuple(
        Row(
            trial=trial,
            score=report.score.text(trial.believed),
            costs=tuple(write(cost_of(trial.cost) or 0.0) for _, cost_of, write in shown),
            colour=colours[trial.arm],
            built=trial is built,
            fits=words.fits(report, trial),
        )
        for trial in found
    )
    return Front(tuple(title for title, _, _ in shown), rows, _commands(report, found, stage, built))


def _commands(report: RunReport, found: Sequence[Trial], stage: Stage, built: Trial | None) -> tuple[str, ...]:
    run = shlex.quote(f"runs/{report.name}")
    if stage == "quantize":
        return (f"edgecompress pick {run} --stage quantize",)
    whole = report.original.cost.macs
    most = built.cost.macs if built is not None else report.compressed.cost.macs
    cheaper = next((trial for trial in found if trial.cost.macs < most), None)
    if cheaper is None or not whole:
        return (f"edgecompress pick {run}",)
    budget = f"flops={math.ceil(1000 * cheaper.cost.macs / whole) / 1000:g}x"
    name = shlex.quote(f"{report.name}-other")
    return (
        f"edgecompress pick {run} {budget}",
        f"edgecompress compress --config {run}/run.toml --pick {run} --budget {budget} --name {name}",
    )
