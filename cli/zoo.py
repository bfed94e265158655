"""``edgecompress zoo``: the compressed networks that come with the package, and what each was measured at."""

from __future__ import annotations

import click


@click.command("zoo")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the compressed networks that 'compress --model' and 'eval' take by name.

    \b
    Example:
      edgecompress zoo
    """
    import json

    from edgecompress.shipped import cards

    found = cards()
    if as_json:
        click.echo(json.dumps({name: card.model_dump(mode="json") for name, card in found.items()}, indent=1))
        return
    if not found:
        click.echo("No compressed network comes with this version; a run of your own is one: --model runs/NAME.")
    for name, card in found.items():
        click.echo(f"{name}: {card.base} on {card.data}")
        change = 100 * (card.accuracy - card.baseline_accuracy)
        click.echo(f"  accuracy {card.accuracy:.2%} ({change:+.2f} points to the unpruned network, tuned alike)")
        click.echo(
            f"  {card.params:,} parameters, {card.macs:,} MACs, {card.average_weight_bits:.2f} bits a weight, "
            f"{card.size_bytes:,} bytes"
        )
        click.echo(f"  measured: {card.row}")
        click.echo(f"  licence: {card.licence}")
