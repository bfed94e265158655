"""The float network for ncnn: ``.param`` and ``.bin``, made by pnnx from the ONNX file. ncnn's wheel has no int8 tools."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from edgecompress.errors import BadModelError
from edgecompress.exporters.more_runners import missing

PARAM, BIN = "model.ncnn.param", "model.ncnn.bin"
_TIMEOUT_S = 600


def convert(model: bytes, shape: tuple[int, ...]) -> dict[str, bytes]:
    """Both files for a float ONNX ``model`` of images ``[1, *shape]``.

    Raises:
        MissingBackendError: pnnx is not installed. BadModelError: pnnx cannot translate the network.
    """
    try:
        import pnnx
    except ImportError as error:
        raise missing("pnnx", "ncnn") from error
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "model.onnx").write_bytes(model)
        sizes = ",".join(str(size) for size in (1, *shape))
        command = [pnnx.EXEC_PATH, "model.onnx", f"inputshape=[{sizes}]", "fp16=0"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
        if done.returncode or not (folder / PARAM).exists() or not (folder / BIN).exists():
            last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
            raise BadModelError(f"pnnx cannot translate the network for ncnn: {last}. Export --format onnx.")
        return {name: (folder / name).read_bytes() for name in (PARAM, BIN)}
