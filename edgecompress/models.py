"""Where a user's network comes in: our zoo, torchvision and timm by name, or ``package.module:factory``."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgecompress.errors import BadModelError, MissingBackendError, UnknownNameError
from edgecompress.imports import imported, place_of
from edgecompress.spec import Preprocessing
from edgecompress.zoo import ZOO as ZOO
from edgecompress.zoo import CifarVgg as CifarVgg

GRAPH_SUFFIXES = (".onnx", ".pt2")
_CHECKPOINT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
# The weights of these two expect an input transformation inside the network, which no integer kernel computes.
_TRANSFORM_INPUT = ("googlenet", "inception_v3")


def is_graph_file(name: str) -> bool:
    """Whether ``name`` is an ONNX file or a torch.export program: a fixed graph, to be quantised and exported only."""
    return name.lower().endswith(GRAPH_SUFFIXES)


def source_of(name: str) -> str:
    """The key of `SOURCES` that builds ``name``."""
    if name in ZOO:
        return "zoo"
    if name.startswith("timm:"):
        return "timm"
    return "factory" if ":" in name else "torchvision"


def build_model(name: str, classes: int) -> nn.Module:
    """Build a network; all but a factory's have fresh weights.

    Args:
        name: a key of `zoo.ZOO`, a torchvision classification model, ``timm:NAME``, or ``package.module:factory``
            (see `from_factory`).
        classes: outputs of the network, which maps ``[N, C, H, W]`` to ``[N, classes]``.

    Raises:
        UnknownNameError: no such name. MissingBackendError: timm is not installed. BadModelError: the factory cannot be
            imported, raises, or returns no module; or ``name`` is a file.
    """
    path = Path(name)
    if is_graph_file(name):
        raise BadModelError(f"{name} is a fixed graph; it can be quantised and exported by 'compress', nothing else.")
    if path.suffix in _CHECKPOINT_SUFFIXES:
        raise BadModelError(
            f"{name} holds weights but no network. Name the network with --model and give the file with --weights."
        )
    return SOURCES[source_of(name)](name, classes)


def own_state(name: str, *, download: bool) -> dict[str, Tensor]:
    """The published weights of a torchvision or timm model, with their own classifier.

    Args:
        download: whether the network may be used; otherwise the weights must lie in the cache of torch.hub.

    Raises:
        BadModelError: the model has no published weights, or they are neither here nor can be fetched.
    """
    source = source_of(name)
    if source == "timm":
        return _timm_state(name, download)
    weights = own_weights(name)
    if weights is None:
        raise BadModelError(
            f"{name} has no published weights. Leave --weights out to train it on the data, or give --weights FILE."
        )
    if name in _TRANSFORM_INPUT:
        raise BadModelError(
            f"The published weights of {name} transform the image inside the network, which cannot be quantised. "
            "Give --weights FILE of a network trained without transform_input, or --weights none."
        )
    from torchvision import models as torchvision_models

    here = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    if not here.is_file() and not download:
        raise BadModelError(
            f"The weights {weights} are not on this machine ({here}). Add --download, or fetch {weights.url} elsewhere and "
            "give --weights FILE."
        )
    try:
        model: nn.Module = torchvision_models.get_model(name, weights=weights)
    except Exception as error:
        raise BadModelError(
            f"The weights {weights} cannot be fetched ({type(error).__name__}: {error}). Without a network, fetch "
            f"{weights.url} elsewhere and give --weights FILE."
        ) from error
    return model.state_dict()


def own_weights(name: str) -> Any:
    """torchvision's best published weights of ``name`` (a ``WeightsEnum`` member with its ``transforms``), or None."""
    if is_graph_file(name) or source_of(name) != "torchvision":
        return None
    from torchvision import models as torchvision_models

    try:
        return getattr(torchvision_models.get_model_weights(name), "DEFAULT", None)
    except ValueError:
        return None


def own_preprocessing(name: str) -> Preprocessing | None:
    """What the published weights of a torchvision or timm model expect of an image; None if there are none.

    Raises:
        BadModelError: they resize in a way that is not known here. MissingBackendError: timm is not installed.
    """
    if is_graph_file(name) or source_of(name) not in ("torchvision", "timm"):
        return None
    if source_of(name) == "timm":
        found = getattr(_from_timm(name, 1000), "pretrained_cfg", None) or {}
        if "mean" not in found:
            return None
        size = found.get("test_input_size") or found["input_size"]
        crop = found.get("test_crop_pct") or found.get("crop_pct") or 1.0
        crop_size, resize, method = size[-1], int(size[-1] / crop), str(found.get("interpolation", "bilinear"))
        mean, std = found["mean"], found["std"]
    else:
        weights = own_weights(name)
        if weights is None:
            return None
        how = weights.transforms()
        crop_size, resize, method = how.crop_size[0], how.resize_size[0], how.interpolation.value
        mean, std = how.mean, how.std
    if method not in ("bilinear", "bicubic"):
        raise BadModelError(
            f"The weights of {name} want images resized by '{method}'; known are bilinear and bicubic. "
            "Give --preprocessing data, or a JSON file with one of them."
        )
    return Preprocessing.model_validate(
        {
            "size": (crop_size, crop_size), "resize": resize, "mean": tuple(mean), "std": tuple(std),
            "interpolation": method,
        }
    )  # fmt: skip


