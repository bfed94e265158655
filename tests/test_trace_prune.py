"""A pruned network is the masked network made smaller, and costs exactly what was predicted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sample_networks import BLOCKS, NETWORKS, GroupNormed, Residual, Scaled, patterns, settled, unprunable
from torch import Tensor, nn

from edgecompress.channel_groups import tensors_of
from edgecompress.cost import count, kernels
from edgecompress.errors import BadModelError, UnknownNameError, UsageError
from edgecompress.importance import IMPORTANCE, importance_by_name, l1_importance, l2_importance
from edgecompress.models import CifarVgg, build_model
from edgecompress.prune import prune, pruner, reestimate_batchnorm
from edgecompress.raw_heads import RawHeads
from edgecompress.reconstruction import input_moments
from edgecompress.spec import CompressionPolicy, LayerChoice
from edgecompress.trace import fingerprint, trace

ZOO = ("resnet8", "resnet20", "mobilenet_cifar")


CASES = {
    **{name: (lambda kind=kind: kind(4), (3, 16, 16)) for name, kind in NETWORKS.items()},
    **{name: (lambda name=name: build_model(name, 10), (3, 32, 32)) for name in ZOO},
    **{name: (lambda kind=BLOCKS[name]: kind(4), (3, 16, 16)) for name in ("gated", "fire", "inception")},
    "zoo vgg": (lambda: CifarVgg((1, 1, 1, 1, 1), 10), (3, 32, 32)),  # one convolution a stage: a fifth of the time
}


def traced_case(name: str):
    make, shape = CASES[name]
    model = settled(make(), 1)
    return model, shape, trace(model, shape, name)


@pytest.fixture(scope="module", params=list(NETWORKS))
def tiny(request):
    return traced_case(request.param)


@pytest.fixture(scope="module", params=list(CASES))
def any_case(request):
    return traced_case(request.param)


def random_policy(traced, seed: int) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Widths and scores drawn at random: the scores decide which channels go."""
    generator = torch.Generator().manual_seed(seed)
    widths, scores = {}, {}
    for group in traced.network.groups:
        scores[group.id] = torch.rand(group.width, generator=generator)
        if group.prunable:
            widths[group.id] = int(torch.randint(1, group.width + 1, (1,), generator=generator))
    return widths, scores


def run_masked(model: nn.Module, traced, widths, scores, x: Tensor) -> Tensor:
    """The original network with lost channels set to zero behind each layer and behind the BatchNorm that follows it.

    Only `ChannelGroup.members` is used, never the cuts that are under test.
    """
    masks = {}
    for group in traced.network.groups:
        mask = torch.zeros(group.width)
        mask[scores[group.id].topk(widths.get(group.id, group.width)).indices] = 1
        masks |= dict.fromkeys(group.members, mask)
    last: list[Tensor | None] = [None]

    def after_layer(name):
        def hook(module, args, output):
            last[0] = masks.get(name)
            if last[0] is not None:
                last[0] = last[0].view(-1, *(1,) * (output.dim() - 2))
                return output * last[0]
            return output

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(after_layer(name)))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_hook(lambda m, a, y: y if last[0] is None else y * last[0]))
    try:
        with torch.no_grad():
            return model(x)
    finally:
        for handle in handles:
            handle.remove()


def measured_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-adds counted while the network runs."""
    total = 0

    def note(module, args, output):
        nonlocal total
        total += module.weight[0].numel() * output[0].numel()

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    return total


def test_pruned_network_equals_the_masked_one_and_costs_what_was_predicted(any_case):
    check_equality(*any_case, *random_policy(any_case[2], 0))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pruned_network_equals_the_masked_one_at_other_widths(tiny, seed):
    check_equality(*tiny, *random_policy(tiny[2], seed))


def halved(traced) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Half the channels of every group that can be cut, by scores drawn at random."""
    return {group.id: group.width // 2 for group in traced.network.prunable_groups}, random_policy(traced, 0)[1]


def check_equality(model, shape, traced, widths: dict[str, int], scores: dict[str, Tensor]) -> None:
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(9))
    smaller = prune(model, traced, widths, scores)
    with torch.no_grad():
        found, untouched = smaller(x), model(x)
    wanted = run_masked(model, traced, widths, scores, x)
    assert not torch.allclose(wanted, untouched, atol=1e-3)
    assert torch.allclose(found, wanted, atol=1e-5 * max(1.0, float(wanted.abs().max())))
    cost = count(traced.network, CompressionPolicy(model="", keep_channels=widths))
    assert cost.params == sum(parameter.numel() for parameter in smaller.parameters())
    assert cost.macs == measured_macs(smaller, shape)
    for kernel in kernels(traced.network, CompressionPolicy(model="", keep_channels=widths)):
        weight = smaller.get_submodule(kernel.layer.name).weight
        assert weight.shape[0] == kernel.out_channels
        assert weight.shape[1] == (1 if kernel.layer.kind == "depthwise" else kernel.in_channels)


