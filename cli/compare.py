"""``edgecompress compare``: several finished runs in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgecompress.cli.flags import switch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgecompress.comparison import Compared

WIDE = 160  # columns where there is no terminal to ask


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...", type=click.Path(path_type=Path))
@click.option(
    "--format", "format_name", type=click.Choice(["table", "md"]), default="table", show_default=True,
    help="A table for the terminal, or GitHub markdown.",
)  # fmt: skip
@switch("json", "as_json", help="Print JSON: numbers in their own units.")
def command(runs: tuple[Path, ...], format_name: str, as_json: bool) -> None:
    """Compare finished runs: accuracy, bytes, latency and its evidence, MACs, parameters, bits, arm.

    \b
    Examples:
      edgecompress compare runs/first runs/second
      edgecompress compare runs/* --format md
    """
    import json

    from edgecompress.comparison import as_dicts, markdown, read_runs, remarks

    found = read_runs(runs)
    if as_json:
        click.echo(json.dumps({"runs": as_dicts(found), "remarks": remarks(found)}, indent=1))
    elif format_name == "md":
        click.echo(markdown(found), nl=False)
    else:
        _show(found)


def _show(runs: Sequence[Compared]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgecompress.comparison import QUANTITIES, remarks

    console = Console()
    console = console if console.is_terminal else Console(width=WIDE)
    table = Table("run", *(quantity.title for quantity in QUANTITIES), box=None, pad_edge=False, padding=(0, 1))
    for column in table.columns:
        column.overflow = "fold"
    for run in runs:
        cells = []
        for quantity in QUANTITIES:
            cell = Text(quantity.value(run.report))
            below = quantity.below(run.report)
            cell.append(f"\n{below}" if below else "", style="dim")
            cells.append(cell)
        table.add_row(Text(run.name), *cells)
    console.print(table)
    for remark in remarks(runs):
        console.print(Text(remark), style="yellow", highlight=False)
