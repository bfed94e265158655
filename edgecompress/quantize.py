"""Fake quantisation on the internal graph: where values are quantised, calibration, bits per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgecompress.errors import BadDataError
from edgecompress.graph import Graph, Node
from edgecompress.interpret import float_constants, run
from edgecompress.ranges import RANGES
from edgecompress.spec import LayerChoice, WeightScales

BITS = (2, 3, 4, 5, 6, 7, 8)
_PASS_THROUGH = ("MaxPool", "Flatten", "Reshape", "Transpose", "Slice", "Identity")
_KEEPS_SIGN = ("AveragePool", "GlobalAveragePool", "ReduceMean", "Concat", "Add", "Mul", *_PASS_THROUGH)
_NOT_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax")
_EIGHT_BITS = LayerChoice(weight_bits=8, activation_bits=8)


@dataclass(frozen=True)
class TensorRange:
    """How one activation tensor is quantised: ``q = round(x / scale)`` clamped to the range of ``bits``.

    Unsigned (behind a ReLU): ``[0, 2**bits - 1]``. Signed, symmetric: ``[-2**(bits-1), 2**(bits-1) - 1]``.
    """

    scale: float
    bits: int
    signed: bool

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        if self.signed:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer weights of one layer: ``weight = values * scale[out]``; ``values`` fit ``bits`` without the lowest code.

    ``scale`` is ``[out]``, or without dimensions where the whole tensor has one step.
    """

    values: NDArray[np.int8]
    scale: NDArray[np.float32]
    bits: int

    @property
    def scales(self) -> WeightScales:
        """What has a step of its own."""
        return "channel" if self.scale.ndim else "tensor"

    @property
    def channel_scale(self) -> NDArray[np.float32]:
        """The step of every output channel ``[out]``, equal ones where the tensor has one."""
        return np.array(np.broadcast_to(self.scale, len(self.values)))


@dataclass(frozen=True)
class QuantizedGraph:
    """What the integer exporters write: the float graph, ranges per activation value and integers per layer.

    ``tensors`` are keyed by value name, ``weights`` by layer name. Layers without an entry stay float. Biases stay
    float in ``graph.constants``; a writer rounds them to int32 at ``scale_x * scale_w`` where its dialect wants that.
    Layers in ``half`` have a choice of 16 bits: a target with FP16 kernels computes them so.
    """

    graph: Graph
    tensors: Mapping[str, TensorRange]
    weights: Mapping[str, QuantizedWeight]
    half: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Points:
    """Where activations are quantised. ``owner`` maps a quantised value to the one whose range it shares (itself,
    unless a pooling or reshape passes integers through); ``signed`` and ``readers`` (layers) are per owner. ``reach`` has
    the owners that feed a gate (`is_gate`) and where that gate saturates: a whole number of their steps. ``joined`` maps
    owners that only a Concat reads to its result, whose step they take: it then copies integers, and nothing is rounded twice."""

    owner: Mapping[str, str]
    signed: Mapping[str, bool]
    layer_input: Mapping[str, str]
    reach: Mapping[str, float] = field(default_factory=dict)
    joined: Mapping[str, str] = field(default_factory=dict)

    def layers_of(self, owner: str) -> tuple[str, ...]:
        """Layers that read ``owner``: they share the bits of their input."""
        return tuple(layer for layer, value in self.layer_input.items() if value == owner)


def is_fused_activation(graph: Graph, node: Node) -> bool:
    """Whether ``node`` is a ReLU or ReLU6 that the operator before it absorbs, so that only its output is quantised.

    A range behind a ReLU6 never reaches beyond its upper end, so saturation is the clipping.
    """
    before = graph.producer(node.inputs[0])
    return (
        (node.op == "Relu" or clip_limit(graph, node) is not None)
        and before is not None
        and before.op in ("Conv", "Gemm", "Add", "BatchNormalization")
        and len(graph.consumers(node.inputs[0])) == 1
        and node.inputs[0] not in graph.outputs
    )


def clip_limit(graph: Graph, node: Node | None) -> float | None:
    """The upper end of a Clip that starts at 0, such as ReLU6; None for anything else."""
    if node is None or node.op != "Clip" or len(node.inputs) < 3:
        return None
    low, high = (graph.constants.get(name) for name in node.inputs[1:3])
    return float(high) if low is not None and high is not None and float(low) == 0 else None


def is_gate(graph: Graph, node: Node) -> bool:
    """Whether ``node`` is a HardSigmoid centred at 0 that only multiplications read, as in HardSwish and squeeze-excite.

    On a grid that meets both its ends it is a clip of its input's integers, read at another scale and zero point: exact,
    and nothing is quantised anew.
    """
    readers = graph.consumers(node.outputs[0])
    return (
        node.op == "HardSigmoid"
        and float(node.attributes.get("beta", 0.5)) == 0.5
        and node.outputs[0] not in graph.outputs
        and all(reader.op == "Mul" for reader in readers)
    )


