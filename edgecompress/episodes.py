"""One evaluation of a stage-1 policy, as cheap as it can be: a small network, few images, and no more than are needed.

The network is physically smaller and laid out channels last; images are drawn and normalised once and pass in batches that
stay in the cache. They are shuffled so that every batch holds all classes alike, and after each one a policy that can no
longer become one of the best is given up.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from edgecompress.data import Dataset, Split
from edgecompress.devices import device_by_name
from edgecompress.fidelity import PRUNED, Original, divergences, said_by
from edgecompress.prune import reestimate_on
from edgecompress.spaces import Outcome
from edgecompress.spec import CompressionPolicy
from edgecompress.tasks import Task

SEARCH_IMAGES = 1000  # more change the order of policies little: those at the top are measured again on a larger split
RECALIBRATION_IMAGES = 300
BATCH_BYTES = 1_250_000  # of a batch's input: 100 images of 32x32 pixels
KEPT_BYTES = 256_000_000  # of normalised images; a larger split is normalised anew for every policy
CERTAINTY = 3.0  # standard deviations: of 1,000 looks at a policy, one gives it up wrongly

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Part:
    """What one batch said: images, right answers (of classification), summed loss, what the task's score needs, and of every
    image how far its answer lies from the original's."""

    images: int
    hits: int
    loss: float
    measured: object = None
    divergences: Tensor | None = None