@pytest.mark.parametrize("name", BLOCKS)
def test_half_of_every_group_but_the_outputs_goes_and_training_goes_on(name):
    check_half(settled(BLOCKS[name](4)), (3, 16, 16), name)


def test_every_group_of_a_groupnorm_keeps_the_same_places():
    """Its groups are 4 channels wide behind the stem, 8 behind the second convolution, and both norm the same channels."""
    model = settled(GroupNormed(4))
    with torch.no_grad():
        for norm in (model.norm0, model.norm1, model.norm2):
            norm.weight.copy_(torch.arange(norm.num_channels))
    traced = trace(model, (3, 16, 16), "groupnorm")
    assert {group.id: group.width for group in traced.network.prunable_groups} == {"stem": 4, "conv1": 6}
    smaller = prune(model, traced, *halved(traced))
    for name in ("norm0", "norm1", "norm2"):
        norm, before = smaller.get_submodule(name), model.get_submodule(name)
        places = norm.weight.view(before.num_groups, -1) % (before.num_channels // before.num_groups)
        assert bool((places == places[0]).all()), name


@pytest.mark.slow  # all of tracing, on whole networks
@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_half_of_every_group_of_a_whole_network_goes_and_training_goes_on(name):
    torch.manual_seed(0)
    check_half(build_model(name, 10), (3, 64, 64), name)


def check_half(model: nn.Module, shape: tuple[int, ...], name: str) -> None:
    """Half of all groups but the outputs' goes: what is left costs what was predicted, and learns with all of its weights."""
    traced = trace(model, shape, name)
    widths, scores = halved(traced)
    assert {g.id: g.reason for g in traced.network.groups if g.id not in widths} == {
        traced.network.layers[-1].name: "its channels are the network's output"
    }
    policy = CompressionPolicy(model="", keep_channels=widths)
    smaller = prune(model, traced, widths, scores)
    cost = count(traced.network, policy)
    assert cost.params == sum(parameter.numel() for parameter in smaller.parameters())
    assert cost.macs == measured_macs(smaller, shape)
    for kernel in kernels(traced.network, policy)[:-1]:
        layer, before = smaller.get_submodule(kernel.layer.name), model.get_submodule(kernel.layer.name)
        assert layer.weight.shape[0] == kernel.out_channels == before.weight.shape[0] // 2, kernel.layer.name
    torch.manual_seed(0)
    outputs = smaller.train()(torch.randn(2, *shape))
    outputs.square().mean().backward()
    assert outputs.shape == (2, model(torch.zeros(1, *shape)).shape[1])
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in smaller.parameters())


def test_smallest_policy_leaves_one_channel_everywhere_and_still_runs(tiny):
    model, shape, traced = tiny
    smaller = prune(model, traced, {group.id: 1 for group in traced.network.prunable_groups})
    with torch.no_grad():
        assert smaller(torch.randn(2, *shape)).shape == model(torch.randn(2, *shape)).shape


def test_trace_and_prune_leave_the_network_alone(tiny):
    model, shape, traced = tiny
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model, shape, "again")
    prune(model, traced, {traced.network.prunable_groups[0].id: 2})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_groups_of_the_residual_network_are_what_its_additions_demand():
    traced = trace(Residual(4), (3, 16, 16), "residual")
    members = {group.id: set(group.members) for group in traced.network.prunable_groups}
    assert members == {"stem.0": {"stem.0", "a2.0"}, "a1.0": {"a1.0"}, "b1.0": {"b1.0"}, "b2.0": {"b2.0", "shortcut.0"}}
    assert {group.id: group.norm_params_per_channel for group in traced.network.prunable_groups} == {
        "stem.0": 4, "a1.0": 2, "b1.0": 2, "b2.0": 4,
    }  # fmt: skip
    assert [layer.name for layer in traced.network.layers][:2] == ["stem.0", "a1.0"]