def gate_reach(gate: Node) -> float:
    """The input at which a HardSigmoid reaches 1."""
    return 0.5 / float(gate.attributes.get("alpha", 0.2))


def steps_to(reach: float, scale: float) -> int:
    """Whole steps between 0 and ``reach``; so many that a u8 with zero point 128 holds both ends."""
    return min(max(round(reach / scale), 1), 127)


def find_points(graph: Graph) -> Points:
    """Every computed value is quantised, but for those inside a fused operator, gates, and the network's output.

    The output of a convolution is quantised even then (scores per pixel): ONNX Runtime has no integer kernel for a
    convolution that gives floats, as it has for a linear layer.
    """
    inside = {node.inputs[0] for node in graph.nodes if is_fused_activation(graph, node)}
    owner: dict[str, str] = {graph.inputs[0]: graph.inputs[0]}
    signed: dict[str, bool] = {graph.inputs[0]: True}
    reach: dict[str, float] = {}
    for node in graph.nodes:
        value = node.outputs[0]
        if value in inside or (value in graph.outputs and not _of_convolution(graph, node)):
            continue
        if is_gate(graph, node) and signed.get(owner.get(node.inputs[0], "")):
            reach[owner[node.inputs[0]]] = gate_reach(node)
            continue
        if node.op in _PASS_THROUGH and node.inputs[0] in owner:
            owner[value] = owner[node.inputs[0]]
            continue
        owner[value] = value
        read = [owner[name] for name in node.inputs if name in owner]
        signed[value] = not (
            node.op in _NOT_NEGATIVE
            or clip_limit(graph, node) is not None
            or (
                node.op in _KEEPS_SIGN
                and bool(read)
                and len(read) == len(node.inputs)
                and not any(signed[r] for r in read)
            )
        )
    layer_input = {layer.name: owner[layer.inputs[0]] for layer in graph.layers if layer.inputs[0] in owner}
    return Points(owner, signed, layer_input, reach, _joined(graph, owner, signed))


def _joined(graph: Graph, owner: Mapping[str, str], signed: Mapping[str, bool]) -> dict[str, str]:
    """Values that only a quantised Concat of their sign reads, the outermost Concat first.

    Not those behind a ReLU6: the end of their own range is what clips them.
    """
    return {
        value: node.outputs[0]
        for node in reversed(graph.nodes)
        if node.op == "Concat" and owner.get(node.outputs[0]) == node.outputs[0]
        for value in node.inputs
        if owner.get(value) == value
        and value not in graph.outputs
        and graph.consumers(value) == (node,)
        and node.inputs.count(value) == 1
        and signed[value] == signed[node.outputs[0]]
        and clip_limit(graph, graph.producer(value)) is None
    }


def _of_convolution(graph: Graph, node: Node) -> bool:
    """Whether ``node`` is a convolution, or the activation that one absorbs."""
    before = graph.producer(node.inputs[0]) if is_fused_activation(graph, node) else node
    return before is not None and before.op == "Conv"


@dataclass(frozen=True)
class Calibration:
    """Scale of every owner at every bit-width, chosen once on calibration images."""

    scales: Mapping[tuple[str, int], float]


def calibrate(
    graph: Graph, batches: Iterable[Tensor], *, seed: int = 0, samples: int = 20_000, ranges: str = "mse"
) -> Calibration:
    """Choose activation ranges.

    Args:
        batches: normalised images ``[N, C, H, W]``, without augmentation.
        samples: values kept per tensor and batch for the search.
        ranges: how a step is chosen, a name of `ranges.RANGES`.

    Raises:
        BadDataError: there is no image, or a tensor is not finite.
    """
    points = find_points(graph)
    constants = float_constants(graph)
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, list[Tensor]] = {}

    def watch(name: str, value: Tensor) -> Tensor:
        if points.owner.get(name) == name:
            if not torch.isfinite(value).all():
                raise BadDataError(
                    f"The activation '{name}' is not finite during calibration. Check the images and the weights."
                )
            flat = value.flatten()
            picked = torch.randint(0, len(flat), (min(samples, len(flat)),), generator=generator)
            kept.setdefault(name, []).append(torch.cat([flat[picked], flat.min()[None], flat.max()[None]]))
        return value

    with torch.no_grad():
        for x in batches:
            run(graph, x, constants, watch)
    if not kept:
        raise BadDataError("There is no calibration image. Give at least one batch.")
    scales = {}
    for name, parts in kept.items():
        values = torch.cat(parts)
        for bits in BITS:
            scales[name, bits] = _best_scale(
                values, bits, ranges, signed=points.signed[name], reach=points.reach.get(name)
            )
    return Calibration(scales)


