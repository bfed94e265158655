"""What an engineer would use otherwise, on the same baseline, data and fine-tuning: cut by Torch-Pruning, quantised after training.

Torch-Pruning 1.6 (Fang et al. 2023) cuts by group magnitude, the same share of every layer or one threshold for all; network
slimming (Liu et al. 2017) cuts by BatchNorm scales that a training with an L1 penalty made small. Each is fine-tuned as long as
ours is trained in all, then quantised to 8 bits by ONNX Runtime. NNCF quantises the unpruned network.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import numpy as np
import torch
from cells import Cell
from headline_lab import SHAPE, Lab
from torch import Tensor, nn

from edgecompress.exporters.runners import has_vnni
from edgecompress.finetune import TrainSettings

SHARES = (0.07, 0.14, 0.28)  # of the parameters that are left: where no loss begins is not known beforehand
SLIMMING = 1e-4  # weight of the L1 penalty on BatchNorm scales (Liu et al. 2017, section 4.3)
SLIMMING_RATE = 0.02
ROUND_TO = 8  # channels; the same as our targets' divisor
CALIBRATION = 500
METHODS = ("torch-pruning-uniform", "torch-pruning-global", "slimming", "nncf", "quantize_static")


def peer(lab: Lab, method: str, share: float, seed: int) -> Cell:
    """One peer's integer file. ``share`` of the parameters is left; of no meaning for those that do not prune."""
    start = time.monotonic()
    title = f"{method}-{share}-{seed}"
    if method in ("nncf", "quantize_static"):
        # What is quantised is the tuned original: the best float network there is.
        model = lab.tuned(copy.deepcopy(lab.baseline), "original", seed)
    else:
        model = lab.tuned(cut(lab, method, share, seed), title, seed)
    tuned = time.monotonic() - start
    path = lab.float_file(model, f"{title}-float")
    quantised, how = _with_nncf(lab, path) if method == "nncf" else _with_onnxruntime(lab, path)
    seconds = {"tune": tuned, "quantise": time.monotonic() - start - tuned}
    cell = lab.cell(quantised, lab.cost_of(model, 8), seconds) | {"quantised": how}
    return cell | {"float_test": round(lab.accuracy(path), 3), "bits": 8.0}


def cut(lab: Lab, method: str, share: float, seed: int) -> nn.Module:
    """The baseline with the largest network that has at most ``share`` of its parameters."""
    import torch_pruning

    if method == "slimming":
        start, importance = _slim(lab, seed), torch_pruning.importance.BNScaleImportance()
    else:
        start, importance = lab.baseline, torch_pruning.importance.GroupMagnitudeImportance(p=2)
    limit = share * sum(value.numel() for value in start.parameters())

    def at(ratio: float) -> nn.Module:
        model = copy.deepcopy(start)
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
        torch_pruning.pruner.MagnitudePruner(
            model, torch.zeros(1, *SHAPE), importance=importance, pruning_ratio=ratio, ignored_layers=last,
            global_pruning=method != "torch-pruning-uniform", max_pruning_ratio=0.95, round_to=ROUND_TO,
        ).step()  # fmt: skip
        return model

    low, high = 0.0, 0.95
    for _ in range(12):
        middle = (low + high) / 2
        fits = sum(value.numel() for value in at(middle).parameters()) <= limit
        low, high = (low, middle) if fits else (middle, high)
    return at(high)


def _slim(lab: Lab, seed: int) -> nn.Module:
    """The baseline after as many epochs as the fine-tuning, its BatchNorm scales pulled to zero."""
    model = copy.deepcopy(lab.baseline)
    scales = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    def penalty(progress: float) -> Tensor:
        return SLIMMING * torch.stack([scale.abs().sum() for scale in scales]).sum()

    settings = TrainSettings(
        epochs=lab.effort.tune_epochs, learning_rate=SLIMMING_RATE, batch_size=128, distill=0.0, seed=seed
    )
    return lab.trained(model, f"slimmed-{seed}", settings, penalty=penalty)


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
        raise SystemExit("NNCF is not installed: pip install -e '.[peers]' -c constraints.txt") from error
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
