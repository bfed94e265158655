"""The one budget of a search: policies are evaluated once, counted once, journalled, and remembered by the arm that asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from edgecompress.agents import AGENTS
from edgecompress.errors import UnknownNameError
from edgecompress.files import append_line
from edgecompress.machine import give_memory_back, resident_bytes
from edgecompress.reward import Reward
from edgecompress.spaces import Choice, Evaluator, Outcome, SearchSpace
from edgecompress.spec import CompressionPolicy, Cost, Stage, Trial

OnTrial = Callable[[Trial, Trial | None], None]
# Growth from which freed memory is handed back: that takes as long as a small network's batch, so not after every evaluation.
SLACK_BYTES = 25_000_000
ALWAYS_WHOLE = frozenset({"original", "sensitivity", "uniform"})
CONTENDERS = 5  # how many of the best are measured again: a policy that cannot become one of them may be abandoned


@dataclass(frozen=True)
class SearchSettings:
    """How long and with what to search.

    episodes: distinct policies evaluated, sensitivities and seeds included. mutate: share of the agent's episodes that
    mutate one of the best policies instead. imagined: episodes that an off-policy agent plays in the model of the
    accuracy for each policy that is evaluated; 0 lets it learn from evaluated ones alone.
    """

    stage: Stage
    agent: str = "ddpg"
    episodes: int = 80
    seed: int = 0
    mutate: float = 0.3
    imagined: int = 24

    def __post_init__(self) -> None:
        if self.agent not in AGENTS:
            raise UnknownNameError("agent", self.agent, AGENTS)


@runtime_checkable
class AbandoningEvaluator(Protocol):
    """An evaluator that can give up on a policy after a part of the images."""

    def __call__(self, policy: CompressionPolicy) -> Outcome: ...

    def unless_hopeless(self, policy: CompressionPolicy, could_win: Callable[[float], bool]) -> Outcome:
        """Evaluate while ``could_win`` of the highest accuracy that is still likely; otherwise ``Outcome.abandoned``."""
        ...


class SpentError(Exception):
    """All evaluations are used up; ends an arm wherever it stands."""


class Scorer:
    """Evaluates choices once, counts the distinct ones, and writes each new one into the journal.

    ``others`` are spaces under other limits, or at the prices of other devices, that the same trials serve. A device's
    rewards are relative to its own price of the uncompressed network.
    """

    def __init__(  # noqa: PLR0913 (what `search` was called with)
        self,
        space: SearchSpace,
        evaluate: Evaluator,
        reward: Reward,
        original: Cost,
        settings: SearchSettings,
        journal: Path | None = None,
        known: Sequence[Trial] = (),
        on_trial: OnTrial | None = None,
        others: Sequence[SearchSpace] = (),
    ) -> None:
        self._spaces = (space, *others)
        self._space, self._evaluate, self._reward, self._original = space, evaluate, reward, original
        self._settings, self._journal, self._on_trial = settings, journal, on_trial
        self._known = {trial.choice: trial for trial in known if trial.stage == settings.stage}
        self.trials: dict[Choice, Trial] = {}
        self._elsewhere: dict[tuple[int, Choice], Trial] = {}
        self.idle = 0
        self._held = resident_bytes()

    @property
    def left(self) -> int:
        """Evaluations that are not used up."""
        return self._settings.episodes - len(self.trials)

    def __call__(self, choice: Choice, arm: str) -> Trial:
        """The trial of ``choice``; evaluated at most once. ``idle`` counts calls since the last new policy.

        Raises:
            SpentError: the policy is new and no evaluation is left.
        """
        if choice in self.trials:
            self.idle += 1
            return self.trials[choice]
        if self.left <= 0:
            raise SpentError
        self.idle = 0
        trial = self._known.get(choice)
        if trial is None:
            trial = self._measure(choice, arm)
            if self._journal is not None:
                append_line(self._journal, trial)
        self.trials[choice] = trial
        if self._on_trial is not None:
            self._on_trial(trial, best(self.fitting()))
        return trial

    def _measure(self, choice: Choice, arm: str) -> Trial:
        policy = self._space.to_policy(choice)
        # A network's dropout must not shift the agent's random stream: on resume the evaluation is skipped.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._settings.seed)
            outcome = self._outcome(policy, self._space.cost(policy), arm)
        if resident_bytes() > self._held + SLACK_BYTES:
            give_memory_back()
            self._held = resident_bytes()
        cost = self._space.cost(policy)
        return Trial(
            stage=self._settings.stage,
            episode=len(self.trials),
            arm=arm,
            choice=choice,
            accuracy=outcome.accuracy,
            loss=outcome.loss,
            reward=self.reward(outcome.believed, cost),
            cost=cost,
            abandoned=outcome.abandoned,
            estimate=outcome.estimate,
        )

    def _outcome(self, policy: CompressionPolicy, cost: Cost, arm: str) -> Outcome:
        """Evaluate, with leave to give up on what cannot become one of the best, except where the figure itself is wanted."""
        if arm in ALWAYS_WHOLE or not isinstance(self._evaluate, AbandoningEvaluator):
            return self._evaluate(policy)
        prices = [(space, cost if self._at_home(space) else space.cost(policy)) for space in self._spaces]
        within = [(space, price) for space, price in prices if keeps(price, space)]
        leaders = [top(self.fitting(space), CONTENDERS) for space, _ in within]
        if not leaders or any(len(found) < CONTENDERS for found in leaders):
            return self._evaluate(policy)

        def could_win(accuracy: float) -> bool:
            return any(
                self.reward(accuracy, price, space) > found[-1].reward
                for (space, price), found in zip(within, leaders, strict=True)
            )

        return self._evaluate.unless_hopeless(policy, could_win)

    def reward(self, accuracy: float, cost: Cost, space: SearchSpace | None = None) -> float:
        """What a policy of this accuracy and cost would earn in ``space``, by default the scorer's own."""
        whole = self._original if space is None or self._at_home(space) else space.price(space.largest)
        return self._reward(accuracy, cost, whole)

    def fitting(self, space: SearchSpace | None = None) -> list[Trial]:
        """All trials that keep every budget of ``space``, at its prices; by default the scorer's own."""
        space = space or self._space
        return [trial for trial in map(partial(self._in, space), self.trials.values()) if keeps(trial.cost, space)]

    def _at_home(self, space: SearchSpace) -> bool:
        return space.cost is self._space.cost

    def _in(self, space: SearchSpace, trial: Trial) -> Trial:
        """``trial`` as it costs and earns in ``space``."""
        if self._at_home(space):
            return trial
        key = id(space.cost), trial.choice
        if key not in self._elsewhere:
            cost = space.price(trial.choice)
            reward = self.reward(trial.believed, cost, space)
            self._elsewhere[key] = trial.model_copy(update={"cost": cost, "reward": reward})
        return self._elsewhere[key]


def keeps(cost: Cost, space: SearchSpace) -> bool:
    """Whether a cost is within every budget."""
    return all(cost.metric(limit.budget.metric) <= limit.value for limit in space.limits)


def best(trials: Sequence[Trial]) -> Trial | None:
    """The highest reward, the earlier trial on a tie; never one that was abandoned."""
    whole = (trial for trial in trials if not trial.abandoned)
    return max(whole, key=lambda trial: (trial.reward, -trial.loss), default=None)


def top(trials: Sequence[Trial], count: int) -> list[Trial]:
    """The ``count`` best by reward; never one that was abandoned."""
    whole = [trial for trial in trials if not trial.abandoned]
    return sorted(whole, key=lambda trial: (-trial.reward, trial.loss, trial.choice))[:count]
