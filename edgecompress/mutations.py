"""A small random change of one of the best policies: the whole of evolution, and a share of what every agent asks for."""

from __future__ import annotations

import numpy as np

from edgecompress.scoring import Scorer, top
from edgecompress.spaces import Choice, SearchSpace

PARENTS = 5


def mutated(space: SearchSpace, scorer: Scorer, random: np.random.Generator) -> Choice:
    """One of the five best with about a third of its wishes moved by ``N(0, 0.15)``; a new policy if one turns up."""
    parents = top(scorer.fitting(space), PARENTS) or list(scorer.trials.values())[:1]
    choice = parents[0].choice
    for _ in range(10):
        choice = changed(space, parents[int(random.integers(len(parents)))].choice, random)
        if choice not in scorer.trials:
            break
    return choice


def exchanged(space: SearchSpace, choice: Choice, random: np.random.Generator, count: int) -> list[Choice]:
    """At most ``count`` neighbours of ``choice``: one bound action a level up, another as far down as the budgets then ask
    for, and what that leaves spent. Which pairs, where there are more, is drawn."""
    bound = sorted(space.bound)
    pairs = [(up, down) for up in bound for down in bound if up != down]
    found: dict[Choice, None] = {}
    for place in random.permutation(len(pairs))[:count]:
        up, down = pairs[int(place)]
        candidate = space.raised(choice, up)
        while candidate != choice and not space.fits(candidate):
            lowered = space.raised(candidate, down, -1)
            if lowered == candidate:
                break
            candidate = lowered
        if candidate != choice and space.fits(candidate):
            found.setdefault(space.fill(candidate, np.array([levels[-1] for levels in space.levels], float)))
    found.pop(choice, None)
    return list(found)


def changed(space: SearchSpace, parent: Choice, random: np.random.Generator) -> Choice:
    """``parent`` with about a third of its wishes moved by ``N(0, 0.15)``, projected."""
    wishes = space.wishes(parent)
    moved = random.random(len(wishes)) < 0.3
    return space.project(np.clip(wishes + moved * random.normal(0, 0.15, len(wishes)), 0, 1))
