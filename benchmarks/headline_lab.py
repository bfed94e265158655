"""The networks of the headline: their data, baselines, the equally tuned original, our compressed files, and what a file is worth.

Everything that takes long is kept under build/headline and goes on where it was broken off.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cifar10
import numpy as np
import torch
from cells import Cell
from harness import ROOT
from torch import nn

from edgecompress.cost import count
from edgecompress.data import Dataset, Split
from edgecompress.exporters import to_onnx
from edgecompress.exporters.runners import OnnxRuntimeRunner, has_vnni, run_all
from edgecompress.files import write_bytes
from edgecompress.finetune import TrainSettings, trained_once
from edgecompress.graph import build_graph
from edgecompress.models import build_model
from edgecompress.report_latency import at_bits
from edgecompress.spec import CompressionPolicy, Cost
from edgecompress.trace import trace

FOLDER = ROOT / "build" / "headline"
TARGET = "x86" if has_vnni() else "x86-avx2"
BUDGETS = {
    "vgg19_bn_cifar": "params=0.074x,flops=0.2x,size=0.8MB",
    "vgg16_bn_cifar": "params=0.1x,flops=0.2x,size=0.8MB",
    "resnet56": "flops=0.5x,size=0.125x",
}
CHECKPOINTS = ("resnet20", "resnet56")  # trained already; ResNet-56 has seen every training image
SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Effort:
    """How much training and search a run of this benchmark spends; cells of another effort are other cells.

    train_epochs: of a baseline. tune_epochs: of every network afterwards, ours and the peers': recovery plus
    quantisation-aware training together. train_images: of the 45,000. episodes: of each of our two stages.
    """

    train_epochs: int = 60
    tune_epochs: int = 24
    train_images: int = 45_000
    episodes: int = 100

    @property
    def qat_epochs(self) -> int:
        """A third of the tuning goes to quantisation-aware training."""
        return max(self.tune_epochs // 3, 1)

    def __str__(self) -> str:
        return f"{self.train_epochs}-{self.tune_epochs}x{self.train_images}-{self.episodes}"


@dataclass(frozen=True)
class Lab:
    """One network at one effort.

    share: below 1 takes fewer images to choose and to test with, for a quick run. root: where everything is kept.
    """

    name: str
    effort: Effort
    share: float = 1.0
    root: Path = FOLDER

    @cached_property
    def data(self) -> Dataset:
        """45,000 images to train on, 2,500 held-out ones for the search and 2,500 to choose with, and the test images."""
        base = cifar10.dataset(self.effort.train_images)
        held = cifar10.held_out_rows()
        half = round(2500 * self.share)
        test = np.arange(0, len(cifar10.images("test")[1]), round(1 / self.share))
        return Dataset(
            name=base.name, classes=base.classes, preprocessing=base.preprocessing, augmentation="crop_flip",
            train=base.train, calibration=base.calibration,
            search_val=cifar10.part("train", held[:half]), select_val=cifar10.part("train", held[half : 2 * half]),
            test=cifar10.part("test", test),
        )  # fmt: skip

    @cached_property
    def folder(self) -> Path:
        """Networks, runs and files of this effort."""
        return self.root / str(self.effort) / self.name

    @cached_property
    def baseline(self) -> nn.Module:
        """The trained network that everything starts from."""
        if self.name in CHECKPOINTS:
            return cifar10.network(self.name)
        torch.manual_seed(0)
        settings = TrainSettings(epochs=self.effort.train_epochs, learning_rate=0.1, batch_size=128, distill=0.0)
        return self.trained(build_model(self.name, 10), "baseline", settings)

    def trained(
        self, model: nn.Module, title: str, settings: TrainSettings, teacher: nn.Module | None = None, **how: Any
    ) -> nn.Module:
        """``model`` after a training that is done once and goes on where it was broken off."""
        path = self.folder / "networks" / f"{title}.safetensors"
        return trained_once(model, path, self.data, settings, teacher=teacher, on_epoch=_telling(title), **how)

    def tuning(self, seed: int) -> TrainSettings:
        """The fine-tuning that every network gets: the original, and the peers after their cuts."""
        return TrainSettings(epochs=self.effort.tune_epochs, learning_rate=0.02, batch_size=128, seed=seed)

    def tuned(self, model: nn.Module, title: str, seed: int) -> nn.Module:
        """``model`` after that fine-tuning, with the baseline's answers distilled."""
        return self.trained(model, f"{title}-{seed}", self.tuning(seed), copy.deepcopy(self.baseline))

    def float_file(self, model: nn.Module, title: str) -> Path:
        """The network as float ONNX, BatchNorm folded."""
        path = self.folder / "files" / f"{title}.onnx"
        graph = build_graph(copy.deepcopy(model).eval(), SHAPE, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, to_onnx.float_model(graph).SerializeToString())
        return path

    def cost_of(self, model: nn.Module, bits: int = 32) -> Cost:
        """Parameters, MACs and BOPs of a network, all of its layers at ``bits``."""
        network = trace(copy.deepcopy(model).eval(), SHAPE, self.name).network
        return count(network, at_bits(network, CompressionPolicy(model=self.name), bits))

    def accuracy(self, path: Path, split: Split | None = None) -> float:
        """Percent of the test images that a file answers rightly in ONNX Runtime."""
        split = split or self.data.test
        runner = OnnxRuntimeRunner(path, threads=os.cpu_count() or 1)
        answers = run_all(runner, self.data.normalise(split.images).numpy())
        return 100 * float((answers.argmax(1) == split.labels.numpy()).mean())

    def cell(self, path: Path, cost: Cost, seconds: dict[str, float]) -> Cell:
        """What one file comes to."""
        return {
            "file": str(path.relative_to(self.folder)),
            "test": round(self.accuracy(path), 3),
            "params": cost.params,
            "macs": cost.macs,
            "bops": cost.bops,
            "bytes": path.stat().st_size,
            "hours": {what: round(value / 3600, 4) for what, value in seconds.items()},
        }


