"""On-off options that can be turned off again, so that the command line wins over a file that says true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def switch(name: str, *parameter: str, help: str, default: bool | None = False) -> Callable[[Any], Any]:
    """``--name/--no-name``; off, unless ``default`` says on; None: neither was said."""
    return click.option(f"--{name}/--no-{name}", *parameter, default=default, help=help)
