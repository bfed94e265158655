"""Which channels go: importance, refitting by least squares, masks of single weights, BatchNorm measured anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sample_networks import Residual, Scaled, patterns, settled
from torch import nn

from edgecompress.errors import UnknownNameError, UsageError
from edgecompress.importance import IMPORTANCE, importance_by_name, l1_importance, l2_importance
from edgecompress.prune import prune, pruner, reestimate_batchnorm
from edgecompress.reconstruction import input_moments
from edgecompress.spec import CompressionPolicy, LayerChoice
from edgecompress.trace import trace


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
