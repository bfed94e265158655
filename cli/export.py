"""``edgecompress export``: one format of a finished run, written and proven."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgecompress.exporters.interface import Head, InputType, Int4, Layout


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_name",
    default="onnxruntime",
    show_default=True,
    help="onnx, onnxruntime, onnxruntime-optimised, ort, openvino, tensorrt, litert, executorch or ncnn.",
)
@click.option(
    "--input",
    "input_type",
    type=click.Choice(["float32", "uint8"]),
    default="float32",
    show_default=True,
    help="Element type of the images; uint8 means pixels 0 to 255.",
)
@click.option(
    "--layout", type=click.Choice(["nchw", "nhwc"]), default="nchw", show_default=True, help="Order of the dimensions."
)
@click.option("--fold-normalisation", is_flag=True, help="The file takes pixels 0 to 255 and normalises itself.")
@click.option(
    "--head",
    type=click.Choice(["scores", "softmax", "argmax"]),
    default="scores",
    show_default=True,
    help="What the file answers: scores, probabilities or the number of the class.",
)
@click.option("--batch", help="Images per call: a number, or 'dynamic'. Default: dynamic, for tensorrt 1.")
@click.option(
    "--max-opset",
    type=int,
    help="Highest ONNX opset, 15 to 25; below 25 two bits are stored as four. The float file (onnx) is written in it, up to the "
    "target's own; without it in 17 at most.",
)
@click.option(
    "--saturating-cpu", is_flag=True, help="Weights of at most 7 bits: exact and fast on x86 without VNNI (AVX2 only)."
)
@click.option(
    "--allow-float",
    is_flag=True,
    help="litert, executorch: an operator that the runtime has no integers for is computed in float, and no other.",
)
@click.option(
    "--int4",
    type=click.Choice(["fast", "never", "always"]),
    default="fast",
    show_default=True,
    help="litert: layers of at most 4 bits stored as INT4: those that are not slower for it, none, or all.",
)
@click.option("--strip-metadata", is_flag=True, help="Short names and no metadata: the smallest file.")
@click.option(
    "--fp16-layers",
    default="",
    help="With --format tensorrt: layers that run in FP16, by commas, or 'table': those that the run's table has faster so.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write to. Default: RUN/exports.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Prove the file before it gets its name.")
@click.option(
    "--engine", is_flag=True, help="With --format tensorrt: also build the engine; needs tensorrt and the target's GPU."
)
@click.option("--json", "as_json", is_flag=True, help="Print the artifact's record as JSON.")
def command(
    run: Path,
    format_name: str,
    input_type: InputType,
    layout: Layout,
    fold_normalisation: bool,
    head: Head,
    batch: str | None,
    max_opset: int | None,
    saturating_cpu: bool,
    allow_float: bool,
    int4: Int4,
    strip_metadata: bool,
    fp16_layers: str,
    out: Path | None,
    verify: bool,
    engine: bool,
    as_json: bool,
) -> None:
    """Write one format into RUN/exports and prove it.

    For a TensorRT target this writes the ONNX with build_on_device.py beside it: an engine is only right when it is built
    on the device that runs it.

    \b
    Example:
      edgecompress export runs/resnet8-digits-jetson-orin-nano --format tensorrt
      edgecompress export runs/first --input uint8 --layout nhwc --head argmax
    """
    from edgecompress.errors import UsageError

    if engine and format_name != "tensorrt":
        raise UsageError(f"--engine builds a TensorRT engine; it does not go with --format {format_name}.")
    from edgecompress.exporters.interface import Interface
    from edgecompress.run_exports import export_run

    interface = Interface(
        input=input_type,
        layout=layout,
        pixels=fold_normalisation,
        head=head,
        batch=_batch(batch),
        max_opset=max_opset,
        bare=strip_metadata,
        saturating_cpu=saturating_cpu,
        allow_float=allow_float,
        int4=int4,
    )
    half = tuple(filter(None, (name.strip() for name in fp16_layers.split(","))))
    artifact = export_run(run, format_name, check=verify, interface=interface, half=half, out=out)
    path = (out or run / "exports") / artifact.path
    if engine:
        from edgecompress.exporters.check_tensorrt import build_engine_here
        from edgecompress.exporters.record import record_engine

        record_engine(out or run / "exports", artifact, build_engine_here(path, path.parent))
    if as_json:
        click.echo(json.dumps(artifact.model_dump(mode="json"), indent=1))
        return
    opset = f" opset {artifact.opset}," if artifact.opset else ""
    click.echo(
        f"{path}  {artifact.size_bytes:,} bytes, {artifact.dialect} dialect,{opset} runs from {artifact.oldest_runtime}"
    )
    for key, value in artifact.checks.items():
        click.echo(f"  {key}: {value:.4g}" if isinstance(value, float) else f"  {key}: {value}")
    if format_name == "tensorrt" and not engine:
        click.echo(f"  on the device: copy {path.parent} there and run python3 build_on_device.py in it")


def _batch(text: str | None) -> int | None:
    from edgecompress.errors import UsageError

    if text is None or text == "dynamic":
        return None if text is None else 0
    if not text.isdecimal() or text == "0":
        raise UsageError(f"--batch {text} is no batch size; give a number from 1 on, or 'dynamic'.")
    return int(text)