def _best_scale(values: Tensor, bits: int, ranges: str, *, signed: bool, reach: float | None = None) -> float:
    """One of 60 fractions of the full range, as ``ranges`` chooses. With ``reach``, only steps that divide it."""
    low, high = TensorRange(1.0, bits, signed).limits
    largest = float(values.abs().max()) if signed else float(values.max())
    if largest <= 0:
        return (reach or 1.0) / high  # all zero: any step represents it
    steps = torch.linspace(0.05, 1.0, 60) * largest / high
    if reach is not None:
        steps = torch.tensor([reach / steps_to(reach, float(step)) for step in steps])
    return float(np.float32(RANGES[ranges](values, steps, low, high)))


def quantize_weight(weight: Tensor, bits: int, scales: WeightScales = "channel") -> QuantizedWeight:
    """Round ``weight [out, ...]`` symmetrically at the step of least squared error, one per output channel or one for all."""
    high = 2 ** (bits - 1) - 1
    rows = weight.detach().reshape(len(weight) if scales == "channel" else 1, -1)
    largest = rows.abs().amax(1)
    # A pruned or nearly dead channel gets a step that still holds its bias as an int32 at scale_x * scale_w.
    largest = largest.clamp(min=max(1e-4 * float(largest.max()), 1e-8))
    best = torch.full_like(largest, float("inf"))
    scale = largest / high
    for fraction in torch.linspace(0.3 if bits < 8 else 0.9, 1.0, 30 if bits < 8 else 5):
        step = (fraction * largest / high)[:, None]
        error = ((rows / step).round().clamp(-high, high) * step - rows).pow(2).sum(1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, step[:, 0], scale)
    values = (rows / scale[:, None]).round().clamp(-high, high).reshape(weight.shape)
    step_of = scale if scales == "channel" else scale[0]
    return QuantizedWeight(values.to(torch.int8).numpy(), step_of.numpy().astype(np.float32), bits)


class Simulator:
    """Float fake quantisation of a policy's bits on one graph. Quantised weights are cached by layer and bits.

    Args:
        weight_scales: of the target: one step per output channel, or one per weight tensor.
    """

    def __init__(self, graph: Graph, calibration: Calibration, weight_scales: WeightScales = "channel") -> None:
        self.graph = graph
        self.calibration = calibration
        self.weight_scales = weight_scales
        self.points = find_points(graph)
        self._walked = without_absorbed(graph, self.points)
        self._constants = float_constants(graph)
        self.floats = {name: channels_last(value) for name, value in self._constants.items()}
        self._weights: dict[tuple[str, int], QuantizedWeight] = {}
        self._dequantized: dict[tuple[str, int], Tensor] = {}

    def weight(self, layer: Node, bits: int) -> QuantizedWeight:
        """Integers of ``layer`` at ``bits``, in the graph's own layout ``[out, ...]``."""
        key = (layer.name, bits)
        if key not in self._weights:
            self._weights[key] = quantize_weight(self._constants[layer.inputs[1]], bits, self.weight_scales)
        return self._weights[key]

    def quantized(self, choices: Mapping[str, LayerChoice]) -> QuantizedGraph:
        """Post-training quantisation at ``choices`` (layer name -> bits); layers at 32 bits stay float."""
        weights = {
            layer.name: self.weight(layer, _choice(choices, layer.name).weight_bits)
            for layer in self.graph.layers
            if _choice(choices, layer.name).weight_bits in BITS
        }
        half = frozenset(
            layer.name
            for layer in self.graph.layers
            if max(_choice(choices, layer.name).weight_bits, _choice(choices, layer.name).activation_bits) == 16
        )
        return QuantizedGraph(self.graph, self.ranges(choices), weights, half)

    def ranges(self, choices: Mapping[str, LayerChoice]) -> dict[str, TensorRange]:
        """The range of every quantised value; a value that several layers read gets the largest of their bits."""
        ranges = {}
        for value, owner in self.points.owner.items():
            readers = [_choice(choices, layer).activation_bits for layer in self.points.layers_of(owner)]
            bits = max((min(bits, 8) for bits in readers), default=8)
            ranges[value] = self.range(owner, bits)
        for value, result in self.points.joined.items():
            ranges[value] = replace(ranges[result], bits=8)  # the Concat clips what it needs at fewer bits
        return ranges

    def range(self, owner: str, bits: int) -> TensorRange:
        """The calibrated range of a value that owns its grid."""
        return TensorRange(self.calibration.scales[owner, bits], bits, self.points.signed[owner])

    def constants(self, choices: Mapping[str, LayerChoice]) -> dict[str, Tensor]:
        """The graph's constants with fake-quantised weights and int32-rounded biases."""
        constants = dict(self.floats)
        ranges = self.ranges(choices)
        for layer in self.graph.layers:
            bits = _choice(choices, layer.name).weight_bits
            if bits not in BITS:
                continue
            quantized = self.weight(layer, bits)
            key = (layer.name, bits)
            if key not in self._dequantized:
                self._dequantized[key] = channels_last(dequantize(quantized))
            constants[layer.inputs[1]] = self._dequantized[key]
            if len(layer.inputs) > 2 and layer.inputs[2]:
                bias = self._constants[layer.inputs[2]]
                constants[layer.inputs[2]] = round_bias(bias, quantized, ranges[layer.inputs[0]])
        return constants

    def __call__(self, x: Tensor, choices: Mapping[str, LayerChoice]) -> Tensor:
        """Fake-quantised outputs for normalised images ``[N, C, H, W]``."""
        with torch.no_grad():
            return run_quantized(self._walked, x, self.constants(choices), self.ranges(choices), self.points)

    def forward(self, choices: Mapping[str, LayerChoice]) -> Callable[[Tensor], Tensor]:
        """`__call__` at fixed bits: nothing is prepared again from batch to batch."""
        constants, ranges = self.constants(choices), self.ranges(choices)
        return torch.no_grad()(lambda x: run_quantized(self._walked, x, constants, ranges, self.points))


