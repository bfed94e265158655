"""A chosen policy becomes a trained network: channels cut, fine-tuned, single weights removed, fine-tuned again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from edgecompress.finetune import train
from edgecompress.job import Job, checkpoint_of, pruner_of, train_settings
from edgecompress.prune import reestimate_batchnorm
from edgecompress.spec import (
    CompressionPolicy,
    LayerChoice,
)
from edgecompress.variational import (
    WeightNoise,
    kl_penalty,
    measured_noise,
    noise_by_size,
    prune_elements,
    refresh_batchnorm,
    with_noise,
    without_noise,
)


def recover(job: Job, policy: CompressionPolicy) -> tuple[nn.Module, CompressionPolicy]:
    """Cut the channels, fine-tune with distillation, learn the noise, remove single weights, fine-tune what is left."""
    config, data = job.config, job.data
    chosen = {name: choice.keep_elements for name, choice in policy.layers.items() if choice.keep_elements < 1}
    model = pruner_of(job)(policy.model_copy(update={"layers": {}}))
    reestimate_batchnorm(model, data, seed=config.seed)
    job.progress.stage("Fine-tune with distillation", config.finetune_epochs)
    train(
        model, data, train_settings(job, config.finetune_epochs), teacher=job.teacher,
        checkpoint=checkpoint_of(job, "finetune"), on_epoch=job.progress.epoch,
    )  # fmt: skip
    if config.noise_epochs == 0 and not chosen and not config.two_four:
        return model, policy
    model, noise = learn_noise(job, model) if config.noise_epochs else (model, noise_by_size(model))
    return _without_noisy_weights(job, model, noise, policy, chosen)


def sparse_epochs(finetune_epochs: int) -> int:
    """Epochs that the remaining weights are trained for where single ones went, on top of the fine-tuning."""
    return max(2, finetune_epochs // 2)


def learn_noise(job: Job, model: nn.Module) -> tuple[nn.Module, WeightNoise]:
    """A short training under information dropout and weight noise; returns the network (noise off) and the noise."""
    epochs = job.config.noise_epochs
    noisy, layers = with_noise(model)
    job.progress.stage("Learn the noise of units and weights", epochs)
    train(
        noisy, job.data, replace(train_settings(job, epochs), weight_decay=0.0, ema=0.0), teacher=job.teacher,
        penalty=lambda progress: kl_penalty(
            layers, len(job.data.train), weight_scale=0.05, unit_scale=1e-4, progress=progress
        ),
        noise=[parameter for layer in layers.values() for parameter in layer.noise_parameters],
        checkpoint=checkpoint_of(job, "noise"), on_epoch=job.progress.epoch,
    )  # fmt: skip
    plain = without_noise(noisy)
    refresh_batchnorm(plain, job.data, seed=job.config.seed)
    return plain.eval(), measured_noise(layers)


def _without_noisy_weights(
    job: Job, model: nn.Module, noise: WeightNoise, policy: CompressionPolicy, chosen: Mapping[str, float]
) -> tuple[nn.Module, CompressionPolicy]:
    """Remove the weights that log-alpha names: as many as the policy chose per layer, else as the threshold says.

    Where the policy is silent, half as many go while that costs over a point on select-val.
    """
    learned = job.config.noise_epochs > 0
    keep = {name: noise.suggested_keep(name) if learned else 1.0 for name in noise.log_alpha} | dict(chosen)
    pattern = _two_four_layers(job, model) if job.config.two_four else ()
    chosen_only = prune_elements(model, noise, chosen, pattern)
    before = job.measure(chosen_only, job.data.select_val)[0]
    sparse = prune_elements(model, noise, keep, pattern)
    for _ in range(3 if learned else 0):
        if job.measure(sparse, job.data.select_val)[0] >= before - 0.01:
            break
        keep = {name: chosen.get(name, (1 + fraction) / 2) for name, fraction in keep.items()}
        sparse = prune_elements(model, noise, keep, pattern)
    hold_zeros(sparse)
    epochs = sparse_epochs(job.config.finetune_epochs)
    job.progress.stage("Fine-tune the remaining weights", epochs)
    train(
        sparse, job.data, train_settings(job, epochs, 0.5), teacher=job.teacher,
        checkpoint=checkpoint_of(job, "sparse"), on_epoch=job.progress.epoch,
    )  # fmt: skip
    layers = {name: LayerChoice(keep_elements=_nonzero(sparse, name)) for name in keep}
    return copy.deepcopy(_released(sparse)), policy.model_copy(update={"layers": layers})


def _two_four_layers(job: Job, model: nn.Module) -> list[str]:
    """Layers that the target's sparse kernels can run: ungrouped, their input channels filling whole blocks."""
    block = max(4, job.target.divisor)
    return [
        name for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and module.in_features % block == 0)
        or (isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels % block == 0)
    ]  # fmt: skip


def hold_zeros(model: nn.Module) -> None:
    """Weights that are zero get no gradient; weight decay and momentum leave a zero at zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not bool((mask := module.weight != 0).all()):
            module.weight.register_hook(partial(_masked, mask))  # type: ignore[no-untyped-call]


def _masked(mask: Tensor, gradient: Tensor) -> Tensor:
    return gradient * mask.to(gradient)


def _released(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().clone())
    return model


def _nonzero(model: nn.Module, name: str) -> float:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return max(float((weight != 0).float().mean()), 1e-6)
