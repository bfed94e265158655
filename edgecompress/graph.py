"""A trained network becomes one internal graph: BatchNorm folded, constants inlined, ONNX operators and names.

Everything after stage 1 (calibration, the simulators, every exporter) reads this graph; nothing here knows of bits.
A layer keeps its module path as name. Values keep the names that ``torch.onnx.export`` gave them.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgecompress.errors import BadModelError
from edgecompress.imports import place_of

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]
LAYER_OPS = ("Conv", "Gemm")
# What takes its axes as an attribute below opset 18 and as an input from there on. Here it is always an attribute.
REDUCTIONS = (
    "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
    "ReduceSumSquare",
)  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One operator. ``name`` is the module path for layers with weights; an absent optional input is ``""``."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order. ``shapes`` maps values to dimensions without the batch; ``constants`` holds weights."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[str, Array]
    shapes: Mapping[str, tuple[int, ...]]

    def consumers(self, value: str) -> tuple[Node, ...]:
        """Nodes that read ``value``."""
        return tuple(node for node in self.nodes if value in node.inputs)

    def producer(self, value: str) -> Node | None:
        """The node that writes ``value``; None for inputs and constants."""
        return next((node for node in self.nodes if value in node.outputs), None)

    @property
    def layers(self) -> tuple[Node, ...]:
        """Convolutions and Gemms with constant weights, in execution order."""
        return tuple(node for node in self.nodes if node.op in LAYER_OPS and node.inputs[1] in self.constants)


def build_graph(model: nn.Module, input_shape: tuple[int, ...], name: str) -> Graph:
    """Export ``model`` in eval mode and normalise the result.

    Args:
        model: a network on the CPU that maps ``[N, C, H, W]`` to one tensor. It is not changed.
        input_shape: ``(C, H, W)``.
        name: the network's name, for errors.

    Raises:
        BadModelError: ``torch.onnx.export`` refuses the network.
    """
    was_training = model.training
    model.eval()
    try:
        with quiet():
            program = torch.onnx.export(
                model,
                (torch.zeros(2, *input_shape),),
                dynamo=True,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except Exception as error:
        raise BadModelError(f"{name} cannot be exported to ONNX: {_cause(error)}") from error
    finally:
        model.train(was_training)
    assert program is not None
    return normalise(_placed(_from_ir(program.model), program.model))


def _cause(error: BaseException) -> str:
    """What went wrong at first, in one plain line with its place: torch's outer errors only say at which of its steps."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return f"{lines[0] if lines else type(error).__name__}{place_of(error)}"


def _placed(graph: Graph, model: Any) -> Graph:
    """Operators named after the module that calls them, as in ``layer1.0.relu``, so that a user finds them again."""
    scopes = {node.name: node.metadata_props.get("pkg.torch.onnx.name_scopes") for node in model.graph}
    taken: dict[str, int] = {}
    nodes = []
    for node in graph.nodes:
        scope = scopes.get(node.name)
        path = [part for part in ast.literal_eval(scope) if part] if scope else []
        name = ".".join(path[-2:]) or node.name
        count = taken[name] = taken.get(name, 0) + 1
        nodes.append(replace(node, name=name if count == 1 else f"{name}_{count}"))
    return replace(graph, nodes=tuple(nodes))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch.onnx.export prints progress and logs through several channels; a user of ours gets our own words."""
    loggers = [logging.getLogger(key) for key in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def read_graph(path: str | os.PathLike[str]) -> Graph:
    """Read a float ONNX file.

    Raises:
        BadModelError: the file is missing or is no ONNX model.
    """
    import onnx

    try:
        return normalise(raw_graph(onnx.load(path)))
    except Exception as error:
        raise BadModelError(f"{path} cannot be read as an ONNX model ({type(error).__name__}: {error}).") from error


def raw_graph(model: onnx.ModelProto) -> Graph:
    """An ONNX model as it is, with inferred shapes; `normalise` comes next."""
    import onnx
    import onnx_ir

    return _from_ir(onnx_ir.from_proto(onnx.shape_inference.infer_shapes(model)))


def _from_ir(model: Any) -> Graph:
    import onnx_ir

    constants: dict[str, Array] = {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }
    shapes: dict[str, tuple[int, ...]] = {}
    nodes: list[Node] = []
    for value in model.graph.inputs:
        shapes[value.name] = _shape(value)
    for node in model.graph:
        if node.op_type == "Constant":
            constants[node.outputs[0].name] = node.attributes["value"].as_tensor().numpy()
            continue
        attributes = {
            key: attribute.as_tensor().numpy() if attribute.type == onnx_ir.AttributeType.TENSOR else attribute.value
            for key, attribute in node.attributes.items()
        }
        inputs = tuple(value.name if value is not None else "" for value in node.inputs)
        nodes.append(Node(node.name, node.op_type, inputs, tuple(value.name for value in node.outputs), attributes))
        shapes |= {value.name: _shape(value) for value in node.outputs if value.shape is not None}
    outputs = tuple(value.name for value in model.graph.outputs)
    return Graph(tuple(value.name for value in model.graph.inputs), outputs, tuple(nodes), constants, shapes)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(size) if isinstance(size, int) else -1 for size in list(value.shape)[1:])


def normalise(graph: Graph) -> Graph:
    """Rename layers after their modules, drop what does nothing, and use the operators that runtimes have kernels for."""
    graph = _without_identities(graph)
    constants, shapes = dict(graph.constants), dict(graph.shapes)
    nodes = tuple(new for node in graph.nodes for new in _normalised(node, graph, constants, shapes))
    nodes = _alive(nodes, graph.outputs)
    used = {name for node in nodes for name in node.inputs}
    kept = {key: value for key, value in constants.items() if key in used}
    return replace(graph, nodes=nodes, constants=kept, shapes=shapes)


def _alive(nodes: tuple[Node, ...], outputs: tuple[str, ...]) -> tuple[Node, ...]:
    """Without operators whose results nobody reads, such as the shape arithmetic of a Reshape that is now constant."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return tuple(reversed(kept))


