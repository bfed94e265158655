"""What a network is asked to do, as one frozen value: its loss, its score, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgecompress.errors import UnknownNameError, UsageError
from edgecompress.imports import imported, place_of
from edgecompress.report_spec import Score

IGNORED = 255  # the class of a pixel that does not count


def squared_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all outputs: how a network learns from another one when nothing is known of what they mean."""
    return (student - teacher).pow(2).mean()


@dataclass(frozen=True)
class Task:
    """A loss to train on and a score to choose by. Outputs are ``float32 [N, ...]``, labels are rows of `data.Split`.

    name: what ``--task`` says. score_name: what reports call the score, for example ``"mean IoU"``.
    loss: ``(outputs, labels, reduction)`` to a scalar; ``reduction`` is ``"mean"`` or ``"sum"`` over the images, as in
        torch.nn.functional.
    measure: ``(outputs, labels)`` of one batch to whatever ``score`` needs of it: counts, or the tensors themselves.
    score: what was measured of all batches of a split, in order, to one number.
    higher_is_better: otherwise the score is an error; everything then works with minus the score.
    percent: the score is a share in [0, 1].
    distill: ``(student, teacher)`` outputs to a scalar.
    note: a word that stands before the score's name where there is room, as in ``top-1`` accuracy.
    outputs_rank: dimensions of the outputs, batch included; None if any will do.
    class_scores: axis 1 of the outputs are scores of classes, so that two files can be compared by their largest.
    """

    name: str
    score_name: str
    loss: Callable[[Tensor, Tensor, str], Tensor]
    measure: Callable[[Tensor, Tensor], Any]
    score: Callable[[Sequence[Any]], float]
    higher_is_better: bool = True
    percent: bool = True
    distill: Callable[[Tensor, Tensor], Tensor] = squared_difference
    note: str = ""
    outputs_rank: int | None = None
    class_scores: bool = False

    def merit(self, measured: Sequence[Any]) -> float:
        """The score, turned so that more is better.

        Raises:
            UsageError: it is not a finite number.
        """
        value = float(self.score(measured))
        if not math.isfinite(value):
            raise UsageError(
                f"The score '{self.score_name}' of the task '{self.name}' is {value}; return a finite number."
            )
        return value if self.higher_is_better else -value

    @property
    def about(self) -> Score:
        """The score in words."""
        return Score(name=self.score_name, note=self.note, higher_is_better=self.higher_is_better, percent=self.percent)


# -------------------------------------------------------------------------------------------------- classification


def _cross_entropy(outputs: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction=reduction)


def _hits(outputs: Tensor, labels: Tensor) -> tuple[int, int]:
    return int((outputs.argmax(1) == labels).sum()), len(labels)


def _share(measured: Sequence[tuple[int, int]]) -> float:
    return sum(hits for hits, _ in measured) / sum(count for _, count in measured)


def softened(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of class distributions at temperature 4 (Hinton et al. 2015), ``[N, classes]``, mean over N."""
    wanted = F.log_softmax(teacher / 4, 1)
    return F.kl_div(F.log_softmax(student / 4, 1), wanted, reduction="batchmean", log_target=True) * 16


CLASSIFICATION = Task(
    name="classification", score_name="accuracy", note="top-1", loss=_cross_entropy, measure=_hits, score=_share,
    distill=softened, outputs_rank=2, class_scores=True,
)  # fmt: skip
# Without labels: the classes that the original network gives stand in for them.
AGREEMENT = replace(CLASSIFICATION, score_name="agreement with the original")


# ---------------------------------------------------------------------------------------------------- segmentation


def _at_masks(outputs: Tensor, masks: Tensor) -> Tensor:
    """Scores ``[N, classes, H, W]`` at the size of ``masks [N, H, W]``; a network may answer at a fraction of it."""
    if outputs.shape[2:] == masks.shape[1:]:
        return outputs
    return F.interpolate(outputs, size=masks.shape[1:], mode="bilinear", align_corners=False)


def _pixel_loss(outputs: Tensor, masks: Tensor, reduction: str) -> Tensor:
    losses = F.cross_entropy(_at_masks(outputs, masks), masks, ignore_index=IGNORED, reduction="none")
    counted = (masks != IGNORED).sum((1, 2)).clamp(min=1)
    images = losses.sum((1, 2)) / counted
    return images.mean() if reduction == "mean" else images.sum()


def _confusion(outputs: Tensor, masks: Tensor) -> Tensor:
    """Pixels ``[true class, found class]``."""
    scores = _at_masks(outputs, masks)
    classes, counts = scores.shape[1], masks != IGNORED
    pairs = masks[counts] * classes + scores.argmax(1)[counts]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def _mean_iou(measured: Sequence[Tensor]) -> float:
    """Mean over the classes that occur of intersection over union (Everingham et al. 2010), all pixels of a split together."""
    confusion = torch.stack(list(measured)).sum(0).double()
    hits, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    occurs = confusion.sum(1) > 0
    return float((hits[occurs] / union[occurs]).mean()) if bool(occurs.any()) else 0.0


def _softened_pixels(student: Tensor, teacher: Tensor) -> Tensor:
    classes = student.shape[1]
    return softened(*(scores.movedim(1, -1).reshape(-1, classes) for scores in (student, teacher)))


SEGMENTATION = Task(
    name="segmentation", score_name="mean IoU", note="pixel-wise", loss=_pixel_loss,
    measure=_confusion, score=_mean_iou, distill=_softened_pixels, outputs_rank=4, class_scores=True,
)  # fmt: skip

TASKS = {task.name: task for task in (CLASSIFICATION, SEGMENTATION)}


def task_by_name(name: str) -> Task:
    """A task by its name.

    Args:
        name: a key of `TASKS`, or ``package.module:attribute``, a `Task` or a function without arguments that returns one.

    Raises:
        UnknownNameError: no such task. UsageError: it cannot be imported, raises, or is no task.
    """
    if ":" not in name:
        if name not in TASKS:
            raise UnknownNameError("task", name, [*TASKS, "package.module:task"])
        return TASKS[name]
    found = imported(name, "task", UsageError)
    if not isinstance(found, Task) and callable(found):
        try:
            found = found()
        except Exception as error:
            raise UsageError(
                f"The task '{name}' raised {type(error).__name__}: {error}{place_of(error)}. Mend it there."
            ) from error
    if not isinstance(found, Task):
        raise UsageError(f"The task '{name}' is {type(found).__name__}; expected an edgecompress.tasks.Task.")
    return replace(found, name=name)