def test_output_group_is_not_prunable_and_says_why():
    network = trace(Residual(4), (3, 16, 16), "residual").network
    (output,) = [group for group in network.groups if not group.prunable]
    assert output.members == ("fc",) and output.reason == "its channels are the network's output"


class Fixed(nn.Module):
    """Its forward pass counts on eight channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.conv(x).mean((2, 3)).view(-1, 8))
        return result


class Detached(nn.Module):
    """Autograd, off which groups are read, does not see its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.conv(x).detach().mean((2, 3)))
        return result


class OneWide(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 4))


def test_groups_that_cannot_be_cut_say_why_and_are_refused():
    for model, wanted in (
        (Fixed(), "cutting it breaks the forward pass"),
        (Detached(), "no gradient"),
        (OneWide(), "it has 1 channel"),
    ):
        traced = trace(model, (3, 8, 8), "stubborn")
        group = next(group for group in traced.network.groups if group.id in ("conv", "0"))
        assert not group.prunable and wanted in group.reason
        if group.width > 1:
            with pytest.raises(UsageError, match=r"Group conv cannot be pruned: .*Keep its 8 channels"):
                prune(model, traced, {group.id: 4})


def test_linear_network_has_nothing_to_prune():
    assert trace(unprunable(4), (3, 16, 16), "linear").network.prunable_groups == ()


def test_impossible_widths_are_refused():
    model = Residual(4)
    traced = trace(model, (3, 16, 16), "residual")
    with pytest.raises(UnknownNameError, match=r"Unknown channel group 'stem\.9'"):
        prune(model, traced, {"stem.9": 4})
    for width in (0, 9):
        with pytest.raises(UsageError, match=rf"Group stem\.0 has 8 channels; it cannot keep {width}"):
            prune(model, traced, {"stem.0": width})


