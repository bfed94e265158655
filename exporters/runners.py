"""Run an artifact: outputs and latency. Profiling, verification and ``eval`` share these runners."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgecompress.errors import BadFileError, BadModelError, MissingBackendError

Floats = NDArray[np.float32]
Images = NDArray[Any]  # float32, or uint8 where a file takes that
_TYPES: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(uint8)": np.dtype(np.uint8)}


class Runner(Protocol):
    """An artifact loaded into its runtime.

    ``shape`` is that of one image as the file takes it, ``batch`` its fixed batch size or 0, ``dtype`` its input's type.
    """

    shape: tuple[int, ...]
    batch: int
    dtype: np.dtype[Any]
    runtime: str

    def run(self, images: Images) -> Floats:
        """Outputs ``[N, classes]`` (``[N]`` class numbers behind an argmax) for images as the file takes them.

        Raises:
            BadFileError: it fails on them.
        """
        ...


@cache
def is_x86() -> bool:
    """Whether this is an x86-64 CPU: there ONNX Runtime's integers can be made exact."""
    return platform.machine() in ("x86_64", "AMD64")


@cache
def has_vnni() -> bool:
    """Whether this CPU multiplies u8 by s8 exactly (x86 with VNNI); without it the fast AVX2 kernels may saturate."""
    try:
        return is_x86() and "vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


class OnnxRuntimeRunner:
    """A session of ONNX Runtime on the CPU.

    Args:
        model: a path or a serialised model.
        threads: intra-op threads; 1 is what latency means here.
        optimise: False runs the graph as written, for files of a dialect that ONNX Runtime half-fuses.
        optimised_path: where ONNX Runtime writes the graph that it really runs.
        precise: on x86 without VNNI, take kernels that cannot saturate. False is ONNX Runtime's own choice: faster there,
            and right for weights of at most 7 bits only.

    Raises:
        BadFileError: ONNX Runtime refuses the file.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        threads: int = 1,
        optimise: bool = True,
        optimised_path: Path | None = None,
        precise: bool = True,
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what it logs as an error it also raises
        if precise and is_x86() and not has_vnni():
            options.add_session_config_entry("session.x64quantprecision", "1")
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if optimised_path is not None:
            # Layout transformation is left out of the written graph: it is not portable and hides the operators.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.optimized_model_filepath = str(optimised_path)
            if optimised_path.suffix == ".ort":
                options.add_session_config_entry("session.save_model_format", "ORT")
        self.runtime, self._what = f"ONNX Runtime {onnxruntime.__version__}", called(model)
        try:
            self.session: Any = onnxruntime.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise BadFileError(f"{self.runtime} refuses {self._what}: {reason(error)}") from error
        entries = self.session.get_inputs()
        require_images(self._what, [_TYPES.get(entry.type, entry.type) for entry in entries])
        entry = entries[0]
        self.input_name: str = entry.name
        self._first: str = self.session.get_outputs()[0].name
        self.shape = tuple(size if isinstance(size, int) else 0 for size in entry.shape[1:])
        self.batch = entry.shape[0] if entry.shape and isinstance(entry.shape[0], int) else 0
        self.dtype: np.dtype[Any] = _TYPES[entry.type]
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map

    def run(self, images: Images) -> Floats:
        """Outputs for a batch."""
        result: Floats = self._run(images, [self._first])[0]
        return result

    def run_whole(self, images: Images) -> list[NDArray[Any]]:
        """Every output of the file for a batch, in its order."""
        return self._run(images, None)

    def _run(self, images: Images, names: list[str] | None) -> list[NDArray[Any]]:
        try:
            return list(self.session.run(names, {self.input_name: images}))
        except Exception as error:
            raise cannot_run(self.runtime, self._what, images, error) from error


class OpenVinoRunner:
    """A model compiled by OpenVINO for the CPU; it reads the ``ort`` dialect and its own ``.xml``.

    Raises:
        MissingBackendError: OpenVINO is not installed. BadFileError: it refuses the file.
    """

    def __init__(self, model: Path | bytes, *, threads: int = 1) -> None:
        try:
            import openvino
        except ImportError as error:
            raise MissingBackendError("OpenVINO is not installed. Run: pip install 'edgecompress[openvino]'") from error
        core = openvino.Core()
        self.runtime, self._what = f"OpenVINO {openvino.__version__.split('-')[0]}", called(model)
        hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        try:
            read = core.read_model(model if isinstance(model, bytes) else str(model))
            self._compiled: Any = core.compile_model(read, "CPU", hints)
        except Exception as error:
            raise BadFileError(f"{self.runtime} refuses {self._what}: {reason(error)}") from error
        entries = self._compiled.inputs
        require_images(self._what, [np.dtype(entry.element_type.to_dtype()) for entry in entries])
        entry = entries[0]
        sizes = [dim.get_length() if dim.is_static else 0 for dim in entry.partial_shape]
        self.shape, self.batch = tuple(sizes[1:]), sizes[0]
        self.dtype: np.dtype[Any] = np.dtype(entry.element_type.to_dtype())

    def run(self, images: Images) -> Floats:
        """Outputs for a batch."""
        try:
            result: Floats = self._compiled([images])[0]
        except Exception as error:
            raise cannot_run(self.runtime, self._what, images, error) from error
        return result

    def run_whole(self, images: Images) -> list[NDArray[Any]]:
        """Every output of the file for a batch, in its order."""
        found = self._compiled([images])
        return [np.asarray(found[number]) for number in range(len(self._compiled.outputs))]

    def integer_layers(self) -> int:
        """Convolutions and matrix products that OpenVINO executes on 8-bit integers."""
        found = (operation.get_rt_info() for operation in self._compiled.get_runtime_model().get_ops())
        kinds = [
            (str(info["layerType"].value), str(info["runtimePrecision"].value)) for info in found if "layerType" in info
        ]
        return sum(kind in ("Convolution", "FullyConnected", "MatMul") and how in ("u8", "i8") for kind, how in kinds)


def called(model: Path | bytes) -> Path | str:
    """What an error calls the file."""
    return model if isinstance(model, Path) else "the model"


def reason(error: Exception) -> str:
    """The first line that says what is wrong; OpenVINO puts places of its source before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if not line.startswith(("Exception from ", "Check '"))), lines[0])


