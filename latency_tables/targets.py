"""Known devices: one TOML file each in ``targets/``, with the sources of its facts. No latency is in there."""

from __future__ import annotations

import platform
import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path

from pydantic import ValidationError

from edgecompress.cost import Kernel
from edgecompress.errors import BadFileError, UnknownNameError
from edgecompress.spec import FLOAT_BITS, Target

HALF_BITS = 16
INTEGER_BITS = 8
_BOARD_NAME = Path("/proc/device-tree/model")


@cache
def all_targets() -> dict[str, Target]:
    """Every target that ships with edgecompress, by name, in alphabetical order.

    Raises:
        BadFileError: a target file does not validate.
    """
    folder = files("edgecompress.latency_tables").joinpath("targets")
    texts = {item.name: item.read_text(encoding="utf-8") for item in folder.iterdir() if item.name.endswith(".toml")}
    targets = [read_target(texts[name], name) for name in sorted(texts)]
    return {target.name: target for target in targets}


def read_target(text: str, where: str) -> Target:
    """Validate the text of one target file; ``where`` names it in errors.

    Raises:
        BadFileError: it is no TOML, a key is unknown or missing, or a precision has no channel divisor.
    """
    try:
        target = Target.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise BadFileError(f"The target file {where} is no TOML: {error}. Mend that line.") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BadFileError(f"The target file {where} is wrong at '{key}': {first['msg']}. Mend that key.") from error
    if set(target.channel_divisor) != set(target.precisions) or target.precision not in target.precisions:
        raise BadFileError(
            f"The target file {where} must give a channel_divisor for each of its precisions {target.precisions}, "
            f"and run one of them; it has {sorted(target.channel_divisor)} and runs {target.precision}."
        )
    return target.model_copy(
        update={"notes": " ".join(target.notes.split()), "sources": " ".join(target.sources.split())}
    )


def target_by_name(name: str) -> Target:
    """Look up a target by its name or one of its aliases.

    Raises:
        UnknownNameError: no target has that name.
    """
    targets = all_targets()
    by_alias = {alias: target for target in targets.values() for alias in target.aliases}
    found = targets.get(name) or by_alias.get(name)
    if found is None:
        raise UnknownNameError("target", name, [*targets, *by_alias])
    return found


def running_precision(kernel: Kernel, target: Target) -> str:
    """The precision in which the target really runs ``kernel``: storage of few bits buys no kernel that is not there.

    Integer weights and activations of 2 to 8 bits run as int8 where the target has integer kernels; 16 bits run as fp16
    where it has that; weights alone of few bits are unpacked and run as float.
    """
    widest = max(kernel.weight_bits, kernel.activation_bits)
    if widest <= INTEGER_BITS:
        return "int8" if target.integer_kernels else target.precision
    if widest <= HALF_BITS and "fp16" in target.precisions:
        return "fp16"
    return "fp32" if widest <= FLOAT_BITS and "fp32" in target.precisions else target.precision


def is_this_machine(target: Target) -> bool:
    """Whether ``target`` is the kind of machine that this program runs on."""
    try:
        board = _BOARD_NAME.read_text(encoding="utf-8", errors="replace")
    except OSError:
        board = ""
    return is_device(target, platform.machine(), board)


def is_device(target: Target, architecture: str, board: str) -> bool:
    """Whether a machine of this architecture, whose device tree calls it ``board`` (or nothing), is a ``target``."""
    if target.name in ("x86", "x86-avx2"):
        return architecture.lower() in ("x86_64", "amd64")
    return target.device in board
