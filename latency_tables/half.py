"""Which layers a measured table has faster in FP16 than in integers: depthwise and narrow ones often are on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgecompress.cost import Kernel, LatencyModel
from edgecompress.latency_tables.targets import HALF_BITS, INTEGER_BITS


def faster_in_half(kernels: Sequence[Kernel], latency: LatencyModel) -> tuple[str, ...]:
    """Names of integer layers of which ``latency`` measured or interpolated both precisions, and FP16 takes less time.

    Estimates decide nothing. What the casts around a layer cost is no row of a table and is not counted.
    """
    halves = [replace(kernel, weight_bits=HALF_BITS, activation_bits=HALF_BITS) for kernel in kernels]
    return tuple(
        kernel.layer.name
        for kernel, (us, source), (half_us, half_source) in zip(
            kernels, latency(kernels).kernels, latency(halves).kernels, strict=True
        )
        if max(kernel.weight_bits, kernel.activation_bits) <= INTEGER_BITS
        and "estimated" not in (source, half_source)
        and half_us < us
    )
