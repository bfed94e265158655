"""What a network must not do if its channels are to be cut: each refusal is one sentence with the layer's name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from edgecompress.channel_groups import largest, tensors_of
from edgecompress.cuts import WEIGHTED
from edgecompress.errors import BadModelError
from edgecompress.imports import place_of

_PYTHON_VALUES: tuple[Callable[..., object], ...] = (
    Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__complex__, Tensor.__index__, Tensor.__contains__, Tensor.item,
    Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.equal, torch.equal, Tensor.allclose, torch.allclose,
    Tensor.is_nonzero, torch.is_nonzero,
)  # fmt: skip
# The shapes of their results follow values: of masks among what is indexed with, or of all that is given.
_MASKED: tuple[Callable[..., object], ...] = (Tensor.__getitem__, Tensor.masked_select, torch.masked_select)
_COUNTED: tuple[Callable[..., object], ...] = (
    Tensor.nonzero, torch.nonzero, Tensor.argwhere, torch.argwhere, Tensor.unique, torch.unique,
)  # fmt: skip
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def check_weights(model: nn.Module, name: str) -> None:
    """Refuse weights that are not made yet, elsewhere than on the CPU, in another type than float32 or not finite, tensors
    that two layers share, computed weights and hooks.

    Raises:
        BadModelError: the first of these that is found.
    """
    for key, value in model.state_dict().items():
        if torch.nn.parameter.is_lazy(value):
            raise BadModelError(f"The weight '{key}' of {name} has no shape yet. Run the network on one image first.")
        if value.device.type != "cpu":
            devices = sorted({str(tensor.device) for tensor in model.state_dict().values()})
            raise BadModelError(
                f"The weights of {name} are on {' and '.join(devices)} ('{key}' is on {value.device}). "
                "Move all of them with model.to('cpu') first."
            )
        if value.is_floating_point() and value.dtype != torch.float32:
            raise BadModelError(
                f"The weight '{key}' of {name} is {value.dtype}. Convert all of them with model.float()."
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise BadModelError(f"The weight '{key}' of {name} holds NaN or infinity. Load a sound checkpoint.")
    for key, value in model.named_buffers():
        # Infinity is fine in what no checkpoint holds, such as the mask of an attention.
        if value.is_floating_point() and torch.isnan(value).any():
            raise BadModelError(
                f"The buffer '{key}' of {name} holds NaN. It is in no checkpoint: give it numbers where it is made."
            )
    owners: dict[nn.Parameter, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        if torch.nn.utils.parametrize.is_parametrized(module) or any(getattr(module, hooks) for hooks in _HOOKS):
            raise BadModelError(
                f"The layer '{path}' of {name} has a hook or a parametrization, which cutting its channels would break. "
                "Take it off first: handle.remove(), or torch.nn.utils.parametrize.remove_parametrizations."
            )
        for leaf, parameter in module.named_parameters(recurse=False):
            key = f"{path}.{leaf}"
            other = owners.setdefault(parameter, (module, key))
            if other[0] is not module:
                raise BadModelError(
                    f"'{other[1]}' and '{key}' of {name} are one tensor, and cutting one would tear them apart. "
                    "Give each layer its own weights."
                )


class _NoPythonValues(TorchFunctionMode):
    """Stops a forward pass that turns a tensor into a number, a truth value or a shape: what it then does depends on the image.

    A shape may follow a mask that is not computed from ``image``: it is the same for every image.
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self._of_image = WeakTensorKeyDictionary({image: True})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PYTHON_VALUES:
            raise _PythonValueError(f"it reads a tensor's value ({func.__name__})")
        if any(tensor in self._of_image for tensor in _shaping(func, args, kwargs)):
            raise _PythonValueError(f"it computes a tensor whose shape follows values ({func.__name__})")
        result = func(*args, **kwargs)
        given = tensors_of([args, kwargs])
        if any(tensor in self._of_image for tensor in given):
            for tensor in given[:1] if result is None else tensors_of(result):  # x[i] = y returns nothing and changes x
                self._of_image[tensor] = True
        return result


