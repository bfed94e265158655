"""The teacher of a run's trainings is asked for a batch once, and what it answers stays what it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from sample_networks import Residual, patterns, settled
from torch import Tensor, nn

from edgecompress import teacher as module
from edgecompress.finetune import TrainSettings, train
from edgecompress.teacher import Teacher


class Counted(nn.Module):
    """Says how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.asked = settled(Residual(4)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        answers: Tensor = self.network(x)
        return answers


@pytest.fixture
def counted() -> Iterator[Counted]:
    with torch.no_grad():
        yield Counted().eval()


def batch(seed: int) -> Tensor:
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_same_batch_gets_the_same_answers_without_the_network(counted):
    teacher = Teacher(counted)
    first, other = teacher(batch(0)), teacher(batch(1))
    assert counted.asked == 2
    assert torch.equal(teacher(batch(0)), first) and torch.equal(teacher(batch(1)), other)
    assert counted.asked == 2 and not torch.equal(first, other)


def test_precision_decides_which_answers_are_meant(counted):
    teacher = Teacher(counted)
    whole = teacher(batch(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = teacher(batch(0))
    assert counted.asked == 2 and (whole.dtype, half.dtype) == (torch.float32, torch.bfloat16)


def test_answers_of_another_network_are_not_taken_for_its_own(counted):
    kept = Teacher(counted).kept
    first = Teacher(counted, kept)(batch(0))
    other = Counted().eval()
    next(other.network.parameters()).mul_(2)
    assert not torch.equal(Teacher(other, kept)(batch(0)), first) and other.asked == 1
    assert Teacher(counted, kept)(batch(0)) is first and counted.asked == 1


def test_answers_beyond_the_limit_are_computed_anew(counted, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 8 * 4 * 4)  # one batch of four classes
    teacher = Teacher(counted)
    for seed in (0, 1, 0, 1):
        assert torch.equal(teacher(batch(seed)), counted.network(batch(seed)))
    assert counted.asked == 3 and len(teacher.kept) == 1
    assert Teacher(counted, teacher.kept)(batch(0)) is teacher(batch(0)) and counted.asked == 3


def test_second_training_asks_for_nothing_and_ends_where_it_would_without_memory():
    data = patterns()
    settings = TrainSettings(epochs=2, learning_rate=0.02, batch_size=16, device="cpu")

    def trained(teacher: nn.Module) -> nn.Module:
        return train(settled(Residual(4), 1), data, settings, teacher=teacher)

    counted = Counted()
    remembers = Teacher(counted)
    trained(remembers)
    asked = counted.asked
    assert asked == 2 * len(list(data.batches(data.train, 16)))
    again, plain = trained(remembers), trained(settled(Residual(4)))
    assert counted.asked == asked
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))
