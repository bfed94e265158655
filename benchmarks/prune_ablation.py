"""Information dropout with and without, at equal size: which single weights go from a pruned network."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace

import cifar10
import torch
from cells import Cell
from prune_lab import Lab
from torch import Tensor, nn

from edgecompress.data import Dataset
from edgecompress.finetune import TrainSettings, train
from edgecompress.spaces import Choice
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

KEEPS = (0.5, 0.25)  # of the weights of every layer, whatever ranks them
WHOLE = 0.25  # of the weights of all layers together, one threshold for all of them
LOOKS = (0.9, 0.75, 0.5, 0.35, 0.25)  # at which the ranking is looked at before any recovery
LEARNING, RECOVERING, IMAGES = 3, 3, 10_000


def without_single_weights(lab: Lab, tuned: nn.Module, choice: Choice, seed: int, *, ranked: str) -> Cell:
    """Accuracy in percent of a fine-tuned network that keeps a share of its weights: before, and on test after, recovery.

    Args:
        ranked: what ranks the weights. ``with``: log-alpha after a training under noise. ``without``: their size after as
            many epochs without noise.

    Then all recover alike.
    """
    data = cifar10.dataset(IMAGES)
    teacher = copy.deepcopy(lab.model)
    settings = TrainSettings(epochs=LEARNING, learning_rate=0.01, batch_size=128, seed=seed)
    started = time.monotonic()
    if ranked == "with":
        noisy, layers = with_noise(tuned)
        _learn(noisy, layers, data, settings, teacher)
        plain = without_noise(noisy)
        refresh_batchnorm(plain, data, seed=seed)
        noise = measured_noise(layers)
    else:
        plain = train(copy.deepcopy(tuned), data, settings, teacher=teacher)
        noise = noise_by_size(plain)
    found: Cell = {"choice": list(choice), "learning_s": round(time.monotonic() - started, 1)}

    def keeping(keep: Mapping[str, float]) -> nn.Module:
        return prune_elements(plain.eval(), noise, keep).eval()

    def everywhere(share: float) -> Mapping[str, float]:
        return dict.fromkeys(noise.log_alpha, share)

    found["select"] = round(100 * lab.measure(plain.eval(), "select").accuracy, 3)
    found["select_before"] = {
        str(k): round(100 * lab.measure(keeping(everywhere(k)), "select").accuracy, 3) for k in LOOKS
    }
    wanted = {str(share): everywhere(share) for share in KEEPS} | {f"{WHOLE} of all": _one_threshold(noise, WHOLE)}
    found |= {"test": {}, "kept_weights": {}}
    for name, keep in wanted.items():
        sparse = keeping(keep)
        _hold_zeros(sparse)
        train(sparse, data, replace(settings, epochs=RECOVERING), teacher=teacher)
        found["test"][name] = round(100 * lab.measure(sparse, "test").accuracy, 3)
        found["kept_weights"][name] = sum(int((weight != 0).sum()) for weight in _weights(sparse).values())
    return found


def _one_threshold(noise: WeightNoise, share: float) -> Mapping[str, float]:
    """What each layer keeps where the same log-alpha ends all of them and ``share`` of all weights stays."""
    scores = torch.cat([values.flatten() for values in noise.log_alpha.values()])
    threshold = scores.kthvalue(round(share * len(scores))).values
    return {name: max(float((s <= threshold).float().mean()), 1 / s.numel()) for name, s in noise.log_alpha.items()}


def _learn(
    noisy: nn.Module, layers: Mapping[str, NoisyLayer], data: Dataset, settings: TrainSettings, teacher: nn.Module
) -> None:
    """As `compress` learns it."""
    train(
        noisy, data, replace(settings, weight_decay=0.0), teacher=teacher,
        penalty=lambda progress: kl_penalty(
            layers, len(data.train), weight_scale=0.05, unit_scale=1e-4, progress=progress
        ),
        noise=[parameter for layer in layers.values() for parameter in layer.noise_parameters],
    )  # fmt: skip


def _weights(model: nn.Module) -> Mapping[str, Tensor]:
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def _hold_zeros(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            mask = (module.weight.detach() != 0).to(torch.float32)
            module.weight.register_hook(lambda gradient, mask=mask: gradient * mask)
