"""Which kernels to measure for one network: the channel pairs that a search may visit, on the target's grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgecompress.cost import Edge, Kernel
from edgecompress.latency_tables.table import KernelKey, edge_key, kernel_key, weight_bytes
from edgecompress.spec import ChannelTerm, EdgeSpec, LayerSpec, Network

LEVELS = 10  # widths a side: 10 on the diagonal and 9 more on each axis make 28 pairs a layer
SMALLEST_WIDTH = 4
COLD_BYTES = 1 << 17  # of weights, from which a kernel is also timed with its weights out of the cache


def widths(width: int, divisor: int, levels: int = LEVELS) -> tuple[int, ...]:
    """Widths that a group of ``width`` channels may take: multiples of ``divisor`` and the width itself, thinned out to
    ``levels``; a group narrower than twice the divisor may also halve down to 4 (design, section 3)."""
    grid = {width, *range(divisor, width, divisor)}
    if width < 2 * divisor:
        grid |= {2**power for power in range(2, 12) if SMALLEST_WIDTH <= 2**power < width}
    ordered = sorted(grid)
    if len(ordered) <= levels:
        return tuple(ordered)
    return tuple(ordered[round(i * (len(ordered) - 1) / (levels - 1))] for i in range(levels))


def layer_pairs(layer: LayerSpec, network: Network, divisor: int, levels: int = LEVELS) -> tuple[tuple[int, int], ...]:
    """(in, out) channels of ``layer``: the diagonal, and both axes through the full width."""
    inputs = _side(layer.in_channels, layer.in_terms, network, divisor, levels)
    outputs = _side(layer.out_channels, layer.out_terms, network, divisor, levels)
    if layer.kind == "depthwise":
        return tuple((c, c) for c in outputs)
    steps = max(len(inputs), len(outputs))
    pairs = [(_at(inputs, i, steps), _at(outputs, i, steps)) for i in range(steps)]
    if {term.group for term in layer.in_terms} != {term.group for term in layer.out_terms}:
        pairs += [(c, layer.out_channels) for c in inputs] + [(layer.in_channels, c) for c in outputs]
    if layer.kind == "grouped":
        pairs = [(i, o) for i, o in pairs if i % layer.groups == 0 and o % layer.groups == 0]
    return tuple(dict.fromkeys(pairs))


def edge_channels(edge: EdgeSpec, network: Network, divisor: int, levels: int = LEVELS) -> tuple[int, ...]:
    """Channels that ``edge`` may have."""
    return _side(edge.channels, edge.terms, network, divisor, levels)


def _side(channels: int, terms: Sequence[ChannelTerm], network: Network, divisor: int, levels: int) -> tuple[int, ...]:
    """Channel counts of one side of a layer: its groups take their levels in step (a concatenation has several)."""
    prunable = {group.id: widths(group.width, divisor, levels) for group in network.prunable_groups}
    moving = [term for term in terms if term.group in prunable]
    original = network.widths
    steps = max((len(prunable[term.group]) for term in moving), default=1)
    lost = [
        sum(t.per_channel * (original[t.group] - _at(prunable[t.group], i, steps)) for t in moving)
        for i in range(steps)
    ]
    return tuple(sorted({channels - gone for gone in lost}))


def _at(values: Sequence[int], step: int, steps: int) -> int:
    """The value at ``step`` of ``steps`` along a list of another length."""
    return values[round(step * (len(values) - 1) / max(steps - 1, 1))]


def kernel_points(
    network: Network, divisor: int, precisions: Sequence[str], levels: int = LEVELS
) -> tuple[KernelKey, ...]:
    """Every kernel to measure, each once: equal shapes in different places are one kernel."""
    points: dict[KernelKey, None] = {}
    for layer in network.layers:
        for in_channels, out_channels in layer_pairs(layer, network, divisor, levels):
            kernel = Kernel(
                layer=layer, in_channels=in_channels, out_channels=out_channels, weight_bits=32, activation_bits=32
            )
            for precision in precisions:
                points |= dict.fromkeys(_working_sets(kernel_key(kernel, precision)))
    for edge in network.edges:
        for channels in edge_channels(edge, network, divisor, levels):
            for precision in precisions:
                points[edge_key(Edge(edge, channels, 32), precision)] = None
    return tuple(points)


def _working_sets(key: KernelKey) -> tuple[KernelKey, ...]:
    """The kernel warm, and cold too where its weights are many enough to matter."""
    return (key, key._replace(working_set="cold")) if weight_bytes(key) >= COLD_BYTES else (key,)


def random_points(
    network: Network, divisor: int, precisions: Sequence[str], generator: np.random.Generator, pairs: int
) -> tuple[KernelKey, ...]:
    """``pairs`` random (in, out) channels on the whole grid for each family of layers whose sides move apart."""
    points: dict[KernelKey, None] = {}
    families: dict[tuple[object, ...], int] = {}
    for layer in network.layers:
        if layer.kind in ("depthwise", "grouped") or not (layer.in_terms and layer.out_terms):
            continue
        inputs = _side(layer.in_channels, layer.in_terms, network, divisor, layer.in_channels)
        outputs = _side(layer.out_channels, layer.out_terms, network, divisor, layer.out_channels)
        for precision in precisions:
            for _ in range(pairs):
                kernel = Kernel(layer, int(generator.choice(inputs)), int(generator.choice(outputs)), 32, 32)
                key = kernel_key(kernel, precision)
                families[key.family] = families.get(key.family, 0) + 1
                if families[key.family] <= pairs:
                    points |= dict.fromkeys(_working_sets(key))
    return tuple(points)
