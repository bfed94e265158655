"""Policies that no agent proposes: uniform ones, and integer programming over sensitivities (HAWQ-V3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import numpy as np

from edgecompress.spaces import Choice, SearchSpace

Tables = Mapping[int, Mapping[int, float]]  # action -> level -> what it costs in accuracy, in any unit
STATIC = ("surrogate", "uniform", "greedy", "milp")
UNIFORM = (1.0, 2 / 3, 1 / 3)  # of 2..8 bits: 8, 6 and 4
_ROUNDS = 12
_BLUR = 0.5  # standard deviation of a factor's logarithm


def uniform(space: SearchSpace) -> Iterator[tuple[str, Choice]]:
    """The same share everywhere: 8, 6 and 4 bits; actions that only a budget asks for stay where they are without one."""
    idle = space.only_if_asked - space.bound
    for wish in UNIFORM:
        values = [levels[0] + wish * (levels[-1] - levels[0]) for levels in space.levels]
        choice = tuple(
            levels[-1] if i in idle else min(levels, key=lambda level: abs(level - value))
            for i, (levels, value) in enumerate(zip(space.levels, values, strict=True))
        )
        used = {value for i, value in enumerate(choice) if i not in idle}
        yield f"uniform-{used.pop()}" if len(used) == 1 else f"uniform-{wish:.0%}", choice


def integer_program(space: SearchSpace, tables: Tables) -> Choice | None:
    """The choice of least summed sensitivity whose cost is within every budget; None where the solver finds none.

    One binary variable per step and combination of its levels. A step's cost is what it saves of the largest policy's by
    itself: exact for bops, nearly so for bytes. Where steps share a saving the solution may miss a budget: then the limits
    are tightened by as much and the program is solved again.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    options = [list(product(*(_levels(space, action) for action in step))) for step in space.steps]
    columns = [(step, values) for step, found in enumerate(options) for values in found]
    loss = np.array([
        sum(tables.get(action, {}).get(value, 0.0) for action, value in zip(space.steps[step], values, strict=True))
        for step, values in columns
    ])  # fmt: skip
    rows = [[float(step == at) for at, _ in columns] for step in range(len(options))]
    rows += list(_tied_rows(space, columns))
    equal = [1.0] * len(options) + [0.0] * (len(rows) - len(options))
    one_each = LinearConstraint(csr_array(np.array(rows)), equal, equal)
    metrics = [limit.budget.metric for limit in space.limits]
    full = np.array([space.price(space.largest).metric(metric) for metric in metrics])
    saved = _savings(space, columns)
    targets = np.array([limit.value for limit in space.limits])
    for _ in range(_ROUNDS):
        within = [LinearConstraint(saved.T / full[:, None], (full - targets) / full, np.inf)] if metrics else []
        found = milp(loss, integrality=np.ones(len(loss)), bounds=Bounds(0, 1), constraints=[one_each, *within])
        if found.x is None:
            return None
        choice = _choice(space, columns, found.x)
        if space.fits(choice):
            return space.fill(choice, np.array([levels[-1] for levels in space.levels], float))
        price = space.price(choice)
        over = np.array([price.metric(limit.budget.metric) - limit.value for limit in space.limits])
        targets = targets - np.maximum(over, 0) * 1.01
    return None


def programs(space: SearchSpace, tables: Tables, seed: int) -> Iterator[Choice]:
    """Solutions of `integer_program`: over ``tables`` themselves, then over ones in which every action's losses are
    multiplied by a factor drawn log-normally. They lie around the first, further apart where it matters little.

    Without end, the same ones again and again; only where the solver finds none does it stop.
    """
    random = np.random.default_rng(seed)
    blur = 0.0
    while True:
        factors = {action: float(np.exp(blur * random.normal())) for action in tables}
        blurred = {a: {level: loss * factors[a] for level, loss in table.items()} for a, table in tables.items()}
        choice = integer_program(space, blurred)
        if choice is None:
            return
        yield choice
        blur = _BLUR


def _levels(space: SearchSpace, action: int) -> tuple[int, ...]:
    """What an action may be set to: all, or only the largest where it relieves nothing."""
    return space.levels[action][-1:] if action in space.only_if_asked - space.bound else space.levels[action]


def _tied_rows(space: SearchSpace, columns: list[tuple[int, tuple[int, ...]]]) -> Iterator[list[float]]:
    """Actions of one tensor take one value: for every level, as many of the one action's columns as of the other's."""
    for group in space.tied:
        for other in group[1:]:
            for level in _levels(space, group[0])[1:]:
                yield [
                    float(_sets(space, column, group[0], level)) - float(_sets(space, column, other, level))
                    for column in columns
                ]


def _sets(space: SearchSpace, column: tuple[int, tuple[int, ...]], action: int, level: int) -> bool:
    step, values = column
    return (action, level) in zip(space.steps[step], values, strict=True)


def _savings(space: SearchSpace, columns: list[tuple[int, tuple[int, ...]]]) -> np.ndarray:
    """``[columns, limits]``: what each column alone saves of the largest policy's cost."""
    metrics = [limit.budget.metric for limit in space.limits]
    full = space.price(space.largest)
    saved = np.zeros((len(columns), len(metrics)))
    for row, (step, values) in enumerate(columns):
        choice = list(space.largest)
        for action, value in zip(space.steps[step], values, strict=True):
            choice[action] = value
        price = space.price(tuple(choice))
        saved[row] = [full.metric(metric) - price.metric(metric) for metric in metrics]
    return saved


def _choice(space: SearchSpace, columns: list[tuple[int, tuple[int, ...]]], chosen: np.ndarray) -> Choice:
    result = list(space.largest)
    for (step, values), on in zip(columns, chosen, strict=True):
        if on > 0.5:
            for action, value in zip(space.steps[step], values, strict=True):
                result[action] = value
    return tuple(result)
