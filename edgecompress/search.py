"""One loop for both stages: uniform, sensitivities, greedy and surrogate solutions, then an agent and mutations of the best.

The result is the best policy over all arms, and every trial says which arm found it. The loop is deterministic: given
the same seed it asks for the same policies in the same order, so a search is resumed by running it again with the
journal answering what was already evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgecompress.agents import AGENTS, make_agent
from edgecompress.baselines import STATIC, Tables, integer_program, uniform
from edgecompress.envs import Choice, Evaluator, Outcome, PolicyEnv, SearchSpace
from edgecompress.errors import UnknownNameError
from edgecompress.files import append_line
from edgecompress.reward import Reward
from edgecompress.spec import Cost, Stage, Trial

OnTrial = Callable[[Trial, Trial | None], None]


@dataclass(frozen=True)
class SearchSettings:
    """How long and with what to search.

    episodes: distinct policies evaluated, sensitivities and seeds included. mutate: share of the agent's episodes that
    mutate one of the best policies instead.
    """

    stage: Stage
    agent: str = "ddpg"
    episodes: int = 80
    seed: int = 0
    mutate: float = 0.3

    def __post_init__(self) -> None:
        if self.agent not in AGENTS:
            raise UnknownNameError("agent", self.agent, AGENTS)


class Scorer:
    """Evaluates choices once, counts the distinct ones, and writes each new one into the journal."""

    def __init__(
        self,
        space: SearchSpace,
        evaluate: Evaluator,
        reward: Reward,
        original: Cost,
        settings: SearchSettings,
        journal: Path | None = None,
        known: Sequence[Trial] = (),
        on_trial: OnTrial | None = None,
    ) -> None:
        self._space, self._evaluate, self._reward, self._original = space, evaluate, reward, original
        self._settings, self._journal, self._on_trial = settings, journal, on_trial
        self._known = {trial.choice: trial for trial in known if trial.stage == settings.stage}
        self.trials: dict[Choice, Trial] = {}

    def __call__(self, choice: Choice, arm: str) -> Trial:
        """The trial of ``choice``; evaluated at most once."""
        if choice in self.trials:
            return self.trials[choice]
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
            outcome = self._evaluate(policy)
        cost = self._space.cost(policy)
        return Trial(
            stage=self._settings.stage,
            episode=len(self.trials),
            arm=arm,
            choice=choice,
            accuracy=outcome.accuracy,
            loss=outcome.loss,
            reward=self._reward(outcome.accuracy, cost, self._original),
            cost=cost,
        )

    def fitting(self) -> list[Trial]:
        """All trials that keep every budget."""
        return [trial for trial in self.trials.values() if self._space.fits(trial.choice)]


def best(trials: Sequence[Trial]) -> Trial | None:
    """The highest reward, the earlier trial on a tie."""
    return max(trials, key=lambda trial: (trial.reward, -trial.loss), default=None)


def top(trials: Sequence[Trial], count: int) -> list[Trial]:
    """The ``count`` best by reward."""
    return sorted(trials, key=lambda trial: (-trial.reward, trial.loss, trial.choice))[:count]


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
        original: the uncompressed network's cost; rewards are relative to it.
        journal: a JSON-lines file that every new trial is appended to.
        known: trials of an earlier run of the same search; they are not evaluated again.
        tables: sensitivities for integer programming, asked for once; by default they are measured with evaluations.

    Returns:
        all trials that keep the budgets, in the order they were first asked for.

    Raises:
        GoalMissedError: no policy keeps the budgets.
    """
    space.check_reachable()
    torch.manual_seed(settings.seed)
    scorer = Scorer(space, evaluate, reward, original, settings, journal, known, on_trial)
    scorer(space.project(np.full(len(space.levels), 0.7)), "uniform")
    if settings.agent == "uniform":
        for arm, choice in uniform(space):
            scorer(choice, arm)
        return scorer.fitting()
    if settings.agent == "milp" and tables is not None:
        scorer(space.largest, "original")
        _program(space, scorer, tables())
        return scorer.fitting()
    deltas = _sensitivities(space, scorer, settings)
    if settings.agent == "milp":
        _program(space, scorer, {a: dict(zip(levels, loss, strict=True)) for a, (levels, loss, _) in deltas.items()})
        return scorer.fitting()
    for arm, choice in _solutions(
        space, deltas, lambda accuracy, choice: reward(accuracy, space.price(choice), original)
    ):
        if settings.agent != "greedy" or arm.startswith("greedy"):
            scorer(choice, arm)
    if settings.agent not in STATIC:
        _explore(space, scorer, settings)
    return scorer.fitting()


