"""A policy becomes a physically smaller network: which channels go, and the statistics that must be taken anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from edgecompress.cuts import cut_channels
from edgecompress.data import Dataset
from edgecompress.errors import UnknownNameError, UsageError
from edgecompress.importance import importance_by_name, l2_importance
from edgecompress.reconstruction import Moments, input_moments
from edgecompress.reconstruction import reconstruct as refit
from edgecompress.spec import CompressionPolicy
from edgecompress.trace import Traced


def prune(
    model: nn.Module,
    traced: Traced,
    keep_channels: Mapping[str, int],
    scores: Mapping[str, Tensor] | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> nn.Module:
    """Return a smaller copy of ``model``; the most important channels of each group stay, in their order.

    Args:
        model: the network that was traced. It is not changed.
        keep_channels: channels left per group id; groups that are not named keep theirs.
        scores: per group ``[width]``; by default `l2_importance`.
        moments: of the dense network's layers (`input_moments`); the layers that lost inputs are then refitted by least
            squares. BatchNorm statistics must be taken anew afterwards.

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
    if moments is not None:
        refit(smaller, model, traced, keep, moments)
    return smaller


def pruner(
    model: nn.Module, traced: Traced, data: Dataset, *, importance: str = "l2", reconstruct: bool = True
) -> Callable[[CompressionPolicy], nn.Module]:
    """The function that builds a policy of ``model``: channels cut, single weights masked, layers refitted.

    What all policies share (scores, moments of the dense network) is measured here, once. A policy that keeps a fraction
    of a layer's single weights loses the smallest. BatchNorm statistics of the built network must be taken anew.

    Raises:
        UnknownNameError: no such importance.
    """
    scores = importance_by_name(importance)(model, traced, data)
    moments = input_moments(model, traced, data) if reconstruct else None

    def build(policy: CompressionPolicy) -> nn.Module:
        smaller = prune(model, traced, policy.keep_channels, scores, moments)
        for name, choice in policy.layers.items():
            if choice.keep_elements < 1:
                mask_smallest(smaller.get_submodule(name), choice.keep_elements)
        return smaller

    return build


def mask_smallest(layer: nn.Module, keep: float) -> None:
    """Set all but the ``keep`` fraction of largest weights of ``layer`` to zero, in place."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    kept = max(1, round(keep * weight.numel()))
    mask = torch.zeros(weight.numel())
    mask[weight.detach().abs().flatten().argsort(descending=True, stable=True)[:kept]] = 1
    with torch.no_grad():
        weight.mul_(mask.view(weight.shape))


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