def original(lab: Lab) -> Cell:
    """The untouched baseline's float file."""
    start = time.monotonic()
    model = lab.baseline
    trained = time.monotonic() - start
    return lab.cell(lab.float_file(model, "original"), lab.cost_of(model), {"train": trained})


def tuned_original(lab: Lab, seed: int) -> Cell:
    """The unpruned network with the same fine-tuning: what 'no loss' is measured against."""
    start = time.monotonic()
    model = lab.tuned(copy.deepcopy(lab.baseline), "original", seed)
    path = lab.float_file(model, f"original-tuned-{seed}")
    return lab.cell(path, lab.cost_of(model), {"tune": time.monotonic() - start})


def ours(lab: Lab, seed: int, agent: str = "ddpg", budget: str | None = None) -> Cell:
    """Both stages, the export and its proof, by the public call. Resumes a run that was broken off."""
    from edgecompress import compress

    title = f"ours-{agent}-{seed}" + ("" if budget is None else f"-{budget}".replace(",", "-"))
    effort = lab.effort
    run = compress(
        lab.baseline, lab.data, TARGET, budget or BUDGETS[lab.name], name=title, runs=lab.folder / "runs",
        resume=(lab.folder / "runs" / title / "config.json").exists(), agent=agent, episodes=effort.episodes,
        finetune_epochs=max(effort.tune_epochs - effort.qat_epochs, 1), qat_epochs=effort.qat_epochs,
        batch_size=128, seed=seed,
    )  # fmt: skip
    report = run.report
    path = lab.folder / "files" / f"{title}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (run.path / "exports" / report.compressed.file).read_bytes())
    cell = lab.cell(path, report.compressed.cost, dict(report.seconds))
    return cell | {
        "bits": round(report.compressed.average_weight_bits, 3),
        "arms": report.found_by,
        "goals": {goal.goal: goal.holds for goal in report.goals},
        "policy": json.loads((run.path / "policy.json").read_text()),
    }


def _telling(title: str) -> Callable[[int, int, float], None]:
    def tell(epoch: int, epochs: int, loss: float) -> None:
        print(f"     {title}: epoch {epoch} of {epochs}, loss {loss:.4f}", flush=True)

    return tell
