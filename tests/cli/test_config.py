"""--config: every option from a file, the command line on top, and mistakes named with the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import call

from edgecompress.cli.compress import command
from edgecompress.latency_tables.targets import target_by_name
from edgecompress.options import resolve
from edgecompress.run_toml import to_toml
from edgecompress.runs import RunFolder, opened
from edgecompress.spec import Config

OTHER = {
    "model": "resnet20", "data": "other.module:data", "weights": "w.pt", "image_size": 48,
    "task": "segmentation", "unlabelled": True, "preprocessing": "data",
    "trust": True, "download": True, "target": "x86", "budget": "flops=0.25x", "max_accuracy_drop": 1.5,
    "stages": ["prune"], "agent": "td3", "episodes": 9, "seed": 5, "importance": "l1", "prune_reward": "paper",
    "quantize_reward": "accuracy", "finetune_epochs": 2, "noise_epochs": 2, "qat_epochs": 1, "learning_rate": 0.5, "ema": 0.9,
    "batch_size": 16, "table": "t.csv", "require_measured": True, "allow_mismatch": True, "threads": 77, "device": "cpu",
    "ranges": "entropy", "equalise": True, "bias_correction": True, "reconstruct": False, "single_weights": True, "two_four": True,
    "divisor": 4, "learned_rounding": True, "pin_bits": "fc=8", "free_activations": True, "reward_steps": 3, "alternate": 1,
    "pick": "runs/first", "train_precision": "fp32",
}  # fmt: skip


class Called(Exception):
    """What `compress` was called with."""


@pytest.fixture
def asked(monkeypatch):
    """Call ``compress ARGUMENTS`` and get the configuration that it would run, and the other arguments."""

    def stop(model, data, target, budget, *, name, runs, resume, overwrite, progress, **options):
        config = resolve(model, data, target_by_name(target), budget, options)
        raise Called(config, {"name": name, "runs": str(runs), "resume": resume, "overwrite": overwrite})

    monkeypatch.setattr("edgecompress.pipeline.compress", stop)

    def ask(*arguments):
        with pytest.raises(Called) as found:
            command.main(["--quiet", *map(str, arguments)], standalone_mode=False)
        return found.value.args

    return ask


def written(path: Path, **values: object) -> Path:
    """A TOML file; JSON's numbers, strings, lists and booleans are TOML's."""
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    return path


def test_there_is_an_option_for_every_field_of_the_configuration():
    names = {parameter.name for parameter in command.params}
    assert set(Config.model_fields) - {"schema_version"} <= names
    assert set(OTHER) == set(Config.model_fields) - {"schema_version"}


@pytest.mark.parametrize("key", OTHER)
def test_every_option_is_taken_from_the_file_and_the_command_line_wins(asked, tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    plain, _ = asked()
    value = OTHER[key]
    assert getattr(plain, key) != (tuple(value) if key == "stages" else value)
    path = written(tmp_path / "run.toml", **{key: value})
    config, _ = asked("--config", path)
    changed = {name for name, old in plain if getattr(config, name) != old}
    assert changed == {key} and getattr(config, key) == (tuple(value) if key == "stages" else value)
    option, default = f"--{key.replace('_', '-')}", getattr(plain, key)
    if isinstance(value, bool):
        assert getattr(asked("--config", path, f"--no-{option[2:]}")[0], key) is False
    elif key == "stages":
        assert asked("--config", path, option, "quantize")[0].stages == ("quantize",)
    elif default is not None:
        assert getattr(asked("--config", path, option, default)[0], key) == default


def test_the_order_on_the_command_line_does_not_matter_and_dashes_are_taken(asked, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("schema_version = 1\nqat-epochs = 2\nepisodes = 20\n", encoding="utf-8-sig")
    config, _ = asked("--episodes", "10", "--config", path)
    assert (config.qat_epochs, config.episodes) == (2, 10)


def test_what_is_not_part_of_the_configuration_is_taken_too(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    path = written(tmp_path / "sub" / "a.toml", name="first", runs="../all", resume=True, progress="plain")
    _, rest = asked("--config", path)
    assert rest == {"name": "first", "runs": "all", "resume": True, "overwrite": False}
    _, rest = asked("--config", path, "--no-resume", "--overwrite", "--name", "second")
    assert rest == {"name": "second", "runs": "all", "resume": False, "overwrite": True}


def test_paths_are_relative_to_the_file(asked, tmp_path, monkeypatch):
    (tmp_path / "sub" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "sub" / "a.toml", data="photos", weights="w.pt", table="../t.csv")
    config, _ = asked("--config", Path("sub/a.toml"))
    assert (config.data, config.weights, config.table) == ("sub/photos", "sub/w.pt", "t.csv")
    assert asked("--data", "sub/photos/", "--weights", "./sub/w.pt", "--table", "t.csv")[0] == config
    path = written(tmp_path / "sub" / "a.toml", data="digits", weights="none")
    config, _ = asked("--config", path)
    assert (config.data, config.weights) == ("digits", "none")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("epsodes = 3", ("Unknown option in ", "run.toml: 'epsodes'. Did you mean 'episodes'?")),
        ("config = 'x'", ("Unknown option in ", "'config'")),
        ("help = true", ("Unknown option in ", "'help'")),
        ("episodes = '80'", ("'episodes' is '80' (str); expected a whole number",)),
        ("episodes = 8.5", ("'episodes' is 8.5 (float); expected a whole number",)),
        ("episodes = true", ("'episodes' is True (bool); expected a whole number",)),
        ("episodes = 3", ("'episodes' is wrong: 3 is not in the range x>=8.",)),
        ("trust = 1", ("'trust' is 1 (int); expected true or false",)),
        ("trust = 'yes'", ("'trust' is 'yes' (str); expected true or false",)),
        ("model = 5", ("'model' is 5 (int); expected a string",)),
        ("learning_rate = 'fast'", ("'learning_rate' is 'fast' (str); expected a number",)),
        ("learning_rate = true", ("'learning_rate' is True (bool); expected a number",)),
        ("stages = ['prune', 1]", ("'stages' is ['prune', 1] (list); expected a string",)),
        ("progress = 'loud'", ("'progress' is wrong: 'loud' is not one of",)),
        ("[compress]\nepisodes = 9", ("Unknown option in ", "'compress'. Did you mean")),
        ("seed = 1\nepisodes = \nname = 3", ("is no TOML", "line 2")),
        ("schema_version = 2", ("has schema version 2; this edgecompress reads 1",)),
    ],
)
def test_mistakes_are_one_sentence_that_names_the_file(tmp_path, text, parts):
    path = tmp_path / "run.toml"
    path.write_text(text)
    called = call("compress", "--config", path, "--runs", tmp_path / "runs")
    assert called.code == 2 and called.out == "" and called.err.count("Error: ") == 1
    assert len(called.err.strip().splitlines()) == 1 and str(path) in called.err
    for part in parts:
        assert part in called.err, called.err
    assert not (tmp_path / "runs").exists()


def test_missing_file_and_folder_are_refused(tmp_path):
    for path, part in ((tmp_path / "none.toml", "There is no configuration at"), (tmp_path, "cannot be read")):
        called = call("compress", "--config", path)
        assert called.code == 2 and part in called.err and str(path) in called.err


def test_options_that_a_search_would_refuse_late_are_refused_at_once(tmp_path):
    for option, value in (("--importance", "l3"), ("--prune-reward", "papr"), ("--quantize-reward", "acuracy")):
        called = call("compress", option, value, "--runs", tmp_path / "runs")
        assert called.code == 2 and f"'{value}'. Did you mean" in called.err
    with pytest.raises(Exception, match=r"Unknown option 'epsodes'\. Did you mean 'episodes'"):
        resolve("resnet8", "digits", target_by_name("x86"), None, {"epsodes": 9})


# ------------------------------------------------------------------------------------------------ a run's own file


def test_the_file_of_a_run_gives_the_same_run(asked, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, rest = asked("--config", tiny_run / "run.toml")
    assert config == RunFolder(tiny_run).config()
    assert rest["name"] == "tiny" and Path(rest["runs"]).resolve() == tiny_run.parent.resolve()
    other, _ = asked("--config", tiny_run / "run.toml", "--seed", "7")
    assert other == config.model_copy(update={"seed": 7})


def test_the_file_is_written_again_with_the_run(tmp_path):
    config = Config(budget="flops=0.5x")
    with opened(tmp_path / "a", config, resume=False, overwrite=False) as run:
        assert run.file("run.toml").read_text() == to_toml(config, run.path)
    with opened(tmp_path / "a", config.model_copy(update={"seed": 3}), resume=False, overwrite=True) as run:
        assert "seed = 3" in run.file("run.toml").read_text()


def test_a_resumed_run_may_take_less_memory_and_nothing_else(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    config = RunFolder(tiny_run).config()
    less = config.model_copy(update={"batch_size": 8, "threads": 1})
    with opened(tmp_path / "run", less, resume=True, overwrite=False) as run:
        assert run.config() == less
    with (
        pytest.raises(Exception, match="was made with seed="),
        opened(tmp_path / "run", config.model_copy(update={"seed": 9}), resume=True, overwrite=False),
    ):
        pass


def test_another_batch_size_trains_in_other_steps(digits):
    from types import SimpleNamespace

    from edgecompress.job import train_settings

    job = SimpleNamespace(
        config=Config(budget="flops=0.5x", batch_size=8),
        data=SimpleNamespace(labelled=True),
        original=torch.nn.Identity(),
    )
    assert train_settings(job, 3).batch_size == 8
