"""What both stages share: a run's network, data and limits, how it is trained, searched, and its finalists measured again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from edgecompress.baselines import Tables
from edgecompress.cost import CostModel, LatencyModel, SizeModel, count
from edgecompress.data import Dataset, Split
from edgecompress.devices import device_by_name
from edgecompress.errors import GoalMissedError
from edgecompress.finetune import TrainSettings, accuracy_and_loss
from edgecompress.judge import Judge
from edgecompress.pareto import picked
from edgecompress.progress import Progress
from edgecompress.prune import pruner
from edgecompress.reward import reward_by_name
from edgecompress.runs import RunFolder
from edgecompress.search import SearchSettings, search, top
from edgecompress.spaces import Evaluator, Limit, SearchSpace
from edgecompress.spec import (
    FLOAT_BITS,
    Budget,
    CompressionPolicy,
    Config,
    Cost,
    LayerChoice,
    Network,
    Stage,
    Target,
    Trial,
)
from edgecompress.teacher import Teacher
from edgecompress.trace import Traced
from edgecompress.training_state import precision_on


@dataclass(frozen=True)
class Job:
    """What both stages need: the resolved options, the data, the original network and where to write."""

    config: Config
    target: Target
    data: Dataset
    run: RunFolder
    progress: Progress
    original: nn.Module
    traced: Traced
    limits: tuple[Limit, ...]
    original_cost: Cost
    bits: Mapping[str, LayerChoice] = field(default_factory=dict)

    @property
    def integer(self) -> bool:
        """Whether the run ends in integers: stage 2 is asked for and the target has kernels for them."""
        return "quantize" in self.config.stages and self.target.integer_kernels

    @property
    def planned_bits(self) -> int:
        """Bits at which stage 1 prices latency: of the precision that a latency budget names, or that the target will run."""
        named = [limit.budget.precision for limit in self.limits if limit.budget.precision]
        return {"fp32": 32, "fp16": 16, "int8": 8}[
            named[0] if named else self.target.precision if self.integer else "fp32"
        ]

    @cached_property
    def teacher(self) -> Teacher:
        """The original as the teacher of all trainings, asked for every batch once."""
        return Teacher(self.original)

    @property
    def network(self) -> Network:
        return self.traced.network

    @property
    def both_val(self) -> Split:
        """Search-val and select-val together: the larger split on which finalists are measured again."""
        search_val, select_val = self.data.search_val, self.data.select_val
        return Split(
            torch.cat([search_val.images, select_val.images]), torch.cat([search_val.labels, select_val.labels])
        )

    def planned(self, policy: CompressionPolicy) -> CompressionPolicy:
        """``policy``; one without bits yet gets those that an earlier stage 2 chose (``bits``), else `planned_bits`.

        What it says of single weights stays.
        """
        if any(choice.weight_bits != FLOAT_BITS for choice in policy.layers.values()):
            return policy
        planned = LayerChoice(weight_bits=self.planned_bits, activation_bits=self.planned_bits)
        layers = {layer.name: self.bits.get(layer.name, planned) for layer in self.network.layers}
        for name, choice in policy.layers.items():
            if choice.keep_elements < 1:
                layers[name] = layers[name].model_copy(update={"keep_elements": choice.keep_elements})
        return policy.model_copy(update={"layers": layers})

    def measure(self, network: nn.Module, split: Split) -> tuple[float, float]:
        """Score and mean loss of a torch network, on the device that the run trains on."""
        return accuracy_and_loss(network, self.data, split, device=self.config.device)

    def cost_model(self, size: SizeModel | None, latency: LatencyModel | None) -> CostModel:
        """A cost model; a policy without bits yet is priced at `planned_bits`."""
        return lambda policy: count(self.network, self.planned(policy), latency, size)


def limits_for(budgets: Sequence[Budget], original: Cost) -> tuple[Limit, ...]:
    """Budgets in the metric's own unit."""
    return tuple(Limit(budget, budget.absolute(original.metric(budget.metric))) for budget in budgets)


def pruner_of(job: Job) -> Callable[[CompressionPolicy], nn.Module]:
    """Builds policies with the importance and the reconstruction that were asked for."""
    config = job.config
    return pruner(
        job.original, job.traced, job.data, importance=config.importance, reconstruct=config.reconstruct
    )  # fmt: skip


def train_settings(job: Job, epochs: int, rate: float = 1.0) -> TrainSettings:
    """Of every training of a run. The original decides the precision for all of them: the network that learns its steps is one
    module, in which convolutions cannot be seen."""
    return TrainSettings(
        epochs=epochs,
        learning_rate=job.config.learning_rate * rate,
        batch_size=job.config.batch_size,
        distill=TrainSettings.distill if job.data.labelled else 1.0,
        seed=job.config.seed,
        ema=job.config.ema,
        device=job.config.device,
        precision=precision_on(device_by_name(job.config.device), job.config.train_precision, job.original),
    )


def checkpoint_of(job: Job, name: str) -> Path:
    return job.run.file("checkpoints") / f"{name}.safetensors"


def searched(
    job: Job,
    space: SearchSpace,
    evaluate: Evaluator,
    stage: Stage,
    reward: str,
    tables: Callable[[], Tables] | None = None,
) -> list[Trial]:
    settings = SearchSettings(
        stage=stage,
        agent=job.config.agent,
        episodes=job.config.episodes,
        seed=job.config.seed,
    )
    title = "Stage 1: channels" if stage == "prune" else "Stage 2: bit-widths"
    job.progress.stage(title, settings.episodes)
    if job.config.pick is not None and stage == "prune":
        job.progress.note(f"the channels are picked from the trials of {job.config.pick}; nothing is searched")
        earlier = RunFolder(Path(job.config.pick)).trials()
        return picked(space, earlier, stage, reward_by_name(reward), job.original_cost)
    trials = search(
        space, evaluate, reward_by_name(reward), job.original_cost, settings,
        journal=job.run.file("trials.jsonl"), known=job.run.trials(),
        on_trial=lambda trial, leader: job.progress.trial(settings.stage, trial, leader), tables=tables,
    )  # fmt: skip
    if not trials:
        raise GoalMissedError(
            f"No policy of stage '{stage}' keeps the budget {job.config.budget}. Raise it or add --episodes."
        )
    return trials


def remeasured(
    trials: Sequence[Trial], judge: Judge, build: Callable[[Trial], Callable[[Tensor], Tensor]]
) -> list[Trial]:
    """The five best by reward, in the order of what ``judge`` believes of them on a larger split: a search climbs its own noise."""
    leaders = top(trials, 5)
    measured = {trial.choice: judge(build(trial)) for trial in leaders}
    gains = {trial.choice: trial.reward - trial.believed + measured[trial.choice].believed for trial in leaders}
    return sorted(leaders, key=lambda trial: (-gains[trial.choice], measured[trial.choice].loss))
