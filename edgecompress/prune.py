"""A policy becomes a physically smaller network: which channels go, and the statistics that must be taken anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from edgecompress.cuts import cut_channels, owner_of
from edgecompress.data import Dataset
from edgecompress.errors import UnknownNameError, UsageError
from edgecompress.trace import Traced

Importance = Callable[[nn.Module, Traced], dict[str, Tensor]]


def l2_importance(model: nn.Module, traced: Traced) -> dict[str, Tensor]:
    """Norm of all weights that a channel owns, summed over its dependency group (Fang et al. 2023, DepGraph).

    Returns:
        per group id a tensor ``[width]``; larger is more important.
    """
    return _weight_importance(model, traced, lambda weight: weight.pow(2).sum(1), lambda total: total.sqrt())


def l1_importance(model: nn.Module, traced: Traced) -> dict[str, Tensor]:
    """Sum of absolute weights of a channel over its dependency group (Li et al. 2017; AMC's criterion)."""
    return _weight_importance(model, traced, lambda weight: weight.abs().sum(1), lambda total: total)


def _weight_importance(
    model: nn.Module, traced: Traced, reduce: Callable[[Tensor], Tensor], finish: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    scores = {group.id: torch.zeros(group.width) for group in traced.network.groups}
    for cut in traced.cuts:
        owner = owner_of(model, cut.module)
        weight = getattr(owner, "weight", None)
        if weight is None or weight.dim() < 2:
            continue
        axis = 0 if cut.side == "out" or weight.shape[1] == 1 else 1
        if isinstance(owner, nn.ConvTranspose2d):
            axis = 1 - axis
        rows = reduce(weight.detach().transpose(0, axis).flatten(1))
        # Channels at equal places of a grouped convolution's groups are read by the same slices of its weight.
        scores[cut.group].index_add_(0, cut.channel, rows[cut.index % len(rows)])
    return {key: finish(value) for key, value in scores.items()}


IMPORTANCE: dict[str, Importance] = {"l2": l2_importance, "l1": l1_importance}


def importance_by_name(name: str) -> Importance:
    """Look up an importance criterion.

    Raises:
        UnknownNameError: no such criterion.
    """
    if name not in IMPORTANCE:
        raise UnknownNameError("importance", name, IMPORTANCE)
    return IMPORTANCE[name]


def prune(
    model: nn.Module, traced: Traced, keep_channels: Mapping[str, int], scores: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Return a smaller copy of ``model``; the most important channels of each group stay, in their order.

    Args:
        model: the network that was traced. It is not changed.
        keep_channels: channels left per group id; groups that are not named keep theirs.
        scores: per group ``[width]``; by default `l2_importance`.

    Raises:
        UsageError: a group does not exist, is not prunable, or is asked for a width it cannot have.
    """
    groups = {group.id: group for group in traced.network.groups}
    for key, count in keep_channels.items():
        if key not in groups:
            raise UnknownNameError("channel group", key, groups)
        if not 1 <= count <= groups[key].width:
            raise UsageError(
                f"Group {key} has {groups[key].width} channels; it cannot keep {count}. Choose 1 to {groups[key].width}."
            )
        if count < groups[key].width and not groups[key].prunable:
            raise UsageError(
                f"Group {key} cannot be pruned: {groups[key].reason}. Keep its {groups[key].width} channels."
            )
    scores = scores or l2_importance(model, traced)
    keep = {
        key: torch.sort(torch.topk(scores[key], count).indices).values
        for key, count in keep_channels.items()
        if count < groups[key].width
    }
    smaller = copy.deepcopy(model)
    cut_channels(smaller, list(traced.cuts), keep)
    return smaller


def reestimate_batchnorm(
    model: nn.Module, data: Dataset, *, images: int = 300, seed: int = 0, augment: bool = True
) -> None:
    """Replace BatchNorm statistics by the mean over ``images`` training images, in place; no weight changes.

    For a network whose channels were just cut. Never after fine-tuning with a few images: it costs 1 to 3 points.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data.train), generator=generator)[:images]
    reestimate_on(model, data.batches(data.train, 150, generator=generator, augment=augment, rows=rows))


def reestimate_on(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replace BatchNorm statistics by their mean over ``batches``, in place; no weight changes."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    was_training = model.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    model.train()
    with torch.no_grad():
        for x, _ in batches:
            if len(x) > 1:
                model(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)