def _program(space: SearchSpace, scorer: Scorer, tables: Tables) -> None:
    choice = integer_program(space, tables)
    if choice is not None:
        scorer(choice, "milp")


def _separate_actions(space: SearchSpace) -> list[int]:
    """One action of each tied set that has a choice, those that relieve a budget first."""
    firsts = [i for i in range(len(space.levels)) if all(i == group[0] for group in space.tied if i in group)]
    idle = space.only_if_asked - space.bound
    chosen = [action for action in firsts if len(space.levels[action]) > 1 and action not in idle]
    return sorted(chosen, key=lambda action: action not in space.bound)


Deltas = dict[int, tuple[tuple[int, ...], np.ndarray, np.ndarray]]


def _sensitivities(space: SearchSpace, scorer: Scorer, settings: SearchSettings) -> Deltas:
    """Lower one action at a time from the largest policy: ``{action: (levels, loss rise, accuracy drop)}``.

    At most a third of the episodes go here; a step between measured levels is interpolated and never falls.
    """
    actions = _separate_actions(space)
    per_action = max(1, (settings.episodes // 3) // max(len(actions), 1))
    full = scorer(space.largest, "original")
    deltas: Deltas = {}
    for action in actions[: settings.episodes // 2]:
        levels = space.levels[action]
        asked = _spread(len(levels), per_action)
        trials = [scorer(space.with_value(space.largest, action, levels[i]), "sensitivity") for i in asked]
        at = [levels[i] for i in asked] + [levels[-1]]
        rise = np.maximum.accumulate(([t.loss - full.loss for t in trials] + [0.0])[::-1])[::-1]
        drop = np.maximum.accumulate(([full.accuracy - t.accuracy for t in trials] + [0.0])[::-1])[::-1]
        deltas[action] = (levels, _extended(levels, at, rise), _extended(levels, at, drop))
    return deltas


def _spread(count: int, wanted: int) -> list[int]:
    """Indices of the levels to measure, below the last, denser at the low end."""
    if wanted == 1 or count == 2:
        return [(count - 1) // 3]
    return sorted({round(position) for position in np.linspace(0, 0.6 * (count - 1), min(wanted, count - 1))})


def _extended(levels: Sequence[int], at: Sequence[int], values: np.ndarray) -> np.ndarray:
    """Values at every level: linear between measured ones, proportional to the lost width below the lowest."""
    result: np.ndarray = np.asarray(np.interp(levels, at, values))
    if at[0] > levels[0]:
        below = np.array(levels) < at[0]
        lost = (at[-1] - np.array(levels, float)) / max(at[-1] - at[0], 1)
        result[below] = values[0] * lost[below] ** 2
    return result


def _solutions(
    space: SearchSpace, deltas: Deltas, expected: Callable[[float, Choice], float]
) -> Iterator[tuple[str, Choice]]:
    """Static greedies on loss and accuracy, and the separable surrogate improved by swaps.

    Where no budget binds an action, its level is the one of the best expected reward, one action after the other.
    """
    if not deltas:
        return
    loss = {action: dict(zip(levels, rise, strict=True)) for action, (levels, rise, _) in deltas.items()}
    mixed = {
        action: {level: d + 0.1 * loss[action][level] for level, d in zip(levels, drop, strict=True)}
        for action, (levels, _, drop) in deltas.items()
    }
    unbound = [action for action in deltas if action not in space.bound]
    bound = [action for action in deltas if action in space.bound]
    for caution in (1.0, 4.0):
        start = _by_reward(space, {action: mixed[action] for action in unbound}, expected, caution)
        name = "surrogate" if caution == 1 else "surrogate-cautious"
        if not bound:
            yield name, start
            continue
        yield "greedy-accuracy", _greedy(space, {action: mixed[action] for action in bound}, start)
        from_loss = _greedy(space, {action: loss[action] for action in bound}, start)
        yield "greedy-loss", from_loss
        yield name, _swapped(space, {action: loss[action] for action in bound}, from_loss)
        if not unbound:
            return


def _by_reward(
    space: SearchSpace, deltas: dict[int, dict[int, float]], expected: Callable[[float, Choice], float], caution: float
) -> Choice:
    """Set every action to the level with the best expected reward, accuracy drops counted ``caution`` times."""
    choice = space.largest
    lost = 0.0
    for action, table in deltas.items():
        options = [(expected(1 - lost - caution * table[v], space.with_value(choice, action, v)), v) for v in table]
        value = max(options)[1]
        choice, lost = space.with_value(choice, action, value), lost + caution * table[value]
    return choice


def _excess(space: SearchSpace, choice: Choice) -> float:
    """How far ``choice`` is over all budgets together; 0 when it fits."""
    cost = space.price(choice)
    return sum(max(cost.metric(limit.budget.metric) / limit.value - 1, 0.0) for limit in space.limits)


def _greedy(space: SearchSpace, deltas: dict[int, dict[int, float]], choice: Choice) -> Choice:
    """Lower, one level at a time, whatever costs least accuracy for the budget it relieves, until all budgets hold."""
    excess = _excess(space, choice)
    while excess > 0:
        options: list[tuple[float, Choice, float]] = []
        for action, table in deltas.items():
            for by in (-1, -2, -4):  # a single level may relieve nothing where prices are padded
                lowered = space.raised(choice, action, by)
                relieved = excess - _excess(space, lowered)
                if relieved > 1e-12:
                    worse = table[lowered[action]] - table[choice[action]]
                    options.append(((worse + 1e-9) / relieved, lowered, excess - relieved))
                    break
        if not options:
            return space.project(np.zeros(len(choice)))
        _, choice, excess = min(options, key=lambda option: (option[0], option[1]))
    wanted = np.array([levels[-1] for levels in space.levels], float)
    return space.fill(choice, wanted)


def _swapped(space: SearchSpace, deltas: dict[int, dict[int, float]], choice: Choice, passes: int = 4) -> Choice:
    """Trade one action's level for another's while the sum of the separable losses falls."""
    actions = list(deltas)

    def total(candidate: Choice) -> float:
        return sum(deltas[action][candidate[action]] for action in actions)

    for _ in range(passes):
        improved = False
        for up in actions:
            for down in actions:
                candidate = space.raised(space.raised(choice, up), down, -1)
                if up != down and total(candidate) < total(choice) - 1e-9 and space.fits(candidate):
                    choice, improved = candidate, True
        if not improved:
            break
    return space.fill(choice, np.array([levels[-1] for levels in space.levels], float))


def _explore(space: SearchSpace, scorer: Scorer, settings: SearchSettings) -> None:
    """The agent, with mutations of the five best mixed in, until the episodes are used up or nothing new turns up."""
    random = np.random.default_rng(settings.seed)
    env = PolicyEnv(space, lambda choice: scorer(choice, settings.agent).reward)
    agent = make_agent(settings.agent, env, settings.seed)
    for trial in scorer.fitting():
        agent.remember(env, trial.choice, trial.reward)
    mutate = 1.0 if settings.agent == "evolution" else 0.0 if settings.agent == "random" else settings.mutate
    idle = 0
    while len(scorer.trials) < settings.episodes and idle < 30:
        before = len(scorer.trials)
        if random.random() < mutate:
            choice = _mutated(space, scorer, random)
            agent.remember(env, choice, scorer(choice, "mutation").reward)
        else:
            agent.propose(env)
        idle = 0 if len(scorer.trials) > before else idle + 1


def _mutated(space: SearchSpace, scorer: Scorer, random: np.random.Generator) -> Choice:
    """One of the five best with about a third of its wishes moved by ``N(0, 0.15)``; a new policy if one turns up."""
    parents = top(scorer.fitting(), 5) or list(scorer.trials.values())[:1]
    choice = parents[0].choice
    for _ in range(10):
        wishes = space.wishes(parents[int(random.integers(len(parents)))].choice)
        moved = random.random(len(wishes)) < 0.3
        choice = space.project(np.clip(wishes + moved * random.normal(0, 0.15, len(wishes)), 0, 1))
        if choice not in scorer.trials:
            break
    return choice


__all__ = ["Outcome", "Scorer", "SearchSettings", "best", "search", "top"]
