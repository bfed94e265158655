"""A LiteRT (TensorFlow Lite) file of integers at the network's own steps, written without a converter.

Activations are s8 and lie channels last; weights are s8 per output channel, biases s32. A u8 value with zero point 0 has
-128 here, one with 128 has 0. Fewer activation bits cost little: the zero point moves so that the largest integer is 127
and saturation is the upper clip, and a fused ReLU the lower one; signed values take one QUANTIZE more.

Weights of at most 4 bits are INT4 where that costs no time: XNNPACK, which runs these files on CPUs, takes INT4 in
FULLY_CONNECTED, and a 1x1 convolution is one. Larger kernels stay int8 unless asked, since XNNPACK leaves INT4
convolutions to slower kernels.

The scores are what no 8 bits may decide: the last layer runs on s16 inputs (exact, the same step) and gives s16 scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgecompress.errors import UsageError
from edgecompress.exporters.interface import PLAIN, PROPERTY, Interface
from edgecompress.exporters.litert_writing import Array, Grid, LiteRtFile, Written
from edgecompress.exporters.to_onnxruntime import gate_of, gate_steps, grid, int32_bias
from edgecompress.graph import LAYER_OPS, Graph, Node
from edgecompress.quantize import QuantizedGraph, QuantizedWeight, TensorRange, clip_limit, is_fused_activation
from edgecompress.spec import Preprocessing

SAME, VALID = 0, 1  # the schema's Padding
RELU, RELU6 = 1, 3  # the schema's ActivationFunctionType
FOUR_BITS = 4
CHANNELS_LAST = {4: (0, 2, 3, 1), 5: (0, 3, 4, 1, 2)}  # 5 dimensions: channels in groups, as a channel shuffle has them
PIXEL_STEPS = 127  # a factor per channel, as the largest s8 weight


@dataclass(frozen=True)
class Held:
    """Where the file holds a value: the number of its tensor, its zero point, and how it lies there."""

    number: int
    zero: int
    natural: tuple[int, ...]
    flat: tuple[int, int, int] | None = None

    def in_natural_order(self, integers: Array) -> Array:
        """The tensor's integers without the zero point, in the graph's own order of dimensions."""
        values = integers.astype(np.int32) - self.zero
        if self.flat is not None:
            c, h, w = self.flat
            return values.reshape(-1, h, w, c).transpose(0, 3, 1, 2).reshape(self.natural)
        order = channels_last(len(self.natural))
        return values.transpose([order.index(axis) for axis in range(len(order))])


@dataclass(frozen=True)
class LiteRtModel:
    """A file with what is known of it.

    ``floats``: operators of the network that compute in float. ``step``: of the scores' integers, 0 where they are floats.
    ``int4``: layers whose weights are stored so. ``values``: the tensor of each quantised value of the graph.
    ``rounded_twice``: values of INT4 layers that XNNPACK leaves to LiteRT's own kernels.
    """

    data: bytes
    inputs: Mapping[str, list[int | str]]
    outputs: Mapping[str, list[int | str]]
    floats: Sequence[str]
    step: float
    int4: int
    values: Mapping[str, Held]
    rounded_twice: frozenset[str] = frozenset()


@dataclass
class _Values:
    """What the file holds of each value of the graph; 4 and 5 dimensions lie channels last."""

    integers: dict[str, Written] = field(default_factory=dict)
    floats: dict[str, Written] = field(default_factory=dict)
    flat: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # channels last when flattened: its C, H, W


def integer_model(
    quantized: QuantizedGraph,
    *,
    largest_score: float,
    interface: Interface = PLAIN,
    preprocessing: Preprocessing | None = None,
    metadata: Mapping[str, str] | None = None,
) -> LiteRtModel:
    """Write the integer graph for LiteRT.

    Args:
        largest_score: the largest absolute output seen; scores have 16 bits up to twice that.
        interface: batch (1 by default), layout, pixels, head, ``allow_float`` and ``int4``; see `Interface`.
        preprocessing: needed where the file takes pixels.

    Raises:
        UsageError: an operator has no integer form in LiteRT and ``allow_float`` is not given, or has none at all.
        MissingBackendError: LiteRT, whose schema is needed, is not installed.
    """
    return _Writer(quantized, largest_score, interface).write(preprocessing, metadata or {})


def final_grid(how: TensorRange) -> Grid:
    """Where a value lies once it is clipped: its largest integer is 127."""
    return Grid(how.scale, 127 - how.limits[1])


def lower_grid(how: TensorRange) -> Grid:
    """Where its smallest integer is -128; the same as `final_grid` at 8 bits."""
    return Grid(how.scale, -128 - how.limits[0])


def channels_last(rank: int) -> tuple[int, ...]:
    """The natural (ONNX) axis at each position of the file's tensors."""
    return CHANNELS_LAST.get(rank, tuple(range(rank)))


