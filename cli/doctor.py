"""``edgecompress doctor``: what this machine can do, and the command that mends what it cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgecompress.cli.flags import switch

if TYPE_CHECKING:
    from edgecompress.doctor import Checkup, Finding

MARKS = {"ok": ("ok", "green"), "missing": ("--", "yellow"), "problem": ("!!", "red"), "info": ("", "dim")}


@click.command("doctor")
@switch("json", "as_json", help="Print JSON.")
def command(as_json: bool) -> None:
    """Examine this machine: versions, CPU, memory, GPU, runtimes, latency table, cache.

    Exit code 1 when something is wrong without which edgecompress cannot work; optional parts that are not there
    are named with the command that installs them.

    \b
    Example:
      edgecompress doctor
      edgecompress doctor --json
    """
    import json

    from edgecompress.doctor import examine

    checkup = examine()
    if as_json:
        click.echo(json.dumps(checkup.as_dict(), indent=1))
    else:
        _show(checkup)
    if not checkup.healthy:
        raise click.exceptions.Exit(1)


def _show(checkup: Checkup) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("", "", "", "", box=None, show_header=False, pad_edge=False)
    group = ""
    for finding in checkup.findings:
        mark, colour = MARKS[finding.status]
        first = "" if finding.group == group else finding.group
        group = finding.group
        table.add_row(Text(first, style="bold"), Text(mark, style=colour), Text(finding.name), Text(_words(finding)))
    console.print(table)
    failed = [finding.name for finding in checkup.findings if finding.failed]
    verdict = f"Cannot work: {', '.join(failed)}." if failed else "Everything that is required is there."
    console.print(verdict, style="bold", highlight=False)


def _words(finding: Finding) -> str:
    return finding.found + (f"\n-> {finding.fix}" if finding.fix else "")