class Grouped(nn.Module):
    """A grouped convolution between two others, then a transposed one (ResNeXt, RegNet; decoders)."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.grouped = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 18, 3, padding=1, groups=3)
        self.expand, self.up = nn.Conv2d(18, 8, 1), nn.ConvTranspose2d(8, 6, 2, 2)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(F.relu(self.up(F.relu(self.expand(F.relu(self.grouped(F.relu(self.reduce(x)))))))))
        return result


def test_groups_of_a_grouped_convolution_stay_equally_wide():
    model, shape = settled(Grouped()), (3, 8, 8)
    traced = trace(model, shape, "grouped")
    groups = {group.id: group for group in traced.network.groups}
    assert {key: group.width for key, group in groups.items()} == {
        "reduce": 4,
        "grouped": 6,
        "expand": 8,
        "up": 6,
        "head": 2,
    }
    assert [key for key, group in groups.items() if not group.prunable] == ["head"]
    widths, scores = (
        {"reduce": 3, "grouped": 2, "expand": 5, "up": 4},
        {k: torch.rand(g.width) for k, g in groups.items()},
    )
    smaller = prune(model, traced, widths, scores)
    assert smaller.grouped.weight.shape == (6, 3, 3, 3) and smaller.grouped.groups == 3
    x = torch.randn(2, *shape)
    kept = {key: scores[key].topk(width).indices for key, width in widths.items()}
    y = x
    for name in (
        "reduce",
        "grouped",
        "expand",
        "up",
    ):  # one of `grouped`'s six is a channel of each of its three groups
        y = F.relu(model.get_submodule(name)(y))
        places = groups[name].width
        mask = torch.isin(torch.arange(y.shape[1]) % places, kept[name])
        y = y * mask.view(1, -1, 1, 1)
    assert torch.allclose(smaller(x), model.head(y), atol=1e-5)
    cost = count(traced.network, CompressionPolicy(model="", keep_channels=widths))
    assert cost.params == sum(parameter.numel() for parameter in smaller.parameters())
    assert prune(model, traced, {"grouped": 3}).grouped.out_channels == 9  # by the default importance


def test_outputs_that_are_nan_for_some_images_are_compared_where_they_are_numbers():
    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.fc(self.b(F.relu(self.a(x))).mean((2, 3))).log()
            return result

    traced = trace(settled(Logarithm()), (3, 16, 16), "logarithm")
    assert {group.id for group in traced.network.prunable_groups} == {"a", "b"}


def test_scale_parameters_and_layer_norms_are_cut_with_their_channels():
    model = Scaled().eval()
    traced = trace(model, (3, 16, 16), "scaled")
    assert {g.id: (g.width, g.norm_params_per_channel) for g in traced.network.prunable_groups} == {
        "stem": (8, 3),
        "up": (16, 0),
    }
    assert {layer.name: layer.macs for layer in traced.network.layers}["up"] == 8 * 16 * 4 * 4
    widths = {"stem": 5, "up": 7}
    smaller = prune(model, traced, widths)
    assert smaller.scale.shape == (5, 1, 1) and smaller.norm.normalized_shape == (5,)
    assert smaller(torch.randn(2, 3, 16, 16)).shape == (2, 4)
    cost = count(traced.network, CompressionPolicy(model="", keep_channels=widths))
    assert cost.params == sum(parameter.numel() for parameter in smaller.parameters())


def test_channels_before_a_shuffle_stay_and_those_inside_a_branch_go():
    from torchvision.models.shufflenetv2 import InvertedResidual

    block = nn.Sequential(
        nn.Conv2d(3, 16, 1), InvertedResidual(16, 16, 1), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(16, 4)
    )
    model = settled(block)
    traced = trace(model, (3, 8, 8), "shuffle")
    groups = {group.id: group for group in traced.network.groups}
    assert groups["1.branch2.0"].prunable and set(groups["0"].members) == {"0", "1.branch2.5"}
    assert not groups["0"].prunable and "channel shuffle" in groups["0"].reason
    assert prune(model, traced, {"1.branch2.0": 3})(torch.randn(2, 3, 8, 8)).shape == (2, 4)


class Heads(nn.Module):
    """Two outputs in a dictionary, as DeepLab returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.out, self.aux = nn.Conv2d(12, 3, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(x))
        return {"out": self.out(F.relu(self.deep(x))), "aux": self.aux(x)}


def test_all_outputs_are_traced_and_keep_their_channels():
    model = settled(Heads())
    traced = trace(model, (3, 8, 8), "heads")
    assert {group.id: group.prunable for group in traced.network.groups} == {
        "stem": True, "deep": True, "out": False, "aux": False,
    }  # fmt: skip
    outputs = prune(model, traced, {"stem": 4, "deep": 6}).train()(torch.randn(2, 3, 8, 8))
    sum(tensor.sum() for tensor in tensors_of(outputs)).backward()
    assert [tuple(tensor.shape) for tensor in tensors_of(outputs)] == [(2, 3, 8, 8)] * 2


def test_detector_is_pruned_through_its_raw_heads():
    from torchvision.models.detection.retinanet import RetinaNetHead

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.ReLU(), nn.Conv2d(12, 8, 1))
            self.head = RetinaNetHead(8, num_anchors=3, num_classes=5)

    model = RawHeads(Detector()).eval()
    traced = trace(model, (3, 32, 32), "detector", shared=True)
    fixed = [group for group in traced.network.groups if not group.prunable]
    assert {group.reason for group in fixed} == {"its channels are the network's output"} and len(fixed) == 2
    smaller = prune(model, traced, {group.id: group.width // 2 for group in traced.network.prunable_groups})
    assert [tuple(tensor.shape) for tensor in smaller(torch.randn(2, 3, 32, 32))] == [(2, 192, 5), (2, 192, 4)]
    with pytest.raises(BadModelError, match="no 'backbone' and 'head'"):
        RawHeads(nn.Sequential())


def test_layer_that_runs_twice_costs_twice():
    network = trace(Twice(), (3, 8, 8), "twice", shared=True).network
    assert {layer.name: layer.macs for layer in network.layers}["conv"] == 2 * 3 * 3 * 9 * 64


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.conv(F.relu(self.conv(x))).mean((2, 3)))
        return result


def test_layer_used_twice_is_refused_by_name():
    with pytest.raises(BadModelError, match="The layer 'conv' of twice is used 2 times"):
        trace(Twice(), (3, 8, 8), "twice")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    model = Residual(4)
    model.fc.weight.data[1, 2] = value
    with pytest.raises(BadModelError, match=r"The weight 'fc\.weight' of residual holds NaN or infinity"):
        trace(model, (3, 16, 16), "residual")


def test_forward_that_fails_is_refused_with_the_shape():
    with pytest.raises(BadModelError, match=r"residual fails on one image of shape \(1, 16, 16\)"):
        trace(Residual(4), (1, 16, 16), "residual")


class Acts(nn.Module):
    """One convolution and what ``act`` does to its output."""

    def __init__(self, act) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 1), act

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.conv(x).mean((2, 3)))
        return result


