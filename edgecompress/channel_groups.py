"""Which channels must go together. Torch-Pruning's dependency graph walks the network; we only read it."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgecompress.cuts import WEIGHTED, Cut, buffer_channels, cut_channels, lost, owner_of, silence
from edgecompress.errors import BadModelError
from edgecompress.spec import ChannelGroup

_OUTPUT = "its channels are the network's output"
_SHUFFLE = "its channels pass a channel shuffle, whose order a smaller network would not keep"
_DETACHED = "no gradient flows from the outputs back to it, so that nobody can see who reads its channels"
_LOST = "its channels cannot be followed through the splits and shuffles behind it"


@dataclass(frozen=True, eq=False)
class _Candidate:
    group: ChannelGroup
    cuts: tuple[Cut, ...]
    reaches_output: bool = False


def largest(values: Tensor) -> float:
    """Of the finite ones, without their sign; 0 where there are none."""
    return float(values.abs().nan_to_num(0.0, 0.0, 0.0).amax()) if values.numel() else 0.0


def tensors_of(outputs: object) -> list[Tensor]:
    """All tensors in what a network returned: a tensor, or dictionaries, lists and tuples of them."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        return tensors_of(list(outputs.values()))
    if isinstance(outputs, list | tuple):
        return [tensor for output in outputs for tensor in tensors_of(output)]
    return []


def channel_groups(
    model: nn.Module, example: Tensor, name: str, order: Sequence[str]
) -> tuple[tuple[ChannelGroup, ...], tuple[Cut, ...]]:
    """The channel groups of ``model`` in the order of their first layers, and where each cuts.

    A group that cannot be cut says why: its trial cut failed, changed the shape of an output, or changed values that the
    lost channels had no part in.

    Args:
        model: in eval mode, on the CPU. It is not changed.
        example: ``[1, C, H, W]``.
        order: names of the layers with weights, in the order in which they run.

    Raises:
        BadModelError: the dependency graph cannot be built.
    """
    try:
        found = list(_candidates(model, example, order))
    except Exception as error:
        raise BadModelError(
            f"{name} cannot be traced into channel groups ({type(error).__name__}: {error}). Export it without pruning."
        ) from error
    reasons = {c.group.id: c.group.reason for c in found if c.group.reason}
    open_ones = [c for c in found if not c.group.reason]
    # Those at the end of the network fail, most likely: apart from them, all others pass one trial together. Statistics over
    # channels change with the channels: there only shapes can be compared.
    ends = [c for c in open_ones if c.reaches_output or order[-1] in c.group.members]
    inner = [c for c in open_ones if c not in ends]
    for part in (ends, inner):
        mixing = [c for c in part if any(isinstance(owner_of(model, cut.module), _MIXING) for cut in c.cuts)]
        reasons |= _failures(model, example, [c for c in part if c not in mixing], exact=True)
        reasons |= _failures(model, example, mixing, exact=False)
    position = {key: number for number, key in enumerate(order)}
    groups = (
        c.group.model_copy(update={"prunable": c.group.id not in reasons, "reason": reasons.get(c.group.id, "")})
        for c in found
    )
    return tuple(sorted(groups, key=lambda group: position[group.id])), tuple(cut for c in found for cut in c.cuts)


_MIXING = (nn.GroupNorm, nn.LayerNorm)


