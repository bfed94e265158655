"""Measure kernels on this machine through ONNX Runtime: the runtime's own kernel times, with medians and spread.

What is taken of a layer is the profiler's time of its convolution or linear node alone: a one-layer graph also
quantises, transposes and reorders at its ends, which a network does not do at every layer. Those ends, and the
operators without weights, are rows of their own (`around_edge`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgecompress.errors import MissingBackendError
from edgecompress.graph import Graph
from edgecompress.latency_tables import agent
from edgecompress.latency_tables.onelayer import around_edge, model_bytes, one_layer, supported
from edgecompress.latency_tables.table import (
    EDGES,
    KernelKey,
    Provenance,
    Row,
    Setting,
)

LAYER_KERNELS = (
    "Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger", "Gemm", "FusedGemm", "QGemm", "MatMul",
    "FusedMatMul", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat",
)  # fmt: skip
FUSED = ("add", "multiply", "sigmoid", "hard_sigmoid", "hard_swish", "leaky_relu", "softmax")  # timed by difference

ENDS = {"input": "before", "output": "after"}  # of a network, timed around the layers of one graph

Progress = Callable[[int, int, float], None]


def this_setting(threads: int = 1) -> Setting:
    """Device, runtime and threads as they are here.

    Raises:
        MissingBackendError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingBackendError(
            "ONNX Runtime is not installed here: 'pip install onnxruntime', then profile."
        ) from error
    return Setting(
        device=agent.device_id(agent.machine_facts()), runtime="ONNX Runtime", runtime_version=onnxruntime.__version__,
        provider="CPUExecutionProvider", threads=threads,
    )  # fmt: skip


def provenance(target: str, setting: Setting) -> Provenance:
    """The provenance of a table that is measured here and now."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("edgecompress")
    except PackageNotFoundError:
        own = "unknown (not installed)"
    return Provenance(
        target=target, setting=setting, machine=agent.machine_facts(), edgecompress_version=own, created_at=agent.now()
    )


def graphs_of(key: KernelKey, seed: int = 0) -> tuple[Graph, ...]:
    """What is run to time ``key``: one graph, or the one with the operator and the one without it."""
    if key.kind not in EDGES:
        return (one_layer(key, seed),)
    around = around_edge(key, present=True, seed=seed)
    return (around,) if key.kind in ENDS else (around, around_edge(key, present=False, seed=seed))


def how(key: KernelKey) -> dict[str, Any]:
    """What the agent takes of the runs of `graphs_of`."""
    return {
        "method": "node_time", "part": ENDS.get(key.kind, "layers"), "fused": key.kind in FUSED,
        "cold": key.working_set == "cold", "operators": LAYER_KERNELS, "dtype": key.weight_dtype,
    }  # fmt: skip


def measure_kernel(key: KernelKey, *, threads: int = 1, time_cap_s: float = 1.0, seed: int = 0) -> Row:
    """Measure one kernel. A kind that no graph exists for gets the status ``unsupported``."""
    if not supported(key):
        return Row(key, 0.0, 0.0, 0.0, 0.0, 0, "node_time", "", "unsupported", agent.now())
    models = [model_bytes(graph, key.weight_dtype, seed) for graph in graphs_of(key, seed)]
    row = agent.OnnxRuntime(threads).measure(models, how(key), time_cap_s)
    return Row(key=key, **row, measured_at=agent.now())
