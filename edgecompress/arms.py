"""The arms that spend what the start left of a search's evaluations, by name.

An arm is a function of the space, the scorer (the one budget) and the settings. It asks for policies until the scorer says
that nothing is left, or returns when it has nothing new to ask for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgecompress.agents import make_agent
from edgecompress.black_box import cma_es, gaussian_process
from edgecompress.envs import PolicyEnv
from edgecompress.imagination import imagining
from edgecompress.mutations import mutated
from edgecompress.scoring import Scorer, SearchSettings
from edgecompress.spaces import Choice, SearchSpace

Arm = Callable[[SearchSpace, Scorer, SearchSettings], None]
IDLE = 30  # episodes in a row without a new policy, after which an arm has run dry
IDLE_PUBLISHED = 200  # AMC's actor repeats itself for long
NETADAPT_STEP = 0.06


def evolution(space: SearchSpace, scorer: Scorer, settings: SearchSettings) -> None:
    """Mutations of the five best, nothing else."""
    random = np.random.default_rng(settings.seed)
    while scorer.idle < IDLE:
        scorer(mutated(space, scorer, random), "mutation")


def random_search(space: SearchSpace, scorer: Scorer, settings: SearchSettings) -> None:
    """Near-uniform random wishes, projected."""
    agent = make_agent("random", PolicyEnv(space, lambda choice: 0.0), settings.seed)
    env = PolicyEnv(space, lambda choice: scorer(choice, "random").reward)
    while scorer.idle < IDLE:
        agent.propose(env)


def learning(space: SearchSpace, scorer: Scorer, settings: SearchSettings) -> None:
    """An agent of Stable-Baselines3 that learns from evaluated policies alone, with mutations of the best mixed in."""
    random = np.random.default_rng(settings.seed)
    env = PolicyEnv(space, lambda choice: scorer(choice, settings.agent).reward)
    agent = make_agent(settings.agent, env, settings.seed)
    for trial in scorer.fitting():
        agent.remember(env, trial.choice, trial.reward)
    while scorer.idle < IDLE:
        if random.random() < settings.mutate:
            choice = mutated(space, scorer, random)
            agent.remember(env, choice, scorer(choice, "mutation").reward)
        else:
            agent.propose(env)


def off_policy(space: SearchSpace, scorer: Scorer, settings: SearchSettings) -> None:
    """An off-policy agent, which plays in a model of the accuracy between evaluations unless ``imagined`` is 0."""
    if settings.imagined:
        imagining([space], scorer, settings)
    else:
        learning(space, scorer, settings)


def published_amc(space: SearchSpace, scorer: Scorer, settings: SearchSettings) -> None:
    """AMC as published, from scratch: sequential wall, 50 random episodes, no floor under the noise, and the reward of the
    accuracy itself (He et al. 2018), not of the one that the divergence from the original lets expect."""

    def reward(choice: Choice) -> float:
        trial = scorer(choice, "amc")
        return scorer.reward(trial.accuracy, trial.cost)

    env = PolicyEnv(space, reward, wall=True)
    agent = make_agent("amc", env, settings.seed)
    while scorer.idle < IDLE_PUBLISHED:
        agent.propose(env)


def netadapt(space: SearchSpace, scorer: Scorer, settings: SearchSettings) -> None:
    """Greedy on evaluated policies, in the manner of NetAdapt (Yang et al. 2018).

    In every round each action alone is lowered until it relieves the budget by 6 % of the original's cost; the candidate
    that keeps the highest accuracy is the next round's start. Actions that cannot relieve so much wait until none can; then
    the step is halved. Steps are larger where so many rounds would take more evaluations than there are.
    """
    choice = space.largest
    rounds = max((scorer.left - 2) // max(len(space.bound), 1), 1)
    step = max(NETADAPT_STEP, _relative_excess(space, choice) / rounds)
    while (excess := _relative_excess(space, choice)) > 0:
        candidates = []
        for action in sorted(space.bound):
            lowered = choice
            while lowered[action] > space.levels[action][0] and excess - _relative_excess(space, lowered) < min(
                step, excess
            ):
                lowered = space.raised(lowered, action, -1)
            if excess - _relative_excess(space, lowered) >= min(step, excess) - 1e-12 and lowered not in candidates:
                candidates.append(lowered)
        if candidates:
            trials = [scorer(candidate, "netadapt") for candidate in candidates]
            choice = max(trials, key=lambda trial: (trial.believed, -trial.loss)).choice
        elif step < 1e-4:
            return
        else:
            step /= 2
    scorer(space.fill(choice, np.array([levels[-1] for levels in space.levels], float)), "netadapt")


def _relative_excess(space: SearchSpace, choice: Choice) -> float:
    """How far over all budgets together, in shares of the largest policy's cost."""
    cost, full = space.price(choice), space.price(space.largest)
    metrics = [(limit.budget.metric, limit.value) for limit in space.limits]
    return sum(max(cost.metric(name) - value, 0.0) / max(full.metric(name), 1e-9) for name, value in metrics)


def _cma(space: SearchSpace, scorer: Scorer, settings: SearchSettings) -> None:
    cma_es(space, scorer, settings.seed)


def _gp(space: SearchSpace, scorer: Scorer, settings: SearchSettings) -> None:
    gaussian_process(space, scorer, settings.seed)


ARMS: dict[str, Arm] = {
    "ddpg": off_policy,
    "td3": off_policy,
    "sac": off_policy,
    "ppo": learning,
    "amc": published_amc,
    "evolution": evolution,
    "cma-es": _cma,
    "gp": _gp,
    "netadapt": netadapt,
    "random": random_search,
}
FROM_SCRATCH = frozenset({"amc", "netadapt", "random"})  # no sensitivities before them
__all__ = ["ARMS", "FROM_SCRATCH", "Arm"]
