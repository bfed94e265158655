"""Training: the reference network, recovery with distillation after pruning, and quantisation-aware training."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from edgecompress.checkpoints import load_tensors
from edgecompress.data import Dataset, Split
from edgecompress.errors import BadFileError, EdgeCompressError
from edgecompress.files import cache_folder, written_whole
from edgecompress.models import build_model
from edgecompress.tasks import Task
from edgecompress.trace import fingerprint

OnEpoch = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TrainSettings:
    """One training run: SGD with Nesterov momentum under a cosine schedule with one epoch of warm-up.

    distill: weight of the teacher's outputs (`Task.distill`) against the labels.
    ema: the result is an exponential moving average of the weights and statistics after each step with this decay, lower
        during the first steps; 0: the last ones. Under a schedule that falls to zero the two are close.
    """

    epochs: int
    learning_rate: float
    batch_size: int = 64
    weight_decay: float = 5e-4
    distill: float = 0.7
    seed: int = 0
    ema: float = 0.0


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
    """Train ``model`` in place, on the device where its weights are, and return it in eval mode.

    On CUDA the forward passes run in bfloat16 where that is safe (`torch.autocast`), on a CPU in float32.

    Args:
        teacher: the original network; its outputs are distilled.
        penalty: progress in [0, 1] -> a loss to add (the KL of the variational phase).
        noise: parameters of ``model`` on a logarithmic scale, trained by Adam so that one that nothing holds travels ten
            units; they take no part in momentum, decay, clipping or checkpoints.
        checkpoint: written after every epoch and read at the start, so that an interrupted run goes on to the same result.
        on_epoch: told the epoch, their number and the mean loss.

    Raises:
        EdgeCompressError: the loss or its gradients are no longer finite; the model keeps its last good state.
    """
    own_way = {id(parameter) for parameter in noise}
    trained = [
        parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own_way
    ]
    optimizer = torch.optim.SGD(
        trained, settings.learning_rate, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
    )
    steps = math.ceil(len(data.train) / settings.batch_size)
    adam = torch.optim.Adam(noise, lr=10 / (steps * settings.epochs)) if noise else None
    average = _Average(model, settings.ema)
    done = _restore(checkpoint, model, optimizer, settings, average)
    device = next(model.parameters()).device
    if teacher is not None:
        teacher.eval()
    good = copy.deepcopy(model.state_dict())
    for epoch in range(done, settings.epochs):
        torch.manual_seed(settings.seed * 1000 + epoch)
        generator = torch.Generator().manual_seed(settings.seed * 1000 + epoch)
        model.train()
        total = 0.0
        for step, (x, y) in enumerate(data.batches(data.train, settings.batch_size, generator=generator, augment=True)):
            if len(y) < 2:
                continue
            progress = (epoch + step / steps) / settings.epochs
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(progress, settings.epochs)
            x, y = x.to(device), y.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = _loss(data.task, model(x), y, x, teacher, settings.distill)
            if penalty is not None:
                loss = loss + penalty(progress)
            if not torch.isfinite(loss):
                _give_up(model, good, f"The loss became {loss.item()} in epoch {epoch + 1}, step {step + 1}")
            optimizer.zero_grad()
            if adam is not None:
                adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if not torch.isfinite(nn.utils.clip_grad_norm_(trained, 5.0)):  # a finite loss may have such gradients
                _give_up(model, good, f"The gradients became infinite or NaN in epoch {epoch + 1}, step {step + 1}")
            optimizer.step()
            if adam is not None:
                adam.step()
            average.add(model)
            total += loss.item()
        good = copy.deepcopy(model.state_dict())
        _save(checkpoint, model, optimizer, settings, epoch + 1, average)
        if on_epoch is not None:
            on_epoch(epoch + 1, settings.epochs, total / steps)
    model.load_state_dict(average.state, strict=settings.ema > 0)
    return model.eval()


class _Average:
    """Exponential moving average of all floating-point state of a network (Polyak and Juditsky 1992); integers are copied.

    After t steps the decay is ``min(decay, (1 + t) / (10 + t))``, so that a short training is not held to its start. A decay
    of 0 holds nothing and costs nothing.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        held = model.state_dict() if decay else {}
        self.state = {key: value.detach().clone() for key, value in held.items()}

    def add(self, model: nn.Module) -> None:
        if not self.state:
            return
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    self.state[key].lerp_(value, 1 - decay)
                else:
                    self.state[key].copy_(value)


