"""Which single weights may go: information dropout on units and learned Gaussian noise on weights.

Information dropout (Achille & Soatto 2018, section 4) multiplies what a layer reads by ``exp(alpha(x) * eps)``, where
``alpha`` depends on the input; its KL term for rectified units is ``-log(alpha / alpha_max)``. Sparse variational
dropout (Molchanov et al. 2017) gives every weight ``theta`` a variance ``sigma**2``; where
``log alpha = log(sigma**2 / theta**2)`` is high the weight carries no information and can be set to zero.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecompress.data import Dataset

ALPHA_MAX = 0.7
LOG_ALPHA_THRESHOLD = 3.0  # Molchanov et al. 2017, section 4: more than 95 % of the weight is noise


class NoisyLayer(nn.Module):
    """A convolution or linear layer whose input units and weights are noisy while training.

    Weight noise uses local reparameterisation: mean ``x * theta``, variance ``x**2 * sigma**2`` (Kingma et al. 2015).
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        # Every weight starts at log-alpha -3 (5 % noise), whatever its size.
        self.log_sigma2 = nn.Parameter((layer.weight.detach().pow(2) + 1e-8).log() - 3.0)
        self.gain = nn.Parameter(torch.zeros(channels))
        self.offset = nn.Parameter(torch.full((channels,), -4.0))
        self.unit_kl: Tensor = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            result: Tensor = self.layer(x)
            return result
        # The channels of a convolution come first, those of a linear layer last (ConvNeXt's see images, too).
        shape = (-1,) if isinstance(self.layer, nn.Linear) else (-1, 1, 1)
        alpha = 0.001 + ALPHA_MAX * torch.sigmoid(x.detach() * self.gain.view(shape) + self.offset.view(shape))
        self.unit_kl = -(alpha / (0.001 + ALPHA_MAX)).log().sum() / len(x)
        x = x * (alpha * _standard_noise(x)).exp()
        mean: Tensor = self.layer(x)
        # The variance is held below 1.5 theta**2 while it is used, so that early steps stay trainable.
        variance = self._linear(x * x, self.log_sigma2.exp().clamp(max=10.0))
        return mean + (variance + 1e-8).sqrt() * _standard_noise(mean)

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Conv2d):
            layer = self.layer
            return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.linear(x, weight)

    @property
    def noise_parameters(self) -> list[nn.Parameter]:
        """What is learned about the noise; the layer's own parameters are not among them."""
        return [self.log_sigma2, self.gain, self.offset]

    @property
    def log_alpha(self) -> Tensor:
        """Per weight, clipped to [-8, 8]."""
        return (self.log_sigma2 - (self.layer.weight.pow(2) + 1e-8).log()).clamp(-8, 8)

    def weight_kl(self) -> Tensor:
        """The approximation of Molchanov et al. 2017, equation 14, summed over the weights."""
        log_alpha = self.log_alpha
        negative = 0.63576 * (torch.sigmoid(1.8732 + 1.48695 * log_alpha) - 1) - 0.5 * F.softplus(-log_alpha)
        return -negative.sum()


