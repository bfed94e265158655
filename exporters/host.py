"""What an exported file takes on the machine that exported it: its time against the original's, and its memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgecompress.exporters.artifacts import open_artifact
from edgecompress.exporters.interface import Interface
from edgecompress.exporters.memory import measured_memory
from edgecompress.exporters.runners import measure_latency_us
from edgecompress.exporters.verify import Value
from edgecompress.spec import Preprocessing

IN_ONNX_RUNTIME = (".onnx", ".ort")


def measured_here(
    path: Path, original: Path, images: NDArray[np.float32], interface: Interface, how: Preprocessing
) -> dict[str, Value]:
    """Median microseconds of one batch on one thread, of ``path`` and of ``original``, one session alive at a time, and memory.

    Args:
        original: the float file that compression started from; it takes normalised images.
        images: normalised; as many as the file's batch are used.

    Returns:
        ``host_latency_us``, ``original_host_latency_us``, ``host_speed``, and of what ONNX Runtime runs
        ``measured_run_peak_bytes`` of a fresh process on top of the runtime's own. Empty for a file of TensorRT's dialect, which is
        no measure of an engine, and where the original is gone.
    """
    if not original.is_file():
        return {}
    opened = open_artifact(path)
    if opened.as_written:
        return {}
    batch = interface.batch or 1
    given = np.resize(images, (batch, *images.shape[1:]))
    own = measure_latency_us(opened.runner, interface.images(given, how))["median_us"]
    del opened
    theirs = measure_latency_us(open_artifact(original).runner, given)["median_us"]
    found: dict[str, Value] = {
        "host_latency_us": own,
        "original_host_latency_us": theirs,
        "host_speed": round(theirs / own, 4),
    }
    if path.suffix in IN_ONNX_RUNTIME:
        found["measured_run_peak_bytes"] = measured_memory(path, batch=batch)["run_peak_bytes"]
    return found
