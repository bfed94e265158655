"""From what a caller says to the whole configuration of a run: defaults, names that are checked, paths in one spelling."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError
from torch import nn

from edgecompress.agents import AGENTS
from edgecompress.data import Dataset
from edgecompress.devices import device_by_name
from edgecompress.errors import UnknownNameError, UsageError
from edgecompress.importance import IMPORTANCE
from edgecompress.models import is_graph_file
from edgecompress.original import fixed_graph_options
from edgecompress.ranges import RANGES
from edgecompress.reward import REWARDS
from edgecompress.run_toml import is_path
from edgecompress.spec import Config, Target, parse_budgets
from edgecompress.training_state import PRECISIONS

DEFAULT_BUDGET = "flops=0.5x,size=0.125x"
FLOAT_BUDGET = "flops=0.5x"  # a target without integer kernels cannot shrink weights below 16 bits


def resolve(
    model: str | nn.Module, data: str | Dataset, target: Target, budget: str | None, options: dict[str, object]
) -> Config:
    """The whole configuration of a run.

    Raises:
        UsageError: an option is out of range, or torch finds no such device. UnknownNameError: an option, or the name it gives,
            is not known.
    """
    for key in options.keys() - Config.model_fields.keys():
        raise UnknownNameError("option", key, Config.model_fields)
    fields: dict[str, object] = {
        "model": model if isinstance(model, str) else f"<{type(model).__name__}>",
        "data": data if isinstance(data, str) else data.name,
        "task": "classification" if isinstance(data, str) else data.task.name,
        "target": target.name,
        "budget": budget or (DEFAULT_BUDGET if target.integer_kernels else FLOAT_BUDGET),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    } | {key: value for key, value in options.items() if value is not None}
    if is_graph_file(str(fields["model"])):
        fields |= fixed_graph_options(str(fields["model"]), target, budget, options.get("stages"))
    parse_budgets(str(fields["budget"]))
    try:
        config = Config.model_validate({key: _tidy(key, value) for key, value in fields.items()})
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"Option '{'.'.join(map(str, first['loc']))}' is wrong: {first['msg']}. See 'edgecompress compress --help'."
        ) from error
    for kind, name, known in (
        ("agent", config.agent, AGENTS),
        ("importance", config.importance, IMPORTANCE),
        ("reward", config.prune_reward, REWARDS),
        ("reward", config.quantize_reward, REWARDS),
        ("way to set ranges", config.ranges, RANGES),
        ("precision of training", config.train_precision, ("auto", *PRECISIONS)),
    ):
        if name not in known and not (kind == "reward" and ":" in name):
            raise UnknownNameError(kind, name, known)
    device_by_name(config.device)
    if config.two_four and not target.sparse_kernels:
        raise UsageError(
            f"{target.name} has no sparse kernels that a 2:4 pattern would make faster; expected TensorRT on an Ampere GPU or "
            "later. Leave --two-four out."
        )
    return config


def _tidy(key: str, value: object) -> object:
    """One spelling for one path, so that ``photos/`` and ``./photos`` resume the same run."""
    return os.path.normpath(value) if isinstance(value, str) and is_path(key, value, Path()) else value


def run_name(config: Config) -> str:
    """The folder that a run without a name gets."""
    data = Path(config.data).name or Path.cwd().name
    return f"{label(config.model)}-{data}-{config.target}".replace(":", ".")


def label(model: str) -> str:
    """What a run and its layers are called after: a name, a class, or a file or run without its folder."""
    if is_graph_file(model):
        return Path(model).stem
    return Path(model).name if Path(model).is_dir() else model.strip("<>")