def _give_up(model: nn.Module, good: dict[str, Tensor], what: str) -> NoReturn:
    load_tensors(model, good)
    raise EdgeCompressError(f"{what}; the network keeps the state of the last whole epoch. Lower the learning rate.")


def _schedule(progress: float, epochs: int) -> float:
    warmup = min(1 / epochs, 0.2)
    if progress < warmup:
        return 0.1 + 0.9 * progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _loss(task: Task, outputs: Tensor, y: Tensor, x: Tensor, teacher: nn.Module | None, weight: float) -> Tensor:
    if teacher is None or weight == 0:
        return task.loss(outputs, y, "mean")
    with torch.no_grad():
        wanted = teacher(x)
    soft = task.distill(outputs, wanted)
    return soft if weight == 1 else (1 - weight) * task.loss(outputs, y, "mean") + weight * soft


def _save(
    path: Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    epoch: int,
    average: _Average,
) -> None:
    if path is None:
        return
    from safetensors.torch import save_file

    tensors = {f"model.{key}": value.contiguous() for key, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        if state.get("momentum_buffer") is not None:
            tensors[f"momentum.{index}"] = state["momentum_buffer"].contiguous()
    tensors |= {f"ema.{key}": value.contiguous() for key, value in average.state.items()}
    metadata = {"epoch": str(epoch), "settings": json.dumps(settings.__dict__), "ema_steps": str(average.steps)}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _restore(
    path: Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    average: _Average,
) -> int:
    if path is None or not path.exists():
        return 0
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise BadFileError(
            f"The checkpoint {path} is broken ({error}). Delete it: its training then starts anew."
        ) from error
    if json.loads(metadata.get("settings", "null")) != settings.__dict__:
        return 0
    load_tensors(
        model, {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    )
    state = optimizer.state_dict()
    state["state"] = {
        int(key.removeprefix("momentum.")): {"momentum_buffer": value}
        for key, value in tensors.items()
        if key.startswith("momentum.")
    }
    optimizer.load_state_dict(state)
    average.steps = int(metadata["ema_steps"])
    for key, value in average.state.items():
        value.copy_(tensors[f"ema.{key}"])
    return int(metadata["epoch"])


def accuracy_and_loss(
    forward: Callable[[Tensor], Tensor],
    data: Dataset,
    split: Split,
    batch_size: int = 256,
    on_outputs: Callable[[Tensor], None] | None = None,
) -> tuple[float, float]:
    """The task's score, turned so that more is better, and its mean loss of ``forward`` on ``split``.

    Of classification: top-1 accuracy in [0, 1] and cross-entropy in nats. ``on_outputs`` is shown those of every batch.
    """
    measured = []
    loss = 0.0
    device = next((p.device for p in forward.parameters()), None) if isinstance(forward, nn.Module) else None
    with torch.no_grad():
        for x, y in data.batches(split, batch_size):
            outputs = forward(x if device is None else x.to(device)).cpu()
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
) -> nn.Module:
    """The trained network that compression starts from, trained on first use and kept in the cache folder.

    Args:
        start: trained on from here, in place; a network with fresh weights when None.
    """
    from safetensors.torch import load_file, save_file

    torch.manual_seed(seed)
    model = build_model(name, len(data.classes)) if start is None else start
    extra = "" if start is None else f"-{learning_rate}-{_digest(start)}"
    path = reference_file(name, model, data, epochs=epochs, seed=seed, extra=extra)
    if path.exists():
        load_tensors(model, load_file(path))
        return model.eval()
    rate = learning_rate or (0.1 if data.name != "digits" else 0.05)
    settings = TrainSettings(epochs=epochs, learning_rate=rate, distill=0.0, seed=seed)
    partial = path.with_suffix(".partial.safetensors")
    train(model, data, settings, checkpoint=partial, on_epoch=on_epoch)
    with written_whole(path) as temporary:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary)
    partial.unlink(missing_ok=True)
    return model


def reference_file(name: str, model: nn.Module, data: Dataset, *, epochs: int, seed: int = 0, extra: str = "") -> Path:
    """Where the trained reference is kept; ``model`` is the network before its training."""
    title = f"{name.replace(':', '_').replace('/', '_')}-{data.name}"
    key = f"{title}-{fingerprint(model)}-{len(data.train)}-{epochs}-{seed}{extra}"
    return cache_folder() / "models" / f"{key}.safetensors"


def _digest(model: nn.Module) -> str:
    """Twelve hexadecimal digits of all weights."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
