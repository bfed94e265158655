"""Any artifact on any data: the score of its task, time, throughput, memory; two of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgecompress.data import Dataset, Split
from edgecompress.errors import BadDataError, BadModelError
from edgecompress.exporters.artifacts import Opened, open_artifact
from edgecompress.exporters.interface import Interface
from edgecompress.exporters.memory import measured_memory
from edgecompress.exporters.runners import OnnxRuntimeRunner, measure_latency_us, run_all
from edgecompress.exporters.verify import agreement
from edgecompress.imports import place_of
from edgecompress.report_spec import Score
from edgecompress.runs import ORIGINAL
from edgecompress.shipped import SHIPPED, cards
from edgecompress.spec import Preprocessing

_BATCH = 64  # images at once while the score is measured
Answers = NDArray[Any]  # classes of images [N] or pixels [N, H, W]; where outputs are no class scores, the outputs


@dataclass(frozen=True)
class Evaluation:
    """One file as measured on this machine. Times are of one batch, in microseconds; None where they would mislead.

    ``accuracy`` is what ``score`` says it is. ``size_bytes`` is that of the file and of those beside it that hold its weights.
    Memory is that of a fresh process, on top of the runtime's own; None where the runtime is not ONNX Runtime.
    """

    file: str
    size_bytes: int
    runtime: str
    data: str
    images: int
    score: Score
    accuracy: float
    threads: int
    batch: int
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    p99_us: float | None = None
    images_per_second: float | None = None
    load_peak_bytes: int | None = None
    run_peak_bytes: int | None = None

    @property
    def row(self) -> dict[str, Any]:
        """Plain values, for CSV and JSON; the score is its name."""
        return {**vars(self), "score": self.score.name}


def artifact_at(path: Path) -> Path:
    """The file that ``path`` means: itself, or the integer file (else the float one) of a run folder or a shipped network."""
    if str(path) in cards() and not path.exists():
        path = SHIPPED / path
    if not path.is_dir():
        return path
    files = (path / "exports" / name for name in ("model.int8.onnx", "model.onnx"))
    return next((file for file in files if file.exists()), path / "exports")


def evaluate_files(
    paths: Sequence[Path],
    read: Callable[[Preprocessing | None], Dataset],
    *,
    threads: int = 1,
    batch: int = 1,
    runtime: str = "",
) -> list[tuple[Evaluation, Answers]]:
    """Each of ``paths`` on the same images, prepared as that file says; one that says nothing gets what the first other says.

    Without labels the score is agreement with ``original.onnx``, which lies in the folder of a file or the one above.

    Args:
        read: loads the data; None stands for what the images themselves suggest.

    Raises:
        BadDataError: there are no labels and no original. Also see `evaluate_artifact`.
    """
    files = [artifact_at(path) for path in paths]
    # What cannot be opened is said before the data is read.
    said = [open_artifact(file, threads=threads, runtime=runtime).preprocessing for file in files]
    usual, once = next((how for how in said if how is not None), None), cache(read)
    found = []
    for file, how in zip(files, said, strict=True):
        data = once(how or usual)
        if not data.labelled:
            data = _as_original_says(data, [file, *files])
        found.append(evaluate_artifact(file, data, threads=threads, batch=batch, runtime=runtime))
    return found


def _as_original_says(data: Dataset, files: Sequence[Path]) -> Dataset:
    """``data`` with an original file's answers as the labels of its test split."""
    places = (folder / ORIGINAL for file in files for folder in (file.parent, file.parent.parent))
    original = next((place for place in places if place.exists()), None)
    if original is None:
        raise BadDataError(
            f"{data.name} has no labels, and there is no {ORIGINAL} beside {files[0]} to agree with. Evaluate the file in its "
            "run folder, or give data with labels."
        )
    answers = scored(original, open_artifact(original), data)[1]
    return replace(data, test=Split(data.test.images, torch.from_numpy(answers)))


def evaluate_artifact(
    path: Path, data: Dataset, *, threads: int = 1, batch: int = 1, runtime: str = ""
) -> tuple[Evaluation, Answers]:
    """Measure an exported file on the test split; also returns what it answers to each image.

    Args:
        path: a file, or a run folder.
        batch: images per call while timing; a file of a fixed batch keeps its own.
        runtime: a key of `artifacts.RUNTIMES`; by default what the suffix says.

    Raises:
        BadFileError: it cannot be opened (see `artifacts.open_artifact`) or fails on the images. BadDataError,
        BadModelError: see `scored`.
    """
    path = artifact_at(path)
    opened = open_artifact(path, threads=threads, runtime=runtime)
    runner, interface = opened.runner, _interface(path, opened, data)
    score, answers = scored(path, opened, data)
    size = runner.batch or batch
    found = Evaluation(
        file=str(path),
        size_bytes=sum(file.stat().st_size for file in (path, *opened.beside)),
        runtime=runner.runtime,
        data=data.name,
        images=len(data.test),
        score=data.task.about,
        accuracy=score,
        threads=threads,
        batch=size,
    )
    if opened.as_written:
        return found, answers
    images = data.normalise(data.test.images[:1]).numpy().repeat(size, 0)
    latency = measure_latency_us(runner, interface.images(images, data.preprocessing))
    memory: dict[str, int] = {}
    if isinstance(runner, OnnxRuntimeRunner):
        memory = measured_memory(path, batch=size)
    return (
        replace(
            found,
            median_us=latency["median_us"],
            p10_us=latency["p10_us"],
            p90_us=latency["p90_us"],
            p99_us=latency["p99_us"],
            images_per_second=size * 1e6 / latency["median_us"],
            load_peak_bytes=memory.get("load_peak_bytes"),
            run_peak_bytes=memory.get("run_peak_bytes"),
        ),
        answers,
    )


