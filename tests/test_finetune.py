"""Training learns, repeats itself, goes on from a checkpoint to the same weights, and stops at NaN."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from sample_networks import Residual, patterns, settled
from torch import nn

from edgecompress.errors import EdgeCompressError, UnknownNameError
from edgecompress.finetune import TrainSettings, _schedule, accuracy_and_loss, reference_model, train
from edgecompress.job import train_settings
from edgecompress.spec import Config
from edgecompress.training_state import precision_on
from edgecompress.variational import kl_penalty, with_noise

SETTINGS = TrainSettings(epochs=4, learning_rate=0.05, batch_size=16, distill=0.0, precision="fp32")


@pytest.fixture(scope="module")
def data():
    return patterns(size=8)


def fresh(seed: int = 0) -> nn.Module:
    return settled(Residual(4), seed)


def same(first: nn.Module, second: nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.fixture(scope="module")
def trained(data):
    return train(fresh(), data, SETTINGS)


def test_training_learns_and_ends_in_eval_mode(data, trained):
    before, after = accuracy_and_loss(fresh(), data, data.test), accuracy_and_loss(trained, data, data.test)
    assert after[0] > 0.9 > before[0] and after[1] < before[1]
    assert not trained.training


def test_same_seed_trains_the_same_weights_and_another_seed_does_not(data, trained):
    torch.manual_seed(77)
    assert same(train(fresh(), data, SETTINGS), trained)
    assert not same(train(fresh(), data, replace(SETTINGS, seed=1)), trained)


def test_average_of_the_weights_by_hand(data):
    """Integers are copied; the decay of the first steps is (1 + t) / (10 + t)."""
    states = []
    model = fresh()
    start = {key: value.clone() for key, value in model.state_dict().items()}

    one = replace(data, train=data.train.take(torch.arange(32)))
    averaged = train(fresh(), one, replace(SETTINGS, epochs=1, ema=0.9)).state_dict()
    plain = train(
        model, one, replace(SETTINGS, epochs=1),
        penalty=lambda _: states.append({k: v.clone() for k, v in model.state_dict().items()}) or torch.tensor(0.0),
    ).state_dict()  # fmt: skip
    first, last = states[1], plain  # after the first and the second step; running statistics are one forward ahead
    for key, parameter in model.named_parameters():
        wanted = start[key].lerp(first[key], 9 / 11).lerp(last[key], 9 / 12)
        assert torch.allclose(averaged[key], wanted, atol=1e-6), key
        assert not torch.equal(averaged[key], parameter)
    assert int(averaged["stem.1.num_batches_tracked"]) == int(plain["stem.1.num_batches_tracked"])


def test_average_keeps_weights_that_are_held_at_zero(data):
    model = fresh()
    with torch.no_grad():
        model.b2[0].weight[:, :4] = 0
    mask = (model.b2[0].weight != 0).float()
    model.b2[0].weight.register_hook(lambda gradient: gradient * mask)
    train(model, data, replace(SETTINGS, epochs=1, ema=0.99))
    assert bool((model.b2[0].weight[:, :4] == 0).all()) and bool((model.b2[0].weight[:, 4:] != 0).all())


@pytest.mark.parametrize("stop_after", [1, 3])
def test_interrupted_average_goes_on_to_the_same_weights(data, tmp_path, stop_after):
    settings = replace(SETTINGS, ema=0.95)
    whole = train(fresh(), data, settings)
    interrupted_training(data, settings, tmp_path / "e.safetensors", stop_after)
    assert same(train(fresh(5), data, settings, checkpoint=tmp_path / "e.safetensors"), whole)
    assert not same(whole, train(fresh(), data, SETTINGS))


def interrupted_training(data, settings: TrainSettings, path, stop_after: int, penalty=None) -> None:
    class Killed(Exception):
        pass

    def kill(epoch: int, epochs: int, loss: float) -> None:
        if epoch == stop_after:
            raise Killed

    model = fresh()
    with pytest.raises(Killed):
        train(model, data, settings, checkpoint=path, on_epoch=kill, penalty=penalty and penalty(model))


@pytest.mark.parametrize("stop_after", [1, 3])
def test_interrupted_training_goes_on_to_the_same_weights(data, trained, tmp_path, stop_after):
    path = tmp_path / "epoch.safetensors"
    interrupted_training(data, SETTINGS, path, stop_after)
    epochs = []
    resumed = train(fresh(5), data, SETTINGS, checkpoint=path, on_epoch=lambda e, n, loss: epochs.append((e, n)))
    assert same(resumed, trained)
    assert epochs == [(epoch, 4) for epoch in range(stop_after + 1, 5)]
    finished = train(fresh(6), data, SETTINGS, checkpoint=path, on_epoch=lambda e, n, loss: epochs.append((e, n)))
    assert same(finished, trained) and len(epochs) == 4 - stop_after


def test_interrupted_training_of_noise_goes_on_to_the_same_weights_and_noise(data, tmp_path):
    """Adam's moments and the noise itself are in the checkpoint."""
    settings = replace(SETTINGS, weight_decay=0.0)

    class Killed(Exception):
        pass

    def learned(stop_after: int = 99, seed: int = 0) -> torch.nn.Module:
        def kill(epoch: int, epochs: int, loss: float) -> None:
            if epoch == stop_after:
                raise Killed

        noisy, layers = with_noise(fresh(seed))
        noise = [parameter for layer in layers.values() for parameter in layer.noise_parameters]
        return train(
            noisy, data, settings, noise=noise, on_epoch=kill, checkpoint=path,
            penalty=lambda progress: kl_penalty(layers, 100, weight_scale=0.05, unit_scale=1e-4, progress=progress),
        )  # fmt: skip

    path = tmp_path / "whole.safetensors"
    whole = learned()
    path = tmp_path / "killed.safetensors"
    with pytest.raises(Killed):
        learned(stop_after=2)
    assert same(learned(seed=5), whole)


