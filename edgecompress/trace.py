"""A network becomes layers with weights and channel groups: what stage 1 prunes, and what a cost is counted from."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgecompress.channel_groups import channel_groups
from edgecompress.cuts import WEIGHTED, Cut
from edgecompress.errors import BadModelError
from edgecompress.model_checks import check_batch, check_training_layers, check_weights, run_once
from edgecompress.spec import ChannelGroup, ChannelTerm, Kind, LayerSpec, Network


@dataclass(frozen=True)
class _Extent:
    """Pixels of a layer's input and output, and how many positions its weight is applied at in one image."""

    input_hw: tuple[int, int]
    output_hw: tuple[int, int]
    positions: int
    runs: int = 1


@dataclass(frozen=True)
class Traced:
    """The serialisable `Network` and the cuts that `prune.prune` carries out. A group is named after its first layer."""

    network: Network
    cuts: tuple[Cut, ...]


def fingerprint(model: nn.Module) -> str:
    """Twelve hexadecimal digits of the names and shapes of all tensors: equal for equal architectures."""
    text = ";".join(f"{name}{tuple(value.shape)}" for name, value in model.state_dict().items())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def weights_digest(model: nn.Module) -> str:
    """Twelve hexadecimal digits of the values of all tensors."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def trace(model: nn.Module, input_shape: tuple[int, ...], name: str, *, shared: bool = False) -> Traced:
    """Find the layers with weights and the channel groups that must be cut together.

    Args:
        model: a network on the CPU that maps ``[N, C, H, W]`` to tensors: one, or a list or dictionary of them. It is not
            changed.
        input_shape: ``(C, H, W)`` of one image.
        name: goes into the result.
        shared: take layers that run several times in one forward pass (the heads of a RetinaNet): their MACs are those of
            all runs, their pixels those of the largest. Stage 2 and the exporters want one module for each use.

    Raises:
        BadModelError: the network cannot be traced or has no layer with weights, its weights are not finite, elsewhere than
            on the CPU or shared by layers, it has hooks, branches on values, or depends on the size of the batch.
    """
    check_weights(model, name)
    model = copy.deepcopy(model).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # groups are read off autograd, which does not see frozen layers
    example = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))
    extents = _extents(model, example, name)
    if not extents:
        raise BadModelError(f"{name} has no convolution or linear layer that runs; there is nothing to compress.")
    twice = [key for key, extent in extents.items() if extent.runs > 1]
    if twice and not shared:
        raise BadModelError(
            f"The layer '{twice[0]}' of {name} is used {extents[twice[0]].runs} times in one forward pass. "
            "Give each use its own module."
        )
    check_training_layers(model, example, name, set(extents))
    groups, cuts = channel_groups(model, example, name, list(extents))
    layers = tuple(_layer(key, model.get_submodule(key), extents[key], cuts, groups) for key in extents)
    counted = sum(layer.params for layer in layers) + sum(g.norm_params_per_channel * g.width for g in groups)
    network = Network(
        model=f"{name}-{fingerprint(model)}",
        input_shape=input_shape,
        layers=layers,
        groups=groups,
        fixed_params=sum(parameter.numel() for parameter in model.parameters()) - counted,
    )
    return Traced(network, cuts)


def _extents(model: nn.Module, example: Tensor, name: str) -> dict[str, _Extent]:
    """The extent of every layer with weights, in the order in which they run."""
    found: dict[str, list[_Extent]] = {}

    def note(key: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        first, last = (1, -1) if isinstance(module, nn.Linear) else (2, None)  # a linear layer has its channels last
        spatial = [(int(t.shape[first]), int(t.shape[first + 1])) if t.dim() == 4 else (1, 1) for t in (x, y)]
        applied = (x if isinstance(module, nn.ConvTranspose2d) else y).shape[first:last]
        found.setdefault(key, []).append(_Extent(spatial[0], spatial[1], math.prod(applied)))

    handles = [
        module.register_forward_hook(lambda module, x, y, key=key: note(key, module, x[0], y))
        for key, module in model.named_modules()
        if isinstance(module, WEIGHTED)
    ]
    try:
        outputs = run_once(model, example, name)
    finally:
        for handle in handles:
            handle.remove()
    check_batch(model, example, outputs, name)
    return {key: _together(runs) for key, runs in found.items()}


def _together(runs: list[_Extent]) -> _Extent:
    largest = max(runs, key=lambda extent: extent.positions)
    return _Extent(largest.input_hw, largest.output_hw, sum(extent.positions for extent in runs), len(runs))


def _layer(
    name: str,
    module: nn.Module,
    extent: _Extent,
    cuts: tuple[Cut, ...],
    groups: tuple[ChannelGroup, ...],
) -> LayerSpec:
    input_hw, output_hw = extent.input_hw, extent.output_hw
    widths = {group.id: group.width for group in groups if group.prunable}
    terms: dict[str, list[ChannelTerm]] = {"in": [], "out": []}
    for cut in cuts:
        if cut.module == name and cut.group in widths:
            terms[cut.side].append(ChannelTerm(group=cut.group, per_channel=len(cut.index) // widths[cut.group]))
    params = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    if isinstance(module, nn.Linear):
        return LayerSpec(
            name=name, kind="linear", in_channels=module.in_features, out_channels=module.out_features,
            macs=module.in_features * module.out_features * extent.positions, params=params, input_hw=input_hw,
            output_hw=output_hw, in_terms=tuple(terms["in"]), out_terms=tuple(terms["out"]),
        )  # fmt: skip
    assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    kind: Kind = "conv"
    if isinstance(module, nn.ConvTranspose2d):
        kind = "transposed"
    elif module.groups == module.in_channels and module.groups > 1:
        kind = "depthwise"
        terms["in"] = terms["in"] or terms["out"]
    elif module.groups > 1:
        kind = "grouped"
    kernel = (int(module.kernel_size[0]), int(module.kernel_size[1]))
    return LayerSpec(
        name=name, kind=kind, in_channels=module.in_channels, out_channels=module.out_channels, kernel=kernel,
        stride=(int(module.stride[0]), int(module.stride[1])), groups=module.groups, input_hw=input_hw, output_hw=output_hw,
        macs=module.in_channels // module.groups * module.out_channels * kernel[0] * kernel[1] * extent.positions,
        params=params, in_terms=tuple(terms["in"]), out_terms=tuple(terms["out"]),
    )  # fmt: skip