def require_images(what: Path | str, kinds: Sequence[object]) -> None:
    """Refuse a file that does not take one input of ``kinds``, which is float32 or uint8."""
    if len(kinds) != 1 or kinds[0] not in _TYPES.values():
        found = f"{len(kinds)} inputs" + (f", the first of {kinds[0]}" if kinds else "")
        raise BadFileError(
            f"{what} takes {found}; expected one of float or uint8 images. Name a file of one image input."
        )


def cannot_run(runtime: str, what: Path | str, images: Images, error: Exception) -> BadFileError:
    """The error where a file was loaded and then fails on images."""
    return BadFileError(
        f"{runtime} cannot run {what} on {len(images)} images of shape {list(images.shape[1:])}: {reason(error)}. Give the batch "
        "and the images that it was made for, or export it again."
    )


def run_all(runner: Runner, images: Images, *, batch: int = 256) -> Floats:
    """Outputs for any number of images; a file of a fixed batch size gets its last batch filled up with the last image.

    Raises:
        BadFileError: the file fails on them. BadModelError: it does not answer each image.
    """
    size = runner.batch or batch
    parts = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        missing = size - len(part) if runner.batch else 0
        filled = np.concatenate([part, np.repeat(part[-1:], missing, 0)]) if missing else part
        found = runner.run(filled)
        if np.shape(found)[:1] != (len(filled),):
            raise BadModelError(
                f"The file gives outputs of shape {list(np.shape(found))} for {len(filled)} images; expected one row per image. "
                "Name a file whose first output follows the batch."
            )
        parts.append(found[: len(part)])
    return np.concatenate(parts)


def measure_latency_us(
    runner: Runner, image: Images, *, seconds: float = 1.5, warmup_s: float = 0.3
) -> dict[str, float]:
    """Time one batch after the other: warm-up by time, then runs for ``seconds``.

    Args:
        image: a batch as the file takes it, ``[1, C, H, W]`` where latency is meant.

    Returns:
        ``median_us``, ``p10_us``, ``p90_us``, ``p99_us`` of a batch, and ``runs``.
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
    p10, median, p90, p99 = (float(value) for value in np.percentile(times, (10, 50, 90, 99)))
    return {"median_us": median, "p10_us": p10, "p90_us": p90, "p99_us": p99, "runs": float(len(times))}
