"""Files that ONNX Runtime has optimised ahead: its own ``.ort`` format, and the optimised graph as ONNX.

Both start without optimisation work, and ``.ort`` also in minimal builds. Weights lie unpacked in them: larger, quicker to
load. Layout transformations are left out, so that the file suits every CPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from edgecompress.exporters.runners import OnnxRuntimeRunner, run_all
from edgecompress.exporters.verify import Checks, Images


def optimised(model: bytes, *, ort_format: bool) -> bytes:
    """``model`` as ONNX Runtime would run it, in its own format or as ONNX."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("model.ort" if ort_format else "model.onnx")
        OnnxRuntimeRunner(model, optimised_path=path, precise=False)
        return path.read_bytes()


def check_same(written: bytes, model: bytes, images: Images) -> Checks:
    """The file answers bit for bit what the proven ``model`` answers, with the same kernels."""
    checks = Checks()
    found, wanted = (run_all(OnnxRuntimeRunner(data, precise=False), images) for data in (written, model))
    difference = float(np.abs(found.astype(np.float64) - wanted).max())
    checks.require(
        difference == 0, "optimised_max_difference", difference, f"the optimised file differs by {difference}"
    )
    return checks
