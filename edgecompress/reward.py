"""What a policy earns. Each reward is one equation; a user may pass a function of the same form."""

from __future__ import annotations

import math
from collections.abc import Callable

from edgecompress.errors import UnknownNameError, UsageError
from edgecompress.imports import imported
from edgecompress.spec import Cost

Reward = Callable[[float, Cost, Cost], float]


def accuracy_flops_latency(accuracy: float, cost: Cost, original: Cost) -> float:
    """The default: ``R = acc - 0.02 * (flops / flops_0 + latency / latency_0 + size / size_0)``.

    Ours: accuracy and FLOPs together as in the paper (Zhan, Lin and Cao, arXiv 1912.02254), latency and bytes beside them.
    The FLOPs are dense: zeros save none. The size is that after both prunings, so single weights are worth removing. The
    budget is kept by projection, so the cost terms only break ties between policies of equal accuracy: a tenth of
    the FLOPs is worth 0.2 points of accuracy. Without a latency or a size model its term is absent.
    """
    penalty = cost.macs / original.macs
    if cost.latency_us is not None and original.latency_us:
        penalty += cost.latency_us / original.latency_us
    if cost.size_bytes and original.size_bytes:
        penalty += cost.size_bytes / original.size_bytes
    return accuracy - 0.02 * penalty


def accuracy_bytes_latency(accuracy: float, cost: Cost, original: Cost) -> float:
    """The default of stage 2: ``R = acc - 0.02 * (size / size_0 + latency / latency_0 + 16 * bops / bops_0)``.

    Ours, in the form of stage 1's. The original is float, so 16 makes the last term BOPs relative to 8-bit weights and
    inputs. As in stage 1 the terms break ties: half the weight bits of a half-pruned network are worth 0.3 points of
    accuracy.
    """
    penalty = cost.size_bytes / max(original.size_bytes, 1) + 16 * cost.bops / max(original.bops, 1)
    if cost.latency_us is not None and original.latency_us:
        penalty += cost.latency_us / original.latency_us
    return accuracy - 0.02 * penalty


def paper(accuracy: float, cost: Cost, original: Cost) -> float:
    """Our reading of the paper (arXiv 1912.02254, accuracy and FLOPs together): ``R = -(1 - acc) * ln(sparse MACs)``.

    AMC's accuracy-guaranteed form (He et al. 2018, section 3.3) on the multiply-adds left after both prunings.
    """
    return -(1 - accuracy) * math.log(max(cost.sparse_macs, 2))


def accuracy_only(accuracy: float, cost: Cost, original: Cost) -> float:
    """``R = acc``: AMC's and HAQ's form when a budget is enforced elsewhere."""
    return accuracy


def soft_target(beta: float = -0.07, target: float = 0.5) -> Reward:
    """A soft target form, one-sided: ``R = acc * max(cost / (target * cost_0), 1) ** beta``.

    MnasNet's weighted product with a hard knee (Tan et al. 2019, equation 2, alpha = 0, beta = -0.07; Galen, Krestel et al.
    2023, rewards latency in the same spirit): what is cheaper than the target earns nothing more, what costs twice as much
    loses 5 %. The cost is the latency where it is known, else the MACs.

    Args:
        target: share of the original's cost that is aimed at.
    """

    def reward(accuracy: float, cost: Cost, original: Cost) -> float:
        ratio = cost.macs / original.macs
        if cost.latency_us is not None and original.latency_us:
            ratio = cost.latency_us / original.latency_us
        return accuracy * float(max(ratio / target, 1.0) ** beta)

    return reward


REWARDS: dict[str, Reward] = {
    "accuracy-flops-latency": accuracy_flops_latency,
    "accuracy-bytes-latency": accuracy_bytes_latency,
    "paper": paper,
    "accuracy": accuracy_only,
    "soft-target": soft_target(),
}


def reward_by_name(name: str) -> Reward:
    """Look up a reward, or import a user's function by ``package.module:function``.

    Raises:
        UnknownNameError: no such reward. UsageError: the function cannot be imported or called.
    """
    if ":" in name:
        found = imported(name, "reward", UsageError)
        if not callable(found):
            raise UsageError(
                f"The reward '{name}' is a {type(found).__name__}; expected a function (accuracy, cost, original)."
            )
        own: Reward = found
        return own
    if name not in REWARDS:
        raise UnknownNameError("reward", name, REWARDS)
    return REWARDS[name]
