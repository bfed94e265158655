"""The two searches as Gymnasium environments: one step per channel group (stage 1) or per layer (stage 2).

The environment only does bookkeeping; what may be chosen is a `SearchSpace`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from edgecompress.spaces import Choice, SearchSpace


class PolicyEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One episode writes one policy; the last step projects the whole vector, evaluates it and pays the reward.

    Args:
        space: what may be chosen.
        score: choice -> reward (a search counts, caches and journals behind it).

    Observation: `observed`. Action: wishes in [-1, 1]. The last step's ``info`` holds ``choice`` and ``executed``: the
    projected actions of all steps, which belong in the replay.
    ``wall``: keep the budget as AMC does, one action after the other, instead of projecting the whole vector.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's own signature)

    def __init__(self, space: SearchSpace, score: Callable[[Choice], float], *, wall: bool = False) -> None:
        self.space = space
        self.score = score
        self.wall = wall
        self.width = len(space.steps[0])
        size = observed(space, np.zeros((1, 0, self.width), np.float32)).shape[1]
        self.observation_space = spaces.Box(0.0, 1.0, (size,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (self.width,), np.float32)
        self._wishes: list[NDArray[np.float32]] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._wishes = []
        return self._observe(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        wished = (np.clip(action, -1, 1) + 1) / 2
        self._wishes.append(wished.astype(np.float32))
        if len(self._wishes) < len(self.space.steps):
            return self._observe(), 0.0, False, False, {}
        wishes = np.zeros(len(self.space.levels))
        for step, wish in zip(self.space.steps, self._wishes, strict=True):
            wishes[list(step)] = wish
        choice = self.space.walled(wishes) if self.wall else self.space.project(wishes)
        reward = self.score(choice)
        return self._observe(), reward, True, False, {"choice": choice, "executed": self.executed(choice)}

    def executed(self, choice: Choice) -> NDArray[np.float32]:
        """The actions ``[steps, width]`` in [-1, 1] that stand for ``choice``."""
        wishes = self.space.wishes(choice)
        return np.array([[2 * wishes[i] - 1 for i in step] for step in self.space.steps], np.float32)

    def observations(self, choice: Choice) -> NDArray[np.float32]:
        """What the agent would have seen on its way to ``choice``, ``[steps + 1, size]``."""
        wishes = ((self.executed(choice)[None] + 1) / 2).astype(np.float32)
        return np.concatenate([observed(self.space, wishes[:, :step]) for step in range(wishes.shape[1] + 1)])

    def _observe(self) -> NDArray[np.float32]:
        wishes = np.reshape(np.array(self._wishes, np.float32), (1, len(self._wishes), self.width))
        seen: NDArray[np.float32] = observed(self.space, wishes)[0]
        return seen


def observed(space: SearchSpace, wishes: NDArray[np.float32]) -> NDArray[np.float32]:
    """What an agent sees after the wishes ``[episodes, steps done, width]`` in [0, 1]: ``[episodes, size]`` in [0, 1].

    AMC's state (He et al. 2018, section 3.1): features of the step at hand, what the wishes so far give up of the budget and
    what the steps after this one could (`SearchSpace.relief`), and the previous wish; beside it the mean wish, and how
    tight each metric's budget is, so that one agent can serve several budgets.
    """
    count, done, width = wishes.shape
    step = min(done, len(space.steps) - 1)
    previous = wishes[:, -1] if done else np.ones((count, width), np.float32)
    mean = wishes.mean((1, 2)) if done else np.ones(count, np.float32)
    relief = space.relief
    reduced = ((1 - wishes) * relief[:done]).sum((1, 2))
    rest = np.full(count, relief[step + 1 :].sum())
    alike = np.tile(np.concatenate([space.features[step], space.tightness]), (count, 1))
    return np.column_stack([alike, previous, mean, reduced, rest]).astype(np.float32).clip(0, 1)


__all__ = ["PolicyEnv", "observed"]
