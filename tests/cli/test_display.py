"""Progress: a bar on a terminal, plain lines elsewhere, one JSON object per event, TensorBoard; and memory that runs out."""

from __future__ import annotations

import io
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from command_line import TINY, call
from rich.console import Console

from edgecompress.cli.display import Both, Display, JsonLines, display_for
from edgecompress.cli.main import COMMANDS
from edgecompress.pipeline import Run
from edgecompress.report_text import command as command_line_of
from edgecompress.runs import RunFolder
from edgecompress.spec import Cost, Trial


def trial(episode: int = 0, reward: float = 0.5, latency_us: float | None = 655.0) -> Trial:
    cost = Cost(
        macs=10,
        sparse_macs=10,
        params=5,
        nonzeros=5,
        size_bytes=70,
        bops=640,
        latency_us=latency_us,
        kernels_estimated=3,
    )
    return Trial(
        stage="prune", episode=episode, arm="ddpg", choice=(4,), accuracy=0.973, loss=0.1, reward=reward, cost=cost
    )


def tell(listener) -> None:
    """A short run: a search of 40, two epochs, a note."""
    listener.stage("Stage 1: channels", 40)
    for episode in range(40):
        listener.trial("prune", trial(episode), None if episode == 0 else trial(episode))
    listener.stage("Fine-tune", 2)
    for epoch in (1, 2):
        listener.epoch(epoch, 2, 0.25 / epoch)
    listener.note("a [bold]fact[/bold]")


def drawn(mode: str, *, terminal: bool, width: int = 100) -> str:
    file = io.StringIO()
    with Display(mode, Console(file=file, force_terminal=terminal, width=width, quiet=mode == "quiet")) as display:
        tell(display)
    return file.getvalue()


def test_lines_without_a_terminal_have_no_control_characters():
    lines = drawn("auto", terminal=False).splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "  Stage 1: channels: 20/40, reward 0.500, best 97.3%, 0.655 ms estimated",
        "  Stage 1: channels: 40/40, reward 0.500, best 97.3%, 0.655 ms estimated",
        "Stage 1: channels: 40/40, reward 0.500, best 97.3%, 0.655 ms estimated",
        "  a [bold]fact[/bold]",
        "Fine-tune: 2/2, loss 0.125",
    ]
    assert "\x1b" not in "".join(lines)


def test_plain_on_a_terminal_is_lines_and_quiet_is_silence():
    plain = drawn("plain", terminal=True)
    assert "20/40" in plain and "\x1b[?25l" not in plain and "\r" not in plain
    assert drawn("quiet", terminal=False) == "" == drawn("quiet", terminal=True)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_bar_on_a_terminal_shows_stage_episode_reward_best_and_time_left(width):
    file = io.StringIO()
    with Display("auto", Console(file=file, force_terminal=True, width=width, legacy_windows=False)) as display:
        display.stage("Stage 1: channels", 40)
        for episode in range(30):
            display.trial("prune", trial(episode), trial(episode))
        display._bar.refresh()
        (line,) = [line.plain for line in _rendered(display, width)]
    for part in (
        "Stage 1: channels",
        "30/40",
        ":",
        "reward 0.500",
        *(["best 97.3%", "655 ms estimated"] * (width >= 100)),
    ):
        assert part in line, line
    assert len(line.rstrip()) <= width
    assert "\x1b[?25h" in file.getvalue()  # the cursor comes back


def _rendered(display: Display, width: int):
    from rich.text import Text

    console = Console(file=io.StringIO(), width=width)
    with console.capture() as capture:
        console.print(display._bar.get_renderable())
    return [Text(line) for line in capture.get().splitlines()]


