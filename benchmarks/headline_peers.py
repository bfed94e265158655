"""What an engineer would use otherwise, on the same baseline, data and epochs: cut by Torch-Pruning, quantised after training.

Torch-Pruning 1.6 (Fang et al. 2023) cuts by group magnitude, the same share of every layer or one threshold for all; network
slimming (Liu et al. 2017) cuts by BatchNorm scales that a training with an L1 penalty made small. Each is trained as many epochs
as ours in all, then quantised to 8 bits by ONNX Runtime and by NNCF; so is the unpruned network.
"""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from cells import Cell
from headline_lab import SHAPE, Lab, divisor_of, tuned_title
from headline_plan import Job
from torch import Tensor, nn

from edgecompress.errors import MissingBackendError
from edgecompress.exporters.runners import has_vnni
from edgecompress.finetune import TrainSettings
from edgecompress.spec import parse_budgets

# The L1 penalty of Liu et al. 2017 (section 4.2): its weight for VGG and for residual networks, and the sum of the rates of their
# 160 epochs of 782 steps: 0.1, a tenth of it from the half and a hundredth from three quarters on.
LIU_WEIGHT = {"vgg": 1e-4, "resnet": 1e-5}
LIU_RATES = 782 * (80 * 0.1 + 40 * 0.01 + 40 * 0.001)
SLIMMING_RATE = 0.02
CALIBRATION = 500


def peer(lab: Lab, job: Job) -> Cell:
    """One peer's integer file."""
    pruner, _, quantiser = job.method.partition("+")
    if pruner == "tuned":
        # The best float network there is.
        title, start = tuned_title(job.seed), f"tuned/{job.seed}"
        model = lab.tuned(copy.deepcopy(lab.baseline), title, job.seed)
        seconds = {"training": lab.seconds(title)}
    else:
        title, start = f"{pruner}@{job.budget}-{job.seed}", "original/0"
        model, seconds = _pruned(lab, pruner, job, title)
    began = time.monotonic()
    path = lab.float_file(model, f"{title}-float")
    quantised, how = (_with_nncf if quantiser == "nncf" else _with_onnxruntime)(lab, path)
    seconds["quantisation"] = time.monotonic() - began
    return lab.cell(quantised, lab.cost_of(model, 8), seconds) | {
        "quantised": how,
        "starts_from": start,
        "float_test": round(lab.accuracy(path), 3),
        "bits": 8.0,
    }


def slimming_epochs(tune_epochs: int) -> int:
    """Network slimming's training under its penalty: the first half of the epochs that everyone has."""
    return tune_epochs // 2


def _pruned(lab: Lab, pruner: str, job: Job, title: str) -> tuple[nn.Module, dict[str, float]]:
    """The baseline cut and fine-tuned, and the seconds of every training that this took, shared ones too."""
    epochs = lab.network.effort.tune_epochs
    if pruner != "slimming":
        model = lab.tuned(cut(lab, lab.baseline, pruner, job.budget), title, job.seed)
        return model, {"training": lab.seconds(title)}
    first = slimming_epochs(epochs)
    slimmed, shared = _slimmed(lab, job.seed, first)
    model = lab.tuned(cut(lab, slimmed, pruner, job.budget), title, job.seed, epochs - first)
    return model, {"training": lab.seconds(shared) + lab.seconds(title)}


def cut(lab: Lab, start: nn.Module, pruner: str, budget: str) -> nn.Module:
    """The largest network that Torch-Pruning cuts out of ``start`` within ``budget``.

    Raises:
        ValueError: it finds none.
    """
    import torch_pruning

    (limit,) = parse_budgets(budget)
    most = limit.absolute(lab.cost_of(start).metric(limit.metric))
    kinds = torch_pruning.importance
    importance = kinds.BNScaleImportance() if pruner == "slimming" else kinds.GroupMagnitudeImportance(p=2)

    def at(ratio: float) -> nn.Module:
        model = copy.deepcopy(start)
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
        torch_pruning.pruner.MagnitudePruner(
            model, torch.zeros(1, *SHAPE), importance=importance, pruning_ratio=ratio, ignored_layers=last,
            global_pruning=pruner != "torch-pruning-uniform", max_pruning_ratio=0.95, round_to=divisor_of(lab.network),
        ).step()  # fmt: skip
        return model

    def fits(model: nn.Module) -> bool:
        return lab.cost_of(model).metric(limit.metric) <= most

    low, high = 0.0, 0.95
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    if not fits(found := at(high)):
        raise ValueError(
            f"{pruner} cuts nothing within {budget} out of {lab.network.name}; raise its share in headline_plan.py"
        )
    return found


