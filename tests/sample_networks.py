"""Tiny networks and data for the tests: one for every way in which channels hang together, all under 20,000 weights.

They are also model factories for the command line: ``sample_networks:residual`` with ``tests`` on the import path.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgecompress.data import Dataset, Split
from edgecompress.graph import Graph, build_graph
from edgecompress.models import build_model
from edgecompress.quantize import QuantizedGraph, Simulator, calibrate
from edgecompress.spec import LayerChoice, Preprocessing, WeightScales


def conv_bn(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class Residual(nn.Module):
    """An identity and a projected shortcut."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2)
        self.a1, self.a2 = conv_bn(8, 8), conv_bn(8, 8)
        self.b1, self.b2 = conv_bn(8, 16, stride=2), conv_bn(16, 16)
        self.shortcut = conv_bn(8, 16, kernel=1, stride=2)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.a2(F.relu(self.a1(x))) + x)
        x = F.relu(self.b2(F.relu(self.b1(x))) + self.shortcut(x))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


class Vgg(nn.Module):
    """Max-pooling and a classifier behind a global mean."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *conv_bn(3, 8), nn.ReLU(), nn.MaxPool2d(2), *conv_bn(8, 16), nn.ReLU(), nn.MaxPool2d(2), *conv_bn(16, 16),
            nn.ReLU(),
        )  # fmt: skip
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.features(x).mean((2, 3)))
        return result


class Mobile(nn.Module):
    """Two depthwise-separable blocks."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *conv_bn(3, 8, stride=2), nn.ReLU(),
            *conv_bn(8, 8, groups=8), nn.ReLU(), *conv_bn(8, 16, kernel=1), nn.ReLU(),
            *conv_bn(16, 16, stride=2, groups=16), nn.ReLU(), *conv_bn(16, 24, kernel=1), nn.ReLU(),
        )  # fmt: skip
        self.fc = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.features(x).mean((2, 3)))
        return result


class Concat(nn.Module):
    """Two branches side by side, read together."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2)
        self.left, self.right = conv_bn(8, 8, kernel=1), conv_bn(8, 12)
        self.after = conv_bn(20, 16, stride=2)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        result: Tensor = self.fc(F.relu(self.after(x)).mean((2, 3)))
        return result


class Flat(nn.Module):
    """Convolutions with bias and no normalisation, flattened into two linear layers (for 16x16 images)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.fc1, self.fc2 = nn.Linear(8 * 2 * 2, 24), nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        result: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return result


class Gated(nn.Module):
    """HardSwish, SiLU and two squeeze-and-excite gates (MobileNet-V3, EfficientNet)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.deep = conv_bn(3, 8, stride=2), conv_bn(8, 16)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.after, self.gate = conv_bn(16, 16, kernel=1), nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.deep(F.hardswish(self.stem(x))))
        scale = F.adaptive_avg_pool2d(x, 1)
        x = x * F.hardsigmoid(self.excite(F.relu(self.squeeze(scale))))
        x = F.silu(self.after(x))
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


class Shuffled(nn.Module):
    """A channel split and a channel shuffle whose sizes are computed from the tensor (ShuffleNet-V2)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.branch = conv_bn(3, 16, stride=2), conv_bn(8, 8)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, dim=1)
        x = torch.cat([left, F.relu(self.branch(right))], 1)
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(batch, -1, height, width)
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


class Dense(nn.Module):
    """BatchNorms before their convolutions, growing concatenations, average pooling (DenseNet)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3, 1, 1, bias=False)
        self.norm3, self.fc = nn.BatchNorm2d(24), nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, ceil_mode=True)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = F.avg_pool2d(torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1), 2)
        result: Tensor = self.fc(F.relu(self.norm3(x)).mean((2, 3)))
        return result


class Fire(nn.Module):
    """Two squeezes, each read by two expansions side by side; convolutions with bias only, classifier included (SqueezeNet)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.squeeze1, self.one1, self.three1 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.squeeze2, self.one2, self.three2 = nn.Conv2d(20, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(6, 12, 3, 1, 1)
        self.classifier = nn.Conv2d(20, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze1(F.relu(self.stem(x))))
        x = torch.cat([F.relu(self.one1(x)), F.relu(self.three1(x))], 1)
        x = F.relu(self.squeeze2(F.max_pool2d(x, 3, 2, ceil_mode=True)))
        x = torch.cat([F.relu(self.one2(x)), F.relu(self.three2(x))], 1)
        result: Tensor = self.classifier(x).mean((2, 3))
        return result


class Inception(nn.Module):
    """Four branches of unequal depth read together: 1x1, 3x3, a factorised 5x5, and one behind a pooling (GoogLeNet, V3)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2)
        self.one = conv_bn(8, 8, kernel=1)
        self.reduce3, self.three = conv_bn(8, 6, kernel=1), conv_bn(6, 12)
        self.reduce5 = conv_bn(8, 4, kernel=1)
        self.tall = nn.Sequential(nn.Conv2d(4, 6, (5, 1), padding=(2, 0), bias=False), nn.BatchNorm2d(6))
        self.wide = nn.Sequential(nn.Conv2d(6, 8, (1, 5), padding=(0, 2), bias=False), nn.BatchNorm2d(8))
        self.pooled = conv_bn(8, 4, kernel=1)
        self.after, self.fc = conv_bn(32, 16), nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        five = F.relu(self.wide(F.relu(self.tall(F.relu(self.reduce5(x))))))
        three = F.relu(self.three(F.relu(self.reduce3(x))))
        pooled = F.relu(self.pooled(F.avg_pool2d(x, 3, 1, 1)))
        x = torch.cat([F.relu(self.one(x)), three, five, pooled], 1)
        result: Tensor = self.fc(F.relu(self.after(x)).mean((2, 3)))
        return result


class GroupNormed(nn.Module):
    """A residual block of GroupNorms, whose groups stay equally wide."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.GroupNorm(4, 16)
        self.conv1, self.norm1 = nn.Conv2d(16, 24, 3, 1, 1, bias=False), nn.GroupNorm(4, 24)
        self.conv2, self.norm2 = nn.Conv2d(24, 16, 3, 1, 1, bias=False), nn.GroupNorm(2, 16)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + x)
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