def events(out: str) -> list[dict]:
    """Strict JSON, one object a line."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in out.splitlines()]


def test_json_lines_are_one_object_per_event(capsys):
    with JsonLines() as listener:
        tell(listener)
        listener.trial("quantize", trial(latency_us=None, reward=float("-inf")), None)
        listener.epoch(1, 1, float("nan"))
    found = events(capsys.readouterr().out)
    assert [event["event"] for event in found] == [
        "stage", *["trial"] * 40, "stage", "epoch", "epoch", "note", "trial", "epoch",
    ]  # fmt: skip
    assert found[0] | {"seconds": 0} == {"event": "stage", "seconds": 0, "title": "Stage 1: channels", "total": 40}
    assert found[1]["best"] is None and (found[2]["number"], found[2]["of"]) == (2, 40)
    assert found[2]["best"]["latency_us"] == 655.0 and found[2]["best"]["latency_source"] == "estimated"
    assert found[42] | {"seconds": 0} == {
        "event": "epoch", "seconds": 0, "stage": "Fine-tune", "number": 1, "of": 2, "loss": 0.25,
    }  # fmt: skip
    assert found[-2]["reward"] is None and found[-2]["latency_us"] is None and found[-1]["loss"] is None
    times = [event["seconds"] for event in found]
    assert times == sorted(times)


@pytest.fixture
def pretended(tiny_run, monkeypatch):
    """`compress` tells a short story and returns a finished run."""

    def compress(*arguments, progress, **options):
        tell(progress)
        return Run(RunFolder(tiny_run), RunFolder(tiny_run).report())

    monkeypatch.setattr("edgecompress.pipeline.compress", compress)


def test_report_is_the_last_of_the_json_lines(pretended, tiny_run, tmp_path):
    arguments = [argument for argument in TINY if argument != "--quiet"]
    called = call("compress", *arguments, "--runs", tmp_path, "--progress", "jsonl")
    assert called.code == 0 and called.err == ""
    found = events(called.out)
    assert found[0]["event"] == "stage" and found[-1]["event"] == "report"
    assert found[-1]["report"] == RunFolder(tiny_run).report().model_dump(mode="json")
    assert found[-1]["path"] == str(tiny_run)


def test_error_is_an_event_and_a_sentence(tmp_path):
    called = call("compress", "--model", "resnet88", "--runs", tmp_path, "--progress", "jsonl")
    last = events(called.out)[-1]
    assert called.code == 2 and last["event"] == "error" and last["kind"] == "UnknownNameError"
    assert called.err.strip() == f"Error: {last['message']}"


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_quiet_and_json_keep_progress_away(pretended, tmp_path, option):
    arguments = [argument for argument in TINY if argument != "--quiet"]
    loud = call("compress", *arguments, "--runs", tmp_path)
    assert "Stage 1: channels" in loud.err
    called = call("compress", *arguments, "--runs", tmp_path, option)
    assert called.err == "" and called.code == 0
    if option == "--json":
        assert json.loads(called.out)["name"] == "tiny"


# ---------------------------------------------------------------------------------------------------- TensorBoard


class Writer:
    """Stands in for SummaryWriter where TensorBoard is not installed."""

    scalars: list[tuple[str, float, int]]
    closed = False

    def __init__(self, folder: str) -> None:
        type(self).scalars, type(self).closed = [], False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        type(self).closed = True


def test_scalars_of_every_stage(monkeypatch, tmp_path):
    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    with display_for("quiet", str(tmp_path / "logs")) as listener:
        assert isinstance(listener, Both)
        tell(listener)
    assert Writer.closed
    names = {name for name, _, _ in Writer.scalars}
    assert names == {"prune/reward", "prune/accuracy", "prune/best_accuracy", "prune/best_latency_us", "loss/Fine-tune"}
    assert [step for name, _, step in Writer.scalars if name == "prune/reward"] == list(range(1, 41))
    assert ("loss/Fine-tune", 0.125, 2) in Writer.scalars


def test_tensorboard_writes_a_file_that_it_reads_back(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed (extra 'tensorboard')")
    with display_for("quiet", str(tmp_path / "logs")) as listener:
        tell(listener)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [event.value for event in read.Scalars("loss/Fine-tune")] == [0.25, 0.125]


def test_missing_tensorboard_is_told_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("edgecompress.pipeline.compress", lambda *a, **k: pytest.fail("work began"))
    called = call("compress", *TINY, "--runs", tmp_path, "--tensorboard", tmp_path / "logs")
    assert called.code == 4 and "pip install 'edgecompress[tensorboard]'" in called.err and called.out == ""


# ---------------------------------------------------------------------------------------------- memory that runs out


def gpu_error() -> Exception:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines")


CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [MemoryError(), CPU, gpu_error()])
def test_out_of_memory_says_what_to_try_and_that_nothing_is_lost(monkeypatch, tmp_path, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("edgecompress.pipeline.compress", fail)
    called = call("compress", *TINY, "--batch-size", "48", "--runs", tmp_path)
    assert called.code == 1 and len(called.err.strip().splitlines()) == 1
    assert "--resume --batch-size 24 --threads 1" in called.err and "what was finished is kept" in called.err
    monkeypatch.setattr("edgecompress.plan.make_plan", fail)
    planned = call("compress", *TINY, "--runs", tmp_path, "--dry-run")
    assert planned.code == 1 and "try --batch-size 32" in planned.err and "--resume" not in planned.err


def test_other_errors_are_not_taken_for_memory(monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("edgecompress.pipeline.compress", fail)
    called = call("compress", *TINY, "--runs", tmp_path)
    assert called.code == 1 and "shapes do not match" in called.err and "memory" not in called.err


# -------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", ["80", "100", "200"])
def test_help_has_an_example_and_fits(monkeypatch, name, columns):
    monkeypatch.setenv("COLUMNS", columns)
    called = call(name, "--help")
    assert called.code == 0 and f"edgecompress {name}" in called.out.partition("Example")[2].replace("  ", " ")
    assert max(map(len, called.out.splitlines())) <= min(int(columns), 100)


def test_exit_codes_are_in_the_help_of_the_program():
    from edgecompress import errors

    text = call("--help").out
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    listed = {
        line.split()[0] for line in text.partition("Exit codes:")[2].splitlines()[1:] if line.strip()[:1].isdigit()
    }
    assert listed == {"0", "130", *(str(kind.exit_code) for kind in kinds)}
    for name in COMMANDS:
        assert f"\n  {name} " in text


def test_command_of_a_report_is_understood(tiny_run, monkeypatch, tmp_path):
    """The line that the report prints is parsed back into the same configuration."""
    import shlex

    from edgecompress.latency_tables.targets import target_by_name
    from edgecompress.options import resolve

    config = RunFolder(tiny_run).config().model_copy(
        update={"importance": "l1", "allow_mismatch": True, "batch_size": 32, "prune_reward": "paper"}
    )  # fmt: skip
    seen = []

    def stop(model, data, target, budget, *, name, runs, resume, overwrite, progress, **options):
        seen.append(resolve(model, data, target_by_name(target), budget, options))
        return SimpleNamespace(path=tmp_path, missed=[], report=RunFolder(tiny_run).report())

    monkeypatch.setattr("edgecompress.pipeline.compress", stop)
    called = call(*shlex.split(command_line_of(config))[1:], "--quiet")
    assert called.code == 0, called.err
    assert seen == [config]


def test_reading_images_is_shown_by_every_listener(capsys, monkeypatch):
    file = io.StringIO()
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("edgecompress.cli.display.time.monotonic", lambda: float(next(clock)))
    with Display("plain", Console(file=file, force_terminal=False, width=100)) as display, JsonLines() as jsonl:
        both = Both(display, jsonl)
        both.stage("Read photos", 90_000)
        for done in range(10_000, 100_000, 10_000):
            both.step(done, 90_000)
    lines = file.getvalue().splitlines()
    assert "  Read photos: 30,000/90,000" in lines and 2 <= len(lines) < 8 and "90000/90000" in lines[-1]
    steps = [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:]
    assert [step["number"] for step in steps] == list(range(10_000, 100_000, 10_000))
    assert all((step["event"], step["stage"], step["of"]) == ("step", "Read photos", 90_000) for step in steps)


def test_score_of_an_error_is_shown_as_it_is():
    file = io.StringIO()
    with Display("plain", Console(file=file, force_terminal=False, width=100)) as display:
        display.stage("Stage 1: channels", 20)
        for episode in range(20):
            best = trial(episode, latency_us=None).model_copy(update={"accuracy": -3.25})
            display.trial("prune", best, best)
    assert "best 3.25" in file.getvalue()