def _interface(path: Path, opened: Opened, data: Dataset) -> Interface:
    """How the file wants its images, from its own input; its shape must be that of the data."""
    shape, wanted = opened.runner.shape, tuple(data.test.images.shape[1:])
    pixels, kind = opened.pixels, "uint8" if opened.runner.dtype == np.uint8 else "float32"
    for layout, expected in (("nchw", wanted), ("nhwc", (*wanted[1:], wanted[0]))):
        if len(shape) == 3 and all(size in (0, want) for size, want in zip(shape, expected, strict=True)):
            return Interface(input=kind, layout=layout, pixels=pixels)  # type: ignore[arg-type]
    raise BadDataError(
        f"{path.name} takes images of shape {list(shape)}, {data.name} has {list(wanted)}. "
        f"Give --image-size {shape[-1] if len(shape) == 3 and shape[-1] != wanted[0] else shape[0] if shape else '?'} "
        "or the data it was made for."
    )


def scored(path: Path, opened: Opened, data: Dataset) -> tuple[float, Answers]:
    """The score (see `report_spec.Score`) of an opened file on the test split, and its answers.

    Raises:
        BadDataError: the file takes images of another shape. BadModelError: it does not answer what the task wants.
    """
    interface, task = _interface(path, opened, data), data.task
    measured, answers = [], []
    for x, labels in data.batches(data.test, _BATCH):
        outputs = run_all(opened.runner, interface.images(x.numpy(), data.preprocessing))
        _check_outputs(outputs, path.name, data)
        measured.append(_measured(outputs, labels, path.name, data))
        answers.append(outputs.argmax(1) if task.class_scores and not _are_classes(outputs, data) else outputs)
    return task.merit(measured), np.concatenate(answers)


def _are_classes(outputs: Answers, data: Dataset) -> bool:
    """Whether outputs are the numbers of classes, as behind an argmax."""
    return data.task.class_scores and np.issubdtype(outputs.dtype, np.integer)


def _fits(outputs: Answers, data: Dataset) -> bool:
    """Whether the task can read outputs: numbers of its rank, a score per class or more."""
    task = data.task
    if _are_classes(outputs, data):
        return task.outputs_rank in (None, outputs.ndim + 1)
    if outputs.dtype.kind not in "fiu" or task.outputs_rank not in (None, outputs.ndim):
        return False
    fewest = len(data.classes) if data.labelled else 1
    return not task.class_scores or (outputs.ndim > 1 and outputs.shape[1] >= fewest)


def _check_outputs(outputs: Answers, name: str, data: Dataset) -> None:
    """Refuse outputs that the task cannot read."""
    task, classes = data.task, len(data.classes)
    if _fits(outputs, data):
        return
    found = f"{outputs.dtype} {outputs.shape[1:]}"
    if not task.class_scores:
        rank = f" of {task.outputs_rank} dimensions" if task.outputs_rank else ""
        raise BadModelError(
            f"{name} gives {found} for one image; the task '{task.name}' wants one tensor of numbers{rank}. Give a file of the task."
        )
    wanted = f"({classes or 'classes'},)" if task.outputs_rank == 2 else f"({classes or 'classes'}, height, width)"
    raise BadModelError(
        f"{name} gives {found} for one image; {data.name} has {classes} classes, so expected scores {wanted} or class numbers "
        "behind an argmax. Give a file for these classes, or the --data that it was made for."
    )


def _measured(outputs: Answers, labels: Tensor, name: str, data: Dataset) -> Any:
    """What the task's score needs of one batch."""
    known = len(data.classes) if data.labelled else None
    try:
        scores = _one_hot(outputs, known) if _are_classes(outputs, data) else torch.from_numpy(outputs)
        return data.task.measure(scores, labels)
    except Exception as error:
        raise BadModelError(
            f"The task '{data.task.name}' cannot score what {name} gives for {len(outputs)} images, {outputs.shape[1:]}, with "
            f"labels {tuple(labels.shape[1:])}: {error}{place_of(error)}. Give a file and labels of the task."
        ) from error


def _one_hot(numbers: NDArray[Any], classes: int | None) -> Tensor:
    """Class numbers ``[N, ...]`` as scores ``[N, classes + 1, ...]``, where all numbers from ``classes`` on are the last.

    Args:
        classes: None stands for as many as the numbers need.
    """
    found = torch.from_numpy(numbers).long()
    scores = F.one_hot(found) if classes is None else F.one_hot(found.clamp(max=classes), classes + 1)
    return scores.movedim(-1, 1).float()


def compared(first: tuple[Evaluation, Answers], second: tuple[Evaluation, Answers]) -> dict[str, Any]:
    """``first`` against ``second``: how many times as fast, its share of the bytes, points of score, same answers.

    ``points`` are percent where the score is a share in [0, 1], else the score's own unit; more is better.
    """
    (a, mine), (b, other) = first, second
    classes = np.issubdtype(mine.dtype, np.integer)
    return {
        "speed": b.median_us / a.median_us if a.median_us and b.median_us else None,
        "size": a.size_bytes / b.size_bytes,
        "accuracy_points": (100 if a.score.percent else 1) * (a.accuracy - b.accuracy),
        "agreement": float((mine == other).mean()) if classes else agreement(mine, other, class_scores=False),
    }
