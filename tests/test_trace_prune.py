"""A pruned network is the masked network made smaller, and costs exactly what was predicted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sample_networks import NETWORKS, Residual, patterns, settled, unprunable
from torch import Tensor, nn

from edgecompress.cost import count, kernels
from edgecompress.errors import BadModelError, UnknownNameError, UsageError
from edgecompress.models import CifarVgg, build_model
from edgecompress.prune import importance_by_name, l1_importance, l2_importance, prune, reestimate_batchnorm
from edgecompress.spec import CompressionPolicy
from edgecompress.trace import fingerprint, trace

ZOO = ("resnet8", "resnet20", "mobilenet_cifar")


CASES = {
    **{name: (lambda kind=kind: kind(4), (3, 16, 16)) for name, kind in NETWORKS.items()},
    **{name: (lambda name=name: build_model(name, 10), (3, 32, 32)) for name in ZOO},
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
    check_equality(*any_case, seed=0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pruned_network_equals_the_masked_one_at_other_widths(tiny, seed):
    check_equality(*tiny, seed=seed)


def check_equality(model, shape, traced, seed: int) -> None:
    widths, scores = random_policy(traced, seed)
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


class OneWide(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 4))


def test_groups_that_cannot_be_cut_say_why_and_are_refused():
    for model, wanted in ((Fixed(), "cutting it breaks the forward pass"), (OneWide(), "it has 1 channel")):
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
