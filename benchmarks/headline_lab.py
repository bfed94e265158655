"""The networks of the headline: their data, baselines, the equally tuned original, our compressed files, and what a file is worth.

Everything that takes long is kept under build/headline and goes on where it was broken off.
"""

from __future__ import annotations

import copy
import json
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cifar10
import numpy as np
import torch
from cells import Cell, claimed
from harness import ROOT, commit
from headline_plan import Job, Network
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgecompress.cost import count
from edgecompress.data import Dataset, Split
from edgecompress.devices import device_by_name, device_title
from edgecompress.exporters import to_onnx
from edgecompress.exporters.runners import OnnxRuntimeRunner, has_vnni, run_all
from edgecompress.files import write_bytes, write_text, written_whole
from edgecompress.finetune import TrainSettings, trained_once
from edgecompress.graph import build_graph
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.models import build_model
from edgecompress.progress import Silent
from edgecompress.report import provenance
from edgecompress.report_latency import at_bits
from edgecompress.spec import CompressionPolicy, Cost, Stage, Trial
from edgecompress.teacher import Teacher
from edgecompress.trace import trace
from edgecompress.training_state import precision_on

FOLDER = ROOT / "build" / "headline"
TARGET = "x86" if has_vnni() else "x86-avx2"
SHAPE = (3, 32, 32)
# Titles of a run's parts; all others are preparation and search, the finalists' short training too.
TRAINING = ("Fine-tune with distillation", "Fine-tune the remaining weights", "Quantisation-aware training")
PROOF, PREPARATION = "Export and verify", "preparation"


class BusyError(Exception):
    """Another process trains what a cell needs; the cell has to wait."""


