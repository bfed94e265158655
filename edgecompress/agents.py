"""Agents that propose policies: Stable-Baselines3 learners behind one small seam, AMC's as published, and a random one.

We drive SB3 one episode at a time. The replay stores the *executed* actions (after projection), every step carries the
episode's final reward and ends its bootstrap (the critic regresses the return), and rewards are standardised over the
buffer when sampled: what repaired the published agent in our experiments (docs/method.md).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgecompress.baselines import STATIC
from edgecompress.envs import PolicyEnv
from edgecompress.errors import UnknownNameError
from edgecompress.spaces import Choice, SearchSpace
from edgecompress.threads import torch_threads

Floats = NDArray[np.float32]
OFF_POLICY = ("ddpg", "td3", "sac")
SB3_AGENTS = (*OFF_POLICY, "ppo")
SIGMA, DECAY = 0.5, 0.95
AGENTS = (*SB3_AGENTS, "amc", "evolution", "cma-es", "gp", "netadapt", "random", *STATIC)


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

    def wish(self, space: SearchSpace) -> Choice:
        """A random policy."""
        return space.project(np.clip(self._random.normal(0.6, 0.2, len(space.levels)), 0, 1))

    def propose(self, env: PolicyEnv) -> tuple[Choice, float]:
        choice = self.wish(env.space)
        return choice, env.score(choice)

    def remember(self, env: PolicyEnv, choice: Choice, reward: float) -> None:
        """Nothing to learn."""


class UniformAgent:
    """Uniformly random wishes played through the environment: AMC's warm-up."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def propose(self, env: PolicyEnv) -> tuple[Choice, float]:
        env.reset()
        done, reward = False, 0.0
        info: dict[str, Any] = {}
        while not done:
            _, reward, done, _, info = env.step(self._random.uniform(-1, 1, env.width).astype(np.float32))
        return info["choice"], reward

    def remember(self, env: PolicyEnv, choice: Choice, reward: float) -> None:
        """Nothing to learn."""


class OffPolicyAgent:
    """DDPG, TD3 or SAC of Stable-Baselines3 with two hidden layers, Adam 1e-4 / 1e-3, batch 64, no discount.

    Args:
        hidden: units of each hidden layer.
        warmup: episodes of near-uniform random wishes before the actor is asked.
        floor: truncated normal exploration noise is ``max(0.5 * 0.95**n, floor)`` in wish units; without the floor half of
            all episodes repeat a policy.
        bootstrap: learn as AMC published it: rewards less a moving average, the target critic's value added at every
            step but the last. Otherwise every step's target is the episode's reward, standardised over the buffer.
        episodes: how many the replay holds.
    """

    def __init__(
        self,
        name: str,
        env: PolicyEnv,
        seed: int,
        *,
        warmup: int = 5,
        floor: float = 0.08,
        bootstrap: bool = False,
        episodes: int = 100,
        hidden: int = 128,
    ) -> None:
        import stable_baselines3

        classes = {"ddpg": stable_baselines3.DDPG, "td3": stable_baselines3.TD3, "sac": stable_baselines3.SAC}
        self._random = np.random.default_rng(seed)
        self._warmup: Agent = RandomAgent(seed + 1)
        self._left = warmup
        self._floor = floor
        self._bootstrap = bootstrap
        self._episodes = 0
        steps = len(env.space.steps)
        self.model: Any = classes[name](
            "MlpPolicy",
            env,
            learning_rate=1e-3,
            batch_size=64,
            gamma=1.0,
            **({"tau": 0.01} if bootstrap else {}),
            seed=seed,
            policy_kwargs={"net_arch": [hidden, hidden]},
            replay_buffer_class=_episode_buffer(),
            replay_buffer_kwargs={"seed": seed, "moving": bootstrap},
            buffer_size=episodes * steps,
            device="cpu",
        )
        self.model.set_logger(_silent())
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
        deviation = 2 * max(SIGMA * DECAY**self._episodes, self._floor)
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
        self.store(env, choice, reward)
        if self.model.replay_buffer.size() >= 2 * len(env.space.steps) and not (self._bootstrap and self._left):
            self.learn(len(env.space.steps))

    def store(self, env: PolicyEnv, choice: Choice, reward: float) -> None:
        """Put one policy into the replay without learning from it."""
        seen = env.observations(choice)
        last = len(env.space.steps) - 1
        for step, action in enumerate(env.executed(choice)):
            done = np.array([step == last or not self._bootstrap])
            self.model.replay_buffer.add(
                seen[step][None], seen[step + 1][None], action[None], np.array([reward]), done, [{}]
            )

    def learn(self, gradient_steps: int) -> None:
        """Steps of the critic and the actor on what the replay holds."""
        with torch_threads(1):
            self.model.train(gradient_steps=gradient_steps, batch_size=64)


