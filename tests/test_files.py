"""Files that survive a kill, a full disk and a second process."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys

import pytest

from edgecompress.errors import BadFileError, EdgeCompressError, UsageError
from edgecompress.files import (
    append_line,
    cache_folder,
    file_sha256,
    locked,
    read_document,
    read_json,
    read_lines,
    sha256,
    write_bytes,
    write_text,
    written_whole,
)
from edgecompress.spec import CompressionPolicy, Cost, Trial

COST = Cost(macs=1, sparse_macs=1, params=1, nonzeros=1, size_bytes=1, bops=1)


def trial(episode: int) -> Trial:
    return Trial(
        stage="prune", episode=episode, arm="ddpg", choice=(4, episode), accuracy=0.1 + 0.2, loss=1 / 3, reward=0.25,
        cost=COST,
    )  # fmt: skip


@pytest.fixture
def journal(tmp_path):
    path = tmp_path / "trials.jsonl"
    for episode in range(3):
        append_line(path, trial(episode))
    return path


def test_trials_come_back_exactly(journal):
    assert read_lines(journal, Trial, "journal") == [trial(0), trial(1), trial(2)]


def test_missing_journal_is_empty(tmp_path):
    assert read_lines(tmp_path / "none.jsonl", Trial, "journal") == []


@pytest.mark.parametrize("lost", [1, 2, 40])
def test_torn_last_line_is_dropped_and_the_journal_goes_on(journal, lost):
    journal.write_bytes(journal.read_bytes()[:-lost])
    assert read_lines(journal, Trial, "journal") == [trial(0), trial(1)]
    append_line(journal, trial(7))
    assert read_lines(journal, Trial, "journal") == [trial(0), trial(1), trial(7)]


def test_torn_only_line_leaves_an_empty_journal(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text('{"stage": "pru')
    assert read_lines(path, Trial, "journal") == []
    append_line(path, trial(0))
    assert read_lines(path, Trial, "journal") == [trial(0)]


def test_torn_middle_line_is_refused_by_number(journal):
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([lines[0], lines[1][:30], lines[2]]) + "\n")
    with pytest.raises(BadFileError, match=r"Line 2 of the journal .*trials\.jsonl is broken"):
        read_lines(journal, Trial, "journal")


def test_journal_of_another_shape_is_refused(journal):
    journal.write_text(json.dumps(trial(0).model_dump(mode="json") | {"surprise": 1}) + "\n")
    with pytest.raises(BadFileError, match="Line 1"):
        read_lines(journal, Trial, "journal")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_whole_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "deep" / "er" / "file.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new" and names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("before", [None, b"old"])
def test_block_that_raises_leaves_the_folder_as_it_was(tmp_path, before):
    path = tmp_path / "file.bin"
    if before:
        write_bytes(path, before)
    with pytest.raises(KeyError), written_whole(path) as temporary:
        temporary.write_bytes(b"half of it")
        raise KeyError("broken")
    assert names(tmp_path) == (["file.bin"] if before else [])
    assert before is None or path.read_bytes() == before


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["os.replace", "os.fsync", "pathlib.Path.write_bytes", "tempfile.mkstemp"])
def test_full_disk_is_one_sentence_and_leaves_no_half_file(tmp_path, monkeypatch, where):
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    monkeypatch.setattr(where, no_space)
    with pytest.raises(EdgeCompressError, match=r"The disk is full: cannot write .*file\.bin\. Free some space"):
        write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file.bin"]


def test_full_disk_while_tensors_are_saved_is_the_same_sentence(tmp_path):
    """A file-size limit of the operating system stops the tensor library in the middle, as a full disk does."""
    code = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from edgecompress.errors import EdgeCompressError
from edgecompress.files import written_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    with written_whole(Path(sys.argv[1])) as temporary:
        save_file({"x": np.zeros(100_000)}, temporary)
except EdgeCompressError as error:
    print(error)
"""
    path = tmp_path / "model.safetensors"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"annot write {path}" in done.stdout
    assert names(tmp_path) == []


def test_full_disk_while_a_trial_is_appended(journal, monkeypatch):
    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(EdgeCompressError, match="The disk is full"):
        append_line(journal, trial(3))


def test_parent_that_is_a_file_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="Name a path"):
        write_text(tmp_path / "file" / "inside.txt", "y")


def test_missing_and_broken_json_say_what_and_where(tmp_path):
    with pytest.raises(BadFileError, match=r"There is no policy at .*policy\.json"):
        read_document(tmp_path / "policy.json", CompressionPolicy, "policy")
    (tmp_path / "policy.json").write_text("{")
    with pytest.raises(BadFileError, match=r"The policy .*policy\.json is broken"):
        read_document(tmp_path / "policy.json", CompressionPolicy, "policy")
    (tmp_path / "policy.json").write_text("[1, 2]")
    with pytest.raises(BadFileError, match="schema version None"):
        read_document(tmp_path / "policy.json", CompressionPolicy, "policy")
    (tmp_path / "policy.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadFileError, match="is broken"):
        read_json(tmp_path / "policy.json", "policy")


def test_second_process_is_refused_while_the_first_holds_the_lock(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom edgecompress.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.readline()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=f"Another process is working on {tmp_path}"), locked(tmp_path):
            pytest.fail("the lock was given twice")
        holder.kill()  # the lock of a killed process is free
    with locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_hashes_are_sha256(tmp_path):
    data = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(data)
    assert sha256(data) == file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_cache_folder_follows_its_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGECOMPRESS_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a" and cache_folder().is_dir()
    monkeypatch.delenv("EDGECOMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "edgecompress"
