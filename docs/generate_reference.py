"""Write the reference pages out of the code: ``reference/cli.md`` from every ``--help``, the Python API from docstrings.

    python docs/generate_reference.py            # rewrites docs/reference/cli.md

mkdocs loads this file as a hook too and takes ``reference/api.md`` from it, so that page can never be out of date.
The sources are parsed, not imported: building the site needs no torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLI_PAGE = ROOT / "docs" / "reference" / "cli.md"
WIDTH = 80  # columns of the terminal that every help text has to fit
# What a user may rely on, in the order in which it is needed: file -> names; the heading is the import path.
API = {
    "edgecompress/pipeline.py": ("compress", "Run", "load"),
    "edgecompress/run_exports.py": ("export_run",),
    "edgecompress/splits.py": ("Dataset", "Split"),
    "edgecompress/data.py": ("load_data",),
    "edgecompress/models.py": ("build_model", "load_weights"),
    "edgecompress/tasks.py": ("Task", "task_by_name"),
    "edgecompress/spec.py": (
        "Config", "Budget", "parse_budgets", "Preprocessing", "CompressionPolicy", "LayerChoice", "Cost", "Trial",
        "Artifact", "Target",
    ),
    "edgecompress/report_spec.py": ("RunReport",),
    "edgecompress/runs.py": ("RunFolder",),
    "edgecompress/reward.py": (
        "accuracy_flops_latency", "accuracy_bytes_latency", "paper", "accuracy_only", "reward_by_name",
    ),
    "edgecompress/progress.py": ("Progress",),
    "edgecompress/errors.py": (
        "EdgeCompressError", "UsageError", "UnknownNameError", "BadDataError", "BadModelError", "BadFileError",
        "GoalMissedError", "MissingBackendError",
    ),
}  # fmt: skip

# Where a user imports from, where that is not the file itself.
HOMES = {
    "edgecompress.pipeline": "edgecompress",
    "edgecompress.run_exports": "edgecompress",
    "edgecompress.splits": "edgecompress.data",
}


def cli_page() -> str:
    """The text of ``reference/cli.md``: what each command says of itself in a terminal of `WIDTH` columns."""
    parts = [
        "# Command line",
        "",
        "Written by `python docs/generate_reference.py` from the commands' own help.",
        "",
        "| exit code | meaning |",
        "|---|---|",
        "| 0 | done |",
        "| 1 | an error, told in one sentence; `--debug` shows where it came from |",
        "| 2 | the call is wrong: an option, a file, a model, the data |",
        "| 3 | the run is complete, but a budget, an accuracy drop or a proof was missed |",
        "| 4 | a runtime or a device that is needed is not there |",
        "| 130 | interrupted; what was finished is kept |",
        "",
    ]
    for path, text in help_texts():
        parts += [f"## {path}", "", "```text", text, "```", ""]
    return "\n".join(parts)


def help_texts() -> Iterator[tuple[str, str]]:
    """``(command with its groups, help)`` of every command, the whole program first."""
    import click

    from edgecompress.cli.main import cli

    def walk(command: click.Command, parent: click.Context | None, name: str) -> Iterator[tuple[str, str]]:
        context = click.Context(command, parent, name, terminal_width=WIDTH, **command.context_settings)
        yield context.command_path, command.get_help(context)
        if isinstance(command, click.Group):
            for child in command.list_commands(context):
                found = command.get_command(context, child)
                assert found is not None
                yield from walk(found, context, child)

    return walk(cli, None, "edgecompress")


def api_page() -> str:
    """The text of ``reference/api.md``: signature and docstring of everything in `API`."""
    parts = [
        "# Python",
        "",
        "What is listed here is meant to be used; everything else may change without notice. Images are "
        "`uint8 [N, C, H, W]`, latencies are microseconds, sizes are bytes, accuracies lie in [0, 1].",
        "",
    ]
    for file, names in API.items():
        source = ROOT / file
        if not source.exists():
            continue
        found = {node.name: node for node in ast.parse(source.read_text(encoding="utf-8")).body if _named(node)}
        module = file.removesuffix(".py").replace("/", ".")
        shown = HOMES.get(module, module)
        if f"## {shown}" not in parts:
            parts += [f"## {shown}", ""]
        for name in names:
            if name in found:
                parts += _entry(found[name], shown, 3)
    return "\n".join(parts)


def _named(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


def _entry(node: Any, where: str, level: int) -> list[str]:
    """One heading with its signature, its text, and the public methods of a class."""
    lines = [f"{'#' * level} {node.name}", "", "```python", f"from {where} import {node.name}" if level == 3 else ""]
    lines = [line for line in lines if line or level == 3]
    fields: list[str] = []
    if isinstance(node, ast.ClassDef):
        fields = [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign) and _public(item.target)]
        initial = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        lines.append(_signature(initial[0], node.name) if initial else f"class {node.name}({bases})".replace("()", ""))
        lines += [f"    {field}" for field in fields]
    else:
        lines.append(_signature(node, node.name))
    lines += ["```", "", *_prose(ast.get_docstring(node) or ""), ""]
    if isinstance(node, ast.ClassDef):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
                lines += _method(item)
    return lines


def _public(target: ast.AST) -> bool:
    return isinstance(target, ast.Name) and not target.id.startswith("_") and target.id != "model_config"


def _signature(node: ast.FunctionDef, name: str) -> str:
    """``name(...) -> type``, one argument a line where it would not fit."""
    arguments = ast.unparse(node.args).removeprefix("self").removeprefix(", ")
    result = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    short = f"{name}({arguments}){result}"
    if len(short) <= 90:
        return short
    node.args.args = [argument for argument in node.args.args if argument.arg != "self"]
    return f"{name}(\n    " + ",\n    ".join(_arguments(node.args)) + f",\n){result}"


def _arguments(args: ast.arguments) -> list[str]:
    pad: list[ast.expr | None] = [None] * (len(args.args) - len(args.defaults))
    both = [*zip(args.args, [*pad, *args.defaults], strict=True)]
    texts = [ast.unparse(a) + (f" = {ast.unparse(d)}" if d is not None else "") for a, d in both]
    if args.kwonlyargs:
        texts.append(f"*{ast.unparse(args.vararg)}" if args.vararg else "*")
    for argument, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        texts.append(ast.unparse(argument) + (f" = {ast.unparse(default)}" if default is not None else ""))
    return [*texts, *([f"**{ast.unparse(args.kwarg)}"] if args.kwarg else [])]


def _method(node: ast.FunctionDef) -> list[str]:
    is_property = any(isinstance(d, ast.Name) and "property" in d.id for d in node.decorator_list)
    shown = node.name if is_property else re.sub(r"\n *", " ", _signature(node, node.name))
    text = " ".join(_prose(ast.get_docstring(node) or ""))
    shown = shown.replace("( ", "(").replace(" )", ")")
    return [f"* `{shown}`" + (f": {text}" if text else ""), ""]


def _prose(docstring: str) -> list[str]:
    """Sections of a Google docstring as lists; roles and reStructuredText literals as plain code."""
    text = re.sub(r"``([^`]+)``", r"`\1`", docstring)
    text = re.sub(r"\. (\w+Error): ", r".\n    \1: ", text)  # several errors on one line of a "Raises"
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        heading = re.fullmatch(r"(Args|Returns|Raises|Yields):(.*)", line)
        if heading:
            section = heading[1]
            lines += ["", f"**{ {'Args': 'Arguments'}.get(section, section) }**{heading[2]}", ""]
        elif section and line.startswith("    ") and not line.startswith("     "):
            item = re.sub(r"^([\w*, ]+): ", r"`\1`: ", line.strip()) if section != "Returns" else line.strip()
            lines.append(f"* {item}" if section != "Returns" else item)
        elif section and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        elif line.startswith("    "):
            lines.append(line)
        else:
            section = section if not line.strip() else ""
            lines.append(line)
    return lines


def on_files(files: Any, config: Any) -> Any:
    """The hook of mkdocs: add the page that is not in the repository."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "reference/api.md", content=api_page()))
    return files


if __name__ == "__main__":
    CLI_PAGE.write_text(cli_page(), encoding="utf-8")
