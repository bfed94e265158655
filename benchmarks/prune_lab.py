"""A CIFAR-10 checkpoint under pruning: its splits, cheap evaluations that every process shares, searches and fine-tuning."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cifar10
import numpy as np
import torch
from cells import Cell
from harness import RESULTS, ROOT
from torch import Tensor, nn

from edgecompress.agents import SB3_AGENTS
from edgecompress.channel_sensitivity import channel_sensitivities
from edgecompress.cost import CostModel, LatencyModel, count
from edgecompress.data import Dataset
from edgecompress.edges import with_edges
from edgecompress.episodes import RECALIBRATION_IMAGES, SEARCH_IMAGES, Batch, augmented
from edgecompress.fidelity import PRUNED, divergence
from edgecompress.finetune import TrainSettings, trained_once
from edgecompress.graph import build_graph
from edgecompress.importance import l2_importance
from edgecompress.prune import pruner, reestimate_on
from edgecompress.reward import accuracy_only
from edgecompress.scoring import Scorer, top
from edgecompress.search import SearchSettings, search, search_budgets
from edgecompress.spaces import Choice, Limit, Outcome, SearchSpace
from edgecompress.spec import CompressionPolicy, Cost, Target, Trial, parse_budgets
from edgecompress.stage_spaces import channel_space
from edgecompress.trace import Traced, trace

FOLDER = ROOT / "build" / "prune_cifar10"
TABLE = RESULTS / "prune_cifar10_table"
DIVISOR = 4
PARTS = {"search": SEARCH_IMAGES, "select": 2500, "again": 1500}  # of the 5,000 held-out images
BATCH = 100
EPISODES = 200
LEADERS = 10  # a search's best, measured again on `search` and `again` together before one is its final


def _top1(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(1) == labels).float().mean())


def code_version() -> str:
    """The commit that a cell was computed with."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


