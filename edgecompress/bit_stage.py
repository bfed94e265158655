"""Stage 2 as functions: the bits of every layer are searched, then the integers are rounded, corrected and trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from edgecompress.baselines import Tables
from edgecompress.cost import LatencyModel
from edgecompress.data import Dataset
from edgecompress.errors import UsageError
from edgecompress.exporters.emulate import emulate
from edgecompress.exporters.sizes import FileSize
from edgecompress.exporters.verify import agreement
from edgecompress.fidelity import QUANTIZED
from edgecompress.finetune import accuracy_and_loss, train
from edgecompress.graph import Graph
from edgecompress.interpret import run
from edgecompress.job import Job, checkpoint_of, remeasured, searched, train_settings
from edgecompress.judge import Judge
from edgecompress.learned_steps import LearnedSteps
from edgecompress.posttraining import bias_corrected
from edgecompress.quantize import Calibration, QuantizedGraph, Simulator, channels_last, simulate
from edgecompress.rounding import learned_rounding
from edgecompress.sensitivity import Sensitivities, sensitivities
from edgecompress.spaces import Outcome, SearchSpace
from edgecompress.spec import CompressionPolicy, Target
from edgecompress.stage_spaces import bitwidth_space

SENSITIVITY_IMAGES = 200
EMULATED_IMAGES = 200


def bits_of(
    job: Job,
    simulator: Simulator,
    pruned: CompressionPolicy,
    latency: LatencyModel,
    base_bytes: int,
    sensitivity: Sensitivities | None = None,
) -> SearchSpace:
    """What stage 2 may choose, priced by the bytes that the file will have; the agent sees every layer's ``sensitivity``."""
    points = simulator.points
    shared = [points.layers_of(owner) for owner in dict.fromkeys(points.layer_input.values())]
    cost = job.cost_model(FileSize(simulator, base_bytes, job.target), latency)
    # Bits do not change the time of a float network.
    limits = [limit for limit in job.limits if limit.budget.precision in (None, "int8")]
    return bitwidth_space(
        job.network, pruned, shared, job.target, cost, limits,
        pinned=pinned_bits(job.config.pin_bits, list(points.layer_input), job.target),
        free_activations=job.config.free_activations,
        sensitivity=None if sensitivity is None else _seen(sensitivity),
    )  # fmt: skip


def pinned_bits(text: str, layers: Sequence[str], target: Target) -> dict[str, int]:
    """Read ``"first=8,layer1.0.conv1=4"``; ``first`` and ``last`` are the first and last of ``layers``.

    Raises:
        UsageError: a part does not parse, no such layer can be quantised, or the target has no such bits.
    """
    found: dict[str, int] = {}
    allowed = [bits for bits in target.weight_bits if bits in target.activation_bits]
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, number = (piece.strip() for piece in part.partition("="))
        layer = {"first": layers[0], "last": layers[-1]}.get(name, name)
        if layer not in layers:
            raise UsageError(
                f"--pin-bits names '{name}', which is no layer that can be quantised: {', '.join(layers)}."
            )
        if not number.isdigit() or int(number) not in allowed:
            raise UsageError(f"--pin-bits {part}: expected LAYER=BITS with bits of {', '.join(map(str, allowed))}.")
        found[layer] = int(number)
    return found


def _seen(found: Sensitivities) -> dict[str, list[float]]:
    """Two of every layer's divergences each for weights and input, in the logarithm: they lie magnitudes apart."""
    return {
        layer: [
            math.log10(table[bits] + 1e-6)
            for table in (found.table("weight", layer), found.table("activation", layer))
            for bits in (2, 4)
        ]
        for layer in found.weight
    }


def quantize_stage(
    job: Job, graph: Graph, calibration: Calibration, pruned: CompressionPolicy, latency: LatencyModel, base_bytes: int
) -> tuple[QuantizedGraph, CompressionPolicy, str]:
    """Choose the bits of every layer, train the steps, and return the integers with the policy and its arm."""
    simulator = Simulator(graph, calibration, job.target.weight_scales)
    found = _sensitivities(job, simulator)
    space = bits_of(job, simulator, pruned, latency, base_bytes, found)
    _note_floats(job, simulator)

    def forward(policy: CompressionPolicy) -> Callable[[Tensor], Tensor]:
        return simulator.forward(policy.layers)

    def floating(x: Tensor) -> Tensor:
        return run(simulator.graph, channels_last(x), simulator.floats)

    judge = Judge(job.data, job.data.search_val, floating, QUANTIZED, job.config.device)

    def evaluate(policy: CompressionPolicy) -> Outcome:
        return judge(_briefly_trained(job, simulator, policy) if job.config.reward_steps else forward(policy))

    trials = searched(job, space, evaluate, "quantize", job.config.quantize_reward, lambda: _kl_tables(found, space))
    finalists = remeasured(
        trials,
        Judge(job.data, job.both_val, floating, QUANTIZED),
        lambda trial: forward(space.to_policy(trial.choice)),
    )
    _emulated(job, [simulator.quantized(space.to_policy(trial.choice).layers) for trial in finalists])
    chosen = finalists[0]
    policy = space.to_policy(chosen.choice)
    quantized = simulator.quantized(policy.layers)
    if job.config.learned_rounding:
        moved = learned_rounding(quantized, _calibration(job), seed=job.config.seed)
        quantized = _better(job, "learned rounding", quantized, moved)
    if job.config.bias_correction:
        quantized = _better(job, "bias correction", quantized, bias_corrected(quantized, _calibration(job)))
    if job.config.qat_epochs:
        quantized = _learned_steps(job, quantized)
    return quantized, policy, chosen.arm


