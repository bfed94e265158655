"""``edgecompress export``: one format of a finished run, written and proven."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format", "format_name", default="onnxruntime", show_default=True, help="onnx, onnxruntime or tensorrt."
)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Prove the file before it gets its name.")
@click.option(
    "--engine", is_flag=True, help="With --format tensorrt: also build the engine; needs tensorrt and the target's GPU."
)
@click.option("--json", "as_json", is_flag=True, help="Print the artifact's record as JSON.")
def command(run: Path, format_name: str, verify: bool, engine: bool, as_json: bool) -> None:
    """Write one format into RUN/exports and prove it.

    For a TensorRT target this writes the ONNX with build_on_device.py beside it: an engine is only right when it is built
    on the device that runs it.

    \b
    Example:
      edgecompress export runs/resnet8-digits-jetson-orin-nano --format tensorrt
    """
    from edgecompress.errors import UsageError

    if engine and format_name != "tensorrt":
        raise UsageError(f"--engine builds a TensorRT engine; it does not go with --format {format_name}.")
    from edgecompress.pipeline import export_run

    artifact = export_run(run, format_name, check=verify)
    path = run / "exports" / artifact.path
    if engine:
        from edgecompress.exporters.check_tensorrt import build_engine_here

        build_engine_here(path, path.with_name("model.engine"))
    if as_json:
        click.echo(json.dumps(artifact.model_dump(mode="json"), indent=1))
        return
    click.echo(f"{path}  {artifact.size_bytes:,} bytes, {artifact.dialect} dialect, opset {artifact.opset}")
    for key, value in artifact.checks.items():
        click.echo(f"  {key}: {value:.4g}" if isinstance(value, float) else f"  {key}: {value}")
    if format_name == "tensorrt" and not engine:
        click.echo(f"  on the device: copy {path.parent} there and run python3 build_on_device.py in it")
