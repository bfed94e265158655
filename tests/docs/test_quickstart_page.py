"""The quickstart does what it says: its own commands in their order, made small by a run.toml as guides/running.md has it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from command_line import call
from site_pages import blocks

from edgecompress.report_rows import percent
from edgecompress.runs import RunFolder

PAGE = "quickstart.md"
SMALL = {"episodes": 8, "finetune_epochs": 1, "qat_epochs": 1, "threads": 1}


def commands() -> list[list[str]]:
    """Every command of the page that a reader types, as words."""
    lines = "\n".join(blocks(PAGE, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.slow
def test_commands_and_the_python_of_the_page_work(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("edgecompress.channel_stage.SHORT_EPOCHS", 1)
    Path("small.toml").write_text("".join(f"{key} = {value}\n" for key, value in SMALL.items()))
    said = {}
    for program, *words in commands():
        if program == "ls":
            assert all(Path(word).is_dir() for word in words)
            continue
        assert program == "edgecompress"
        small = ["--config", "small.toml", "--quiet"] if words[0] == "compress" else []
        done = call(words[0], *small, *words[1:])
        assert done.code == 0, (words, done.err)
        said[" ".join(words[:2])] = done.out
    report = RunFolder(Path("runs/first")).report()
    assert all(goal.holds for goal in report.goals) and report.config.episodes == SMALL["episodes"]
    for side in (report.original, report.compressed):
        assert percent(side.accuracy) in said["report runs/first"]
        assert percent(side.accuracy) in said[f"eval runs/first/exports/{side.file}"]
    assert Path("runs/first/exports/tensorrt/build_on_device.py").exists() and Path("runs/first/report.html").exists()

    (code,) = blocks(PAGE, "python")
    assert "resume=True)" in code
    names: dict[str, object] = {}
    exec(compile(code.replace("resume=True)", f"resume=True, **{SMALL})"), PAGE, "exec"), names)
    assert str(report.compressed.cost.size_bytes) in capsys.readouterr().out
    parameters = sum(parameter.numel() for parameter in names["model"].parameters())  # type: ignore[attr-defined]
    assert parameters == report.compressed.cost.params
