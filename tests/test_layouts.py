"""Strided 1x1 convolutions of few channels, which oneDNN trains wrongly in channels last, never reach it so."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edgecompress.finetune import TrainSettings, train
from edgecompress.graph import Node
from edgecompress.interpret import apply
from edgecompress.layouts import safe_to_train


def shortcut(channels):
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 8, 1, stride=2))


def is_channels_last(model):
    return all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)


def test_only_networks_that_would_be_trained_wrongly_change_their_layout():
    narrow, wide = (shortcut(channels).to(memory_format=torch.channels_last) for channels in (4, 16))
    assert safe_to_train(narrow)[0].weight.is_contiguous()
    assert is_channels_last(safe_to_train(wide)) and not wide[0].weight.is_contiguous()


def test_training_changes_it_before_the_first_gradient(digits):
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = shortcut(4)

        def forward(self, x):
            return F.pad(self.body(x).mean((2, 3)), (0, 2))

    model = Narrow().to(memory_format=torch.channels_last)
    train(model, digits, TrainSettings(epochs=1, learning_rate=0.01, batch_size=256))
    assert model.body[0].weight.is_contiguous()


def test_a_strided_pointwise_convolution_is_the_same_from_fewer_pixels():
    x = torch.randn(2, 4, 9, 8).contiguous(memory_format=torch.channels_last).requires_grad_(True)
    weight, bias = torch.randn(6, 4, 1, 1, requires_grad=True), torch.randn(6)
    node = Node("shortcut", "Conv", ("x", "w", "b"), ("y",), {"strides": (2, 2), "kernel_shape": (1, 1)})
    found = apply(node, [x, weight, bias])
    gradients = torch.autograd.grad(found.square().sum(), (x, weight))
    plain = F.conv2d(x.contiguous(), weight, bias, stride=2)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(gradients, torch.autograd.grad(plain.square().sum(), (x, weight)))
