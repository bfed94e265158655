"""What a network does, in the six numbers that an estimate without a table can be fitted to."""

from __future__ import annotations

from collections.abc import Sequence

from edgecompress.cost import Edge, Kernel, layer_macs, layer_weights
from edgecompress.spec import Frozen

# Conversions at the ends of an integer network: every network has both, so they tell none from another.
_ENDS = ("input", "output")


class Features(Frozen):
    """One image's work in millions (of multiply-adds, of elements) and in kernels; also coefficients, in us per each.

    ``pointwise`` are convolutions of one pixel and linear layers, ``depthwise`` those of one channel, ``spatial`` all
    others. Activations are read and written by every kernel; at one precision bytes are in proportion to elements.
    """

    pointwise_mmacs: float = 0.0
    spatial_mmacs: float = 0.0
    depthwise_mmacs: float = 0.0
    activation_melements: float = 0.0
    weight_melements: float = 0.0
    kernels: float = 0.0

    @property
    def values(self) -> tuple[float, ...]:
        """The six numbers in the order of the fields."""
        return (
            self.pointwise_mmacs,
            self.spatial_mmacs,
            self.depthwise_mmacs,
            self.activation_melements,
            self.weight_melements,
            self.kernels,
        )

    @property
    def mmacs(self) -> float:
        """Million multiply-adds of all kinds."""
        return self.pointwise_mmacs + self.spatial_mmacs + self.depthwise_mmacs

    def dot(self, other: Features) -> float:
        """Microseconds of work ``self`` at the coefficients ``other``."""
        return sum(a * b for a, b in zip(self.values, other.values, strict=True))


def features_of(kernels: Sequence[Kernel], edges: Sequence[Edge] = (), divisor: int = 1) -> Features:
    """Features of the kernels and the operators between them, with channels padded up to multiples of ``divisor``."""
    macs = {"pointwise": 0, "spatial": 0, "depthwise": 0}
    activations = weights = 0
    for kernel in kernels:
        layer = kernel.layer
        wide_in, wide_out = padded(kernel, divisor)
        kind = "depthwise" if layer.kind == "depthwise" else "pointwise" if layer.kernel == (1, 1) else "spatial"
        macs[kind] += layer_macs(layer, wide_in, wide_out)
        activations += wide_in * _pixels(layer.input_hw) + wide_out * _pixels(layer.output_hw)
        weights += layer_weights(layer, wide_in, wide_out)
    between = [edge for edge in edges if edge.spec.kind not in _ENDS]
    for edge in between:
        activations += _up(edge.channels, divisor) * (_pixels(edge.spec.input_hw) + _pixels(edge.spec.output_hw))
    return Features(
        pointwise_mmacs=macs["pointwise"] / 1e6,
        spatial_mmacs=macs["spatial"] / 1e6,
        depthwise_mmacs=macs["depthwise"] / 1e6,
        activation_melements=activations / 1e6,
        weight_melements=weights / 1e6,
        kernels=len(kernels) + len(between),
    )


def padded(kernel: Kernel, divisor: int) -> tuple[int, int]:
    """Channels in and out that really run: rounded up to the next multiple of ``divisor``.

    The network's own input is not padded: runtimes have special kernels for 3 channels.
    """
    wide_in = _up(kernel.in_channels, divisor) if kernel.layer.in_terms else kernel.in_channels
    return wide_in, _up(kernel.out_channels, divisor)


def _up(channels: int, divisor: int) -> int:
    return -(-channels // divisor) * divisor


def _pixels(extent: tuple[int, int]) -> int:
    return extent[0] * extent[1]
