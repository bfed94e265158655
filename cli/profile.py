"""``edgecompress profile``: measure the latency table of one network on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgecompress.graph import Graph
    from edgecompress.latency_tables.profile import Profiled
    from edgecompress.spec import Network


@click.command("profile")
@click.option("--target", default="x86", show_default=True, help="The device; see 'edgecompress targets'.")
@click.option(
    "--run", type=click.Path(path_type=Path, file_okay=False), help="Run folder whose layers.json is measured."
)
@click.option("--model", help="Network by name, or package.module:factory; instead of --run.")
@click.option("--data-shape", default="3,32,32", show_default=True, help="Channels, height, width of one image.")
@click.option("--classes", default=10, show_default=True, help="Outputs of --model.")
@click.option("--precision", default="fp32,int8", show_default=True, help="Comma-separated.")
@click.option("--time-cap", default=0.5, show_default=True, help="Seconds for one kernel, after its warm-up.")
@click.option("--threads", default=1, show_default=True, help="Threads of the runtime; each count has its own table.")
@click.option("--levels", default=10, show_default=True, help="Widths a side of each layer: 10 are up to 28 pairs.")
@click.option("--out", type=click.Path(path_type=Path), help="Table (.csv) or folder; by default the cache.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    target: str, run: Path | None, model: str | None, data_shape: str, classes: int, precision: str, time_cap: float,
    threads: int, levels: int, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure each layer at the widths a search may visit. Stop it any time: the same command goes on.

    \b
    Example:
      edgecompress profile --target x86 --model resnet8 --data-shape 3,32,32
    """
    from edgecompress.errors import UsageError
    from edgecompress.latency_tables.profile import ProfileOptions, profile, require_measurable
    from edgecompress.latency_tables.targets import target_by_name

    if (run is None) == (model is None):
        raise UsageError("Give the network to measure: either --run RUN or --model NAME.")
    device = target_by_name(target)
    precisions = tuple(part.strip() for part in precision.split(",") if part.strip())
    require_measurable(device, precisions)
    network, graph = _from_run(run) if run is not None else _from_model(str(model), _shape(data_shape), classes)
    options = ProfileOptions(precisions, threads, time_cap, out, levels)
    with _ProgressBar(as_json) as progress:
        try:
            profiled = profile(network, device, options, graph, progress)
        except KeyboardInterrupt:
            click.echo("\nStopped. What was measured is kept; the same command goes on.", err=True)
            raise click.exceptions.Exit(130) from None
    _report(profiled, as_json)


def _shape(text: str) -> tuple[int, ...]:
    from edgecompress.errors import UsageError

    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--data-shape is '{text}'; expected channels, height and width such as 3,32,32.")
    return tuple(int(part) for part in parts)


def _from_model(name: str, shape: tuple[int, ...], classes: int) -> tuple[Network, Graph]:
    from edgecompress.edges import with_edges
    from edgecompress.graph import build_graph
    from edgecompress.models import build_model
    from edgecompress.trace import trace

    model = build_model(name, classes).eval()
    graph = build_graph(model, shape, name)
    return with_edges(trace(model, shape, name).network, graph), graph


def _from_run(run: Path) -> tuple[Network, Graph | None]:
    """The run's layers; the network itself too, if its name still builds one that fits them (weights do not matter)."""
    from edgecompress.errors import EdgeCompressError
    from edgecompress.files import read_document
    from edgecompress.spec import Network

    network = read_document(run / "layers.json", Network, "traced network")
    name = network.model.rpartition("-")[0]
    try:
        found, graph = _from_model(name, network.input_shape, network.layers[-1].out_channels)
    except EdgeCompressError:
        return network, None
    return network, graph if found == network else None


class _ProgressBar:
    """A progress bar with the time left, on stderr; nothing with --json."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn("kernels"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
        self._bar = Progress(*columns, console=Console(stderr=True), disable=quiet)
        self._task = self._bar.add_task("kernels", total=None, left="")

    def __enter__(self) -> _ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, seconds_left: float) -> None:
        left = f"{seconds_left / 60:.0f} min left" if seconds_left >= 90 else f"{seconds_left:.0f} s left"
        self._bar.update(self._task, completed=done, total=total, left=left)


def _report(profiled: Profiled, as_json: bool) -> None:
    import json

    from edgecompress.latency_tables.predict import describe

    table, done = profiled.table, profiled.done
    contended = sum(row.status == "contended" for row in table.rows.values())
    if as_json:
        checks = [
            {"precision": c.dtype, "predicted_us": c.predicted_us, "measured_us": c.measured_us}
            for c in profiled.checks
        ]
        facts = {
            "table": str(table.path), "measured": done.measured, "held_already": done.skipped, "contended": contended,
            "unsupported": len(done.unsupported), "anchor_drift": done.drift, "held_out": checks,
        }  # fmt: skip
        click.echo(json.dumps(facts, indent=1))
        return
    click.echo(f"{table.path}\n{describe(table.provenance, len(table.usable))}")
    click.echo(f"{done.measured} kernels measured now, {done.skipped} held already; clock drift up to {done.drift:.0%}")
    if contended:
        click.echo(
            f"{contended} kernels were measured while other work disturbed; repeat the command on a quiet machine."
        )
    if done.unsupported:
        click.echo(
            f"{len(done.unsupported)} kernels have no one-layer graph (kind '{done.unsupported[0].kind}') "
            "and stay estimated."
        )
    for check in profiled.checks:
        click.echo(
            f"held-out pruned network, {check.dtype}: predicted {check.predicted_us:.0f} us, "
            f"measured {check.measured_us:.0f} us ({check.error:+.0%})"
        )
