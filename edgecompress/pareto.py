"""Which trials of a finished search are worth having: none is better in every way than one of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgecompress.errors import BadFileError, GoalMissedError, UsageError
from edgecompress.reward import Reward
from edgecompress.scoring import keeps
from edgecompress.spaces import SearchSpace
from edgecompress.spec import Budget, Config, Cost, Stage, Trial, parse_budgets


def pareto_set(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other one dominates: at least as accurate and as cheap in every metric, and better in one.

    Metrics are the accuracy that the search believes in, MACs, parameters, bytes, BOPs and, where it is known, latency.
    Abandoned trials are left out; of equal ones the first stays. In order of falling accuracy.
    """
    whole = [trial for trial in trials if not trial.abandoned]
    points = {trial.choice: _point(trial) for trial in reversed(whole)}
    kept = [
        trial
        for place, trial in enumerate(whole)
        if not any(_dominates(points[other.choice], points[trial.choice]) for other in whole)
        and not any(points[other.choice] == points[trial.choice] for other in whole[:place])
    ]
    return sorted(kept, key=lambda trial: (-trial.believed, trial.cost.macs))


def _point(trial: Trial) -> tuple[float, ...]:
    cost: Cost = trial.cost
    latency = (cost.latency_us,) if cost.latency_us is not None else ()
    return (-trial.believed, cost.macs, cost.params, cost.size_bytes, cost.bops, *latency)


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and a != b and all(x <= y for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Pick:
    """The Pareto set of a search, and the most accurate trial within the budgets that were asked for."""

    front: tuple[Trial, ...]
    trial: Trial | None


def pick(trials: Sequence[Trial], stage: Stage, budgets: Sequence[Budget], run: str = "the run") -> Pick:
    """Choose among what was evaluated; relative budgets are shares of the uncompressed network's cost.

    Raises:
        BadFileError: there are no trials of this stage, or a relative budget has nothing to be relative to.
    """
    mine = [trial for trial in trials if trial.stage == stage]
    if not mine:
        raise BadFileError(f"There are no trials of stage '{stage}' in {run}; its search did not run or did not begin.")
    original = next((trial.cost for trial in mine if trial.arm == "original"), None)
    limits = []
    for budget in budgets:
        if budget.relative and original is None:
            raise BadFileError(
                f"{run} did not measure the uncompressed network in stage '{stage}'; give {budget.metric} in its own unit."
            )
        whole = original.metric(budget.metric) if budget.relative and original else 1.0
        limits.append((budget.metric, budget.absolute(whole)))
    front = pareto_set(mine)
    within = [trial for trial in front if all(trial.cost.metric(metric) <= value for metric, value in limits)]
    return Pick(tuple(front), within[0] if within and budgets else None)


def check_precision(config: Config, budgets: Sequence[Budget], run: str = "the run") -> None:
    """Refuse a latency at a precision that the run's own budget does not name: its trials are priced at one precision alone.

    Raises:
        UsageError: a budget names such a precision.
    """
    priced = {budget.precision for budget in parse_budgets(config.budget)}
    for budget in budgets:
        if budget.precision not in {None, *priced}:
            raise UsageError(
                f"The trials of {run} are not priced at {budget.precision}, which '{budget}' asks for. Leave "
                f"'@{budget.precision}' out to choose at the precision they are priced at, or price them anew: edgecompress "
                f"compress --pick {run} --budget {budget.metric}@{budget.precision}=..."
            )


def picked(space: SearchSpace, trials: Sequence[Trial], stage: Stage, reward: Reward, original: Cost) -> list[Trial]:
    """What an earlier search knows of ``space``: its trials, priced and rewarded anew, that keep the budgets here.

    Accuracy does not depend on the budget or the device, so another budget, or another device's latencies, need no new
    evaluation. Trials whose levels this space does not have are left out.

    Raises:
        GoalMissedError: none of them keeps the budgets.
    """
    usable = [trial for trial in trials if trial.stage == stage and _buildable(space, trial) and not trial.abandoned]
    priced = []
    for trial in usable:
        cost = space.price(trial.choice)
        priced.append(trial.model_copy(update={"cost": cost, "reward": reward(trial.believed, cost, original)}))
    fitting = [trial for trial in priced if keeps(trial.cost, space)]
    if not fitting:
        wanted = ", ".join(str(limit.budget) for limit in space.limits)
        smallest = ", ".join(
            f"{limit.budget.metric} {min(trial.cost.metric(limit.budget.metric) for trial in priced):.4g}"
            for limit in space.limits
            if priced
        )
        raise GoalMissedError(
            f"None of the {len(usable)} trials of stage '{stage}' to pick from keeps {wanted}"
            f"{f' (the smallest have {smallest})' if smallest else ''}. Search with this budget instead, without --pick."
        )
    return fitting


def _buildable(space: SearchSpace, trial: Trial) -> bool:
    return len(trial.choice) == len(space.levels) and all(
        value in levels for value, levels in zip(trial.choice, space.levels, strict=True)
    )
