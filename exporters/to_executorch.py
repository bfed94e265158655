"""A ``.pte`` program for ExecuTorch's XNNPACK: integers with the network's own steps, or floats.

XNNPACK computes in s8 with zero points: a u8 value with zero point 0 has -128, one with 128 has 0. Weights lie as int8
whatever their bits; fewer activation bits are a clamp that the kernel before absorbs. It takes a layer as integers only
with an integer result, so that the scores have 8 bits here, on the range seen on the images of the proof. What it has no
integer kernel for (`float_operators`) it computes in float, between values that are quantised.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecompress.errors import UsageError
from edgecompress.exporters.emulate import MOVES, meets_a_constant
from edgecompress.exporters.more_runners import missing
from edgecompress.graph import LAYER_OPS, Graph, quiet
from edgecompress.interpret import apply, float_constants, run
from edgecompress.quantize import QuantizedGraph, TensorRange, find_points

INTEGER_OPERATORS = (
    *LAYER_OPS, "Add", "Sub", "Mul", "Relu", "Clip", "MaxPool", "GlobalAveragePool", "Concat", "Flatten", "Reshape",
    "Transpose", "Slice", "Identity",
)  # fmt: skip


class FloatNetwork(nn.Module):
    """The graph as a module.

    Args:
        without: constants that it does not hold: a program carries every buffer, read or not.
    """

    def __init__(self, graph: Graph, without: Collection[str] = ()) -> None:
        super().__init__()
        self._graph, self._names, self._numbers = graph, {}, {}
        limits = {name for node in graph.nodes if node.op == "Clip" for name in node.inputs[1:]}
        plain = limits | {name for node in graph.nodes if node.op in ("Slice", "Reshape") for name in node.inputs[1:]}
        for number, (name, value) in enumerate(float_constants(graph).items()):
            if name in without:
                continue
            if name in plain:  # a buffer's numbers are data, on which the program must not depend
                self._numbers[name] = value.item() if name in limits else value.reshape(-1).tolist()
                continue
            self.register_buffer(f"constant{number}", value)
            self._names[name] = f"constant{number}"

    def constants(self) -> dict[str, Any]:
        """Every constant by its name in the graph; sizes and places of slices as a list, limits of a Clip as a number."""
        return {name: getattr(self, key) for name, key in self._names.items()} | self._numbers

    def forward(self, x: Tensor) -> Tensor:
        return run(self._graph, x, self.constants())


class IntegerNetwork(FloatNetwork):
    """The graph with the quantise and dequantise operators that XNNPACK fuses.

    Args:
        scores: the range of the output, where the network leaves it float; ``scores`` is then what it has.
        show: answer every quantised value as well, as s8 and in the order of ``shown``.
    """

    def __init__(self, quantized: QuantizedGraph, scores: TensorRange, *, show: bool = False) -> None:
        scores = _moved(quantized) or scores
        tensors = {quantized.graph.outputs[0]: scores} | dict(quantized.tensors)
        inputs = {layer.name: layer.inputs[1] for layer in quantized.graph.layers if layer.name in quantized.weights}
        super().__init__(_clamps_alone(quantized.graph, tensors), inputs.values())
        import torch.ao.quantization.fx._decomposed

        self._tensors, self._owner = tensors, find_points(quantized.graph).owner
        results = (*self._graph.inputs, *(node.outputs[0] for node in self._graph.nodes))
        self.scores, self.shown = scores, [name for name in results if name in tensors] if show else []
        self._layers: dict[str, int] = {}
        for number, (name, weight) in enumerate(quantized.weights.items()):
            self.register_buffer(f"values{number}", torch.from_numpy(weight.values.copy()))
            self.register_buffer(f"scale{number}", torch.from_numpy(weight.channel_scale))
            self.register_buffer(f"zero{number}", torch.zeros(len(weight.values), dtype=torch.int64))
            self._layers[inputs[name]] = number

    def forward(self, x: Tensor) -> Any:
        operators = torch.ops.quantized_decomposed
        constants = self.constants()
        for name, number in self._layers.items():
            values, scale, zero = (getattr(self, f"{kind}{number}") for kind in ("values", "scale", "zero"))
            constants[name] = operators.dequantize_per_channel(values, scale, zero, 0, -127, 127, torch.int8)

        integers: dict[str, Tensor] = {}

        def keep(name: str, value: Tensor) -> None:
            how = self._tensors.get(name)
            if how is None:
                constants[name] = value
                return
            low, high = how.limits
            if how.bits < 8 and self._owner.get(name, name) == name:
                value = F.hardtanh(value, low * how.scale, high * how.scale)
            integers[name] = operators.quantize_per_tensor(value, *_grid(how))

        def read(name: str, on: str | None) -> Any:
            """Each reader dequantises for itself: shared by two, the partitions around them would wait for each other."""
            if name not in integers:
                return constants.get(name)
            value = operators.dequantize_per_tensor(integers[name], *_grid(self._tensors[name]))
            if on is None or _grid(self._tensors[on]) == _grid(self._tensors[name]):
                return value
            grid = _grid(self._tensors[on])  # XNNPACK joins values of one grid only
            return operators.dequantize_per_tensor(operators.quantize_per_tensor(value, *grid), *grid)

        keep(self._graph.inputs[0], x)
        for node in self._graph.nodes:
            result = node.outputs[0]
            on = result if node.op == "Concat" and result in self._tensors else None
            arguments = [read(name, on) for name in node.inputs]
            if node.op == "Clip" and len(arguments) == 3 and None not in arguments[1:]:
                keep(result, F.hardtanh(*arguments))  # a clamp by another name, which XNNPACK joins to the layer before
            else:
                keep(result, apply(node, arguments))
        outputs = read(self._graph.outputs[0], None)
        return (outputs, *(integers[name] for name in self.shown)) if self.shown else outputs


def _grid(how: TensorRange) -> tuple[float, int, int, int, torch.dtype]:
    """Step, zero point, limits and type, as PyTorch's quantise operators take them."""
    return how.scale, 0 if how.signed else -128, -128, 127, torch.int8


