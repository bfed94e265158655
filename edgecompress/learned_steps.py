"""Quantisation-aware training with learned step sizes (LSQ): weights, biases and steps move together at fixed bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgecompress.interpret import float_constants, run
from edgecompress.quantize import (
    QuantizedGraph,
    QuantizedWeight,
    clip_limit,
    find_points,
    steps_to,
    without_absorbed,
)


class LearnedSteps(nn.Module):
    """The quantised network as a trainable module: weights, biases and step sizes learn together (LSQ, Esser 2020).

    Weights that are zero in the graph (element-wise pruned) stay zero. Under autocast everything is rounded in float32, and
    convolutions read the result in fewer bits. `finished` gives the trained `QuantizedGraph`, on whatever device it trained.
    """

    def __init__(self, quantized: QuantizedGraph) -> None:
        super().__init__()
        self._start = quantized
        self._points = find_points(quantized.graph)
        graph = quantized.graph
        self._walked = without_absorbed(graph, self._points)
        self._names = {name: f"p{number}" for number, name in enumerate(graph.constants)}
        self.constants = nn.ParameterDict()
        self.steps = nn.ParameterDict()
        trained = {name for layer in graph.layers for name in layer.inputs[1:] if name}
        for name, constant in float_constants(graph).items():
            # Not channels last: torch 2.14.1 aborted in the backward pass of narrow layers in that layout (AVX2).
            self.constants[self._names[name]] = nn.Parameter(constant.clone(), requires_grad=name in trained)
        self._masks = {layer.name: f"mask{number}" for number, layer in enumerate(graph.layers)}
        for node in graph.layers:
            alive = torch.from_numpy(graph.constants[node.inputs[1]] != 0)
            self.register_buffer(self._masks[node.name], alive, persistent=False)
        self._step_names: dict[str, str] = {}
        self._ends = {value: clip_limit(graph, graph.producer(value)) for value in self._points.signed}
        for layer, weight in quantized.weights.items():
            self._add_step(f"w:{layer}", torch.from_numpy(weight.scale.copy()))
        for value, owner in self._points.owner.items():
            if value == owner and value not in self._points.joined:
                self._add_step(f"a:{owner}", torch.tensor(quantized.tensors[owner].scale))

    def _add_step(self, key: str, value: Tensor) -> None:
        self._step_names[key] = f"s{len(self._step_names)}"
        self.steps[self._step_names[key]] = nn.Parameter(value.log())

    def _mask(self, layer: str) -> Tensor:
        return self.get_buffer(self._masks[layer])

    def _step(self, key: str) -> Tensor:
        kind, _, owner = key.partition(":")
        if kind == "a" and owner in self._points.joined:
            return self._step(f"a:{self._points.joined[owner]}")
        # Learned in the logarithm, so that a step stays positive and moves in proportion to itself.
        step: Tensor = self.steps[self._step_names[key]].exp()
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
            weight = constants[layer.inputs[1]] * self._mask(layer.name)
            step = self._step(f"w:{layer.name}").view(-1, *(1,) * (weight.dim() - 1))
            constants[layer.inputs[1]] = _round_to_grid(weight, step, -high, high)
            owner = self._points.layer_input.get(layer.name)
            if owner is not None and len(layer.inputs) > 2 and layer.inputs[2]:
                # The artifact rounds biases to int32 at scale_x * scale_w: training sees the same.
                grid = (self._step(f"w:{layer.name}") * self._step(f"a:{owner}")).detach()
                bias = constants[layer.inputs[2]]
                constants[layer.inputs[2]] = bias + ((bias / grid).round() * grid - bias).detach()

        def on_grid(name: str, value: Tensor) -> Tensor:
            if self._points.owner.get(name) != name:
                return value
            low, high = self._start.tensors[name].limits
            return _round_to_grid(value, self._step(f"a:{name}"), low, high)

        return run(self._walked, x, constants, on_grid)

    def finished(self) -> QuantizedGraph:
        """The trained integers, steps and biases."""
        graph = self._start.graph
        constants = {
            name: self.constants[key].detach().cpu().contiguous().numpy().copy() for name, key in self._names.items()
        }
        weights = dict(self._start.weights)
        with torch.no_grad():
            for layer in graph.layers:
                if layer.name not in weights:
                    continue
                bits = weights[layer.name].bits
                high = 2 ** (bits - 1) - 1
                step = self._step(f"w:{layer.name}").cpu()
                weight = torch.from_numpy(constants[layer.inputs[1]]) * self._mask(layer.name).cpu()
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
    """Rounding with the straight-through gradient for ``value`` and LSQ's gradient for ``step`` (Esser 2020, eq. 3).

    In float32 also where the passes around it are of fewer bits: bfloat16 has too few to tell two of 255 steps apart.
    """
    damp = 1.0 / (value.numel() / max(step.numel(), 1) * high) ** 0.5
    result: Tensor = _RoundToGrid.apply(value.float(), step, low, high, damp)
    return result


class _RoundToGrid(torch.autograd.Function):
    """By hand: autograd would keep five tensors of the activation's size, and pass over it twice as often."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, step: Tensor, low: int, high: int, damp: float) -> Tensor:
        scaled = value / step
        rounded = scaled.round().clamp_(low, high)
        ctx.save_for_backward(scaled, rounded, step)
        ctx.ends, ctx.damp = (low, high), damp
        return rounded * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (gradient,) = gradients
        scaled, rounded, step = ctx.saved_tensors
        low, high = ctx.ends
        through = gradient * ((scaled >= low) & (scaled <= high))
        of_step = (gradient * rounded).sub_(scaled * through).sum_to_size(step.shape)
        return through, of_step * ctx.damp, None, None, None


__all__ = ["LearnedSteps"]
