"""``edgecompress eval``: accuracy and latency of an exported file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgecompress.cli.flags import switch


@click.command("eval")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--data", default="digits", show_default=True,
    help="'digits', a torchvision data set, the root of an image folder, or package.module:factory.",
)  # fmt: skip
@click.option(
    "--task", default="classification", show_default=True, help="classification, segmentation or package.module:task."
)
@switch("unlabelled", help="Use no labels: measure agreement with original.onnx beside the file.")
@click.option("--image-size", type=click.IntRange(min=8), help="Bring images to this size, not to the file's own.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads while timing.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    artifact: Path, data: str, task: str, unlabelled: bool, image_size: int | None, threads: int, as_json: bool
) -> None:
    """Measure ARTIFACT, an .onnx file or a run folder, on the data's test split in ONNX Runtime.

    \b
    Example:
      edgecompress eval runs/first/exports/model.int8.onnx --data digits
    """
    from edgecompress.report import evaluate_artifact
    from edgecompress.spec import Score

    result = evaluate_artifact(
        artifact, data, image_size=image_size, threads=threads, task=task, unlabelled=unlabelled
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    click.echo(f"{result['file']}  {result['size_bytes']:,} bytes")
    score = Score.model_validate(result["score"])
    said = f"{score.note} {score.name}".strip() + f" {score.text(result['accuracy'])}"
    click.echo(f"  {said} on {result['images']} test images of {result['data']}")
    if result["median_us"] is None:
        click.echo("  latency: not measured (the file is in TensorRT's dialect, which ONNX Runtime does not fuse)")
    else:
        click.echo(
            f"  latency {result['median_us'] / 1000:.4g} ms median, {result['p90_us'] / 1000:.4g} ms p90 "
            f"(measured here, ONNX Runtime, batch 1, {threads} thread{'s' if threads > 1 else ''})"
        )