def own_classes(name: str) -> tuple[str, ...]:
    """The names of the classes that torchvision's published weights of ``name`` know; empty if there are none."""
    weights = own_weights(name)
    return () if weights is None else tuple(map(str, weights.meta.get("categories", ())))


def from_factory(name: str, classes: int | None) -> tuple[nn.Module, bool]:
    """Call a user's factory.

    Args:
        name: ``package.module:factory``, looked for in the working directory and among installed packages. The factory
            takes the number of classes as ``classes``, as ``num_classes`` or as its one required argument, or nothing.
            An ``nn.Module`` under that name is taken as it is.
        classes: None where the data does not say; the factory must then know it.

    Returns:
        The network, and whether it comes with weights: it is built under two seeds, and weights that differ are fresh.

    Raises:
        BadModelError: it cannot be imported, raises, or returns no module.
    """
    with torch.random.fork_rng(devices=[]):  # importing may draw numbers too
        factory = imported(name, "model factory", BadModelError)
        if isinstance(factory, nn.Module):
            return copy.deepcopy(factory), True
        torch.manual_seed(1)
        other = _called(factory, name, classes).state_dict()
        torch.manual_seed(2)
        model = _called(factory, name, classes)
    state = model.state_dict()
    same = state.keys() == other.keys() and all(_equal(state[key], other[key]) for key in state)
    return model, same


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _called(factory: Callable[..., object], name: str, classes: int | None) -> nn.Module:
    try:
        arguments, named = ((), {}) if classes is None else _arguments(factory, classes)
        model = factory(*arguments, **named)
    except Exception as error:
        raise BadModelError(
            f"The model factory '{name}' raised {type(error).__name__}: {error}{place_of(error)}."
        ) from error
    if not isinstance(model, nn.Module):
        raise BadModelError(f"The model factory '{name}' returned {type(model).__name__}; expected a torch.nn.Module.")
    return model.cpu()


def _arguments(factory: Callable[..., object], classes: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """Where a factory wants the number of classes, so that ``build(pretrained=True)`` is not called with 10."""
    parameters = inspect.signature(factory).parameters.values()
    for parameter in parameters:
        if parameter.name in ("classes", "num_classes") and parameter.kind is not parameter.POSITIONAL_ONLY:
            return (), {parameter.name: classes}
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wanted = any(p.kind in positional and p.default is p.empty for p in parameters)
    return ((classes,) if wanted else ()), {}


def _from_zoo(name: str, classes: int) -> nn.Module:
    return ZOO[name](classes)


def _from_torchvision(name: str, classes: int) -> nn.Module:
    from torchvision import models as torchvision_models

    known = torchvision_models.list_models(module=torchvision_models)
    if name not in known:
        raise UnknownNameError("model", name, [*ZOO, *known])
    kwargs: dict[str, Any] = {"aux_logits": False} if name in _TRANSFORM_INPUT else {}
    model: nn.Module = torchvision_models.get_model(name, weights=None, num_classes=classes, **kwargs)
    return model


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise MissingBackendError(
            "timm is not installed, which --model timm:NAME needs. Run: pip install 'edgecompress[timm]'"
        ) from error


def _from_timm(name: str, classes: int) -> nn.Module:
    timm, plain = _timm(), name.removeprefix("timm:")
    if not timm.is_model(plain):
        near = ", ".join(difflib.get_close_matches(plain, timm.list_models(), n=5, cutoff=0.3))
        raise BadModelError(f"timm has no model '{plain}'. Near: {near or 'none'}; timm.list_models() names all.")
    model: nn.Module = timm.create_model(plain, pretrained=False, num_classes=classes)
    return model


def _timm_state(name: str, download: bool) -> dict[str, Tensor]:
    timm, plain = _timm(), name.removeprefix("timm:")
    if not download:
        raise BadModelError(
            f"The weights of {name} are fetched from the network. Add --download, or give --weights FILE."
        )
    try:
        state: dict[str, Tensor] = timm.create_model(plain, pretrained=True).state_dict()
    except Exception as error:
        raise BadModelError(
            f"The weights of {name} cannot be fetched ({type(error).__name__}: {error}). Without a network, fetch them "
            "elsewhere and give --weights FILE."
        ) from error
    return state


def _from_factory(name: str, classes: int) -> nn.Module:
    factory = imported(name, "model factory", BadModelError)
    return copy.deepcopy(factory) if isinstance(factory, nn.Module) else _called(factory, name, classes)


SOURCES: dict[str, Callable[[str, int], nn.Module]] = {
    "zoo": _from_zoo,
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "factory": _from_factory,
}
