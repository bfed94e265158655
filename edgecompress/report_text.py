"""The report of a run where there is no browser: short GitHub markdown, and the one table that a terminal shows."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from edgecompress import report_rows as words
from edgecompress.report_checks import checks_of
from edgecompress.report_rows import Cell
from edgecompress.report_spec import RunReport
from edgecompress.runs import ORIGINAL_INT8
from edgecompress.spec import Config, Stage, Trial

if TYPE_CHECKING:
    from rich.table import Table

TITLES: dict[Stage, str] = {"prune": "Stage 1: channels", "quantize": "Stage 2: bit-widths"}


def render_markdown(report: RunReport, trials: Sequence[Trial] = ()) -> str:
    """The same story, short, as GitHub markdown."""
    config, after, before = report.config, report.compressed, report.original
    score = report.score
    accuracy = f"{score.title} {score.text(before.accuracy)} → {score.text(after.accuracy)}"
    size = f"{words.file_size(before.cost.size_bytes)} → {words.file_size(after.cost.size_bytes)}"
    lines = [
        f"# {markdown_cell(config.model)} on {markdown_cell(config.data)} for {markdown_cell(report.target.device)}",
        "",
        f"**{words.verdict(report.goals)}.** {markdown_cell(accuracy)}, size {size}.",
        "",
    ]
    for goal in report.goals:
        value, limit = words.goal_value(goal, goal.value), words.goal_value(goal, goal.limit)
        lines.append(f"- {'kept' if goal.holds else '**missed**'}: {markdown_cell(goal.goal)} ({value}, limit {limit})")
    lines += ["", "| | original | original int8, not pruned | compressed | ratio |", "|---|--:|--:|--:|--:|"]
    for row in words.rows(report, trials):
        cells = [f"{row.label} ({row.note})", *map(str, row.cells), str(row.ratio)]
        lines.append(f"| {' | '.join(markdown_cell(cell) for cell in cells)} |")
    lines += ["", f"Latency on the target: {markdown_cell(report.latency_source)}.", ""]
    lines += [
        f"| file | size | {markdown_cell(score.name)} | latency on this host | predicted for this host | checks |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for artifact in report.artifacts:
        host = words.duration(artifact.host_latency_us)
        host = f"{host} measured" if artifact.host_latency_us is not None else "not run here"
        said = artifact.predicted_host
        predicted = f"{words.duration(said.us)} {said.source}" if said else words.NONE
        checks = ", ".join(f"{check.text}: {check.value}" for check in checks_of(artifact.checks)) or words.NONE
        cells = [artifact.name, words.file_size(artifact.size_bytes), score.text(artifact.accuracy)]
        cells += [host, predicted, checks]
        lines.append(f"| {' | '.join(markdown_cell(cell) for cell in cells)} |")
    found = ", ".join(
        f"{TITLES[s].lower()}: {markdown_cell(report.found_by[s])}" for s in get_args(Stage) if s in report.found_by
    )
    lines += ["", f"Found by {found or 'no search'}. {words.rounds(report)}".rstrip(), ""]
    lines += ["~~~~sh", command(config), "~~~~", ""]
    facts = ", ".join(f"{markdown_cell(key)} {markdown_cell(value)}" for key, value in report.provenance.items())
    return "\n".join([*lines, f"Made with {facts}.", ""])


def command(config: Config) -> str:
    """The command line that runs ``config`` again: the deciding options always, the others where they are not the default."""
    always = ("model", "data", "target", "budget", "episodes", "seed")
    parts = ["edgecompress compress"]
    for name in [*always, *(name for name in Config.model_fields if name not in (*always, "schema_version"))]:
        value = getattr(config, name)
        option = f"--{name.replace('_', '-')}"
        if name not in always and value == Config.model_fields[name].default:
            continue
        if isinstance(value, bool):
            parts.append(option if value else f"--no-{option.removeprefix('--')}")
        else:
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            parts.append(f"{option} {shlex.quote(text)}")
    return " ".join(parts)


def markdown_cell(text: str) -> str:
    """A user's string that cannot end a cell, start a tag or format anything."""
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*"), ("`", "\\`"), ("_", "\\_")):
        text = text.replace(sign, written)
    return " ".join(text.split())


def summary_table(report: RunReport, trials: Sequence[Trial] = ()) -> Table:
    """The one table that a terminal shows: original against compressed, with the evidence of every latency."""
    from rich.table import Table
    from rich.text import Text

    with_int8 = report.original_int8_bytes is not None
    table = Table(title=Text(f"{report.name}: {words.verdict(report.goals)}"), show_lines=False, padding=(0, 0))
    for header in ("", "original", *(["int8 alone"] if with_int8 else []), "compressed", "ratio"):
        table.add_column(header, justify="right" if header else "left", overflow="fold")

    def stacked(cell: Cell) -> Text:
        text = Text(cell.value)
        note = "" if cell.note == ORIGINAL_INT8 else cell.note  # its column says so, and 80 columns are narrow
        for part in (cell.word, note):
            text.append(f"\n{part}" if part else "", style="dim")
        return text

    for row in words.rows(report, trials):
        label = Text(row.label)
        if row.label.startswith("Size"):
            label.append(f"\n{row.note}", style="dim")
        cells = row.cells if with_int8 else (row.cells[0], row.cells[2])
        table.add_row(label, *map(stacked, cells), stacked(row.ratio))
    return table
