"""An episode says what a plain evaluation says, gives up only on what cannot win, and keeps nothing behind."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from sample_networks import Residual, patterns, settled
from torch import nn

from edgecompress.data import Split
from edgecompress.episodes import (
    Episodes,
    Part,
    augmented,
    balanced_order,
    highest_likely,
    judged,
    least_likely,
    missing_classes,
)
from edgecompress.fidelity import said_by
from edgecompress.finetune import accuracy_and_loss
from edgecompress.machine import give_memory_back, resident_bytes
from edgecompress.prune import prune, reestimate_batchnorm, reestimate_on
from edgecompress.spec import CompressionPolicy
from edgecompress.tasks import CLASSIFICATION
from edgecompress.trace import trace


@pytest.fixture(scope="module")
def data():
    return patterns(size=8)


@pytest.fixture(scope="module")
def episodes(data):
    model = settled(Residual(4), 0)
    traced = trace(model, tuple(data.test.images.shape[1:]), "residual")
    return Episodes(
        lambda policy: prune(model, traced, policy.keep_channels), data, data.test, images=64, recalibrate=40
    )


def test_episode_says_what_a_plain_evaluation_says(data, episodes):
    policy = CompressionPolicy(model="residual")
    rows = balanced_order(data.test, data, 0)[:64]
    accuracy, loss = accuracy_and_loss(episodes.network(policy), data, data.test.take(rows))
    found = episodes(policy)
    assert found.accuracy == accuracy and found.loss == pytest.approx(loss, rel=1e-4) and not found.abandoned
    assert episodes(policy) == found


def statistics_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value for key, value in model.state_dict().items() if "running_" in key])


def test_statistics_are_taken_anew_from_augmented_training_images_before_every_reward(data, monkeypatch):
    """Not those that were cut out of the dense network's, nor those of the images as they are."""
    model = settled(Residual(4), 0)
    traced = trace(model, (3, 8, 8), "residual")

    def build(policy: CompressionPolicy) -> torch.nn.Module:
        return prune(model, traced, policy.keep_channels)

    policy = CompressionPolicy(model="residual", keep_channels={"b1.0": 8})
    episodes = Episodes(build, data, data.test, images=64, recalibrate=40, seed=3)
    found = statistics_of(episodes.network(policy))
    wanted, plain = build(policy), build(policy)
    reestimate_on(wanted, augmented(data, 40, episodes.images.batch_size, 3))
    reestimate_batchnorm(plain, data, images=40, seed=3, augment=False)
    assert torch.allclose(found, statistics_of(wanted), rtol=1e-4, atol=1e-6)
    assert (found - statistics_of(build(policy))).abs().max() > 0.1
    assert (found - statistics_of(plain)).abs().max() > 0.01
    built = []
    network = episodes.network
    monkeypatch.setattr(episodes, "network", lambda policy: built.append(network(policy)) or built[-1])
    episodes(policy)
    episodes.unless_hopeless(policy, lambda accuracy: True)
    assert [torch.equal(statistics_of(model), found) for model in built] == [True, True]


def test_every_first_part_of_the_images_holds_all_classes_alike(data):
    labels = torch.arange(10).repeat_interleave(50)
    split = Split(torch.zeros(500, 1, 8, 8, dtype=torch.uint8), labels)
    order = balanced_order(split, data, 3)
    assert sorted(order.tolist()) == list(range(500))
    for first in (50, 100, 250):
        counts = labels[order[:first]].bincount(minlength=10)
        assert int(counts.max() - counts.min()) <= 6
    assert not torch.equal(order, balanced_order(split, data, 4))


