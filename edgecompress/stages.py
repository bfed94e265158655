"""The two stages as functions: a network and a budget go in, a policy and a trained smaller network come out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from edgecompress.baselines import Tables
from edgecompress.cost import CostModel, LatencyModel, SizeModel, count
from edgecompress.data import Dataset, Split
from edgecompress.envs import Evaluator, Limit, Outcome, SearchSpace, bitwidth_space, channel_space
from edgecompress.errors import BadModelError, GoalMissedError
from edgecompress.exporters.sizes import FileSize
from edgecompress.finetune import TrainSettings, accuracy_and_loss, train
from edgecompress.graph import Graph
from edgecompress.pareto import picked
from edgecompress.posttraining import bias_corrected
from edgecompress.progress import Progress
from edgecompress.prune import importance_by_name, prune, reestimate_batchnorm
from edgecompress.quantize import Calibration, LearnedSteps, QuantizedGraph, Simulator, simulate
from edgecompress.reward import reward_by_name
from edgecompress.runs import RunFolder
from edgecompress.search import SearchSettings, search, top
from edgecompress.sensitivity import sensitivities
from edgecompress.spec import Budget, CompressionPolicy, Config, Cost, LayerChoice, Network, Stage, Target, Trial
from edgecompress.trace import Traced
from edgecompress.variational import (
    WeightNoise,
    kl_penalty,
    measured_noise,
    prune_elements,
    refresh_batchnorm,
    with_noise,
    without_noise,
)

SHORT_EPOCHS = 2
SENSITIVITY_IMAGES = 200


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
        """``policy``, with `planned_bits` everywhere where it has no bits yet."""
        if policy.layers:
            return policy
        choice = LayerChoice(weight_bits=self.planned_bits, activation_bits=self.planned_bits)
        return policy.model_copy(update={"layers": {layer.name: choice for layer in self.network.layers}})

    def cost_model(self, size: SizeModel | None, latency: LatencyModel | None) -> CostModel:
        """A cost model; a policy without bits yet is priced at `planned_bits`."""
        return lambda policy: count(self.network, self.planned(policy), latency, size)


def limits_for(budgets: Sequence[Budget], original: Cost) -> tuple[Limit, ...]:
    """Budgets in the metric's own unit."""
    return tuple(Limit(budget, budget.absolute(original.metric(budget.metric))) for budget in budgets)


# ----------------------------------------------------------------------------------------------- stage 1: pruning


def channels_of(job: Job, cost: CostModel) -> SearchSpace:
    """What stage 1 may choose, under the budgets that channels decide."""
    limits = [limit for limit in job.limits if limit.budget.metric != "bops"]
    return channel_space(job.network, job.target, cost, limits, job.original_cost)


def prune_stage(job: Job, cost: CostModel) -> tuple[CompressionPolicy, str]:
    """Choose the channels of every group; returns the policy and the arm that found it."""
    if not job.network.prunable_groups:
        reasons = "; ".join(f"{group.id}: {group.reason}" for group in job.network.groups)
        raise BadModelError(f"{job.config.model} has nothing to prune ({reasons}). Run with --stages quantize.")
    space = channels_of(job, cost)
    scores = importance_by_name(job.config.importance)(job.original, job.traced)

    def build(policy: CompressionPolicy) -> nn.Module:
        model = prune(job.original, job.traced, policy.keep_channels, scores)
        reestimate_batchnorm(model, job.data, seed=job.config.seed)
        return model.eval()

    def evaluate(policy: CompressionPolicy) -> Outcome:
        return Outcome(*accuracy_and_loss(build(policy), job.data, job.data.search_val))

    trials = _searched(job, space, evaluate, "prune", job.config.prune_reward)
    finalists = _remeasured(trials, job, lambda trial: build(space.to_policy(trial.choice)))[:3]
    job.progress.stage("Fine-tune the finalists", len(finalists) * SHORT_EPOCHS)
    scored = [(_short_finetune(job, build(space.to_policy(trial.choice))), trial) for trial in finalists]
    chosen = max(scored, key=lambda pair: (pair[0][0], -pair[0][1]))[1]
    policy = space.to_policy(chosen.choice)
    if job.config.max_accuracy_drop is not None:
        policy = _tightened(job, space, chosen, build)
    return policy, chosen.arm


