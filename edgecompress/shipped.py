"""Networks that are compressed already, as models to start from: those that come with the package, and runs of the user's.

Both are run folders: `arch.json`, `model.safetensors`, `exports/model.int8.onnx`; one that comes with the package has a
`card.json` in place of the rest. ``compress --model`` and ``eval`` take its name, ``edgecompress zoo`` lists them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from edgecompress.errors import BadFileError
from edgecompress.files import read_document, write_document, written_whole
from edgecompress.runs import RunFolder
from edgecompress.spec import Document
from edgecompress.zoo import ZOO

SHIPPED = Path(__file__).parent / "shipped"
INTEGERS = "exports/model.int8.onnx"


class Card(Document):
    """What is known of a shipped network; ``accuracy`` and ``baseline_accuracy`` are shares of the test images.

    The accuracy is that of the exported file, the baseline's that of the unpruned network with the same fine-tuning.
    ``row``: where the figures were measured. ``size_bytes`` is the file's, ``licence`` that of the weights.
    """

    base: str
    data: str
    accuracy: float
    baseline_accuracy: float
    params: int
    macs: int
    average_weight_bits: float
    size_bytes: int
    row: str
    licence: str


def cards() -> dict[str, Card]:
    """Every network that comes with the package, by name."""
    return {
        path.parent.name: read_document(path, Card, "card of a network") for path in sorted(SHIPPED.glob("*/card.json"))
    }


def pack(run: RunFolder, folder: Path, card: Card) -> None:
    """Put a run's network into ``folder``, which is replaced, as one that comes with the package.

    It is built by the name of ``card.base``: a run that was given a module in memory knows none. Weights take float16, which
    `RunFolder.weights` widens again; vectors stay as they are, because a variance may leave float16's range.
    """
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    (folder / INTEGERS).parent.mkdir(parents=True)
    shutil.copy(run.file(INTEGERS), folder / INTEGERS)
    write_document(folder / "arch.json", run.architecture().model_copy(update={"model": card.base}))
    weights = {key: value.half() if _is_matrix(value) else value for key, value in run.weights().items()}
    with written_whole(folder / "model.safetensors") as temporary:
        save_file(weights, temporary)
    write_document(folder / "card.json", card)


def _is_matrix(value: torch.Tensor) -> bool:
    return value.is_floating_point() and value.dim() > 1


def compressed_run(model: str) -> RunFolder | None:
    """The folder of the compressed network that ``model`` names; None where it names none.

    Raises:
        BadFileError: it is the folder of a run that did not finish stage 1.
    """
    if (SHIPPED / model / "card.json").is_file():
        return RunFolder(SHIPPED / model)
    path = Path(model)
    if model in ZOO or not (path / "config.json").is_file():
        return None
    if not (path / "arch.json").is_file():
        raise BadFileError(
            f"The run {path} has no network yet: it did not finish. Go on with 'edgecompress compress --resume'."
        )
    return RunFolder(path)
