"""What a policy costs, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from sample_networks import Mobile, settled
from torch import nn

from edgecompress.cost import Latency, average_weight_bits, channels, count, kernels
from edgecompress.errors import UnknownNameError
from edgecompress.prune import prune
from edgecompress.reward import REWARDS, reward_by_name
from edgecompress.spec import CompressionPolicy, Cost, LayerChoice
from edgecompress.trace import trace


@pytest.fixture(scope="module")
def network():
    """3x8x8 -> conv 4 (3x3, padded, bias) -> ReLU -> flatten 4*8*8 -> linear 5."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    return trace(model, (3, 8, 8), "hand").network


CONV_MACS, FC_MACS = 3 * 4 * 9 * 64, 256 * 5
CONV_PARAMS, FC_PARAMS = 3 * 4 * 9 + 4, 256 * 5 + 5


def policy(keep: int = 4, **layers: LayerChoice) -> CompressionPolicy:
    return CompressionPolicy(model="", keep_channels={"0": keep}, layers={k.strip("_"): v for k, v in layers.items()})


def test_uncompressed_counts(network):
    cost = count(network, CompressionPolicy(model=""))
    assert cost.macs == cost.sparse_macs == CONV_MACS + FC_MACS
    assert cost.params == cost.nonzeros == CONV_PARAMS + FC_PARAMS
    assert cost.size_bytes == 0 and cost.latency_us is None


def test_half_the_channels_behind_a_flatten(network):
    assert network.layers[1].in_terms[0].per_channel == 64
    assert channels(network.layers[1], {"0": 2, "3": 5}, network.widths) == (128, 5)
    cost = count(network, policy(2))
    assert cost.macs == 3 * 2 * 9 * 64 + 128 * 5
    assert cost.params == 3 * 2 * 9 + 2 + 128 * 5 + 5


def test_bops_count_float_as_32_bits_and_the_network_input_as_8(network):
    assert count(network, CompressionPolicy(model="")).bops == CONV_MACS * 32 * 8 + FC_MACS * 32 * 32
    chosen = policy(_0=LayerChoice(weight_bits=3, activation_bits=6), _3=LayerChoice(weight_bits=4, activation_bits=5))
    assert count(network, chosen).bops == CONV_MACS * 3 * 6 + FC_MACS * 4 * 5


def test_elements_that_are_zero_count_in_their_own_columns_only(network):
    cost = count(network, policy(_0=LayerChoice(keep_elements=0.25)))
    assert cost.macs == CONV_MACS + FC_MACS and cost.params == CONV_PARAMS + FC_PARAMS
    assert cost.sparse_macs == CONV_MACS // 4 + FC_MACS
    assert cost.nonzeros == 3 * 4 * 9 // 4 + 4 + FC_PARAMS  # biases are not pruned


def test_average_bits_weigh_each_layer_by_its_weights_and_not_by_its_biases(network):
    chosen = policy(2, _0=LayerChoice(weight_bits=2), _3=LayerChoice(weight_bits=8))
    conv, linear = 3 * 2 * 9, 128 * 5
    assert average_weight_bits(network, chosen) == pytest.approx((2 * conv + 8 * linear) / (conv + linear))
    assert average_weight_bits(network, CompressionPolicy(model="")) == 32


def test_size_and_latency_models_are_asked_with_the_built_kernels(network):
    asked = []

    def latency(built, between) -> Latency:
        assert not between
        asked.append([(k.in_channels, k.out_channels, k.weight_bits, k.activation_bits) for k in built])
        return Latency(7.0, 6.0, 9.0, {"measured": 1, "estimated": 1})

    chosen = policy(2, _0=LayerChoice(weight_bits=4, activation_bits=8))
    cost = count(network, chosen, latency, lambda built, params: params + len(built))
    assert asked == [[(3, 2, 4, 8), (128, 5, 32, 32)]]
    assert cost.size_bytes == cost.params + 2
    assert (cost.latency_us, cost.latency_low_us, cost.latency_high_us) == (7.0, 6.0, 9.0)
    assert (cost.kernels_measured, cost.kernels_interpolated, cost.kernels_estimated) == (1, 0, 1)


def test_depthwise_channels_are_counted_once():
    model = settled(Mobile(4))
    traced = trace(model, (3, 16, 16), "mobile")
    depthwise = traced.network.layers[1]
    assert (depthwise.kind, depthwise.macs, depthwise.params) == ("depthwise", 8 * 9 * 64, 72)
    built = kernels(traced.network, CompressionPolicy(model="", keep_channels={depthwise.in_terms[0].group: 4}))
    assert (built[1].in_channels, built[1].out_channels) == (4, 4)
    cost = count(traced.network, CompressionPolicy(model="", keep_channels={depthwise.in_terms[0].group: 4}))
    assert count(traced.network, CompressionPolicy(model="")).macs - cost.macs == 64 * (4 * 27 + 4 * 9 + 4 * 16)
    smaller = prune(model, traced, {depthwise.in_terms[0].group: 4})
    assert cost.params == sum(parameter.numel() for parameter in smaller.parameters())


class WithScale(nn.Module):
    """A learned number that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 6), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc2(self.fc1(x.flatten(1)) * self.scale)
        return result


def test_parameters_outside_layers_and_groups_are_kept_in_the_sum():
    network = trace(WithScale(), (3, 2, 2), "scaled").network
    assert network.fixed_params == 1
    assert count(network, CompressionPolicy(model="")).params == 12 * 6 + 6 + 6 * 4 + 4 + 1


def cost(macs: int, size: int, latency: float | None) -> Cost:
    return Cost(
        macs=macs, sparse_macs=macs // 2, params=1, nonzeros=1, size_bytes=size, bops=macs * 64, latency_us=latency
    )  # fmt: skip


def test_rewards_by_hand():
    original, small = cost(1000, 400, 80.0), cost(500, 100, 20.0)
    assert REWARDS["accuracy-flops-latency"](0.9, small, original) == pytest.approx(0.9 - 0.02 * (0.5 + 0.25 + 0.25))
    assert REWARDS["accuracy-bytes-latency"](0.9, small, original) == pytest.approx(
        0.9 - 0.02 * (0.25 + 16 * 0.5 + 0.25)
    )
    assert REWARDS["accuracy"](0.9, small, original) == 0.9
    assert REWARDS["paper"](0.9, small, original) == pytest.approx(-0.1 * 5.521460917862246)
    without = cost(500, 100, None)
    assert REWARDS["accuracy-flops-latency"](0.9, without, cost(1000, 400, None)) == pytest.approx(0.9 - 0.015)
    assert REWARDS["accuracy-flops-latency"](0.9, cost(500, 0, None), original) == pytest.approx(0.9 - 0.01)


@pytest.mark.parametrize("name", list(REWARDS))
def test_rewards_never_fall_with_accuracy_or_rise_with_cost(name):
    original = cost(1000, 400, 80.0)
    reward = reward_by_name(name)
    assert reward(0.8, cost(500, 100, 20.0), original) < reward(0.9, cost(500, 100, 20.0), original)
    assert reward(0.8, cost(500, 100, 20.0), original) >= reward(0.8, cost(800, 200, 50.0), original)


def test_unknown_reward_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'accuracy'"):
        reward_by_name("acuracy")
