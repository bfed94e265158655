"""Fake quantisation on the internal graph: where values are quantised, calibration, bits per layer, learned step sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgecompress.errors import BadDataError
from edgecompress.graph import Graph, Node
from edgecompress.interpret import float_constants, run
from edgecompress.ranges import RANGES
from edgecompress.spec import LayerChoice

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
    """Integer weights of one layer: ``weight = values * scale[out]``; ``values`` fit ``bits`` without the lowest code."""

    values: NDArray[np.int8]
    scale: NDArray[np.float32]
    bits: int


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
    the owners that feed a gate (`is_gate`) and where that gate saturates: a whole number of their steps."""

    owner: Mapping[str, str]
    signed: Mapping[str, bool]
    layer_input: Mapping[str, str]
    reach: Mapping[str, float] = field(default_factory=dict)

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
    return Points(owner, signed, layer_input, reach)


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


def quantize_weight(weight: Tensor, bits: int) -> QuantizedWeight:
    """Round ``weight [out, ...]`` symmetrically per output channel at the step of least squared error."""
    high = 2 ** (bits - 1) - 1
    rows = weight.detach().flatten(1)
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
    return QuantizedWeight(values.to(torch.int8).numpy(), scale.numpy().astype(np.float32), bits)


class Simulator:
    """Float fake quantisation of a policy's bits on one graph. Quantised weights are cached by layer and bits."""

    def __init__(self, graph: Graph, calibration: Calibration) -> None:
        self.graph = graph
        self.calibration = calibration
        self.points = find_points(graph)
        self._constants = float_constants(graph)
        self._weights: dict[tuple[str, int], QuantizedWeight] = {}
        self._dequantized: dict[tuple[str, int], Tensor] = {}

    def weight(self, layer: Node, bits: int) -> QuantizedWeight:
        """Integers of ``layer`` at ``bits``, in the graph's own layout ``[out, ...]``."""
        key = (layer.name, bits)
        if key not in self._weights:
            self._weights[key] = quantize_weight(self._constants[layer.inputs[1]], bits)
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
        return ranges

    def range(self, owner: str, bits: int) -> TensorRange:
        """The calibrated range of a value that owns its grid."""
        return TensorRange(self.calibration.scales[owner, bits], bits, self.points.signed[owner])

    def constants(self, choices: Mapping[str, LayerChoice]) -> dict[str, Tensor]:
        """The graph's constants with fake-quantised weights and int32-rounded biases."""
        constants = dict(self._constants)
        ranges = self.ranges(choices)
        for layer in self.graph.layers:
            bits = _choice(choices, layer.name).weight_bits
            if bits not in BITS:
                continue
            quantized = self.weight(layer, bits)
            key = (layer.name, bits)
            if key not in self._dequantized:
                self._dequantized[key] = dequantize(quantized)
            constants[layer.inputs[1]] = self._dequantized[key]
            if len(layer.inputs) > 2 and layer.inputs[2]:
                bias = self._constants[layer.inputs[2]]
                constants[layer.inputs[2]] = round_bias(bias, quantized, ranges[layer.inputs[0]])
        return constants

    def __call__(self, x: Tensor, choices: Mapping[str, LayerChoice]) -> Tensor:
        """Fake-quantised outputs for normalised images ``[N, C, H, W]``."""
        ranges = self.ranges(choices)
        return run(self.graph, x, self.constants(choices), lambda name, value: fake_quantize(value, ranges.get(name)))


def _choice(choices: Mapping[str, LayerChoice], layer: str) -> LayerChoice:
    """A layer that is none of the network's own, such as a BatchNorm that stands alone, has 8 bits."""
    return choices.get(layer, _EIGHT_BITS)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """``values * scale`` as float32."""
    values = torch.from_numpy(weight.values).float()
    return values * torch.from_numpy(weight.scale).view(-1, *(1,) * (values.dim() - 1))


def fake_quantize(value: Tensor, how: TensorRange | None) -> Tensor:
    """Round ``value`` to the grid of ``how``; None leaves it alone."""
    if how is None:
        return value
    low, high = how.limits
    return torch.fake_quantize_per_tensor_affine(value, how.scale, 0, low, high)