def test_checkpoint_of_other_settings_is_not_used(data, trained, tmp_path):
    path = tmp_path / "epoch.safetensors"
    other = replace(SETTINGS, learning_rate=0.01)
    train(fresh(), data, other, checkpoint=path)
    assert same(train(fresh(), data, SETTINGS, checkpoint=path), trained)


def test_torn_checkpoint_is_one_sentence(data, tmp_path):
    path = tmp_path / "epoch.safetensors"
    train(fresh(), data, SETTINGS, checkpoint=path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(EdgeCompressError, match=r"epoch\.safetensors"):
        train(fresh(), data, SETTINGS, checkpoint=path)


def test_loss_that_is_not_finite_stops_and_keeps_the_last_whole_epoch(data):
    states = []
    model = fresh()

    def poison(progress: float) -> torch.Tensor:
        return torch.tensor(float("nan") if progress > 0.6 else 0.0)

    with pytest.raises(EdgeCompressError, match=r"The loss became nan in epoch 3, step \d+; .*Lower the learning rate"):
        train(
            model, data, SETTINGS, penalty=poison,
            on_epoch=lambda *_: states.append({k: v.clone() for k, v in model.state_dict().items()}),
        )  # fmt: skip
    assert len(states) == 2
    assert all(torch.equal(value, states[-1][key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("begins", "where"), [(0.3, r"epoch, which is in {path}\."), (0.0, r"that epoch\.")])
def test_diverging_names_the_file_of_its_last_whole_epoch_and_what_to_do(data, tmp_path, begins, where):
    """Not in the first epoch: a file that lies there then is of another training."""
    path = tmp_path / "finetune.safetensors"
    train(fresh(1), data, replace(SETTINGS, epochs=1, seed=7), checkpoint=path)
    wanted = where.format(path=re.escape(str(path))) + r" Lower the learning rate of 0\.05 .*--learning-rate.*--name"
    with pytest.raises(EdgeCompressError, match=wanted):
        train(
            model := fresh(), data, SETTINGS, checkpoint=path,
            penalty=lambda progress: torch.tensor(float("nan") if progress >= begins else 0.0),
        )  # fmt: skip
    held = {key.removeprefix("model."): value for key, value in load_file(path).items() if key.startswith("model.")}
    assert all(torch.equal(value, held[key]) for key, value in model.state_dict().items()) == (begins > 0)


def test_gradients_that_are_not_finite_stop_before_they_reach_the_weights(data):
    """The square root of zero is a finite loss with an infinite slope; it comes in the last step of an epoch."""
    states, steps = [], 6
    model = fresh()

    def steep(progress: float) -> torch.Tensor:
        return 0 * next(model.parameters()).sum() if progress < 0.45 else (0 * next(model.parameters()).sum()).sqrt()

    with pytest.raises(EdgeCompressError, match=rf"gradients became infinite or NaN in epoch 2, step {steps};"):
        train(
            model, data, SETTINGS, penalty=steep,
            on_epoch=lambda *_: states.append({k: v.clone() for k, v in model.state_dict().items()}),
        )  # fmt: skip
    assert len(states) == 1
    assert all(torch.equal(value, states[0][key]) for key, value in model.state_dict().items())


def test_distillation_copies_a_teacher_against_the_labels(data):
    """The teacher calls every class by the next one's name: only a student that listens learns that."""
    shifted = replace(data, train=type(data.train)(data.train.images, (data.train.labels + 1) % 4))
    teacher = train(fresh(1), shifted, SETTINGS)
    student = train(fresh(2), data, replace(SETTINGS, epochs=10, distill=1.0), teacher=teacher)
    swapped = type(data.test)(data.test.images, (data.test.labels + 1) % 4)
    assert accuracy_and_loss(student, data, swapped)[0] > 0.6
    assert accuracy_and_loss(student, data, data.test)[0] < 0.2


def test_penalty_is_part_of_the_loss(data):
    asked = []

    def penalty(progress: float) -> torch.Tensor:
        asked.append(progress)
        return 100 * sum(parameter.pow(2).sum() for parameter in model.parameters())

    model = fresh()
    before = sum(parameter.pow(2).sum().item() for parameter in model.parameters())
    train(model, data, SETTINGS, penalty=penalty)
    assert sum(parameter.pow(2).sum().item() for parameter in model.parameters()) < 0.8 * before
    assert asked == sorted(asked) and asked[0] == 0 and asked[-1] < 1


@pytest.mark.parametrize("epochs", [1, 2, 20])
def test_schedule_warms_up_and_falls_to_zero(epochs):
    rates = [_schedule(step / 100, epochs) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0, abs=0.02)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9) and min(rates) >= 0


def test_accuracy_and_loss_by_hand(data):
    labels = data.test.labels

    def oracle(x: torch.Tensor) -> torch.Tensor:
        start = oracle.seen
        oracle.seen += len(x)
        return 50.0 * nn.functional.one_hot(labels[start : start + len(x)], 4).float()

    oracle.seen = 0
    assert accuracy_and_loss(oracle, data, data.test, batch_size=10) == (1.0, pytest.approx(0.0, abs=1e-6))
    accuracy, loss = accuracy_and_loss(lambda x: torch.zeros(len(x), 4), data, data.test)
    assert accuracy == pytest.approx(0.25) and loss == pytest.approx(1.386294, abs=1e-4)


def test_reference_is_trained_once_and_kept_in_the_cache(data, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGECOMPRESS_CACHE", str(tmp_path))
    epochs = []

    def reference(epochs_wanted: int = 1, seed: int = 0) -> nn.Module:
        return reference_model(
            "sample_networks:residual", data, epochs=epochs_wanted, seed=seed,
            on_epoch=lambda *told: epochs.append(told[0]),
        )  # fmt: skip

    first = reference()
    assert same(reference(), first) and epochs == [1]
    assert len(list((tmp_path / "models").iterdir())) == 1
    assert not same(reference(2), first) and not same(reference(1, seed=1), first)
    assert len(list((tmp_path / "models").glob("*.safetensors"))) == 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_computes_in_few_bits_keeps_weights_in_float32_and_learns(data, precision):
    """Forced on the CPU, whose autocast has both; on CUDA the same lines run."""
    seen = set()
    model, wide = fresh(), train(fresh(), data, replace(SETTINGS, precision="fp32"))
    model.stem[0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    train(model, data, replace(SETTINGS, precision=precision))
    assert seen == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert all(value.dtype == torch.float32 for value in model.state_dict().values() if value.is_floating_point())
    assert not same(model, wide) and accuracy_and_loss(model, data, data.test)[0] > 0.9


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_interrupted_mixed_precision_goes_on_to_the_same_weights(data, trained, tmp_path, precision):
    """In float16 the first scales overflow and are halved: one that is not restored would leave out other steps."""
    settings, path = replace(SETTINGS, precision=precision), tmp_path / "e.safetensors"
    whole = train(large := fresh(), data, settings, penalty=steep(large))
    interrupted_training(data, settings, path, 2, steep)
    resumed = train(large := fresh(5), data, settings, checkpoint=path, penalty=steep(large))
    assert same(resumed, whole)
    # a checkpoint of another precision is not gone on from
    assert same(train(fresh(), data, SETTINGS, checkpoint=path), trained) and not same(trained, whole)


def steep(model: nn.Module):
    """A penalty whose gradient overflows at the first scales of float16, and no more after some halvings."""
    return lambda progress: 10 * next(model.parameters()).half().pow(2).sum()


def test_overflow_in_float16_leaves_out_steps_and_one_that_stays_is_told(data):
    model = fresh()
    start = next(model.parameters()).detach().clone()
    train(model, data, replace(SETTINGS, epochs=1, precision="fp16"), penalty=steep(model))
    assert torch.isfinite(next(model.parameters())).all() and not torch.equal(next(model.parameters()), start)
    model = fresh()

    def endless(progress: float) -> torch.Tensor:
        return (0 * next(model.parameters()).sum()).sqrt()

    with pytest.raises(EdgeCompressError, match="gradients became infinite or NaN"):
        train(model, data, replace(SETTINGS, precision="fp16"), penalty=endless)


@pytest.mark.parametrize(
    ("device", "native", "groups", "wanted", "found"),
    [
        ("cpu", True, 1, "auto", "bf16"),
        ("cpu", True, 4, "auto", "fp32"),
        ("cpu", False, 1, "auto", "fp32"),
        ("cpu", False, 1, "bf16", "bf16"),
        ("cuda", True, 4, "auto", "bf16"),
        ("cuda", False, 1, "auto", "fp16"),
        ("cuda", True, 1, "fp32", "fp32"),
    ],
)
def test_precision_follows_the_device_and_on_a_cpu_the_network(monkeypatch, device, native, groups, wanted, found):
    """A GPU that only emulates bfloat16 says so when it is asked without emulation, and gets float16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=groups))
    assert precision_on(torch.device(device), wanted, model) == found


@pytest.mark.parametrize(("groups", "precision"), [(1, "bf16"), (4, "fp32")])
def test_all_trainings_of_a_run_take_the_precision_of_its_original(monkeypatch, data, groups, precision):
    """The one of the steps, too, in whose network no convolution can be seen."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    original = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=groups))
    config = Config(budget="flops=0.5x", device="cpu")
    job = SimpleNamespace(config=config, data=data, original=original)
    assert train_settings(job, 1).precision == precision
    job.config = config.model_copy(update={"train_precision": "fp32"})
    assert train_settings(job, 1).precision == "fp32"


def test_unknown_precision_names_the_known_ones():
    with pytest.raises(UnknownNameError, match="bf16"):
        precision_on(torch.device("cpu"), "bf61", fresh())


def test_checkpoint_from_before_there_was_a_precision_is_gone_on_from(data, trained, tmp_path):
    import json

    from safetensors.torch import safe_open, save_file

    path = tmp_path / "epoch.safetensors"
    interrupted_training(data, SETTINGS, path, 2)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["settings"] = json.dumps({k: v for k, v in json.loads(metadata["settings"]).items() if k != "precision"})
    del metadata["scaler"]
    save_file(load_file(path), path, metadata=metadata)
    epochs = []
    assert same(train(fresh(5), data, SETTINGS, checkpoint=path, on_epoch=lambda *told: epochs.append(told)), trained)
    assert len(epochs) == 2
