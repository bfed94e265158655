"""Files of ncnn, ExecuTorch and LiteRT in their own runtimes; each is imported where it is used."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from edgecompress.errors import BadFileError, MissingBackendError, UsageError
from edgecompress.exporters.runners import Floats, Images, called, cannot_run, reason, require_images

_NCNN_MAGIC = "7767517"


def missing(package: str, extra: str) -> MissingBackendError:
    """The error where a runtime is not installed."""
    return MissingBackendError(f"{package} is not installed. Run: pip install 'edgecompress[{extra}]'")


class NcnnRunner:
    """``NAME.param`` with ``NAME.bin`` beside it, in 32-bit floats; one image after the other.

    Args:
        shape: of one image; the file does not know it.

    Raises:
        MissingBackendError: ncnn is not installed. BadFileError: a file is missing or is none of ncnn's.
    """

    batch, dtype = 0, np.dtype(np.float32)

    def __init__(self, path: Path, *, threads: int = 1, shape: tuple[int, ...] = (0, 0, 0)) -> None:
        try:
            import ncnn
        except ImportError as error:
            raise missing("ncnn", "ncnn") from error
        weights = path.with_suffix(".bin")
        with path.open("rb") as file:
            first = file.readline(64).strip()
        if first.decode("ascii", "replace") != _NCNN_MAGIC or not weights.is_file():
            raise BadFileError(f"{path} is no text .param of ncnn with {weights.name} beside it. Export it again.")
        self._ncnn, self._net = ncnn, ncnn.Net()
        options = self._net.opt
        options.num_threads = threads
        options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
        options.use_bf16_storage = options.use_packing_layout = False
        if self._net.load_param(str(path)) or self._net.load_model(str(weights)):
            raise BadFileError(f"ncnn refuses {path} or {weights.name}: they are damaged. Export it again.")
        if len(self._net.input_names()) != 1 or len(self._net.output_names()) != 1:
            raise BadFileError(f"{path} has {len(self._net.input_names())} inputs; expected one of images.")
        self.shape = shape
        self.runtime = f"ncnn {version('ncnn')}"

    def run(self, images: Images) -> Floats:
        """Outputs for a batch."""
        return np.stack([self._one(np.ascontiguousarray(image, np.float32)) for image in images])

    def _one(self, image: NDArray[np.float32]) -> Floats:
        extractor = self._net.create_extractor()
        extractor.input(self._net.input_names()[0], self._ncnn.Mat(image).clone())
        status, result = extractor.extract(self._net.output_names()[0])
        if status:
            raise BadFileError(f"ncnn cannot run the file on an image of shape {list(image.shape)}.")
        return np.array(result)


class ExecuTorchRunner:
    """A ``.pte`` program; the process has one thread pool for all of them.

    Raises:
        MissingBackendError: ExecuTorch is not installed. BadFileError: it refuses the file. UsageError: a program that is
        loaded already runs on another number of threads.
    """

    dtype = np.dtype(np.float32)
    _loaded: ClassVar[WeakSet[ExecuTorchRunner]] = WeakSet()

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        import torch

        try:
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
        except ImportError as error:
            raise missing("ExecuTorch", "executorch") from error
        self.runtime, self._what = f"ExecuTorch {version('executorch')}", path
        self._set_threads(portable_lib, threads)
        try:
            self._program = Runtime.get().load_program(path.read_bytes())
            self._method: Any = self._program.load_method("forward")
            meta = self._method.metadata.input_tensor_meta(0)
        except Exception as error:
            raise BadFileError(f"{self.runtime} refuses {path}: {reason(error)}") from error
        self._torch = torch
        self._loaded.add(self)
        sizes = tuple(int(size) for size in meta.sizes())
        self.batch, self.shape = sizes[0], sizes[1:]

    def _set_threads(self, library: Any, threads: int) -> None:
        """A program keeps the pool that it was loaded with: one that is loaded would run into freed memory."""
        usual = library._threadpool_get_thread_count()
        if usual == threads:
            return
        if self._loaded:
            raise UsageError(
                f"{self._what} cannot run on {threads} threads while another ExecuTorch program is loaded on {usual}. Give both the "
                "same number, or drop the other first."
            )
        library._unsafe_reset_threadpool(threads)

    def run(self, images: Images) -> Floats:
        """Outputs for a batch of the file's own size."""
        result: Floats = self.run_whole(images)[0]
        return result

    def run_whole(self, images: Images) -> list[NDArray[Any]]:
        """Every output of the file for a batch of its own size, in its order."""
        try:
            outputs = self._method.execute([self._torch.from_numpy(np.ascontiguousarray(images))])
            return [output.numpy().copy() for output in outputs]
        except Exception as error:
            raise cannot_run(self.runtime, self._what, images, error) from error


class LiteRtRunner:
    """A ``.tflite`` file of float or uint8 images.

    Args:
        model: a path or the bytes of a file.
        xnnpack: False runs LiteRT's own kernels in the place of XNNPACK's, as devices without XNNPACK do.
        keep: all tensors stay readable after a run, see `tensor`.

    Raises:
        MissingBackendError: LiteRT is not installed. BadFileError: it refuses the file.
    """

    def __init__(self, model: Path | bytes, *, threads: int = 1, xnnpack: bool = True, keep: bool = False) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter, OpResolverType
        except ImportError as error:
            raise missing("LiteRT", "litert") from error
        self.runtime, self._what = f"LiteRT {version('ai-edge-litert')}", called(model)
        kernels = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        content = model.read_bytes() if isinstance(model, Path) else model
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # keeping tensors takes memory, it says
                self._interpreter: Any = Interpreter(
                    model_content=content,
                    num_threads=threads,
                    experimental_op_resolver_type=kernels,
                    experimental_preserve_all_tensors=keep,
                )
            self._interpreter.allocate_tensors()
            self.metadata = _litert_metadata(content)
        except Exception as error:
            raise BadFileError(f"{self.runtime} refuses {self._what}: {reason(error)}") from error
        entries, results = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        require_images(self._what, [np.dtype(entry["dtype"]) for entry in entries])
        self._entry, self._result = entries[0], results[0]
        self.dtype: np.dtype[Any] = np.dtype(self._entry["dtype"])
        sizes = tuple(int(size) for size in self._entry["shape"])
        self.batch, self.shape = sizes[0], sizes[1:]

    def run(self, images: Images) -> Floats:
        """Outputs for a batch of the file's own size."""
        try:
            self._interpreter.set_tensor(self._entry["index"], np.ascontiguousarray(images))
            self._interpreter.invoke()
            result: Floats = self._interpreter.get_tensor(self._result["index"]).copy()
        except Exception as error:
            raise cannot_run(self.runtime, self._what, images, error) from error
        return result

    def tensor(self, number: int) -> NDArray[Any]:
        """A tensor of the last run by its number in the file; needs ``keep``."""
        result: NDArray[Any] = self._interpreter.get_tensor(number)
        return result


def _litert_metadata(content: bytes) -> dict[str, str]:
    """The named texts of a ``.tflite`` file that are ours."""
    from ai_edge_litert.schema_py_generated import Model

    model = Model.GetRootAs(content, 0)
    found = (model.Metadata(number) for number in range(model.MetadataLength()))
    named = {entry.Name().decode(): model.Buffers(entry.Buffer()) for entry in found if entry.Name()}
    return {
        name: bytes(buffer.DataAsNumpy()).decode() for name, buffer in named.items() if name.startswith("edgecompress.")
    }