def _calibration(job: Job) -> Iterator[Tensor]:
    return (x for x, _ in job.data.batches(job.data.calibration, 100))


def _briefly_trained(job: Job, simulator: Simulator, policy: CompressionPolicy) -> Callable[[Tensor], Tensor]:
    """The policy after `reward_steps` of quantisation-aware training, always on the same images."""
    module = LearnedSteps(simulator.quantized(policy.layers))
    settings = replace(train_settings(job, 1, 0.2), weight_decay=0.0)
    rows = torch.arange(min(job.config.reward_steps * settings.batch_size, len(job.data.train)))
    return train(module, replace(job.data, train=job.data.train.take(rows)), settings, teacher=job.teacher)


def _emulated(job: Job, finalists: Sequence[QuantizedGraph]) -> None:
    """Run the integer emulator on every finalist: how often it gives another class than the float simulation."""
    few = job.data.select_val.take(torch.arange(min(EMULATED_IMAGES, len(job.data.select_val))))
    x = job.data.normalise(few.images)
    shares = []
    with torch.no_grad():
        for quantized in finalists:
            exact, floating = emulate(quantized, x), simulate(quantized, x)
            shares.append(1 - agreement(exact.numpy(), floating.numpy(), class_scores=job.data.task.class_scores))
    found = ", ".join(f"{share:.1%}" for share in shares)
    job.progress.note(
        f"the integers answer otherwise than the float simulation on {found} of {len(few)} images (finalists)"
    )


def _note_floats(job: Job, simulator: Simulator) -> None:
    """Name the layers that no integer kernel will run."""
    left = [layer.name for layer in job.network.layers if layer.name not in simulator.points.layer_input]
    if left:
        job.progress.note(f"these layers cannot be quantised and stay float: {', '.join(left)}")


def _kl_tables(found: Sensitivities, space: SearchSpace) -> Tables:
    """Sensitivities of every action."""
    split = [name.rpartition(":") for name in space.names]
    return {
        action: found.table("weight" if what == "weight" else "activation", layer)
        for action, (layer, _, what) in enumerate(split)
    }


def _sensitivities(job: Job, simulator: Simulator) -> Sensitivities:
    """Of all layers and bits, kept in the run's folder."""
    few = (x for x, _ in job.data.batches(job.data.calibration.take(torch.arange(_first(job.data))), 100))

    def tell(done: int, total: int) -> None:
        if done == 0:
            job.progress.stage("Sensitivities to bits", total)
        job.progress.step(done, total)

    return sensitivities(simulator, few, job.run.file("sensitivities.json"), on_step=tell)


def _first(data: Dataset) -> int:
    """Calibration images that sensitivities are measured on: more of them change little."""
    return min(SENSITIVITY_IMAGES, len(data.calibration))


def _better(job: Job, what: str, before: QuantizedGraph, after: QuantizedGraph) -> QuantizedGraph:
    """``after`` where it does not lose on select-val."""
    scores = [accuracy_and_loss(partial(simulate, found), job.data, job.data.select_val) for found in (before, after)]
    (old, old_loss), (new, new_loss) = scores
    kept = (new, -new_loss) >= (old, -old_loss)
    text = " to ".join(job.data.task.about.text(value) for value, _ in scores)
    job.progress.note(f"{what}: {text} on select-val; {'kept' if kept else 'left out'}")
    return after if kept else before


def _learned_steps(job: Job, quantized: QuantizedGraph) -> QuantizedGraph:
    """Quantisation-aware training; kept only where it does not lose on select-val."""
    module = LearnedSteps(quantized)
    before = job.measure(module, job.data.select_val)
    job.progress.stage("Quantisation-aware training", job.config.qat_epochs)
    settings = replace(train_settings(job, job.config.qat_epochs, 0.2), weight_decay=0.0)
    train(
        module,
        job.data,
        settings,
        teacher=job.teacher,
        checkpoint=checkpoint_of(job, "qat"),
        on_epoch=job.progress.epoch,
    )
    after = job.measure(module, job.data.select_val)
    if (after[0], -after[1]) < (before[0], -before[1]):
        lost = " to ".join(job.data.task.about.text(value) for value, _ in (before, after))
        job.progress.note(f"training the steps lost ({lost} on select-val); the calibrated steps stay")
        return quantized
    return module.finished()


__all__ = ["bits_of", "pinned_bits", "quantize_stage"]
