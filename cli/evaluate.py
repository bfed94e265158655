"""``edgecompress eval``: accuracy and latency of an exported file."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("eval")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--data", default="digits", show_default=True, help="'digits' or the root of an image folder.")
@click.option("--image-size", type=click.IntRange(min=8), help="Resize images to this height and width.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads while timing.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(artifact: Path, data: str, image_size: int | None, threads: int, as_json: bool) -> None:
    """Measure ARTIFACT, an .onnx file or a run folder, on the data's test split in ONNX Runtime.

    \b
    Example:
      edgecompress eval runs/first/exports/model.int8.onnx --data digits
    """
    from edgecompress.report import evaluate_artifact

    result = evaluate_artifact(artifact, data, image_size=image_size, threads=threads)
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    click.echo(f"{result['file']}  {result['size_bytes']:,} bytes")
    click.echo(f"  top-1 accuracy {result['accuracy']:.2%} on {result['images']} test images of {result['data']}")
    if result["median_us"] is None:
        click.echo("  latency: not measured (the file is in TensorRT's dialect, which ONNX Runtime does not fuse)")
    else:
        click.echo(
            f"  latency {result['median_us'] / 1000:.4g} ms median, {result['p90_us'] / 1000:.4g} ms p90 "
            f"(measured here, ONNX Runtime, batch 1, {threads} thread{'s' if threads > 1 else ''})"
        )