class LearnedSteps(nn.Module):
    """The quantised network as a trainable module: weights, biases and step sizes learn together (LSQ, Esser 2020).

    Weights that are zero in the graph (element-wise pruned) stay zero. `finished` gives the trained `QuantizedGraph`.
    """

    def __init__(self, quantized: QuantizedGraph) -> None:
        super().__init__()
        self._start = quantized
        self._points = find_points(quantized.graph)
        graph = quantized.graph
        self._names = {name: f"p{number}" for number, name in enumerate(graph.constants)}
        self.constants = nn.ParameterDict()
        self.steps = nn.ParameterDict()
        trained = {name for layer in graph.layers for name in layer.inputs[1:] if name}
        for name, constant in float_constants(graph).items():
            self.constants[self._names[name]] = nn.Parameter(constant.clone(), requires_grad=name in trained)
        self._masks = {layer.name: torch.from_numpy(graph.constants[layer.inputs[1]] != 0) for layer in graph.layers}
        self._step_names: dict[str, str] = {}
        self._ends = {value: clip_limit(graph, graph.producer(value)) for value in self._points.signed}
        for layer, weight in quantized.weights.items():
            self._add_step(f"w:{layer}", torch.from_numpy(weight.scale.copy()))
        for value, owner in self._points.owner.items():
            if value == owner:
                self._add_step(f"a:{owner}", torch.tensor(quantized.tensors[owner].scale))

    def _add_step(self, key: str, value: Tensor) -> None:
        self._step_names[key] = f"s{len(self._step_names)}"
        self.steps[self._step_names[key]] = nn.Parameter(value.log())

    def _step(self, key: str) -> Tensor:
        # Learned in the logarithm, so that a step stays positive and moves in proportion to itself.
        step: Tensor = self.steps[self._step_names[key]].exp()
        kind, _, owner = key.partition(":")
        if kind != "a":
            return step
        reach, end = self._points.reach.get(owner), self._ends.get(owner)
        if reach is not None:
            return step + (reach / steps_to(reach, step.item()) - step).detach()
        return step if end is None else step.clamp(max=end / self._start.tensors[owner].limits[1])

    def forward(self, x: Tensor) -> Tensor:
        graph = self._start.graph
        constants: dict[str, Tensor] = {name: self.constants[key] for name, key in self._names.items()}
        for layer in graph.layers:
            if layer.name not in self._start.weights:
                continue
            high = 2 ** (self._start.weights[layer.name].bits - 1) - 1
            weight = constants[layer.inputs[1]] * self._masks[layer.name]
            step = self._step(f"w:{layer.name}").view(-1, *(1,) * (weight.dim() - 1))
            constants[layer.inputs[1]] = _round_to_grid(weight, step, -high, high)
            owner = self._points.layer_input.get(layer.name)
            if owner is not None and len(layer.inputs) > 2 and layer.inputs[2]:
                # The artifact rounds biases to int32 at scale_x * scale_w: training sees the same.
                grid = (self._step(f"w:{layer.name}") * self._step(f"a:{owner}")).detach()
                bias = constants[layer.inputs[2]]
                constants[layer.inputs[2]] = bias + ((bias / grid).round() * grid - bias).detach()

        def on_grid(name: str, value: Tensor) -> Tensor:
            owner = self._points.owner.get(name)
            if owner is None:
                return value
            low, high = self._start.tensors[name].limits
            return _round_to_grid(value, self._step(f"a:{owner}"), low, high)

        return run(graph, x, constants, on_grid)

    def finished(self) -> QuantizedGraph:
        """The trained integers, steps and biases."""
        graph = self._start.graph
        constants = {name: self.constants[key].detach().numpy().copy() for name, key in self._names.items()}
        weights = dict(self._start.weights)
        with torch.no_grad():
            for layer in graph.layers:
                if layer.name not in weights:
                    continue
                bits = weights[layer.name].bits
                high = 2 ** (bits - 1) - 1
                step = self._step(f"w:{layer.name}")
                weight = torch.from_numpy(constants[layer.inputs[1]]) * self._masks[layer.name]
                values = (weight / step.view(-1, *(1,) * (weight.dim() - 1))).round().clamp(-high, high)
                weights[layer.name] = QuantizedWeight(
                    values.to(torch.int8).numpy(), step.numpy().astype(np.float32), bits
                )
                constants[layer.inputs[1]] = weight.numpy()
            tensors = {
                value: replace(self._start.tensors[value], scale=float(np.float32(self._step(f"a:{owner}").item())))
                for value, owner in self._points.owner.items()
            }
        return QuantizedGraph(replace(graph, constants=constants), tensors, weights, self._start.half)


def _round_to_grid(value: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Rounding with the straight-through gradient for ``value`` and LSQ's gradient for ``step`` (Esser 2020, eq. 3)."""
    damp = 1.0 / (value.numel() / max(step.numel(), 1) * high) ** 0.5
    step = step * damp + (step - step * damp).detach()
    scaled = (value / step).clamp(low, high)
    return ((scaled.round() - scaled).detach() + scaled) * step


def simulate(quantized: QuantizedGraph, x: Tensor) -> Tensor:
    """Float fake quantisation of a finished `QuantizedGraph`, for normalised images ``[N, C, H, W]``."""
    constants = rounded_constants(quantized)
    return run(quantized.graph, x, constants, lambda name, value: fake_quantize(value, quantized.tensors.get(name)))


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