class OnPolicyAgent:
    """PPO of Stable-Baselines3 with hidden layers 64-64: learns from its own last eight episodes, and from nothing else."""

    EPISODES = 8

    def __init__(self, env: PolicyEnv, seed: int) -> None:
        from stable_baselines3 import PPO

        steps = len(env.space.steps)
        self.model: Any = PPO(
            "MlpPolicy", env, n_steps=self.EPISODES * steps, batch_size=2 * steps, learning_rate=1e-3, gamma=1.0,
            gae_lambda=1.0, seed=seed, policy_kwargs={"log_std_init": -0.7}, device="cpu",
        )  # fmt: skip
        self.model.set_logger(_silent())
        self.model.rollout_buffer.reset()

    def propose(self, env: PolicyEnv) -> tuple[Choice, float]:
        import torch

        observation, _ = env.reset()
        done, start, reward = False, True, 0.0
        info: dict[str, Any] = {}
        buffer = self.model.rollout_buffer
        with torch_threads(1):
            while not done:
                with torch.no_grad():
                    actions, values, log_probs = self.model.policy(torch.as_tensor(observation[None]))
                action = actions.numpy()[0]
                following, reward, done, _, info = env.step(np.clip(action, -1, 1).astype(np.float32))
                buffer.add(observation[None], action[None], np.array([reward]), np.array([start]), values, log_probs)
                observation, start = following, False
            if buffer.full:
                buffer.compute_returns_and_advantage(torch.zeros(1), np.array([True]))
                self.model.train()
                buffer.reset()
        return info["choice"], reward

    def remember(self, env: PolicyEnv, choice: Choice, reward: float) -> None:
        """On-policy learning has no use for what others proposed."""


def _silent() -> Any:
    from stable_baselines3.common.logger import Logger

    return Logger(folder=None, output_formats=[])


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
        """SB3's replay with its own random stream and rewards standardised over what it holds, or AMC's way.

        AMC subtracts from each batch a moving average of batch means (factor 0.5).
        """

        def __init__(self, *args: Any, seed: int, moving: bool = False, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._random = np.random.default_rng(seed)
            self._moving = moving
            self._average: float | None = None

        def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
            return self._get_samples(self._random.integers(0, self.size(), batch_size), env=env)

        def _get_samples(self, batch_inds: Any, env: Any = None) -> ReplayBufferSamples:
            samples = super()._get_samples(batch_inds, env)
            if self._moving:
                mean = float(samples.rewards.mean())
                self._average = mean if self._average is None else self._average + 0.5 * (mean - self._average)
                return samples._replace(rewards=samples.rewards - self._average)
            held = self.rewards[: self.size()]
            rewards = (samples.rewards - float(held.mean())) / max(float(held.std()), 1e-6)
            return samples._replace(rewards=rewards)

    return EpisodeBuffer


def make_agent(name: str, env: PolicyEnv, seed: int) -> Agent:
    """An agent by name; the arms that are no agents get the random one.

    Raises:
        UnknownNameError: no such agent.
    """
    if name in OFF_POLICY:
        return OffPolicyAgent(name, env, seed)
    if name == "ppo":
        return OnPolicyAgent(env, seed)
    if name == "amc":
        return published_agent(env, seed)
    if name not in AGENTS:
        raise UnknownNameError("agent", name, AGENTS)
    return RandomAgent(seed)


def published_agent(env: PolicyEnv, seed: int) -> OffPolicyAgent:
    """AMC's agent (He et al. 2018 and its code): hidden layers 300-300, 50 random episodes, then noise 0.5 * 0.95**n without
    a floor."""
    agent = OffPolicyAgent("ddpg", env, seed, warmup=50, floor=0.0, bootstrap=True, hidden=300)
    agent._warmup = UniformAgent(seed + 1)
    return agent
