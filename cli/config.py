"""``--config run.toml``: every option of a command from a file; the command line wins."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import click

from edgecompress.errors import BadFileError, UnknownNameError, UsageError

_SCHEMA = "schema_version"


def read_options(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Callback of an eager ``--config``: what the file says becomes the defaults of the command's other options."""
    if value is not None:
        found = options_of(Path(value), ctx.command, ctx)
        ctx.default_map = {**(ctx.default_map or {}), **found}


def options_of(path: Path, command: click.Command, ctx: click.Context) -> dict[str, Any]:
    """``{parameter: value}`` of a configuration file; keys are the long options, with - or _.

    Raises:
        BadFileError: the file is missing or no TOML, or of another schema. UnknownNameError: a key is no option.
        UsageError: a value has the wrong type or is out of range.
    """
    from edgecompress.run_toml import from_file

    known = {
        _key(option): option for option in command.params if isinstance(option, click.Option) and _settable(option)
    }
    found: dict[str, Any] = {}
    for key, value in _read(path).items():
        name = key.replace("-", "_")
        if name == _SCHEMA:
            _check_schema(path, value)
            continue
        if name not in known:
            raise UnknownNameError(f"option in {path}:", key, known)
        option = known[name]
        typed = _typed(path, key, value, option, ctx)
        assert option.name is not None
        found[option.name] = from_file(name, typed, path.parent) if isinstance(typed, str) else typed
    return found


def _key(option: click.Option) -> str:
    """The name of an option in a file: its long form."""
    return next(text for text in option.opts if text.startswith("--")).removeprefix("--").replace("-", "_")


def _settable(option: click.Option) -> bool:
    return option.expose_value  # --config and --help are not


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise BadFileError(f"There is no configuration at {path}. Check the path after --config.") from error
    except tomllib.TOMLDecodeError as error:
        raise BadFileError(f"The configuration {path} is no TOML: {error}. Mend it there.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadFileError(f"The configuration {path} cannot be read: {error}. Name a text file.") from error


def _check_schema(path: Path, value: object) -> None:
    from edgecompress.spec import SCHEMA_VERSION

    if value != SCHEMA_VERSION:
        raise BadFileError(
            f"The configuration {path} has schema version {value}; this edgecompress reads {SCHEMA_VERSION}. "
            "Use the edgecompress that wrote it, or take that line out."
        )


def _typed(path: Path, key: str, value: Any, option: click.Option, ctx: click.Context) -> Any:
    """``value`` if the option takes its type and its range allows it; a list of words becomes one string."""
    if isinstance(value, list) and option.type is click.STRING and all(isinstance(word, str) for word in value):
        value = ",".join(value)
    wanted, word = _type_of(option)
    if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool):
        raise UsageError(f"{path}: '{key}' is {value!r} ({type(value).__name__}); expected {word}.")
    try:
        option.type.convert(value, option, ctx)
    except click.BadParameter as error:
        raise UsageError(f"{path}: '{key}' is wrong: {error.message.rstrip('.')}.") from error
    return value


def _type_of(option: click.Option) -> tuple[Any, str]:
    if option.is_flag:
        return bool, "true or false"
    if isinstance(option.type, click.types.FloatParamType):
        return (int, float), "a number"
    if isinstance(option.type, click.types.IntParamType):
        return int, "a whole number"
    return str, "a string"
