"""Layers go to FP16 only where measurements of both precisions say that it is faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgecompress.cost import Edge, Kernel, Latency, Source
from edgecompress.latency_tables.half import faster_in_half
from edgecompress.spec import LayerSpec


def kernel(name: str, bits: int = 8) -> Kernel:
    layer = LayerSpec(
        name=name, kind="conv", in_channels=16, out_channels=16, kernel=(3, 3), stride=(1, 1), groups=1,
        input_hw=(8, 8), output_hw=(8, 8), macs=1, params=1,
    )  # fmt: skip
    return Kernel(layer, 16, 16, bits, bits)


@dataclass
class Measured:
    """``us[name]`` are the times in int8 and FP16."""

    us: dict[str, tuple[float, float]]
    source: Source = "measured"

    def __call__(self, kernels: Sequence[Kernel], edges: Sequence[Edge] = ()) -> Latency:
        parts = tuple((self.us[k.layer.name][k.weight_bits == 16], self.source) for k in kernels)
        return Latency(us=0.0, low_us=0.0, high_us=0.0, counts={}, kernels=parts)


def test_faster_layers_are_named() -> None:
    us = {"wide": (1.0, 2.0), "depthwise": (3.0, 2.0), "equal": (1.0, 1.0), "float": (9.0, 1.0)}
    kernels = [kernel("wide"), kernel("depthwise", 4), kernel("equal"), kernel("float", 32)]
    assert faster_in_half(kernels, Measured(us)) == ("depthwise",)
    assert faster_in_half(kernels, Measured(us, "interpolated")) == ("depthwise",)
    assert faster_in_half(kernels, Measured(us, "estimated")) == ()