def _searched(
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


def _remeasured(trials: Sequence[Trial], job: Job, build: Callable[[Trial], Callable[[Tensor], Tensor]]) -> list[Trial]:
    """The five best by reward, ordered by accuracy on the larger split: a search climbs its own noise."""
    leaders = top(trials, 5)
    measured = {trial.choice: accuracy_and_loss(build(trial), job.data, job.both_val) for trial in leaders}
    gains = {trial.choice: trial.reward - trial.accuracy + measured[trial.choice][0] for trial in leaders}
    return sorted(leaders, key=lambda trial: (-gains[trial.choice], measured[trial.choice][1]))


def _short_finetune(job: Job, model: nn.Module) -> tuple[float, float]:
    """Accuracy and loss on select-val after a short recovery."""
    settings = _settings(job, SHORT_EPOCHS)
    train(model, job.data, settings, teacher=job.original, on_epoch=job.progress.epoch)
    return accuracy_and_loss(model, job.data, job.data.select_val)


def _settings(job: Job, epochs: int, rate: float = 1.0) -> TrainSettings:
    return TrainSettings(
        epochs=epochs,
        learning_rate=job.config.learning_rate * rate,
        batch_size=job.config.batch_size,
        distill=TrainSettings.distill if job.data.labelled else 1.0,
        seed=job.config.seed,
    )


def _tightened(
    job: Job, space: SearchSpace, chosen: Trial, build: Callable[[CompressionPolicy], nn.Module]
) -> CompressionPolicy:
    """The cheapest policy found that keeps the accuracy drop: shrink every limit by 15 % while a short fine-tune holds it."""
    assert job.config.max_accuracy_drop is not None
    wanted = accuracy_and_loss(job.original, job.data, job.data.select_val)[0] - job.config.max_accuracy_drop / 100
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
    scores = importance_by_name(config.importance)(job.original, job.traced)
    model = prune(job.original, job.traced, policy.keep_channels, scores)
    reestimate_batchnorm(model, data, seed=config.seed)
    job.progress.stage("Fine-tune with distillation", config.finetune_epochs)
    train(
        model, data, _settings(job, config.finetune_epochs), teacher=job.original,
        checkpoint=_checkpoint(job, "finetune"), on_epoch=job.progress.epoch,
    )  # fmt: skip
    if config.noise_epochs == 0:
        return model, policy
    model, noise = learn_noise(job, model)
    return _without_noisy_weights(job, model, noise, policy)


def learn_noise(job: Job, model: nn.Module) -> tuple[nn.Module, WeightNoise]:
    """A short training under information dropout and weight noise; returns the network (noise off) and the noise."""
    epochs = job.config.noise_epochs
    noisy, layers = with_noise(model)
    job.progress.stage("Learn the noise of units and weights", epochs)
    train(
        noisy, job.data, replace(_settings(job, epochs), weight_decay=0.0), teacher=job.original,
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
    job: Job, model: nn.Module, noise: WeightNoise, policy: CompressionPolicy
) -> tuple[nn.Module, CompressionPolicy]:
    """Remove the weights that log-alpha names, half as many again while that costs over a point on select-val."""
    before = accuracy_and_loss(model, job.data, job.data.select_val)[0]
    keep = {name: noise.suggested_keep(name) for name in noise.log_alpha}
    sparse = model
    for _ in range(4):
        sparse = prune_elements(model, noise, keep)
        if accuracy_and_loss(sparse, job.data, job.data.select_val)[0] >= before - 0.01:
            break
        keep = {name: (1 + fraction) / 2 for name, fraction in keep.items()}
    _hold_zeros(sparse)
    epochs = max(2, job.config.finetune_epochs // 2)
    job.progress.stage("Fine-tune the remaining weights", epochs)
    train(
        sparse, job.data, _settings(job, epochs, 0.5), teacher=job.original,
        checkpoint=_checkpoint(job, "sparse"), on_epoch=job.progress.epoch,
    )  # fmt: skip
    layers = {name: LayerChoice(keep_elements=_nonzero(sparse, name)) for name in keep}
    return copy.deepcopy(_released(sparse)), policy.model_copy(update={"layers": layers})


def _hold_zeros(model: nn.Module) -> None:
    """Weights that are zero get no gradient; weight decay and momentum leave a zero at zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            mask = (module.weight != 0).float()
            module.weight.register_hook(partial(torch.mul, mask))  # type: ignore[no-untyped-call]


def _released(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().clone())
    return model


def _nonzero(model: nn.Module, name: str) -> float:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return max(float((weight != 0).float().mean()), 1e-6)


def _checkpoint(job: Job, name: str) -> Path:
    return job.run.file("checkpoints") / f"{name}.safetensors"


# ------------------------------------------------------------------------------------------- stage 2: quantisation


def bits_of(
    job: Job, simulator: Simulator, pruned: CompressionPolicy, latency: LatencyModel, base_bytes: int
) -> SearchSpace:
    """What stage 2 may choose, priced by the bytes that the file will have."""
    points = simulator.points
    shared = [points.layers_of(owner) for owner in dict.fromkeys(points.layer_input.values())]
    cost = job.cost_model(FileSize(simulator, base_bytes, job.target), latency)
    # Bits do not change the time of a float network.
    limits = [limit for limit in job.limits if limit.budget.precision in (None, "int8")]
    return bitwidth_space(job.network, pruned, shared, job.target, cost, limits)


def quantize_stage(
    job: Job, graph: Graph, calibration: Calibration, pruned: CompressionPolicy, latency: LatencyModel, base_bytes: int
) -> tuple[QuantizedGraph, CompressionPolicy, str]:
    """Choose the bits of every layer, train the steps, and return the integers with the policy and its arm."""
    simulator = Simulator(graph, calibration)
    space = bits_of(job, simulator, pruned, latency, base_bytes)
    _note_floats(job, simulator)

    def forward(policy: CompressionPolicy) -> Callable[[Tensor], Tensor]:
        return lambda x: simulator(x, policy.layers)

    def evaluate(policy: CompressionPolicy) -> Outcome:
        return Outcome(*accuracy_and_loss(forward(policy), job.data, job.data.search_val))

    trials = _searched(
        job, space, evaluate, "quantize", job.config.quantize_reward, lambda: _kl_tables(job, simulator, space)
    )
    chosen = _remeasured(trials, job, lambda trial: forward(space.to_policy(trial.choice)))[0]
    policy = space.to_policy(chosen.choice)
    quantized = simulator.quantized(policy.layers)
    if job.config.bias_correction:
        quantized = _corrected(job, quantized)
    if job.config.qat_epochs:
        quantized = _learned_steps(job, quantized)
    return quantized, policy, chosen.arm


def _note_floats(job: Job, simulator: Simulator) -> None:
    """Name the layers that no integer kernel will run."""
    left = [layer.name for layer in job.network.layers if layer.name not in simulator.points.layer_input]
    if left:
        job.progress.note(f"these layers cannot be quantised and stay float: {', '.join(left)}")


def _kl_tables(job: Job, simulator: Simulator, space: SearchSpace) -> Tables:
    """Sensitivities of every action, kept in the run's folder."""
    few = (x for x, _ in job.data.batches(job.data.calibration.take(torch.arange(_first(job.data))), 100))
    found = sensitivities(simulator, few, job.run.file("sensitivities.json"))
    split = [name.rpartition(":") for name in space.names]
    return {
        action: found.table("weight" if what == "weight" else "activation", layer)
        for action, (layer, _, what) in enumerate(split)
    }


def _first(data: Dataset) -> int:
    """Calibration images that sensitivities are measured on: more of them change little."""
    return min(SENSITIVITY_IMAGES, len(data.calibration))


def _corrected(job: Job, quantized: QuantizedGraph) -> QuantizedGraph:
    """Biases moved by what quantisation shifts; kept only where that does not lose on select-val."""
    moved = bias_corrected(quantized, (x for x, _ in job.data.batches(job.data.calibration, 100)))
    scores = [
        accuracy_and_loss(partial(simulate, found), job.data, job.data.select_val) for found in (quantized, moved)
    ]
    before, after = scores
    kept = (after[0], -after[1]) >= (before[0], -before[1])
    text = " to ".join(job.data.task.about.text(value) for value, _ in scores)
    job.progress.note(f"bias correction: {text} on select-val; {'kept' if kept else 'the biases stay as they were'}")
    return moved if kept else quantized


def _learned_steps(job: Job, quantized: QuantizedGraph) -> QuantizedGraph:
    """Quantisation-aware training; kept only where it does not lose on select-val."""
    module = LearnedSteps(quantized)
    before = accuracy_and_loss(module, job.data, job.data.select_val)
    job.progress.stage("Quantisation-aware training", job.config.qat_epochs)
    settings = replace(_settings(job, job.config.qat_epochs, 0.2), weight_decay=0.0)
    train(
        module,
        job.data,
        settings,
        teacher=job.original,
        checkpoint=_checkpoint(job, "qat"),
        on_epoch=job.progress.epoch,
    )
    after = accuracy_and_loss(module, job.data, job.data.select_val)
    if (after[0], -after[1]) < (before[0], -before[1]):
        lost = " to ".join(job.data.task.about.text(value) for value, _ in (before, after))
        job.progress.note(f"training the steps lost ({lost} on select-val); the calibrated steps stay")
        return quantized
    return module.finished()


__all__ = ["Job", "bits_of", "channels_of", "learn_noise", "limits_for", "prune_stage", "quantize_stage", "recover"]
