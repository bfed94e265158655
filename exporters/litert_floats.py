"""Operators of a LiteRT file that compute in float, because LiteRT has no integers for them or the policy keeps floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgecompress.exporters.litert_draft import (
    Draft,
    channels_last,
    depthwise_layout,
    is_depthwise,
    laid,
    last_layout,
    stride_options,
)
from edgecompress.exporters.litert_writing import Written
from edgecompress.graph import Node


def _floats_of(draft: Draft, name: str, rank: int) -> Written:
    """A value or a constant as floats, channels last."""
    if name in draft.graph.constants:
        data = np.asarray(draft.graph.constants[name], np.float32)
        data = data.reshape((1,) * (rank - data.ndim) + data.shape)
        return draft.file.constant(name, np.ascontiguousarray(data.transpose(channels_last(rank))))
    if name not in draft.values.floats:
        draft.values.floats[name] = draft.dequantize(draft.values.integers[name], f"{name}.float")
    return draft.values.floats[name]


def float_operator(draft: Draft, operator: str, inputs: Sequence[Written], name: str, **options: Any) -> Written:
    return draft.file.operator(operator, inputs, draft.file.value(name, laid(draft.shape(name))), **options)


def _layer(draft: Draft, node: Node) -> Written:
    weight = np.asarray(draft.graph.constants[node.inputs[1]], np.float32)
    shift = np.zeros(len(weight), np.float32)
    if len(node.inputs) > 2 and node.inputs[2]:
        shift = np.asarray(draft.graph.constants[node.inputs[2]], np.float32)
    x, bias = _floats_of(draft, node.inputs[0], weight.ndim), draft.file.constant(f"{node.name}.bias", shift)
    result, options = node.outputs[0], {"fusedActivationFunction": 0}
    if node.op == "Gemm":
        weight = draft.columns(weight if node.attributes.get("transB", 0) else weight.T, node.inputs[0])
        kernel = draft.file.constant(f"{node.name}.weight", np.ascontiguousarray(weight))
        return float_operator(draft, "FULLY_CONNECTED", [x, kernel, bias], result, **options)
    x, padding = draft.windows(x, node, weight.shape[2:], node.inputs[0])
    options |= stride_options(node) | {"padding": padding}
    if is_depthwise(node, weight):
        options["depthMultiplier"] = len(weight) // int(node.attributes.get("group", 1))
        kernel = draft.file.constant(f"{node.name}.weight", depthwise_layout(weight))
        return float_operator(draft, "DEPTHWISE_CONV_2D", [x, kernel, bias], result, **options)
    kernel = draft.file.constant(f"{node.name}.weight", last_layout(weight))
    return float_operator(draft, "CONV_2D", [x, kernel, bias], result, **options)


def _arithmetic(draft: Draft, node: Node) -> Written:
    rank = len(draft.shape(node.outputs[0]))
    inputs = [_floats_of(draft, name, rank) for name in node.inputs]
    if any(len(given.shape) != rank for given in inputs):
        raise draft.refuse(node, "of operands with different numbers of dimensions", "Reshape them in the network.")
    return float_operator(draft, node.op.upper(), inputs, node.outputs[0], fusedActivationFunction=0)


def _softmax(draft: Draft, node: Node) -> Written:
    x = _floats_of(draft, node.inputs[0], 0)
    rank = len(x.shape)
    if channels_last(rank)[-1] != int(node.attributes.get("axis", -1)) % rank:
        raise draft.refuse(node, "over other axes than the channels", "Leave it to your program.")
    return float_operator(draft, "SOFTMAX", [x], node.outputs[0], beta=1.0)


def _hard_sigmoid(draft: Draft, node: Node) -> Written:
    result, x = node.outputs[0], _floats_of(draft, node.inputs[0], 0)
    alpha, beta = float(node.attributes.get("alpha", 0.2)), float(node.attributes.get("beta", 0.5))
    for operator, number in (("MUL", alpha), ("ADD", beta)):
        factor = draft.file.constant(f"{result}.{operator}", np.full((1,) * len(x.shape), number, np.float32))
        x = float_operator(draft, operator, [x, factor], result, fusedActivationFunction=0)
    return float_operator(draft, "RELU_0_TO_1", [x], result)


def _leaky_relu(draft: Draft, node: Node) -> Written:
    alpha = float(node.attributes.get("alpha", 0.01))
    return float_operator(draft, "LEAKY_RELU", [_floats_of(draft, node.inputs[0], 0)], node.outputs[0], alpha=alpha)


def _unary(draft: Draft, node: Node) -> Written:
    operator = {"Sigmoid": "LOGISTIC", "Relu": "RELU"}[node.op]
    return float_operator(draft, operator, [_floats_of(draft, node.inputs[0], 0)], node.outputs[0])


FLOAT_OPERATORS: dict[str, Callable[[Draft, Node], Written]] = {
    "Conv": _layer,
    "Gemm": _layer,
    "Add": _arithmetic,
    "Sub": _arithmetic,
    "Mul": _arithmetic,
    "Div": _arithmetic,
    "Softmax": _softmax,
    "HardSigmoid": _hard_sigmoid,
    "LeakyRelu": _leaky_relu,
    "Sigmoid": _unary,
    "Relu": _unary,
}
