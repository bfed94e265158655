"""A graph described as a network: layers for cost and search, and a module around it that can teach and be evaluated."""

from __future__ import annotations

from torch import Tensor, nn

from edgecompress.graph import Graph, Node, build_graph
from edgecompress.interpret import float_constants, run
from edgecompress.spec import Kind, LayerSpec, Network
from edgecompress.trace import Traced, fingerprint, trace


class GraphModule(nn.Module):
    """A graph as a network that maps ``[N, C, H, W]`` to its output. Its weights are buffers: it is not trained."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self._buffer_of: dict[str, str] = {}
        for name, value in float_constants(graph).items():
            self._buffer_of[name] = f"{len(self._buffer_of)}_{name.replace('.', '_')}"
            self.register_buffer(self._buffer_of[name], value)

    def forward(self, x: Tensor) -> Tensor:
        buffers = dict(self.named_buffers())
        return run(self.graph, x, {name: buffers[key] for name, key in self._buffer_of.items()})


def traced_of(model: nn.Module, input_shape: tuple[int, ...], name: str) -> Traced:
    """Layers and channel groups of a network; a graph has no groups, because nothing in it may be cut.

    Raises:
        BadModelError: see `trace.trace`.
    """
    if isinstance(model, GraphModule):
        return Traced(network_of(model.graph, f"{name}-{fingerprint(model)}"), ())
    return trace(model, input_shape, name)


def graph_of(model: nn.Module, input_shape: tuple[int, ...], name: str) -> Graph:
    """The graph of a network.

    Raises:
        BadModelError: see `graph.build_graph`.
    """
    return model.graph if isinstance(model, GraphModule) else build_graph(model, input_shape, name)


def network_of(graph: Graph, name: str) -> Network:
    """The layers of ``graph`` in execution order, without channel groups."""
    layers = tuple(_layer(node, graph) for node in graph.layers)
    own = {constant for node in graph.layers for constant in node.inputs[1:]}
    others = sum(
        value.size
        for key, value in graph.constants.items()
        if key not in own and value.dtype.kind == "f" and value.ndim
    )
    return Network(model=name, input_shape=graph.shapes[graph.inputs[0]], layers=layers, groups=(), fixed_params=others)


def _layer(node: Node, graph: Graph) -> LayerSpec:
    weight = graph.constants[node.inputs[1]]
    params = sum(int(graph.constants[name].size) for name in node.inputs[1:] if name in graph.constants)
    if node.op == "Gemm":
        outputs, inputs = weight.shape if node.attributes.get("transB", 0) else weight.shape[::-1]
        return LayerSpec(
            name=node.name,
            kind="linear",
            in_channels=inputs,
            out_channels=outputs,
            macs=inputs * outputs,
            params=params,
        )
    groups = int(node.attributes.get("group", 1))
    outputs, inputs = weight.shape[0], weight.shape[1] * groups
    kind: Kind = "conv" if groups == 1 else "depthwise" if groups == inputs else "grouped"
    kernel, output_hw = _pair(weight.shape[2:]), _pair(graph.shapes[node.outputs[0]][1:])
    return LayerSpec(
        name=node.name, kind=kind, in_channels=inputs, out_channels=outputs, kernel=kernel,
        stride=_pair(node.attributes.get("strides", (1, 1))), groups=groups,
        input_hw=_pair(graph.shapes[node.inputs[0]][1:]), output_hw=output_hw,
        macs=int(weight.size) * output_hw[0] * output_hw[1], params=params,
    )  # fmt: skip


def _pair(sizes: object) -> tuple[int, int]:
    height, width = (int(size) for size in sizes)  # type: ignore[attr-defined]
    return height, width
