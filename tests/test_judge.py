"""Finalists on a larger split: in the order of what their divergence from the original lets expect, not of their labels."""

from __future__ import annotations

from dataclasses import replace

import torch

from edgecompress.fidelity import PRUNED
from edgecompress.job import remeasured
from edgecompress.judge import Judge
from edgecompress.spec import Cost, Trial


def original(x):
    """Scores of ten classes that the images decide."""
    return 4 * x.flatten(1)[:, :10]


def shifted(x):
    """The same classes, further from the original than `near` is."""
    return 40 * original(x)


def near(x):
    """Nearly the original's scores, whose noise moves a class or two."""
    noise = torch.randn(len(x), 10, generator=torch.Generator().manual_seed(0))
    return original(x) + 0.5 * noise


def answered(data):
    """The split whose right answers are the original's."""
    return replace(data.select_val, labels=original(data.normalise(data.select_val.images)).argmax(1))


def test_a_judge_expects_less_of_what_is_further_from_the_original(digits):
    judge = Judge(digits, answered(digits), original, PRUNED)
    same, far, close = judge(original), judge(shifted), judge(near)
    assert same.estimate == same.accuracy == far.accuracy == 1 > close.accuracy
    assert far.estimate < close.estimate < same.estimate


def test_finalists_are_in_the_order_of_the_divergence(digits):
    cost = Cost(macs=1, sparse_macs=1, params=1, nonzeros=1, size_bytes=1, bops=1)
    trials = [
        Trial(stage="prune", episode=i, arm="a", choice=(i,), accuracy=0.5, loss=1.0, reward=0.5 - i / 100, cost=cost)
        for i in range(2)
    ]
    judge = Judge(digits, answered(digits), original, PRUNED)
    assert [t.episode for t in remeasured(trials, judge, lambda trial: (shifted, near)[trial.episode])] == [1, 0]