@dataclass(frozen=True)
class Lab:
    """One network and everything that its cells share. ``share`` below 1 takes fewer images, for a quick run."""

    name: str = "resnet20"
    share: float = 1.0

    @cached_property
    def model(self) -> nn.Module:
        """The checkpoint."""
        return cifar10.network(self.name)

    @cached_property
    def traced(self) -> Traced:
        """Its layers, channel groups, and what stands between the layers: all that `compress` prices."""
        found = trace(self.model, (3, 32, 32), self.name)
        return replace(found, network=with_edges(found.network, build_graph(self.model, (3, 32, 32), self.name)))

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """Importance of every channel, for all methods the same."""
        return l2_importance(self.model, self.traced)

    @cached_property
    def build(self) -> Callable[[CompressionPolicy], nn.Module]:
        """A policy's network as `compress` builds it: channels cut, the layers behind them refitted by least squares."""
        return pruner(self.model, self.traced, self.train_data)

    @cached_property
    def sensitivity(self) -> Mapping[str, float]:
        """What an agent that learns sees of every group, as in `compress`."""
        found = channel_sensitivities(self.model, self.traced, self.train_data).divergence
        return {group: math.log10(value + 1e-6) for group, value in found.items()}

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """Prunable groups, in the order of a choice."""
        return tuple(group.id for group in self.traced.network.prunable_groups)

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """Held-out images of each part: `search` has equally many of every class, the others what is left, shuffled."""
        held = cifar10.held_out_rows()
        labels = cifar10.images("train")[1][held]
        each = round(PARTS["search"] * self.share) // 10
        chosen = np.concatenate([held[labels == label][:each] for label in range(10)])
        chosen = np.random.default_rng(1).permutation(chosen)
        rest = held[~np.isin(held, chosen)]
        ends = [round(PARTS[name] * self.share) for name in ("select", "again")]
        return {"search": chosen, "select": rest[: ends[0]], "again": rest[ends[0] :][: ends[1]], "all": held}

    @cached_property
    def train_data(self) -> Dataset:
        """Images that BatchNorm statistics are taken from; never held-out ones."""
        return cifar10.dataset(10_000)

    @cached_property
    def statistics(self) -> list[Batch]:
        """What BatchNorm statistics are taken from: augmented images, drawn once, the same for every policy."""
        return list(augmented(self.train_data, round(RECALIBRATION_IMAGES * max(self.share, 0.2)), BATCH, seed=0))

    @cached_property
    def key(self) -> str:
        """What an evaluation depends on beside the policy, in twelve digits."""
        parts = {part: rows.tolist() for part, rows in self.rows.items()}
        digest = hashlib.sha256(json.dumps([parts, asdict(PRUNED)]).encode())
        # One pruned network stands for the checkpoint, the importance and the statistics that every policy gets.
        narrow = self.pruned(tuple(max(len(self.scores[group]) // 2, 1) for group in self.groups))
        for value in narrow.state_dict().values():
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def inputs(self, part: str) -> tuple[Tensor, Tensor]:
        """Images of a part, or of ``test``."""
        if part == "test":
            pixels, labels = cifar10.images("test")
            step = round(1 / self.share)  # they lie class by class
            return cifar10.normalised(pixels[::step]), torch.from_numpy(labels[::step])
        pixels, labels = cifar10.images("train")
        return cifar10.normalised(pixels[self.rows[part]]), torch.from_numpy(labels[self.rows[part]])

    def pruned(self, choice: Choice) -> nn.Module:
        """The smaller network as an episode of `compress` measures it: refitted, BatchNorm statistics taken anew."""
        model = self.build(
            CompressionPolicy(model=self.name, keep_channels=dict(zip(self.groups, choice, strict=True)))
        )
        model.to(memory_format=torch.channels_last)
        reestimate_on(model, self.statistics)
        return model.eval()

    def masked(self, choice: Choice) -> nn.Module:
        """The full-size network in which the same channels are zero, as a loop without a tracer evaluates it."""
        model = copy.deepcopy(self.model)
        lost = {
            group: set(range(len(self.scores[group]))) - set(torch.topk(self.scores[group], count).indices.tolist())
            for group, count in zip(self.groups, choice, strict=True)
        }
        modules = dict(model.named_modules())
        with torch.no_grad():
            for cut in self.traced.cuts:
                module = modules.get(cut.module)
                if cut.side != "out" or module is None or cut.group not in lost:
                    continue
                gone = [int(i) for c, i in zip(cut.channel, cut.index, strict=True) if int(c) in lost[cut.group]]
                for values in module.parameters(recurse=False):
                    values[gone] = 0
        model.to(memory_format=torch.channels_last)
        reestimate_on(model, self.statistics)
        return model.eval()

    def measure(self, model: nn.Module, part: str) -> Outcome:
        """Top-1 accuracy and cross-entropy of ``model``, and the accuracy that its divergence from the checkpoint lets expect."""
        x, labels = self._inputs_once(part)
        outputs = self.answers(model, x)
        accuracy, loss = _top1(outputs, labels), float(nn.functional.cross_entropy(outputs, labels))
        if part == "test":
            return Outcome(accuracy, loss)
        wanted = self._wanted(part)
        lost = divergence([wanted], [outputs], PRUNED.temperature)
        return Outcome(accuracy, loss, estimate=PRUNED.expected(_top1(wanted, labels), lost))

    def answers(self, model: nn.Module, x: Tensor) -> Tensor:
        """Scores of ``x [N, 3, 32, 32]``: ``[N, classes]``."""
        with torch.inference_mode():
            return torch.cat([model(batch) for batch in x.split(BATCH)])

    def _wanted(self, part: str) -> Tensor:
        """The checkpoint's answers."""
        kept: dict[str, Tensor] = self.__dict__.setdefault("_said", {})
        if part not in kept:
            original = copy.deepcopy(self.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            kept[part] = self.answers(original.eval(), self._inputs_once(part)[0])
        return kept[part]

    def _inputs_once(self, part: str) -> tuple[Tensor, Tensor]:
        kept: dict[str, tuple[Tensor, Tensor]] = self.__dict__.setdefault("_kept", {})
        if part not in kept:
            x, labels = self.inputs(part)
            kept[part] = x.contiguous(memory_format=torch.channels_last), labels
        return kept[part]

    @cached_property
    def evaluations(self) -> Evaluations:
        """The cache of all cells and processes."""
        folder = FOLDER if self.share == 1 else None
        return Evaluations(self, None if folder is None else folder / f"evaluations-{self.name}-{self.key}.jsonl")

    def cost_model(self, latency: LatencyModel | None) -> CostModel:
        """MACs, parameters, and latency in fp32 where there is a table."""
        return lambda policy: count(self.traced.network, policy, latency)

    def space(
        self, budget: str, latency: LatencyModel | None = None, *, sensitivities: bool = False
    ) -> tuple[SearchSpace, Cost]:
        """What may be chosen under a budget such as ``flops=0.5x``, and the original's cost.

        ``sensitivities``: whether the state holds them.
        """
        cost = self.cost_model(latency)
        original = cost(CompressionPolicy(model=self.name))
        limits = [Limit(b, b.absolute(original.metric(b.metric))) for b in parse_budgets(budget)]
        known = self.sensitivity.__getitem__ if sensitivities else None
        return channel_space(
            self.traced.network, _target(), cost, limits, original, DIVISOR, sensitivity=known
        ), original

    def final(self, trials: list[Trial], part: str = "search") -> Cell:
        """Of a search's `LEADERS` best the one that diverges least from the checkpoint on `search` and `again` together."""
        leaders = top(trials, LEADERS)
        again = {t.choice: self._on_both(t) if part == "search" else (t.believed, 100 * t.accuracy) for t in leaders}
        chosen = max(leaders, key=lambda trial: again[trial.choice])
        at = {
            str(n): round(100 * max((t.accuracy for t in trials if t.episode < n), default=0.0), 2)
            for n in (25, 50, 75, 100, 150, 200)
        }
        return {
            "choice": list(chosen.choice),
            "arm": chosen.arm,
            "search": round(100 * chosen.accuracy, 2),
            "again": round(again[chosen.choice][1], 3),
            "select": round(100 * self.evaluations(chosen.choice, "select").accuracy, 3),
            "macs": chosen.cost.macs,
            "latency_us": None if chosen.cost.latency_us is None else round(chosen.cost.latency_us, 2),
            "best_after": at,
            "leaders": [
                [list(t.choice), t.arm, round(100 * t.accuracy, 2), round(again[t.choice][1], 3)] for t in leaders
            ],
        }

    def _on_both(self, trial: Trial) -> tuple[float, float]:
        """What its divergence lets expect, and accuracy in percent, on `search` and `again` together."""
        counts = {part: len(self.rows[part]) for part in ("search", "again")}
        found = {part: self.evaluations(trial.choice, part) for part in counts}
        believed = sum(count * found[part].believed for part, count in counts.items()) / sum(counts.values())
        return believed, 100 * sum(count * found[part].accuracy for part, count in counts.items()) / sum(
            counts.values()
        )


def _target() -> Target:
    from edgecompress.latency_tables.targets import target_by_name

    return target_by_name("x86")


def latency_from_table() -> LatencyModel:
    """Predictions in fp32, on one thread, from the table that lies beside the results: whatever machine computes a cell, the
    latency it speaks of is that of the one machine which measured the table.

    `edgecompress profile --target x86 --model resnet20 --precision fp32 --out docs/benchmarks/prune_cifar10_table/` made it.
    """
    from edgecompress.latency_tables.predict import latency_model

    (table,) = TABLE.glob("*.csv")
    return latency_model(_target(), tables=table, require_measured=True, allow_mismatch=True)[0]


class Evaluations:
    """Accuracy of pruned networks by part and choice, remembered in a file that all processes append to."""

    def __init__(self, lab: Lab, path: Path | None) -> None:
        self._lab, self._path, self._read = lab, path, 0
        self._known: dict[tuple[str, Choice], Outcome] = {}
        self.computed = 0

    def __call__(self, choice: Choice, part: str = "search") -> Outcome:
        """How well a choice does on a part of the held-out images, before any fine-tuning."""
        key = part, tuple(int(width) for width in choice)
        if key not in self._known:
            self._catch_up()
        if key not in self._known:
            outcome = self._lab.measure(self._lab.pruned(key[1]), part)
            self.computed += 1
            self._known[key] = outcome
            self._append({"part": part, "choice": key[1], **asdict(outcome)})
        return self._known[key]

    def _catch_up(self) -> None:
        if self._path is None or not self._path.exists():
            return
        with self._path.open("rb") as stream:
            stream.seek(self._read)
            text = stream.read()
        whole = text[: text.rfind(b"\n") + 1]  # another process may be writing the last line
        self._read += len(whole)
        for line in whole.splitlines():
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut short when a run was killed
            self._known[row["part"], tuple(row["choice"])] = Outcome(
                row["accuracy"], row["loss"], estimate=row["estimate"]
            )

    def _append(self, row: dict[str, Any]) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, (json.dumps(row) + "\n").encode())
        finally:
            os.close(descriptor)


@contextmanager
def _counted() -> Iterator[list[int]]:
    """How often policies were asked for, repeats included."""
    asked = [0]
    original = Scorer.__call__

    def call(self: Scorer, choice: Choice, arm: str) -> Trial:
        asked[0] += 1
        return original(self, choice, arm)

    with patch.object(Scorer, "__call__", call):
        yield asked


def run_search(
    lab: Lab,
    method: str,
    budgets: tuple[str, ...],
    seed: int,
    *,
    episodes: int = EPISODES,
    latency: LatencyModel | None = None,
    part: str = "search",
) -> Cell:
    """One search with the reward of accuracy alone; several budgets are searched together.

    The best ten of each budget are measured again on the images of `search` and `again`; the one that diverges least from
    the checkpoint there is the final, and only that one meets `select`. A search on another part than `search` takes its own best.
    """
    built = [lab.space(budget, latency, sensitivities=method in SB3_AGENTS) for budget in budgets]
    original = built[0][1]
    spaces = [built[0][0], *(replace(built[0][0], limits=space.limits) for space, _ in built[1:])]
    settings = SearchSettings(stage="prune", agent=method, episodes=episodes, seed=seed)
    seen: list[Trial] = []
    before = lab.evaluations.computed

    def evaluate(policy: CompressionPolicy) -> Outcome:
        return lab.evaluations(tuple(policy.keep_channels[group] for group in lab.groups), part)

    def note(trial: Trial, leader: Trial | None) -> None:
        seen.append(trial)

    with _counted() as asked:
        if len(spaces) == 1:
            found = [search(spaces[0], evaluate, accuracy_only, original, settings, on_trial=note)]
        else:
            found = search_budgets(spaces, evaluate, accuracy_only, original, settings, on_trial=note)
    common = {
        "distinct": len(seen),
        "asked": asked[0],
        "computed": lab.evaluations.computed - before,
        "evaluations": lab.key,
        "code": code_version(),
    }
    finals = [lab.final(trials, part) for trials in found]
    if len(budgets) == 1:
        return finals[0] | common
    return {"finals": dict(zip(budgets, finals, strict=True))} | common


def fine_tuned(lab: Lab, choice: Choice | None, settings: TrainSettings, images: int) -> tuple[nn.Module, Path]:
    """A pruned network (None: the unpruned one) after its fine-tuning with distillation; goes on where it broke off."""
    title = "original" if choice is None else "-".join(map(str, choice))
    how = (
        f"{settings.epochs}x{images}-{settings.learning_rate}-{settings.batch_size}-{settings.distill}-{settings.seed}"
    )
    path = FOLDER / "networks" / f"{lab.name}-{lab.key}" / f"{title}-{how}.safetensors"
    model = copy.deepcopy(lab.model) if choice is None else lab.pruned(choice)
    model.to(memory_format=torch.channels_last)
    teacher = copy.deepcopy(lab.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return trained_once(model, path, cifar10.dataset(images), settings, teacher=teacher), path
