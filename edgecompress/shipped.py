"""Networks that are compressed already, as models to start from: those that come with the package, and runs of the user's.

Both are run folders: `arch.json`, `model.safetensors`, `exports/model.int8.onnx`; one that comes with the package has a
`card.json` in place of the rest. ``compress --model`` and ``eval`` take its name, ``edgecompress zoo`` lists them.
"""

from __future__ import annotations

from pathlib import Path

from edgecompress.errors import BadFileError
from edgecompress.files import read_document
from edgecompress.runs import RunFolder
from edgecompress.spec import Document
from edgecompress.zoo import ZOO

SHIPPED = Path(__file__).parent / "shipped"


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
