"""``edgecompress profile``: measure the latency table of one network here, over ssh, or by a job carried by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgecompress.cli.flags import switch

if TYPE_CHECKING:
    from edgecompress.graph import Graph
    from edgecompress.latency_tables.profile import Profiled, ProfileOptions
    from edgecompress.latency_tables.remote import Device
    from edgecompress.spec import Network, Target


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
@click.option("--host", metavar="USER@ADDRESS", help="Measure on that machine over ssh; it needs no edgecompress.")
@click.option(
    "--ssh-option", "ssh_options", multiple=True, metavar="NAME=VALUE", help="For ssh's -o; may be given often."
)
@click.option("--device-python", default="python3", show_default=True, help="Python on the device, with its runtime.")
@click.option("--bundle", type=click.Path(path_type=Path, file_okay=False), help="Write the job as a folder to carry.")
@click.option("--collect", type=click.Path(path_type=Path, file_okay=False), help="Bring a carried job's rows back.")
@switch("allow-mismatch", help="Take the rows of a device although it is not the target's.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    target: str, run: Path | None, model: str | None, data_shape: str, classes: int, precision: str, time_cap: float,
    threads: int, levels: int, out: Path | None, host: str | None, ssh_options: tuple[str, ...], device_python: str,
    bundle: Path | None, collect: Path | None, allow_mismatch: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure each layer at the widths a search may visit. Stop it any time: the same command goes on.

    \b
    Examples:
      edgecompress profile --target x86 --model resnet8 --data-shape 3,32,32
      edgecompress profile --host pi@10.0.0.5 --target raspberry-pi-5 --run runs/a
      edgecompress profile --bundle job --target jetson --run runs/a
      edgecompress profile --collect job
    """
    from edgecompress.errors import UsageError
    from edgecompress.latency_tables.profile import ProfileOptions, require_measurable
    from edgecompress.latency_tables.remote import Device
    from edgecompress.latency_tables.ssh import Host
    from edgecompress.latency_tables.targets import target_by_name

    if sum(way is not None for way in (host, bundle, collect)) > 1:
        raise UsageError("--host, --bundle and --collect exclude each other; give one of them.")
    precisions = tuple(part.strip() for part in precision.split(",") if part.strip())
    options = ProfileOptions(precisions, threads, time_cap, out, levels)
    if collect is not None:
        _collect(collect, options, allow_mismatch, as_json)
        return
    if (run is None) == (model is None):
        raise UsageError("Give the network to measure: either --run RUN or --model NAME.")
    known = target_by_name(target)
    if host is None and bundle is None:
        require_measurable(known, precisions)
    network, graph = _from_run(run) if run is not None else network_of(str(model), shape_of(data_shape), classes)
    if bundle is not None:
        _bundle(bundle, network, known, options, graph)
        return
    device = Device(Host(host, ssh_options, device_python), known, _note, allow_mismatch) if host else None
    with _ProgressBar(as_json) as progress:
        try:
            profiled = _measure(network, known, device, options, graph, progress)
        except KeyboardInterrupt:
            click.echo("\nStopped. What was measured is kept; the same command goes on.", err=True)
            raise click.exceptions.Exit(130) from None
    _report(profiled, as_json)


def _measure(
    network: Network, target: Target, device: Device | None, options: ProfileOptions, graph: Graph | None,
    progress: _ProgressBar,
) -> Profiled:  # fmt: skip
    from edgecompress.latency_tables.profile import profile
    from edgecompress.latency_tables.remote import profile_host

    if device is None:
        return profile(network, target, options, graph, progress)
    return profile_host(network, device, options, graph, progress)


def _bundle(folder: Path, network: Network, target: Target, options: ProfileOptions, graph: Graph | None) -> None:
    from edgecompress.latency_tables.jobs import write_bundle

    points = write_bundle(folder, network, target, options, graph)
    click.echo(
        f"{folder}: {points} points. Carry the folder to the device, run 'python3 agent.py' in it, carry it back, then "
        f"run: edgecompress profile --collect {folder}"
    )


def _collect(folder: Path, options: ProfileOptions, allow_mismatch: bool, as_json: bool) -> None:
    from edgecompress.latency_tables.jobs import collect
    from edgecompress.latency_tables.targets import target_by_name

    _report(collect(folder, target_by_name, options, _note, allow_mismatch=allow_mismatch), as_json)


def _note(text: str) -> None:
    click.echo(text, err=True)


def shape_of(text: str) -> tuple[int, ...]:
    """Channels, height and width from ``3,32,32``; UsageError for anything else."""
    from edgecompress.errors import UsageError

    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--data-shape is '{text}'; expected channels, height and width such as 3,32,32.")
    return tuple(int(part) for part in parts)


def network_of(name: str, shape: tuple[int, ...], classes: int) -> tuple[Network, Graph]:
    """The traced network with the operators between its layers, and its graph."""
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
        found, graph = network_of(name, network.input_shape, network.layers[-1].out_channels)
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
