"""A LiteRT file under construction: which tensor holds which value of the graph, on which grid and in which order.

Activations are s8 and lie channels last. A u8 value with zero point 0 has -128 here, one with 128 has 0. Fewer activation
bits cost little: the zero point moves so that the largest integer is 127 and saturation is the upper clip, and a fused ReLU
the lower one; signed values take one QUANTIZE more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgecompress.errors import UsageError
from edgecompress.exporters.interface import Interface
from edgecompress.exporters.litert_writing import Array, Grid, LiteRtFile, Written
from edgecompress.graph import Graph, Node
from edgecompress.quantize import QuantizedGraph, TensorRange, clip_limit, is_fused_activation

SAME, VALID = 0, 1  # the schema's Padding
RELU, RELU6 = 1, 3  # the schema's ActivationFunctionType
CHANNELS_LAST = {4: (0, 2, 3, 1), 5: (0, 3, 4, 1, 2)}  # 5 dimensions: channels in groups, as a channel shuffle has them


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


@dataclass
class _Values:
    """What the file holds of each value of the graph; 4 and 5 dimensions lie channels last."""

    integers: dict[str, Written] = field(default_factory=dict)
    floats: dict[str, Written] = field(default_factory=dict)
    flat: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # channels last when flattened: its C, H, W


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


class Draft:
    """The integers of a network and the file that they are written to, operator by operator.

    ``scores`` is the grid of an output that is not quantised; ``floats`` and ``rounded_twice`` are those of `LiteRtModel`.
    """

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

    def refuse(self, node: Node, why: str, way_out: str) -> UsageError:
        """The error of an operator that cannot be written, with what to do instead."""
        return UsageError(f"LiteRT takes no {node.op} at '{node.name}' {why}. {way_out}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Natural order, with the batch."""
        return (self.batch, *self.graph.shapes[name])

    def quantize(self, source: Written, name: str, on: Grid) -> Written:
        """QUANTIZE, from floats or from other integers."""
        version = 2 if on.kind == "int16" else 1
        return self.file.operator("QUANTIZE", [source], self.file.value(name, source.shape, on), version)

    def dequantize(self, source: Written, name: str) -> Written:
        """DEQUANTIZE, to floats."""
        assert source.grid is not None
        version = 3 if source.grid.kind == "int16" else 2
        return self.file.operator("DEQUANTIZE", [source], self.file.value(name, source.shape), version)

    def clipped(self, held: Written, on: Grid, name: str) -> Written:
        """``held`` on a grid of the same step; saturation there is one end of the clip."""
        return held if held.grid == on else self.quantize(held, f"{name}.clipped", on)

    def on(self, held: Written, on: Grid, name: str) -> Written:
        """``held`` on another grid: times 1 with a new step, because XNNPACK's QUANTIZE rounds the ratio of steps to 8 bits."""
        assert held.grid is not None
        if held.grid.scale == on.scale:
            return self.clipped(held, on, name)
        one = self.file.constant("one", np.ones((1,) * len(held.shape), np.int8), Grid(1.0))
        output = self.file.value(f"{name}.requantized", held.shape, on)
        version = 3 if held.grid.scale >= on.scale else 2
        return self.file.operator("MUL", [held, one], output, version, fusedActivationFunction=0)

    def operator(
        self, operator: str, inputs: Sequence[Written], node: Node, result: str, version: int, **options: Any
    ) -> bool:
        """Write ``operator`` so that it yields ``result`` on its grid; always True.

        With an option ``fusedActivationFunction`` it takes a ReLU in: the lower end of a clip below 8 bits.
        """
        how, shape = self.quantized.tensors.get(result), laid(self.shape(result))
        if how is None:
            output = self.file.value(f"{result}.integers", shape, self.scores)
            options["fusedActivationFunction"] = self.last_activation(node)
            self.values.integers[result] = self.file.operator(operator, inputs, output, version, **options)
            return True
        first, final = lower_grid(how), final_grid(how)
        if "fusedActivationFunction" in options and first != final and not how.signed:
            first, options["fusedActivationFunction"] = final, RELU
        output = self.file.operator(operator, inputs, self.file.value(result, shape, first), version, **options)
        self.values.integers[result] = self.clipped(output, final, result)
        return True

    def last_activation(self, node: Node) -> int:
        """What is fused where the network's output follows at once: no grid saturates there."""
        after = self.activations.get(node.outputs[0])
        if after is None or after.op == "Relu":
            return RELU if after else 0
        if clip_limit(self.graph, after) != 6:
            raise self.refuse(after, "as the last operator", "Leave it to your program: it does not change the order.")
        return RELU6

    def moved(self, held: Written, axes: Sequence[int], name: str) -> Written:
        """TRANSPOSE, or RESHAPE where only dimensions of one element change their places."""
        shape = tuple(held.shape[axis] for axis in axes)
        if tuple(axes) == tuple(range(len(axes))):
            return held
        if [axis for axis in axes if held.shape[axis] > 1] == [a for a in range(len(axes)) if held.shape[a] > 1]:
            return self.reshaped(held, shape, name)
        order = self.file.constant(f"{name}.axes", np.array(axes, np.int32))
        kind, rank = held.grid.kind if held.grid else "", len(shape)
        version = 5 if kind == "int16" else 4 if rank > 4 else 2 if kind == "int8" else 1
        output = self.file.value(f"{name}.moved", shape, held.grid)
        return self.file.operator("TRANSPOSE", [held, order], output, version)

    def natural(self, held: Written, natural: Sequence[int], name: str) -> Written:
        """``held``, which lies channels last, in the graph's own order ``natural``."""
        order = channels_last(len(natural))
        return self.moved(held, [order.index(axis) for axis in range(len(order))], name)

    def reshaped(self, held: Written, shape: Sequence[int], name: str) -> Written:
        """RESHAPE, where the shape is another."""
        if tuple(shape) == held.shape:
            return held
        sizes = np.array(shape, np.int32)
        output = self.file.value(f"{name}.reshaped", shape, held.grid)
        target = self.file.constant(f"{name}.shape", sizes)
        return self.file.operator("RESHAPE", [held, target], output, newShape=sizes)

    def wide(self, held: Written, name: str) -> Written:
        """The same numbers as s16 with zero point 0, exactly; by way of floats, for a QUANTIZE of s8 to s16 is too new for many."""
        assert held.grid is not None
        return self.quantize(self.dequantize(held, f"{name}.read"), f"{name}.wide", Grid(held.grid.scale, 0, "int16"))

    def columns(self, values: Array, source: str) -> Array:
        """Weights of a linear layer for inputs that were flattened channels last."""
        if source not in self.values.flat:
            return values
        c, h, w = self.values.flat[source]
        return np.ascontiguousarray(values.reshape(len(values), c, h, w).transpose(0, 2, 3, 1)).reshape(values.shape)

    def windows(
        self, x: Written, node: Node, kernel: Sequence[int], name: str, *, lowest: bool = False
    ) -> tuple[Written, int]:
        """The input of a sliding window, and its padding: TensorFlow's SAME or VALID where one of them is meant, else a PAD.

        Args:
            lowest: what is padded must not win a maximum.
        """
        strides, dilations = pair(node, "strides"), pair(node, "dilations")
        top, left, *_ = (*map(int, node.attributes.get("pads", ())), 0, 0)
        out = self.shape(node.outputs[0])[2:]
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


def pair(node: Node, name: str) -> tuple[int, int]:
    height, width = (int(number) for number in node.attributes.get(name, (1, 1)))
    return height, width


def stride_options(node: Node) -> dict[str, Any]:
    (height, width), (tall, wide) = pair(node, "strides"), pair(node, "dilations")
    return {"strideH": height, "strideW": width, "dilationHFactor": tall, "dilationWFactor": wide}


def is_depthwise(node: Node, weight: Array) -> bool:
    return int(node.attributes.get("group", 1)) > 1 and weight.shape[1] == 1


def last_layout(weight: Array) -> Array:
    """``[out, in, height, width]`` as ``[out, height, width, in]``."""
    return np.ascontiguousarray(weight.transpose(0, 2, 3, 1))


def depthwise_layout(weight: Array) -> Array:
    """``[out, 1, height, width]`` as ``[1, height, width, out]``."""
    return np.ascontiguousarray(weight[:, 0].transpose(1, 2, 0)[None])