def _candidates(model: nn.Module, example: Tensor, order: Sequence[str]) -> Iterator[_Candidate]:
    """Torch-Pruning's groups, read off autograd; a caller may well stand in torch.no_grad()."""
    from torch_pruning import DependencyGraph
    from torch_pruning.dependency import index_mapping

    reshape, update = index_mapping.update_reshape_index_mapping, index_mapping.update_index_mapping

    def tolerant(graph: Any, node: Any) -> None:
        # A channel shuffle leaves it without channels to divide by; `_candidate` then refuses the groups that pass it.
        with contextlib.suppress(ZeroDivisionError):
            reshape(graph, node)

    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            index_mapping.update_reshape_index_mapping = tolerant
            frozen = {type(module): _frozen_norm() for module in model.modules() if buffer_channels(module)}
            graph = DependencyGraph().build_dependency(
                model, example_inputs=example, customized_pruners=frozen, verbose=False
            )
            # Nothing is cut while the groups are read: updating the whole graph for each would take minutes.
            index_mapping.update_index_mapping = lambda graph: None
            seen: set[str] = set()
            for key in order:
                if key not in seen:
                    found = _candidate(model, key, graph, order)
                    seen |= set(found.group.members)
                    yield found
        finally:
            index_mapping.update_reshape_index_mapping, index_mapping.update_index_mapping = reshape, update


def _frozen_norm() -> Any:
    """What Torch-Pruning must know of a module with one buffer element per channel: as many go out as come in."""
    from torch_pruning.pruner.function import BasePruningFunc

    class FrozenNorm(BasePruningFunc):  # type: ignore[misc]
        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            raise NotImplementedError  # the graph is only read

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.Module) -> int:
            return buffer_channels(layer)

        get_in_channels = get_out_channels

    return FrozenNorm()