def _does_nothing(node: Node) -> bool:
    """Identity, a Dropout at rest, or an average over single pixels (adaptive pooling to the size that is there)."""
    if node.op != "AveragePool":
        return node.op in ("Identity", "Dropout")
    sizes = (*node.attributes["kernel_shape"], *node.attributes.get("strides", ()))
    return set(sizes) == {1} and not any(node.attributes.get("pads", ()))


def _without_identities(graph: Graph) -> Graph:
    alias: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        inputs = tuple(alias.get(name, name) for name in node.inputs)
        if _does_nothing(node) and node.outputs[0] not in graph.outputs:
            alias[node.outputs[0]] = inputs[0]
        else:
            nodes.append(replace(node, inputs=inputs))
    return replace(graph, nodes=tuple(nodes))


def _normalised(
    node: Node, graph: Graph, constants: dict[str, Array], shapes: dict[str, tuple[int, ...]]
) -> list[Node]:
    """What stands in the place of ``node``; new constants and the shapes of new values are added."""
    if node.op in LAYER_OPS and node.inputs[1] in graph.constants:
        return [_layer(node)]
    if node.op == "BatchNormalization" and len(graph.shapes.get(node.inputs[0], ())) == 3:
        return [_scale_and_shift(node, constants)]
    if node.op == "HardSwish":
        return _hard_swish(node, shapes)
    if node.op == "Split":
        return _slices(node, graph, constants)
    if node.op in REDUCTIONS and (axes := _axes(node, graph)):
        return _reduction(node, axes, shapes)
    if node.op == "Reshape" and _flattens(node, graph):
        return [replace(node, op="Flatten", inputs=node.inputs[:1], attributes={"axis": 1})]
    if node.op == "Reshape" and node.inputs[1] not in graph.constants:
        return [_static_reshape(node, graph, constants)]
    return [node]


def _scale_and_shift(node: Node, constants: dict[str, Array]) -> Node:
    """A BatchNorm that no convolution precedes is a depthwise 1x1 convolution, which runs in integers.

    One weight per channel, quantised per channel, loses nothing.
    """
    gamma, beta, mean, variance = (constants[name].astype(np.float64) for name in node.inputs[1:5])
    factor = gamma / np.sqrt(variance + float(node.attributes.get("epsilon", 1e-5)))
    name = node.inputs[3].removesuffix(".running_mean")  # equal gammas are one tensor in the export, means never are
    constants[f"{name}.scale"] = factor.astype(np.float32).reshape(-1, 1, 1, 1)
    constants[f"{name}.shift"] = (beta - mean * factor).astype(np.float32)
    inputs = (node.inputs[0], f"{name}.scale", f"{name}.shift")
    return Node(name, "Conv", inputs, node.outputs[:1], {"group": len(factor), "kernel_shape": (1, 1)})


