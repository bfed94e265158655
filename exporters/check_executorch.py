"""The proof of an ExecuTorch program: it answers what it should, or, where that cannot be seen, each of its operators does."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgecompress.errors import BadFileError, GoalMissedError
from edgecompress.exporters import to_executorch
from edgecompress.exporters.more_runners import ExecuTorchRunner
from edgecompress.exporters.operator_proof import (
    IMAGES_FOR_OPERATORS,
    Difference,
    Seen,
    operator_differences,
    require_operators,
)
from edgecompress.exporters.runners import OnnxRuntimeRunner, run_all
from edgecompress.exporters.verify import Checks, Images, agreement, relative_error
from edgecompress.quantize import QuantizedGraph, TensorRange

SELDOM = Difference(1, 0.01)  # measured: one step at 1e-4 of the values of an addition
FLOAT_ERROR, INTEGER_ERROR = 1e-3, 0.1
AGREES = 0.9


def check_float_program(data: bytes, model: bytes, images: Images, *, class_scores: bool = True) -> Checks:
    """A program of floats answers what the ONNX file ``model`` does."""
    checks, wanted = Checks(), run_all(OnnxRuntimeRunner(model), images)
    found = checks.outputs = run_all(_loaded(data), images)
    error = relative_error(found, wanted)
    same = agreement(found, wanted, class_scores=class_scores)
    checks.require(error < FLOAT_ERROR, "executorch_error", error, f"ExecuTorch's outputs differ by {error:.1%}")
    checks.require(same >= AGREES, "executorch_agreement", same, f"only {same:.1%} of ExecuTorch's answers are right")
    return checks


def check_integer_program(
    data: bytes,
    quantized: QuantizedGraph,
    scores: TensorRange,
    images: Images,
    exact: NDArray[np.float32],
    *,
    class_scores: bool = True,
) -> Checks:
    """A program of integers answers what the emulator does (``exact``), which says nothing of a network that is not trained:
    there one rounding in ten thousand grows. Where its answers differ, a second program shows all values, answers as the
    first does, and every operator must be right for the inputs that it got.

    Lowering a second program takes as long as the first did, so that it is left out where the answers suffice.
    """
    checks, runner = Checks(), _loaded(data)
    found = checks.outputs = run_all(runner, images)
    error, agrees = relative_error(found, exact), agreement(found, exact, class_scores=class_scores)
    checks.values |= {"executorch_error": error, "executorch_agreement": agrees}
    if error < INTEGER_ERROR and agrees >= AGREES:
        return checks
    network = to_executorch.IntegerNetwork(quantized, scores, show=True)
    showing = _loaded(to_executorch.program(network, torch.from_numpy(images[:1]))[0])
    some = images[:IMAGES_FOR_OPERATORS]
    same = np.array_equal(run_all(showing, some), run_all(runner, some))
    checks.require(
        same, "shown_program_agrees", same,
        "the program that shows its values answers otherwise: its operators prove nothing",
    )  # fmt: skip
    runs = _runs(showing, network.shown, some)
    step, (low, high) = network.scores.scale, (-128, 127) if network.scores.signed else (0, 255)
    differences = operator_differences(quantized, runs, step, (low * step, high * step))
    require_operators(checks, quantized, differences, lambda name: SELDOM)
    return checks


def _runs(
    runner: ExecuTorchRunner, names: list[str], images: Images
) -> Iterator[tuple[Images, Seen, NDArray[np.float32]]]:
    """Image by image, with the values that the program holds: s8 there, which are 128 less than the emulator's u8."""
    for image in images:
        outputs, *values = runner.run_whole(image[None])
        held = {name: value.astype(np.int32) + 128 for name, value in zip(names, values, strict=True)}
        yield image[None], held.get, outputs


def _loaded(data: bytes) -> ExecuTorchRunner:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pte"
        path.write_bytes(data)
        try:
            return ExecuTorchRunner(path)
        except BadFileError as error:
            raise GoalMissedError(
                f"ExecuTorch lowered the network to a program that it does not load itself: {error.__cause__}. Nothing was "
                "written; report it with the run folder."
            ) from error
