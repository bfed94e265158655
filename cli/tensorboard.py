"""``--tensorboard DIR``: reward, best accuracy, best latency and training loss as TensorBoard scalars."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from edgecompress.errors import MissingBackendError
from edgecompress.files import disk_error
from edgecompress.spec import Stage, Trial


class TensorBoardLog:
    """A `progress.Progress` that writes one event file into ``folder``.

    Scalars: ``prune/reward``, ``prune/accuracy``, ``prune/best_accuracy``, ``prune/best_latency_us`` by episode, the same
    for ``quantize``, and ``loss/<part of the training>`` by epoch.

    Raises:
        MissingBackendError: TensorBoard is not installed. UsageError: the folder cannot be written.
    """

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingBackendError(
                "TensorBoard is not installed here. Install it with pip install 'edgecompress[tensorboard]', or leave "
                "--tensorboard out."
            ) from error
        try:
            self._writer = SummaryWriter(folder)
        except OSError as error:
            raise disk_error(Path(folder), error) from error
        self._title = ""
        self._seen: dict[Stage, int] = {}

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def stage(self, title: str, total: int) -> None:
        self._title = title

    def trial(self, stage: Stage, trial: Trial, best: Trial | None) -> None:
        number = self._seen[stage] = self._seen.get(stage, 0) + 1
        values = {"reward": trial.reward, "accuracy": trial.accuracy}
        if best is not None:
            values["best_accuracy"] = best.accuracy
            if best.cost.latency_us is not None:
                values["best_latency_us"] = best.cost.latency_us
        for name, value in values.items():
            self._scalar(f"{stage}/{name}", value, number)

    def epoch(self, epoch: int, epochs: int, loss: float) -> None:
        self._scalar(f"loss/{self._title}", loss, epoch)

    def step(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)
