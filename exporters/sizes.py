"""Bytes that a file will have, before it is written: what the searches are charged for `size`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from edgecompress.cost import Kernel, layer_params, layer_weights
from edgecompress.exporters.onnx_writing import Names
from edgecompress.exporters.packing import (
    LARGE,
    SPARSE_ZEROS,
    Held,
    Part,
    bytes_beside,
    bytes_of,
    sparse_storage,
    storages,
    store,
)
from edgecompress.quantize import QuantizedGraph, QuantizedWeight, Simulator
from edgecompress.spec import LayerSpec, Target

CLIP_BYTES, LIMIT_BYTES = 25, 11  # a Clip node; a u8 scalar
NAMES_PER_LAYER = 25  # in a file whose weights are unpacked; a layer at 8 bits has a third of them
# Per output channel, by dialect: a bias of 4 bytes, and where channels have scales of their own the weight's; in the ``ort`` dialect
# the bias' too.
CHANNEL_BYTES = {("ort", "channel"): 12, ("ort", "tensor"): 4, ("trt", "channel"): 8, ("trt", "tensor"): 4}

# A storage with the names by which `packing.store` compares it, and with the longest that it may get.
Way = tuple[Part, Part]


class PlannedSize:
    """Stage 1: the file of the unpruned network at 8 bits, shrunk with the weights at ``bits`` planned for stage 2.

    Args:
        fixed_bytes: everything but weights, scales and biases: nodes, names, activation ranges.
        bits: 8 where the target's dialect stores nothing smaller, otherwise the average that stage 2 is expected to reach;
            None: the bits of every layer are known.
        sparse: the file stores a layer as a bitmask with its non-zero weights where that is smaller.
        channel_bytes: of `CHANNEL_BYTES`.
    """

    def __init__(self, fixed_bytes: int, bits: float | None, *, sparse: bool = False, channel_bytes: int = 12) -> None:
        self._fixed, self._bits, self._sparse, self._channel = fixed_bytes, bits, sparse, channel_bytes

    @classmethod
    def from_file(
        cls,
        file_bytes: int,
        layers: Sequence[LayerSpec],
        bits: float,
        *,
        sparse: bool = False,
        channel_bytes: int = 12,
    ) -> PlannedSize:
        """Take what is not weights off the integer file of the unpruned network."""
        weights = sum(layer_params(layer, layer.in_channels, layer.out_channels) for layer in layers)
        fixed = file_bytes - weights - channel_bytes * sum(layer.out_channels for layer in layers)
        return cls(fixed, bits, sparse=sparse, channel_bytes=channel_bytes)

    def at_known_bits(self) -> PlannedSize:
        """The same around weights at the bits that a finished stage 2 chose, where the dialect packs them."""
        if self._bits == 8:
            return self
        return PlannedSize(self._fixed, None, sparse=self._sparse, channel_bytes=self._channel)

    def __call__(self, kernels: Sequence[Kernel], params: int) -> int:
        weights = sum(self._stored(kernel) for kernel in kernels)
        return round(self._fixed + weights + self._channel * sum(k.out_channels for k in kernels))

    def _stored(self, kernel: Kernel) -> float:
        """Bytes of one layer's weights: dense, or what `packing.store` makes of its zeros where that is smaller.

        The non-zero values are stored at 4 bits or at 8; an average of planned bits stands for layers of both.
        """
        bits = self._bits or kernel.weight_bits
        dense = layer_params(kernel.layer, kernel.in_channels, kernel.out_channels) * bits / 8
        if not self._sparse or kernel.keep_elements > 1 - SPARSE_ZEROS:
            return dense
        weights = layer_weights(kernel.layer, kernel.in_channels, kernel.out_channels)
        if weights > LARGE:
            return dense
        held = bits if bits % 1 else (4 if bits <= 4 else 8)
        rest = dense - weights * bits / 8
        return min(dense, rest + _sparse_overhead() + weights * (1 + kernel.keep_elements * held) / 8)


@cache
def _sparse_overhead() -> int:
    """Bytes of the nodes that unpack one sparse layer."""
    return sparse_storage(np.zeros(8, np.int8), 4).size_bytes


class FileSize:
    """Stage 2: exact weight storage per layer and bit-width around a fixed rest.

    Args:
        base_bytes: the integer file at 8 bits, as written for the target's dialect.
    """

    def __init__(self, simulator: Simulator, base_bytes: int, target: Target) -> None:
        self._simulator, self._target = simulator, target
        # Names are as long as the last ones of a file of unpacking nodes: a budget that is spent to its last byte holds.
        self._used = NAMES_PER_LAYER * len(simulator.graph.layers)
        self._layers = {layer.name: layer for layer in simulator.graph.layers}
        self._stored: dict[tuple[str, int], list[Way]] = {}
        weights = {layer.name: simulator.weight(layer, 8) for layer in self._layers.values()}
        self._fixed = base_bytes - sum(_bytes_of_layers(weights, target).values())

    def _of(self, layer: str, bits: int) -> list[Way]:
        """Every way to store one layer's weights in the file, unpacking nodes included.

        Weights that only round to zero count as non-zero: training may move them, pruned ones stay zero.
        """
        key = (layer, min(bits, 8))
        if key not in self._stored:
            node = self._layers[layer]
            weight = self._simulator.weight(node, key[1])
            alive = (self._simulator.graph.constants[node.inputs[1]] != 0) & (weight.values == 0)
            values = weight.values + alive.astype(np.int8)
            self._stored[key] = _ways(replace(weight, values=values), self._target, self._used)
        return self._stored[key]

    def __call__(self, kernels: Sequence[Kernel], params: int) -> int:
        weights, held = 0, set[bytes]()
        bits = {kernel.layer.name: kernel.weight_bits for kernel in kernels}
        # In the file's order, as `packing.store` chooses: what is smallest beside the layers before. One that is none of the
        # network's own, such as a BatchNorm that stands alone, has 8 bits.
        for layer in self._layers:
            ways = self._of(layer, bits.get(layer, 8))
            _, charged = min(ways, key=lambda way: bytes_beside(way[0], held))
            weights += bytes_beside(charged, held)
            held.update(content for content, _ in charged[1])
        return self._fixed + weights + self._clips(kernels)

    def _clips(self, kernels: Sequence[Kernel]) -> int:
        """Bytes of the Clip nodes of inputs below 8 bits and of the limits that they share."""
        readers = self._simulator.points.layer_input
        clipped = {
            readers[k.layer.name]: k.activation_bits
            for k in kernels
            if k.activation_bits < 8 and k.layer.name in readers
        }
        return CLIP_BYTES * len(clipped) + LIMIT_BYTES * 2 * len(set(clipped.values()))


def _ways(weight: QuantizedWeight, target: Target, used: int) -> list[Way]:
    """Every storage of a layer, in the order in which `packing.store` tries them."""
    if target.dialect == "trt":  # TensorRT stores low-bit convolution weights as int8
        plain = (int(weight.values.size), ())
        return [(plain, plain)]
    short, long = (
        [bytes_of(stored) for stored in storages(weight.values, weight.bits, names, max_opset=target.max_opset)]
        for names in (0, used)
    )
    return list(zip(short, long, strict=True))


def _bytes_of_layers(weights: Mapping[str, QuantizedWeight], target: Target) -> dict[str, int]:
    """Bytes of every layer's weights, unpacking nodes included; what several layers share counts for the first of them."""
    if target.dialect == "trt":
        return {name: int(weight.values.size) for name, weight in weights.items()}
    names, held = Names(), Held()
    return {
        name: store(weight.values, weight.bits, names, max_opset=target.max_opset, held=held).size_bytes
        for name, weight in weights.items()
    }


def stored_bytes(quantized: QuantizedGraph, target: Target) -> dict[str, int]:
    """Bytes of every layer's weights in the target's file; what several layers share counts for the first of them."""
    return _bytes_of_layers(quantized.weights, target)
