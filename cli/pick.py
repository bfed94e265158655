"""``edgecompress pick``: what a search already knows about another budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgecompress.cli.flags import switch

if TYPE_CHECKING:
    from edgecompress.pareto import Pick


@click.command("pick")
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.argument("budget", required=False)
@click.option(
    "--stage", type=click.Choice(["prune", "quantize"]), default="prune", show_default=True,
    help="Whose trials: channels or bit-widths.",
)  # fmt: skip
@switch("json", "as_json", help="Print JSON: the Pareto set, and what was picked.")
def command(run: Path, budget: str | None, stage: str, as_json: bool) -> None:
    """Show the trials of RUN that no other one beats in everything, and the best one within BUDGET. Nothing is searched.

    \b
    Examples:
      edgecompress pick runs/first
      edgecompress pick runs/first latency=0.4x
      edgecompress compress --pick runs/first --budget latency=0.4x --name faster
    """
    import json

    from edgecompress.errors import GoalMissedError
    from edgecompress.pareto import check_precision, pick
    from edgecompress.runs import RunFolder
    from edgecompress.spec import parse_budgets

    folder = RunFolder(run)
    budgets = parse_budgets(budget) if budget else ()
    check_precision(folder.config(), budgets, str(run))
    found = pick(folder.trials(), "quantize" if stage == "quantize" else "prune", budgets, str(run))
    if as_json:
        click.echo(json.dumps({
            "pareto": [trial.model_dump(mode="json") for trial in found.front],
            "picked": found.trial.model_dump(mode="json") if found.trial else None,
        }, indent=1))  # fmt: skip
    else:
        _show(found)
    if budgets and found.trial is None:
        raise GoalMissedError(
            f"No trial of {run} keeps {budget}. Search with it: edgecompress compress --budget {budget}."
        )


def _show(found: Pick) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("", "accuracy", "MACs", "params", "bytes", "latency", "arm", box=None, pad_edge=False, padding=(0, 1))
    for trial in found.front:
        cost = trial.cost
        latency = f"{cost.latency_us:,.0f} us" if cost.latency_us is not None else "–"
        table.add_row(
            "→" if trial == found.trial else "", f"{trial.believed:.4f}", f"{cost.macs:,}", f"{cost.params:,}",
            f"{cost.size_bytes:,}", latency, trial.arm,
        )  # fmt: skip
    console.print(table)
    console.print(
        "Accuracy is what the search expects on other images, before any training.", style="dim", highlight=False
    )
