"""The second action of stage 1: when it is offered, and that what it chose is what the exported file holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from sample_networks import Residual, patterns, settled
from torch import nn

import edgecompress
from edgecompress.channel_sensitivity import channel_sensitivities
from edgecompress.channel_stage import channels_of
from edgecompress.cost import count
from edgecompress.exporters.sizes import PlannedSize
from edgecompress.exporters.to_onnxruntime import integer_model
from edgecompress.finetune import TrainSettings, train
from edgecompress.job import Job, limits_for
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.progress import Silent
from edgecompress.runs import RunFolder
from edgecompress.spec import CompressionPolicy, Config, LayerChoice, parse_budgets
from edgecompress.trace import trace


class Wide(nn.Module):
    """Most weights lie in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 96, 3, 1, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU(),
        )  # fmt: skip
        self.fc = nn.Linear(96, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc(self.features(x).mean((2, 3)))
        return result


def offered(tmp_path, budget: str, target: str = "x86", **options) -> bool:
    """Whether stage 1 has two actions per group."""
    model = Wide()
    traced = trace(model, (3, 16, 16), "wide")
    sparse = target == "x86"
    size = PlannedSize(2000, 4.5 if sparse else 8, sparse=sparse)
    job = Job(
        config=Config(budget=budget, **options), target=target_by_name(target), data=patterns(), run=RunFolder(tmp_path),
        progress=Silent(), original=model, traced=traced, limits=(),
        original_cost=count(traced.network, CompressionPolicy(model=""), None, lambda kernels, params: 4 * params),
    )  # fmt: skip
    job = replace(job, limits=limits_for(parse_budgets(budget), job.original_cost))
    space = channels_of(job, job.cost_model(size, None))
    groups = len(traced.network.prunable_groups)
    assert len(space.levels) in (groups, 2 * groups) and len(space.steps) == groups
    return len(space.levels) == 2 * groups


@pytest.mark.parametrize(
    ("budget", "options", "wanted"),
    [
        ("flops=0.5x", {}, False),
        ("size=0.1x", {}, True),
        ("flops=0.5x,size=0.2x", {}, False),  # what the multiply-adds leave is small enough
        ("flops=0.9x,size=0.1x", {}, True),
        ("size=0.2x", {"target": "jetson"}, False),  # TensorRT stores zeros as all other weights
        ("size=0.1x", {"single_weights": False}, False),
        ("flops=0.5x", {"single_weights": True}, True),
        ("flops=0.5x", {"prune_reward": "paper"}, True),
        ("flops=0.5x", {"prune_reward": "paper", "single_weights": False}, False),
    ],
)
def test_single_weights_are_offered_where_they_relieve_what_channels_do_not(tmp_path, budget, options, wanted):
    assert offered(tmp_path, budget, **options) == wanted


def test_policy_without_bits_is_priced_at_the_planned_ones_and_keeps_its_zeros(tmp_path):
    model = Wide()
    traced = trace(model, (3, 16, 16), "wide")
    job = Job(
        config=Config(budget="size=0.1x"), target=target_by_name("x86"), data=patterns(), run=RunFolder(tmp_path),
        progress=Silent(), original=model, traced=traced, limits=(),
        original_cost=count(traced.network, CompressionPolicy(model="")), bits={"fc": LayerChoice(weight_bits=4, activation_bits=8)},
    )  # fmt: skip
    sparse = CompressionPolicy(model="", layers={"features.3": LayerChoice(keep_elements=0.5)})
    planned = job.planned(sparse).layers
    assert planned["features.3"] == LayerChoice(keep_elements=0.5, weight_bits=8, activation_bits=8)
    assert planned["fc"] == LayerChoice(weight_bits=4, activation_bits=8)
    assert planned["features.0"] == LayerChoice(weight_bits=8, activation_bits=8)
    chosen = CompressionPolicy(model="", layers={"fc": LayerChoice(weight_bits=3, activation_bits=8)})
    assert job.planned(chosen) == chosen


def test_sensitivities_rank_the_groups_by_what_cutting_one_alone_does_and_are_kept(tmp_path):
    torch.manual_seed(0)
    model, data = settled(Residual(4)), patterns()
    with torch.no_grad():
        model.b2[0].weight[:8] *= 1e-4  # half of these channels say nothing
        model.b1[0].weight[:8] *= 1e-4
        model.b1[1].weight[:8], model.b1[1].bias[:8] = 0, 0
    traced = trace(model, (3, 16, 16), "residual")
    found = channel_sensitivities(model, traced, data, tmp_path / "c.json")
    assert set(found.divergence) == {group.id for group in traced.network.prunable_groups} and found.images == 40
    assert found.divergence["b1.0"] < 1e-6 < found.divergence["stem.0"]
    with torch.no_grad():
        model.fc.weight.zero_()
    assert channel_sensitivities(model, traced, data, tmp_path / "c.json") == found  # not measured again
    assert channel_sensitivities(model, traced, data).divergence["stem.0"] == 0


@pytest.fixture(scope="module")
def sparse_run(quick, tmp_path_factory):
    """A run whose budget on bytes the uniform policy keeps with zeros; no agent, so that it is the one that is built."""
    data = patterns(per_class=32)
    torch.manual_seed(0)
    model = train(Wide(), data, TrainSettings(epochs=4, learning_rate=0.05, batch_size=16, distill=0.0))
    return edgecompress.compress(
        model, data, target="x86", budget="size=0.07x", agent="uniform", runs=tmp_path_factory.mktemp("runs"), name="sparse",
        episodes=8, finetune_epochs=1, noise_epochs=1, qat_epochs=1, threads=1,
    )  # fmt: skip


def test_chosen_zeros_outlive_every_training_and_make_the_file_smaller(sparse_run):
    trials = [trial for trial in sparse_run.folder.trials() if trial.stage == "prune"]
    network, policy = sparse_run.folder.network(), sparse_run.folder.policy()
    built = next(t for t in trials if t.choice[::2] == tuple(policy.keep_channels.values()))
    shares = {
        member: share / 1000
        for group, share in zip(network.prunable_groups, built.choice[1::2], strict=True)
        for member in group.members
    }
    assert min(shares.values()) < 0.8
    model = edgecompress.load(sparse_run.path, Wide)
    integers = sparse_run.folder.quantized()
    for name, share in shares.items():
        if share < 1:
            kept = float((model.get_submodule(name).weight != 0).float().mean())
            assert kept == policy.layers[name].keep_elements == pytest.approx(share, abs=0.01)
            assert float((integers.weights[name].values != 0).mean()) <= kept
    file = sparse_run.path / "exports/model.int8.onnx"
    assert Counter(node.op_type for node in onnx.load(file).graph.node)["CumSum"] > 0  # bitmask and non-zero weights
    filled = {
        name: replace(weight, values=np.where(weight.values == 0, 1, weight.values).astype(np.int8))
        for name, weight in integers.weights.items()
    }
    sparse, dense = (integer_model(found).ByteSize() for found in (integers, replace(integers, weights=filled)))
    assert sparse < dense - 500 and sparse_run.missed == []
