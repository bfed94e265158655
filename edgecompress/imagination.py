"""The agent learns in a model of the accuracy: it plays many cheap episodes for each policy that is really evaluated.

Dyna (Sutton 1990) in the form of MBPO (Janner et al. 2019): the model, here a Gaussian process over all trials, answers
for the one thing that is expensive, and the cost of a policy is exact. What the actor writes, a share of mutations of the
best, what these become in a short evolution inside the model, and exchanges between two actions of the best of them stand for
election; the one of highest expected improvement is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgecompress.accuracy_model import AccuracyModel, expected_improvement
from edgecompress.agents import OffPolicyAgent, RandomAgent
from edgecompress.envs import PolicyEnv, observed
from edgecompress.mutations import PARENTS, changed, exchanged
from edgecompress.scoring import Scorer, SearchSettings, top
from edgecompress.spaces import Choice, SearchSpace
from edgecompress.spec import Cost, Trial
from edgecompress.threads import torch_threads

Floats = NDArray[np.float64]
GENERATION = 8  # episodes played side by side
NOISE = (0.02, 0.3)  # standard deviation of an episode's exploration, in wishes, drawn log-uniformly
BATCH = 2  # policies evaluated between two rounds of imagination
REFINEMENTS = 3  # generations of that evolution: each mutates the best `PARENTS` candidates `CHILDREN` times
CHILDREN = 4
CLIMBS = 6  # steps by exchange from the best candidate
NEIGHBOURS = 600  # looked at in each, over the number of actions: to fill one up is dearer the more there are
MEMORY = 400  # episodes that the replay holds
_IDLE = 10  # elections in a row of nothing new: six rounds of a few dozen policies each


class Imagination:
    """The agent, the imagined episodes in its replay, and the model that labels them.

    Args:
        spaces: the same actions under different limits or at the prices of different devices. The agent sees how tight the
            limits are and what each action saves on the device; one model of the accuracy serves all.
        optimism: standard deviations that an imagined episode's reward lies above its mean.
    """

    def __init__(
        self,
        spaces: Sequence[SearchSpace],
        scorer: Scorer,
        settings: SearchSettings,
        optimism: float = 0.5,
    ) -> None:
        self.spaces, self.scorer, self.settings = spaces, scorer, settings
        self._optimism = optimism
        self._random = np.random.default_rng(settings.seed)
        self._model = AccuracyModel(spaces[0])
        self._envs = [PolicyEnv(space, lambda choice: 0.0) for space in spaces]
        self._agent = OffPolicyAgent(settings.agent, self._envs[0], settings.seed, episodes=MEMORY)
        self._held: list[tuple[int, Choice]] = []  # what each place of the replay holds: space and policy
        self._costs: dict[tuple[int, Choice], Cost] = {}
        self._written = self._rounds = 0
        self._scales: dict[int, tuple[float, float]] = {}
        guess = RandomAgent(settings.seed + 1)
        for which, space in enumerate(spaces):
            for _ in range(2 * GENERATION):
                self._hold(which, guess.wish(space))

    def propose(self, which: int) -> list[tuple[Choice, str]]:
        """The policies to evaluate next under the limits of ``spaces[which]``, and the arm that wrote each."""
        space, scorer = self.spaces[which], self.scorer
        trials = scorer.fitting(space)
        self._model.fit([t.choice for t in scorer.trials.values()], [t.believed for t in scorer.trials.values()])
        for trial in trials[-BATCH:] if self._written > MEMORY else trials[-MEMORY // 2 :]:
            self._hold(which, trial.choice)
        self._label()
        written: dict[Choice, str] = {}
        for _ in range(max(1, self.settings.imagined // GENERATION)):
            played = self._played(which)
            for choice in played:
                self._hold(which, choice)
                written.setdefault(choice, self.settings.agent)
            self._label(len(played))
            self._agent.learn(len(space.steps))
        parents = [trial.choice for trial in top(trials, PARENTS)] + self._of_others(which)
        mutations = round(len(written) * self.settings.mutate / max(1 - self.settings.mutate, 1e-9)) if parents else 0
        for _ in range(mutations):
            choice = changed(space, parents[int(self._random.integers(len(parents)))], self._random)
            written.setdefault(choice, "mutation")
        self._refine(written, which, trials)
        return self._elected(written, trials, which)

    def _refine(self, written: dict[Choice, str], which: int, trials: Sequence[Trial]) -> None:
        """Add mutations of the candidates of highest expected improvement, generation by generation; then climb from the best
        of them by exchanges between two actions, which a random change of many seldom hits."""
        space = self.spaces[which]
        for _ in range(REFINEMENTS):
            fresh = [choice for choice in written if choice not in self.scorer.trials]
            for place in np.argsort(-self._gains(fresh, trials, which), kind="stable")[:PARENTS] if fresh else ():
                for _ in range(CHILDREN):
                    written.setdefault(changed(space, fresh[int(place)], self._random), "mutation")
        fresh = [choice for choice in written if choice not in self.scorer.trials]
        gains = self._gains(fresh, trials, which) if fresh else np.zeros(0)
        count = max(NEIGHBOURS // max(len(space.bound), 1), 8)
        for _ in range(CLIMBS if fresh else 0):
            near = exchanged(space, fresh[int(np.argmax(gains))], self._random, count)
            near = [choice for choice in near if choice not in written and choice not in self.scorer.trials]
            if not near:
                return
            written |= dict.fromkeys(near, "exchange")
            best, gains, fresh = float(gains.max()), self._gains(near, trials, which), near
            if float(gains.max()) <= best:
                return

    def _gains(self, choices: Sequence[Choice], trials: Sequence[Trial], which: int) -> Floats:
        """Expected improvement on the highest mean that the model gives to an evaluated policy."""
        mean, deviation = self._rewards(choices, which)
        best = max(self._rewards([trial.choice for trial in trials], which)[0], default=float(mean.min()))
        return expected_improvement(mean, deviation, float(best))

    def _of_others(self, which: int) -> list[Choice]:
        """The best policy under each other budget, brought under this one."""
        space = self.spaces[which]
        leaders = [top(self.scorer.fitting(other), 1) for at, other in enumerate(self.spaces) if at != which]
        return [space.project(space.wishes(found[0].choice)) for found in leaders if found]

    def _elected(self, written: dict[Choice, str], trials: Sequence[Trial], which: int) -> list[tuple[Choice, str]]:
        """The `BATCH` of highest expected improvement, in every second round one of them the actor's own; after each, the
        model believes its own mean of it (Ginsbourger et al. 2010), so that the next one is not its neighbour."""
        self._rounds += 1
        asked = list(self.scorer.trials.values())
        choices, scores = [t.choice for t in asked], [t.believed for t in asked]
        fresh = [choice for choice in written if choice not in self.scorer.trials] or list(written)
        elected: list[tuple[Choice, str]] = []
        while fresh and len(elected) < min(BATCH, max(self.scorer.left, 1)):
            own = (
                self._rounds % 2 == 0
                and len(elected) == BATCH - 1
                and all(arm != self.settings.agent for _, arm in elected)
            )
            able = [choice for choice in fresh if not own or written[choice] == self.settings.agent] or fresh
            chosen = able[int(np.argmax(self._gains(able, trials, which)))]
            fresh.remove(chosen)
            elected.append((chosen, written[chosen]))
            choices, scores = [*choices, chosen], [*scores, float(self._model.predict([chosen])[0][0])]
            self._model.fit(choices, scores)
        return elected

    def _played(self, which: int) -> list[Choice]:
        """Policies that the actor writes in one generation, each with its own amount of noise on every action."""
        space = self.spaces[which]
        wishes = np.zeros((GENERATION, 0, self._envs[which].width), np.float32)
        noise = np.exp(self._random.uniform(math.log(NOISE[0]), math.log(NOISE[1]), (GENERATION, 1)))
        while wishes.shape[1] < len(space.steps):
            with torch_threads(1):
                action, _ = self._agent.model.predict(observed(space, wishes), deterministic=True)
            wish = (action + 1) / 2 + noise * self._random.standard_normal(action.shape)
            wishes = np.concatenate([wishes, wish.clip(0, 1).astype(np.float32)[:, None]], 1)
        result = []
        for episode in wishes:
            vector = np.zeros(len(space.levels))
            for step, wish in zip(space.steps, episode, strict=True):
                vector[list(step)] = wish
            result.append(space.project(vector))
        return result

    def _hold(self, which: int, choice: Choice) -> None:
        """Put a policy into the replay, over the oldest one when it is full; `_label` gives it its reward."""
        self._agent.store(self._envs[which], choice, 0.0)
        place = self._written % MEMORY
        self._written += 1
        if place == len(self._held):
            self._held.append((which, choice))
        else:
            self._held[place] = (which, choice)

    def _label(self, newest: int = MEMORY) -> None:
        """What the model says today of the policies in the replay, or only of the ``newest`` ones.

        Rewards are standardised within each budget, so that what the agent learns is to be good under all of them.
        """
        count = min(newest, len(self._held))
        places = [(self._written - 1 - i) % MEMORY for i in range(count)]
        owners = np.array([self._held[place][0] for place in places])
        mean, deviation = self._rewards([self._held[place][1] for place in places], owners)
        optimistic = mean + self._optimism * deviation
        steps = len(self.spaces[0].steps)
        for which in np.unique(owners):
            values = optimistic[owners == which]
            if newest == MEMORY:
                self._scales[which] = float(values.mean()), max(float(values.std()), 1e-9)
            centre, width = self._scales[which]
            for place, value in zip(np.array(places)[owners == which], values, strict=True):
                self._agent.model.replay_buffer.rewards[place * steps : (place + 1) * steps, 0] = (
                    value - centre
                ) / width

    def _rewards(self, choices: Sequence[Choice], owners: int | NDArray[np.int_]) -> tuple[Floats, Floats]:
        """Mean and standard deviation of what policies would earn: the model's accuracy at their exact cost in the space, or
        the space of each, that they are for."""
        accuracy, deviation = self._model.predict(choices)
        spaces = [self.spaces[which] for which in np.broadcast_to(owners, len(choices))]
        costs = [self._cost(space, choice) for space, choice in zip(spaces, choices, strict=True)]
        reward = self.scorer.reward
        mean = np.array([reward(*known) for known in zip(accuracy, costs, spaces, strict=True)])
        above = np.array([reward(*known) for known in zip(accuracy + deviation, costs, spaces, strict=True)])
        return mean, np.abs(above - mean)

    def _cost(self, space: SearchSpace, choice: Choice) -> Cost:
        key = id(space.cost), choice
        if key not in self._costs:
            if len(self._costs) > 10 * MEMORY:
                self._costs.clear()
            self._costs[key] = space.price(choice)
        return self._costs[key]


def imagining(spaces: Sequence[SearchSpace], scorer: Scorer, settings: SearchSettings) -> None:
    """Spend what is left, one policy at a time, on the spaces in turn."""
    if len(scorer.trials) < 2:
        scorer(spaces[0].smallest, "uniform")
    imagination = Imagination(spaces, scorer, settings)
    turn = 0
    while scorer.left > 0 and scorer.idle < _IDLE:
        for choice, arm in imagination.propose(turn % len(spaces)):
            scorer(choice, arm)
        turn += 1
