"""A little of every part of a run, timed: two episodes of each search, one step of each training.

The searches are the real ones, told to stop by the listener that they report to, so that what is timed is what will run.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from edgecompress.agents import make_agent
from edgecompress.bit_stage import bits_of, quantize_stage
from edgecompress.channel_stage import SHORT_EPOCHS, channels_of, prune_stage
from edgecompress.cost import LatencyModel
from edgecompress.envs import PolicyEnv
from edgecompress.exporters.sizes import PlannedSize
from edgecompress.finetune import train
from edgecompress.job import Job, pruner_of, train_settings
from edgecompress.learned_steps import LearnedSteps
from edgecompress.pipeline import saved_graph
from edgecompress.prepare import at_8_bits, calibration_batches
from edgecompress.progress import Progress
from edgecompress.quantize import Simulator, calibrate
from edgecompress.recover import sparse_epochs
from edgecompress.spaces import SearchSpace
from edgecompress.spec import CompressionPolicy, Frozen, LayerChoice, Stage, Trial
from edgecompress.teacher import Teacher
from edgecompress.variational import kl_penalty, with_noise

TIMED_EPISODES = 2
TIMED_STEPS = 2  # the first one warms up
# At most: policies that stage 1 fine-tunes, that a stage measures again, and steps towards an accuracy drop.
FINALISTS, REMEASURED, TIGHTENINGS = 3, 5, 11


class PlannedStage(Frozen):
    """A search. ``episode_s`` is an evaluation, ``agent_s`` the agent's own thinking, ``finalists_s`` the measuring again."""

    stage: Stage
    actions: int
    policies_log10: float
    episodes: int
    episode_s: float
    agent_s: float
    finalists_s: float

    @property
    def seconds(self) -> float:
        """The whole search, if it uses all its episodes."""
        return self.episodes * (self.episode_s + self.agent_s) + self.finalists_s


Part = Literal["original", "prune", "quantize"]


class PlannedTraining(Frozen):
    """A training at its longest; ``step_s`` is one batch, in the mean: the teacher is asked for each once in a run (`Teacher`)."""

    part: Part
    title: str
    epochs: int
    steps: int
    step_s: float

    @property
    def seconds(self) -> float:
        """The whole training."""
        return self.epochs * self.steps * self.step_s


@dataclass(frozen=True)
class Rehearsal:
    """What was timed, and the space that decides first whether a budget can be met."""

    stages: tuple[PlannedStage, ...]
    trainings: tuple[PlannedTraining, ...]
    space: SearchSpace


def rehearse(job: Job, latency: LatencyModel, size: PlannedSize, progress: Progress) -> Rehearsal:
    """Time every part of the run that ``job`` stands for; a budget that is out of reach is left out of it.

    Raises:
        BadModelError: stage 1 is asked for and there is nothing to prune.
    """
    config = job.config
    policy, smaller = CompressionPolicy(model=job.network.model), job.original
    stages: list[PlannedStage] = []
    trainings: list[Training] = []
    spaces: list[SearchSpace] = []
    if "prune" in config.stages:
        progress.stage("Time stage 1", 1)
        cost = job.cost_model(size, latency)
        if job.network.prunable_groups:  # otherwise the stage says so itself
            spaces.append(channels_of(job, cost))
        timed = _within_reach(job, spaces)
        first = _first_episodes(timed, lambda part: prune_stage(part, cost))
        stages.append(_planned(job, "prune", spaces[0], first))
        policy = channels_of(timed, cost).to_policy(first.uniform.choice)
        smaller = pruner_of(job)(policy)
        progress.stage("Time a step of every training", 1)
        single_weights = len(spaces[0].levels) > len(job.network.prunable_groups)
        trainings += _after_pruning(job, smaller, sparse=single_weights or config.two_four)
    if job.integer:
        progress.stage("Time stage 2", 1)
        graph = saved_graph(job, smaller, policy)
        calibration = calibrate(graph, calibration_batches(job.data), ranges=config.ranges)
        simulator = Simulator(graph, calibration, job.target.weight_scales)
        base = len(at_8_bits(simulator, job.target.dialect, job.data).SerializeToString())
        bits = bits_of(job, simulator, policy, latency, base)
        spaces.append(bits)
        first = _first_episodes(
            _within_reach(job, spaces), lambda part: quantize_stage(part, graph, calibration, policy, latency, base)
        )
        stages.append(_planned(job, "quantize", bits, first))
        if config.qat_epochs:
            choices = {layer.name: LayerChoice(weight_bits=8, activation_bits=8) for layer in graph.layers}
            step = timed_step(job, LearnedSteps(simulator.quantized(choices)), job.original)
            trainings.append(Training("quantize", "Quantisation-aware training", config.qat_epochs, step))
    return Rehearsal(tuple(stages), tuple(planned(job, trainings)), spaces[0])


# ---------------------------------------------------------------------------------------------------- the searches


class _EnoughError(Exception):
    """Raised out of a search that has shown how long an episode takes."""