# For the graph, calibration and the exporters.
OPERATOR_NETWORKS = {"gated": Gated, "shuffled": Shuffled, "dense": Dense}
BLOCKS = {"gated": Gated, "dense": Dense, "fire": Fire, "inception": Inception, "groupnorm": GroupNormed}  # for pruning
NETWORKS = {"residual": Residual, "vgg": Vgg, "mobile": Mobile, "concat": Concat, "flat": Flat}


def residual(classes: int) -> nn.Module:
    """For ``--model sample_networks:residual``."""
    return Residual(classes)


def unprunable(classes: int) -> nn.Module:
    """One linear layer: its channels are the network's output."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, classes))


def two_layers(classes: int) -> nn.Module:
    """For 8x8 colour images: the least that has channels to prune."""
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, classes))


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give ``model`` random weights and BatchNorm numbers that are not their initial ones; returns it in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def between(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
                if module.bias is not None:
                    module.bias.copy_(between(module.bias, -0.3, 0.3))
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(between(module.weight, 0.5, 1.5))
                module.bias.copy_(between(module.bias, -0.3, 0.3))
                module.running_mean.copy_(between(module.running_mean, -0.3, 0.3))
                module.running_var.copy_(between(module.running_var, 0.5, 1.5))
    return model.eval()


def patterns(classes: int = 4, per_class: int = 24, size: int = 16, seed: int = 0) -> Dataset:
    """A data set that a tiny network learns in seconds: one smooth pattern per class, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    means = F.interpolate(torch.rand(classes, 3, 4, 4, generator=generator), size=size, mode="bilinear")

    def split(count: int) -> Split:
        labels = torch.arange(count * classes) % classes
        noise = 0.15 * torch.randn(len(labels), 3, size, size, generator=generator)
        return Split(((means[labels] + noise).clamp(0, 1) * 255).to(torch.uint8), labels)

    train = split(per_class)
    return Dataset(
        name="patterns",
        classes=tuple(f"class{label}" for label in range(classes)),
        preprocessing=Preprocessing(size=(size, size), mean=(0.5,) * 3, std=(0.25,) * 3),
        augmentation="shift",
        train=train,
        calibration=train.take(torch.arange(len(train) // 2)),
        search_val=split(8),
        select_val=split(8),
        test=split(16),
    )


class Scaled(nn.Module):
    """Channels-last linear layers, a layer norm over channels, and a scale that is a parameter by itself (ConvNeXt)."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 0.5))
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        result: Tensor = self.fc((x + self.scale * y).mean((2, 3)))
        return result


@dataclass(frozen=True)
class IntegerCase:
    """A settled network, its graph, calibrated on the images that the tests then run."""

    model: nn.Module
    graph: Graph
    simulator: Simulator
    images: Tensor

    def quantized(self, weight_bits: int, activation_bits: int) -> QuantizedGraph:
        """The same bits in every layer."""
        choice = LayerChoice(weight_bits=weight_bits, activation_bits=activation_bits)
        return self.simulator.quantized({layer.name: choice for layer in self.graph.layers})

    def random_choices(self, seed: int) -> dict[str, LayerChoice]:
        """Bits drawn at random for every layer."""
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(2, 9, (len(self.graph.layers), 2), generator=generator).tolist()
        return {
            layer.name: LayerChoice(weight_bits=w, activation_bits=a)
            for layer, (w, a) in zip(self.graph.layers, bits, strict=True)
        }


@cache
def integer_case(name: str, weight_scales: WeightScales = "channel") -> IntegerCase:
    """One of `NETWORKS` or `OPERATOR_NETWORKS` at 16x16, or a network of the zoo at 32x32."""
    own = {**NETWORKS, **OPERATOR_NETWORKS}
    size = 16 if name in own else 32
    model = settled(own[name](4) if name in own else build_model(name, 10), 5)
    images = torch.randn(48, 3, size, size, generator=torch.Generator().manual_seed(6))
    graph = build_graph(model, (3, size, size), name)
    simulator = Simulator(graph, calibrate(graph, [images], samples=4000), weight_scales)
    return IntegerCase(model, graph, simulator, images)