def _standard_noise(x: Tensor) -> Tensor:
    """``torch.randn_like``. In channels last it is drawn in the order of memory: in the order of the indices, as torch 2.14 does it
    on a CPU, it takes six times as long."""
    if x.is_contiguous() or x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.randn_like(x)
    return torch.randn(x.permute(0, 2, 3, 1).shape, dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class WeightNoise:
    """``log_alpha`` per layer name, in the shape of its weight: the larger, the less a weight matters."""

    log_alpha: Mapping[str, Tensor]

    def mask(self, name: str, keep: float, *, two_four: bool = False) -> Tensor:
        """True for the ``keep`` fraction of weights with the lowest log-alpha; with ``two_four`` in that pattern, at most."""
        scores = self.log_alpha[name]
        kept = max(1, round(keep * scores.numel()))
        if two_four:
            pattern = self.two_four(name)
            scores = scores.masked_fill(~pattern, torch.inf)
            kept = min(kept, int(pattern.sum()))
        order = scores.flatten().argsort(stable=True)
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        mask[order[:kept]] = True
        return mask.view(scores.shape)

    def two_four(self, name: str) -> Tensor:
        """True for the two of four neighbouring input channels with the lowest log-alpha, per output and kernel position.

        Sparse tensor cores take this pattern (Mishra et al. 2021, *Accelerating Sparse Deep Neural Networks*). A last group
        of fewer than four counts as filled up with zeros.
        """
        scores = self.log_alpha[name]
        outputs, inputs = scores.shape[:2]
        filled = F.pad(scores.reshape(outputs, inputs, -1).transpose(1, 2), (0, -inputs % 4), value=torch.inf)
        fours = filled.reshape(outputs, filled.shape[1], -1, 4)
        rank = fours.argsort(dim=3, stable=True).argsort(dim=3)
        kept = (rank < 2).reshape(filled.shape)[:, :, :inputs]
        return kept.transpose(1, 2).reshape(scores.shape)

    def suggested_keep(self, name: str) -> float:
        """The fraction of weights whose log-alpha lies below the threshold of the paper."""
        return max(float((self.log_alpha[name] <= LOG_ALPHA_THRESHOLD).float().mean()), 1e-3)


def with_noise(model: nn.Module) -> tuple[nn.Module, dict[str, NoisyLayer]]:
    """A copy of ``model`` whose convolutions and linear layers are wrapped; transposed convolutions stay as they are."""
    noisy = copy.deepcopy(model)
    names = [name for name, module in noisy.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    wrapped = {}
    for name in names:
        parent, _, attribute = name.rpartition(".")
        layer = noisy.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        wrapped[name] = NoisyLayer(layer)
        setattr(noisy.get_submodule(parent), attribute, wrapped[name])
    return noisy, wrapped


def without_noise(noisy: nn.Module) -> nn.Module:
    """Put the layer inside every `NoisyLayer` back in its place; returns ``noisy`` itself, now plain."""
    for name, module in list(noisy.named_modules()):
        if isinstance(module, NoisyLayer):
            parent, _, attribute = name.rpartition(".")
            setattr(noisy.get_submodule(parent), attribute, module.layer)
    return noisy


def kl_penalty(
    layers: Mapping[str, NoisyLayer], images: int, *, weight_scale: float, unit_scale: float, progress: float
) -> Tensor:
    """``ramp * (weight_scale * KL(weights) + unit_scale * KL(units)) / images``; the ramp rises over the first half."""
    ramp = min(2 * progress, 1.0)
    weights = torch.stack([layer.weight_kl() for layer in layers.values()]).sum()
    units = torch.stack([layer.unit_kl for layer in layers.values()]).sum()
    return ramp * (weight_scale * weights + unit_scale * units) / images


def measured_noise(layers: Mapping[str, NoisyLayer]) -> WeightNoise:
    """Read the learned noise off the wrapped layers."""
    return WeightNoise({name: layer.log_alpha.detach().clone() for name, layer in layers.items()})


def noise_by_size(model: nn.Module) -> WeightNoise:
    """Log-alpha where every weight of a layer has the same noise: ranks weights by magnitude, before any is learned."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    return WeightNoise({name: -(layer.weight.detach().pow(2) + 1e-8).log() for name, layer in layers.items()})


def prune_elements(
    model: nn.Module, noise: WeightNoise, keep: Mapping[str, float], two_four: Collection[str] = ()
) -> nn.Module:
    """A copy of ``model`` whose noisiest weights are zero.

    Args:
        keep: the fraction kept per layer name.
        two_four: layers that must come out in the 2:4 pattern, however large their fraction is.
    """
    sparse = copy.deepcopy(model)
    with torch.no_grad():
        for name, fraction in keep.items():
            layer = sparse.get_submodule(name)
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            layer.weight.mul_(noise.mask(name, fraction, two_four=name in two_four))
    return sparse


def refresh_batchnorm(model: nn.Module, data: Dataset, *, seed: int = 0) -> None:
    """Take BatchNorm statistics anew with the noise off, over the whole augmented training set (in place).

    Statistics gathered under noise are wrong without it (Achille & Soatto's own code makes the same dry run).
    """
    from edgecompress.prune import reestimate_batchnorm

    reestimate_batchnorm(model, data, images=len(data.train), seed=seed)


__all__ = [
    "NoisyLayer", "WeightNoise", "kl_penalty", "measured_noise", "noise_by_size", "prune_elements", "refresh_batchnorm", "with_noise",
    "without_noise",
]  # fmt: skip
