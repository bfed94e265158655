"""The float graph as a portable ONNX file: pruned shapes, folded BatchNorm, names that keep the module path."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from edgecompress.errors import UsageError
from edgecompress.exporters.onnx_writing import BASE_OPSET, IR_VERSIONS, attributes_of, model_around, node, tensor
from edgecompress.graph import Graph


def float_model(
    graph: Graph, *, opset: int = BASE_OPSET, batch: int | None = None, metadata: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """Write ``graph`` as it is.

    Args:
        opset: 15 to 25.
        batch: a static batch size; dynamic when None.
        metadata: written as ``edgecompress.<key>`` properties.

    Raises:
        UsageError: the opset is out of range.
    """
    if opset not in IR_VERSIONS:
        raise UsageError(f"Opset {opset} cannot be written; choose {min(IR_VERSIONS)} to {max(IR_VERSIONS)}.")
    nodes = [node(n.op, n.inputs, n.outputs, n.name, **attributes_of(n)) for n in graph.nodes]
    initializers = [tensor(name, value) for name, value in graph.constants.items()]
    return model_around(graph, nodes, initializers, opset=opset, batch=batch, metadata=metadata)
