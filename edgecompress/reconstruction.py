"""Least squares in place of training: a layer whose inputs were cut computes, as nearly as it can, what it did before.

He, Zhang and Sun 2017 (*Channel Pruning*, equation 4), for any kernel: patches at sampled positions take the place of
their 1x1 inputs, a ridge term holds the weights where the images say nothing, and the moments of the dense network's
patches are gathered once, so that a policy costs one linear system for each layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecompress.cuts import lost
from edgecompress.data import Dataset
from edgecompress.trace import Traced

IMAGES = 300
POSITIONS = 20  # per image and layer: neighbouring patches say nearly the same
RIDGE = 1e-3  # of the mean variance of an input
MOST_INPUTS = 4608  # 512 channels x 3 x 3: its moments take 85 MB


@dataclass(frozen=True)
class Moments:
    """What a layer reads in the dense network: ``mean [D]`` and ``covariance [D, D]``; D = input channels x kernel."""

    mean: Tensor
    covariance: Tensor


def input_moments(model: nn.Module, traced: Traced, data: Dataset, *, seed: int = 0) -> dict[str, Moments]:
    """Moments of the patches of every plain convolution and linear layer whose inputs may be cut.

    Left out, and so never reconstructed: grouped, depthwise and transposed convolutions, padding other than zeros, and
    layers with more than `MOST_INPUTS` inputs.
    """
    widths = {group.id for group in traced.network.groups if group.prunable}
    names = {cut.module for cut in traced.cuts if cut.side == "in" and cut.group in widths}
    dense = copy.deepcopy(model).eval()
    layers = {name: layer for name, layer in dense.named_modules() if name in names and _inputs_of(layer)}
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    def note(name: str, layer: nn.Module, x: Tensor) -> None:
        rows = _patches(layer, x, generator).double()
        count, total, square = sums.get(name, (0, torch.tensor(0.0), torch.tensor(0.0)))
        sums[name] = (count + len(rows), total + rows.sum(0), square + rows.t() @ rows)

    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda layer, args, name=name: note(name, layer, args[0]))
    picked = torch.randperm(len(data.train), generator=generator)[:IMAGES]
    with torch.no_grad():
        for x, _ in data.batches(data.train, 50, rows=picked):
            dense(x)
    found = {}
    for name, (count, total, square) in sums.items():
        mean = total / count
        found[name] = Moments(mean.float(), (square / count - mean[:, None] * mean).float())
    return found


def reconstruct(
    smaller: nn.Module, dense: nn.Module, traced: Traced, keep: Mapping[str, Tensor], moments: Mapping[str, Moments]
) -> None:
    """Refit, in place, the weights of the layers of ``smaller`` that lost inputs.

    ``min_W E |W x_kept - W_dense x|^2 + ridge |W - W_kept|^2`` about the means; what the means differ by goes into the
    bias, or, without one, into the BatchNorm statistics that are taken anew afterwards.

    Args:
        keep: the channels that stayed, per group id, as they were cut.
    """
    gone: dict[str, dict[str, Tensor]] = {}
    for name, side, index in lost(traced.cuts, keep):
        gone.setdefault(name, {})[side] = index
    for name, sides in gone.items():
        if "in" in sides and name in moments:
            _refit(smaller.get_submodule(name), dense.get_submodule(name), sides, moments[name])


def _refit(layer: nn.Module, dense: nn.Module, gone: Mapping[str, Tensor], moments: Moments) -> None:
    assert isinstance(layer, nn.Conv2d | nn.Linear) and isinstance(dense, nn.Conv2d | nn.Linear)
    weight = dense.weight.detach().double().flatten(2) if dense.weight.dim() == 4 else dense.weight.detach().double()
    weight = weight.view(len(weight), dense.weight.shape[1], -1)
    outputs, inputs = (
        _others(size, gone.get(side)) for side, size in (("out", weight.shape[0]), ("in", weight.shape[1]))
    )
    area = weight.shape[2]
    rows = (inputs[:, None] * area + torch.arange(area)).flatten()
    wanted = weight[outputs].flatten(1)
    covariance = moments.covariance[rows].double()  # [kept, all]
    own = covariance[:, rows]
    start = wanted[:, rows]
    ridge = RIDGE * own.diagonal().mean().clamp(min=1e-12) * torch.eye(len(rows), dtype=torch.float64)
    missing = covariance @ wanted.t() - own @ start.t()
    refitted = start + torch.linalg.solve(own + ridge, missing).t()
    with torch.no_grad():
        layer.weight.copy_(refitted.view(layer.weight.shape))
        if layer.bias is not None:
            mean = moments.mean.double()
            layer.bias.add_((wanted @ mean - refitted @ mean[rows]).float())


def _others(size: int, gone: Tensor | None) -> Tensor:
    kept = torch.ones(size, dtype=torch.bool)
    if gone is not None:
        kept[gone] = False
    return kept.nonzero().flatten()


def _inputs_of(layer: nn.Module) -> int:
    """Numbers that one output of ``layer`` is a weighted sum of; 0 for a layer that is left out."""
    if isinstance(layer, nn.Linear):
        inputs = layer.in_features
    elif isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        inputs = layer.weight[0].numel()
    else:
        return 0
    return inputs if inputs <= MOST_INPUTS else 0


def _patches(layer: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    """What ``layer`` reads at sampled positions of ``x``: ``[images * positions, D]``, in the order of its weight."""
    if isinstance(layer, nn.Linear):
        rows = x.reshape(len(x), -1, x.shape[-1])
        if rows.shape[1] > POSITIONS:
            rows = rows[:, torch.randperm(rows.shape[1], generator=generator)[:POSITIONS]]
        return rows.flatten(0, 1)
    assert isinstance(layer, nn.Conv2d)
    padded = F.pad(x, layer._reversed_padding_repeated_twice)
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    height, width = ((s - d * (k - 1) - 1) // t + 1 for s, d, k, t in zip(
        padded.shape[2:], (dh, dw), (kh, kw), (sh, sw), strict=True))  # fmt: skip
    picked = torch.randperm(height * width, generator=generator)[:POSITIONS]
    rows = (picked // width * sh)[:, None] + (torch.arange(kh) * dh).repeat_interleave(kw)
    columns = (picked % width * sw)[:, None] + (torch.arange(kw) * dw).repeat(kh)
    found = padded[:, :, rows, columns]  # [N, C, positions, kernel]
    return found.transpose(1, 2).flatten(0, 1).flatten(1)
