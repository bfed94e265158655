"""Memory layouts that training on a CPU must not take.

oneDNN (at least up to the one in torch 2.14) computes the weight gradient of a 1x1 convolution with a stride wrongly in
channels last where it has fewer input channels than a vector register holds floats: it writes past its workspace, which
crashes or leaves wrong gradients (github.com/uxlfoundation/oneDNN/issues/6035). Pruned residual networks have such shortcuts.
"""

from __future__ import annotations

import torch
from torch import nn

REGISTER = 16  # floats in an AVX-512 register; with AVX2 8 channels are safe


def safe_to_train(model: nn.Module) -> nn.Module:
    """``model``, in place, in torch's own layout where channels last would corrupt its gradients."""
    if any(map(_corrupts, model.modules())):
        model.to(memory_format=torch.contiguous_format)
    return model


def _corrupts(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels // module.groups < REGISTER
    )
