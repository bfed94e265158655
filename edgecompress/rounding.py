"""Learned rounding of weights: up or down is chosen for what a layer answers, not for each weight alone (AdaRound)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from edgecompress.errors import BadDataError
from edgecompress.graph import Node
from edgecompress.interpret import apply, float_constants, run
from edgecompress.quantize import QuantizedGraph, QuantizedWeight, fake_quantize, rounded_constants

_STRETCH = (-0.1, 1.1)  # the sigmoid is stretched beyond its ends, so that it reaches them
_BATCH = 32


def learned_rounding(
    quantized: QuantizedGraph, batches: Iterable[Tensor], *, steps: int = 200, seed: int = 0
) -> QuantizedGraph:
    """Choose for every weight which of its two neighbours on the grid it takes (Nagel et al. 2020, eq. 21 to 25).

    Layer by layer, behind those that are rounded already: the squared difference from what the float layer answers is
    brought down by Adam over a soft choice that is pushed to 0 or 1. Scales and bits stay; a layer that answers no better
    than before keeps its nearest rounding.

    Args:
        batches: normalised calibration images ``[N, C, H, W]``; a few hundred do.
        steps: of Adam for every layer.

    Raises:
        BadDataError: there is no image.
    """
    parts = list(batches)
    if not parts:
        raise BadDataError("There is no image to learn the rounding from. Give at least one batch.")
    x = torch.cat(parts)
    generator = torch.Generator().manual_seed(seed)
    weights = dict(quantized.weights)
    floats = float_constants(quantized.graph)
    for layer in quantized.graph.layers:
        if layer.name not in weights or layer.inputs[1] not in quantized.graph.constants:
            continue
        now = replace(quantized, weights=weights)
        inputs, wanted = _inputs(now, x, layer), _answers(quantized, x, layer, floats)
        weights[layer.name] = _rounded(layer, floats, weights[layer.name], inputs, wanted, steps, generator)
    return replace(quantized, weights=weights)


def _inputs(quantized: QuantizedGraph, x: Tensor, layer: Node) -> Tensor:
    """What ``layer`` reads in the network as it is rounded so far."""
    kept: list[Tensor] = []

    def watch(name: str, value: Tensor) -> Tensor:
        value = fake_quantize(value, quantized.tensors.get(name))
        if name == layer.inputs[0]:
            kept.append(value)
        return value

    with torch.no_grad():
        constants = rounded_constants(quantized)
        for part in torch.split(x, 100):
            run(quantized.graph, part, constants, watch)
    return torch.cat(kept)


def _answers(quantized: QuantizedGraph, x: Tensor, layer: Node, floats: dict[str, Tensor]) -> Tensor:
    """What the float network's ``layer`` answers."""
    kept: list[Tensor] = []

    def watch(name: str, value: Tensor) -> Tensor:
        if name == layer.outputs[0]:
            kept.append(value)
        return value

    with torch.no_grad():
        for part in torch.split(x, 100):
            run(quantized.graph, part, floats, watch)
    return torch.cat(kept)


def _rounded(
    layer: Node, floats: dict[str, Tensor], start: QuantizedWeight, inputs: Tensor, wanted: Tensor, steps: int,
    generator: torch.Generator,
) -> QuantizedWeight:  # fmt: skip
    scale = torch.from_numpy(start.scale).view(-1, *(1,) * (start.values.ndim - 1))
    high = 2 ** (start.bits - 1) - 1
    exact = floats[layer.inputs[1]] / scale
    below, rest = exact.floor(), exact - exact.floor()
    pruned = floats[layer.inputs[1]] == 0
    low_end, high_end = _STRETCH
    choice = torch.logit((rest - low_end) / (high_end - low_end)).requires_grad_()
    optimizer = torch.optim.Adam([choice], lr=1e-2)
    bias = floats[layer.inputs[2]] if len(layer.inputs) > 2 and layer.inputs[2] else None
    spread = float(wanted.var()) + 1e-12

    def error(values: Tensor, rows: Tensor) -> Tensor:
        weight = (values * scale).masked_fill(pruned, 0)
        return (apply(layer, [inputs[rows], weight, bias]) - wanted[rows]).pow(2).mean() / spread

    def up() -> Tensor:
        return (torch.sigmoid(choice) * (high_end - low_end) + low_end).clamp(0, 1)

    for step in range(steps):
        rows = torch.randint(0, len(inputs), (min(_BATCH, len(inputs)),), generator=generator)
        loss = error((below + up()).clamp(-high, high), rows)
        if step >= steps // 5:  # the choice is free at first, then pushed to its ends ever more sharply
            beta = 20 - 18 * (step - steps // 5) / (steps - steps // 5)
            loss = loss + 0.01 * (1 - (2 * up() - 1).abs().pow(beta)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        found = (below + (up() > 0.5)).clamp(-high, high).masked_fill(pruned, 0)
        every = torch.arange(len(inputs))
        nearest = torch.from_numpy(start.values).float()
        if not error(found, every) < error(nearest, every):
            return start
    return replace(start, values=found.numpy().astype(np.int8))