def _slimmed(lab: Lab, seed: int, epochs: int) -> tuple[nn.Module, str]:
    """The baseline after a training that pulls its BatchNorm scales to zero, and the training's title; all shares begin here."""
    model, title = copy.deepcopy(lab.baseline), f"slimmed-{seed}"
    scales = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    settings = TrainSettings(epochs=epochs, learning_rate=SLIMMING_RATE, batch_size=128, distill=0.0, seed=seed)
    family = "vgg" if lab.network.name.startswith("vgg") else "resnet"
    strength = slimming_strength(family, settings, len(lab.data.train))

    def penalty(progress: float) -> Tensor:
        return strength * torch.stack([scale.abs().sum() for scale in scales]).sum()

    return lab.trained(model, title, settings, penalty=penalty), title


def slimming_strength(family: str, settings: TrainSettings, images: int) -> float:
    """The weight of the penalty that pulls a scale as far as Liu's does in all: weight x sum of rates / (1 - momentum).

    Theirs comes to 6.6 for VGG. This training is far shorter: with their weight nothing would become small. The momentum is the
    same, and the mean of the schedule's rates about half their peak.
    """
    rates = settings.epochs * math.ceil(images / settings.batch_size) * settings.learning_rate / 2
    return LIU_WEIGHT[family] * LIU_RATES / rates


def _with_onnxruntime(lab: Lab, path: Path) -> tuple[Path, str]:
    """ONNX Runtime's own quantiser, QDQ and one scale per output channel; of its ways to set ranges the best on select-val.

    Weights have 7 bits where 8 would saturate on this CPU, as its documentation says.
    """
    import logging

    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(_calibration(lab))

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"input": image[None]}

    logging.getLogger().setLevel(logging.ERROR)
    tried: list[tuple[float, Path, str]] = []
    for how in (CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile):
        candidate = path.with_name(path.name.replace("-float.onnx", f"-{how.name}.onnx"))
        quantize_static(
            path, candidate, Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, per_channel=True, reduce_range=not has_vnni(), calibrate_method=how,
        )  # fmt: skip
        tried.append((lab.accuracy(candidate, lab.data.select_val), candidate, how.name))
    _, best, name = max(tried, key=lambda one: one[0])
    return best, f"onnxruntime.quantization, {name}"


def _with_nncf(lab: Lab, path: Path) -> tuple[Path, str]:
    """NNCF's post-training quantisation for CPUs, with its fast bias correction: the other one failed on these graphs (3.4)."""
    try:
        import nncf
    except ImportError as error:
        raise MissingBackendError(
            "NNCF is not installed, which this cell needs. Run: pip install -e '.[peers]' -c constraints.txt"
        ) from error
    import onnx

    images = nncf.Dataset([{"input": image[None]} for image in _calibration(lab)])
    quantised = nncf.quantize(
        onnx.load(path), images, preset=nncf.QuantizationPreset.MIXED, target_device=nncf.TargetDevice.CPU,
        subset_size=CALIBRATION,
    )  # fmt: skip
    result = path.with_name(path.name.replace("-float.onnx", "-nncf.onnx"))
    onnx.save(quantised, result)
    return result, f"nncf {nncf.__version__}"


def _calibration(lab: Lab) -> np.ndarray:
    images: np.ndarray = lab.data.normalise(lab.data.calibration.images[:CALIBRATION]).numpy()
    return images