def parts_of(right: np.ndarray, size: int = 100) -> list[Part]:
    return [
        Part(len(piece), int(piece.sum()), 1.0, (int(piece.sum()), len(piece)))
        for piece in np.split(right, len(right) // size)
    ]


def test_bound_holds_and_gives_up_only_what_cannot_win():
    random = np.random.default_rng(0)
    wrong = 0
    for accuracy in np.linspace(0.05, 0.95, 200):
        right = random.random(1000) < accuracy
        bounds = [highest_likely(int(right[:seen].sum()), seen, 1000) for seen in range(100, 1001, 100)]
        wrong += sum(bound < right.mean() for bound in bounds)
        assert bounds[-1] == pytest.approx(right.mean())
    assert wrong <= 6  # of 2,000 looks
    assert highest_likely(0, 100, 1000) > 0 and highest_likely(100, 100, 1000) == 1.0


def test_hopeless_policy_is_given_up_early_and_a_good_one_is_measured_whole():
    random = np.random.default_rng(1)
    parts = parts_of(random.random(1000) < 0.4)
    asked: list[Part] = []

    def told():
        for part in parts:
            asked.append(part)
            yield part

    found = judged(told(), 1000, CLASSIFICATION, lambda accuracy: accuracy > 0.7)
    assert found.abandoned and len(asked) <= 3 and found.accuracy == pytest.approx(0.4, abs=0.1)
    whole = judged(iter(parts), 1000, CLASSIFICATION, lambda accuracy: accuracy > 0.35)
    assert not whole.abandoned and whole.accuracy == sum(part.hits for part in parts) / 1000


def test_divergence_from_the_original_gives_the_estimate(data, monkeypatch):
    model = settled(Residual(4), 0)

    def shaken(policy: CompressionPolicy) -> torch.nn.Module:
        torch.manual_seed(0)
        noisy = copy.deepcopy(model)
        with torch.no_grad():
            for weight in noisy.parameters():
                weight.add_(float(policy.model) * weight.std(correction=0) * torch.randn_like(weight))
        return noisy

    def of(original: torch.nn.Module | None) -> Episodes:
        return Episodes(shaken, data, data.test, images=64, recalibrate=200, original=original)

    settled_anew = of(None).network(CompressionPolicy(model="0"))  # statistics are taken anew for every policy
    episodes = of(settled_anew)
    found = [episodes(CompressionPolicy(model=noise)) for noise in ("0", "0.3", "2")]
    accuracy = found[0].accuracy
    assert accuracy == pytest.approx(found[0].estimate) and accuracy > found[1].estimate > found[2].estimate
    assert found[2].believed == found[2].estimate != found[2].accuracy
    assert episodes(CompressionPolicy(model="0")).estimate == found[0].estimate
    asked = []
    monkeypatch.setattr(
        episodes.images,
        "_kept",
        [batch for x, y in episodes.images for batch in zip(x.split(16), y.split(16), strict=True)],
    )
    monkeypatch.setattr(episodes, "_original", said_by(settled_anew, episodes.images, data.task))
    hopeless = episodes.unless_hopeless(CompressionPolicy(model="0"), lambda bound: bool(asked.append(bound)))
    assert hopeless.abandoned and len(asked) == 1 and asked[0] <= 1


def test_lower_bound_of_a_mean_holds():
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(200):
        values = torch.rand(1000, generator=generator) ** 4  # most images lose little, a few much
        bounds = [least_likely(values[:seen], 1000) for seen in range(100, 1001, 100)]
        wrong += sum(bound > float(values.mean()) + 1e-6 for bound in bounds)
        assert bounds[-1] == pytest.approx(float(values.mean()), rel=1e-4)
    assert wrong <= 10  # of 2,000 looks


def test_abandoned_episode_runs_no_further_batch(episodes, monkeypatch):
    runs: list[int] = []
    network = episodes.network

    def counted(policy):
        model = network(policy)
        model.register_forward_hook(lambda *found: runs.append(1))
        return model

    monkeypatch.setattr(episodes, "network", counted)
    monkeypatch.setattr(episodes.images, "_kept", [(x[:8], y[:8]) for x, y in episodes.images for _ in range(8)])
    assert episodes.unless_hopeless(CompressionPolicy(model="residual"), lambda accuracy: False).abandoned
    assert len(runs) == 1


def test_classes_that_the_split_lacks_are_named(data):
    split = Split(torch.zeros(100, 1, 8, 8, dtype=torch.uint8), torch.zeros(100, dtype=torch.long))
    assert "no image of 3 of 4 classes (class1, class2, class3)" in missing_classes(data, split, "search-val")
    assert missing_classes(data, data.search_val, "search-val") == ""
    assert missing_classes(replace(data, task=replace(CLASSIFICATION, class_scores=False)), split, "search-val") == ""


def test_hundred_distinct_policies_leave_no_memory_behind(data):
    """The network holds megabytes: all policies together would be seen, as would what their batches compute."""
    if not resident_bytes():
        pytest.skip("the system does not say what a process holds")
    model = settled(nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 256), nn.ReLU(),
        nn.Linear(256, 4),
    ))  # fmt: skip
    traced = trace(model, (3, 8, 8), "wide")
    episodes = Episodes(lambda policy: prune(model, traced, policy.keep_channels), data, data.test, images=16)

    def held_after(widths: range) -> int:
        for width in widths:
            episodes(CompressionPolicy(model="", keep_channels={"0": 17 + width % 16, "4": width}))
        gc.collect()
        give_memory_back()
        return resident_bytes()

    before = held_after(range(80, 100))
    assert held_after(range(100, 200)) - before < 50_000_000
