"""What a search begins with: the sensitivity of every action, and the policies that follow from it without an agent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from edgecompress.baselines import Tables
from edgecompress.scoring import Scorer, SearchSettings, best
from edgecompress.spaces import Choice, SearchSpace
from edgecompress.spec import Trial


def inner_only(space: SearchSpace) -> Choice | None:
    """Widths that several layers share stay whole, all others give up the same share; None where that misses a budget."""
    if not space.inner or len(space.inner) == len(space.levels):
        return None
    levels = tuple(levels if i in space.inner else levels[-1:] for i, levels in enumerate(space.levels))
    narrow = replace(space, levels=levels)
    if not narrow.fits(narrow.smallest):
        return None
    return narrow.project(np.full(len(levels), 0.7))


def _separate_actions(space: SearchSpace) -> list[int]:
    """One action of each tied set that has a choice, those that relieve a budget first."""
    firsts = [i for i in range(len(space.levels)) if all(i == group[0] for group in space.tied if i in group)]
    idle = space.only_if_asked - space.bound
    chosen = [action for action in firsts if len(space.levels[action]) > 1 and action not in idle]
    return sorted(chosen, key=lambda action: action not in space.bound)


Deltas = dict[int, tuple[tuple[int, ...], np.ndarray, np.ndarray]]


def sensitivities_of(space: SearchSpace, scorer: Scorer, settings: SearchSettings) -> Deltas:
    """Lower one action at a time from the largest policy: ``{action: (levels, loss rise, accuracy drop)}``.

    At most a third of the episodes go here: a step between measured levels is interpolated and never falls, and where
    there are more actions than that, every second or third is measured and its neighbours are taken to be like it.
    """
    actions = _separate_actions(space)
    share = max(settings.episodes // 3, 1)
    per_action = max(1, share // max(len(actions), 1))
    measured = actions if len(actions) <= share else _thinned(space, actions, share)
    full = scorer(space.largest, "original")
    deltas: Deltas = {}
    for action in measured:
        levels = space.levels[action]
        asked = _spread(len(levels), per_action)
        trials = [scorer(space.with_value(space.largest, action, levels[i]), "sensitivity") for i in asked]
        at = [levels[i] for i in asked] + [levels[-1]]
        rise = np.maximum.accumulate(([_loss(t) - _loss(full) for t in trials] + [0.0])[::-1])[::-1]
        drop = np.maximum.accumulate(([full.believed - t.believed for t in trials] + [0.0])[::-1])[::-1]
        deltas[action] = (levels, _extended(levels, at, rise), _extended(levels, at, drop))
    for action in sorted(set(actions) - set(measured)):
        nearest = min(measured, key=lambda other: (_kind(space, other) != _kind(space, action), abs(other - action)))
        deltas[action] = _like(space.levels[action], deltas[nearest])
    return {action: deltas[action] for action in actions}


def _loss(trial: Trial) -> float:
    return trial.loss if trial.estimate is None else -trial.estimate


def deltas_of(space: SearchSpace, tables: Tables, scorer: Scorer) -> Deltas:
    """Sensitivities that are known without an evaluation, as `sensitivities_of` gives them.

    What a unit of them costs in accuracy is taken from the best policy that keeps the budgets by now: its loss of accuracy
    against the largest policy, over the sum of its sensitivities.
    """
    full = scorer(space.largest, "original")
    actions = _separate_actions(space)
    deltas: Deltas = {}
    fitting = best(scorer.fitting())
    choice = space.smallest if fitting is None else fitting.choice
    total = sum(tables[action][choice[action]] for action in actions if action in tables)
    unit = 0.0 if fitting is None or total <= 0 else max(full.believed - fitting.believed, 0.0) / total
    for action in actions:
        levels = space.levels[action]
        rise = np.array([tables.get(action, {}).get(level, 0.0) for level in levels])
        rise = np.maximum.accumulate(rise[::-1])[::-1]
        deltas[action] = (levels, rise, unit * rise)
    return deltas


def _thinned(space: SearchSpace, actions: list[int], count: int) -> list[int]:
    """``count`` actions, those that relieve a budget before the others, evenly spread over the network."""
    bound = [action for action in actions if action in space.bound]
    if len(bound) >= count:
        bound.sort()
        return [bound[round(place)] for place in np.linspace(0, len(bound) - 1, count)]
    return actions[:count]


def _kind(space: SearchSpace, action: int) -> tuple[int, bool]:
    """Its place within a step, and whether it relieves a budget: what another action must share to be like it."""
    place = next((step.index(action) for step in space.steps if action in step), 0)
    return place, action in space.bound


def _like(
    levels: tuple[int, ...], other: tuple[tuple[int, ...], np.ndarray, np.ndarray]
) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """Another action's curves at the same shares of the way from its smallest to its largest level."""
    at, rise, drop = np.array(other[0], float), other[1], other[2]
    shares = (np.array(levels, float) - levels[0]) / max(levels[-1] - levels[0], 1)
    theirs = (at - at[0]) / max(at[-1] - at[0], 1)
    return levels, np.interp(shares, theirs, rise), np.interp(shares, theirs, drop)


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


def solutions(
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


def excess_of(space: SearchSpace, choice: Choice) -> float:
    """How far ``choice`` is over all budgets together; 0 when it fits."""
    cost = space.price(choice)
    return sum(max(cost.metric(limit.budget.metric) / limit.value - 1, 0.0) for limit in space.limits)


def _greedy(space: SearchSpace, deltas: dict[int, dict[int, float]], choice: Choice) -> Choice:
    """Lower, one level at a time, whatever costs least accuracy for the budget it relieves, until all budgets hold."""
    excess = excess_of(space, choice)
    while excess > 0:
        options: list[tuple[float, Choice, float]] = []
        for action, table in deltas.items():
            for by in (-1, -2, -4):  # a single level may relieve nothing where prices are padded
                lowered = space.raised(choice, action, by)
                relieved = excess - excess_of(space, lowered)
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
