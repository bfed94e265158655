"""Agents that propose policies: Stable-Baselines3 learners behind one small seam, and a random one.

We drive SB3 one episode at a time. The replay stores the *executed* actions (after projection), every step carries the
episode's final reward and ends its bootstrap (the critic regresses the return), and rewards are standardised over the
buffer when sampled: what repaired the published agent in our experiments (docs/method.md).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgecompress.baselines import STATIC
from edgecompress.envs import Choice, PolicyEnv
from edgecompress.errors import UnknownNameError
from edgecompress.threads import torch_threads

Floats = NDArray[np.float32]
SB3_AGENTS = ("ddpg", "td3", "sac")
AGENTS = (*SB3_AGENTS, "random", "evolution", *STATIC)


class Agent(Protocol):
    """Writes policies and learns from what they earned."""

    def propose(self, env: PolicyEnv) -> tuple[Choice, float]:
        """Play one episode and learn from it; returns the projected choice and its reward."""
        ...

    def remember(self, env: PolicyEnv, choice: Choice, reward: float) -> None:
        """Learn from a policy that somebody else proposed."""
        ...


class RandomAgent:
    """Near-uniform random wishes: ``N(0.6, 0.2)`` around one random level, which projection then scales."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def propose(self, env: PolicyEnv) -> tuple[Choice, float]:
        wishes = np.clip(self._random.normal(0.6, 0.2, len(env.space.levels)), 0, 1)
        choice = env.space.project(wishes)
        return choice, env.score(choice)

    def remember(self, env: PolicyEnv, choice: Choice, reward: float) -> None:
        """Nothing to learn."""


class OffPolicyAgent:
    """DDPG, TD3 or SAC of Stable-Baselines3 with hidden layers 128-128, Adam 1e-4 / 1e-3, batch 64, no discount.

    Args:
        warmup: episodes of near-uniform random wishes before the actor is asked.
        sigma, decay, floor: truncated normal exploration noise ``max(sigma * decay**n, floor)`` in wish units; without
            the floor half of all episodes repeat a policy.
    """

    def __init__(
        self,
        name: str,
        env: PolicyEnv,
        seed: int,
        *,
        warmup: int = 5,
        sigma: float = 0.5,
        decay: float = 0.95,
        floor: float = 0.08,
    ) -> None:
        import stable_baselines3
        from stable_baselines3.common.logger import Logger

        classes = {"ddpg": stable_baselines3.DDPG, "td3": stable_baselines3.TD3, "sac": stable_baselines3.SAC}
        self._random = np.random.default_rng(seed)
        self._warmup = RandomAgent(seed + 1)
        self._left = warmup
        self._noise = (sigma, decay, floor)
        self._episodes = 0
        steps = len(env.space.steps)
        self.model: Any = classes[name](
            "MlpPolicy",
            env,
            learning_rate=1e-3,
            batch_size=64,
            gamma=1.0,
            seed=seed,
            policy_kwargs={"net_arch": [128, 128]},
            replay_buffer_class=_episode_buffer(),
            replay_buffer_kwargs={"seed": seed},
            buffer_size=100 * steps,
            device="cpu",
        )
        self.model.set_logger(Logger(folder=None, output_formats=[]))
        if name == "ddpg" or name == "td3":
            for group in self.model.actor.optimizer.param_groups:
                group["lr"] = 1e-4
            self.model._update_learning_rate = lambda optimizers: None  # keep the actor slower than the critic

    def propose(self, env: PolicyEnv) -> tuple[Choice, float]:
        if self._left > 0:
            self._left -= 1
            choice, reward = self._warmup.propose(env)
            self.remember(env, choice, reward)
            return choice, reward
        sigma, decay, floor = self._noise
        deviation = 2 * max(sigma * decay**self._episodes, floor)
        self._episodes += 1
        observation, _ = env.reset()
        done, reward = False, 0.0
        info: dict[str, Any] = {}
        while not done:
            with torch_threads(1):  # 17 times faster than on two for networks this small when cores are shared
                action, _ = self.model.predict(observation, deterministic=True)
            observation, reward, done, _, info = env.step(_truncated_normal(self._random, action, deviation))
        self.remember(env, info["choice"], reward)
        return info["choice"], reward

    def remember(self, env: PolicyEnv, choice: Choice, reward: float) -> None:
        seen = env.observations(choice)
        for step, action in enumerate(env.executed(choice)):
            self.model.replay_buffer.add(
                seen[step][None], seen[step + 1][None], action[None], np.array([reward]), np.array([True]), [{}]
            )
        if self.model.replay_buffer.size() >= 2 * len(env.space.steps):
            with torch_threads(1):
                self.model.train(gradient_steps=len(env.space.steps), batch_size=64)


def _truncated_normal(random: np.random.Generator, mean: Floats, deviation: float) -> Floats:
    """Normal noise redrawn until it lies in [-1, 1] (AMC's), at most 20 times, then clipped."""
    result = random.normal(mean, deviation)
    for _ in range(20):
        outside = np.abs(result) > 1
        if not outside.any():
            break
        result = np.where(outside, random.normal(mean, deviation), result)
    return np.clip(result, -1, 1).astype(np.float32)


def _episode_buffer() -> type[Any]:
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    class EpisodeBuffer(ReplayBuffer):
        """SB3's replay with its own random stream and rewards standardised over what it holds."""

        def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._random = np.random.default_rng(seed)

        def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
            return self._get_samples(self._random.integers(0, self.size(), batch_size), env=env)

        def _get_samples(self, batch_inds: Any, env: Any = None) -> ReplayBufferSamples:
            samples = super()._get_samples(batch_inds, env)
            held = self.rewards[: self.size()]
            rewards = (samples.rewards - float(held.mean())) / max(float(held.std()), 1e-6)
            return samples._replace(rewards=rewards)

    return EpisodeBuffer


def make_agent(name: str, env: PolicyEnv, seed: int) -> Agent:
    """An agent by name; ``evolution`` and the static ones need none of their own and get the random one.

    Raises:
        UnknownNameError: no such agent.
    """
    if name in SB3_AGENTS:
        return OffPolicyAgent(name, env, seed)
    if name not in AGENTS:
        raise UnknownNameError("agent", name, AGENTS)
    return RandomAgent(seed)
