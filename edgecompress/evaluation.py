"""Any artifact on any data: accuracy, time, throughput, memory; two of them side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.data import Dataset
from edgecompress.errors import BadDataError
from edgecompress.exporters.artifacts import Opened, open_artifact
from edgecompress.exporters.interface import Interface
from edgecompress.exporters.memory import measured_memory
from edgecompress.exporters.runners import OnnxRuntimeRunner, measure_latency_us, run_all

_BATCH = 256  # images at once while accuracy is measured


@dataclass(frozen=True)
class Evaluation:
    """One file as measured on this machine. Times are of one batch, in microseconds; None where they would mislead.

    Memory is that of a fresh process, on top of the runtime's own; None where the runtime is not ONNX Runtime.
    """

    file: str
    size_bytes: int
    runtime: str
    data: str
    images: int
    accuracy: float
    threads: int
    batch: int
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    p99_us: float | None = None
    images_per_second: float | None = None
    load_peak_bytes: int | None = None
    run_peak_bytes: int | None = None


def artifact_at(path: Path) -> Path:
    """The file that ``path`` means: itself, or the integer file (else the float one) of a run folder."""
    if not path.is_dir():
        return path
    files = (path / "exports" / name for name in ("model.int8.onnx", "model.onnx"))
    return next((file for file in files if file.exists()), path / "exports")


def evaluate_artifact(
    path: Path, data: Dataset, *, threads: int = 1, batch: int = 1, runtime: str = ""
) -> tuple[Evaluation, NDArray[np.int64]]:
    """Measure an exported file on the test split; also returns the class that it gives to each image.

    Args:
        path: a file, or a run folder.
        batch: images per call while timing; a file of a fixed batch keeps its own.
        runtime: a key of `artifacts.RUNTIMES`; by default what the suffix says.

    Raises:
        BadFileError: see `artifacts.open_artifact`. BadDataError: the file takes images of another shape.
    """
    path = artifact_at(path)
    opened = open_artifact(path, threads=threads, runtime=runtime)
    runner = opened.runner
    interface = _interface(path, opened, data)
    classes = _classes(opened, interface, data)
    size = runner.batch or batch
    found = Evaluation(
        file=str(path),
        size_bytes=path.stat().st_size,
        runtime=runner.runtime,
        data=data.name,
        images=len(data.test),
        accuracy=float((classes == data.test.labels.numpy()).mean()),
        threads=threads,
        batch=size,
    )
    if opened.as_written:
        return found, classes
    images = data.normalise(data.test.images[:1]).numpy().repeat(size, 0)
    latency = measure_latency_us(runner, interface.images(images, data.preprocessing))
    memory: dict[str, int] = {}
    if isinstance(runner, OnnxRuntimeRunner):
        memory = measured_memory(path, batch=size)
    times = {key: latency[key] for key in ("median_us", "p10_us", "p90_us", "p99_us")}
    peaks = {key: memory.get(key) for key in ("load_peak_bytes", "run_peak_bytes")}
    rate = size * 1e6 / latency["median_us"]
    return Evaluation(**{**asdict(found), **times, **peaks, "images_per_second": rate}), classes


def _interface(path: Path, opened: Opened, data: Dataset) -> Interface:
    """How the file wants its images, from its own input; its shape must be that of the data."""
    shape, wanted = opened.runner.shape, tuple(data.test.images.shape[1:])
    pixels, kind = opened.pixels, "uint8" if opened.runner.dtype == np.uint8 else "float32"
    for layout, expected in (("nchw", wanted), ("nhwc", (*wanted[1:], wanted[0]))):
        if len(shape) == 3 and all(size in (0, want) for size, want in zip(shape, expected, strict=True)):
            return Interface(input=kind, layout=layout, pixels=pixels)  # type: ignore[arg-type]
    raise BadDataError(
        f"{path.name} takes images of shape {list(shape)}, {data.name} has {list(wanted)}. "
        f"Give --image-size {shape[-1] if len(shape) == 3 and shape[-1] != wanted[0] else shape[0] if shape else '?'} "
        "or the data it was made for."
    )


def _classes(opened: Opened, interface: Interface, data: Dataset) -> NDArray[np.int64]:
    parts = []
    for x, _ in data.batches(data.test, _BATCH):
        outputs = run_all(opened.runner, interface.images(x.numpy(), data.preprocessing))
        parts.append(outputs.argmax(1) if outputs.ndim > 1 else outputs)
    return np.concatenate(parts).astype(np.int64)


def compared(
    first: tuple[Evaluation, NDArray[np.int64]], second: tuple[Evaluation, NDArray[np.int64]]
) -> dict[str, Any]:
    """``first`` against ``second``: how many times as fast, its share of the bytes, points of accuracy, same answers."""
    (a, mine), (b, other) = first, second
    return {
        "speed": b.median_us / a.median_us if a.median_us and b.median_us else None,
        "size": a.size_bytes / b.size_bytes,
        "accuracy_points": 100 * (a.accuracy - b.accuracy),
        "agreement": float((mine == other).mean()),
    }
