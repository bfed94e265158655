"""Memory that running a file takes: planned from the graph before a device is at hand, measured in a fresh process here.

    python -m edgecompress.exporters.memory FILE [BATCH]

prints what the second half measures as JSON.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from edgecompress.errors import BadFileError

if TYPE_CHECKING:
    from edgecompress.graph import Graph  # no torch in the process that is measured

FLOAT_BYTES, INTEGER_BYTES = 4, 1


def planned_activation_bytes(graph: Graph, integers: Collection[str] = (), *, batch: int = 1) -> int:
    """The largest sum of values that are alive at once while ``graph`` runs, in execution order.

    Args:
        integers: values that are held as one byte an element; all others are float32.

    A runtime may need less (it writes in place) or more (it packs tiles); what a fused activation absorbs never exists.
    """
    from edgecompress.quantize import is_fused_activation

    absorbed = {node.inputs[0] for node in graph.nodes if is_fused_activation(graph, node)}
    size = {
        name: batch * math.prod(shape) * (INTEGER_BYTES if name in integers else FLOAT_BYTES)
        for name, shape in graph.shapes.items()
        if name not in absorbed
    }
    last = {name: number for number, node in enumerate(graph.nodes) for name in node.inputs}
    last |= dict.fromkeys(graph.outputs, len(graph.nodes))
    alive, peak = set(graph.inputs), 0
    for number, node in enumerate(graph.nodes):
        alive.update(node.outputs)
        peak = max(peak, sum(size.get(name, 0) for name in alive))
        alive = {name for name in alive if last.get(name, -1) > number}
    return peak


def measured_memory(path: Path, *, batch: int = 1) -> dict[str, int]:
    """Load and run an ONNX Runtime file in a fresh process.

    Returns:
        ``runtime_bytes`` (interpreter and runtime alone), ``load_peak_bytes`` and ``run_peak_bytes`` on top of it.

    Raises:
        BadFileError: the runtime refuses the file.
    """
    done = subprocess.run(
        [sys.executable, "-m", "edgecompress.exporters.memory", str(path), str(batch)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise BadFileError(
            f"{path} cannot be run in a fresh process: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
        )
    result: dict[str, int] = json.loads(done.stdout)
    return result


def _peak_bytes() -> int:
    """The largest resident size of this process so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _measure(path: str, batch: int) -> dict[str, int]:
    import numpy as np
    import onnxruntime

    from edgecompress.exporters.runners import OnnxRuntimeRunner

    assert onnxruntime.__version__  # loaded before the first look: its own memory is no file's
    start = _peak_bytes()
    runner = OnnxRuntimeRunner(Path(path))
    loaded = _peak_bytes()
    image = np.zeros((runner.batch or batch, *runner.shape), dtype=runner.dtype)
    for _ in range(2):
        runner.run(image)
    return {
        "runtime_bytes": start,
        "load_peak_bytes": loaded - start,
        "run_peak_bytes": _peak_bytes() - start,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)) + "\n")