def float_operators(quantized: QuantizedGraph) -> list[str]:
    """Operators that XNNPACK has no integer kernel for, as ``op name``."""
    return [
        f"{node.op} {node.name}"
        for node in quantized.graph.nodes
        if node.op not in INTEGER_OPERATORS
        or (node.op in LAYER_OPS and node.name not in quantized.weights)
        or meets_a_constant(quantized.graph, node)
    ]


def _moved(quantized: QuantizedGraph) -> TensorRange | None:
    """The grid of the quantised value that the output is by another shape: XNNPACK moves no value to another grid."""
    name = quantized.graph.outputs[0]
    while name not in quantized.tensors:
        node = quantized.graph.producer(name)
        if node is None or node.op not in MOVES:
            return None
        name = node.inputs[0]
    return quantized.tensors[name]


def _clamps_alone(graph: Graph, tensors: Mapping[str, TensorRange]) -> Graph:
    """Without activations that a clamp of fewer bits includes: XNNPACK fuses one of the two."""
    nodes = tuple(
        replace(node, op="Identity", inputs=node.inputs[:1], attributes={})
        if node.op in ("Relu", "Clip") and (how := tensors.get(node.outputs[0])) and how.bits < 8 and not how.signed
        else node
        for node in graph.nodes
    )
    return replace(graph, nodes=nodes)


def program(network: nn.Module, image: Tensor) -> tuple[bytes, list[str]]:
    """The serialised program for inputs of the shape of ``image``, and operators that XNNPACK left to portable kernels.

    Raises:
        MissingBackendError: ExecuTorch is not installed. UsageError: it cannot lower the network.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise missing("ExecuTorch", "executorch") from error
    with quiet(), warnings.catch_warnings(), _no_log():
        warnings.simplefilter("ignore")
        try:
            lowered = to_edge_transform_and_lower(
                torch.export.export(network.eval(), (image,)), partitioner=[XnnpackPartitioner()]
            )
            calls = [node for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
            left = sorted(
                {str(node.target) for node in calls} - {"executorch_call_delegate", "<built-in function getitem>"}
            )
            return bytes(lowered.to_executorch().buffer), left
        except Exception as error:
            why = str(error).strip().splitlines()
            raise UsageError(
                f"ExecuTorch cannot lower the network as it is ({why[0] if why else type(error).__name__})."
            ) from error


@contextlib.contextmanager
def _no_log():  # type: ignore[no-untyped-def]
    """The partitioner logs every operator that it leaves."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
