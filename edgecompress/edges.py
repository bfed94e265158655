"""Operators without weights between a network's layers: what they are and whose channels they carry, for latency."""

from __future__ import annotations

from collections.abc import Mapping

from edgecompress.graph import Graph, Node
from edgecompress.spec import ChannelTerm, EdgeKind, EdgeSpec, LayerSpec, Network

KINDS: Mapping[str, EdgeKind] = {
    "Add": "add", "Sub": "add", "Mul": "multiply", "Div": "multiply", "Concat": "concat", "MaxPool": "max_pool",
    "AveragePool": "average_pool", "GlobalAveragePool": "global_pool", "Sigmoid": "sigmoid",
    "HardSigmoid": "hard_sigmoid", "HardSwish": "hard_swish", "LeakyRelu": "leaky_relu", "Softmax": "softmax",
}  # fmt: skip

Terms = dict[str, int]


def with_edges(network: Network, graph: Graph) -> Network:
    """``network`` with the `EdgeSpec` of every operator of ``graph`` that a runtime runs beside the layers.

    Channels are followed from each layer's output through the operators behind it. What no kind here covers (a channel
    shuffle, say) costs time too; a table's correction by whole networks then carries it.
    """
    layers = {layer.name: layer for layer in network.layers}
    carried: dict[str, Terms] = {graph.inputs[0]: {}}
    found = [_end("input", graph.inputs[0], graph)]
    for node in graph.nodes:
        terms = _terms(node, graph, layers, carried)
        carried |= dict.fromkeys(node.outputs, terms)
        kind = KINDS.get(node.op)
        shape = graph.shapes.get(node.outputs[0], ())
        if kind is None or not shape or min(shape) < 1:
            continue
        source = graph.shapes.get(node.inputs[0], shape)
        kernel, stride = node.attributes.get("kernel_shape", (1, 1)), node.attributes.get("strides", (1, 1))
        edge = EdgeSpec(
            name=node.name or node.outputs[0], kind=kind, channels=shape[0], kernel=(int(kernel[0]), int(kernel[1])),
            stride=(int(stride[0]), int(stride[1])), input_hw=_extent(source), output_hw=_extent(shape),
            terms=_listed(terms),
        )  # fmt: skip
        found.append(edge)
    last = _end("output", graph.outputs[0], graph)
    found.append(last.model_copy(update={"terms": _listed(carried.get(graph.outputs[0], {}))}))
    return network.model_copy(update={"edges": tuple(found)})


def _terms(node: Node, graph: Graph, layers: Mapping[str, LayerSpec], carried: Mapping[str, Terms]) -> Terms:
    """Channels of each group in what ``node`` writes."""
    layer = layers.get(node.name)
    if layer is not None:
        return {term.group: term.per_channel for term in layer.out_terms}
    read = [(name, carried[name]) for name in node.inputs if name in carried]
    if node.op == "Concat":
        total: Terms = {}
        for _, terms in read:
            for group, per_channel in terms.items():
                total[group] = total.get(group, 0) + per_channel
        return total
    # Elementwise operators broadcast: the widest operand decides (squeeze-and-excitation scales a map by a vector).
    name, terms = max(read, key=lambda pair: _elements(graph.shapes.get(pair[0], ())), default=("", {}))
    if node.op == "Flatten":
        height, width = _extent(graph.shapes.get(name, ()))
        return {group: per_channel * height * width for group, per_channel in terms.items()}
    return terms


def _end(kind: EdgeKind, value: str, graph: Graph) -> EdgeSpec:
    shape = graph.shapes[value]
    return EdgeSpec(name=kind, kind=kind, channels=shape[0], input_hw=_extent(shape), output_hw=_extent(shape))


def _listed(terms: Terms) -> tuple[ChannelTerm, ...]:
    return tuple(ChannelTerm(group=group, per_channel=count) for group, count in terms.items())


def _extent(shape: tuple[int, ...]) -> tuple[int, int]:
    return (int(shape[1]), int(shape[2])) if len(shape) == 3 else (1, 1)


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