def laid(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` in the order of the file."""
    return tuple(shape[axis] for axis in channels_last(len(shape)))


def oldest_runtime(model: LiteRtModel) -> str:
    """The oldest runtime that was seen to run files like ``model``."""
    return "LiteRT 1.2.0" if model.int4 else "TensorFlow Lite 2.14.0"


class _Writer:
    def __init__(self, quantized: QuantizedGraph, largest_score: float, interface: Interface) -> None:
        self.quantized, self.interface = quantized, interface
        self.graph: Graph = quantized.graph
        self.file = LiteRtFile(named=not interface.bare)
        self.batch = interface.batch_or(1) or 1
        self.scores = Grid(float(np.float32(2 * max(largest_score, 1e-6) / 32767)), 0, "int16")
        self.values = _Values()
        self.floats: list[str] = []
        self.rounded_twice: set[str] = set()
        self.activations = {n.inputs[0]: n for n in self.graph.nodes if is_fused_activation(self.graph, n)}

    # ------------------------------------------------------------------------------------------ the whole file

    def write(self, preprocessing: Preprocessing | None, metadata: Mapping[str, str]) -> LiteRtModel:
        if not self.interface.is_plain:
            metadata = {**metadata, PROPERTY: self.interface.described}
        entry = self._entry(preprocessing)
        absorbed = {node.outputs[0] for node in self.activations.values()}
        for node in self.graph.nodes:
            if node.outputs[0] in absorbed:
                continue
            after = self.activations.get(node.outputs[0])
            self._emit(node, after.outputs[0] if after else node.outputs[0])
        name = self.graph.outputs[0]
        result, step = self._answer(name)
        return LiteRtModel(
            data=self.file.serialised(entry, result, {} if self.interface.bare else metadata),
            inputs={self.graph.inputs[0]: list(entry.shape)},
            outputs={name: list(result.shape)},
            floats=tuple(self.floats),
            step=step,
            int4=self.file.count_of("INT4"),
            values={name: self._place(name, held) for name, held in self.values.integers.items()},
            rounded_twice=frozenset(self.rounded_twice),
        )

    def _place(self, name: str, held: Written) -> Held:
        assert held.grid is not None
        return Held(held.number, held.grid.zero, self._shape(name), self.values.flat.get(name))

    def _emit(self, node: Node, result: str) -> None:
        """One operator with the activation that it absorbs; ``result`` is what both yield."""
        if gate_of(self.quantized, node.outputs[0]) is not None:
            self._gate(node)
        elif not self._in_integers(node, result):
            self._in_float(node, result)

    def _in_integers(self, node: Node, result: str) -> bool:
        """Write ``node`` as integers; False where it has no such form."""
        held = [name for name in node.inputs if name and name not in self.graph.constants]
        operands = 1 if node.op in (*LAYER_OPS, *WITH_CONSTANTS) else len(node.inputs)
        if len(held) != operands or any(name not in self.values.integers for name in held):
            return False
        write = OPERATORS.get(node.op)
        return write is not None and write(self, node, result)

    def _refuse(self, node: Node, why: str, way_out: str) -> UsageError:
        return UsageError(f"LiteRT takes no {node.op} at '{node.name}' {why}. {way_out}")

    def _shape(self, name: str) -> tuple[int, ...]:
        """Natural order, with the batch."""
        return (self.batch, *self.graph.shapes[name])

    # ------------------------------------------------------------------------------------------ both ends

    def _entry(self, preprocessing: Preprocessing | None) -> Written:
        name, interface = self.graph.inputs[0], self.interface
        how = self.quantized.tensors[name]
        natural = self._shape(name)
        last = interface.layout == "nhwc"
        shape = laid(natural) if last else natural
        entry = self.file.value(name, shape, None, interface.input)
        if not interface.takes_pixels:
            held = self._quantized(entry, name, lower_grid(how))
        else:
            pixels = entry
            if interface.input == "uint8":
                pixels = entry = self.file.value(f"{name}.bytes", shape, Grid(1.0, 0, "uint8"))
            held = self._quantized(pixels, f"{name}.pixels", Grid(1.0, -128))
        if not last:
            held = self._moved(held, channels_last(len(natural)), name)
        if interface.takes_pixels:
            assert preprocessing is not None
            held = self._normalised(held, preprocessing, lower_grid(how))
        self.values.integers[name] = self._clipped(held, final_grid(how), name)
        return entry

    def _normalised(self, pixels: Written, how: Preprocessing, on: Grid) -> Written:
        """``pixel / (255 std) - mean / std`` per channel, as a depthwise 1x1 convolution of integers."""
        std, mean = np.array(how.std), np.array(how.mean)
        scale = (1 / (255 * std * PIXEL_STEPS)).astype(np.float32)
        ones = np.full((1, 1, 1, len(std)), PIXEL_STEPS, np.int8)
        shift = np.rint(-mean / std / scale).astype(np.int32)
        weight = self.file.weight("normalisation", ones, scale, 3)
        bias = self.file.bias("normalisation.shift", shift, scale)
        output = self.file.value("normalised", pixels.shape, on)
        options = {"padding": VALID, "strideW": 1, "strideH": 1, "depthMultiplier": 1}
        return self.file.operator("DEPTHWISE_CONV_2D", [pixels, weight, bias], output, 3, **options)

    def _answer(self, name: str) -> tuple[Written, float]:
        """The output as float32 in natural order, behind the head that was asked for, and the step of its integers."""
        held, step = self.values.floats.get(name), 0.0
        if name in self.values.integers:
            integers = self.values.integers[name]
            assert integers.grid is not None
            step = integers.grid.scale
            integers = self._natural(integers, self._shape(name), name)
            held = self._dequantized(integers, name)
        elif held is not None:
            held = self._natural(held, self._shape(name), name)
        assert held is not None
        return self._head(held), step

    def _head(self, scores: Written) -> Written:
        head = self.interface.head
        if head == "scores":
            return scores
        if len(scores.shape) != 2:
            raise UsageError(
                f"A LiteRT file puts {head} behind one row of scores only; here they have the shape {list(scores.shape)}. "
                "Leave --head out."
            )
        self.floats.append(f"{head} head")
        if head == "softmax":
            return self.file.operator("SOFTMAX", [scores], self.file.value("softmax", scores.shape), beta=1.0)
        axis = self.file.constant("argmax.axis", np.array([1], np.int32))
        output = self.file.value("argmax", scores.shape[:1], kind="int64")
        return self.file.operator("ARG_MAX", [scores, axis], output, outputType=self.file.type_of("int64"))

    # ------------------------------------------------------------------------------------------ grids and layouts

    def _quantized(self, source: Written, name: str, on: Grid) -> Written:
        """QUANTIZE, from floats or from other integers."""
        version = 2 if on.kind == "int16" else 1
        return self.file.operator("QUANTIZE", [source], self.file.value(name, source.shape, on), version)

    def _dequantized(self, source: Written, name: str) -> Written:
        assert source.grid is not None
        version = 3 if source.grid.kind == "int16" else 2
        return self.file.operator("DEQUANTIZE", [source], self.file.value(name, source.shape), version)

    def _clipped(self, held: Written, on: Grid, name: str) -> Written:
        """``held`` on a grid of the same step; saturation there is one end of the clip."""
        return held if held.grid == on else self._quantized(held, f"{name}.clipped", on)

    def _on(self, held: Written, on: Grid, name: str) -> Written:
        """``held`` on another grid: times 1 with a new step, because XNNPACK's QUANTIZE rounds the ratio of steps to 8 bits."""
        assert held.grid is not None
        if held.grid.scale == on.scale:
            return self._clipped(held, on, name)
        one = self.file.constant("one", np.ones((1,) * len(held.shape), np.int8), Grid(1.0))
        output = self.file.value(f"{name}.requantized", held.shape, on)
        version = 3 if held.grid.scale >= on.scale else 2
        return self.file.operator("MUL", [held, one], output, version, fusedActivationFunction=0)

    def _operator(
        self, operator: str, inputs: Sequence[Written], node: Node, result: str, version: int, **options: Any
    ) -> bool:
        """Write ``operator`` so that it yields ``result`` on its grid; always True.

        With an option ``fusedActivationFunction`` it takes a ReLU in: the lower end of a clip below 8 bits.
        """
        how, shape = self.quantized.tensors.get(result), laid(self._shape(result))
        if how is None:
            output = self.file.value(f"{result}.integers", shape, self.scores)
            options["fusedActivationFunction"] = self._last_activation(node)
            self.values.integers[result] = self.file.operator(operator, inputs, output, version, **options)
            return True
        first, final = lower_grid(how), final_grid(how)
        if "fusedActivationFunction" in options and first != final and not how.signed:
            first, options["fusedActivationFunction"] = final, RELU
        output = self.file.operator(operator, inputs, self.file.value(result, shape, first), version, **options)
        self.values.integers[result] = self._clipped(output, final, result)
        return True

    def _last_activation(self, node: Node) -> int:
        """What is fused where the network's output follows at once: no grid saturates there."""
        after = self.activations.get(node.outputs[0])
        if after is None or after.op == "Relu":
            return RELU if after else 0
        if clip_limit(self.graph, after) != 6:
            raise self._refuse(after, "as the last operator", "Leave it to your program: it does not change the order.")
        return RELU6

    def _moved(self, held: Written, axes: Sequence[int], name: str) -> Written:
        """TRANSPOSE, or RESHAPE where only dimensions of one element change their places."""
        shape = tuple(held.shape[axis] for axis in axes)
        if tuple(axes) == tuple(range(len(axes))):
            return held
        if [axis for axis in axes if held.shape[axis] > 1] == [a for a in range(len(axes)) if held.shape[a] > 1]:
            return self._reshaped(held, shape, name)
        order = self.file.constant(f"{name}.axes", np.array(axes, np.int32))
        kind, rank = held.grid.kind if held.grid else "", len(shape)
        version = 5 if kind == "int16" else 4 if rank > 4 else 2 if kind == "int8" else 1
        output = self.file.value(f"{name}.moved", shape, held.grid)
        return self.file.operator("TRANSPOSE", [held, order], output, version)

    def _natural(self, held: Written, natural: Sequence[int], name: str) -> Written:
        order = channels_last(len(natural))
        return self._moved(held, [order.index(axis) for axis in range(len(order))], name)

    def _reshaped(self, held: Written, shape: Sequence[int], name: str) -> Written:
        if tuple(shape) == held.shape:
            return held
        sizes = np.array(shape, np.int32)
        output = self.file.value(f"{name}.reshaped", shape, held.grid)
        target = self.file.constant(f"{name}.shape", sizes)
        return self.file.operator("RESHAPE", [held, target], output, newShape=sizes)

    def _wide(self, held: Written, name: str) -> Written:
        """The same numbers as s16 with zero point 0, exactly; by way of floats, for a QUANTIZE of s8 to s16 is too new for many."""
        assert held.grid is not None
        return self._quantized(
            self._dequantized(held, f"{name}.read"), f"{name}.wide", Grid(held.grid.scale, 0, "int16")
        )

    # ------------------------------------------------------------------------------------------ layers

    def _conv(self, node: Node, result: str) -> bool:
        weight, source = self.quantized.weights.get(node.name), node.inputs[0]
        if weight is None or len(self._shape(source)) != 4:
            return False
        values, scale = weight.values, weight.scale
        x, padding = self._windows(self.values.integers[source], node, values.shape[2:], source)
        options = self._strides(node) | {"padding": padding, "fusedActivationFunction": 0}
        bias = self._bias(node, len(values))
        groups = int(node.attributes.get("group", 1))
        if _is_pointwise(node, values) and self._in_four_bits(weight, result):
            kernel = self.file.weight(f"{node.name}.weight", values[:, :, 0, 0], scale, 0, four_bits=True)
            return self._operator(
                "FULLY_CONNECTED", [x, kernel, bias], node, result, 10, keepNumDims=True, fusedActivationFunction=0
            )
        small = weight.bits <= FOUR_BITS and self.interface.int4 == "always"
        if small:
            self.rounded_twice.add(result)
        if _is_depthwise(node, values):
            options["depthMultiplier"] = len(values) // groups
            kernel = self.file.weight(f"{node.name}.weight", _depthwise(values), scale, 3, four_bits=small)
            return self._operator("DEPTHWISE_CONV_2D", [x, kernel, bias], node, result, 7 if small else 3, **options)
        kernel = self.file.weight(f"{node.name}.weight", _last(values), scale, 0, four_bits=small)
        version = 7 if small else 6 if groups > 1 else 3
        return self._operator("CONV_2D", [x, kernel, bias], node, result, version, **options)

    def _gemm(self, node: Node, result: str) -> bool:
        weight = self.quantized.weights.get(node.name)
        if weight is None or not node.attributes.get("transB", 0):
            return False
        wide = result not in self.quantized.tensors
        small = not wide and self._in_four_bits(weight, result)
        kernel = self.file.weight(
            f"{node.name}.weight", self._columns(weight.values, node.inputs[0]), weight.scale, 0, four_bits=small
        )
        x, bias = self.values.integers[node.inputs[0]], self._bias(node, len(weight.values), wide=wide)
        x = self._wide(x, node.name) if wide else x
        version = 7 if wide else 10 if small else 4
        return self._operator("FULLY_CONNECTED", [x, kernel, bias], node, result, version, fusedActivationFunction=0)

    def _in_four_bits(self, weight: QuantizedWeight, result: str) -> bool:
        """Whether a linear layer is stored as INT4: XNNPACK takes it as fast as int8 where its inputs are even in number."""
        how = self.interface.int4
        even = weight.values.shape[1] % 2 == 0
        taken = weight.bits <= FOUR_BITS and (how == "always" or (how == "fast" and even))
        if taken and not even:
            self.rounded_twice.add(result)
        return taken

    def _columns(self, values: Array, source: str) -> Array:
        """Weights of a linear layer for inputs that were flattened channels last."""
        if source not in self.values.flat:
            return values
        c, h, w = self.values.flat[source]
        return np.ascontiguousarray(values.reshape(len(values), c, h, w).transpose(0, 2, 3, 1)).reshape(values.shape)

    def _bias(self, node: Node, channels: int, *, wide: bool = False) -> Written:
        weight = self.quantized.weights[node.name]
        scale_x = float(grid(self.quantized, node.inputs[0])[0])
        bias = np.zeros(channels, np.int32)
        if len(node.inputs) > 2 and node.inputs[2]:
            bias = int32_bias(self.graph.constants[node.inputs[2]], scale_x, weight.scale)
        steps = np.float32(scale_x) * weight.scale
        return self.file.bias(f"{node.name}.bias", bias.astype(np.int64) if wide else bias, np.atleast_1d(steps))

    def _windows(
        self, x: Written, node: Node, kernel: Sequence[int], name: str, *, lowest: bool = False
    ) -> tuple[Written, int]:
        """The input of a sliding window, and its padding: TensorFlow's SAME or VALID where one of them is meant, else a PAD.

        Args:
            lowest: what is padded must not win a maximum.
        """
        strides, dilations = _pair(node, "strides"), _pair(node, "dilations")
        top, left, *_ = (*map(int, node.attributes.get("pads", ())), 0, 0)
        out = self._shape(node.outputs[0])[2:]
        valid, same, pads = True, True, []
        for axis, before in enumerate((top, left)):
            size, stride, count = x.shape[1 + axis], strides[axis], out[axis]
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            after = max((count - 1) * stride + reach - size - before, 0)
            total = max((count - 1) * stride + reach - size, 0)
            valid = valid and before == after == 0
            same = same and count == math.ceil(size / stride) and (before, after) == (total // 2, total - total // 2)
            pads.append((before, after))
        if valid or same:
            return x, VALID if valid else SAME
        shape = (x.shape[0], *(size + sum(pad) for size, pad in zip(x.shape[1:3], pads, strict=True)), x.shape[3])
        amounts = self.file.constant(f"{name}.pads", np.array([(0, 0), *pads, (0, 0)], np.int32))
        padded = self.file.value(f"{name}.padded", shape, x.grid)
        version = 2 if x.grid else 1
        if lowest and x.grid is not None and x.grid.zero > -128:
            least = self.file.constant(f"{name}.least", np.array([-128], np.int8), x.grid)
            return self.file.operator("PADV2", [x, amounts, least], padded, version), VALID
        return self.file.operator("PAD", [x, amounts], padded, version), VALID

    def _strides(self, node: Node) -> dict[str, Any]:
        (height, width), (tall, wide) = _pair(node, "strides"), _pair(node, "dilations")
        return {"strideH": height, "strideW": width, "dilationHFactor": tall, "dilationWFactor": wide}

    # ------------------------------------------------------------------------------------------ pools, sums, gates

    def _max_pool(self, node: Node, result: str) -> bool:
        kernel = tuple(map(int, node.attributes["kernel_shape"]))
        if set(_pair(node, "dilations")) != {1}:
            return False
        x, padding = self._windows(self.values.integers[node.inputs[0]], node, kernel, node.name, lowest=True)
        output = self.file.value(result, laid(self._shape(result)), x.grid)
        height, width = _pair(node, "strides")
        options = {"strideH": height, "strideW": width, "filterHeight": kernel[0], "filterWidth": kernel[1]}
        options |= {"padding": padding, "fusedActivationFunction": 0}
        self.values.integers[result] = self.file.operator("MAX_POOL_2D", [x], output, 2, **options)
        return True

    def _average_pool(self, node: Node, result: str) -> bool:
        """A depthwise convolution of ones: AVERAGE_POOL_2D keeps its input's step, so that it would round twice."""
        kernel, pads = tuple(map(int, node.attributes["kernel_shape"])), node.attributes.get("pads", (0,))
        if result not in self.quantized.tensors or (any(pads) and not node.attributes.get("count_include_pad", 0)):
            return False
        source = self.values.integers[node.inputs[0]]
        strides, channels = _pair(node, "strides"), source.shape[3]
        top, left, bottom, right = (*map(int, pads),) if len(pads) == 4 else (0, 0, 0, 0)
        sizes = (source.shape[1] + top + bottom, source.shape[2] + left + right)
        whole = [(size - k) // s + 1 for size, k, s in zip(sizes, kernel, strides, strict=True)]
        if whole != list(self._shape(result)[2:]):
            return False  # windows beyond the edge, which average fewer pixels
        x, padding = self._windows(source, node, kernel, node.name)
        assert x.grid is not None
        scale = np.array([1 / math.prod(kernel)], np.float32)
        ones = self.file.weight(f"{node.name}.ones", np.ones((1, *kernel, channels), np.int8), scale, 3)
        zeros = self.file.bias(f"{node.name}.zeros", np.zeros(channels, np.int32), scale * np.float32(x.grid.scale))
        options = self._strides(node) | {"padding": padding, "depthMultiplier": 1, "fusedActivationFunction": 0}
        return self._operator("DEPTHWISE_CONV_2D", [x, ones, zeros], node, result, 3, **options)

    def _global_pool(self, node: Node, result: str) -> bool:
        x, wide = self.values.integers[node.inputs[0]], result not in self.quantized.tensors
        x = self._wide(x, node.name) if wide else x
        axes = self.file.constant(f"{node.name}.axes", np.array([1, 2], np.int32))
        if not wide:
            return self._operator("MEAN", [x, axes], node, result, 2, keepDims=True)
        output = self.file.value(f"{result}.integers", laid(self._shape(result)), self.scores)
        self.values.integers[result] = self.file.operator("MEAN", [x, axes], output, 3, keepDims=True)
        return True

    def _arithmetic(self, node: Node, result: str) -> bool:
        """ADD, SUB, MUL of two values with as many dimensions."""
        first, second = (self.values.integers[name] for name in node.inputs)
        how = self.quantized.tensors.get(result)
        if how is None or len(first.shape) != len(second.shape):
            return False
        assert first.grid is not None and second.grid is not None
        grows = node.op == "Mul" and first.grid.scale * second.grid.scale >= how.scale
        version = 3 if grows else 2
        return self._operator(node.op.upper(), [first, second], node, result, version, fusedActivationFunction=0)

    def _gate(self, node: Node) -> None:
        """HardSigmoid as ``(x + reach)`` clipped to [0, 2 reach] by saturation and ReLU, then the same integers as [0, 1]."""
        value, x = node.outputs[0], self.values.integers[node.inputs[0]]
        steps = gate_steps(self.quantized, node)
        assert x.grid is not None
        raised, one = Grid(x.grid.scale, 127 - 2 * steps), float(grid(self.quantized, value)[0])
        reach = self.file.constant(f"{value}.reach", np.full((1,) * len(x.shape), steps, np.int8), Grid(x.grid.scale))
        output = self.file.value(f"{value}.raised", x.shape, raised)
        gate = self.file.operator("ADD", [x, reach], output, 2, fusedActivationFunction=RELU)
        step = self.file.constant(
            f"{value}.step", np.ones((1,) * len(x.shape), np.int8), Grid(float(np.float32(one / x.grid.scale)))
        )
        output = self.file.value(value, x.shape, Grid(one, raised.zero))
        self.values.integers[value] = self.file.operator("MUL", [gate, step], output, 3, fusedActivationFunction=0)

    def _sigmoid(self, node: Node, result: str) -> bool:
        """LOGISTIC has a grid of its own, 1/256, and leaves it for the network's: two roundings, seldom a step apart from one."""
        how = self.quantized.tensors.get(result)
        if how is None:
            return False
        x = self.values.integers[node.inputs[0]]
        output = self.file.value(f"{result}.logistic", x.shape, Grid(1 / 256, -128))
        held = self.file.operator("LOGISTIC", [x], output, 2)
        self.values.integers[result] = self._clipped(self._on(held, lower_grid(how), result), final_grid(how), result)
        return True

    def _leaky_relu(self, node: Node, result: str) -> bool:
        if result not in self.quantized.tensors:
            return False
        alpha = float(node.attributes.get("alpha", 0.01))
        return self._operator("LEAKY_RELU", [self.values.integers[node.inputs[0]]], node, result, 2, alpha=alpha)

    def _saturated(self, node: Node, result: str) -> bool:
        """A ReLU or ReLU6 that nothing absorbs: another grid, whose ends are the clip."""
        how = self.quantized.tensors.get(result)
        if how is None or how.signed or (node.op == "Clip" and clip_limit(self.graph, node) is None):
            return False
        held = self._on(self.values.integers[node.inputs[0]], lower_grid(how), result)
        self.values.integers[result] = self._clipped(held, final_grid(how), result)
        return True

    # ------------------------------------------------------------------------------------------ what only moves

    def _concat(self, node: Node, result: str) -> bool:
        how = self.quantized.tensors.get(result)
        if how is None:
            return False
        first = lower_grid(how) if how.signed else final_grid(how)  # what is joined without a sign has none below zero
        parts = [self._on(self.values.integers[name], first, f"{result}.{name}") for name in node.inputs]
        rank = len(parts[0].shape)
        axis = channels_last(rank).index(int(node.attributes["axis"]) % rank)
        output = self.file.value(result, laid(self._shape(result)), first)
        joined = self.file.operator("CONCATENATION", parts, output, 2, axis=axis, fusedActivationFunction=0)
        self.values.integers[result] = self._clipped(joined, final_grid(how), result)
        return True

    def _flatten(self, node: Node, result: str) -> bool:
        source, readers = node.inputs[0], self.graph.consumers(result)
        natural, held = self._shape(source), self.values.integers[source]
        if int(node.attributes.get("axis", 1)) != 1:
            return False
        layers = readers and result not in self.graph.outputs and all(reader.op == "Gemm" for reader in readers)
        if math.prod(natural[2:]) > 1:  # single pixels have one order only
            if len(natural) == 4 and layers:
                self.values.flat[result] = (natural[1], natural[2], natural[3])
            else:
                held = self._natural(held, natural, source)
        self.values.integers[result] = self._reshaped(held, self._shape(result), result)
        return True

    def _reshape(self, node: Node, result: str) -> bool:
        source, target = self._shape(node.inputs[0]), self._shape(result)
        held = self.values.integers[node.inputs[0]]
        if math.prod(source) != math.prod(target):
            return False
        if len(source) > 3 and len(target) > 3 and source[-2:] == target[-2:]:  # channels into groups, or back
            self.values.integers[result] = self._reshaped(held, laid(target), result)
            return True
        held = self._reshaped(self._natural(held, source, node.inputs[0]), target, result)
        self.values.integers[result] = self._moved(held, channels_last(len(target)), result)
        return True

    def _transpose(self, node: Node, result: str) -> bool:
        axes = [int(axis) for axis in node.attributes["perm"]]
        before = channels_last(len(axes))
        order = [before.index(axes[axis]) for axis in channels_last(len(axes))]
        self.values.integers[result] = self._moved(self.values.integers[node.inputs[0]], order, result)
        return True

    def _slice(self, node: Node, result: str) -> bool:
        held = self.values.integers[node.inputs[0]]
        starts, _, axes = (self.graph.constants[name].ravel() for name in node.inputs[1:4])
        rank, shape = len(held.shape), laid(self._shape(result))
        begin = [0] * rank
        for start, axis in zip(starts, axes, strict=True):
            place = channels_last(rank).index(int(axis) % rank)
            begin[place] = int(start) % held.shape[place] if start < 0 else int(start)
        places = [
            self.file.constant(f"{result}.{what}", np.array(numbers, np.int32))
            for what, numbers in (("begin", begin), ("size", shape))
        ]
        output = self.file.value(result, shape, held.grid)
        self.values.integers[result] = self.file.operator("SLICE", [held, *places], output, 5 if rank > 4 else 2)
        return True

    def _identity(self, node: Node, result: str) -> bool:
        self.values.integers[result] = self.values.integers[node.inputs[0]]
        return True

    # ------------------------------------------------------------------------------------------ one operator in float

    def _in_float(self, node: Node, result: str) -> None:
        """DEQUANTIZE, the float operator, QUANTIZE: around just this one.

        Raises:
            UsageError: floats are not allowed, or LiteRT has no such operator.
        """
        write = FLOAT_OPERATORS.get(node.op)
        if write is None:
            known = ", ".join(sorted({*OPERATORS, *FLOAT_OPERATORS}))
            raise self._refuse(node, "that we know how to write", f"Known: {known}. Export --format onnx for others.")
        if not self.interface.allow_float:
            raise self._refuse(
                node, "as integers", "Export with --allow-float to compute that operator, and no other, in float."
            )
        self.floats.append(f"{node.op} {node.name}")
        held = write(self, node)
        how, after = self.quantized.tensors.get(result), self.activations.get(node.outputs[0])
        if how is not None:  # its grid saturates where an activation clips
            self.values.integers[result] = self._clipped(
                self._quantized(held, result, lower_grid(how)), final_grid(how), result
            )
            return
        if after is not None:
            held = self._float_operator("RELU6" if after.op == "Clip" else "RELU", [held], result)
        self.values.floats[result] = held

    def _float_of(self, name: str, rank: int) -> Written:
        """A value or a constant as floats, channels last."""
        if name in self.graph.constants:
            data = np.asarray(self.graph.constants[name], np.float32)
            data = data.reshape((1,) * (rank - data.ndim) + data.shape)
            return self.file.constant(name, np.ascontiguousarray(data.transpose(channels_last(rank))))
        if name not in self.values.floats:
            self.values.floats[name] = self._dequantized(self.values.integers[name], f"{name}.float")
        return self.values.floats[name]

    def _float_operator(self, operator: str, inputs: Sequence[Written], name: str, **options: Any) -> Written:
        return self.file.operator(operator, inputs, self.file.value(name, laid(self._shape(name))), **options)

    def _float_layer(self, node: Node) -> Written:
        weight = np.asarray(self.graph.constants[node.inputs[1]], np.float32)
        shift = np.zeros(len(weight), np.float32)
        if len(node.inputs) > 2 and node.inputs[2]:
            shift = np.asarray(self.graph.constants[node.inputs[2]], np.float32)
        x, bias = self._float_of(node.inputs[0], weight.ndim), self.file.constant(f"{node.name}.bias", shift)
        result, options = node.outputs[0], {"fusedActivationFunction": 0}
        if node.op == "Gemm":
            weight = self._columns(weight if node.attributes.get("transB", 0) else weight.T, node.inputs[0])
            kernel = self.file.constant(f"{node.name}.weight", np.ascontiguousarray(weight))
            return self._float_operator("FULLY_CONNECTED", [x, kernel, bias], result, **options)
        x, padding = self._windows(x, node, weight.shape[2:], node.inputs[0])
        options |= self._strides(node) | {"padding": padding}
        if _is_depthwise(node, weight):
            options["depthMultiplier"] = len(weight) // int(node.attributes.get("group", 1))
            kernel = self.file.constant(f"{node.name}.weight", _depthwise(weight))
            return self._float_operator("DEPTHWISE_CONV_2D", [x, kernel, bias], result, **options)
        kernel = self.file.constant(f"{node.name}.weight", _last(weight))
        return self._float_operator("CONV_2D", [x, kernel, bias], result, **options)

    def _float_arithmetic(self, node: Node) -> Written:
        rank = len(self._shape(node.outputs[0]))
        inputs = [self._float_of(name, rank) for name in node.inputs]
        if any(len(given.shape) != rank for given in inputs):
            raise self._refuse(node, "of operands with different numbers of dimensions", "Reshape them in the network.")
        return self._float_operator(node.op.upper(), inputs, node.outputs[0], fusedActivationFunction=0)

    def _float_softmax(self, node: Node) -> Written:
        x = self._float_of(node.inputs[0], 0)
        rank = len(x.shape)
        if channels_last(rank)[-1] != int(node.attributes.get("axis", -1)) % rank:
            raise self._refuse(node, "over other axes than the channels", "Leave it to your program.")
        return self._float_operator("SOFTMAX", [x], node.outputs[0], beta=1.0)

    def _float_hard_sigmoid(self, node: Node) -> Written:
        result, x = node.outputs[0], self._float_of(node.inputs[0], 0)
        alpha, beta = float(node.attributes.get("alpha", 0.2)), float(node.attributes.get("beta", 0.5))
        for operator, number in (("MUL", alpha), ("ADD", beta)):
            factor = self.file.constant(f"{result}.{operator}", np.full((1,) * len(x.shape), number, np.float32))
            x = self._float_operator(operator, [x, factor], result, fusedActivationFunction=0)
        return self._float_operator("RELU_0_TO_1", [x], result)

    def _float_leaky_relu(self, node: Node) -> Written:
        alpha = float(node.attributes.get("alpha", 0.01))
        return self._float_operator("LEAKY_RELU", [self._float_of(node.inputs[0], 0)], node.outputs[0], alpha=alpha)

    def _float_unary(self, node: Node) -> Written:
        operator = {"Sigmoid": "LOGISTIC", "Relu": "RELU"}[node.op]
        return self._float_operator(operator, [self._float_of(node.inputs[0], 0)], node.outputs[0])


WITH_CONSTANTS = ("Reshape", "Slice", "Clip")  # whose further inputs are sizes and limits
OPERATORS: dict[str, Callable[[_Writer, Node, str], bool]] = {
    "Conv": _Writer._conv,
    "Gemm": _Writer._gemm,
    "MaxPool": _Writer._max_pool,
    "AveragePool": _Writer._average_pool,
    "GlobalAveragePool": _Writer._global_pool,
    "Add": _Writer._arithmetic,
    "Sub": _Writer._arithmetic,
    "Mul": _Writer._arithmetic,
    "Sigmoid": _Writer._sigmoid,
    "LeakyRelu": _Writer._leaky_relu,
    "Relu": _Writer._saturated,
    "Clip": _Writer._saturated,
    "Concat": _Writer._concat,
    "Flatten": _Writer._flatten,
    "Reshape": _Writer._reshape,
    "Transpose": _Writer._transpose,
    "Slice": _Writer._slice,
    "Identity": _Writer._identity,
}
FLOAT_OPERATORS: dict[str, Callable[[_Writer, Node], Written]] = {
    "Conv": _Writer._float_layer,
    "Gemm": _Writer._float_layer,
    "Add": _Writer._float_arithmetic,
    "Sub": _Writer._float_arithmetic,
    "Mul": _Writer._float_arithmetic,
    "Div": _Writer._float_arithmetic,
    "Softmax": _Writer._float_softmax,
    "HardSigmoid": _Writer._float_hard_sigmoid,
    "LeakyRelu": _Writer._float_leaky_relu,
    "Sigmoid": _Writer._float_unary,
    "Relu": _Writer._float_unary,
}


def _pair(node: Node, name: str) -> tuple[int, int]:
    height, width = (int(number) for number in node.attributes.get(name, (1, 1)))
    return height, width


def _is_depthwise(node: Node, weight: Array) -> bool:
    return int(node.attributes.get("group", 1)) > 1 and weight.shape[1] == 1


def _is_pointwise(node: Node, weight: Array) -> bool:
    """A 1x1 convolution that is a linear layer at every pixel."""
    moves = (*_pair(node, "strides"), *weight.shape[2:], int(node.attributes.get("group", 1)))
    return set(moves) == {1} and not any(node.attributes.get("pads", ()))


def _last(weight: Array) -> Array:
    """``[out, in, height, width]`` as ``[out, height, width, in]``."""
    return np.ascontiguousarray(weight.transpose(0, 2, 3, 1))


def _depthwise(weight: Array) -> Array:
    """``[out, 1, height, width]`` as ``[1, height, width, out]``."""
    return np.ascontiguousarray(weight[:, 0].transpose(1, 2, 0)[None])