class SharedNorm(nn.Module):
    """One BatchNorm behind two convolutions: its channels are those of both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        result: Tensor = self.fc(F.relu(self.norm(self.deep(x))).mean((2, 3)))
        return result


def test_convolutions_that_share_a_batchnorm_are_one_group():
    model, shape = settled(SharedNorm()), (3, 8, 8)
    traced = trace(model, shape, "shared")
    (group,) = traced.network.prunable_groups
    assert (group.members, group.norm_params_per_channel) == (("stem", "deep"), 2)
    check_equality(model, shape, traced, *halved(traced))
    assert prune(model, traced, {"stem": 4}).norm.num_features == 4


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.aux = nn.Conv2d(3, 4, 1), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor):
        x = self.conv(x).mean((2, 3))
        return (self.fc(x), self.aux(x)) if self.training else self.fc(x)


def hooked(kind: str = "forward") -> nn.Module:
    model = Residual(4)
    getattr(model.a1[0], f"register_{kind}_hook")(lambda *told: None)
    return model


def masked(value: float) -> nn.Module:
    """What it adds to its input is in no checkpoint."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Acts(lambda x: x + model[1].added), nn.Linear(4, 2))
    model[1].register_buffer("added", torch.tensor([0.0, value, 0.0, 0.0]), persistent=False)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    model[1].weight = model[0].weight
    return model


