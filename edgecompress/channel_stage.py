"""Stage 1: a network and a budget go in, the channels of every group and the arm that found them come out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import nn

from edgecompress.agents import SB3_AGENTS
from edgecompress.channel_sensitivity import channel_sensitivities
from edgecompress.cost import CostModel
from edgecompress.episodes import Episodes, missing_classes
from edgecompress.errors import BadModelError, DivergedError
from edgecompress.fidelity import PRUNED
from edgecompress.files import read_document, write_document
from edgecompress.finetune import train
from edgecompress.job import Job, checkpoint_of, pruner_of, remeasured, searched, train_settings
from edgecompress.judge import Judge
from edgecompress.recover import hold_zeros
from edgecompress.runs import RunFolder
from edgecompress.spaces import SearchSpace
from edgecompress.spec import (
    CompressionPolicy,
    Document,
    Trial,
)
from edgecompress.stage_spaces import ELEMENTS, channel_space

SHORT_EPOCHS = 2
Build = Callable[[CompressionPolicy], nn.Module]


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
    chosen = _best_after_training(job, space, finalists, build)
    policy = space.to_policy(chosen.choice)
    if job.config.max_accuracy_drop is not None:
        policy = _tightened(job, space, chosen, build)
    return policy, chosen.arm


def channels_of(job: Job, cost: CostModel, sensitivity: Callable[[str], float] | None = None) -> SearchSpace:
    """What stage 1 may choose, under the budgets that channels and single weights decide.

    The channels of every group; its single weights too where `--single-weights` or the reward asks for them, or where the
    budgets on bytes ask for more than the other budgets give.
    """
    config = job.config
    limits = [limit for limit in job.limits if limit.budget.metric != "bops"]
    space = partial(
        channel_space, job.network, job.target, cost, limits, job.original_cost, config.divisor, sensitivity=sensitivity
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


def _best_after_training(job: Job, space: SearchSpace, finalists: Sequence[Trial], build: Build) -> Trial:
    """The finalist that does best after a short recovery; one whose training diverges is left out.

    Raises:
        DivergedError: all of them do.
    """
    scored: list[tuple[float, float, Trial]] = []
    for trial in finalists:
        try:
            accuracy, loss = _short_finetune(job, space.to_policy(trial.choice), build)
        except DivergedError as error:
            if trial is finalists[-1] and not scored:
                raise
            job.progress.note(f"a finalist of {trial.arm} is left out: {error}")
        else:
            scored.append((accuracy, -loss, trial))
    return max(scored, key=lambda found: found[:2])[2]


class Recovered(Document):
    """Accuracy and loss on select-val after a short recovery, by policy: a run that goes on does not train it again."""

    found: dict[str, tuple[float, float]] = Field(default_factory=dict)


def _short_finetune(job: Job, policy: CompressionPolicy, build: Build) -> tuple[float, float]:
    """Accuracy and loss on select-val after a short recovery; interrupted, it goes on after its last epoch."""
    kept = job.run.file("short_finetunes.json")
    recovered = read_document(kept, Recovered, "short fine-tunes") if kept.exists() else Recovered()
    key = hashlib.sha256(policy.model_dump_json().encode()).hexdigest()[:16]
    if key not in recovered.found:
        model, checkpoint = build(policy), checkpoint_of(job, f"short-{key}")
        hold_zeros(model)
        train(
            model, job.data, train_settings(job, SHORT_EPOCHS), teacher=job.teacher, checkpoint=checkpoint,
            on_epoch=job.progress.epoch,
        )  # fmt: skip
        recovered = Recovered(found=recovered.found | {key: job.measure(model, job.data.select_val)})
        write_document(kept, recovered)
        checkpoint.unlink(missing_ok=True)  # of a large network it is large, and there are up to a dozen
    return recovered.found[key]


def _tightened(job: Job, space: SearchSpace, chosen: Trial, build: Build) -> CompressionPolicy:
    """The cheapest policy found that keeps the accuracy drop: shrink every limit by 15 % while a short fine-tune holds it.

    One that diverges does not hold it.
    """
    assert job.config.max_accuracy_drop is not None
    wanted = job.measure(job.original, job.data.select_val)[0] - job.config.max_accuracy_drop / 100
    policy = space.to_policy(chosen.choice)
    for step in range(1, 12):
        limits = tuple(replace(limit, value=limit.value * 0.85**step) for limit in space.limits)
        tighter = replace(space, limits=limits)
        if not tighter.fits(tighter.smallest):
            break
        candidate = tighter.to_policy(tighter.project(space.wishes(chosen.choice)))
        cheaper, score = f"cheaper by {1 - 0.85**step:.0%}", job.data.task.about
        try:
            accuracy, _ = _short_finetune(job, candidate, build)
        except DivergedError as error:
            job.progress.note(f"{cheaper}: not good enough, its training diverges: {error}")
            break
        job.progress.note(f"{cheaper}: select-val {score.name} {score.text(accuracy)} (wanted {score.text(wanted)})")
        if accuracy < wanted:
            break
        policy = candidate
    return policy
