"""One loop for both stages: uniform, sensitivities, greedy and surrogate solutions, then an agent and mutations of the best.

The result is the best policy over all arms, and every trial says which arm found it. The loop is deterministic: given
the same seed it asks for the same policies in the same order, so a search is resumed by running it again with the
journal answering what was already evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from edgecompress.agents import OFF_POLICY
from edgecompress.arms import ARMS, FROM_SCRATCH
from edgecompress.baselines import STATIC, Tables, integer_program, programs, uniform
from edgecompress.errors import UsageError
from edgecompress.imagination import imagining
from edgecompress.reward import Reward
from edgecompress.scoring import OnTrial, Scorer, SearchSettings, SpentError, best, top
from edgecompress.spaces import Choice, Evaluator, Outcome, SearchSpace
from edgecompress.spec import Cost, Trial
from edgecompress.starts import deltas_of, inner_only, sensitivities_of, solutions

PROGRAMS = 10  # one in so many evaluations goes to a solution of integer programming before the agent begins


def search(  # noqa: PLR0913 (one call runs a whole stage)
    space: SearchSpace,
    evaluate: Evaluator,
    reward: Reward,
    original: Cost,
    settings: SearchSettings,
    *,
    journal: Path | None = None,
    known: Sequence[Trial] = (),
    on_trial: OnTrial | None = None,
    tables: Callable[[], Tables] | None = None,
) -> list[Trial]:
    """Search one stage.

    Args:
        evaluate: policy -> `Outcome`; one that can give up early is a `scoring.AbandoningEvaluator`.
        original: the uncompressed network's cost; rewards are relative to it.
        journal: a JSON-lines file that every new trial is appended to.
        known: trials of an earlier run of the same search; they are not evaluated again.
        tables: sensitivities that are known without an evaluation, asked for once: integer programming, the surrogate and
            the start of every agent use them. By default, and always for ``greedy``, they are measured with evaluations.

    Returns:
        all trials that keep the budgets, in the order they were first asked for.

    Raises:
        GoalMissedError: no policy keeps the budgets.
    """
    space.check_reachable()
    torch.manual_seed(settings.seed)
    scorer = Scorer(space, evaluate, reward, original, settings, journal, known, on_trial)
    with suppress(SpentError):
        _run(space, scorer, settings, tables)
    return scorer.fitting()


def search_budgets(
    spaces: Sequence[SearchSpace],
    evaluate: Evaluator,
    reward: Reward,
    original: Cost,
    settings: SearchSettings,
    *,
    journal: Path | None = None,
    known: Sequence[Trial] = (),
    on_trial: OnTrial | None = None,
) -> list[list[Trial]]:
    """Search several budgets, and several devices, at once with one agent, one model of the accuracy and one set of trials.

    The agent sees how tight each budget is, and in the features and the relief of the actions what they save on the device.
    The sensitivities are measured once; a policy found for one budget serves every other one that it keeps.

    Args:
        spaces: the same actions (on devices of different channel divisors: levels that all of them allow) under different
            limits or with the costs of different devices, the loosest first.
        original: the uncompressed network's cost in the first space; where another has its own cost model, rewards there are
            relative to its price of the largest policy.
        settings: ``episodes`` counts the evaluations of all budgets together.

    Returns:
        for each space all trials that keep its budgets, at its prices.

    Raises:
        GoalMissedError: no policy keeps the budgets of one of them. UsageError: the agent is not an off-policy one, or the
        spaces differ in their actions.
    """
    if settings.agent not in OFF_POLICY or not settings.imagined:
        raise UsageError(
            f"'{settings.agent}' cannot search several budgets at once; choose {', '.join(OFF_POLICY)} with imagined episodes."
        )
    if any((space.names, space.levels) != (spaces[0].names, spaces[0].levels) for space in spaces):
        raise UsageError("Budgets can be searched together only over the same actions; these spaces differ in more.")
    for space in spaces:
        space.check_reachable()
    torch.manual_seed(settings.seed)
    scorer = Scorer(spaces[0], evaluate, reward, original, settings, journal, known, on_trial, spaces[1:])
    with suppress(SpentError):
        for space in spaces:
            scorer(space.project(np.full(len(space.levels), 0.7)), "uniform")
        for space in spaces:
            inner = inner_only(space)
            if inner is not None:
                scorer(inner, "inner-only")
        deltas = sensitivities_of(spaces[0], scorer, settings)
        for space in spaces:
            for arm, choice in solutions(space, deltas, partial(_earned, scorer, space)):
                scorer(choice, arm)
        imagining(spaces, scorer, settings)
    return [scorer.fitting(space) for space in spaces]


def _run(space: SearchSpace, scorer: Scorer, settings: SearchSettings, tables: Callable[[], Tables] | None) -> None:
    """Ask until the start is through and the arm has run dry."""
    if settings.agent != "amc":
        scorer(space.project(np.full(len(space.levels), 0.7)), "uniform")
    if settings.agent == "uniform":
        for arm, choice in uniform(space):
            scorer(choice, arm)
        return
    if settings.agent == "milp":
        _program(space, scorer, settings, tables)
        return
    if settings.agent not in FROM_SCRATCH:
        start(space, scorer, settings, tables)
    if settings.agent not in STATIC:
        ARMS[settings.agent](space, scorer, settings)


def start(
    space: SearchSpace, scorer: Scorer, settings: SearchSettings, tables: Callable[[], Tables] | None = None
) -> None:
    """Inner-only widths, the sensitivities, and the policies that follow from them."""
    inner = inner_only(space)
    if inner is not None and settings.agent not in STATIC:
        scorer(inner, "inner-only")
    if tables is None or settings.agent == "greedy":
        deltas = sensitivities_of(space, scorer, settings)
    else:
        costs = tables()
        deltas = deltas_of(space, costs, scorer)
        if settings.agent not in STATIC:
            for choice in islice(programs(space, costs, settings.seed), max(settings.episodes // PROGRAMS, 1)):
                scorer(choice, "milp")
    for arm, choice in solutions(space, deltas, partial(_earned, scorer, space)):
        if settings.agent != "greedy" or arm.startswith("greedy"):
            scorer(choice, arm)


def _earned(scorer: Scorer, space: SearchSpace, accuracy: float, choice: Choice) -> float:
    return scorer.reward(accuracy, space.price(choice), space)


def _program(space: SearchSpace, scorer: Scorer, settings: SearchSettings, tables: Callable[[], Tables] | None) -> None:
    if tables is not None:
        scorer(space.largest, "original")
        costs: Tables = tables()
    else:
        deltas = sensitivities_of(space, scorer, settings)
        costs = {action: dict(zip(levels, loss, strict=True)) for action, (levels, loss, _) in deltas.items()}
    choice = integer_program(space, costs)
    if choice is not None:
        scorer(choice, "milp")


__all__ = ["Outcome", "Scorer", "SearchSettings", "best", "search", "search_budgets", "start", "top"]
