"""The original network as the teacher of a run's trainings, which asks it for every batch once.

Epochs of one number show all trainings of a run the same batches (`finetune.train`), so that what was answered in the first
training need not be computed in the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping

import torch
from torch import Tensor, nn

from edgecompress.trace import weights_digest

MOST_BYTES = 2**28  # of answers; what comes after them is computed anew


class Teacher(nn.Module):
    """``network`` for inference, its answers kept by batch: ``float [B, C, H, W]`` to whatever it answers.

    kept: the answers by digests of the network's weights and of the batch with its precision. On a GPU nothing is kept: the network
        is quick there, and to know a batch again would take its way back to the CPU.
    """

    def __init__(self, network: nn.Module, kept: MutableMapping[bytes, Tensor] | None = None) -> None:
        super().__init__()
        self.network = network
        self._weights = bytes.fromhex(weights_digest(network))
        self.kept: MutableMapping[bytes, Tensor] = {} if kept is None else kept
        self._bytes = sum(map(_bytes, self.kept.values()))

    def forward(self, x: Tensor) -> Tensor:
        answers: Tensor
        if x.device.type != "cpu" or torch.is_grad_enabled():
            answers = self.network(x)
            return answers
        key = self._weights + _digest(x)
        if key in self.kept:
            return self.kept[key]
        answers = self.network(x)
        if self._bytes + _bytes(answers) <= MOST_BYTES:
            self._bytes += _bytes(answers)
            self.kept[key] = answers
        return answers

    def room_for(self) -> int:
        """How many batches can be remembered, to judge by those that are."""
        return MOST_BYTES * len(self.kept) // self._bytes if self.kept else 0


def _bytes(answers: Tensor) -> int:
    return answers.numel() * answers.element_size()


def _digest(x: Tensor) -> bytes:
    precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    digest = hashlib.blake2b(f"{tuple(x.shape)} {precision}".encode(), digest_size=16)
    digest.update(x.contiguous().numpy().data)
    return digest.digest()