class Stopwatch(Silent):
    """Seconds of every part of a long work and its peak of memory, in a file: they add up when it is broken off and goes on.

    They are written whenever something is finished. What a kill cuts off is not counted: it is done again.
    """

    def __init__(self, path: Path, title: str) -> None:
        self._path, self._title, self._part = path, title, PREPARATION
        self._last = time.monotonic()
        found = json.loads(path.read_text()) if path.exists() else {}
        self.seconds: dict[str, float] = found.get("seconds", {})
        self.peak_bytes: int = found.get("peak_bytes", 0)

    def tick(self, *, trained: bool = False) -> None:
        """What was done since the last time belongs to the part that is on; to a training only what ends with an epoch."""
        now = time.monotonic()
        part = self._part if trained or self._part not in TRAINING else PREPARATION
        self.seconds[part] = round(self.seconds.get(part, 0.0) + now - self._last, 3)
        self._last = now
        self.peak_bytes = max(self.peak_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        write_text(self._path, json.dumps({"seconds": self.seconds, "peak_bytes": self.peak_bytes}))

    def stage(self, title: str, total: int) -> None:
        self.tick()
        self._part = title
        print(f"     {self._title}: {title}", flush=True)

    def trial(self, stage: Stage, trial: Trial, best: Trial | None) -> None:
        self.tick()

    def epoch(self, epoch: int, epochs: int, loss: float) -> None:
        self.tick(trained=True)
        print(f"     {self._title}: epoch {epoch} of {epochs}, loss {loss:.4f}", flush=True)

    def step(self, done: int, total: int) -> None:
        self.tick()

    def note(self, text: str) -> None:
        print(f"     {self._title}: {text}", flush=True)


def search_and_training(seconds: Mapping[str, float]) -> dict[str, float]:
    """The parts of one of our runs, as the page shows them."""
    training = sum(seconds.get(part, 0.0) for part in TRAINING)
    proof = seconds.get(PROOF, 0.0)
    return {"search": sum(seconds.values()) - training - proof, "training": training, "proof": proof}


def where(model: nn.Module | None = None, threads: int | None = None) -> dict[str, str]:
    """On what this process computes a cell, and in which precision it trains ``model``."""
    device = device_by_name("auto" if model is not None else "cpu")
    found = provenance(threads or torch.get_num_threads()) | {"device": device_title(device), "commit": commit()}
    return found | ({} if model is None else {"precision": precision_on(device, "auto", model)})


@dataclass(frozen=True)
class Lab:
    """One network at its effort.

    share: below 1 takes fewer images to choose and to test with, for a quick run. root: where everything is kept.
    """

    network: Network
    share: float = 1.0
    root: Path = FOLDER

    @cached_property
    def data(self) -> Dataset:
        """45,000 images to train on, 2,500 held-out ones for the search and 2,500 to choose with, and the test images."""
        base = cifar10.dataset(self.network.effort.train_images)
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
        return self.root / self.network.name / self.network.effort.training

    @cached_property
    def baseline(self) -> nn.Module:
        """The trained network that everything starts from."""
        effort = self.network.effort
        if not effort.train_epochs:
            return cifar10.network(self.network.name)
        torch.manual_seed(0)
        settings = TrainSettings(epochs=effort.train_epochs, learning_rate=0.1, batch_size=128, distill=0.0)
        return self._trained(build_model(self.network.name, 10), self._baseline_file, settings)

    @property
    def _baseline_file(self) -> Path:
        return self.root / self.network.name / f"baseline-{self.network.effort.baseline}.safetensors"

    @property
    def baseline_seconds(self) -> float:
        """Of its training, over all processes that worked on it."""
        return _seconds(self._baseline_file)

    def trained(
        self, model: nn.Module, title: str, settings: TrainSettings, teacher: nn.Module | None = None, **how: Any
    ) -> nn.Module:
        """``model`` after a training that is done once and goes on where it was broken off.

        Raises:
            BusyError: another process is at it.
        """
        return self._trained(model, self._network_file(title), settings, teacher=teacher, **how)

    def _trained(self, model: nn.Module, path: Path, settings: TrainSettings, **how: Any) -> nn.Module:
        with claimed(path.with_suffix(".lock")) as mine:
            if not mine:
                raise BusyError(f"another process trains {path.stem}")
            data = self.data  # reading the images is no training
            watch = Stopwatch(path.with_suffix(".seconds.json"), path.stem)
            result = trained_once(model, path, data, settings, on_epoch=watch.epoch, **how)
        self.keep_answers()
        return result

    def _network_file(self, title: str) -> Path:
        return self.folder / "networks" / f"{title}.safetensors"

    def seconds(self, title: str) -> float:
        """Of the training of that title, over all processes that worked on it."""
        return _seconds(self._network_file(title))

    def tuned(self, model: nn.Module, title: str, seed: int, epochs: int | None = None) -> nn.Module:
        """``model`` after the fine-tuning that the original and the peers get, with the baseline's answers distilled.

        Args:
            epochs: those that an earlier training left over; by default all.
        """
        epochs = epochs or self.network.effort.tune_epochs
        settings = TrainSettings(epochs=epochs, learning_rate=0.02, batch_size=128, seed=seed)
        return self.trained(model, title, settings, Teacher(copy.deepcopy(self.baseline), self.answers))

    @cached_property
    def answers(self) -> dict[bytes, Tensor]:
        """The baseline's answers to the batches of all trainings here: those of one seed see the same ones (`Teacher`)."""
        if not self._answers_file.exists():
            return {}
        return {bytes.fromhex(key): value for key, value in load_file(self._answers_file).items()}

    def keep_answers(self) -> None:
        """In a file, beside those of other processes."""
        with claimed(self._answers_file.with_suffix(".lock")) as mine:
            if not mine:
                return  # the next training writes them
            known = load_file(self._answers_file) if self._answers_file.exists() else {}
            if self.answers.keys() <= {bytes.fromhex(key) for key in known}:
                return
            with written_whole(self._answers_file) as temporary:
                save_file(known | {key.hex(): value for key, value in self.answers.items()}, temporary)

    @property
    def _answers_file(self) -> Path:
        return self._baseline_file.with_name("answers.safetensors")

    def float_file(self, model: nn.Module, title: str) -> Path:
        """The network as float ONNX, BatchNorm folded."""
        path = self.folder / "files" / f"{title}.onnx"
        graph = build_graph(copy.deepcopy(model).eval(), SHAPE, self.network.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, to_onnx.float_model(graph).SerializeToString())
        return path

    def cost_of(self, model: nn.Module, bits: int = 32) -> Cost:
        """Parameters, MACs and BOPs of a network, all of its layers at ``bits``."""
        network = trace(copy.deepcopy(model).eval(), SHAPE, self.network.name).network
        return count(network, at_bits(network, CompressionPolicy(model=self.network.name), bits))

    def accuracy(self, path: Path, split: Split | None = None) -> float:
        """Percent of the test images that a file answers rightly in ONNX Runtime."""
        split = split or self.data.test
        runner = OnnxRuntimeRunner(path, threads=torch.get_num_threads())
        answers = run_all(runner, self.data.normalise(split.images).numpy())
        return 100 * float((answers.argmax(1) == split.labels.numpy()).mean())

    def cell(self, path: Path, cost: Cost, seconds: Mapping[str, float]) -> Cell:
        """What one file comes to."""
        return {
            "file": str(path.relative_to(self.folder)),
            "test": round(self.accuracy(path), 3),
            "params": cost.params,
            "nonzeros": cost.nonzeros,
            "macs": cost.macs,
            "bops": cost.bops,
            "bytes": path.stat().st_size,
            "hours": {what: round(value / 3600, 4) for what, value in seconds.items()},
            "effort": asdict(self.network.effort),
            "data": self.data.name,
            "where": where(self.baseline),
        }


def _seconds(path: Path) -> float:
    return sum(Stopwatch(path.with_suffix(".seconds.json"), path.stem).seconds.values())


def divisor_of(network: Network) -> int:
    """Channels in whose steps widths come, ours and the peers'."""
    return network.divisor or target_by_name(TARGET).divisor


def tuned_title(seed: int) -> str:
    """Of the unpruned network after the same fine-tuning."""
    return f"original-tuned-{seed}"


def original(lab: Lab) -> Cell:
    """The untouched baseline's float file."""
    path = lab.float_file(lab.baseline, "original")
    return lab.cell(path, lab.cost_of(lab.baseline), {"training": lab.baseline_seconds})


def tuned_original(lab: Lab, seed: int) -> Cell:
    """The unpruned network with the same fine-tuning: what 'no loss' is measured against."""
    title = tuned_title(seed)
    model = lab.tuned(copy.deepcopy(lab.baseline), title, seed)
    return lab.cell(lab.float_file(model, title), lab.cost_of(model), {"training": lab.seconds(title)})


def run_folder(lab: Lab, job: Job) -> Path:
    """Where our run of a cell lies."""
    return lab.folder / "runs" / lab.network.effort.search / job.file.replace("/", "-")


def ours(lab: Lab, job: Job) -> Cell:
    """Both stages, the export and its proof, by the public call. Resumes a run that was broken off."""
    from edgecompress import compress

    folder, epochs = run_folder(lab, job), lab.network.epochs
    watch = Stopwatch(folder.with_name(f"{folder.name}.seconds.json"), f"{lab.network.name}, {job.file}")
    # Its trainings see the batches of the tuned network of the same seed, to which the teacher's answers are known.
    with patch("edgecompress.job.Teacher", partial(Teacher, kept=lab.answers)):
        run = compress(
            lab.baseline, lab.data, TARGET, job.budget, name=folder.name, runs=folder.parent, progress=watch,
            resume=(folder / "config.json").exists(), agent=job.method.removeprefix("ours-") if job.kind == "agents" else "ddpg",
            episodes=lab.network.effort.episodes, single_weights=False, divisor=lab.network.divisor,
            finetune_epochs=epochs["finetune"], qat_epochs=epochs["qat"], batch_size=128, seed=job.seed,
            threads=torch.get_num_threads(),
        )  # fmt: skip
    lab.keep_answers()
    watch.tick()
    report = run.report
    path = lab.folder / "files" / lab.network.effort.search / f"{folder.name}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (run.path / "exports" / report.compressed.file).read_bytes())
    cost = report.compressed.cost
    return lab.cell(path, cost, search_and_training(watch.seconds)) | {
        "bits": round(report.compressed.average_weight_bits, 3),
        "arms": report.found_by,
        "goals": {goal.goal: goal.holds for goal in report.goals},
        "policy": json.loads((run.path / "policy.json").read_text()),
    }
