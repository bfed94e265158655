"""Files of other formats made from a finished ONNX model, each proven in the runtime that will run it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from edgecompress.errors import UsageError
from edgecompress.exporters.emulate import emulate
from edgecompress.exporters.runners import OnnxRuntimeRunner, run_all
from edgecompress.exporters.source import ExportSource
from edgecompress.exporters.verify import Checks, merged, relative_error
from edgecompress.quantize import QuantizedGraph, TensorRange


@dataclass(frozen=True)
class Converted:
    """Files of another format made from a proven ONNX model, by name, and the proof that they compute the same."""

    files: Mapping[str, bytes]
    checks: Checks
    oldest_runtime: str


def optimised(source: ExportSource, model: bytes, check: bool, *, name: str) -> Converted:
    """What ONNX Runtime optimised ahead, as ``name``."""
    import onnxruntime

    from edgecompress.exporters import to_ort_format

    data = to_ort_format.optimised(model, ort_format=name.endswith(".ort"))
    images = source.interface.images(source.images, source.preprocessing)
    checks = to_ort_format.check_same(data, model, images) if check else Checks()
    return Converted({name: data}, checks, f"ONNX Runtime {onnxruntime.__version__}")


def ncnn(source: ExportSource, model: bytes, check: bool) -> Converted:
    """Both files of ncnn, compared with ONNX Runtime."""
    from edgecompress.exporters import to_ncnn
    from edgecompress.exporters.more_runners import NcnnRunner

    files = to_ncnn.convert(model, source.graph.shapes[source.graph.inputs[0]])
    checks = Checks()
    if check:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            runner = NcnnRunner(Path(folder) / to_ncnn.PARAM)
            found = run_all(runner, source.images)
        wanted = run_all(OnnxRuntimeRunner(model), source.images)
        error = relative_error(found.reshape(wanted.shape), wanted)
        checks.require(error < 1e-3, "ncnn_error", error, f"ncnn's outputs differ by {error:.2%} from ONNX Runtime's")
    return Converted(files, checks, f"ncnn {version('ncnn')}")


def executorch(source: ExportSource, model: bytes, check: bool) -> Converted:
    """A ``.pte`` of integers, in which allowed floats are the operators that XNNPACK has no integers for.

    It is one of floats where the run holds no integers, or where ExecuTorch cannot lower them and floats are allowed.
    """
    from edgecompress.exporters import to_executorch
    from edgecompress.exporters.check_executorch import check_float_program, check_integer_program

    image, checks, quantized = torch.from_numpy(source.images[:1]), Checks(), source.quantized
    proof, class_scores = Checks(), source.task.class_scores
    data = None
    if quantized is not None:
        with torch.no_grad():
            exact = emulate(quantized, torch.from_numpy(source.images)).numpy()
        scores = TensorRange(max(float(np.abs(exact).max()), 1e-6) / 127, 8, True)
        data = _integer_program(quantized, scores, image, source.interface.allow_float, checks)
        if data is not None and check:
            proof = check_integer_program(data, quantized, scores, source.images, exact, class_scores=class_scores)
    checks.values["integers"] = data is not None
    if data is None:
        data, left = to_executorch.program(to_executorch.FloatNetwork(source.graph), image)
        checks.values["left_to_portable_kernels"] = ", ".join(left) or "nothing"
        if check:
            proof = check_float_program(data, model, source.images, class_scores=class_scores)
    return Converted({"model.pte": data}, merged(checks, proof), f"ExecuTorch {version('executorch')}")


def _integer_program(
    quantized: QuantizedGraph, scores: TensorRange, image: torch.Tensor, allow_float: bool, checks: Checks
) -> bytes | None:
    """The integer program; None where ExecuTorch cannot lower it and floats are allowed. Its floats become a check.

    Raises:
        UsageError: an operator would be float, and that is not allowed.
    """
    from edgecompress.exporters import to_executorch

    floats = to_executorch.float_operators(quantized)
    if floats and not allow_float:
        raise UsageError(
            f"XNNPACK has no integer kernel for {', '.join(floats)}. Export with --allow-float to compute these, and nothing "
            "else, in float."
        )
    try:
        data, left = to_executorch.program(to_executorch.IntegerNetwork(quantized, scores), image)
    except UsageError as error:
        if allow_float:
            return None
        raise UsageError(f"{error} Export with --allow-float for a float program.") from error
    if left and not allow_float:
        raise UsageError(
            f"XNNPACK does not take {', '.join(left)} of the integer network. Export with --allow-float to leave it to "
            "ExecuTorch's portable kernels."
        )
    checks.values["float_islands"] = ", ".join(floats) or "none"
    checks.values["left_to_portable_kernels"] = ", ".join(left) or "nothing"
    return data
