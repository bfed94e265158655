"""What a policy costs, counted exactly: MACs, parameters, BOPs. Bytes and latency come from models that are passed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edgecompress.spec import FLOAT_BITS, CompressionPolicy, Cost, EdgeSpec, LayerChoice, LayerSpec, Network, Source

INPUT_BITS = 8
_AS_IT_IS = LayerChoice()


@dataclass(frozen=True, slots=True)
class Kernel:
    """One layer at the widths and bits it will be built with: the key by which a latency table is asked.

    Zeros change the bytes of a file and not the kernel that runs: ``keep_elements`` is no part of the key.
    """

    layer: LayerSpec
    in_channels: int
    out_channels: int
    weight_bits: int
    activation_bits: int
    keep_elements: float = field(default=1.0, compare=False)


@dataclass(frozen=True, slots=True)
class Edge:
    """One operator without weights at the channels it will have; ``bits`` are 8 where the network runs integers."""

    spec: EdgeSpec
    channels: int
    bits: int


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency of one network with the bounds of its uncertainty, and how many kernels stand on which evidence.

    ``kernels`` are microseconds and evidence of each kernel in the order asked for; what is left of ``us`` is spent
    outside of them (starting kernels, pooling, additions), and is below zero where a profiler made them look longer.
    """

    us: float
    low_us: float
    high_us: float
    counts: Mapping[Source, int]
    kernels: tuple[tuple[float, Source], ...] = ()


class LatencyModel(Protocol):
    """Predicts one image's latency on the target from the layers that will run, and the operators between them."""

    def __call__(self, kernels: Sequence[Kernel], edges: Sequence[Edge] = ()) -> Latency: ...


class SizeModel(Protocol):
    """Predicts the bytes of the file that the target's exporter will write."""

    def __call__(self, kernels: Sequence[Kernel], params: int) -> int: ...


class CostModel(Protocol):
    """What the environments ask: the cost of a finished policy."""

    def __call__(self, policy: CompressionPolicy) -> Cost: ...


def channels(layer: LayerSpec, widths: Mapping[str, int], original: Mapping[str, int]) -> tuple[int, int]:
    """Input and output channels of ``layer`` when its groups have ``widths``."""
    lost_in = sum(term.per_channel * (original[term.group] - widths[term.group]) for term in layer.in_terms)
    lost_out = sum(term.per_channel * (original[term.group] - widths[term.group]) for term in layer.out_terms)
    return layer.in_channels - lost_in, layer.out_channels - lost_out


def layer_macs(layer: LayerSpec, in_channels: int, out_channels: int) -> int:
    """Dense multiply-adds of one image at the given channels."""
    if layer.kind == "depthwise":
        return layer.macs // layer.out_channels * out_channels
    return layer.macs * in_channels * out_channels // (layer.in_channels * layer.out_channels)


def layer_weights(layer: LayerSpec, in_channels: int, out_channels: int) -> int:
    """Elements of the weight at the given channels."""
    inputs = 1 if layer.kind == "depthwise" else in_channels // layer.groups
    return out_channels * inputs * layer.kernel[0] * layer.kernel[1]


def layer_params(layer: LayerSpec, in_channels: int, out_channels: int) -> int:
    """Elements of weight and bias at the given channels."""
    has_bias = layer.params > layer_weights(layer, layer.in_channels, layer.out_channels)
    return layer_weights(layer, in_channels, out_channels) + (out_channels if has_bias else 0)


def kernels(network: Network, policy: CompressionPolicy) -> tuple[Kernel, ...]:
    """The kernels that the network will run under ``policy``, in the order of its layers."""
    original = network.widths
    widths = original | policy.keep_channels
    result = []
    for layer in network.layers:
        choice = policy.layers.get(layer.name, _AS_IT_IS)
        in_channels, out_channels = channels(layer, widths, original)
        result.append(
            Kernel(
                layer=layer,
                in_channels=in_channels,
                out_channels=out_channels,
                weight_bits=choice.weight_bits,
                activation_bits=choice.activation_bits,
                keep_elements=choice.keep_elements,
            )
        )
    return tuple(result)


def edges(network: Network, policy: CompressionPolicy) -> tuple[Edge, ...]:
    """The operators without weights under ``policy``. One integer layer makes the whole network run integers."""
    original = network.widths
    widths = original | policy.keep_channels
    bits = min((choice.weight_bits for choice in policy.layers.values()), default=FLOAT_BITS)
    bits = 8 if bits <= 8 else bits
    return tuple(
        Edge(
            edge,
            edge.channels - sum(t.per_channel * (original[t.group] - widths[t.group]) for t in edge.terms),
            bits,
        )
        for edge in network.edges
    )


def count(
    network: Network, policy: CompressionPolicy, latency: LatencyModel | None = None, size: SizeModel | None = None
) -> Cost:
    """The cost of ``policy``: counts are exact, ``size`` and ``latency`` come from the models (0 and None without).

    BOPs are MACs x weight bits x bits of the layer's input; float counts 32, the network's input 8 (design, section 2).
    """
    built = kernels(network, policy)
    original = network.widths
    widths = original | policy.keep_channels
    macs = sparse = bops = params = nonzeros = 0
    for kernel in built:
        layer_cost = layer_macs(kernel.layer, kernel.in_channels, kernel.out_channels)
        elements = layer_params(kernel.layer, kernel.in_channels, kernel.out_channels)
        weights = layer_weights(kernel.layer, kernel.in_channels, kernel.out_channels)
        macs += layer_cost
        sparse += round(layer_cost * kernel.keep_elements)
        params += elements
        nonzeros += elements - weights + round(weights * kernel.keep_elements)
        first = kernel.layer.name == network.layers[0].name
        input_bits = min(kernel.activation_bits, INPUT_BITS) if first else kernel.activation_bits
        bops += layer_cost * kernel.weight_bits * input_bits
    others = network.fixed_params + sum(g.norm_params_per_channel * widths[g.id] for g in network.groups)
    predicted = latency(built, edges(network, policy)) if latency else None
    counts = predicted.counts if predicted else {}
    return Cost(
        macs=macs,
        sparse_macs=sparse,
        params=params + others,
        nonzeros=nonzeros + others,
        size_bytes=size(built, params + others) if size else 0,
        bops=bops,
        latency_us=predicted.us if predicted else None,
        latency_low_us=predicted.low_us if predicted else None,
        latency_high_us=predicted.high_us if predicted else None,
        kernels_measured=counts.get("measured", 0),
        kernels_interpolated=counts.get("interpolated", 0),
        kernels_estimated=counts.get("estimated", 0),
    )


def average_weight_bits(network: Network, policy: CompressionPolicy) -> float:
    """``sum(bits x weights) / sum(weights)``, first and last layer included."""
    built = kernels(network, policy)
    weights = [layer_weights(kernel.layer, kernel.in_channels, kernel.out_channels) for kernel in built]
    return sum(k.weight_bits * w for k, w in zip(built, weights, strict=True)) / max(sum(weights), 1)
