"""A network becomes layers and channel groups. Torch-Pruning's dependency graph walks the network; we only read it."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgecompress.errors import BadModelError
from edgecompress.spec import ChannelGroup, ChannelTerm, Kind, LayerSpec, Network

WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class Cut:
    """Where one group cuts one module: position ``index[i]`` of ``side`` goes when the group's channel ``channel[i]`` goes."""

    group: str
    module: str
    side: str  # "out" or "in"
    index: Tensor
    channel: Tensor


@dataclass(frozen=True)
class Traced:
    """The serialisable `Network` and the cuts that `prune.prune` carries out. A group is named after its first layer."""

    network: Network
    cuts: tuple[Cut, ...]


def fingerprint(model: nn.Module) -> str:
    """Twelve hexadecimal digits of the names and shapes of all tensors: equal for equal architectures."""
    text = ";".join(f"{name}{tuple(value.shape)}" for name, value in model.state_dict().items())
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def trace(model: nn.Module, input_shape: tuple[int, ...], name: str) -> Traced:
    """Find the layers with weights and the channel groups that must be cut together.

    Args:
        model: a network on the CPU. It is not changed.
        input_shape: ``(C, H, W)`` of one image.
        name: goes into the result.

    Raises:
        BadModelError: the network cannot be traced, has no layer with weights, or holds NaN.
    """
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise BadModelError(f"The weight '{key}' of {name} holds NaN or infinity. Load a sound checkpoint.")
    model = copy.deepcopy(model).eval()
    example = torch.zeros(1, *input_shape)
    extents = _extents(model, example, name)
    if not extents:
        raise BadModelError(f"{name} has no convolution or linear layer that runs; there is nothing to compress.")
    groups, cuts = _groups(model, example, name, extents)
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


