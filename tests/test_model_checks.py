"""Networks that cannot be traced or cut are refused, in one sentence that says why."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sample_networks import Residual
from torch import Tensor, nn

from edgecompress.errors import BadModelError
from edgecompress.trace import trace


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.conv(F.relu(self.conv(x))).mean((2, 3)))
        return result


def test_layer_that_runs_twice_costs_twice():
    network = trace(Twice(), (3, 8, 8), "twice", shared=True).network
    assert {layer.name: layer.macs for layer in network.layers}["conv"] == 2 * 3 * 3 * 9 * 64


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
    "branch": (lambda: Acts(lambda x: x if x.sum() > 0 else -x), r"depends on the image: .*\(__bool__\) \(.*test_model_checks"),
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
    "mask": (lambda: Acts(lambda x: x * x[x > 0].mean()), r"depends on the image: .*values \(__getitem__\) \(.*test_model_checks"),
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
