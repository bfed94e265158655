"""``edgecompress report``: the report of a finished run as a page, as markdown or as JSON."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--format", "format_name", type=click.Choice(["html", "md", "json"]), default="html", show_default=True,
    help="html is written to RUN/report.html; md and json are printed.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file instead.")
def command(run: Path, format_name: str, out: Path | None) -> None:
    """Show what the finished run RUN reached, and write its page again.

    \b
    Example:
      edgecompress report runs/first --format md
    """
    import json

    from rich.console import Console

    from edgecompress.files import write_text
    from edgecompress.report_page import render_html, render_markdown, summary_table
    from edgecompress.runs import RunFolder

    folder = RunFolder(run)
    report, trials = folder.report(), folder.trials()
    if format_name == "html":
        path = out or folder.file("report.html")
        write_text(path, render_html(report, trials))
        Console().print(summary_table(report, trials))
        click.echo(str(path))
        return
    as_json = format_name == "json"
    text = json.dumps(report.model_dump(mode="json"), indent=1) + "\n" if as_json else render_markdown(report, trials)
    if out is None:
        click.echo(text, nl=False)
    else:
        write_text(out, text)
        click.echo(str(out))
