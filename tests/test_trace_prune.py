"""A pruned network is the masked network made smaller, and costs exactly what was predicted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sample_networks import BLOCKS, NETWORKS, GroupNormed, Residual, Scaled, settled, unprunable
from torch import Tensor, nn

from edgecompress.channel_groups import tensors_of
from edgecompress.cost import count, kernels
from edgecompress.errors import BadModelError, UnknownNameError, UsageError
from edgecompress.models import CifarVgg, build_model
from edgecompress.prune import prune
from edgecompress.raw_heads import RawHeads
from edgecompress.spec import CompressionPolicy
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


def test_fingerprint_follows_the_architecture_and_not_the_weights():
    assert fingerprint(settled(Residual(4), 1)) == fingerprint(settled(Residual(4), 2)) != fingerprint(Residual(5))