def _extents(model: nn.Module, example: Tensor, name: str) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Input and output height and width of every layer with weights, in the order in which they run."""
    found: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
    calls: dict[str, int] = {}

    def note(key: str, x: Tensor, y: Tensor) -> None:
        calls[key] = calls.get(key, 0) + 1
        spatial = [tuple(t.shape[2:]) if t.dim() == 4 else (1, 1) for t in (x, y)]
        found[key] = ((spatial[0][0], spatial[0][1]), (spatial[1][0], spatial[1][1]))

    handles = [
        module.register_forward_hook(lambda _m, x, y, key=key: note(key, x[0], y))
        for key, module in model.named_modules()
        if isinstance(module, WEIGHTED)
    ]
    try:
        with torch.no_grad():
            model(example)
    except Exception as error:
        raise BadModelError(
            f"{name} fails on one image of shape {tuple(example.shape[1:])}: {error}. Give images of the size it was made for."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    twice = [key for key, count in calls.items() if count > 1]
    if twice:
        raise BadModelError(
            f"The layer '{twice[0]}' of {name} is used {calls[twice[0]]} times in one forward pass. Give each use its own module."
        )
    return found


def _groups(
    model: nn.Module, example: Tensor, name: str, extents: Mapping[str, object]
) -> tuple[tuple[ChannelGroup, ...], tuple[Cut, ...]]:
    import torch_pruning

    try:
        # The dependency graph is read off autograd; a caller may well stand in torch.no_grad().
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
            raw = list(graph.get_all_groups(root_module_types=list(WEIGHTED)))
    except Exception as error:
        raise BadModelError(
            f"{name} cannot be traced into channel groups ({type(error).__name__}: {error}). Export it without pruning."
        ) from error
    names = {module: key for key, module in model.named_modules()}
    with torch.no_grad():
        output = model(example)
    groups: list[ChannelGroup] = []
    cuts: list[Cut] = []
    for items in raw:
        touched = {
            names.get(item.dep.target.module) for item in items if graph.is_out_channel_pruning_fn(item.dep.handler)
        }
        members = tuple(key for key in extents if key in touched)
        if not members:
            continue
        own = [cut for item in items if (cut := _cut(members[0], item, names, graph)) is not None]
        width = len(items[0].idxs)
        norm = sum(
            len(cut.index) // width * sum(parameter.dim() == 1 for parameter in module.parameters(recurse=False))
            for cut in own
            if not isinstance(module := model.get_submodule(cut.module), WEIGHTED) and cut.side == "out"
        )
        reason = _why_not(model, example, output, own, width)
        groups.append(
            ChannelGroup(
                id=members[0],
                width=width,
                members=members,
                norm_params_per_channel=norm,
                prunable=not reason,
                reason=reason,
            )
        )
        cuts += own
    order = list(extents)
    return tuple(sorted(groups, key=lambda group: order.index(group.id))), tuple(cuts)


def _cut(group_id: str, item: object, names: Mapping[nn.Module, str], graph: object) -> Cut | None:
    dep, index = item.dep, list(item.idxs)  # type: ignore[attr-defined]
    module = dep.target.module
    if module not in names or not list(module.parameters(recurse=False)):
        return None
    side = "out" if graph.is_out_channel_pruning_fn(dep.handler) else "in"  # type: ignore[attr-defined]
    return Cut(group_id, names[module], side, torch.tensor(index), torch.tensor(list(item.root_idxs)))  # type: ignore[attr-defined]


def _why_not(model: nn.Module, example: Tensor, output: Tensor, cuts: list[Cut], width: int) -> str:
    """Cut half of the group for trial: a network that then fails, or whose output changes shape, keeps the group."""
    if width < 2:
        return f"it has {width} channel"
    trial = copy.deepcopy(model)
    try:
        cut_channels(trial, cuts, {cuts[0].group: torch.arange(width // 2)})
        with torch.no_grad():
            shape = trial(example).shape
    except Exception as error:
        return f"cutting it breaks the forward pass: {error}"
    return "" if shape == output.shape else "its channels are the network's output"


def cut_channels(model: nn.Module, cuts: list[Cut], keep: Mapping[str, Tensor]) -> None:
    """Remove from ``model``, in place, all channels of each group in ``keep`` but the kept ones (indices)."""
    from torch_pruning import function

    gone: dict[tuple[str, str], list[Tensor]] = {}
    for cut in cuts:
        if cut.group in keep:
            lost = ~torch.isin(cut.channel, keep[cut.group])
            gone.setdefault((cut.module, cut.side), []).append(cut.index[lost])
    for (name, side), parts in gone.items():
        index = torch.unique(torch.cat(parts)).tolist()
        if not index:
            continue
        module = model.get_submodule(name)
        pruner = function.PrunerBox[_pruner_key(module)]
        (pruner.prune_out_channels if side == "out" else pruner.prune_in_channels)(module, index)


def _pruner_key(module: nn.Module) -> object:
    from torch_pruning import ops

    return ops.module2type(module)


def _layer(
    name: str,
    module: nn.Module,
    extent: tuple[tuple[int, int], tuple[int, int]],
    cuts: tuple[Cut, ...],
    groups: tuple[ChannelGroup, ...],
) -> LayerSpec:
    input_hw, output_hw = extent
    widths = {group.id: group.width for group in groups if group.prunable}
    terms: dict[str, list[ChannelTerm]] = {"in": [], "out": []}
    for cut in cuts:
        if cut.module == name and cut.group in widths:
            terms[cut.side].append(ChannelTerm(group=cut.group, per_channel=len(cut.index) // widths[cut.group]))
    params = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    if isinstance(module, nn.Linear):
        return LayerSpec(
            name=name, kind="linear", in_channels=module.in_features, out_channels=module.out_features,
            macs=module.in_features * module.out_features * _positions(output_hw), params=params, input_hw=input_hw,
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
    where = input_hw if kind == "transposed" else output_hw
    return LayerSpec(
        name=name, kind=kind, in_channels=module.in_channels, out_channels=module.out_channels, kernel=kernel,
        stride=(int(module.stride[0]), int(module.stride[1])), groups=module.groups, input_hw=input_hw, output_hw=output_hw,
        macs=module.in_channels // module.groups * module.out_channels * kernel[0] * kernel[1] * _positions(where),
        params=params, in_terms=tuple(terms["in"]), out_terms=tuple(terms["out"]),
    )  # fmt: skip


def _positions(extent: tuple[int, int]) -> int:
    return extent[0] * extent[1]
