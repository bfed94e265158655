"""Run a TensorRT engine where it was built; its ``engine.json`` says where that is, before anything is deserialised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edgecompress.errors import BadFileError, MissingBackendError, UsageError
from edgecompress.exporters.build_on_device import Cuda, Problem, Session, load_engine, load_tensorrt
from edgecompress.exporters.runners import Floats, Images
from edgecompress.files import sha256

SIDECAR = "engine.json"
_KINDS: dict[int, type[Exception]] = {2: UsageError, 4: MissingBackendError}


class TensorRtRunner:
    """An engine that ``build_on_device.py`` built on this machine, with its ``engine.json`` beside it.

    ``metadata`` are the properties of the ONNX file that it was built from.

    Raises:
        BadFileError: the engine or its ``engine.json`` is missing or damaged, or was built for another GPU or TensorRT.
        MissingBackendError: there is no TensorRT or no GPU here.
    """

    def __init__(self, path: Path) -> None:
        record, plan = _record_of(path), path.read_bytes()
        if sha256(plan) != record["engine_sha256"]:
            raise BadFileError(
                f"{path} is damaged or belongs to another {SIDECAR}: its sha256 is not the one written there. {_rebuild(record)}"
            )
        try:
            trt, is_rtx = load_tensorrt()
            if is_rtx:
                raise Problem("Only TensorRT-RTX is installed; engines are built and run by 'tensorrt'", 4)
            cuda = Cuda()
            _check_machine(path, record, str(trt.__version__), *cuda.device())
            engine = load_engine(trt, plan, record.get("dla_core"))
            if engine is None:
                raise BadFileError(f"TensorRT {trt.__version__} refuses {path}. {_rebuild(record)}")
            self._session = Session(trt, engine, cuda, record["batch"])
        except Problem as problem:
            built = _words(record["tensorrt"], record["gpu"], record["compute_capability"])
            raise _KINDS.get(problem.code, BadFileError)(f"{path} was built by {built}. {problem}") from problem
        self.shape, self.batch = self._session.shape[1:], self._session.shape[0]
        self.dtype: np.dtype[Any] = self._session.images.dtype
        self.runtime = f"TensorRT {trt.__version__}"
        self.metadata: dict[str, str] = record["metadata"]

    def run(self, images: Images) -> Floats:
        """Outputs for one batch, with the transfers to the GPU and back."""
        try:
            result: Floats = self._session.run(images)
        except Problem as problem:
            raise BadFileError(str(problem)) from problem
        return result


def _rebuild(record: dict[str, Any]) -> str:
    return f"Build it again on the machine that shall run it: python3 build_on_device.py --onnx {record['onnx']}"


def _record_of(path: Path) -> dict[str, Any]:
    sidecar = path.with_name(SIDECAR)
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        wanted = {
            "engine_sha256": str,
            "tensorrt": str,
            "gpu": str,
            "compute_capability": str,
            "onnx": str,
            "batch": int,
        }
        missing = [key for key, kind in wanted.items() if not isinstance(record[key], kind)]
        record["metadata"] = {str(key): str(value) for key, value in record.get("metadata", {}).items()}
    except FileNotFoundError as error:
        raise BadFileError(
            f"{path} has no {SIDECAR} beside it, which says for which GPU and TensorRT it was built. Copy it too, or build the "
            "engine with build_on_device.py."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFileError(
            f"{sidecar} is damaged ({type(error).__name__}: {error}). Build the engine again."
        ) from error
    if missing or record.get("schema_version") != 1:
        raise BadFileError(
            f"{sidecar} is damaged or of another version. Build the engine again with build_on_device.py."
        )
    return dict(record)


def _check_machine(path: Path, record: dict[str, Any], version: str, gpu: str, capability: tuple[int, ...]) -> None:
    here = (version, gpu, ".".join(str(number) for number in capability))
    there = (record["tensorrt"], record["gpu"], record["compute_capability"])
    if here != there:
        raise BadFileError(
            f"{path} was built by {_words(*there)}; here is {_words(*here)}. An engine runs only where it was built. "
            f"{_rebuild(record)}"
        )


def _words(version: str, gpu: str, capability: str) -> str:
    return f"TensorRT {version} on {gpu} (compute capability {capability})"