class Images:
    """Images and labels of a split in a fixed order, in batches that fit a cache, normalised once where memory allows."""

    def __init__(self, data: Dataset, split: Split, rows: Tensor) -> None:
        self._data, self._split, self._rows = data, split, rows
        pixels = 4 * math.prod(split.images.shape[1:])
        self.batch_size = int(min(max(BATCH_BYTES // pixels, 8), 128))
        self._kept = list(self._read()) if pixels * len(rows) <= KEPT_BYTES else None

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._kept) if self._kept is not None else self._read()

    def _read(self) -> Iterator[Batch]:
        for x, y in self._data.batches(self._split, self.batch_size, rows=self._rows):
            yield x.contiguous(memory_format=torch.channels_last), y


class Episodes:
    """The evaluator of stage 1; a search that can use it asks for `unless_hopeless` instead of a call.

    Args:
        build: policy -> the smaller network with the weights it would have, BatchNorm statistics not yet taken anew.
        split: what is measured on; at most ``images`` of it, every class alike.
        recalibrate: images of the training split that BatchNorm statistics are taken from.
        device: where the passes run (`devices.device_by_name`).
        original: the uncompressed network. Where its outputs are scores of classes, every `Outcome` has the accuracy that a
            policy's divergence from it lets expect.
    """

    def __init__(
        self,
        build: Callable[[CompressionPolicy], nn.Module],
        data: Dataset,
        split: Split,
        *,
        images: int = SEARCH_IMAGES,
        recalibrate: int = RECALIBRATION_IMAGES,
        seed: int = 0,
        original: nn.Module | None = None,
        device: str = "cpu",
    ) -> None:
        self._build, self._task = build, data.task
        self._device = device_by_name(device)
        self.images = Images(data, split, balanced_order(split, data, seed)[:images])
        self._statistics = [
            (x.to(self._device), y) for x, y in augmented(data, recalibrate, self.images.batch_size, seed)
        ]
        self._original = None
        if original is not None:
            model = channels_last(copy.deepcopy(original)).to(self._device).eval()
            self._original = said_by(partial(self._answers, model), self.images, data.task)

    def network(self, policy: CompressionPolicy) -> nn.Module:
        """The smaller network of ``policy`` with its own BatchNorm statistics, in eval mode, channels last and on the device."""
        model = channels_last(self._build(policy)).to(self._device)
        reestimate_on(model, self._statistics)
        return model.eval()

    def parts(self, policy: CompressionPolicy) -> Iterator[Part]:
        """What the batches say, one after the other; nothing is computed for those that are not asked for."""
        model = self.network(policy)
        for batch, (x, y) in enumerate(self.images):
            wanted = None if self._original is None else self._original.outputs[batch]
            with torch.inference_mode():
                yield part_of(self._task, self._answers(model, x), y, wanted)

    def _answers(self, model: nn.Module, x: Tensor) -> Tensor:
        outputs: Tensor = model(x.to(self._device)).cpu()
        return outputs

    def __call__(self, policy: CompressionPolicy) -> Outcome:
        """Accuracy and loss on all images."""
        return outcome_of(list(self.parts(policy)), self._task, self._original)

    def unless_hopeless(self, policy: CompressionPolicy, could_win: Callable[[float], bool]) -> Outcome:
        """As a call, but given up as soon as ``could_win`` denies the highest accuracy that is still likely."""
        return judged(self.parts(policy), len(self.images), self._task, could_win, self._original)


def part_of(task: Task, outputs: Tensor, labels: Tensor, wanted: Tensor | None = None) -> Part:
    """One batch's answers as counts."""
    hits = int((outputs.argmax(1) == labels).sum()) if counts_hits(task) else 0
    lost = None if wanted is None else divergences(wanted, outputs, PRUNED.temperature)
    return Part(len(labels), hits, float(task.loss(outputs, labels, "sum")), task.measure(outputs, labels), lost)


def counts_hits(task: Task) -> bool:
    """Whether the score is the share of images that are right: only that has the bound below."""
    return task.class_scores and task.outputs_rank == 2


def outcome_of(parts: list[Part], task: Task, original: Original | None = None, *, abandoned: bool = False) -> Outcome:
    """Accuracy and mean loss over the images of ``parts``, and the accuracy to expect where ``original`` is known."""
    images = sum(part.images for part in parts)
    loss = sum(part.loss for part in parts) / images
    estimate = None if original is None else PRUNED.expected(original.accuracy, float(_lost(parts).mean()))
    return Outcome(task.merit([part.measured for part in parts]), loss, abandoned=abandoned, estimate=estimate)


def judged(
    parts: Iterator[Part], images: int, task: Task, could_win: Callable[[float], bool], original: Original | None = None
) -> Outcome:
    """Take ``parts`` while the highest accuracy that all ``images`` may still come to could win."""
    taken: list[Part] = []
    for part in parts:
        taken.append(part)
        seen = sum(part.images for part in taken)
        if seen == images:
            break
        if original is not None:
            bound = PRUNED.expected(original.accuracy, least_likely(_lost(taken), images))
        elif counts_hits(task):
            bound = highest_likely(sum(part.hits for part in taken), seen, images)
        else:
            continue
        if not could_win(bound):
            return outcome_of(taken, task, original, abandoned=True)
    return outcome_of(taken, task, original)


def _lost(parts: list[Part]) -> Tensor:
    return torch.cat([part.divergences for part in parts if part.divergences is not None])


def least_likely(seen: Tensor, images: int) -> float:
    """Lower bound of the mean over all ``images`` of a value of which ``seen`` were drawn without replacement.

    `CERTAINTY` standard errors below their mean, with the finite-population correction; what is never negative is not
    believed to be.
    """
    count = len(seen)
    error = float(seen.std()) * math.sqrt((images - count) / (count * max(images - 1, 1))) if count > 1 else math.inf
    return max(float(seen.mean()) - CERTAINTY * error, float(seen.sum()) / images)


def highest_likely(hits: int, seen: int, images: int) -> float:
    """Upper bound of the accuracy on all ``images`` after ``seen`` of them, drawn without replacement.

    Wilson's score interval (1927) at `CERTAINTY`, its variance reduced by the finite-population correction
    ``(images - seen) / (images - 1)``; never above what is reached if all others are right.
    """
    z2 = CERTAINTY**2 * (images - seen) / max(images - 1, 1)
    share = hits / seen
    centre = share + z2 / (2 * seen)
    spread = math.sqrt(z2 * share * (1 - share) / seen + z2**2 / (4 * seen**2))
    return min((centre + spread) / (1 + z2 / seen), (hits + images - seen) / images)


def channels_last(model: nn.Module) -> nn.Module:
    """``model`` itself, its weights laid out so that a CPU convolves them fastest; what it computes is the same."""
    return model.to(memory_format=torch.channels_last)


def balanced_order(split: Split, data: Dataset, seed: int) -> Tensor:
    """All positions of ``split``, shuffled; of classification so that any first part holds every class alike."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split), generator=generator)
    if not counts_hits(data.task):
        return order
    labels = split.labels[order]
    place = torch.zeros(len(order))
    for label in torch.unique(labels):
        own = (labels == label).nonzero().flatten()
        place[own] = (torch.arange(len(own)) + torch.rand(len(own), generator=generator)) / len(own)
    return order[place.argsort(stable=True)]


def augmented(data: Dataset, images: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Training images as training sees them, drawn once with ``seed``; the same for every policy."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data.train), generator=generator)[:images]
    for x, y in data.batches(data.train, batch_size, generator=generator, augment=True, rows=rows):
        yield x.contiguous(memory_format=torch.channels_last), y


def missing_classes(data: Dataset, split: Split, name: str) -> str:
    """A sentence about the classes of which ``split`` holds no image; empty where it holds all, or labels are no classes."""
    if not data.labelled or not counts_hits(data.task):
        return ""
    missing = sorted(set(range(len(data.classes))) - set(torch.unique(split.labels).tolist()))
    if not missing:
        return ""
    names = ", ".join(data.classes[label] for label in missing[:5]) + (", ..." if len(missing) > 5 else "")
    return f"{name} holds no image of {len(missing)} of {len(data.classes)} classes ({names}); add some"
