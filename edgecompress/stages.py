"""Stage 1 as functions, and what both stages share: a network and a budget go in, a policy and a smaller network come out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgecompress.agents import SB3_AGENTS
from edgecompress.baselines import Tables
from edgecompress.channel_sensitivity import channel_sensitivities
from edgecompress.cost import CostModel, LatencyModel, SizeModel, count
from edgecompress.data import Dataset, Split
from edgecompress.episodes import Episodes, missing_classes
from edgecompress.errors import BadModelError, GoalMissedError
from edgecompress.fidelity import PRUNED
from edgecompress.finetune import TrainSettings, accuracy_and_loss, train
from edgecompress.judge import Judge
from edgecompress.pareto import picked
from edgecompress.progress import Progress
from edgecompress.prune import pruner, reestimate_batchnorm
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
from edgecompress.stage_spaces import ELEMENTS, channel_space
from edgecompress.trace import Traced
from edgecompress.variational import (
    WeightNoise,
    kl_penalty,
    measured_noise,
    noise_by_size,
    prune_elements,
    refresh_batchnorm,
    with_noise,
    without_noise,
)

SHORT_EPOCHS = 2


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


# ----------------------------------------------------------------------------------------------- stage 1: pruning


def channels_of(job: Job, cost: CostModel, sensitivity: Callable[[str], float] | None = None) -> SearchSpace:
    """What stage 1 may choose, under the budgets that channels and single weights decide.

    The channels of every group; its single weights too where `--single-weights` or the reward asks for them, or where the
    budgets on bytes ask for more than the other budgets give.
    """
    config = job.config
    limits = [limit for limit in job.limits if limit.budget.metric != "bops"]
    space = partial(
        channel_space, job.network, job.target, cost, limits, job.original_cost, sensitivity=sensitivity
    )  # fmt: skip
    if config.pick is not None:
        groups = len(job.network.prunable_groups)
        earlier = RunFolder(Path(config.pick)).trials()
        chosen = any(trial.stage == "prune" and len(trial.choice) > groups for trial in earlier)
        return space(elements=ELEMENTS if chosen else ())
    free = config.prune_reward == "paper" if config.single_weights is None else config.single_weights
    if free:
        return space(elements=ELEMENTS, only_if_asked=False)
    if config.single_weights is None and job.network.prunable_groups:
        both = space(elements=ELEMENTS)
        if _single_weights_are_needed(both):
            return both
    return space()


def _sensitivity(job: Job) -> Callable[[str], float] | None:
    """What an agent that learns sees of every group, in the logarithm: divergences lie magnitudes apart."""
    if job.config.agent not in SB3_AGENTS or job.config.pick is not None:
        return None
    cache = job.run.file("channel_sensitivities.json")
    found = channel_sensitivities(job.original, job.traced, job.data, cache).divergence
    return lambda group: math.log10(found[group] + 1e-6)


def _single_weights_are_needed(space: SearchSpace) -> bool:
    """Whether budgets that zeros relieve are still missed when channels alone keep all others."""
    sparse = tuple(levels[0] if i in space.only_if_asked else levels[-1] for i, levels in enumerate(space.levels))
    dense, zeros = space.price(space.largest), space.price(sparse)
    relieved = [m for limit in space.limits if zeros.metric(m := limit.budget.metric) < dense.metric(m)]
    if not relieved:
        return False
    others = replace(space, limits=tuple(limit for limit in space.limits if limit.budget.metric not in relieved))
    return not space.fits(others.project(np.ones(len(space.levels))))


def pruner_of(job: Job) -> Callable[[CompressionPolicy], nn.Module]:
    """Builds policies with the importance and the reconstruction that were asked for."""
    config = job.config
    return pruner(
        job.original, job.traced, job.data, importance=config.importance, reconstruct=config.reconstruct
    )  # fmt: skip


def prune_stage(job: Job, cost: CostModel) -> tuple[CompressionPolicy, str]:
    """Choose the channels of every group; returns the policy and the arm that found it."""
    if not job.network.prunable_groups:
        reasons = "; ".join(f"{group.id}: {group.reason}" for group in job.network.groups)
        raise BadModelError(f"{job.config.model} has nothing to prune ({reasons}). Run with --stages quantize.")
    space = channels_of(job, cost, _sensitivity(job))
    pruned = pruner_of(job)
    lacking = missing_classes(job.data, job.data.search_val, "search-val")
    if lacking:
        job.progress.note(lacking)
    episodes = Episodes(
        pruned,
        job.data, job.data.search_val, seed=job.config.seed, original=job.original, device=job.config.device,
    )  # fmt: skip

    def build(policy: CompressionPolicy) -> nn.Module:
        return episodes.network(policy).to("cpu").to(memory_format=torch.contiguous_format)

    trials = searched(job, space, episodes, "prune", job.config.prune_reward)
    judge = Judge(job.data, job.both_val, job.original, PRUNED, job.config.device)
    finalists = remeasured(trials, judge, lambda trial: build(space.to_policy(trial.choice)))[:3]
    job.progress.stage("Fine-tune the finalists", len(finalists) * SHORT_EPOCHS)
    scored = [(_short_finetune(job, build(space.to_policy(trial.choice))), trial) for trial in finalists]
    chosen = max(scored, key=lambda pair: (pair[0][0], -pair[0][1]))[1]
    policy = space.to_policy(chosen.choice)
    if job.config.max_accuracy_drop is not None:
        policy = _tightened(job, space, chosen, build)
    return policy, chosen.arm


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


def _short_finetune(job: Job, model: nn.Module) -> tuple[float, float]:
    """Accuracy and loss on select-val after a short recovery."""
    settings = train_settings(job, SHORT_EPOCHS)
    _hold_zeros(model)
    train(model, job.data, settings, teacher=job.original, on_epoch=job.progress.epoch)
    return job.measure(model, job.data.select_val)


def train_settings(job: Job, epochs: int, rate: float = 1.0) -> TrainSettings:
    return TrainSettings(
        epochs=epochs,
        learning_rate=job.config.learning_rate * rate,
        batch_size=job.config.batch_size,
        distill=TrainSettings.distill if job.data.labelled else 1.0,
        seed=job.config.seed,
        device=job.config.device,
    )


def _tightened(
    job: Job, space: SearchSpace, chosen: Trial, build: Callable[[CompressionPolicy], nn.Module]
) -> CompressionPolicy:
    """The cheapest policy found that keeps the accuracy drop: shrink every limit by 15 % while a short fine-tune holds it."""
    assert job.config.max_accuracy_drop is not None
    wanted = job.measure(job.original, job.data.select_val)[0] - job.config.max_accuracy_drop / 100
    policy = space.to_policy(chosen.choice)
    for step in range(1, 12):
        limits = tuple(replace(limit, value=limit.value * 0.85**step) for limit in space.limits)
        tighter = replace(space, limits=limits)
        if not tighter.fits(tighter.smallest):
            break
        candidate = tighter.to_policy(tighter.project(space.wishes(chosen.choice)))
        accuracy, _ = _short_finetune(job, build(candidate))
        score = job.data.task.about
        job.progress.note(
            f"cheaper by {1 - 0.85**step:.0%}: select-val {score.name} {score.text(accuracy)} (wanted {score.text(wanted)})"
        )
        if accuracy < wanted:
            break
        policy = candidate
    return policy


def recover(job: Job, policy: CompressionPolicy) -> tuple[nn.Module, CompressionPolicy]:
    """Cut the channels, fine-tune with distillation, learn the noise, remove single weights, fine-tune what is left."""
    config, data = job.config, job.data
    chosen = {name: choice.keep_elements for name, choice in policy.layers.items() if choice.keep_elements < 1}
    model = pruner_of(job)(policy.model_copy(update={"layers": {}}))
    reestimate_batchnorm(model, data, seed=config.seed)
    job.progress.stage("Fine-tune with distillation", config.finetune_epochs)
    train(
        model, data, train_settings(job, config.finetune_epochs), teacher=job.original,
        checkpoint=checkpoint_of(job, "finetune"), on_epoch=job.progress.epoch,
    )  # fmt: skip
    if config.noise_epochs == 0 and not chosen and not config.two_four:
        return model, policy
    model, noise = learn_noise(job, model) if config.noise_epochs else (model, noise_by_size(model))
    return _without_noisy_weights(job, model, noise, policy, chosen)


def learn_noise(job: Job, model: nn.Module) -> tuple[nn.Module, WeightNoise]:
    """A short training under information dropout and weight noise; returns the network (noise off) and the noise."""
    epochs = job.config.noise_epochs
    noisy, layers = with_noise(model)
    job.progress.stage("Learn the noise of units and weights", epochs)
    train(
        noisy, job.data, replace(train_settings(job, epochs), weight_decay=0.0), teacher=job.original,
        penalty=lambda progress: kl_penalty(
            layers, len(job.data.train), weight_scale=0.05, unit_scale=1e-4, progress=progress
        ),
        noise=[parameter for layer in layers.values() for parameter in layer.noise_parameters],
        on_epoch=job.progress.epoch,
    )  # fmt: skip
    plain = without_noise(noisy)
    refresh_batchnorm(plain, job.data, seed=job.config.seed)
    return plain.eval(), measured_noise(layers)


def _without_noisy_weights(
    job: Job, model: nn.Module, noise: WeightNoise, policy: CompressionPolicy, chosen: Mapping[str, float]
) -> tuple[nn.Module, CompressionPolicy]:
    """Remove the weights that log-alpha names: as many as the policy chose per layer, else as the threshold says.

    Where the policy is silent, half as many go while that costs over a point on select-val.
    """
    learned = job.config.noise_epochs > 0
    keep = {name: noise.suggested_keep(name) if learned else 1.0 for name in noise.log_alpha} | dict(chosen)
    pattern = _two_four_layers(job, model) if job.config.two_four else ()
    chosen_only = prune_elements(model, noise, chosen, pattern)
    before = job.measure(chosen_only, job.data.select_val)[0]
    sparse = prune_elements(model, noise, keep, pattern)
    for _ in range(3 if learned else 0):
        if job.measure(sparse, job.data.select_val)[0] >= before - 0.01:
            break
        keep = {name: chosen.get(name, (1 + fraction) / 2) for name, fraction in keep.items()}
        sparse = prune_elements(model, noise, keep, pattern)
    _hold_zeros(sparse)
    epochs = max(2, job.config.finetune_epochs // 2)
    job.progress.stage("Fine-tune the remaining weights", epochs)
    train(
        sparse, job.data, train_settings(job, epochs, 0.5), teacher=job.original,
        checkpoint=checkpoint_of(job, "sparse"), on_epoch=job.progress.epoch,
    )  # fmt: skip
    layers = {name: LayerChoice(keep_elements=_nonzero(sparse, name)) for name in keep}
    return copy.deepcopy(_released(sparse)), policy.model_copy(update={"layers": layers})


def _two_four_layers(job: Job, model: nn.Module) -> list[str]:
    """Layers that the target's sparse kernels can run: ungrouped, their input channels filling whole blocks."""
    block = max(4, job.target.divisor)
    return [
        name for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and module.in_features % block == 0)
        or (isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels % block == 0)
    ]  # fmt: skip


def _hold_zeros(model: nn.Module) -> None:
    """Weights that are zero get no gradient; weight decay and momentum leave a zero at zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not bool((mask := module.weight != 0).all()):
            module.weight.register_hook(partial(_masked, mask))  # type: ignore[no-untyped-call]


def _masked(mask: Tensor, gradient: Tensor) -> Tensor:
    return gradient * mask.to(gradient)


def _released(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().clone())
    return model


def _nonzero(model: nn.Module, name: str) -> float:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return max(float((weight != 0).float().mean()), 1e-6)


def checkpoint_of(job: Job, name: str) -> Path:
    return job.run.file("checkpoints") / f"{name}.safetensors"


__all__ = [
    "Job", "channels_of", "checkpoint_of", "learn_noise", "limits_for", "prune_stage", "pruner_of", "recover", "remeasured",
    "searched",
    "train_settings",
]  # fmt: skip
