"""``edgecompress targets``: the devices that are known, and whether their latencies are measured or estimated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgecompress.spec import Target


@click.command("targets")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> None:
    """List the known devices, or show all facts of one with their sources.

    \b
    Example:
      edgecompress targets jetson
    """
    import json

    from edgecompress.latency_tables.predict import latency_model
    from edgecompress.latency_tables.targets import all_targets, target_by_name

    targets = [target_by_name(name)] if name else list(all_targets().values())
    latency = {target.name: latency_model(target)[1] for target in targets}
    if as_json:
        facts = [target.model_dump(mode="json") | {"latency": latency[target.name]} for target in targets]
        click.echo(json.dumps(facts[0] if name else facts, indent=1))
    elif name:
        _show_one(targets[0].model_dump(mode="json") | {"latency": latency[targets[0].name]})
    else:
        _show_all(targets, latency)


def _show_all(targets: list[Target], latency: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("target", "runtime", "precisions", "divisor", "latency", box=None)
    for target in targets:
        divisors = "/".join(str(target.channel_divisor[precision]) for precision in target.precisions)
        names = target.name + (f" ({target.aliases[0]})" if target.aliases else "")
        runtime = f"{target.runtime} {target.runtime_version}"
        source = "measured" if latency[target.name].startswith("measured") else "estimated"
        table.add_row(names, runtime, "/".join(target.precisions), divisors, source)
    Console().print(table)


def _show_one(facts: dict[str, object]) -> None:
    for key, value in facts.items():
        if isinstance(value, dict):
            for part, text in value.items():
                click.echo(f"{part + ' (' + key + ')' if key != 'facts' else part:26} {text}")
        else:
            click.echo(f"{key:26} {', '.join(map(str, value)) if isinstance(value, list) else value}")
