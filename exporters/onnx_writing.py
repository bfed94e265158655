"""Small helpers that every ONNX writer shares: names, tensors, the model around a list of nodes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgecompress.errors import BadModelError
from edgecompress.graph import REDUCTIONS, Graph, Node
from edgecompress.spec import Preprocessing

# The IR version that belongs to an opset (onnx's Versioning.md); an older runtime refuses a newer IR.
IR_VERSIONS = {15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}
BASE_OPSET = 17
AXES_INPUT_OPSET = 18  # from here on `REDUCTIONS` take their axes as an input
FOUR_BITS_OPSET = 21
# Oldest ONNX Runtime that loads and runs a file of this opset, tried with the wheels from 1.16.3 on (older: not tried).
_OLDEST_ONNXRUNTIME = {15: "1.16", 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23", 24: "1.24"}
_PACKED = "1.23"  # older ones have no kernel for the Cast of 4-bit weights, or for the sum of looked-up ones


def oldest_onnxruntime(model: onnx.ModelProto) -> str:
    """The oldest ONNX Runtime that was seen to run files like ``model``."""
    opset = model.opset_import[0].version
    oldest = next(version for start, version in reversed(_OLDEST_ONNXRUNTIME.items()) if opset >= start)
    packed = any(found.data_type in (TensorProto.INT4, TensorProto.UINT4) for found in model.graph.initializer)
    looked_up = any(found.op_type == "Gather" for found in model.graph.node)
    return max(oldest, _PACKED) if packed or looked_up else oldest


class Names:
    """Short unique names (``a``, ``b``, ..., ``aa``): in a small network names would outweigh the weights."""

    def __init__(self, reserved: Sequence[str] = (), *, used: int = 0) -> None:
        self._count = used
        self._reserved = set(reserved)

    def new(self) -> str:
        """The next name."""
        number, text = self._count, ""
        self._count += 1
        while True:
            text = chr(ord("a") + number % 26) + text
            number = number // 26 - 1
            if number < 0:
                break
        return self.new() if text in self._reserved else text


def tensor(name: str, values: np.ndarray[Any, Any]) -> TensorProto:
    """An initialiser in raw bytes (4- and 2-bit types packed). A scalar stays one: ONNX Runtime fuses no [1] scales."""
    return numpy_helper.from_array(np.asarray(values, order="C"), name)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], name: str = "", **attributes: Any) -> onnx.NodeProto:
    """An operator; most nodes need no name."""
    return helper.make_node(op, list(inputs), list(outputs), name=name or None, **attributes)


def attributes_of(source: Node) -> dict[str, Any]:
    """The attributes worth writing: ONNX's defaults are left out."""
    defaults: Mapping[str, Any] = {
        "group": 1, "auto_pad": "NOTSET", "alpha": 1.0, "beta": 1.0, "transA": 0, "storage_order": 0, "ceil_mode": 0,
    }  # fmt: skip
    kept = {}
    for key, value in source.attributes.items():
        plain = list(value) if isinstance(value, tuple | list) else value
        ones = key in ("strides", "dilations") and all(v == 1 for v in plain)
        zeros = key == "pads" and not any(plain)
        if not (
            ones or zeros or (key in defaults and plain == defaults[key] and source.op in ("Conv", "Gemm", "MaxPool"))
        ):
            kept[key] = plain
    return kept


def model_around(
    graph: Graph,
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[TensorProto],
    *,
    opset: int,
    batch: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """A checked model whose input and output keep the graph's names, with a dynamic batch unless ``batch`` is given.

    Raises:
        BadModelError: an operator has no such form in ``opset``.
    """
    sizes: list[int | str] = [batch if batch else "N"]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, sizes + list(graph.shapes[n])) for n in graph.inputs]
    outputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, sizes + list(graph.shapes[n])) for n in graph.outputs
    ]
    model = helper.make_model(
        helper.make_graph(list(nodes), "g", inputs, outputs, list(initializers)),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=IR_VERSIONS[opset],
        producer_name="edgecompress",
    )
    say(model, metadata or {})
    if opset >= AXES_INPUT_OPSET:
        _take_axes_as_inputs(model.graph)
    _check(model, opset)
    return model


def say(model: onnx.ModelProto, properties: Mapping[str, str]) -> None:
    """Add properties of ours to a model."""
    for name, text in properties.items():
        model.metadata_props.append(onnx.StringStringEntryProto(key=f"edgecompress.{name}", value=text))


def _take_axes_as_inputs(graph: onnx.GraphProto) -> None:
    """The last step of a writer: only then is the opset known that its storages need."""
    taken = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    taken.update(name for found in graph.node for name in (*found.input, *found.output))
    names, written = Names(sorted(taken), used=len(taken)), dict[tuple[int, ...], str]()
    attributes = [
        (found, attribute)
        for found in graph.node
        for attribute in found.attribute
        if found.op_type in REDUCTIONS and attribute.name == "axes"
    ]
    for found, attribute in attributes:
        axes = tuple(attribute.ints)
        if axes not in written:
            written[axes] = names.new()
            graph.initializer.append(tensor(written[axes], np.array(axes, np.int64)))
        found.input.append(written[axes])
        found.attribute.remove(attribute)


def _check(model: onnx.ModelProto, opset: int) -> None:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0].removesuffix(".")
        found = re.search(r"Name: (\S+) OpType: (\S+)", str(error))
        what = f"The operator {found[2]} at '{found[1]}'" if found else "The network"
        raise BadModelError(
            f"{what} cannot be written as ONNX of opset {opset}: {reason}. Replace that operator, or report it with the network."
        ) from error


def metadata_of(preprocessing: Preprocessing, classes: Sequence[str]) -> dict[str, str]:
    """What every file says of itself: how an image becomes its input, and the names of its outputs in their order (JSON)."""
    return {"preprocess": preprocessing.model_dump_json(), "labels": json.dumps(list(classes), ensure_ascii=False)}


def inputs_of(source: Node, rename: Mapping[str, str]) -> list[str]:
    """A node's inputs under new names."""
    return [rename.get(name, name) for name in source.inputs]
