"""Run an artifact: outputs and latency. Profiling, verification and ``eval`` share these runners."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgecompress.errors import BadFileError

Floats = NDArray[np.float32]


class Runner(Protocol):
    """An artifact loaded into its runtime."""

    def run(self, images: Floats) -> Floats:
        """Outputs ``[N, classes]`` for normalised images ``[N, C, H, W]``."""
        ...


class OnnxRuntimeRunner:
    """A session of ONNX Runtime on the CPU.

    Args:
        model: a path or a serialised model.
        threads: intra-op threads; 1 is what latency means here.
        optimise: False runs the graph as written, for files of a dialect that ONNX Runtime half-fuses.
        optimised_path: where ONNX Runtime writes the graph that it really runs.

    Raises:
        BadFileError: ONNX Runtime refuses the file.
    """

    def __init__(
        self, model: Path | bytes, *, threads: int = 1, optimise: bool = True, optimised_path: Path | None = None
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if optimised_path is not None:
            # Layout transformation is left out of the written graph: it is not portable and hides the operators.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.optimized_model_filepath = str(optimised_path)
        try:
            self.session: Any = onnxruntime.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            what = model if isinstance(model, Path) else "the model"
            raise BadFileError(
                f"ONNX Runtime {onnxruntime.__version__} refuses {what}: {_first_line(error)}"
            ) from error
        self.input_name: str = self.session.get_inputs()[0].name

    def run(self, images: Floats) -> Floats:
        """Outputs for a batch."""
        result: Floats = self.session.run(None, {self.input_name: images})[0]
        return result


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def measure_latency_us(
    runner: Runner, image: Floats, *, seconds: float = 1.5, warmup_s: float = 0.3
) -> dict[str, float]:
    """Time single images back to back: warm-up by time, then runs for ``seconds``.

    Args:
        image: ``[1, C, H, W]``.

    Returns:
        ``median_us``, ``p10_us``, ``p90_us`` and ``runs``.
    """
    end = time.perf_counter() + warmup_s
    while time.perf_counter() < end:
        runner.run(image)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 10:
        start = time.perf_counter()
        runner.run(image)
        times.append((time.perf_counter() - start) * 1e6)
    p10, median, p90 = np.percentile(times, (10, 50, 90))
    return {"median_us": float(median), "p10_us": float(p10), "p90_us": float(p90), "runs": float(len(times))}
