"""Run the internal graph in torch: one function per ONNX operator, one walk. Differentiable where torch is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgecompress.errors import BadModelError
from edgecompress.graph import Graph, Node

Arguments = list[Tensor | None]


def conv_padding(node: Node) -> tuple[int, int, int, int]:
    """ONNX pads of a 2-D window as torch orders them: left, right, top, bottom."""
    top, left, bottom, right = (int(pad) for pad in node.attributes.get("pads", (0, 0, 0, 0)))
    return left, right, top, bottom


def _conv(node: Node, args: Arguments) -> Tensor:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    assert x is not None and weight is not None
    left, right, top, bottom = conv_padding(node)
    padding = (top, left)
    if (left, top) != (right, bottom):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    stride = tuple(node.attributes.get("strides", (1, 1)))
    dilation = tuple(node.attributes.get("dilations", (1, 1)))
    trained = weight.requires_grad and torch.is_grad_enabled()
    if (
        trained and stride != (1, 1) and weight.shape[2:] == (1, 1) and padding == (0, 0)
    ):  # the same, but safe: see `layouts`
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    return F.conv2d(x, weight, bias, stride, padding, dilation, int(node.attributes.get("group", 1)))


def _gemm(node: Node, args: Arguments) -> Tensor:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    assert x is not None and weight is not None
    return F.linear(x, weight if node.attributes.get("transB", 0) else weight.t(), bias)


def _max_pool(node: Node, args: Arguments) -> Tensor:
    left, right, top, bottom = conv_padding(node)
    x = args[0]
    assert x is not None
    if (left, top) != (right, bottom):
        x = F.pad(x, (left, right, top, bottom), value=float("-inf"))
        left = top = 0
    kernel, stride = tuple(node.attributes["kernel_shape"]), tuple(node.attributes.get("strides", (1, 1)))
    return F.max_pool2d(x, kernel, stride, (top, left), ceil_mode=bool(node.attributes.get("ceil_mode", 0)))


def _average_pool(node: Node, args: Arguments) -> Tensor:
    left, _, top, _ = conv_padding(node)
    return F.avg_pool2d(
        _one(args),
        tuple(node.attributes["kernel_shape"]),
        tuple(node.attributes.get("strides", (1, 1))),
        (top, left),
        ceil_mode=bool(node.attributes.get("ceil_mode", 0)),
        count_include_pad=bool(node.attributes.get("count_include_pad", 0)),
    )


def _batch_norm(node: Node, args: Arguments) -> Tensor:
    x, gamma, beta, mean, variance = args
    assert x is not None and mean is not None
    return F.batch_norm(x, mean, variance, gamma, beta, False, 0.0, float(node.attributes.get("epsilon", 1e-5)))


def _clip(node: Node, args: Arguments) -> Tensor:
    low = args[1] if len(args) > 1 else None
    high = args[2] if len(args) > 2 else None
    return torch.clamp(_one(args), None if low is None else float(low), None if high is None else float(high))


def _reduce_mean(node: Node, args: Arguments) -> Tensor:
    axes = tuple(node.attributes.get("axes", (0,)))  # without axes it is over all of them
    if 0 in axes:
        raise BadModelError(
            f"The ReduceMean at '{node.name}' is over the batch, or over axes that are not constant. "
            "Name its axes, without the first."
        )
    return _one(args).mean(axes, keepdim=bool(node.attributes.get("keepdims", 1)))


def _reshape(node: Node, args: Arguments) -> Tensor:
    x, shape = args[0], args[1]
    assert x is not None and shape is not None
    sizes = [int(size) for size in shape]
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(sizes)])


def _slice(node: Node, args: Arguments) -> Tensor:
    x = _one(args)
    starts, ends, axes = ([int(number) for number in part] for part in args[1:4] if part is not None)
    for start, end, axis in zip(starts, ends, axes, strict=True):
        x = x[(slice(None),) * (axis % x.dim()) + (slice(start, end),)]
    return x


def _one(args: Arguments) -> Tensor:
    assert args[0] is not None
    return args[0]


def _pair(args: Arguments) -> tuple[Tensor, Tensor]:
    assert args[0] is not None and args[1] is not None
    return args[0], args[1]


OPERATORS: dict[str, Callable[[Node, Arguments], Tensor]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "Relu": lambda node, args: F.relu(_one(args)),
    "Clip": _clip,
    "Add": lambda node, args: torch.add(*_pair(args)),
    "Sub": lambda node, args: torch.sub(*_pair(args)),
    "Mul": lambda node, args: torch.mul(*_pair(args)),
    "Div": lambda node, args: torch.div(*_pair(args)),
    "Sigmoid": lambda node, args: torch.sigmoid(_one(args)),
    "HardSigmoid": lambda node, args: torch.clamp(
        _one(args) * float(node.attributes.get("alpha", 0.2)) + float(node.attributes.get("beta", 0.5)), 0, 1
    ),
    "Softmax": lambda node, args: F.softmax(_one(args), int(node.attributes.get("axis", -1))),
    "LeakyRelu": lambda node, args: F.leaky_relu(_one(args), float(node.attributes.get("alpha", 0.01))),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda node, args: _one(args).mean((2, 3), keepdim=True),
    "BatchNormalization": _batch_norm,
    "ReduceMean": _reduce_mean,
    "Flatten": lambda node, args: _one(args).flatten(int(node.attributes.get("axis", 1))),
    "Reshape": _reshape,
    "Transpose": lambda node, args: _one(args).permute(tuple(node.attributes["perm"])),
    "Concat": lambda node, args: torch.cat([a for a in args if a is not None], int(node.attributes["axis"])),
    "Slice": _slice,
    "Identity": lambda node, args: _one(args),
}


def run(
    graph: Graph,
    x: Tensor,
    constants: Mapping[str, Tensor],
    on_value: Callable[[str, Tensor], Tensor] = lambda name, value: value,
) -> Tensor:
    """Evaluate ``graph`` on ``x [N, C, H, W]``.

    Args:
        constants: tensors for the graph's constants, for example fake-quantised weights.
        on_value: sees every computed value (and the input) and returns what its consumers will read.

    Raises:
        BadModelError: the graph has an operator that is not in `OPERATORS`.
    """
    values: dict[str, Tensor] = {graph.inputs[0]: on_value(graph.inputs[0], x)}
    last = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    for index, node in enumerate(graph.nodes):
        arguments = [values.get(name, constants.get(name)) if name else None for name in node.inputs]
        values[node.outputs[0]] = on_value(node.outputs[0], apply(node, arguments))
        del arguments
        for name in node.inputs:  # memory that is used again is still in the cache
            if last[name] == index and name not in graph.outputs:
                values.pop(name, None)
    return values[graph.outputs[0]]


def apply(node: Node, arguments: Arguments) -> Tensor:
    """Evaluate one operator."""
    if node.op not in OPERATORS or len(node.outputs) != 1:
        raise BadModelError(
            f"The operator {node.op} at '{node.name}' is not one that can be quantised yet. Known: {', '.join(OPERATORS)}."
        )
    return OPERATORS[node.op](node, arguments)


def float_constants(graph: Graph) -> dict[str, Tensor]:
    """The graph's constants as torch tensors."""
    return {name: torch.from_numpy(_writable(value)) for name, value in graph.constants.items()}


def _writable(value: Any) -> Any:
    return value if value.flags.writeable else value.copy()
