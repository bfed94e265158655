"""Every command documents itself: in the page, with an example, and inside an 80-column terminal."""

from __future__ import annotations

import importlib.util
import shlex
from types import ModuleType

import click
import pytest
from click.testing import CliRunner
from site_pages import DOCS

from edgecompress.cli.main import COMMANDS, cli


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", DOCS / "generate_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = _generator()
TEXTS = dict(REFERENCE.help_texts())


def test_page_is_what_the_commands_say() -> None:
    assert REFERENCE.CLI_PAGE.read_text(encoding="utf-8") == REFERENCE.cli_page(), (
        "docs/reference/cli.md is out of date: run python docs/generate_reference.py"
    )


def test_every_command_is_in_the_page() -> None:
    assert set(TEXTS) >= {"edgecompress", *(f"edgecompress {name}" for name in COMMANDS)}


@pytest.mark.parametrize("command", TEXTS)
def test_help_fits_its_terminal(command: str) -> None:
    assert [line for line in TEXTS[command].splitlines() if len(line) > REFERENCE.WIDTH] == []


@pytest.mark.parametrize("command", TEXTS)
def test_help_has_an_example_that_parses(command: str) -> None:
    text = TEXTS[command]
    assert "Example" in text, f"'{command} --help' has no example"
    example = text[text.index("Example") :].split("\n\n")[0].replace("\\\n", " ")
    calls = [line.strip() for line in example.splitlines() if line.strip().startswith("edgecompress ")]
    assert calls, "an example stands on a line of its own"
    for call in calls:
        name, *arguments = shlex.split(call)[1:]
        found = cli.get_command(click.Context(cli), name)
        while isinstance(found, click.Group):
            found = found.get_command(click.Context(found), arguments.pop(0))
        assert found is not None
        known = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert [a for a in arguments if a.startswith("--") and a.partition("=")[0] not in known] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    silent = [p.name for p in found.params if isinstance(p, click.Option) and not p.help and not p.hidden]
    assert silent == []


def test_the_help_that_users_see_is_the_page() -> None:
    shown = CliRunner().invoke(cli, ["targets", "--help"], prog_name="edgecompress", terminal_width=REFERENCE.WIDTH)
    assert shown.output.strip() == TEXTS["edgecompress targets"].strip()
