"""Training: the reference network, recovery with distillation after pruning, and quantisation-aware training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from edgecompress.checkpoints import load_tensors
from edgecompress.data import Dataset, Split
from edgecompress.devices import device_by_name, lying_on
from edgecompress.errors import DivergedError
from edgecompress.files import cache_folder, written_whole
from edgecompress.layouts import safe_to_train
from edgecompress.models import build_model
from edgecompress.tasks import Task
from edgecompress.trace import fingerprint, weights_digest
from edgecompress.training_state import PRECISIONS, Average, TrainingState, precision_on

OnEpoch = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TrainSettings:
    """One training run: SGD with Nesterov momentum under a cosine schedule with one epoch of warm-up.

    distill: weight of the teacher's outputs (`Task.distill`) against the labels.
    ema: the result is an exponential moving average of the weights and statistics after each step with this decay, lower
        during the first steps; 0: the last ones. Under a schedule that falls to zero the two are close.
    device: where the passes run, see `devices.device_by_name`; the network lies where it lay before once it is trained.
    precision: of the passes through the network: ``fp32``, ``bf16`` or ``fp16`` where autocast deems that safe (weights,
        losses and the rounding of `LearnedSteps` stay float32), or ``auto``: see `training_state.precision_on`.
    """

    epochs: int
    learning_rate: float
    batch_size: int = 64
    weight_decay: float = 5e-4
    distill: float = 0.7
    seed: int = 0
    ema: float = 0.0
    device: str = "auto"
    precision: str = "auto"


def train(
    model: nn.Module,
    data: Dataset,
    settings: TrainSettings,
    *,
    teacher: nn.Module | None = None,
    penalty: Callable[[float], Tensor] | None = None,
    noise: Sequence[nn.Parameter] = (),
    checkpoint: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> nn.Module:
    """Train ``model`` in place and return it in eval mode.

    Args:
        teacher: the original network; its outputs are distilled.
        penalty: progress in [0, 1] -> a loss to add (the KL of the variational phase).
        noise: parameters of ``model`` on a logarithmic scale, trained by Adam so that one that nothing holds travels ten
            units; they take no part in momentum, decay or clipping.
        checkpoint: written after every epoch and read at the start, so that an interrupted run goes on to the same result.
        on_epoch: told the epoch, their number and the mean loss.

    Raises:
        DivergedError: the loss or its gradients are no longer finite; the model keeps its last good state. Gradients that
            overflow in float16 alone are no error: their step is left out, and their scale halved.
        UnknownNameError: no such precision or device. UsageError: no such device here.
    """
    device = device_by_name(settings.device)
    if device.type == "cpu":
        safe_to_train(model)
    with lying_on(device, model, teacher):
        return _trained(model, data, settings, device, teacher, penalty, noise, checkpoint, on_epoch)


def _trained(  # noqa: PLR0913 (what `train` was called with)
    model: nn.Module,
    data: Dataset,
    settings: TrainSettings,
    device: torch.device,
    teacher: nn.Module | None,
    penalty: Callable[[float], Tensor] | None,
    noise: Sequence[nn.Parameter],
    checkpoint: Path | None,
    on_epoch: OnEpoch | None,
) -> nn.Module:
    """`train`, everything on ``device``."""
    own_way = {id(parameter) for parameter in noise}
    trained = [
        parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own_way
    ]
    optimizer = torch.optim.SGD(
        trained, settings.learning_rate, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
    )
    steps = math.ceil(len(data.train) / settings.batch_size)
    adam = torch.optim.Adam(noise, lr=10 / (steps * settings.epochs)) if noise else None
    average = Average(model, settings.ema)
    precision = precision_on(device, settings.precision, model)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    decide = {key: value for key, value in settings.__dict__.items() if key != "device"}
    state = TrainingState(model, optimizer, average, scaler, {**decide, "precision": precision}, adam)
    done = state.restore(checkpoint)
    if teacher is not None:
        teacher.eval()
    good = copy.deepcopy(model.state_dict())
    for epoch in range(done, settings.epochs):
        torch.manual_seed(settings.seed * 1000 + epoch)
        generator = torch.Generator().manual_seed(settings.seed * 1000 + epoch)
        model.train()
        total = 0.0
        give_up = partial(_give_up, model, good, settings.learning_rate, checkpoint if epoch else None)
        for step, (x, y) in enumerate(data.batches(data.train, settings.batch_size, generator=generator, augment=True)):
            if len(y) < 2:
                continue
            progress = (epoch + step / steps) / settings.epochs
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(progress, settings.epochs)
            x, y = x.to(device), y.to(device)
            with torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32"):
                outputs, wanted = model(x), _wanted(x, teacher, settings.distill)
            loss = _loss(data.task, outputs.float(), y, wanted, settings.distill)
            if penalty is not None:
                loss = loss + penalty(progress)
            if not torch.isfinite(loss):
                give_up(f"The loss became {loss.item()} in epoch {epoch + 1}, step {step + 1}")
            optimizer.zero_grad()
            if adam is not None:
                adam.zero_grad()
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(trained, 5.0)
            if not torch.isfinite(norm) and not _overflows(scaler, trained):  # a finite loss may have such gradients
                give_up(f"The gradients became infinite or NaN in epoch {epoch + 1}, step {step + 1}")
            scaler.step(optimizer)
            if adam is not None:
                scaler.step(adam)
            scaler.update()
            average.add(model)
            total += loss.item()
        good = copy.deepcopy(model.state_dict())
        state.save(checkpoint, epoch + 1)
        if on_epoch is not None:
            on_epoch(epoch + 1, settings.epochs, total / steps)
    model.load_state_dict(average.state, strict=settings.ema > 0)
    return model.eval()


def _overflows(scaler: torch.amp.GradScaler, trained: Sequence[nn.Parameter]) -> bool:
    """Whether gradients are too large for float16 at this scale, so that ``scaler`` leaves the step out and halves it."""
    found = (parameter.grad for parameter in trained if parameter.grad is not None)
    return scaler.is_enabled() and scaler.get_scale() > 1 and not all(torch.isfinite(grad).all() for grad in found)


def _give_up(model: nn.Module, good: dict[str, Tensor], rate: float, kept: Path | None, what: str) -> NoReturn:
    load_tensors(model, good)
    where = "" if kept is None else f", which is in {kept}"
    raise DivergedError(
        f"{what}; the network keeps the state from before that epoch{where}. Lower the learning rate of {rate:g} and train anew "
        "(compress: --learning-rate and another --name; --resume would come to the same)."
    )


def _schedule(progress: float, epochs: int) -> float:
    warmup = min(1 / epochs, 0.2)
    if progress < warmup:
        return 0.1 + 0.9 * progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _wanted(x: Tensor, teacher: nn.Module | None, weight: float) -> Tensor | None:
    if teacher is None or weight == 0:
        return None
    with torch.no_grad():
        answers: Tensor = teacher(x)
    return answers.float()


def _loss(task: Task, outputs: Tensor, y: Tensor, wanted: Tensor | None, weight: float) -> Tensor:
    if wanted is None:
        return task.loss(outputs, y, "mean")
    soft = task.distill(outputs, wanted)
    return soft if weight == 1 else (1 - weight) * task.loss(outputs, y, "mean") + weight * soft


def accuracy_and_loss(
    forward: Callable[[Tensor], Tensor],
    data: Dataset,
    split: Split,
    batch_size: int = 256,
    on_outputs: Callable[[Tensor], None] | None = None,
    device: str = "cpu",
) -> tuple[float, float]:
    """The task's score, turned so that more is better, and its mean loss of ``forward`` on ``split``.

    Of classification: top-1 accuracy in [0, 1] and cross-entropy in nats. ``on_outputs`` is shown those of every batch. A
    module runs on ``device`` (`devices.device_by_name`), any other function on the CPU.
    """
    measured = []
    loss = 0.0
    module = forward if isinstance(forward, nn.Module) else None
    place = device_by_name("cpu" if module is None else device)
    with torch.no_grad(), lying_on(place, module):
        for x, y in data.batches(split, batch_size):
            outputs = forward(x.to(place)).cpu()
            measured.append(data.task.measure(outputs, y))
            if on_outputs is not None:
                on_outputs(outputs)
            loss += float(data.task.loss(outputs, y, "sum"))
    return data.task.merit(measured), loss / len(split)


def reference_model(
    name: str,
    data: Dataset,
    *,
    epochs: int,
    seed: int = 0,
    on_epoch: OnEpoch | None = None,
    start: nn.Module | None = None,
    learning_rate: float | None = None,
    device: str = "auto",
) -> nn.Module:
    """The trained network that compression starts from, trained on first use and kept in the cache folder.

    Args:
        start: trained on from here, in place; a network with fresh weights when None.
    """
    torch.manual_seed(seed)
    model = build_model(name, len(data.classes)) if start is None else start
    extra = "" if start is None else f"-{learning_rate}-{weights_digest(start)}"
    path = reference_file(name, model, data, epochs=epochs, seed=seed, extra=extra)
    rate = learning_rate or (0.1 if data.name != "digits" else 0.05)
    settings = TrainSettings(epochs=epochs, learning_rate=rate, distill=0.0, seed=seed, device=device)
    return trained_once(model, path, data, settings, on_epoch=on_epoch)


def trained_once(model: nn.Module, path: Path, data: Dataset, settings: TrainSettings, **how: Any) -> nn.Module:
    """`train`, unless ``path`` keeps its result already; an interrupted one goes on. ``how``: further arguments of `train`."""
    from safetensors.torch import load_file, save_file

    if path.exists():
        load_tensors(model, load_file(path))
        return model.eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.safetensors")
    train(model, data, settings, checkpoint=partial, **how)
    with written_whole(path) as temporary:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
    partial.unlink(missing_ok=True)
    return model


def reference_file(name: str, model: nn.Module, data: Dataset, *, epochs: int, seed: int = 0, extra: str = "") -> Path:
    """Where the trained reference is kept; ``model`` is the network before its training."""
    title = f"{name.replace(':', '_').replace('/', '_')}-{data.name}"
    key = f"{title}-{fingerprint(model)}-{len(data.train)}-{epochs}-{seed}{extra}"
    return cache_folder() / "models" / f"{key}.safetensors"
