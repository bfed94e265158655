"""``edgecompress eval``: the score, time, throughput and memory of exported files, on any data."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgecompress.cli.flags import switch

if TYPE_CHECKING:
    from edgecompress.evaluation import Evaluation


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
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images per call while timing.")
@click.option(
    "--runtime",
    default="",
    help="onnxruntime, openvino, tensorrt, ncnn, executorch or litert. Default: what the file's suffix says.",
)
@click.option("--against", type=click.Path(path_type=Path), help="Another file or run folder to compare with.")
@click.option("--csv", "as_csv", is_flag=True, help="Print as CSV, one line per file.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    artifact: Path,
    data: str,
    task: str,
    unlabelled: bool,
    image_size: int | None,
    threads: int,
    batch: int,
    runtime: str,
    against: Path | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Measure ARTIFACT (.onnx, .ort, .xml, .engine, .param, .pte, .tflite, or a run folder), on the data's test split.

    \b
    Example:
      edgecompress eval runs/first/exports/model.int8.onnx --data digits
      edgecompress eval runs/first --against runs/second --csv
    """
    from edgecompress.data import Dataset, load_data
    from edgecompress.errors import UsageError
    from edgecompress.evaluation import compared, evaluate_files
    from edgecompress.spec import Preprocessing
    from edgecompress.tasks import task_by_name

    if as_csv and as_json:
        raise UsageError("--csv and --json exclude each other; give one of them.")
    wanted = task_by_name(task)

    def read(how: Preprocessing | None) -> Dataset:
        return load_data(data, image_size=image_size, preprocessing=how, task=wanted, unlabelled=unlabelled)

    files = [artifact, against] if against else [artifact]
    found = evaluate_files(files, read, threads=threads, batch=batch, runtime=runtime)
    rows = [evaluation for evaluation, _ in found]
    comparison = compared(*found) if against else None
    if as_json:
        rest = {"against": rows[1].row, "comparison": comparison} if against else {}
        click.echo(json.dumps(rows[0].row | rest, indent=1))
    elif as_csv:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0].row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.row for row in rows)
        click.echo(text.getvalue(), nl=False)
    else:
        for row in rows:
            _print(row)
    if comparison and not (as_json or as_csv):
        speed = f"{comparison['speed']:.2f} times as fast, " if comparison["speed"] else ""
        score = rows[0].score.difference(rows[0].accuracy, rows[1].accuracy)
        click.echo(
            f"the first is {speed}{comparison['size']:.3g} of the bytes, {score} of {rows[0].score.name}; "
            f"{comparison['agreement']:.1%} of the answers are the same"
        )


def _print(row: Evaluation) -> None:
    click.echo(f"{row.file}  {row.size_bytes:,} bytes")
    name = f"{row.score.note} {row.score.name}".strip()
    click.echo(f"  {name} {row.score.text(row.accuracy)} on {row.images} test images of {row.data}")
    if row.median_us is None or row.p90_us is None or row.p99_us is None:
        click.echo("  latency: not measured (the file is in TensorRT's dialect, which ONNX Runtime does not fuse)")
        return
    times = f"{row.median_us / 1000:.4g} ms median, {row.p90_us / 1000:.4g} ms p90, {row.p99_us / 1000:.4g} ms p99"
    threads = f"{row.threads} thread{'s' if row.threads > 1 else ''}"
    click.echo(f"  latency {times} (measured here, {row.runtime}, batch {row.batch}, {threads})")
    click.echo(f"  throughput {row.images_per_second:,.0f} images/s")
    if row.load_peak_bytes is not None and row.run_peak_bytes is not None:
        load, peak = row.load_peak_bytes / 2**20, row.run_peak_bytes / 2**20
        click.echo(f"  memory {load:.1f} MiB to load, {peak:.1f} MiB at the peak, on top of the runtime's own")