def _shaping(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors whose values decide the shape of what ``func`` returns."""
    if func in _MASKED:
        return [tensor for tensor in tensors_of([args[1:], kwargs]) if tensor.dtype in (torch.bool, torch.uint8)]
    if func in _COUNTED or (func is torch.where and len(args) + len(kwargs) == 1):
        return tensors_of([args, kwargs])
    return []


class _PythonValueError(Exception):
    pass


def run_once(model: nn.Module, example: Tensor, name: str) -> list[Tensor]:
    """The outputs for one image, from a network in eval mode that computes the same way for every image.

    Args:
        example: ``[1, C, H, W]``.

    Raises:
        BadModelError: the network fails, branches on values, or returns no tensor.
    """
    try:
        with torch.no_grad(), _NoPythonValues(example):
            outputs = tensors_of(model(example))
    except _PythonValueError as error:
        raise BadModelError(
            f"The forward pass of {name} depends on the image: {error}{place_of(error)}. Compute with tensors "
            "of fixed shapes (torch.where with both values, products with masks) so that every image takes the same path."
        ) from error
    except Exception as error:
        raise BadModelError(
            f"{name} fails on one image of shape {tuple(example.shape[1:])}: {error}. Give images of the size it was made for."
        ) from error
    if not outputs:
        raise BadModelError(f"{name} returns no tensor. Return a tensor, or a list or dictionary of tensors.")
    return outputs


def check_batch(model: nn.Module, example: Tensor, one: list[Tensor], name: str) -> None:
    """Refuse a network in which an image depends on those beside it; ``one`` are its outputs for ``example`` alone.

    Raises:
        BadModelError: two images fail, or have outputs of unexpected shapes or other values.
    """
    try:
        with torch.no_grad():
            two = tensors_of(model(torch.cat([example, example.square()])))
    except Exception as error:
        raise BadModelError(
            f"{name} runs on one image and fails on two: {error}. Its shapes depend on the batch; write x.flatten(1) or "
            "x.view(x.shape[0], ...)."
        ) from error
    if [(2 * a.shape[0], *a.shape[1:]) for a in one if a.dim()] != [tuple(b.shape) for b in two]:
        raise BadModelError(
            f"{name} maps one image to {_shapes(one)} and two to {_shapes(two)}: its shapes depend on the batch. "
            "Keep the batch as the first dimension of every output."
        )
    for a, b in zip(one, two, strict=True):
        if not torch.allclose(a, b[: len(a)], atol=1e-3 * largest(a), equal_nan=True):
            raise BadModelError(
                f"{name} gives an image another output when a second one is beside it. Take no mean or norm over the batch."
            )


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


def check_training_layers(model: nn.Module, example: Tensor, name: str, running: Collection[str]) -> None:
    """Refuse layers that run in training only: no trace in eval mode sees what feeds them.

    Args:
        running: the layers that run in eval mode.

    Raises:
        BadModelError: there is such a layer.
    """
    asleep = [key for key, m in model.named_modules() if isinstance(m, WEIGHTED) and key not in running]
    if not asleep:
        return
    woken: list[str] = []
    copied = copy.deepcopy(model).train()
    for key in asleep:
        copied.get_submodule(key).register_forward_pre_hook(lambda *_, key=key: woken.append(key))
    try:
        with torch.no_grad():
            copied(torch.cat([example, example]))
    except Exception as error:
        raise BadModelError(f"{name} runs in eval mode and fails in training mode: {error}.") from error
    if woken:
        raise BadModelError(
            f"The layer '{woken[0]}' of {name} runs in training only, so that no channel before it can be cut. Build the network "
            "without auxiliary heads (aux_logits=False), or wrap it in edgecompress.raw_heads.TrainingHeads to keep them."
        )