def _candidate(model: nn.Module, key: str, graph: Any, order: Sequence[str]) -> _Candidate:
    """The group of the output channels of the layer ``key``."""
    from torch_pruning import ops

    root = model.get_submodule(key)
    total = int(root.out_features if isinstance(root, nn.Linear) else root.out_channels)  # type: ignore[arg-type]
    if root not in graph.module2node:
        return _Candidate(ChannelGroup(id=key, width=total, members=(key,), prunable=False, reason=_DETACHED), ())
    pruner = graph.get_pruner_of_module(root)
    try:
        items = graph.get_pruning_group(root, pruner.prune_out_channels, list(range(total)))
    except IndexError:  # a split whose parts it counts wrongly
        return _Candidate(ChannelGroup(id=key, width=total, members=(key,), prunable=False, reason=_LOST), ())
    paths: dict[Any, str] = {module: key for key, module in model.named_modules()}
    paths |= {parameter: key for key, parameter in model.named_parameters()}
    targets = [item.dep.target for item in items]
    outs = [graph.is_out_channel_pruning_fn(item.dep.handler) for item in items]
    touched = {paths.get(target.module) for target, out in zip(targets, outs, strict=True) if out}
    members = tuple(key for key in order if key in touched)
    cuts, chunks = [], []
    for item, out in zip(items, outs, strict=True):
        module = item.dep.target.module
        index, channel = torch.tensor(list(item.idxs)), torch.tensor(list(item.root_idxs))
        if isinstance(module, ops._SplitOp) and len(set(module.split_sizes or ())) == 1:
            chunks.append((index, channel, int(module.split_sizes[0])))
        if module not in paths or (isinstance(module, nn.Module) and not module.state_dict()):
            continue
        cuts.append(Cut(members[0], paths[module], "out" if out else "in", index, channel))
    width = len(items[0].idxs)
    periods = [(c.index, c.channel, p) for c in cuts if (p := _period(owner_of(model, c.module), c.side))]
    unit = _units(width, periods + chunks)
    count = int(unit.max()) + 1
    even = [_even(unit, count)] + [_even(unit[cut.channel], count) for cut in cuts]
    shuffled = any(
        len(getattr(t.grad_fn, "_saved_self_sym_sizes", ())) > 4 for t in targets if t.type == _reshape_type()
    )
    at_output = any(isinstance(target.module, ops._OutputOp) for target in targets)
    reason = (
        _SHUFFLE if shuffled and not at_output
        else "some of its layers read only a part of its channels" if not all(even)
        else f"it has {width} channel" if width < 2
        else f"its {width} channels must all go together" if count < 2
        else ""
    )  # fmt: skip
    if not reason:
        width, cuts = count, [replace(cut, channel=unit[cut.channel]) for cut in cuts]
    norms = sum(len(cut.index) // width * _vectors(owner_of(model, cut.module)) for cut in cuts if cut.side == "out")
    group = ChannelGroup(
        id=members[0], width=width, members=members, norm_params_per_channel=norms, prunable=not reason, reason=reason
    )
    return _Candidate(group, tuple(cuts), at_output)


def _reshape_type() -> object:
    from torch_pruning import ops

    return ops.OPTYPE.RESHAPE


def _period(owner: nn.Module | nn.Parameter, side: str) -> int:
    """Channels per group of a layer whose groups must stay equally wide; 0 for all others."""
    if isinstance(owner, nn.GroupNorm):
        return owner.num_channels // owner.num_groups
    if isinstance(owner, nn.Conv2d | nn.ConvTranspose2d) and 1 < owner.groups != owner.out_channels:
        return (owner.out_channels if side == "out" else owner.in_channels) // owner.groups
    return 0


def _units(width: int, periods: Sequence[tuple[Tensor, Tensor, int]]) -> Tensor:
    """Per channel the number of what goes as one: channels at equal places of a layer's groups, joined until all agree."""
    label = torch.arange(width)
    while True:
        before = label
        for index, channel, period in periods:
            place = index % period
            least = torch.full((period,), width).scatter_reduce(0, place, label[channel], "amin")
            label = label.scatter_reduce(0, channel, least[place], "amin")
        if torch.equal(label, before):
            unit: Tensor = torch.unique(label, return_inverse=True)[1]
            return unit


def _even(units: Tensor, count: int) -> bool:
    return len(torch.unique(torch.bincount(units, minlength=count))) == 1


def _vectors(owner: nn.Module | nn.Parameter) -> int:
    """Learned elements per channel outside of layers with weights."""
    if isinstance(owner, nn.Parameter):
        return 1
    if isinstance(owner, WEIGHTED):
        return 0
    return sum(parameter.dim() == 1 for parameter in owner.parameters(recurse=False))


def _failures(model: nn.Module, example: Tensor, candidates: list[_Candidate], *, exact: bool) -> dict[str, str]:
    """Why groups cannot be cut, per id. All are cut at once for trial; only where that fails, each half by itself."""
    if not candidates:
        return {}
    problem = _trial(model, example, candidates, exact=exact)
    if not problem:
        return {}
    if len(candidates) == 1:
        return {candidates[0].group.id: problem}
    half = len(candidates) // 2
    return _failures(model, example, candidates[:half], exact=exact) | _failures(
        model, example, candidates[half:], exact=exact
    )


def _trial(model: nn.Module, example: Tensor, candidates: list[_Candidate], *, exact: bool) -> str:
    """Cut half of each group: the outputs must be those of the network in which nobody reads the lost channels."""
    generator = torch.Generator().manual_seed(0)
    keep = {c.group.id: torch.randperm(c.group.width, generator=generator)[: c.group.width // 2] for c in candidates}
    cuts = [cut for c in candidates for cut in c.cuts]
    smaller, deaf = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for module, side, index in lost(cuts, keep):
            if side == "in":
                silence(owner_of(deaf, module), index)
        wanted = tensors_of(deaf(example))
        try:
            cut_channels(smaller, cuts, keep)
            found = tensors_of(smaller(example))
        except Exception as error:
            if any(c.reaches_output for c in candidates):
                return _OUTPUT
            return (
                f"cutting it breaks the forward pass: {str(error).strip().splitlines()[0] if str(error) else error!r}"
            )
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in wanted]:
        return _OUTPUT
    near = 1e-3 * max((largest(tensor) for tensor in wanted), default=0.0)
    if exact and not all(torch.allclose(a, b, atol=near, equal_nan=True) for a, b in zip(found, wanted, strict=True)):
        return "without its lost channels the other channels do not compute what they did"
    return ""