class _Stopwatch:
    """Times the first episodes of a search, then ends it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.trials: list[Trial] = []
        self._last = time.perf_counter()

    @property
    def uniform(self) -> Trial:
        """The first policy of every search."""
        return self.trials[0]

    def stage(self, title: str, total: int) -> None:
        self._last = time.perf_counter()

    def trial(self, stage: Stage, trial: Trial, best: Trial | None) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.trials.append(trial)
        self._last = now
        if len(self.trials) == TIMED_EPISODES:
            raise _EnoughError

    def epoch(self, epoch: int, epochs: int, loss: float) -> None: ...

    def step(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


def _within_reach(job: Job, spaces: Sequence[SearchSpace]) -> Job:
    """``job``, without limits if the last of ``spaces``, that of the stage at hand, cannot keep them."""
    reachable = all(space.fits(space.smallest) for space in spaces[-1:])
    return replace(job, limits=job.limits if reachable else ())


def _first_episodes(job: Job, run: Callable[[Job], object]) -> _Stopwatch:
    """Run a stage until its second episode."""
    watch = _Stopwatch()
    try:
        run(replace(job, progress=watch))
    except _EnoughError:
        return watch
    raise AssertionError("a search ended before its second episode")


def _planned(job: Job, stage: Stage, space: SearchSpace, watch: _Stopwatch) -> PlannedStage:
    episode_s = sum(watch.seconds) / len(watch.seconds)
    larger = len(job.both_val) / len(job.data.search_val)
    return PlannedStage(
        stage=stage, actions=sum(len(levels) > 1 for levels in space.levels),
        policies_log10=sum(math.log10(len(levels)) for levels in space.levels), episodes=job.config.episodes,
        episode_s=episode_s, agent_s=_agent_seconds(job, space), finalists_s=REMEASURED * larger * episode_s,
    )  # fmt: skip


def _agent_seconds(job: Job, space: SearchSpace) -> float:
    """Seconds that the agent itself thinks and learns in one episode; it learns from the third one on."""
    env = PolicyEnv(replace(space, limits=()), lambda choice: 0.0)
    agent = make_agent(job.config.agent, env, job.config.seed)
    for _ in range(2):
        agent.propose(env)
    started = time.perf_counter()
    agent.propose(env)
    return time.perf_counter() - started


# --------------------------------------------------------------------------------------------------- the trainings


@dataclass(frozen=True)
class Step:
    """Seconds of one batch, new to the teacher or not, and how many batches it remembers."""

    new_s: float
    known_s: float
    remembered: int


@dataclass(frozen=True)
class Training:
    """A training of ``epochs``, at least one, which is done ``times`` over."""

    part: Part
    title: str
    epochs: int
    step: Step
    times: int = 1


def planned(job: Job, trainings: Iterable[Training]) -> Iterator[PlannedTraining]:
    """In their order: what the teacher was asked in one it still knows in the next."""
    steps = math.ceil(len(job.data.train) / job.config.batch_size)
    asked = 0
    for training in trainings:
        step, epochs = training.step, training.epochs * training.times
        asked, before = max(asked, training.epochs), asked
        memory = step.remembered / steps
        known = min(training.epochs, before, memory) + (training.times - 1) * min(training.epochs, memory)
        step_s = step.new_s + (step.known_s - step.new_s) * known / epochs
        yield PlannedTraining(part=training.part, title=training.title, epochs=epochs, steps=steps, step_s=step_s)


def _after_pruning(job: Job, smaller: nn.Module, *, sparse: bool) -> Iterator[Training]:
    """Every training of stage 1, at its longest; ``sparse``: single weights may go without any noise being learned."""
    config = job.config
    step = timed_step(job, copy.deepcopy(smaller), job.original)
    yield Training("prune", "Fine-tune the finalists", SHORT_EPOCHS, step, FINALISTS)
    if config.max_accuracy_drop is not None:
        yield Training("prune", "Look for a cheaper policy", SHORT_EPOCHS, step, TIGHTENINGS)
    yield Training("prune", "Fine-tune with distillation", config.finetune_epochs, step)
    if config.noise_epochs:
        noisy, layers = with_noise(smaller)

        def penalty(progress: float) -> Tensor:
            return kl_penalty(layers, len(job.data.train), weight_scale=0.05, unit_scale=1e-4, progress=progress)

        noisy_step = timed_step(job, noisy, job.original, penalty)
        yield Training("prune", "Learn the noise of units and weights", config.noise_epochs, noisy_step)
    if config.noise_epochs or sparse:
        yield Training("prune", "Fine-tune the remaining weights", sparse_epochs(config.finetune_epochs), step)


def timed_step(
    job: Job, model: nn.Module, network: nn.Module | None, penalty: Callable[[float], Tensor] | None = None
) -> Step:
    """Time training steps of ``model``, which is changed; ``network`` is its teacher."""
    size, images = job.config.batch_size, len(job.data.train)
    few = replace(job.data, train=job.data.train.take(torch.arange(TIMED_STEPS * size) % images))
    # The rate is next to nothing: weights that are not trained yet must not run away while they are timed.
    settings = replace(train_settings(job, 1), learning_rate=1e-9)
    teacher = None if network is None else Teacher(network)
    times: list[float] = []

    def at_loss(progress: float) -> Tensor:
        times.append(time.perf_counter())
        return penalty(progress) if penalty is not None else torch.zeros(())

    for _ in range(2):  # the second time the teacher knows its answers
        train(model, few, settings, teacher=teacher, penalty=at_loss)
    new, known = (times[TIMED_STEPS * i + 1] - times[TIMED_STEPS * i] for i in (0, 1))
    return Step(new, min(known, new), 0 if teacher is None else teacher.room_for())
