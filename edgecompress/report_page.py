"""The report of a run for people: one self-contained HTML page (markdown and the terminal's table: `report_text`).

The page loads nothing: style, charts and text are inside, and everything that a user named is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, get_args

from markupsafe import Markup

from edgecompress import report_charts as charts
from edgecompress import report_rows as words
from edgecompress.pareto import pareto_set
from edgecompress.report_checks import checks_of
from edgecompress.report_pareto import front
from edgecompress.report_spec import RunReport
from edgecompress.report_text import TITLES, command, render_markdown, summary_table
from edgecompress.spec import FLOAT_BITS, Stage, Trial

if TYPE_CHECKING:
    from jinja2 import Template


def render_html(report: RunReport, trials: Sequence[Trial]) -> str:
    """The whole page.

    Args:
        trials: what the search tried, in any order; without any, the page says so where the charts would stand.
    """
    shipped = words.shipped(report)
    arms = [trial.arm for trial in trials] + [key.partition(":")[2] for key in report.evaluations]
    colours = {arm: index % charts.COLOURS for index, arm in enumerate(dict.fromkeys(arms))}
    context = {
        "report": report,
        "config": report.config,
        "target": report.target,
        "words": words,
        "verdict": words.verdict(report.goals),
        "missed": [goal for goal in report.goals if not goal.holds],
        "goals": [_goal(report, index) for index in range(len(report.goals))],
        "rows": words.rows(report, trials),
        "shipped": shipped,
        "target_accuracy": next(
            (a.accuracy for a in report.artifacts if a.name == shipped != report.compressed.file), None
        ),
        "layers": _layers(report),
        "outside": _outside(report),
        "predictions": _predictions(report),
        "stages": [_stage(report, trials, stage, colours) for stage in get_args(Stage)],
        "checks": {artifact.name: checks_of(artifact.checks) for artifact in report.artifacts},
        "command": command(report.config),
        "in_memory": report.config.model.startswith("<"),
        "seconds": sum(report.seconds.values()),
    }
    return _template().render(context)


@lru_cache(maxsize=1)
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("edgecompress", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _goal(report: RunReport, index: int) -> dict[str, object]:
    """One goal with the share of its limit that is used, and whether its value is only predicted."""
    goal = report.goals[index]
    used = max(goal.value, 0.0) / goal.limit if goal.limit > 0 else float(not goal.holds)
    cost = report.compressed.cost
    return {
        "goal": goal.goal,
        "holds": goal.holds,
        "value": words.goal_value(goal, goal.value),
        "limit": words.goal_value(goal, goal.limit),
        "used": used,
        "word": cost.latency_source if goal.unit == "us" else "",
    }


def _layers(report: RunReport) -> list[dict[str, object]]:
    """Numbers and bar widths (percent) of every layer; its MACs and its latency are shares of the original network's."""
    layers = report.layers
    slowest = max((part.us for layer in layers for part in layer.latency or ()), default=0.0)
    whole = max(sum(layer.macs[0] for layer in layers), 1)
    largest = max((layer.macs[0] for layer in layers), default=1) or 1
    return [
        {
            "row": layer,
            "name": Markup(".<wbr>").join(layer.name.split(".")),
            "kept": 100 * layer.out_channels[1] / max(layer.out_channels[0], 1),
            "share": tuple(macs / whole for macs in layer.macs),
            "share_bars": tuple(100 * macs / largest for macs in layer.macs),
            "latency": words.layer_latency(layer),
            "latency_bars": tuple(_bar(part.us, slowest) for part in layer.latency or ()),
            "latency_shares": _shares(report, tuple(part.us for part in layer.latency or ())),
            "weight_bits": _bits(layer.weight_bits),
            "activation_bits": _bits(layer.activation_bits),
            "elements": 100 * layer.keep_elements,
        }
        for layer in layers
    ]


def _bar(value: float, longest: float) -> float:
    """The width of a bar in percent."""
    return 100 * min(max(value, 0.0), longest) / longest if longest > 0 else 0.0


def _shares(report: RunReport, us: tuple[float, ...]) -> str:
    """Parts of the original's latency on the target, before and after."""
    whole = report.original.cost.latency_us
    return " → ".join(words.percent(part / whole, 1) for part in us) if whole else ""


def _outside(report: RunReport) -> dict[str, object] | None:
    """The row below the layers: what the latency on the target holds beside them."""
    us = words.outside_us(report)
    if us is None:
        return None
    return {
        "shares": _shares(report, us),
        "us": f"{words.duration(us[0])} → {words.duration(us[1])}",
        "word": words.weaker(report.original.cost, report.compressed.cost),
    }


def _predictions(report: RunReport) -> list[dict[str, object]]:
    """Prediction and measured time of every file that was timed here, on one scale (percent of the longest)."""
    rows = words.predictions(report)
    ends = [max(file.host_latency_us or 0.0, p.high_us or p.us) for file in rows if (p := file.predicted_host)]
    longest = max(ends, default=0.0)
    found = []
    for file in rows:
        said, took = file.predicted_host, file.host_latency_us
        assert said is not None and took is not None
        low, high = _bar(said.low_us or said.us, longest), _bar(said.high_us or said.us, longest)
        found.append(
            {
                "name": file.name,
                "predicted": words.duration(said.us),
                "band": words.band_of(said.low_us, said.high_us),
                "word": said.source,
                "measured": words.duration(took),
                "difference": words.difference(said.us, took),
                "bar": _bar(took, longest),
                "at": _bar(said.us, longest),
                "low": low,
                "wide": high - low,
            }
        )
    return found


