"""A `QuantizedGraph` on disk: integers, steps and biases as safetensors; the graph's structure is its float ONNX file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgecompress.errors import BadFileError
from edgecompress.exporters.to_onnx import float_model
from edgecompress.files import write_bytes, written_whole
from edgecompress.graph import Graph, read_graph
from edgecompress.quantize import QuantizedGraph, QuantizedWeight, TensorRange
from edgecompress.spec import SCHEMA_VERSION


def save_graph(path: Path, graph: Graph) -> None:
    """Write a float graph as ONNX."""
    write_bytes(path, float_model(graph).SerializeToString())


def save_quantized(path: Path, quantized: QuantizedGraph) -> None:
    """Write everything but the graph's structure."""
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {f"constant:{k}": np.asarray(v) for k, v in quantized.graph.constants.items()}
    for name, weight in quantized.weights.items():
        tensors |= {f"values:{name}": weight.values, f"scale:{name}": weight.scale}
    tensors = {key: np.asarray(value, order="C").reshape(value.shape) for key, value in tensors.items()}
    metadata = {
        "schema_version": str(SCHEMA_VERSION),
        "weight_bits": json.dumps({name: weight.bits for name, weight in quantized.weights.items()}),
        "tensors": json.dumps({name: [how.scale, how.bits, how.signed] for name, how in quantized.tensors.items()}),
        "half": json.dumps(sorted(quantized.half)),
    }
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_quantized(path: Path, graph_path: Path) -> QuantizedGraph:
    """Read what `save_quantized` and `save_graph` wrote.

    Raises:
        BadFileError: a file is missing, broken, or of another schema version.
    """
    from safetensors import SafetensorError, safe_open

    graph = read_graph(graph_path)
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise BadFileError(
            f"The quantised network {path} cannot be read ({error}). Compress again with --overwrite."
        ) from error
    if metadata.get("schema_version") != str(SCHEMA_VERSION):
        raise BadFileError(
            f"The quantised network {path} has schema version {metadata.get('schema_version')}; expected {SCHEMA_VERSION}."
        )
    try:
        return _assembled(graph, tensors, metadata)
    except (KeyError, ValueError, TypeError) as error:
        raise BadFileError(
            f"The quantised network {path} lacks {error} or holds it in another form. Compress again with --overwrite."
        ) from error


def _assembled(graph: Graph, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> QuantizedGraph:
    bits = json.loads(metadata["weight_bits"])
    return QuantizedGraph(
        graph=replace(
            graph, constants={k.removeprefix("constant:"): v for k, v in tensors.items() if k.startswith("constant:")}
        ),
        tensors={name: TensorRange(*how) for name, how in json.loads(metadata["tensors"]).items()},
        weights={
            name: QuantizedWeight(tensors[f"values:{name}"], tensors[f"scale:{name}"], bits[name]) for name in bits
        },
        half=frozenset(json.loads(metadata.get("half", "[]"))),
    )
