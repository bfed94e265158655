"""What every bit-width of every layer does to the network's answers, alone: a KL divergence, computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from edgecompress.fidelity import divergence
from edgecompress.files import read_document, write_document
from edgecompress.interpret import run
from edgecompress.quantize import BITS, Simulator, channels_last, dequantize, fake_quantize
from edgecompress.spec import Document

What = Literal["weight", "activation"]


class Sensitivities(Document):
    """``weight[layer][bits]`` and ``activation[layer][bits]``: KL divergence in nats between the answers of the float
    network and those with only the layer's weights, or only its input, at ``bits``; mean over ``images``."""

    images: int
    weight: dict[str, dict[int, float]]
    activation: dict[str, dict[int, float]]

    def table(self, what: What, layer: str) -> dict[int, float]:
        """Divergence by bits, never falling with fewer of them."""
        found = (self.weight if what == "weight" else self.activation)[layer]
        rising, largest = {}, 0.0
        for bits in sorted(found, reverse=True):
            largest = rising[bits] = max(found[bits], largest)
        return rising


def sensitivities(
    simulator: Simulator,
    batches: Iterable[Tensor],
    cache: Path | None = None,
    what: Sequence[What] = ("weight", "activation"),
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivities:
    """Measure every layer at every bit-width, or read what was measured before.

    Args:
        batches: normalised images ``[N, C, H, W]``.
        cache: a JSON file that belongs to this network and these images.
        what: the tables that are wanted; another stays empty.
        on_step: told how many weights and inputs are measured, from none on, and of how many; not where they are read.

    Raises:
        BadFileError: the cache is broken.
    """
    if cache is not None and cache.exists():
        return read_document(cache, Sensitivities, "sensitivities")
    found = _measured(simulator, list(batches), what, on_step)
    if cache is not None:
        write_document(cache, found)
    return found


def _measured(
    simulator: Simulator, batches: list[Tensor], what: Sequence[What], on_step: Callable[[int, int], None]
) -> Sensitivities:
    graph, points = simulator.graph, simulator.points
    constants = simulator.floats
    batches = [channels_last(x) for x in batches]
    layers = [layer for layer in graph.layers if layer.name in points.layer_input]
    owners = tuple(dict.fromkeys(points.layer_input.values())) if "activation" in what else ()
    total = len(owners) + (len(layers) if "weight" in what else 0)
    weight: dict[str, dict[int, float]] = {layer.name: {} for layer in layers}
    inputs: dict[str, dict[int, float]] = {}
    on_step(0, total)
    with torch.no_grad():
        answers = [run(graph, x, constants) for x in batches]
        for done, layer in enumerate(layers if "weight" in what else (), 1):
            for bits in BITS:
                rounded = constants | {layer.inputs[1]: channels_last(dequantize(simulator.weight(layer, bits)))}
                weight[layer.name][bits] = divergence(answers, [run(graph, x, rounded) for x in batches])
            on_step(done, total)
        for done, owner in enumerate(owners, total - len(owners) + 1):
            inputs[owner] = {}
            for bits in BITS:
                how = simulator.range(owner, bits)
                on_value = lambda name, value, owner=owner, how=how: (  # noqa: E731
                    fake_quantize(value, how) if points.owner.get(name) == owner else value
                )
                inputs[owner][bits] = divergence(answers, [run(graph, x, constants, on_value) for x in batches])
            on_step(done, total)
    activation = {
        layer.name: inputs[points.layer_input[layer.name]]
        for layer in layers
        if points.layer_input[layer.name] in inputs
    }
    return Sensitivities(images=sum(len(x) for x in batches), weight=weight, activation=activation)
