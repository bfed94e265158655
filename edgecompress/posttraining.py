"""What helps a network before and after its values are rounded, without training: equalisation and bias correction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from edgecompress.errors import BadDataError
from edgecompress.graph import LAYER_OPS, Array, Graph, Node
from edgecompress.interpret import float_constants, run
from edgecompress.quantize import QuantizedGraph, clip_limit, fake_quantize, rounded_constants

# Scaling a channel by s > 0 before one of these scales it by s behind it. A Clip (ReLU6) is not among them: its end stays.
_HOMOGENEOUS = ("Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Identity")


@dataclass(frozen=True)
class Pair:
    """Two layers between which channels may be scaled: only ``second`` reads what ``first`` writes."""

    first: Node
    second: Node


def equalisable(graph: Graph) -> tuple[Pair, ...]:
    """Pairs of layers joined by nothing but operators that a positive factor passes through."""
    uses = Counter(name for node in graph.nodes for name in node.inputs)
    own = {layer.name for layer in graph.layers if all(uses[name] == 1 for name in layer.inputs[1:] if name)}
    pairs = []
    for first in graph.layers:
        second = _next_layer(graph, first)
        if second is None or not {first.name, second.name} <= own:
            continue
        if first.op == "Conv" and _reads_channel_by_channel(graph, first, second):
            pairs.append(Pair(first, second))
    return tuple(pairs)


def _next_layer(graph: Graph, first: Node) -> Node | None:
    value = first.outputs[0]
    while value not in graph.outputs:
        readers = graph.consumers(value)
        if len(readers) != 1:
            return None
        if readers[0].op in LAYER_OPS:
            return readers[0] if readers[0].inputs[0] == value else None
        if readers[0].op not in _HOMOGENEOUS:
            return None
        value = readers[0].outputs[0]
    return None


def _reads_channel_by_channel(graph: Graph, first: Node, second: Node) -> bool:
    channels = graph.constants[first.inputs[1]].shape[0]
    weight = graph.constants.get(second.inputs[1])
    if weight is None:
        return False
    if second.op == "Gemm":
        return bool(second.attributes.get("transB", 0)) and weight.shape[1] == channels
    return _is_depthwise(second, weight) or int(second.attributes.get("group", 1)) == 1


def _is_depthwise(layer: Node, weight: Array) -> bool:
    return layer.op == "Conv" and weight.shape[1] == 1 and int(layer.attributes.get("group", 1)) == weight.shape[0]


def equalised(graph: Graph, *, passes: int = 20) -> Graph:
    """Scale channels so that both layers of every pair have the same largest weight per channel (Nagel 2019, section 4.1).

    The float network computes the same. Weights that are zero stay zero, and a dead channel is left alone.
    """
    constants = dict(graph.constants)
    pairs = equalisable(graph)
    for _ in range(passes):
        furthest = max((_balance(pair, constants) for pair in pairs), default=1.0)
        if furthest < 1.01:
            break
    return replace(graph, constants=constants)


def without_upper_ends(graph: Graph, batches: Iterable[Tensor], *, share: float = 1e-3) -> Graph:
    """ReLU6 becomes ReLU where no more than ``share`` of the values lies above its end (Nagel 2019, section 5.1.1).

    Equalisation passes through a ReLU only. The float network changes by what the few clipped values were clipped.

    Args:
        batches: normalised calibration images ``[N, C, H, W]``.
    """
    ends = {node.inputs[0]: end for node in graph.nodes if (end := clip_limit(graph, node)) is not None}
    above, seen = Counter[str](), Counter[str]()

    def watch(name: str, value: Tensor) -> Tensor:
        if name in ends:
            above[name] += int((value > ends[name]).sum())
            seen[name] += value.numel()
        return value

    constants = float_constants(graph)
    with torch.no_grad():
        for x in batches:
            run(graph, x, constants, watch)
    rarely = {name for name in ends if seen[name] and above[name] <= share * seen[name]}
    nodes = tuple(
        replace(node, op="Relu", inputs=node.inputs[:1], attributes={})
        if node.inputs[0] in rarely and clip_limit(graph, node) is not None
        else node
        for node in graph.nodes
    )
    return replace(graph, nodes=nodes)


def _balance(pair: Pair, constants: dict[str, Array]) -> float:
    """Balance one pair; returns the largest factor that was needed."""
    written, read = constants[pair.first.inputs[1]], constants[pair.second.inputs[1]]
    # The channel that the second layer reads comes first here, as it does in what the first one writes.
    by_input = read if _is_depthwise(pair.second, read) else read.swapaxes(0, 1)
    out = np.abs(written.reshape(len(written), -1)).max(1)
    into = np.abs(by_input.reshape(len(by_input), -1)).max(1)
    alive = (out > 1e-8) & (into > 1e-8)
    factor = np.where(alive, np.sqrt(out / np.where(alive, into, 1)), 1).clip(1e-3, 1e3).astype(np.float32)

    def along(values: Array) -> Array:
        return factor.reshape(-1, *(1,) * (values.ndim - 1))

    constants[pair.first.inputs[1]] = written / along(written)
    if len(pair.first.inputs) > 2 and pair.first.inputs[2]:
        constants[pair.first.inputs[2]] = constants[pair.first.inputs[2]] / factor
    scaled = by_input * along(by_input)
    constants[pair.second.inputs[1]] = scaled if by_input is read else np.ascontiguousarray(scaled.swapaxes(0, 1))
    return float(np.maximum(factor, 1 / factor).max())


def bias_corrected(quantized: QuantizedGraph, batches: Iterable[Tensor]) -> QuantizedGraph:
    """Add to every bias what quantisation takes from the mean of its channel (Nagel 2019, section 4.2), layer by layer.

    A layer is measured behind the correction of those before it. Layers without a bias, or that share it, stay.

    Args:
        batches: normalised calibration images ``[N, C, H, W]``; the corrections of all batches are averaged.

    Raises:
        BadDataError: there is no image.
    """
    graph = quantized.graph
    uses = Counter(name for node in graph.nodes for name in node.inputs)
    biased = {
        layer.outputs[0]: layer.inputs[2]
        for layer in graph.layers
        if layer.name in quantized.weights and len(layer.inputs) > 2 and uses[layer.inputs[2]] == 1
    }
    floats, rounded = float_constants(graph), rounded_constants(quantized)
    total = {bias: torch.zeros_like(floats[bias]) for bias in biased.values()}
    count = 0
    with torch.no_grad():
        for x in batches:
            wanted: dict[str, Tensor] = {}
            run(graph, x, floats, _watcher(biased, wanted))
            shifts = _shifts(quantized, x, rounded, biased, wanted)
            for bias, shift in shifts.items():
                total[bias] += shift * len(x)
            count += len(x)
    if not count:
        raise BadDataError("There is no image to correct the biases with. Give at least one batch.")
    constants = dict(graph.constants) | {
        bias: np.asarray(graph.constants[bias] + (shift / count).numpy(), np.float32) for bias, shift in total.items()
    }
    return replace(quantized, graph=replace(graph, constants=constants))


def _channel_means(value: Tensor) -> Tensor:
    return value.mean([axis for axis in range(value.dim()) if axis != 1])


def _watcher(biased: dict[str, str], wanted: dict[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
    def watch(name: str, value: Tensor) -> Tensor:
        if name in biased:
            wanted[name] = _channel_means(value)
        return value

    return watch


def _shifts(
    quantized: QuantizedGraph,
    x: Tensor,
    constants: dict[str, Tensor],
    biased: dict[str, str],
    wanted: dict[str, Tensor],
) -> dict[str, Tensor]:
    """What each bias lacks on one batch."""
    shifts: dict[str, Tensor] = {}

    def correct(name: str, value: Tensor) -> Tensor:
        if name in biased:
            shift = shifts[biased[name]] = wanted[name] - _channel_means(value)
            value = value + shift.view(1, -1, *(1,) * (value.dim() - 2))
        return fake_quantize(value, quantized.tensors.get(name))

    run(quantized.graph, x, constants, correct)
    return shifts
