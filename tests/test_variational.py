"""Noise finds the weights that matter least, and taking the noise off gives the network back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sample_networks import Mobile, Residual, Scaled, patterns, settled
from scipy.stats import spearmanr
from torch import nn

from edgecompress.cost import count
from edgecompress.errors import UsageError
from edgecompress.finetune import TrainSettings, accuracy_and_loss, train
from edgecompress.job import Job
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.options import resolve
from edgecompress.progress import Silent
from edgecompress.recover import learn_noise, recover
from edgecompress.runs import RunFolder
from edgecompress.spec import CompressionPolicy, Config, LayerChoice
from edgecompress.trace import trace
from edgecompress.variational import (
    NoisyLayer,
    WeightNoise,
    kl_penalty,
    measured_noise,
    noise_by_size,
    prune_elements,
    refresh_batchnorm,
    with_noise,
    without_noise,
)


@pytest.mark.parametrize("kind", [Residual, Mobile, Scaled])
def test_wrapping_changes_nothing_in_eval_mode_and_unwrapping_gives_the_network_back(kind):
    model = settled(kind(4))
    x = torch.randn(4, 3, 16, 16)
    noisy, layers = with_noise(model)
    assert len(layers) == sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(noisy.eval()(x), model(x))
        assert not torch.equal(noisy.train()(x), noisy(x))
        plain = without_noise(noisy).eval()
    assert not any(isinstance(module, NoisyLayer) for module in plain.modules())
    assert list(plain.state_dict()) == list(model.state_dict())
    assert not any(isinstance(module, NoisyLayer) for module in model.modules())


def test_noise_of_a_layer_has_the_mean_and_variance_of_its_equations():
    torch.manual_seed(0)
    layer = NoisyLayer(nn.Linear(6, 3)).train()
    with torch.no_grad():
        layer.log_sigma2.fill_(-2.0)
        layer.offset.fill_(-30.0)  # unit noise off
        x = torch.randn(1, 6).expand(40_000, 6)
        y = layer(x)
        wanted = (x[0] ** 2).sum() * torch.exp(torch.tensor(-2.0))
    assert torch.allclose(y.mean(0), layer.layer(x[:1])[0], atol=0.03)
    assert torch.allclose(y.var(0), wanted.expand(3), rtol=0.05)


def test_log_alpha_and_penalties_follow_the_weights():
    layer = NoisyLayer(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        layer.layer.weight.copy_(torch.tensor([[1.0, 0.1, 0.01, 0.0]]))
        layer.log_sigma2.fill_(-4.0)
    assert torch.allclose(layer.log_alpha[0, :2], torch.tensor([-4.0, -4.0 + 4.60517]), atol=1e-4)
    assert bool((layer.log_alpha.diff() >= 0).all()) and layer.log_alpha.max().item() == 8.0
    before = layer.weight_kl().item()
    with torch.no_grad():
        layer.log_sigma2.fill_(2.0)
    assert layer.weight_kl().item() < before  # noisier weights cost less
    layer.train()(torch.randn(3, 4))
    early = kl_penalty({"a": layer}, 10, weight_scale=1.0, unit_scale=0.0, progress=0.25)
    late = kl_penalty({"a": layer}, 10, weight_scale=1.0, unit_scale=0.0, progress=0.9)
    assert late.item() == pytest.approx(2 * early.item())
    assert late.item() == pytest.approx(layer.weight_kl().item() / 10)
    units = kl_penalty({"a": layer}, 10, weight_scale=0.0, unit_scale=1.0, progress=1.0)
    assert units.item() == pytest.approx(layer.unit_kl.item() / 10) and units.item() > 0


def test_mask_keeps_the_quietest_weights():
    noise = WeightNoise({"a": torch.tensor([[3.0, -1.0], [8.0, 0.0]])})
    assert noise.mask("a", 0.5).tolist() == [[False, True], [False, True]]
    assert noise.mask("a", 0.75).tolist() == [[True, True], [False, True]]
    assert int(noise.mask("a", 1e-9).sum()) == 1 and bool(noise.mask("a", 1.0).all())
    assert noise.suggested_keep("a") == 0.75


@pytest.mark.parametrize("inputs", [4, 8, 6])
def test_two_four_keeps_the_two_quietest_of_four_neighbouring_inputs(inputs):
    torch.manual_seed(0)
    noise = WeightNoise({"a": torch.randn(5, inputs, 3, 3), "fc": torch.randn(5, inputs)})
    for name, scores in noise.log_alpha.items():
        mask = noise.two_four(name)
        for start in range(0, inputs, 4):
            part, kept = scores[:, start : start + 4], mask[:, start : start + 4]
            assert bool((kept.sum(1) == 2).all())
            worst = part.masked_fill(~kept, -torch.inf).amax(1)
            assert bool((worst <= part.masked_fill(kept, torch.inf).amin(1)).all())
        assert torch.equal(noise.mask(name, 1.0, two_four=True), mask)
        fewer = noise.mask(name, 0.25, two_four=True)
        assert int(fewer.sum()) == round(0.25 * scores.numel()) and bool((mask | ~fewer).all())


def test_noise_by_size_ranks_as_magnitude_does():
    model = settled(Residual(4))
    weight = model.b2[0].weight.detach()
    mask = noise_by_size(model).mask("b2.0", 0.5)
    assert float(weight[mask].abs().min()) >= float(weight[~mask].abs().max())


@pytest.mark.parametrize(("epochs", "two_four"), [(1, False), (0, False), (0, True)])
def test_recovery_keeps_the_single_weights_that_the_policy_chose(tmp_path, epochs, two_four):
    """By log-alpha where noise is learned, by size where it is not; the pattern only where channels fill its blocks.

    Of layers that it says nothing of, those above the threshold go, where noise is learned."""
    data, model = patterns(per_class=20), settled(Residual(4))
    traced = trace(model, (3, 16, 16), "residual")
    target = target_by_name("jetson").model_copy(update={"channel_divisor": {"int8": 8}})
    job = Job(
        config=Config(budget="flops=0.5x", finetune_epochs=1, noise_epochs=epochs, two_four=two_four), target=target,
        data=data, run=RunFolder(tmp_path), progress=Silent(), original=model, traced=traced, limits=(),
        original_cost=count(traced.network, CompressionPolicy(model="")),
    )  # fmt: skip
    layers = {"b2.0": LayerChoice(keep_elements=0.25), "fc": LayerChoice(keep_elements=0.75)}
    found, policy = recover(job, CompressionPolicy(model="", keep_channels={"b1.0": 8}, layers=layers))
    share = {name: float((found.get_submodule(name).weight != 0).float().mean()) for name in ("b2.0", "fc", "a1.0")}
    silent = share["a1.0"] if epochs else 0.5 if two_four else 1.0
    assert share == {"b2.0": 0.25, "fc": 0.5 if two_four else 0.75, "a1.0": silent}
    assert not epochs or 0.5 < silent < 1
    assert {name: policy.layers[name].keep_elements for name in share} == pytest.approx(share)
    if two_four:
        rows = (found.a1[0].weight != 0).reshape(8, 2, 4, 9)
        assert bool((rows.sum(2) == 2).all()) and bool((found.stem[0].weight != 0).all())


def test_two_four_is_for_targets_with_sparse_kernels():
    assert target_by_name("jetson").sparse_kernels and not target_by_name("x86").sparse_kernels
    with pytest.raises(UsageError, match="x86 has no sparse kernels"):
        resolve("resnet8", "digits", target_by_name("x86"), "flops=0.5x", {"two_four": True})
    assert resolve("resnet8", "digits", target_by_name("jetson"), "flops=0.5x", {"two_four": True}).two_four


def test_pruned_elements_are_zero_and_all_others_untouched():
    model = settled(Residual(4))
    _, layers = with_noise(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.log_sigma2.copy_(torch.rand_like(layer.log_sigma2))
    noise = measured_noise(layers)
    sparse = prune_elements(model, noise, {"a1.0": 0.25, "fc": 0.5})
    for name, keep in (("a1.0", 0.25), ("fc", 0.5), ("b1.0", 1.0)):
        old, new = model.get_submodule(name).weight, sparse.get_submodule(name).weight
        kept = new != 0
        assert float(kept.float().mean()) == pytest.approx(keep)
        assert torch.equal(new[kept], old[kept])
        if keep < 1:
            assert float(noise.log_alpha[name][kept].max()) <= float(noise.log_alpha[name][~kept].min())


def test_training_under_noise_names_the_useless_inputs_and_keeps_the_accuracy():
    """A linear classifier of which half of the inputs are zero always: the penalty must find those weights."""
    data = patterns(classes=3, per_class=40, size=8)
    mask = torch.zeros(3 * 64)
    mask[: 3 * 32] = 1

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3 * 64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.fc(x.flatten(1) * mask)
            return result

    torch.manual_seed(0)
    model = train(Half(), data, TrainSettings(epochs=8, learning_rate=0.05, batch_size=24, distill=0.0))
    assert accuracy_and_loss(model, data, data.test)[0] > 0.9
    noisy, layers = with_noise(model)
    optimizer = torch.optim.Adam(noisy.parameters(), 0.05)
    x, y = data.normalise(data.train.images), data.train.labels
    for step in range(200):
        loss = nn.functional.cross_entropy(noisy(x), y)
        loss = loss + kl_penalty(layers, len(y), weight_scale=0.2, unit_scale=1e-4, progress=step / 200)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = measured_noise(layers)
    used = mask.bool()
    assert float(noise.log_alpha["fc"][:, ~used].mean()) > float(noise.log_alpha["fc"][:, used].mean()) + 0.5
    plain = without_noise(noisy).eval()
    sparse = prune_elements(plain, noise, {"fc": 0.5})
    assert accuracy_and_loss(sparse, data, data.test)[0] > 0.9


def test_noise_really_moves_at_the_settings_of_the_pipeline(tmp_path):
    """Over three epochs the noise is learned, not left where it was initialised: else element-wise pruning is by magnitude."""
    data, model = patterns(per_class=60), settled(Residual(4))
    traced = trace(model, (3, 16, 16), "residual")
    job = Job(
        config=Config(budget="flops=0.5x", noise_epochs=3), target=target_by_name("jetson"), data=data, run=RunFolder(tmp_path),
        progress=Silent(), original=model, traced=traced, limits=(), original_cost=count(traced.network, CompressionPolicy(model="")),
    )  # fmt: skip
    begun = {name: layer.log_sigma2.detach().clone() for name, layer in with_noise(model)[1].items()}
    plain, noise = learn_noise(job, model)
    moved, ranks = [], []
    for name, log_alpha in noise.log_alpha.items():
        weight = plain.get_submodule(name).weight.detach()
        moved.append((log_alpha + (weight.pow(2) + 1e-8).log() - begun[name]).abs()[log_alpha.abs() < 8].flatten())
        ranks.append(spearmanr(-log_alpha.flatten(), weight.abs().flatten()).statistic)
    assert float(torch.cat(moved).median()) > 0.1
    assert min(ranks) < 0.95
    assert {name for name, module in plain.named_modules() if isinstance(module, NoisyLayer)} == set()


def test_refreshed_batchnorm_has_no_noise_in_it():
    model, data = settled(Residual(4)), replace(patterns(), augmentation="none")
    refresh_batchnorm(model, data)
    with torch.no_grad():
        outputs = model.stem[0](data.normalise(data.train.images))
    assert torch.allclose(model.stem[1].running_mean, outputs.mean((0, 2, 3)), atol=1e-4)


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_noise_fits_its_input_in_every_layout_and_is_new_at_every_pass(layout, halved):
    """Halves of channels, as ShuffleNet's blocks read them, lie with gaps in memory."""
    torch.manual_seed(0)
    x = torch.ones(64, 8, 6, 6).contiguous(memory_format=layout)
    x = x.chunk(2, dim=1)[1] if halved else x
    layer = NoisyLayer(torch.nn.Conv2d(x.shape[1], 16, 3, padding=1, bias=False)).train()
    with torch.no_grad():
        drawn = torch.stack([layer(x) for _ in range(50)])
        quiet = layer.eval()(x)
    off, spread = drawn - quiet, drawn.std(0)
    assert off.shape == (50, *quiet.shape) and float(spread.min()) > 0.3 * float(spread.mean())
    assert abs(float(off.mean())) < 0.05 * float(spread.mean()) and not torch.equal(drawn[0], drawn[1])