def _bits(bits: int) -> dict[str, object]:
    """Text and bar of a width in bits; up to 8 the bar is a share of 8."""
    return {
        "text": "float" if bits == FLOAT_BITS else f"{bits} bit",
        "bar": min(100.0, 12.5 * bits),
        "whole": bits > 8,
    }


def _stage(report: RunReport, trials: Sequence[Trial], stage: Stage, colours: Mapping[str, int]) -> dict[str, object]:
    """Everything the page shows of one search; an arm has one colour in both."""
    own = sorted((trial for trial in trials if trial.stage == stage), key=lambda trial: trial.episode)
    counts = {
        key.partition(":")[2]: count for key, count in report.evaluations.items() if key.partition(":")[0] == stage
    }
    arms = list(dict.fromkeys([trial.arm for trial in own] + list(counts)))
    drawn = [trial for trial in own if math.isfinite(trial.reward) and math.isfinite(trial.accuracy)]
    best = {arm: _best([t for t in drawn if t.arm == arm and words.fits(report, t)]) for arm in arms}
    built = words.chosen(report, own, stage)
    return {
        "title": TITLES[stage],
        "ran": bool(arms) or report.found_by.get(stage, "skipped") != "skipped",
        "drawn": bool(drawn),
        "total": sum(counts.values()) or len(own),
        "found_by": report.found_by.get(stage, ""),
        "reward": report.config.prune_reward if stage == "prune" else report.config.quantize_reward,
        "tightened": bool(drawn) and built is None,
        "arms": [
            {
                "name": arm,
                "colour": colours[arm],
                "evaluations": counts.get(arm, sum(trial.arm == arm for trial in own)),
                "best": best[arm],
                "won": arm == report.found_by.get(stage),
            }
            for arm in arms
        ],
        "front": front(report, drawn, stage, built, colours) if drawn else None,
        "pareto": _pareto(report, drawn, colours, built) if drawn else Markup(),
        "curve": _curve(report, drawn, colours, built) if drawn else Markup(),
    }


def _best(trials: Sequence[Trial]) -> Trial | None:
    return max(trials, key=lambda trial: trial.reward, default=None)


def _cost_axis(trials: Sequence[Trial]) -> tuple[str, charts.Axis, Callable[[Trial], float]]:
    """The cost that a stage trades accuracy for: MACs in stage 1; bytes in stage 2, or BOPs where bits move no byte."""
    if trials[0].stage == "prune":
        return "flops", charts.Axis("dense MACs", words.quantity), lambda trial: float(trial.cost.macs)
    if len({trial.cost.size_bytes for trial in trials}) > 1:
        title = "predicted size to deploy"
        return "size", charts.Axis(title, words.short_size), lambda trial: float(trial.cost.size_bytes)
    return "bops", charts.Axis("BOPs", words.quantity), lambda trial: float(trial.cost.bops)


def _pareto(report: RunReport, trials: Sequence[Trial], colours: Mapping[str, int], built: Trial | None) -> Markup:
    score = report.score
    metric, axis, cost_of = _cost_axis(trials)
    unbeaten = {trial.choice for trial in pareto_set(trials)}
    marks = [
        charts.Mark(
            x=cost_of(trial),
            y=score.shown(trial.believed),
            colour=colours[trial.arm],
            label=f"{trial.arm}, trial {trial.episode}: {score.text(trial.believed)} at {axis.write(cost_of(trial))}",
            hollow=not words.fits(report, trial),
            chosen=trial is built,
            small=trial.choice not in unbeaten,
        )
        for trial in trials
    ]
    limit = next((goal.limit for goal in report.goals if goal.goal.startswith(f"{metric}=")), None)
    label = f"{score.title} against {axis.title} of {len(trials)} trials."
    if built is not None:
        label += f" Built: {score.text(built.believed)} at {axis.write(cost_of(built))}."
    return charts.chart(
        marks,
        charts.Axis(f"{axis.title} →", _tick(axis.write)),
        charts.Axis(f"expected {score.name}{', %' if score.percent else ''}", _plain),
        label,
        line=_rising(sorted((mark.x, mark.y) for mark in marks)),
        limit=(limit, "budget") if limit is not None else None,
    )


def _curve(report: RunReport, trials: Sequence[Trial], colours: Mapping[str, int], built: Trial | None) -> Markup:
    marks = [
        charts.Mark(
            x=trial.episode,
            y=trial.reward,
            colour=colours[trial.arm],
            label=f"{trial.arm}, trial {trial.episode}: reward {trial.reward:.3f}",
            hollow=not words.fits(report, trial),
            chosen=trial is built,
        )
        for trial in trials
    ]
    line = _rising((trial.episode, trial.reward) for trial in trials if words.fits(report, trial))
    if line:
        line.append((trials[-1].episode, line[-1][1]))
    label = f"Reward of {len(trials)} trials in their order, and the best so far."
    if line:
        label += f" It ends at {line[-1][1]:.3f}."
    return charts.chart(marks, charts.Axis("trial →", _plain), charts.Axis("reward", _plain), label, line=line)


def _rising(values: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the best so far: those that are higher than all before them."""
    corners: list[tuple[float, float]] = []
    for x, y in values:
        if not corners or y > corners[-1][1]:
            corners.append((x, y))
    return corners


def _plain(value: float) -> str:
    """A tick's number without needless digits."""
    return f"{value:.6g}".replace("-0", "0") if abs(value) < 1e-12 else f"{value:.6g}"


def _tick(write: Callable[[float], str]) -> Callable[[float], str]:
    """A shorter form for ticks: ``6.000 M`` becomes ``6 M``."""

    def written(value: float) -> str:
        number, space, unit = write(value).partition(" ")
        if "." in number:
            number = number.rstrip("0").rstrip(".")
        return number + space + unit

    return written


__all__ = ["render_html", "render_markdown", "summary_table"]
