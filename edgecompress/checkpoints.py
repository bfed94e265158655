"""Weights from a file into a network: tensors only, usual wrappers and prefixes taken off, a classifier of another size left out."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from edgecompress.errors import BadModelError

WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "model.", "_orig_mod.")


def load_weights(model: nn.Module, path: Path) -> str:
    """Load a checkpoint into ``model`` in place: safetensors, or a PyTorch file that holds tensors only.

    Returns:
        The name of the classifier where the file holds one with another number of rows; it keeps its fresh weights and
        must be trained. Empty when every weight was loaded.

    Raises:
        BadModelError: the file is missing, holds code, or does not fit the network; ``model`` is then unchanged.
    """
    return fit_state(model, read_state(path), f"The checkpoint {path}")


def fit_state(model: nn.Module, state: Mapping[str, Tensor], what: str) -> str:
    """Load named tensors into ``model`` in place; see `load_weights`. ``what`` begins the sentence of an error."""
    own = model.state_dict()
    state = {_plain(key, own): value for key, value in state.items()}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    head = last_layer(model)
    resized = bool(wrong) and all(_other_rows(key, head, state[key], own[key]) for key in wrong)
    if missing or unknown or (wrong and not resized):
        key = (missing or unknown if resized else wrong or missing or unknown)[0]
        found = tuple(state[key].shape) if key in state else "nothing"
        wanted = tuple(own[key].shape) if key in own else "nothing"
        raise BadModelError(
            f"{what} does not fit the network: '{key}' is {found} in the file and {wanted} in the network "
            f"({len(wrong)} of another shape, {len(missing)} missing, {len(unknown)} unknown). Name the --model it was saved from."
        )
    load_tensors(model, {key: value for key, value in state.items() if key not in wrong}, strict=False)
    return head if resized else ""


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """``model.load_state_dict`` for tensors out of a file of ours, which holds no versions of layers: they are the model's.

    Without versions MNASNet refuses its weights, and other layers take them for those of an old torch.
    """
    state = OrderedDict(tensors)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state, strict=strict)


def classes_in(model: nn.Module, state: Mapping[str, Tensor], what: str) -> int:
    """How many classes the classifier of saved weights has.

    Args:
        model: the network with a classifier of any size.

    Raises:
        BadModelError: the weights have no such layer.
    """
    head, own = last_layer(model), model.state_dict()
    for key, value in state.items():
        if _plain(key, own) == f"{head}.weight":
            return int(value.shape[0])
    raise BadModelError(f"{what} has no classifier '{head}'. Name the --model it was saved from.")


def last_layer(model: nn.Module) -> str:
    """The name of the last linear layer or convolution in the order of definition: by custom the classifier."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return names[-1] if names else ""


def _other_rows(key: str, head: str, found: Tensor, wanted: Tensor) -> bool:
    return key.rpartition(".")[0] == head and found.dim() == wanted.dim() and found.shape[1:] == wanted.shape[1:]


def _plain(key: str, own: Mapping[str, Tensor]) -> str:
    """``key`` without what DataParallel, Lightning and torch.compile put before it, unless the network has it so."""
    plain = key
    while plain not in own:
        prefix = next((prefix for prefix in PREFIXES if plain.startswith(prefix)), None)
        if prefix is None:
            return plain
        plain = plain.removeprefix(prefix)
    return plain


def read_state(path: Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint file. No code in it is ever run.

    Raises:
        BadModelError: the file is missing, is no checkpoint, or is a pickle that asks for code.
    """
    if not path.is_file():
        raise BadModelError(
            f"There is no checkpoint at {path}. Check the path, or give --weights DEFAULT (the model's own) or none."
        )
    try:
        state = _read_tensors(path)
    except Exception as error:
        if _asks_for_code(error):
            raise BadModelError(
                f"The checkpoint {path} cannot be read as tensors alone: it is a pickle that would run code, and files with "
                "code are refused. Load it where you trust it and write its weights with "
                "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors'), or with "
                "torch.save(model.state_dict(), 'weights.pt'), which torch.load(weights_only=True) reads."
            ) from error
        raise BadModelError(
            f"The checkpoint {path} cannot be read as tensors alone ({type(error).__name__}): it is broken or no checkpoint. "
            "Copy it again, or save it with torch.save(model.state_dict(), path)."
        ) from error
    for _ in WRAPPERS:
        inner = next(
            (state[key] for key in WRAPPERS if isinstance(state, dict) and isinstance(state.get(key), dict)), None
        )
        state = state if inner is None else inner
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadModelError(f"The checkpoint {path} is no state dict (names to tensors). Save model.state_dict().")
    return state


def _read_tensors(path: Path) -> object:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a TorchScript file warns before it is refused
        return torch.load(path, map_location="cpu", weights_only=True)


def _asks_for_code(error: Exception) -> bool:
    """Whether torch refused a file because of what it names, not because it is torn."""
    text = str(error)
    return any(sign in text for sign in ("Unsupported global", "Unsupported class", "TorchScript", "GLOBAL"))
