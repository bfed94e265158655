"""What Torch-Pruning alone does not cut: frozen layers, grouped transposed convolutions, shuffles, heads of training."""

from __future__ import annotations

import pytest
import torch
from sample_networks import Residual, settled
from torch import Tensor, nn

from edgecompress.channel_groups import tensors_of
from edgecompress.checkpoints import fit_state, load_tensors
from edgecompress.cost import count
from edgecompress.cuts import buffer_channels
from edgecompress.errors import BadModelError
from edgecompress.prune import prune
from edgecompress.raw_heads import TrainingHeads
from edgecompress.shuffle import unshuffled
from edgecompress.spec import CompressionPolicy
from edgecompress.trace import trace


def test_frozen_weights_are_pruned_like_others():
    wanted = trace(Residual(4), (3, 16, 16), "net").network
    frozen = Residual(4).requires_grad_(False)
    assert trace(frozen, (3, 16, 16), "net").network == wanted
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def frozen_norm() -> nn.Module:
    from torchvision.ops import FrozenBatchNorm2d

    norm = FrozenBatchNorm2d(8)
    for buffer in (norm.weight, norm.running_mean, norm.running_var):
        buffer.copy_(torch.rand(8, generator=torch.Generator().manual_seed(2)) + 0.5)
    return norm


def plain_norm() -> nn.Module:
    norm = nn.BatchNorm2d(8, affine=False)
    norm.running_mean.copy_(torch.arange(8) / 8)
    return norm


# Between a convolution with eight outputs and one with eight inputs, and how many channels go as one.
LAYERS = {
    "frozen BatchNorm": (frozen_norm, 1),
    "BatchNorm without weights": (plain_norm, 1),
    "depthwise transposed": (lambda: nn.ConvTranspose2d(8, 8, 2, 2, groups=8), 1),
    "grouped transposed": (lambda: nn.ConvTranspose2d(8, 8, 2, 2, groups=2), 2),
    "PReLU": (lambda: nn.PReLU(8), 1),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layer_is_cut_with_the_channels_that_pass_it(case):
    make, together = LAYERS[case]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), make(), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.LazyLinear(4))
    model(torch.randn(1, 3, 6, 6))
    model.eval()
    traced = trace(model, (3, 6, 6), "net")
    widths = {group.id: group.width for group in traced.network.prunable_groups}
    own = [key for key in widths if key in ("0", "1")]
    assert {widths[key] for key in own} == {8 // together}
    kept = torch.tensor([1, 3])
    scores = {key: torch.isin(torch.arange(width), kept).float() for key, width in widths.items()}
    smaller = prune(model, traced, dict.fromkeys(own, 2), scores | {"4": torch.ones(4)})
    with (
        torch.no_grad()
    ):  # nobody reads the other channels, neither behind the layer nor, where channels mix there, in it
        lost = [channel for channel in range(8) if channel % (8 // together) not in (1, 3)]
        model[2].weight[:, lost] = 0
        if "1" in own:
            model[1].weight[lost] = 0
    x = torch.randn(2, 3, 6, 6)
    assert torch.allclose(smaller(x), model(x), atol=1e-5)
    assert sum(value.numel() for value in smaller[1].state_dict().values()) < sum(
        value.numel() for value in model[1].state_dict().values()
    )


def test_buffers_per_channel_are_told_from_others():
    pixel_mean, table = nn.Module(), nn.Module()
    pixel_mean.register_buffer("mean", torch.zeros(1, 3, 1, 1))
    table.register_buffer("table", torch.zeros(4, 4))
    assert buffer_channels(frozen_norm()) == 8 and buffer_channels(pixel_mean) == 3
    assert [buffer_channels(m) for m in (table, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(3, 3, 1))] == [0, 0, 0, 0]


@pytest.fixture(scope="module")
def shuffle_network():
    from torchvision.models import ShuffleNetV2

    return settled(ShuffleNetV2([2, 4, 1], [8, 16, 32, 48, 24], num_classes=5))


def test_network_without_shuffles_computes_the_same(shuffle_network):
    other = unshuffled(shuffle_network)
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    count_of = [sum(parameter.numel() for parameter in model.parameters()) for model in (shuffle_network, other)]
    assert count_of[0] == count_of[1]
    with torch.no_grad():
        wanted = shuffle_network(x)
        assert torch.allclose(other(x), wanted, atol=1e-4 * float(wanted.abs().max()))
        trained = shuffle_network.train()(x)
        assert torch.allclose(other.train()(x), trained, atol=1e-4 * float(trained.abs().max()))
    shuffle_network.eval()
    with pytest.raises(BadModelError, match="Residual is no torchvision ShuffleNetV2"):
        unshuffled(Residual(4))


def test_all_channels_of_a_network_without_shuffles_can_be_halved(shuffle_network):
    model = unshuffled(shuffle_network).eval()
    traced = trace(model, (3, 32, 32), "shuffle")
    stuck = {group.reason for group in traced.network.groups if not group.prunable}
    assert stuck == {"its channels are the network's output"}
    keep = {group.id: max(1, group.width // 2) for group in traced.network.prunable_groups}
    macs = [count(traced.network, CompressionPolicy(model="", keep_channels=k)).macs for k in ({}, keep)]
    assert macs[1] <= 0.45 * macs[0]  # its stem, which reads three colours, is a large part
    assert prune(model, traced, keep).train()(torch.randn(2, 3, 32, 32)).shape == (2, 5)


class Versioned(nn.Linear):
    """Refuses weights without its version, as MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if local_metadata.get("version") != 2:
            raise ValueError("no version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


def test_weights_from_a_file_go_into_layers_with_versions():
    model, saved = nn.Sequential(Versioned(3, 2)), {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)}
    load_tensors(model, saved)
    assert fit_state(model, saved, "The file") == "" and torch.equal(model(torch.ones(1, 3)), torch.full((1, 2), 4.0))


class Auxiliary(nn.Module):
    """GoogLeNet in small: a second head in training only, dropout before both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.fc, self.aux = nn.Linear(8, 2), nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.drop(self.norm(self.conv(x)).mean((2, 3)))
        return (self.fc(x), self.aux(x)) if self.training else self.fc(x)


def test_heads_of_training_are_pruned_through_their_wrapper():
    model = TrainingHeads(Auxiliary()).eval()
    assert not model.network.norm.training and not model.network.drop.training and model.network.training
    traced = trace(model, (3, 8, 8), "auxiliary")
    assert {group.id: group.width for group in traced.network.prunable_groups} == {
        "network.conv": 8,
        "network.aux.0": 6,
    }
    smaller = prune(model, traced, {"network.conv": 4, "network.aux.0": 3})
    outputs = tensors_of(smaller.train()(torch.randn(2, 3, 8, 8)))
    sum(tensor.sum() for tensor in outputs).backward()
    assert len(outputs) == 2 and all(parameter.grad is not None for parameter in smaller.parameters())
    assert smaller.network.norm.training and smaller.network.eval()(torch.randn(2, 3, 8, 8)).shape == (2, 2)
