"""The command line: every bad input is one sentence and an exit code, every good one says what it did."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from command_line import BUDGET, TINY, call, python
from sample_networks import Residual, settled

from edgecompress.cli.main import COMMANDS
from edgecompress.report_spec import RunReport
from edgecompress.spec import Config


def refused(called, code: int, *parts: str) -> None:
    """One sentence on stderr, nothing on stdout, no traceback."""
    assert called.code == code, called.err
    assert "Traceback" not in called.err and called.out == ""
    lines = [line for line in called.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("Error: ") and lines[0].rstrip().endswith((".", "'", ")")), (
        called.err
    )
    for part in parts:
        assert part in lines[0]


# ----------------------------------------------------------------------------------------------------- a good run


def test_compress_prints_one_table_and_where_the_report_is(tiny_call):
    called, path = tiny_call
    assert called.code == 0 and called.err == ""
    for word in (
        "accuracy",
        "parameters",
        "MACs",
        "BOPs",
        "original",
        "compressed",
        "stimated",
        str(path / "report.html"),
    ):
        assert word.lower() in called.out.lower(), word


def test_report_as_json_is_the_document(tiny_run):
    called = call("report", tiny_run, "--format", "json")
    assert called.code == 0
    assert RunReport.model_validate_json(called.out).name == "tiny"


@pytest.mark.parametrize("format_name", ["onnx", "onnxruntime", "tensorrt"])
def test_export_again_gives_the_same_file(tiny_run, tmp_path, format_name):
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    before = json.loads((copy / "exports/export.json").read_text())[format_name]
    shutil.rmtree(copy / "exports")
    called = call("export", copy, "--format", format_name, "--json")
    assert called.code == 0, called.err
    assert json.loads(called.out)["sha256"] == before["sha256"]
    plain = call("export", copy, "--format", format_name)
    assert plain.code == 0 and f"{before['size_bytes']:,} bytes" in plain.out
    assert ("build_on_device.py" in plain.out) == (format_name == "tensorrt")


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx", "original.onnx", "tensorrt/model.onnx"])
def test_eval_measures_what_the_report_says(tiny_run, name, quick):
    called = call("eval", tiny_run / "exports" / name, "--data", "digits", "--json")
    assert called.code == 0, called.err
    found = json.loads(called.out)
    report = RunReport.model_validate_json((tiny_run / "report.json").read_text())
    (row,) = [row for row in report.artifacts if row.name == name]
    assert found["accuracy"] == row.accuracy and found["size_bytes"] == row.size_bytes and found["images"] == 600
    assert (found["median_us"] is None) == name.startswith("tensorrt")


def test_eval_of_a_run_folder_takes_its_integer_file(tiny_run, quick):
    called = call("eval", tiny_run)
    assert called.code == 0 and "model.int8.onnx" in called.out and "top-1 accuracy" in called.out


def test_version_and_help():
    assert call("--version").out.startswith("edgecompress, version ")
    for command in COMMANDS:
        shown = call(command, "--help")
        assert (shown.code == 0 and "Example" in shown.out) or command in ("profile", "targets"), command


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def no_training(monkeypatch):
    """What can be known from the call alone is refused before hours of training."""
    monkeypatch.setattr("torch.nn.Conv2d.forward", lambda *a, **k: pytest.fail("work began before the check"))


@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("--target", "jetsn", ("Unknown target 'jetsn'. Did you mean 'jetson'?", "raspberry-pi-5")),
        ("--data", "digit", ("Unknown data 'digit'. Did you mean 'digits'?",)),
        ("--data", "no/such/folder", ("There is no data folder at no/such/folder",)),
        ("--budget", "flops=", ("Budget 'flops=' does not parse; expected METRIC=LIMIT",)),
        ("--budget", "flop=0.5x", ("Unknown budget metric 'flop'. Did you mean 'flops'?",)),
        ("--budget", "flops=1.5x", ("above the original network",)),
        ("--budget", "size=3parsec", ("unknown unit 'parsec'",)),
        ("--agent", "dpg", ("Unknown agent 'dpg'. Did you mean 'ddpg'?",)),
        ("--stages", "prun", ("stages",)),
        ("--learning-rate", "-1", ("learning_rate",)),
    ],
)
def test_wrong_option_of_compress_is_refused(no_training, tmp_path, option, value, parts):
    refused(call("compress", *TINY, option, value, "--runs", tmp_path / "runs"), 2, *parts)
    assert not list((tmp_path).rglob("report.json"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("resnet88", ("Unknown model 'resnet88'. Did you mean 'resnet8'?",)),
        ("sample_networks:residul", ("Cannot import the model factory 'sample_networks:residul'",)),
        ("no_such_module:f", ("Cannot import the model factory 'no_such_module:f'",)),
    ],
)
def test_unknown_model_is_refused(tmp_path, name, parts):
    refused(call("compress", *TINY, "--model", name, "--runs", tmp_path), 2, *parts)


def test_budget_that_cannot_be_met_says_the_smallest_that_can(quick, tmp_path):
    called = call("compress", *TINY, "--budget", "flops=0.001x", "--runs", tmp_path)
    refused(called, 3, "The budget flops=0.001x cannot be met", "the smallest flops that this network can reach")


def test_size_budget_that_cannot_be_met_says_the_smallest_that_can(quick, tmp_path):
    called = call("compress", *TINY, "--budget", "size=100B", "--runs", tmp_path)
    refused(called, 3, "The budget size=100 B cannot be met", "the smallest size")


def test_checkpoint_that_does_not_fit_names_both_shapes(tmp_path):
    state = settled(Residual(10)).state_dict()
    name = next(iter(state))
    torch.save(state | {name: torch.zeros(3, 3)}, tmp_path / "w.pt")
    called = call("compress", *TINY, "--weights", tmp_path / "w.pt", "--runs", tmp_path / "runs")
    refused(called, 2, f"'{name}' is (3, 3) in the file")
    refused(
        call("compress", *TINY, "--weights", tmp_path / "none.pt", "--runs", tmp_path / "runs2"), 2, "no checkpoint at"
    )


@pytest.mark.parametrize("classes", [0, 1])
def test_data_folder_without_images_or_with_one_class(tmp_path, classes):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(classes):
        (folder / f"class{number}").mkdir()
    called = call("compress", *TINY, "--data", folder, "--runs", tmp_path / "runs")
    refused(called, 2, "has no class folders" if classes == 0 else "has the one class 'class0'")


def test_network_with_nothing_to_prune(quick, tmp_path):
    called = call("compress", *TINY, "--model", "sample_networks:unprunable", "--runs", tmp_path)
    refused(called, 2, "sample_networks:unprunable has nothing to prune", "--stages quantize")


def test_existing_run_needs_resume_or_overwrite(tiny_run):
    before = (tiny_run / "report.json").read_bytes()
    arguments = ("compress", *TINY, "--runs", tiny_run.parent, "--name", "tiny")
    refused(call(*arguments), 2, f"The run {tiny_run} exists", "--resume", "--overwrite")
    refused(call(*arguments, "--resume", "--overwrite"), 2, "exclude each other")
    assert (tiny_run / "report.json").read_bytes() == before


@pytest.mark.parametrize(("option", "value"), [("--seed", "1"), ("--episodes", "13"), ("--budget", "flops=0.7x")])
def test_resume_with_other_options_is_refused(tiny_run, option, value):
    called = call("compress", *TINY, option, value, "--runs", tiny_run.parent, "--name", "tiny", "--resume")
    refused(called, 2, f"was made with {option.strip('-')}=", "Resume with the same options")


def test_overwrite_starts_from_nothing(quick, tiny_run, tmp_path):
    """What the old run left must not show through; here the new one is refused half-way."""
    shutil.copytree(tiny_run, tmp_path / "run")
    called = call("compress", *TINY, "--budget", "flops=0.001x", "--runs", tmp_path, "--name", "run", "--overwrite")
    assert called.code == 3
    for name in (
        "policy.json",
        "report.json",
        "trials.jsonl",
        "checkpoints",
        "model.safetensors",
        "exports/model.onnx",
    ):
        assert not (tmp_path / "run" / name).exists(), name


def test_refused_budget_leaves_nothing_in_the_way_of_the_corrected_call(quick, tmp_path):
    from edgecompress.errors import UsageError
    from edgecompress.runs import opened

    arguments = ("compress", *TINY, "--runs", tmp_path, "--name", "run", "--budget", "flops=0.001x")
    refused(call(*arguments), 3, "cannot be met")
    path = tmp_path / "run"
    assert (path / "exports" / "original.onnx").exists()
    corrected = json.loads((path / "config.json").read_text()) | {"budget": "flops=0.9x"}
    config = Config.model_validate(corrected)
    with opened(path, config, resume=False, overwrite=False) as run:
        assert run.config() == config and not (path / "exports").exists()
        run.file("trials.jsonl").touch()
    with pytest.raises(UsageError, match="exists"), opened(path, config, resume=False, overwrite=False):
        pass


def test_second_process_on_the_same_run_is_refused(tiny_run, tmp_path):
    from edgecompress.files import locked

    shutil.copytree(tiny_run, tmp_path / "run")
    with locked(tmp_path / "run"):
        code = "import sys\nfrom edgecompress.cli.main import main\nmain(sys.argv[1:])"
        done = python(code, "compress", *TINY, "--runs", tmp_path, "--name", "run", "--resume")
    assert done.returncode == 2
    assert f"Another process is working on {tmp_path / 'run'}" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["export", "report", "eval"])
def test_run_that_is_missing_is_refused(tmp_path, command):
    refused(call(command, tmp_path / "none"), 2, str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("command", "file", "content", "parts"),
    [
        ("export", "config.json", "{ torn", ("config.json is broken",)),
        ("export", "policy.json", '{"schema_version": 99}', ("has schema version 99; this edgecompress reads 1",)),
        ("report", "report.json", '{"schema_version": 99}', ("has schema version 99; this edgecompress reads 1",)),
        ("report", "report.json", "{ torn", ("report.json is broken",)),
        ("report", "trials.jsonl", "{ torn }\n", ("Line 1 of the trial journal",)),
        ("eval", "exports/model.int8.onnx", "no onnx", ("is no ONNX file",)),
    ],
)
def test_broken_run_is_refused(tiny_run, tmp_path, command, file, content, parts):
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    (copy / file).write_text(content)
    refused(call(command, copy), 2, *parts)


def test_unfinished_run_says_how_to_go_on(tiny_run, tmp_path):
    for name in ("config.json", "layers.json"):
        (tmp_path / name).write_bytes((tiny_run / name).read_bytes())
    refused(call("export", tmp_path), 2, "--resume")


def test_unknown_format_and_command_name_the_nearest(tiny_run):
    refused(call("export", tiny_run, "--format", "onnxrt"), 2, "Unknown format 'onnxrt'. Did you mean 'onnx")
    refused(call("compres"), 2, "Unknown command 'compres'. Did you mean 'compress'?")


def test_engine_without_tensorrt_is_exit_code_4(tiny_run, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    shutil.copytree(tiny_run, tmp_path / "run")
    called = call("export", tmp_path / "run", "--format", "tensorrt", "--engine")
    refused(called, 4, "No engine can be built on this machine", "build_on_device.py")
    assert not list((tmp_path / "run").rglob("*.engine"))
    refused(call("export", tiny_run, "--format", "onnx", "--engine"), 2, "--engine builds a TensorRT engine")


def test_layers_that_run_in_fp16_are_named(tiny_run, tmp_path):
    names = list(json.loads((tiny_run / "policy.json").read_text())["layers"])
    out = ("--out", tmp_path)
    called = call(
        "export", tiny_run, "--format", "tensorrt", "--fp16-layers", f"{names[0]}, {names[-1]}", *out, "--json"
    )
    assert called.code == 0, called.err
    assert json.loads(called.out)["checks"]["half_layers"] == 2
    options = ("export", tiny_run, *out, "--fp16-layers")
    refused(call(*options, names[0]), 2, "Layers in FP16 are for TensorRT files")
    refused(call(*options, "nonsense", "--format", "tensorrt"), 2, "Unknown layer with integer weights 'nonsense'")


def test_full_disk_is_one_sentence_and_leaves_the_old_artifact(tiny_run, tmp_path, monkeypatch):
    import errno
    import os

    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    before = (copy / "exports/model.onnx").read_bytes()

    def no_space(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.replace", no_space)
    refused(call("export", copy, "--format", "onnx"), 1, "The disk is full: cannot write", "model.onnx")
    assert (copy / "exports/model.onnx").read_bytes() == before
    assert not [path for path in copy.rglob(".*") if path.name != ".lock"]


def test_artifact_of_another_image_size_is_refused(tiny_run, tmp_path):
    import numpy as np
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(25):
            Image.fromarray(np.full((20, 20, 3), number * 10, np.uint8)).save(tmp_path / name / f"{number}.png")
    called = call("eval", tiny_run / "exports/model.onnx", "--data", tmp_path, "--image-size", "20")
    refused(called, 2, "takes images of shape [3, 32, 32]", "--image-size 32")
    assert call("eval", tiny_run / "exports/model.onnx", "--data", tmp_path).code == 0  # prepared as the file says


def test_missed_goal_is_exit_code_3_after_the_table(tiny_run, tmp_path, monkeypatch):
    from edgecompress.pipeline import Run
    from edgecompress.runs import RunFolder

    report = RunFolder(tiny_run).report()
    missed = report.goals[1].model_copy(update={"value": 2 * report.goals[1].limit, "holds": False})
    run = Run(RunFolder(tiny_run), report.model_copy(update={"goals": (report.goals[0], missed)}))
    monkeypatch.setattr("edgecompress.pipeline.compress", lambda *a, **k: run)
    called = call("compress", *TINY, "--runs", tmp_path)
    assert called.code == 3 and "MACs" in called.out
    assert f"missed its goal: {BUDGET.split(',')[1]}" in called.err and "Traceback" not in called.err


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "go on with --resume"),
        (RuntimeError("a bug\nof two lines"), 1, "(RuntimeError: a bug)"),
        (MemoryError(), 1, "MemoryError"),
    ],
)
def test_interrupt_and_bug_are_one_sentence_and_debug_shows_the_traceback(tmp_path, monkeypatch, error, code, sentence):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("edgecompress.pipeline.compress", fail)
    refused(call("compress", *TINY, "--runs", tmp_path), code, sentence)
    shown = call("--debug", "compress", *TINY, "--runs", tmp_path)
    assert shown.code == code and "Traceback" in shown.err and sentence in shown.err


def test_click_errors_are_exit_code_2_without_a_traceback(tmp_path):
    for arguments in (
        ("compress", "--episodes", "3"),
        ("compress", "--nonsense"),
        ("export",),
        ("eval", "x", "--threads", "0"),
    ):
        called = call(*arguments)
        assert called.code == 2 and "Error:" in called.err and "Traceback" not in called.err
