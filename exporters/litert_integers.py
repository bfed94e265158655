"""The integer operators of a LiteRT file. Each writes one operator of the graph and says whether it has such a form.

Weights are s8 per output channel, biases s32. Weights of at most 4 bits are INT4 where that costs no time: XNNPACK, which runs
these files on CPUs, takes INT4 in FULLY_CONNECTED, and a 1x1 convolution is one. Larger kernels stay int8 unless asked, since
XNNPACK leaves INT4 convolutions to slower kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edgecompress.exporters.litert_draft import (
    RELU,
    Draft,
    channels_last,
    depthwise_layout,
    final_grid,
    is_depthwise,
    laid,
    last_layout,
    lower_grid,
    pair,
    stride_options,
)
from edgecompress.exporters.litert_writing import Array, Grid, Written
from edgecompress.exporters.to_onnxruntime import gate_steps, grid, int32_bias
from edgecompress.graph import Node
from edgecompress.quantize import QuantizedWeight, clip_limit

FOUR_BITS = 4


def _conv(draft: Draft, node: Node, result: str) -> bool:
    weight, source = draft.quantized.weights.get(node.name), node.inputs[0]
    if weight is None or len(draft.shape(source)) != 4:
        return False
    values, scale = weight.values, weight.scale
    x, padding = draft.windows(draft.values.integers[source], node, values.shape[2:], source)
    options = stride_options(node) | {"padding": padding, "fusedActivationFunction": 0}
    bias = _bias(draft, node, len(values))
    groups = int(node.attributes.get("group", 1))
    if _is_pointwise(node, values) and _in_four_bits(draft, weight, result):
        kernel = draft.file.weight(f"{node.name}.weight", values[:, :, 0, 0], scale, 0, four_bits=True)
        return draft.operator(
            "FULLY_CONNECTED", [x, kernel, bias], node, result, 10, keepNumDims=True, fusedActivationFunction=0
        )
    small = weight.bits <= FOUR_BITS and draft.interface.int4 == "always"
    if small:
        draft.rounded_twice.add(result)
    if is_depthwise(node, values):
        options["depthMultiplier"] = len(values) // groups
        kernel = draft.file.weight(f"{node.name}.weight", depthwise_layout(values), scale, 3, four_bits=small)
        return draft.operator("DEPTHWISE_CONV_2D", [x, kernel, bias], node, result, 7 if small else 3, **options)
    kernel = draft.file.weight(f"{node.name}.weight", last_layout(values), scale, 0, four_bits=small)
    version = 7 if small else 6 if groups > 1 else 3
    return draft.operator("CONV_2D", [x, kernel, bias], node, result, version, **options)


def _gemm(draft: Draft, node: Node, result: str) -> bool:
    weight = draft.quantized.weights.get(node.name)
    if weight is None or not node.attributes.get("transB", 0):
        return False
    wide = result not in draft.quantized.tensors
    small = not wide and _in_four_bits(draft, weight, result)
    kernel = draft.file.weight(
        f"{node.name}.weight", draft.columns(weight.values, node.inputs[0]), weight.scale, 0, four_bits=small
    )
    x, bias = draft.values.integers[node.inputs[0]], _bias(draft, node, len(weight.values), wide=wide)
    x = draft.wide(x, node.name) if wide else x
    version = 7 if wide else 10 if small else 4
    return draft.operator("FULLY_CONNECTED", [x, kernel, bias], node, result, version, fusedActivationFunction=0)


def _in_four_bits(draft: Draft, weight: QuantizedWeight, result: str) -> bool:
    """Whether a linear layer is stored as INT4: XNNPACK takes it as fast as int8 where its inputs are even in number."""
    how = draft.interface.int4
    even = weight.values.shape[1] % 2 == 0
    taken = weight.bits <= FOUR_BITS and (how == "always" or (how == "fast" and even))
    if taken and not even:
        draft.rounded_twice.add(result)
    return taken


def _bias(draft: Draft, node: Node, channels: int, *, wide: bool = False) -> Written:
    weight = draft.quantized.weights[node.name]
    scale_x = float(grid(draft.quantized, node.inputs[0])[0])
    bias = np.zeros(channels, np.int32)
    if len(node.inputs) > 2 and node.inputs[2]:
        bias = int32_bias(draft.graph.constants[node.inputs[2]], scale_x, weight.scale)
    steps = np.float32(scale_x) * weight.scale
    return draft.file.bias(f"{node.name}.bias", bias.astype(np.int64) if wide else bias, np.atleast_1d(steps))


def _max_pool(draft: Draft, node: Node, result: str) -> bool:
    kernel = tuple(map(int, node.attributes["kernel_shape"]))
    if set(pair(node, "dilations")) != {1}:
        return False
    x, padding = draft.windows(draft.values.integers[node.inputs[0]], node, kernel, node.name, lowest=True)
    output = draft.file.value(result, laid(draft.shape(result)), x.grid)
    height, width = pair(node, "strides")
    options = {"strideH": height, "strideW": width, "filterHeight": kernel[0], "filterWidth": kernel[1]}
    options |= {"padding": padding, "fusedActivationFunction": 0}
    draft.values.integers[result] = draft.file.operator("MAX_POOL_2D", [x], output, 2, **options)
    return True


def _average_pool(draft: Draft, node: Node, result: str) -> bool:
    """A depthwise convolution of ones: AVERAGE_POOL_2D keeps its input's step, so that it would round twice."""
    kernel, pads = tuple(map(int, node.attributes["kernel_shape"])), node.attributes.get("pads", (0,))
    if result not in draft.quantized.tensors or (any(pads) and not node.attributes.get("count_include_pad", 0)):
        return False
    source = draft.values.integers[node.inputs[0]]
    strides, channels = pair(node, "strides"), source.shape[3]
    top, left, bottom, right = (*map(int, pads),) if len(pads) == 4 else (0, 0, 0, 0)
    sizes = (source.shape[1] + top + bottom, source.shape[2] + left + right)
    whole = [(size - k) // s + 1 for size, k, s in zip(sizes, kernel, strides, strict=True)]
    if whole != list(draft.shape(result)[2:]):
        return False  # windows beyond the edge, which average fewer pixels
    x, padding = draft.windows(source, node, kernel, node.name)
    assert x.grid is not None
    scale = np.array([1 / math.prod(kernel)], np.float32)
    ones = draft.file.weight(f"{node.name}.ones", np.ones((1, *kernel, channels), np.int8), scale, 3)
    zeros = draft.file.bias(f"{node.name}.zeros", np.zeros(channels, np.int32), scale * np.float32(x.grid.scale))
    options = stride_options(node) | {"padding": padding, "depthMultiplier": 1, "fusedActivationFunction": 0}
    return draft.operator("DEPTHWISE_CONV_2D", [x, ones, zeros], node, result, 3, **options)


def _global_pool(draft: Draft, node: Node, result: str) -> bool:
    x, wide = draft.values.integers[node.inputs[0]], result not in draft.quantized.tensors
    x = draft.wide(x, node.name) if wide else x
    axes = draft.file.constant(f"{node.name}.axes", np.array([1, 2], np.int32))
    if not wide:
        return draft.operator("MEAN", [x, axes], node, result, 2, keepDims=True)
    output = draft.file.value(f"{result}.integers", laid(draft.shape(result)), draft.scores)
    draft.values.integers[result] = draft.file.operator("MEAN", [x, axes], output, 3, keepDims=True)
    return True


def _arithmetic(draft: Draft, node: Node, result: str) -> bool:
    """ADD, SUB, MUL of two values with as many dimensions."""
    first, second = (draft.values.integers[name] for name in node.inputs)
    how = draft.quantized.tensors.get(result)
    if how is None or len(first.shape) != len(second.shape):
        return False
    assert first.grid is not None and second.grid is not None
    grows = node.op == "Mul" and first.grid.scale * second.grid.scale >= how.scale
    version = 3 if grows else 2
    return draft.operator(node.op.upper(), [first, second], node, result, version, fusedActivationFunction=0)


def gate(draft: Draft, node: Node) -> None:
    """HardSigmoid as ``(x + reach)`` clipped to [0, 2 reach] by saturation and ReLU, then the same integers as [0, 1]."""
    value, x = node.outputs[0], draft.values.integers[node.inputs[0]]
    steps = gate_steps(draft.quantized, node)
    assert x.grid is not None
    raised, one = Grid(x.grid.scale, 127 - 2 * steps), float(grid(draft.quantized, value)[0])
    reach = draft.file.constant(f"{value}.reach", np.full((1,) * len(x.shape), steps, np.int8), Grid(x.grid.scale))
    output = draft.file.value(f"{value}.raised", x.shape, raised)
    gate = draft.file.operator("ADD", [x, reach], output, 2, fusedActivationFunction=RELU)
    step = draft.file.constant(
        f"{value}.step", np.ones((1,) * len(x.shape), np.int8), Grid(float(np.float32(one / x.grid.scale)))
    )
    output = draft.file.value(value, x.shape, Grid(one, raised.zero))
    draft.values.integers[value] = draft.file.operator("MUL", [gate, step], output, 3, fusedActivationFunction=0)


def _sigmoid(draft: Draft, node: Node, result: str) -> bool:
    """LOGISTIC has a grid of its own, 1/256, and leaves it for the network's: two roundings, seldom a step apart from one."""
    how = draft.quantized.tensors.get(result)
    if how is None:
        return False
    x = draft.values.integers[node.inputs[0]]
    output = draft.file.value(f"{result}.logistic", x.shape, Grid(1 / 256, -128))
    held = draft.file.operator("LOGISTIC", [x], output, 2)
    draft.values.integers[result] = draft.clipped(draft.on(held, lower_grid(how), result), final_grid(how), result)
    return True


def _leaky_relu(draft: Draft, node: Node, result: str) -> bool:
    if result not in draft.quantized.tensors:
        return False
    alpha = float(node.attributes.get("alpha", 0.01))
    return draft.operator("LEAKY_RELU", [draft.values.integers[node.inputs[0]]], node, result, 2, alpha=alpha)


def _saturated(draft: Draft, node: Node, result: str) -> bool:
    """A ReLU or ReLU6 that nothing absorbs: another grid, whose ends are the clip."""
    how = draft.quantized.tensors.get(result)
    if how is None or how.signed or (node.op == "Clip" and clip_limit(draft.graph, node) is None):
        return False
    held = draft.on(draft.values.integers[node.inputs[0]], lower_grid(how), result)
    draft.values.integers[result] = draft.clipped(held, final_grid(how), result)
    return True


def _concat(draft: Draft, node: Node, result: str) -> bool:
    how = draft.quantized.tensors.get(result)
    if how is None:
        return False
    first = lower_grid(how) if how.signed else final_grid(how)  # what is joined without a sign has none below zero
    parts = [draft.on(draft.values.integers[name], first, f"{result}.{name}") for name in node.inputs]
    rank = len(parts[0].shape)
    axis = channels_last(rank).index(int(node.attributes["axis"]) % rank)
    output = draft.file.value(result, laid(draft.shape(result)), first)
    joined = draft.file.operator("CONCATENATION", parts, output, 2, axis=axis, fusedActivationFunction=0)
    draft.values.integers[result] = draft.clipped(joined, final_grid(how), result)
    return True


def _flatten(draft: Draft, node: Node, result: str) -> bool:
    source, readers = node.inputs[0], draft.graph.consumers(result)
    natural, held = draft.shape(source), draft.values.integers[source]
    if int(node.attributes.get("axis", 1)) != 1:
        return False
    layers = readers and result not in draft.graph.outputs and all(reader.op == "Gemm" for reader in readers)
    if math.prod(natural[2:]) > 1:  # single pixels have one order only
        if len(natural) == 4 and layers:
            draft.values.flat[result] = (natural[1], natural[2], natural[3])
        else:
            held = draft.natural(held, natural, source)
    draft.values.integers[result] = draft.reshaped(held, draft.shape(result), result)
    return True


def _reshape(draft: Draft, node: Node, result: str) -> bool:
    source, target = draft.shape(node.inputs[0]), draft.shape(result)
    held = draft.values.integers[node.inputs[0]]
    if math.prod(source) != math.prod(target):
        return False
    if len(source) > 3 and len(target) > 3 and source[-2:] == target[-2:]:  # channels into groups, or back
        draft.values.integers[result] = draft.reshaped(held, laid(target), result)
        return True
    held = draft.reshaped(draft.natural(held, source, node.inputs[0]), target, result)
    draft.values.integers[result] = draft.moved(held, channels_last(len(target)), result)
    return True


def _transpose(draft: Draft, node: Node, result: str) -> bool:
    axes = [int(axis) for axis in node.attributes["perm"]]
    before = channels_last(len(axes))
    order = [before.index(axes[axis]) for axis in channels_last(len(axes))]
    draft.values.integers[result] = draft.moved(draft.values.integers[node.inputs[0]], order, result)
    return True


def _slice(draft: Draft, node: Node, result: str) -> bool:
    held = draft.values.integers[node.inputs[0]]
    starts, _, axes = (draft.graph.constants[name].ravel() for name in node.inputs[1:4])
    rank, shape = len(held.shape), laid(draft.shape(result))
    begin = [0] * rank
    for start, axis in zip(starts, axes, strict=True):
        place = channels_last(rank).index(int(axis) % rank)
        begin[place] = int(start) % held.shape[place] if start < 0 else int(start)
    places = [
        draft.file.constant(f"{result}.{what}", np.array(numbers, np.int32))
        for what, numbers in (("begin", begin), ("size", shape))
    ]
    output = draft.file.value(result, shape, held.grid)
    draft.values.integers[result] = draft.file.operator("SLICE", [held, *places], output, 5 if rank > 4 else 2)
    return True


def _identity(draft: Draft, node: Node, result: str) -> bool:
    draft.values.integers[result] = draft.values.integers[node.inputs[0]]
    return True


def _is_pointwise(node: Node, weight: Array) -> bool:
    """A 1x1 convolution that is a linear layer at every pixel."""
    moves = (*pair(node, "strides"), *weight.shape[2:], int(node.attributes.get("group", 1)))
    return set(moves) == {1} and not any(node.attributes.get("pads", ()))


WITH_CONSTANTS = ("Reshape", "Slice", "Clip")  # whose further inputs are sizes and limits
OPERATORS: dict[str, Callable[[Draft, Node, str], bool]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool,
    "Add": _arithmetic,
    "Sub": _arithmetic,
    "Mul": _arithmetic,
    "Sigmoid": _sigmoid,
    "LeakyRelu": _leaky_relu,
    "Relu": _saturated,
    "Clip": _saturated,
    "Concat": _concat,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Slice": _slice,
    "Identity": _identity,
}