def filled_in(x: Tensor) -> Tensor:
    """The mask is a constant until the image is written into it."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    mask[:] = x > 0
    return x * x[mask].mean()


BAD_MODELS = {
    "branch": (lambda: Acts(lambda x: x if x.sum() > 0 else -x), r"depends on the image: .*\(__bool__\) \(.*test_trace_prune"),
    "number": (lambda: Acts(lambda x: x * x.max().item()), r"depends on the image: it reads a tensor's value \(item\)"),
    "equal": (lambda: Acts(lambda x: x if torch.equal(x, x.abs()) else -x), r"depends on the image: .*\(equal\)"),
    "allclose": (lambda: Acts(lambda x: x if torch.allclose(x, x.abs()) else -x), r"depends on the image: .*\(allclose\)"),
    "is_nonzero": (lambda: Acts(lambda x: x if torch.is_nonzero(x[0, 0]) else -x), r"depends on the image: .*\(is_nonzero\)"),
    "numpy": (
        lambda: Acts(lambda x: x + torch.from_numpy(x.detach().cpu().numpy())), r"depends on the image: .*value \(numpy\)",
    ),
    "asarray": (lambda: Acts(lambda x: x * float(np.asarray(x).max())), r"depends on the image: .*value \(__array__\)"),
    "nonzero": (lambda: Acts(lambda x: x + len(torch.nonzero(x))), r"depends on the image: .*shape follows values \(nonzero\)"),
    "nonzero of": (lambda: Acts(lambda x: x + len(x.relu().nonzero())), r"depends on the image: .*values \(nonzero\)"),
    "where": (lambda: Acts(lambda x: x + len(torch.where(x > 0)[0])), r"depends on the image: .*values \(where\)"),
    "mask": (lambda: Acts(lambda x: x * x[x > 0].mean()), r"depends on the image: .*values \(__getitem__\) \(.*test_trace_prune"),
    "masked": (lambda: Acts(filled_in), r"depends on the image: .*shape follows values \(__getitem__\)"),
    "one image": (lambda: Acts(lambda x: x.sum(0)), "its shapes depend on the batch"),
    "only one": (lambda: Acts(lambda x: x.view(1, 4)), "runs on one image and fails on two"),
    "mixed": (lambda: Acts(lambda x: x - x.mean(0)), "another output when a second one is beside it"),
    "nothing": (lambda: Acts(lambda x: None), "returns no tensor"),
    "hook": (hooked, r"The layer 'a1\.0' of bad has a hook"),
    "pre-hook": (lambda: hooked("forward_pre"), r"The layer 'a1\.0' of bad has a hook"),
    "backward hook": (lambda: hooked("full_backward"), r"The layer 'a1\.0' of bad has a hook"),
    "backward pre-hook": (lambda: hooked("full_backward_pre"), r"The layer 'a1\.0' of bad has a hook"),
    "buffer": (lambda: masked(float("nan")), r"The buffer '1\.added' of bad holds NaN"),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))), "hook or a parametrization",
    ),
    "tied": (tied, r"'0\.weight' and '1\.weight' of bad are one tensor"),
    "auxiliary": (Auxiliary, r"'aux' of bad runs in training only.*aux_logits=False.*TrainingHeads"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 1)), r"'0\.weight' of bad has no shape yet"),
    "half": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1)).half(), r"is torch\.float16\. Convert .* model\.float\(\)"),
    "devices": (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1, device="meta")), "are on cpu and meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_network_that_cannot_be_cut_is_refused_in_one_sentence(case):
    make, wanted = BAD_MODELS[case]
    with pytest.raises(BadModelError, match=wanted) as caught:
        trace(make(), (3, 8, 8), "bad")
    assert "\n" not in str(caught.value)


class Windowed(nn.Module):
    """Its shapes follow masks, but the same for every image: a buffer and what is computed from sizes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
        self.register_buffer("window", torch.arange(64).reshape(8, 8) % 3 > 0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        later = torch.arange(x.shape[2])[:, None] < torch.arange(x.shape[3])
        rows, columns = torch.where(~self.window)
        x = x[:, :, self.window].mean(2) + x[..., rows, columns].mean(2) + x[..., later.logical_not()].mean(2)
        x[x > 9] = 9.0  # as many values as before
        result: Tensor = self.fc(torch.where(x > 0, x, 0.1 * x))
        return result


def test_infinity_in_a_buffer_is_a_mask():
    assert trace(masked(float("-inf")), (3, 8, 8), "masked").network.layers


def test_masks_that_are_the_same_for_every_image_are_no_control_flow():
    traced = trace(Windowed(), (3, 8, 8), "windowed")
    assert [group.id for group in traced.network.prunable_groups] == ["conv"]


def test_dependencies_that_cannot_be_followed_are_refused(monkeypatch):
    import torch_pruning

    def fail(*_: object, **__: object) -> None:
        raise KeyError("UnknownBackward0")

    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", fail)
    with pytest.raises(
        BadModelError, match=r"residual cannot be traced into channel groups \(KeyError: 'UnknownBackward0'\)"
    ):
        trace(Residual(4), (3, 16, 16), "residual")


def test_network_without_layers_is_refused():
    with pytest.raises(BadModelError, match="no convolution or linear layer"):
        trace(nn.Sequential(nn.ReLU(), nn.Flatten()), (3, 8, 8), "empty")


def test_fingerprint_follows_the_architecture_and_not_the_weights():
    assert fingerprint(settled(Residual(4), 1)) == fingerprint(settled(Residual(4), 2)) != fingerprint(Residual(5))


@pytest.mark.parametrize("criterion", [l1_importance, l2_importance])
def test_importance_ranks_a_dead_channel_last_and_a_loud_one_first(criterion):
    model = settled(Residual(4))
    traced = trace(model, (3, 16, 16), "residual")
    with torch.no_grad():
        for name in ("stem.0", "a2.0"):
            model.get_submodule(name).weight[3] = 0
            model.get_submodule(name).weight[5] *= 50
        for name in ("a1.0", "b1.0", "shortcut.0"):
            model.get_submodule(name).weight[:, 3] = 0
    score = criterion(model, traced)["stem.0"]
    assert score.shape == (8,) and int(score.argmin()) == 3 and int(score.argmax()) == 5 and float(score[3]) == 0


def test_importance_by_hand():
    model = settled(Residual(4))
    traced = trace(model, (3, 16, 16), "residual")
    owned = [model.a1[0].weight, model.a2[0].weight.transpose(0, 1)]
    assert torch.allclose(l1_importance(model, traced)["a1.0"], sum(w.abs().sum((1, 2, 3)) for w in owned))
    assert torch.allclose(l2_importance(model, traced)["a1.0"], sum(w.pow(2).sum((1, 2, 3)) for w in owned).sqrt())
    with pytest.raises(UnknownNameError, match="Did you mean 'l2'"):
        importance_by_name("l22")


@pytest.mark.parametrize("criterion", IMPORTANCE)
def test_every_importance_ranks_a_channel_last_that_says_nothing(criterion):
    """Neither its weights, nor its BatchNorm, nor its readers let anything through."""
    model, data = settled(Residual(4)), patterns()
    with torch.no_grad():
        model.b1[0].weight[3], model.b1[1].weight[3], model.b1[1].bias[3] = 0, 0, 0
        model.b2[0].weight[:, 3] = 0
    traced = trace(model, (3, 16, 16), "residual")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores = importance_by_name(criterion)(model, traced, data)
    assert {key: len(value) for key, value in scores.items()} == {g.id: g.width for g in traced.network.groups}
    score = scores["b1.0"]
    assert int(score.argmin()) == 3 and float(score[3]) < 1e-6 < float(score.sort().values[1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = importance_by_name(criterion)(model, traced, data)
    assert all(torch.equal(again[key], value) for key, value in scores.items())


@pytest.mark.parametrize("criterion", IMPORTANCE)
def test_every_importance_scores_linear_layers_that_see_images(criterion):
    model, data = settled(Scaled()), patterns()
    with torch.no_grad():
        model.up.weight[5], model.up.bias[5], model.down.weight[:, 5] = 0, 0, 0
    traced = trace(model, (3, 16, 16), "scaled")
    scores = importance_by_name(criterion)(model, traced, data)
    assert {key: len(value) for key, value in scores.items()} == {g.id: g.width for g in traced.network.groups}
    assert int(scores["up"].argmin()) == 5 and float(scores["up"].sort().values[1]) > 1e-6


def test_refitting_takes_as_many_places_of_linear_layers_as_of_convolutions(monkeypatch):
    from edgecompress import reconstruction

    seen = []
    monkeypatch.setattr(reconstruction, "POSITIONS", 5)
    patches = reconstruction._patches
    monkeypatch.setattr(reconstruction, "_patches", lambda *known: seen.append(patches(*known)) or seen[-1])
    model, data = settled(Scaled()), patterns()
    input_moments(model, trace(model, (3, 16, 16), "scaled"), data)
    images = min(len(data.train), 50)
    assert {tuple(rows.shape) for rows in seen[:3]} == {(5 * images, 8), (5 * images, 16), (images, 8)}


def test_chip_ranks_copies_below_a_channel_that_stands_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 4)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.qr(torch.randn(27, 4))[0].t().reshape(4, 3, 3, 3))
        model[0].weight[1] = model[0].weight[0]
    traced = trace(model, (3, 8, 8), "copies")
    score = importance_by_name("chip")(model, traced, patterns(size=8))["0"]
    images = patterns(size=8)
    with torch.no_grad():
        seen = model[0](images.normalise(images.train.images))
    assert torch.allclose(score[0], score[1], rtol=1e-3)
    share = score / seen.flatten(2).norm(dim=2).mean(0)  # of what the channel carries
    assert float(share[:2].max()) < 0.85 * float(share[2:].max())


def test_taylor_is_the_change_of_the_loss_when_nobody_reads_the_channel():
    """Where every channel is nearly silent already, the first order is the whole change."""
    model, data = settled(Residual(4)), patterns(per_class=5)
    data = replace(data, train=data.train.take(torch.arange(16)))
    traced = trace(model, (3, 16, 16), "residual")
    with torch.no_grad():
        model.b2[0].weight.mul_(0.01)
    score = importance_by_name("taylor")(model, traced, data)["b1.0"]
    x, y = data.normalise(data.train.images), data.train.labels
    with torch.no_grad():
        base, changes = F.cross_entropy(model(x), y), []
        for channel in range(16):
            kept = model.b2[0].weight[:, channel].clone()
            model.b2[0].weight[:, channel] = 0
            changes.append((F.cross_entropy(model(x), y) - base).abs())
            model.b2[0].weight[:, channel] = kept
    assert torch.allclose(score, torch.stack(changes), rtol=0.1, atol=2e-5)


def test_importance_by_images_wants_images():
    model = settled(Residual(4))
    with pytest.raises(UsageError, match="'taylor' looks at training images"):
        importance_by_name("taylor")(model, trace(model, (3, 16, 16), "residual"))


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_least_squares_restores_what_the_lost_channels_said_where_others_say_it_too(kernel):
    """Channel 1 is a multiple of channel 0: with it gone, the reader can still compute exactly what it did."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, kernel, padding=kernel // 2), nn.Flatten(),
                          nn.Linear(5 * 64, 3)).eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = -2 * model[0].weight[0], -2 * model[0].bias[0]
    traced, data = trace(model, (3, 8, 8), "copies"), patterns(size=8)
    scores = {group.id: torch.arange(group.width, 0, -1).float() for group in traced.network.groups}
    scores["0"] = torch.tensor([4.0, 1.0, 3.0, 2.0])
    moments = input_moments(model, traced, data)
    x = data.normalise(data.test.images)
    with torch.no_grad():
        wanted = model(x)
        cut, refitted = (prune(model, traced, {"0": 3}, scores, given)(x) for given in (None, moments))
    before, after = float((cut - wanted).pow(2).mean()), float((refitted - wanted).pow(2).mean())
    assert after < 1e-3 * before
    assert torch.allclose(wanted, model(x))  # the dense network is as it was


def test_least_squares_lowers_the_error_of_every_layer_and_leaves_whole_layers_alone():
    model, data = settled(Residual(4)), patterns()
    traced = trace(model, (3, 16, 16), "residual")
    moments = input_moments(model, traced, data)
    plain = prune(model, traced, {"b1.0": 8})
    refitted = prune(model, traced, {"b1.0": 8}, None, moments)
    changed = {k for k, v in plain.state_dict().items() if not torch.equal(v, refitted.state_dict()[k])}
    assert changed == {"b2.0.weight"}
    x = data.normalise(data.test.images)
    errors = []
    with torch.no_grad():
        for net in (model, plain, refitted):
            h = F.relu(net.stem(x))
            h = F.relu(net.a2(F.relu(net.a1(h))) + h)
            errors.append(net.b2[0](F.relu(net.b1(h))))
        centred = [(e - errors[0] - (e - errors[0]).mean((0, 2, 3), keepdim=True)).pow(2).mean() for e in errors[1:]]
    assert centred[1] < 0.9 * centred[0]


def test_pruner_masks_the_smallest_single_weights_that_the_policy_names():
    model, data = settled(Residual(4)), patterns()
    build = pruner(model, trace(model, (3, 16, 16), "residual"), data, reconstruct=False)
    layers = {"b2.0": LayerChoice(keep_elements=0.25), "a1.0": LayerChoice()}
    smaller = build(CompressionPolicy(model="", keep_channels={"b1.0": 8}, layers=layers))
    weight, dense = smaller.b2[0].weight, build(CompressionPolicy(model="", keep_channels={"b1.0": 8})).b2[0].weight
    kept = weight != 0
    assert weight.shape == (16, 8, 3, 3) and float(kept.float().mean()) == 0.25
    assert torch.equal(weight[kept], dense[kept]) and dense[kept].abs().min() >= dense[~kept].abs().max()
    assert bool((smaller.a1[0].weight != 0).all())


def test_batchnorm_is_reestimated_to_the_statistics_of_the_training_images():
    data = patterns()
    model = settled(Residual(4))
    weights = {key: value.clone() for key, value in model.named_parameters()}
    reestimate_batchnorm(model, data, images=len(data.train), augment=False)
    with torch.no_grad():
        outputs = model.stem[0](data.normalise(data.train.images))
    assert torch.allclose(model.stem[1].running_mean, outputs.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(model.stem[1].running_var, outputs.var((0, 2, 3)), rtol=1e-2)
    assert not model.training and all(norm.momentum == 0.1 for norm in (model.stem[1], model.b2[1]))
    assert all(torch.equal(value, weights[key]) for key, value in model.named_parameters())
