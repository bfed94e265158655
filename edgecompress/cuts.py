"""How channels go: a module becomes smaller in place. Torch-Pruning cuts the common layers, we the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class Cut:
    """Where one group cuts one module: position ``index[i]`` of ``side`` goes when the group's channel ``channel[i]`` goes.

    ``module`` is the path of a module, or of a parameter that stands by itself.
    """

    group: str
    module: str
    side: str  # "out" or "in"
    index: Tensor
    channel: Tensor


def owner_of(model: nn.Module, path: str) -> nn.Module | nn.Parameter:
    """The module or the parameter at ``path``."""
    parent, _, leaf = path.rpartition(".")
    found = getattr(model.get_submodule(parent), leaf) if leaf else model
    assert isinstance(found, nn.Module | nn.Parameter)
    return found


def buffer_channels(module: nn.Module) -> int:
    """Channels of a module that learned one number per channel and holds it in buffers (a frozen BatchNorm); 0 for others."""
    buffers = list(module.buffers())
    learned = next(module.parameters(), None) is not None or next(module.children(), None) is not None
    if learned or isinstance(module, nn.modules.batchnorm._NormBase):
        return 0
    sizes = {buffer.numel() if buffer.dim() and buffer.numel() == max(buffer.shape) else 0 for buffer in buffers}
    return sizes.pop() if len(sizes) == 1 else 0


def cut_channels(model: nn.Module, cuts: Sequence[Cut], keep: Mapping[str, Tensor]) -> None:
    """Remove from ``model``, in place, all channels of each group in ``keep`` but the kept ones (indices)."""
    for name, side, index in lost(cuts, keep):
        owner = owner_of(model, name)
        parent, _, leaf = name.rpartition(".")
        if isinstance(owner, nn.Parameter):
            setattr(model.get_submodule(parent), leaf, nn.Parameter(_without(owner.detach(), index)))
        elif buffer_channels(owner):
            for key, buffer in list(owner.named_buffers(recurse=False)):
                setattr(owner, key, _without(buffer, index))
        elif isinstance(owner, nn.ConvTranspose2d) and 1 < owner.groups != owner.out_channels:
            _cut_grouped_transposed(owner, side, index)
        else:
            _cut_by_torch_pruning(owner, side, index)


def _cut_by_torch_pruning(owner: nn.Module, side: str, index: Tensor) -> None:
    from torch_pruning import function, ops

    pruner = function.PrunerBox[ops.module2type(owner)]
    (pruner.prune_out_channels if side == "out" else pruner.prune_in_channels)(owner, index.tolist())


def _cut_grouped_transposed(owner: nn.ConvTranspose2d, side: str, index: Tensor) -> None:
    """Its weight is ``[in, out / groups, ...]``; equal places go from each group."""
    weight = owner.weight.detach()
    if side == "in":
        owner.in_channels -= len(index)
        owner.weight = nn.Parameter(_without(weight, index, 0))
        return
    owner.out_channels -= len(index)
    owner.weight = nn.Parameter(_without(weight, index[index < weight.shape[1]], 1))
    if owner.bias is not None:
        owner.bias = nn.Parameter(_without(owner.bias.detach(), index))


def _without(tensor: Tensor, index: Tensor, axis: int | None = None) -> Tensor:
    """``tensor`` without these positions of an axis, by default of the longest."""
    axis = max(range(tensor.dim()), key=lambda dim: tensor.shape[dim]) if axis is None else axis
    kept = torch.ones(tensor.shape[axis], dtype=torch.bool)
    kept[index] = False
    return tensor.index_select(axis, torch.nonzero(kept).flatten())


def silence(owner: nn.Module | nn.Parameter, index: Tensor) -> None:
    """Set the weights that read the input channels ``index`` to zero."""
    if isinstance(owner, WEIGHTED):
        axis = 0 if isinstance(owner, nn.ConvTranspose2d) else 1
        owner.weight.index_fill_(axis, index % owner.weight.shape[axis], 0.0)


def lost(cuts: Sequence[Cut], keep: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """Module, side and positions that go when only the channels in ``keep`` stay."""
    gone: dict[tuple[str, str], list[Tensor]] = {}
    for cut in cuts:
        if cut.group in keep:
            lost = ~torch.isin(cut.channel, keep[cut.group])
            gone.setdefault((cut.module, cut.side), []).append(cut.index[lost])
    for (name, side), parts in gone.items():
        index = torch.unique(torch.cat(parts))
        if len(index):
            yield name, side, index
