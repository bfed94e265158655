"""Which channels of a group matter: criteria by name. Some look at weights alone, some at training images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from edgecompress.cuts import WEIGHTED, Cut, owner_of
from edgecompress.data import Dataset
from edgecompress.errors import UnknownNameError, UsageError
from edgecompress.trace import Traced

TAYLOR_IMAGES, TAYLOR_BATCH = 500, 25
CHIP_IMAGES = 100


class Importance(Protocol):
    """A criterion: per group id a tensor ``[width]``; larger is more important. Scores compare within a group only."""

    def __call__(self, model: nn.Module, traced: Traced, data: Dataset | None = None, /) -> dict[str, Tensor]: ...


def l2_importance(model: nn.Module, traced: Traced, data: Dataset | None = None) -> dict[str, Tensor]:
    """Norm of all weights that a channel owns, summed over its dependency group (Fang et al. 2023, DepGraph).

    Returns:
        per group id a tensor ``[width]``; larger is more important.
    """
    return _weight_importance(model, traced, lambda weight: weight.pow(2).sum(1), lambda total: total.sqrt())


def l1_importance(model: nn.Module, traced: Traced, data: Dataset | None = None) -> dict[str, Tensor]:
    """Sum of absolute weights of a channel over its dependency group (Li et al. 2017; AMC's criterion)."""
    return _weight_importance(model, traced, lambda weight: weight.abs().sum(1), lambda total: total)


def _weight_importance(
    model: nn.Module, traced: Traced, reduce: Callable[[Tensor], Tensor], finish: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    scores = _zeros(traced)
    for cut in traced.cuts:
        owner = owner_of(model, cut.module)
        weight = getattr(owner, "weight", None)
        if weight is None or weight.dim() < 2:
            continue
        rows = reduce(_slices(owner, weight.detach(), cut.side))
        # Channels at equal places of a grouped convolution's groups are read by the same slices of its weight.
        scores[cut.group].index_add_(0, cut.channel, rows[cut.index % len(rows)])
    return {key: finish(value) for key, value in scores.items()}


def bn_scale_importance(model: nn.Module, traced: Traced, data: Dataset | None = None) -> dict[str, Tensor]:
    """Sum of the absolute scales of the BatchNorm layers in a group (Liu et al. 2017, Network Slimming).

    A group without such a layer is scored by `l2_importance`.
    """
    scores, scaled = _zeros(traced), set()
    for cut in traced.cuts:
        owner = owner_of(model, cut.module)
        if isinstance(owner, nn.modules.batchnorm._BatchNorm) and owner.affine:
            scores[cut.group].index_add_(0, cut.channel, owner.weight.detach().abs()[cut.index])
            scaled.add(cut.group)
    others = l2_importance(model, traced) if len(scaled) < len(scores) else {}
    return {key: value if key in scaled else others[key] for key, value in scores.items()}


def taylor_importance(model: nn.Module, traced: Traced, data: Dataset | None = None) -> dict[str, Tensor]:
    """How the loss changes to first order when nobody reads the channel (Molchanov et al. 2017, equation 8).

    The change is ``sum(gradient * weight)`` over the weights that read the channel, which equals the gradient times
    activation of that paper; root mean square over small batches of training images. One pass, nothing is trained.

    Raises:
        UsageError: there are no images.
    """
    data = _needed(data, "taylor")
    model = copy.deepcopy(model).eval().requires_grad_(True)
    scores = _zeros(traced)
    with torch.enable_grad():
        for x, y in _images(data, TAYLOR_IMAGES, TAYLOR_BATCH):
            model.zero_grad()
            data.task.loss(model(x), y, "mean").backward()  # type: ignore[no-untyped-call]
            change = _zeros(traced)
            for cut, reader in _readers(model, traced):
                if reader.weight.grad is None:
                    continue
                rows = _slices(reader, (reader.weight.grad * reader.weight).detach(), "in").sum(1)
                change[cut.group].index_add_(0, cut.channel, rows[cut.index % len(rows)])
            for key, value in change.items():
                scores[key] += value.pow(2)
    return {key: value.sqrt() for key, value in scores.items()}


def chip_importance(model: nn.Module, traced: Traced, data: Dataset | None = None) -> dict[str, Tensor]:
    """Independence of a channel's activations from those of the others in its group (after Sui et al. 2021, CHIP).

    CHIP scores channel i by how much the nuclear norm of the activations ``A [channels, pixels]`` of one image falls
    when row i is zeroed. We take the share that row i has in that norm, ``((A A^T)^(1/2))_ii``, which needs one
    decomposition where theirs needs one for each channel; it bounds theirs from above and orders copies below
    channels that stand alone as theirs does. Mean over images, and over the layers that read the group.

    Raises:
        UsageError: there are no images.
    """
    data = _needed(data, "chip")
    model = copy.deepcopy(model).eval()
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, layer: nn.Module, x: Tensor) -> None:
        # A linear layer's channels come last, and what lies before them, images too, are its pixels.
        rows = x.flatten(0, -2).t()[None] if isinstance(layer, nn.Linear) else x.flatten(2)
        left, sizes, _ = torch.linalg.svd(rows, full_matrices=False)
        seen.setdefault(name, []).append((left.pow(2) * sizes[:, None]).sum(2).sum(0))

    names = {cut.module for cut, _ in _readers(model, traced)}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda layer, args, name=name: note(name, layer, args[0]))
    with torch.no_grad():
        for x, _ in _images(data, CHIP_IMAGES, TAYLOR_BATCH):
            model(x)
    scores = _zeros(traced)
    for cut, _ in _readers(model, traced):
        if cut.module in seen:
            share = torch.stack(seen[cut.module]).sum(0)
            scores[cut.group].index_add_(0, cut.channel, share[cut.index] / share.sum().clamp(min=1e-12))
    return scores


IMPORTANCE: dict[str, Importance] = {
    "l2": l2_importance,
    "l1": l1_importance,
    "bn-scale": bn_scale_importance,
    "taylor": taylor_importance,
    "chip": chip_importance,
}


def importance_by_name(name: str) -> Importance:
    """Look up an importance criterion.

    Raises:
        UnknownNameError: no such criterion.
    """
    if name not in IMPORTANCE:
        raise UnknownNameError("importance", name, IMPORTANCE)
    return IMPORTANCE[name]


def _zeros(traced: Traced) -> dict[str, Tensor]:
    return {group.id: torch.zeros(group.width) for group in traced.network.groups}


def _slices(owner: nn.Module | nn.Parameter, weight: Tensor, side: str) -> Tensor:
    """A weight (or its gradient) as ``[channels of that side, the rest]``."""
    axis = 0 if side == "out" or weight.shape[1] == 1 else 1
    if isinstance(owner, nn.ConvTranspose2d):
        axis = 1 - axis
    return weight.transpose(0, axis).flatten(1)


def _readers(model: nn.Module, traced: Traced) -> Iterator[tuple[Cut, nn.Conv2d | nn.ConvTranspose2d | nn.Linear]]:
    """The cuts of layers that read channels, with their layer."""
    for cut in traced.cuts:
        owner = owner_of(model, cut.module)
        if cut.side == "in" and isinstance(owner, WEIGHTED):
            yield cut, owner


def _images(data: Dataset, images: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Training images without augmentation, drawn alike every time."""
    rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:images]
    return data.batches(data.train, batch_size, rows=rows)


def _needed(data: Dataset | None, name: str) -> Dataset:
    if data is None:
        raise UsageError(f"The importance '{name}' looks at training images; give the data, or take 'l2'.")
    return data