def _choice(choices: Mapping[str, LayerChoice], layer: str) -> LayerChoice:
    """A layer that is none of the network's own, such as a BatchNorm that stands alone, has 8 bits."""
    return choices.get(layer, _EIGHT_BITS)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """``values * scale`` as float32."""
    values = torch.from_numpy(weight.values).float()
    return values * torch.from_numpy(weight.scale).view(-1, *(1,) * (values.dim() - 1))


def fake_quantize(value: Tensor, how: TensorRange | None, *, in_place: bool = False) -> Tensor:
    """Round ``value`` to the grid of ``how``; None leaves it alone.

    Four passes, not torch's fused operator: that one writes a mask for its gradient, too, and takes three times as long.
    """
    if how is None:
        return value
    low, high = how.limits
    scale = np.float32(how.scale)
    scaled = value.mul_ if in_place else value.mul
    return scaled(float(1 / scale)).round_().clamp_(low, high).mul_(float(scale))


def without_absorbed(graph: Graph, points: Points) -> Graph:
    """``graph`` without activations whose quantised result saturates where they would clip: the same numbers, one pass less.

    Values are also quantised only where their grid begins, so pooled and reshaped ones are not rounded twice.
    """
    nodes = tuple(
        replace(node, op="Identity", inputs=node.inputs[:1])
        if is_fused_activation(graph, node) and points.owner.get(node.outputs[0]) == node.outputs[0]
        else node
        for node in graph.nodes
    )
    return replace(graph, nodes=nodes)


def run_quantized(
    graph: Graph, x: Tensor, constants: Mapping[str, Tensor], ranges: Mapping[str, TensorRange], points: Points
) -> Tensor:
    """Fake-quantised outputs for ``x [N, C, H, W]``; ``graph`` is `without_absorbed`, ``constants`` are rounded."""
    first = graph.inputs[0]

    def on_grid(name: str, value: Tensor) -> Tensor:
        if points.owner.get(name) != name:
            return value
        return fake_quantize(
            value, ranges.get(name), in_place=name != first
        )  # what a node just computed is nobody else's

    return run(graph, channels_last(x), constants, on_grid)


def channels_last(value: Tensor) -> Tensor:
    """Images and weights as convolutions read them fastest."""
    return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


def simulate(quantized: QuantizedGraph, x: Tensor) -> Tensor:
    """Float fake quantisation of a finished `QuantizedGraph`, for normalised images ``[N, C, H, W]``."""
    points = find_points(quantized.graph)
    constants = {name: channels_last(value) for name, value in rounded_constants(quantized).items()}
    return run_quantized(without_absorbed(quantized.graph, points), x, constants, quantized.tensors, points)


def rounded_constants(quantized: QuantizedGraph) -> dict[str, Tensor]:
    """The graph's constants with quantised weights and int32-rounded biases, as floats."""
    constants = float_constants(quantized.graph)
    for layer in quantized.graph.layers:
        weight = quantized.weights.get(layer.name)
        if weight is None:
            continue
        constants[layer.inputs[1]] = dequantize(weight)
        if len(layer.inputs) > 2 and layer.inputs[2]:
            constants[layer.inputs[2]] = round_bias(
                constants[layer.inputs[2]], weight, quantized.tensors[layer.inputs[0]]
            )
    return constants


def round_bias(bias: Tensor, weight: QuantizedWeight, how: TensorRange) -> Tensor:
    """A float bias on the int32 grid of its accumulator, ``scale_x * scale_w``."""
    step = torch.from_numpy(weight.scale) * how.scale
    return (bias / step).round() * step