def _hard_swish(node: Node, shapes: dict[str, tuple[int, ...]]) -> list[Node]:
    """``x * HardSigmoid(x)``: runtimes split it so anyway, and both halves have integer forms."""
    gate = f"{node.outputs[0]}_gate"
    shapes[gate] = shapes[node.inputs[0]]
    return [
        Node(f"{node.name}_gate", "HardSigmoid", node.inputs, (gate,), {"alpha": 1 / 6, "beta": 0.5}),
        Node(node.name, "Mul", (node.inputs[0], gate), node.outputs, {}),
    ]


def _slices(node: Node, graph: Graph, constants: dict[str, Array]) -> list[Node]:
    """One Slice per output, so that every operator of the graph has one result."""
    axis = int(node.attributes.get("axis", 0))
    if axis == 0:
        return [node]  # the batch: the interpreter refuses it by name
    sizes = [graph.shapes[output][axis - 1 if axis > 0 else axis] for output in node.outputs]
    nodes, start = [], 0
    for number, (output, size) in enumerate(zip(node.outputs, sizes, strict=True)):
        names = [f"{node.name}.{number}.{part}" for part in ("start", "end", "axis")]
        for name, value in zip(names, (start, start + size, axis), strict=True):
            constants[name] = np.array([value], np.int64)
        nodes.append(Node(f"{node.name}.{number}", "Slice", (node.inputs[0], *names), (output,), {}))
        start += size
    return nodes


def _static_reshape(node: Node, graph: Graph, constants: dict[str, Array]) -> Node:
    """A Reshape to computed sizes that leaves the batch alone; the other sizes are known."""
    source, result = graph.shapes.get(node.inputs[0], ()), graph.shapes.get(node.outputs[0], ())
    if not result or min((*source, *result)) < 1 or math.prod(source) != math.prod(result):
        return node
    name = f"{node.name}.shape"
    constants[name] = np.array([0, *result], np.int64)
    return replace(node, inputs=(node.inputs[0], name), attributes={})


def _layer(node: Node) -> Node:
    name = node.inputs[1].removesuffix(".weight")
    return replace(node, name=name)


def _axes(node: Node, graph: Graph) -> tuple[int, ...]:
    """A reduction's axes in ascending order, from the front where its input's rank is known; empty: none are constant."""
    constant = graph.constants.get(node.inputs[1], ()) if len(node.inputs) > 1 else ()
    axes = (int(axis) for axis in np.ravel(node.attributes.get("axes", constant)))
    shape = graph.shapes.get(node.inputs[0])
    return tuple(sorted(axes if shape is None else (axis % (len(shape) + 1) for axis in axes)))


def _reduction(node: Node, axes: tuple[int, ...], shapes: dict[str, tuple[int, ...]]) -> list[Node]:
    if node.op == "ReduceMean" and axes == (2, 3) and len(shapes.get(node.inputs[0], ())) == 3:
        return _global_pool(node, shapes)
    attributes = {"axes": axes, "keepdims": int(node.attributes.get("keepdims", 1))}
    return [replace(node, inputs=node.inputs[:1], attributes=attributes)]


def _global_pool(node: Node, shapes: dict[str, tuple[int, ...]]) -> list[Node]:
    """ONNX Runtime has an integer GlobalAveragePool but no integer ReduceMean."""
    channels = shapes[node.inputs[0]][0]
    if node.attributes.get("keepdims", 1):
        shapes[node.outputs[0]] = (channels, 1, 1)
        return [replace(node, op="GlobalAveragePool", inputs=node.inputs[:1], attributes={})]
    pooled = f"{node.outputs[0]}_pooled"
    shapes[pooled] = (channels, 1, 1)
    return [
        Node(f"{node.name}_pool", "GlobalAveragePool", node.inputs[:1], (pooled,), {}),
        Node(f"{node.name}_flatten", "Flatten", (pooled,), node.outputs, {"axis": 1}),
    ]


def _flattens(node: Node, graph: Graph) -> bool:
    source, result = graph.shapes.get(node.inputs[0]), graph.shapes.get(node.outputs[0])
    return source is not None and result is not None and len(result) == 1 and len(source) > 1
