"""``edgecompress tables``: show, compare, merge, check and validate measured latency tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgecompress.cli.flags import switch

if TYPE_CHECKING:
    from edgecompress.latency_tables.table import KernelKey

FILE = click.Path(path_type=Path, dir_okay=False)


@click.group("tables")
def command() -> None:
    """Look into measured latency tables (.csv with the .json beside it).

    \b
    Examples:
      edgecompress tables show pi.csv
      edgecompress tables compare monday.csv friday.csv
      edgecompress tables merge monday.csv friday.csv --out pi.csv
    """


@command.command("show")
@click.argument("table", type=FILE)
@switch("json", "as_json", help="Print JSON.")
def show(table: Path, as_json: bool) -> None:
    """Rows by kind, the setting, the provenance, and what is missing in TABLE.

    \b
    Example:
      edgecompress tables show pi.csv
    """
    import json

    from edgecompress.latency_tables.predict import describe
    from edgecompress.latency_tables.table import read_table
    from edgecompress.latency_tables.table_tools import counts, holes

    found = read_table(table)
    rows, missing = counts(found), holes(found)
    if as_json:
        listed = [{"kind": k, "precision": p, "status": s, "rows": n} for (k, p, s), n in rows.items()]
        facts = {"rows": listed, "holes": vars(missing), "provenance": found.provenance.model_dump(mode="json")}
        click.echo(json.dumps(facts, indent=1))
        return
    click.echo(f"{found.provenance.target}: {describe(found.provenance, len(found.usable))}")
    for (kind, precision, status), count in rows.items():
        click.echo(f"  {count:6} {kind:10} {precision:5} {status}")
    for name, value in {**found.provenance.setting.model_dump(), **found.provenance.machine}.items():
        click.echo(f"  {name:20} {value}")
    for status, count in missing.without.items():
        click.echo(f"hole: {count} kernels are {status} and stay estimated")
    if missing.contended:
        click.echo(
            f"hole: {missing.contended} kernels were measured while disturbed; profile again to measure them anew"
        )
    if missing.single:
        click.echo(f"hole: {missing.single} shapes have one width only, nothing can be interpolated there")


@command.command("compare")
@click.argument("first", type=FILE)
@click.argument("second", type=FILE)
@click.option("--worst", default=5, show_default=True, help="How many of the most different kernels are listed.")
@switch("json", "as_json", help="Print JSON.")
def compare(first: Path, second: Path, worst: int, as_json: bool) -> None:
    """Join two tables of any settings on their kernels: ratio of SECOND's medians over FIRST's.

    \b
    Example:
      edgecompress tables compare monday.csv friday.csv
    """
    import json

    from edgecompress.latency_tables.table import mismatch, read_table
    from edgecompress.latency_tables.table_tools import compare

    one, two = read_table(first), read_table(second)
    found = compare(one, two)
    differs = mismatch(two.provenance.setting, one.provenance.setting)
    ratios = {dtype: found.quantiles(dtype) for dtype in found.precisions}
    rows = [(pair, _kernel(pair.first.key)) for pair in found.worst(worst)]
    if as_json:
        listed = [
            {"kernel": name, "first_us": p.first.median_us, "second_us": p.second.median_us, "ratio": p.ratio}
            for p, name in rows
        ]
        facts = {
            "setting": differs, "ratio": ratios, "only_first": found.only_first, "only_second": found.only_second,
            "disagreeing": found.disagreeing, "worst": listed,
        }  # fmt: skip
        click.echo(json.dumps(facts, indent=1))
        return
    if differs:
        click.echo(f"settings differ: {differs}")
    for dtype, values in ratios.items():
        low, middle, high = values["p10"], values["median"], values["p90"]
        click.echo(
            f"{dtype}: {values['pairs']} kernels in both, second / first median {middle:.3f} (80 %: {low:.3f} to {high:.3f})"
        )
    click.echo(
        f"only in the first {found.only_first}, only in the second {found.only_second}, apart by more than 3 MAD "
        f"{found.disagreeing}"
    )
    for pair, name in rows:
        click.echo(f"  {pair.ratio:6.3f}  {pair.first.median_us:9.1f} us  {pair.second.median_us:9.1f} us  {name}")


def _kernel(key: KernelKey) -> str:
    return (
        f"{key.kind} {key.in_channels} -> {key.out_channels}, {key.kernel_h}x{key.kernel_w}, {key.out_h}x{key.out_w}, "
        f"{key.weight_dtype}"
    )


@command.command("merge")
@click.argument("tables", nargs=-1, required=True, type=FILE)
@click.option("--out", required=True, type=FILE, help="New file for the union.")
def merge(tables: tuple[Path, ...], out: Path) -> None:
    """Unite tables of one setting; two that disagree on a kernel by more than 3 MAD are refused.

    \b
    Example:
      edgecompress tables merge monday.csv friday.csv --out pi.csv
    """
    from edgecompress.latency_tables.table_tools import merge

    found = merge(tables, out)
    click.echo(f"{out}: {len(found.rows)} kernels of {len(tables)} tables")


@command.command("check")
@click.argument("tables", nargs=-1, required=True, type=FILE)
def check(tables: tuple[Path, ...]) -> None:
    """Read every line of TABLES and name each that is wrong; nothing is changed. Exit code 2 if there is one.

    \b
    Example:
      edgecompress tables check pi.csv
    """
    from edgecompress.latency_tables.table_tools import check_file

    wrong = [finding for table in tables for finding in check_file(table)]
    for finding in wrong:
        click.echo(finding)
    if wrong:
        raise click.exceptions.Exit(2)
    click.echo("nothing is wrong")


@command.command("validate")
@click.argument("table", type=FILE)
@click.option("--model", required=True, help="Network by name, or package.module:factory.")
@click.option("--data-shape", default="3,32,32", show_default=True, help="Channels, height, width of one image.")
@click.option("--classes", default=10, show_default=True, help="Outputs of --model.")
@click.option(
    "--count", type=click.IntRange(min=1), default=10, show_default=True, help="Pruned networks per precision."
)
@click.option("--seconds", default=1.0, show_default=True, help="How long each network is timed.")
@click.option("--seed", default=1000, show_default=True, help="Draws the pruned networks.")
@switch("allow-mismatch", help="Validate although the table is of another setting than this machine's.")
@switch("json", "as_json", help="Print JSON.")
def validate(
    table: Path, model: str, data_shape: str, classes: int, count: int, seconds: float, seed: int, allow_mismatch: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Predict random pruned networks from TABLE and measure them on this machine.

    \b
    Example:
      edgecompress tables validate x86.csv --model resnet8
    """
    import json

    from edgecompress.cli.profile import network_of, shape_of
    from edgecompress.latency_tables.table import read_table
    from edgecompress.latency_tables.table_tools import validate
    from edgecompress.latency_tables.targets import target_by_name

    found = read_table(table)
    target = target_by_name(found.provenance.target)
    network, graph = network_of(model, shape_of(data_shape), classes)
    result = validate(
        found, target, network, graph, count=count, seconds=seconds, seed=seed, allow_mismatch=allow_mismatch
    )
    if as_json:
        facts = {
            dtype: {
                "mape": value.mape, "within_10": value.within_10, "spearman": value.spearman,
                "networks": [{"predicted_us": c.predicted_us, "measured_us": c.measured_us} for c in value.checks],
            }
            for dtype, value in result.items()
        }  # fmt: skip
        click.echo(json.dumps(facts, indent=1))
        return
    for dtype, value in result.items():
        for one in value.checks:
            click.echo(
                f"  {dtype} {one.predicted_us:9.0f} us predicted {one.measured_us:9.0f} us measured {one.error:+.1%}"
            )
        rank = "" if value.spearman is None else f", Spearman {value.spearman:.3f}"
        click.echo(
            f"{dtype}: mean error {value.mape:.1%} over {len(value.checks)} networks, {value.within_10:.0%} within 10 %{rank}"
        )
