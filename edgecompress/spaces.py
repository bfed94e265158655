"""What a search may choose: the integers of every action, and the projection of a whole vector of wishes onto the budgets.

Accuracy comes from an injected `Evaluator`, so no network is needed to test a search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from edgecompress.cost import CostModel
from edgecompress.errors import GoalMissedError
from edgecompress.spec import Budget, CompressionPolicy, Cost, Metric

Choice = tuple[int, ...]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """How well a policy does on the search split: top-1 in [0, 1] and cross-entropy in nats.

    ``abandoned``: the evaluator gave up after a part of the images, because the policy could not become one of the best.
    ``estimate``: what the evaluator believes of the accuracy on other images, where it knows better than these few say;
    rewards are then of the estimate.
    """

    accuracy: float
    loss: float
    abandoned: bool = False
    estimate: float | None = None

    @property
    def believed(self) -> float:
        """The estimate where there is one, else the accuracy."""
        return self.accuracy if self.estimate is None else self.estimate


class Evaluator(Protocol):
    """Builds a policy and measures it; the one expensive call of a search."""

    def __call__(self, policy: CompressionPolicy) -> Outcome: ...


@dataclass(frozen=True)
class Limit:
    """A budget in the metric's own unit."""

    budget: Budget
    value: float


@dataclass(frozen=True)
class SearchSpace:
    """What one stage may choose.

    ``levels[i]`` are the integers that action ``i`` may build, ascending; ``steps`` groups actions into the steps of an
    episode; ``features[s]`` describe step ``s`` in [0, 1]; ``to_policy`` turns a choice into a policy. Actions of one
    ``tied`` set take one value; those in ``only_if_asked`` stay at their largest level unless a budget binds them.
    ``inner`` are the actions that decide about one layer's output alone, not about a width that several layers share.
    """

    names: tuple[str, ...]
    levels: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[int, ...], ...]
    features: NDArray[np.float32]
    to_policy: Callable[[Choice], CompressionPolicy]
    cost: CostModel
    limits: tuple[Limit, ...]
    tied: tuple[tuple[int, ...], ...] = ()
    only_if_asked: frozenset[int] = frozenset()
    inner: frozenset[int] = frozenset()

    def price(self, choice: Choice) -> Cost:
        """The cost of a finished choice."""
        return self.cost(self.to_policy(choice))

    def pressure(self, choice: Choice) -> float:
        """The largest ratio of a metric to its limit; a choice fits while this is at most 1."""
        cost = self.price(choice)
        return max((cost.metric(limit.budget.metric) / limit.value for limit in self.limits), default=0.0)

    def fits(self, choice: Choice) -> bool:
        """Whether every budget holds."""
        return self.pressure(choice) <= 1.0

    @property
    def largest(self) -> Choice:
        """Nothing compressed."""
        return tuple(levels[-1] for levels in self.levels)

    @property
    def smallest(self) -> Choice:
        """Everything compressed as far as it goes."""
        return tuple(levels[0] for levels in self.levels)

    def wishes(self, choice: Choice) -> Vector:
        """The wish in [0, 1] whose nearest level is ``choice``."""
        return np.array(
            [(value - ls[0]) / max(ls[-1] - ls[0], 1) for value, ls in zip(choice, self.levels, strict=True)]
        )

    def project(self, wishes: Vector) -> Choice:
        """The choice nearest to ``wishes`` that uses the budget up.

        One multiplier on all bound values is bisected, values are rounded down to a level, and what is left of the
        budget goes to the actions that lost most by rounding. Actions that relieve no budget are only rounded.
        """
        low = np.array([levels[0] for levels in self.levels], float)
        high = np.array([levels[-1] for levels in self.levels], float)
        values = low + np.clip(wishes, 0, 1) * (high - low)
        bound = self.bound
        idle = self.only_if_asked - bound

        def rounded(multiplier: float) -> Choice:
            scaled = np.clip(values * multiplier, low, high)
            return self._tie(
                tuple(
                    _floor(levels, scaled[i])
                    if i in bound
                    else levels[-1]
                    if i in idle
                    else _nearest(levels, values[i])
                    for i, levels in enumerate(self.levels)
                )
            )

        if not bound:
            return rounded(1.0)
        lower, upper = 0.0, max(high[i] / max(values[i], 1e-9) for i in bound)
        if self.fits(rounded(upper)):
            return rounded(upper)
        seen: dict[Choice, bool] = {}  # late halvings mostly round to what was priced before
        for _ in range(14):
            middle = (lower + upper) / 2
            candidate = rounded(middle)
            if candidate not in seen:
                seen[candidate] = self.fits(candidate)
            lower, upper = (middle, upper) if seen[candidate] else (lower, middle)
        return self.fill(rounded(lower), values * max(lower, 1e-9))

    def walled(self, wishes: Vector) -> Choice:
        """AMC's sequential wall (He et al. 2018, algorithm 1): each action in turn is lowered until the budgets can still
        be met with everything after it at its smallest. Late actions starve and budget is left unused; for comparison."""
        idle = self.only_if_asked - self.bound
        choice = tuple(levels[-1] if i in idle else levels[0] for i, levels in enumerate(self.levels))
        for action, (wish, levels) in enumerate(zip(np.clip(wishes, 0, 1), self.levels, strict=True)):
            if action in idle:
                continue
            wanted = _nearest(levels, levels[0] + wish * (levels[-1] - levels[0]))
            for level in reversed([level for level in levels if level <= wanted]):
                candidate = self.with_value(choice, action, level)
                if level == levels[0] or self.fits(candidate):
                    choice = candidate
                    break
        return choice

    @cached_property
    def _alone(self) -> tuple[Cost, ...]:
        """The cost with each action alone at its smallest level."""
        return tuple(self.price(self.with_value(self.largest, i, levels[0])) for i, levels in enumerate(self.levels))

    @cached_property
    def bound(self) -> frozenset[int]:
        """Actions that relieve a budget when they are lowered."""
        metrics = [limit.budget.metric for limit in self.limits]
        full = self.price(self.largest)
        return frozenset(
            i
            for i, levels in enumerate(self.levels)
            if len(levels) > 1 and any(self._alone[i].metric(metric) < full.metric(metric) for metric in metrics)
        )

    @cached_property
    def relief(self) -> NDArray[np.float32]:
        """``[steps, width]``: the share of all that single actions can save which this one saves, mean over the limits' metrics."""
        metrics: list[Metric] = list(dict.fromkeys(limit.budget.metric for limit in self.limits)) or ["flops"]
        full = self.price(self.largest)
        saved = np.array([[max(full.metric(m) - cost.metric(m), 0.0) for cost in self._alone] for m in metrics])
        shares = (saved / np.maximum(saved.sum(1, keepdims=True), 1e-9)).mean(0)
        return np.array([[shares[i] for i in step] for step in self.steps], np.float32)

    @cached_property
    def tightness(self) -> NDArray[np.float32]:
        """Every metric's limit as a share of the largest policy's cost; 1 where there is no limit."""
        full = self.price(self.largest)
        shares = dict.fromkeys(get_args(Metric), 1.0)
        for limit in self.limits:
            shares[limit.budget.metric] = min(limit.value / max(full.metric(limit.budget.metric), 1e-9), 1.0)
        return np.array(list(shares.values()), np.float32)

    def fill(self, choice: Choice, wanted: Vector) -> Choice:
        """Raise one bound action by one level while a budget allows it, the one furthest below ``wanted`` first."""
        blocked: set[int] = set(range(len(choice))) - self.bound
        while len(blocked) < len(choice):
            gaps = [
                (wanted[i] - value) / max(wanted[i], 1e-9) if i not in blocked else -np.inf
                for i, value in enumerate(choice)
            ]
            best = int(np.argmax(gaps))
            raised = self.raised(choice, best)
            if raised != choice and self.fits(raised):
                choice = raised
            else:
                blocked.add(best)
        return choice

    def raised(self, choice: Choice, action: int, by: int = 1) -> Choice:
        """``choice`` with one action (and those tied to it) moved by ``by`` levels, clipped to the ends."""
        levels = self.levels[action]
        position = min(max(levels.index(choice[action]) + by, 0), len(levels) - 1)
        return self.with_value(choice, action, levels[position])

    def with_value(self, choice: Choice, action: int, value: int) -> Choice:
        """``choice`` with one action, and those tied to it, set to ``value``."""
        together = next((group for group in self.tied if action in group), (action,))
        return tuple(value if i in together else old for i, old in enumerate(choice))

    def _tie(self, choice: Choice) -> Choice:
        """Actions that share one tensor take the largest value among them."""
        result = list(choice)
        for group in self.tied:
            for i in group:
                result[i] = max(choice[j] for j in group)
        return tuple(result)

    def check_reachable(self) -> None:
        """Refuse budgets below what this space can build.

        Raises:
            GoalMissedError: names the smallest value of the metric that can be reached.
        """
        cost = self.price(self.smallest)
        for limit in self.limits:
            reached = cost.metric(limit.budget.metric)
            if reached > limit.value:
                relative = f" ({reached / (limit.value / limit.budget.limit):.3f}x)" if limit.budget.relative else ""
                raise GoalMissedError(
                    f"The budget {limit.budget} cannot be met: the smallest {limit.budget.metric} that this network can "
                    f"reach on this target is {reached:.4g}{relative}. Raise the budget or choose another target."
                )


def _floor(levels: Sequence[int], value: float) -> int:
    return max((level for level in levels if level <= value + 1e-9), default=levels[0])


def _nearest(levels: Sequence[int], value: float) -> int:
    return min(levels, key=lambda level: abs(level - value))


__all__ = ["Choice", "Evaluator", "Limit", "Outcome", "SearchSpace", "Vector"]
