"""Where a user's images come in: by name, from a folder, or out of a factory of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edgecompress.data_sets import digits, factory_data
from edgecompress.errors import BadDataError, UnknownNameError, UsageError
from edgecompress.image_folders import folder_data
from edgecompress.published_sets import PUBLISHED, torchvision_data
from edgecompress.spec import Preprocessing
from edgecompress.splits import Dataset as Dataset
from edgecompress.splits import Split as Split
from edgecompress.splits import Wanted, checked
from edgecompress.tasks import AGREEMENT, CLASSIFICATION, Task

BUILT_IN = ("digits",)  # no folder hides these names; one of another name is taken before torchvision's data set


def load_data(
    name: str,
    *,
    image_size: int | None = None,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    task: Task = CLASSIFICATION,
    unlabelled: bool = False,
    download: bool = False,
    on_read: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Load a data set.

    Args:
        name: ``digits``, a torchvision data set such as ``cifar10``, ``package.module:factory`` (see
            `data_sets.factory_data`), or the root of a folder of images: ``train/<class>/*`` with ``val/`` or ``test/``
            beside it, ``<class>/*`` alone, or images without any class (see `image_folders`).
        image_size: height and width that images are brought to; by default those of the preprocessing, else of the
            first image.
        seed: decides the splits that the data does not bring along.
        preprocessing: what the network expects; by default images are stretched and mean and standard deviation are
            those of the training images.
        task: says what the labels are.
        unlabelled: leave class folders out of account.
        download: whether the network may be used for a torchvision data set.
        on_read: told from time to time how many images of how many were read.

    Raises:
        UnknownNameError: no such data. BadDataError: no images, one class, classes that differ between folders, over
        1 % that cannot be read, labels outside the classes, or a factory that raises.
    """
    if preprocessing is not None and image_size is not None:
        preprocessing = preprocessing.at(image_size)
    wanted = Wanted(seed, image_size, preprocessing, task, unlabelled, download, on_read)
    root = Path(name)
    if unlabelled and task is not CLASSIFICATION:
        raise UsageError(
            f"Agreement without labels is for classification; the task is '{task.name}'. Leave one of them out."
        )
    by_name = name == "digits" or (name in PUBLISHED and not root.is_dir())
    if by_name and task.name != CLASSIFICATION.name:
        raise UsageError(f"The data '{name}' has classes, no labels for the task '{task.name}'. Name other --data.")
    if name == "digits":
        data = digits(wanted)
    elif by_name:
        data = torchvision_data(name, wanted)
    elif root.is_dir():
        data = folder_data(root, wanted)
    elif ":" in name and not root.is_absolute():
        data = factory_data(name, wanted)
    elif root.is_file() or len(root.parts) > 1:
        raise BadDataError(f"There is no data folder at {name}. Expected a folder with one sub-folder per class.")
    else:
        raise UnknownNameError(
            "data", name, [*BUILT_IN, *PUBLISHED, "<path of an image folder>", "package.module:factory"]
        )
    if unlabelled and data.labelled:
        data = replace(data, labelled=False, task=AGREEMENT)
    return checked(data)
