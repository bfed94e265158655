"""What a policy earns. Each reward is one equation; a user may pass a function of the same form."""

from __future__ import annotations

import math
from collections.abc import Callable

from edgecompress.errors import UnknownNameError
from edgecompress.spec import Cost

Reward = Callable[[float, Cost, Cost], float]


def accuracy_flops_latency(accuracy: float, cost: Cost, original: Cost) -> float:
    """The default: ``R = acc - 0.02 * (flops / flops_0 + latency / latency_0)``.

    The budget is kept by projection, so the cost terms only break ties between policies of equal accuracy: a tenth of
    the FLOPs is worth 0.2 points of accuracy. Without a latency model its term is absent.
    """
    penalty = cost.macs / original.macs
    if cost.latency_us is not None and original.latency_us:
        penalty += cost.latency_us / original.latency_us
    return accuracy - 0.02 * penalty


def accuracy_bytes_latency(accuracy: float, cost: Cost, original: Cost) -> float:
    """The default of stage 2: ``R = acc - 0.02 * (size / size_0 + latency / latency_0 + 16 * bops / bops_0)``.

    The original is float, so 16 makes the last term BOPs relative to 8-bit weights and inputs. As in stage 1 the terms
    break ties: half the weight bits of a half-pruned network are worth 0.3 points of accuracy.
    """
    penalty = cost.size_bytes / max(original.size_bytes, 1) + 16 * cost.bops / max(original.bops, 1)
    if cost.latency_us is not None and original.latency_us:
        penalty += cost.latency_us / original.latency_us
    return accuracy - 0.02 * penalty


def paper(accuracy: float, cost: Cost, original: Cost) -> float:
    """Our reading of the paper (accuracy and FLOPs together): ``R = -(1 - acc) * ln(sparse MACs)``.

    AMC's accuracy-guaranteed form (He et al. 2018, section 3.3) on the multiply-adds left after both prunings.
    """
    return -(1 - accuracy) * math.log(max(cost.sparse_macs, 2))


def accuracy_only(accuracy: float, cost: Cost, original: Cost) -> float:
    """``R = acc``: AMC's and HAQ's form when a budget is enforced elsewhere."""
    return accuracy


REWARDS: dict[str, Reward] = {
    "accuracy-flops-latency": accuracy_flops_latency,
    "accuracy-bytes-latency": accuracy_bytes_latency,
    "paper": paper,
    "accuracy": accuracy_only,
}


def reward_by_name(name: str) -> Reward:
    """Look up a reward.

    Raises:
        UnknownNameError: no such reward.
    """
    if name not in REWARDS:
        raise UnknownNameError("reward", name, REWARDS)
    return REWARDS[name]
