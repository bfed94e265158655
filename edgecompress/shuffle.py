"""ShuffleNet-V2 without its channel shuffles: an equal network, in which every channel can be cut.

A shuffle only says which channels the next block reads and which it passes on, so that each channel is read by exactly one
later block (or behind the stage). Here a branch ends in one 1x1 convolution for each block that reads from it, and a block
reads a concatenation, as in a DenseNet: nothing is split or shuffled, and no channel depends on another's place.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgecompress.errors import BadModelError


class Branch(nn.Module):
    """A branch of a block: ``body``, then for each reader one of ``tails`` (1x1 convolution, BatchNorm, ReLU)."""

    def __init__(self, body: nn.Sequential, tails: Sequence[nn.Sequential], readers: Sequence[int]) -> None:
        super().__init__()
        self.body, self.tails, self.readers = body, nn.ModuleList(tails), tuple(readers)

    def forward(self, x: Tensor) -> list[tuple[int, Tensor]]:
        y = self.body(x)
        return [(reader, tail(y)) for reader, tail in zip(self.readers, self.tails, strict=True)]


class UnshuffledStage(nn.Module):
    """A stage: the first two branches read its input, each later one what earlier branches left for it."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        waiting: list[list[Tensor]] = [[x], [x], *([] for _ in self.branches[1:])]
        for number, branch in enumerate(self.branches):
            for reader, piece in branch(torch.cat(waiting[number], 1) if number > 1 else x):
                waiting[reader].append(piece)
        return torch.cat(waiting[-1], 1)


def unshuffled(network: nn.Module) -> nn.Module:
    """An equal copy of a torchvision ShuffleNet-V2 in which all channels can be pruned.

    Its layers have other names: load weights before, and build the copy again to load what was saved of it.

    Raises:
        BadModelError: the network is no torchvision ShuffleNet-V2.
    """
    from torchvision.models import ShuffleNetV2

    if not isinstance(network, ShuffleNetV2):
        raise BadModelError(f"{type(network).__name__} is no torchvision ShuffleNetV2; prune it as it is.")
    result: Any = copy.deepcopy(network)
    order = torch.arange(result.conv1[0].out_channels)
    for name in ("stage2", "stage3", "stage4"):
        stage, order = _unshuffle(list(getattr(result, name)), order)
        setattr(result, name, stage)
    result.conv5[0] = _select(result.conv5[0], inputs=order)
    unshuffled_network: nn.Module = result
    return unshuffled_network


def _unshuffle(blocks: Sequence[Any], order: Tensor) -> tuple[UnshuffledStage, Tensor]:
    """The stage without shuffles, and which of the channels it returned before stand where now.

    Args:
        blocks: torchvision's, whose first has two branches.
        order: the same of the stage's input.
    """
    parts = [blocks[0].branch1, *(block.branch2 for block in blocks)]
    half, end = int(parts[0][-3].out_channels), len(parts)
    # Every channel carries a number, branch x half + place. A block's shuffle, then the split before the next block:
    state = torch.arange(2 * half).view(2, half).t().flatten()
    reads: list[Tensor] = []
    for number in range(2, end):
        reads.append(state[half:])
        state = torch.stack([state[:half], number * half + torch.arange(half)]).t().flatten()
    reads.append(state)
    branches: list[Branch] = []
    arrived: list[list[Tensor]] = [
        [] for _ in range(end + 1)
    ]  # per reader, in the order in which its input is concatenated
    for number, (*body, conv, norm, _) in enumerate(parts):
        places = order if number < 2 else _places(reads[number - 2], arrived[number])
        if number == 0:  # a depthwise convolution keeps the order of its input up to the 1x1 convolution
            body = [_select(body[0], places), _select_norm(body[1], places)]
            conv = _select(conv, inputs=places)
        else:
            body[0] = _select(body[0], inputs=places)
        tails, readers = [], []
        own = number * half + torch.arange(half)
        for reader in range(max(2, number + 1), end + 1):
            read = torch.isin(own, reads[reader - 2])
            if read.any():
                tails.append(nn.Sequential(_select(conv, read), _select_norm(norm, read), nn.ReLU(inplace=True)))
                readers.append(reader)
                arrived[reader].append(own[read])
        branches.append(Branch(nn.Sequential(*body), tails, readers))
    return UnshuffledStage(branches), _places(state, arrived[end])


def _places(wanted: Tensor, arrived: Sequence[Tensor]) -> Tensor:
    """Where each channel that arrived stood in ``wanted``."""
    ordered, place = wanted.sort()
    return place[torch.searchsorted(ordered, torch.cat(list(arrived)))]


def _select(conv: Any, outputs: Tensor | None = None, inputs: Tensor | None = None) -> nn.Conv2d:
    """The convolution (without bias) with these output and input channels alone; a depthwise one stays depthwise."""
    weight = conv.weight.detach()
    weight = weight if outputs is None else weight[outputs]
    weight = weight if inputs is None else weight[:, inputs]
    groups = len(weight) if conv.groups > 1 else 1
    selected = nn.Conv2d(
        weight.shape[1] * groups, len(weight), conv.kernel_size, conv.stride, conv.padding, groups=groups, bias=False
    )
    selected.weight = nn.Parameter(weight.clone())
    return selected.train(conv.training)


def _select_norm(norm: Any, places: Tensor) -> nn.BatchNorm2d:
    state = {key: value[places] if value.dim() else value for key, value in norm.state_dict().items()}
    selected = nn.BatchNorm2d(len(state["weight"]), norm.eps, norm.momentum)
    selected.load_state_dict(state)
    return selected.train(norm.training)
