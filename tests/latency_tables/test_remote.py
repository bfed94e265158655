"""Profiling over ssh against a real OpenSSH server on loopback: rows arrive, breaks are survived, nothing stays behind."""

import json
import os
import signal
import time

import pytest
import sshd
from command_line import call
from sample_networks import two_layers

from edgecompress.errors import EdgeCompressError, MissingBackendError, UsageError
from edgecompress.latency_tables import agent, remote, ssh
from edgecompress.latency_tables.profile import ProfileOptions
from edgecompress.latency_tables.table import read_table
from edgecompress.latency_tables.table_tools import check_file
from edgecompress.latency_tables.targets import is_this_machine, target_by_name
from edgecompress.latency_tables.whole import read_networks
from edgecompress.trace import trace

X86 = target_by_name("x86")
QUICK = ProfileOptions(precisions=("fp32",), time_cap_s=0.001, levels=2)
here = pytest.mark.skipif(not is_this_machine(X86), reason="this machine is no x86")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    reason = sshd.missing()
    if reason:
        pytest.skip(f"no ssh server can be started: {reason}")
    with sshd.serving(tmp_path_factory.mktemp("sshd")) as found:
        yield found


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_S", 0.05)
    monkeypatch.setattr(ssh, "BEAT_S", 0.5)


def network():
    return trace(two_layers(4).eval(), (3, 8, 8), "two").network


def device(server, notes=None, **changed):
    host = ssh.Host(server.address, changed.get("options", server.options), changed.get("python", sshd.PYTHON))
    return remote.Device(host, changed.get("target", X86), (notes if notes is not None else []).append)


def nothing_left(server):
    """Whether the device's folder for temporary files is empty once the last agent had time to end."""
    end = time.monotonic() + 10
    while any(server.device.iterdir()) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(server.device.iterdir())


@here
def test_the_command_measures_over_ssh_and_a_second_call_has_nothing_to_do(server, tmp_path):
    arguments = [
        "profile",
        "--host",
        server.address,
        "--device-python",
        sshd.PYTHON,
        "--model",
        "sample_networks:two_layers",
    ]
    arguments += ["--data-shape", "3,8,8", "--precision", "int8", "--time-cap", "0.001", "--levels", "2", "--json"]
    arguments += [part for option in server.options for part in ("--ssh-option", option)]
    first = call(*arguments, "--out", tmp_path / "t.csv")
    assert first.code == 0, first.err
    facts = json.loads(first.out)
    assert facts["measured"] >= 4 and facts["held_already"] == 0
    table = read_table(tmp_path / "t.csv")
    assert {key.kind for key in table.usable} >= {"conv", "linear", "input"} and check_file(table.path) == []
    assert {row.dtype for row in read_networks(table.path)} == {"int8"}
    assert table.provenance.setting.device == agent.device_id(agent.machine_facts())
    assert {"load_before", "load_after", "throttled_after"} <= set(table.provenance.machine)
    assert table.provenance.sessions[0].anchors_us
    again = json.loads(call(*arguments, "--out", tmp_path / "t.csv").out)
    quiet = {key: row for key, row in table.rows.items() if row.status == "ok"}  # contended rows are measured again
    assert quiet.items() <= read_table(tmp_path / "t.csv").rows.items() and again["held_already"] >= len(quiet)
    assert nothing_left(server)


@here
def test_a_connection_killed_in_the_middle_is_resumed_without_losing_a_row(server, tmp_path):
    notes, seen = [], []

    def kill_once(done, total, left):
        seen.append(len(read_table(tmp_path / "t.csv").rows))
        if len(seen) == 2:
            for session in server.sessions():
                os.kill(session, signal.SIGKILL)

    options = ProfileOptions(("fp32",), time_cap_s=0.05, levels=4, out=tmp_path / "t.csv")
    found = remote.profile_host(network(), device(server, notes), options, progress=kill_once)
    assert any("Trying again" in note for note in notes)
    rows = found.table.usable
    assert seen[:2] == [1, 2] and len(rows) >= 6
    assert {key.kind for key in rows} == {"conv", "linear"} and check_file(found.table.path) == []
    assert nothing_left(server)


@here
def test_an_interrupt_keeps_the_rows_and_cleans_the_device(server, tmp_path):
    def interrupt(done, total, left):
        raise KeyboardInterrupt

    options = ProfileOptions(("fp32",), time_cap_s=0.05, levels=4, out=tmp_path / "t.csv")
    with pytest.raises(KeyboardInterrupt):
        remote.profile_host(network(), device(server), options, progress=interrupt)
    assert len(read_table(tmp_path / "t.csv").rows) == 1
    assert nothing_left(server)


def test_a_wrong_key_is_one_sentence(server):
    with pytest.raises(MissingBackendError, match=r"refuses the key.*--ssh-option IdentityFile"):
        remote.profile_host(network(), device(server, options=server.with_key(server.wrong_key)), QUICK)


def test_an_address_without_a_server_is_unreachable(server):
    options = tuple("Port=1" if option.startswith("Port=") else option for option in server.options)
    with pytest.raises(MissingBackendError, match=r"127\.0\.0\.1 cannot be reached.*refused.*Check the address"):
        remote.profile_host(network(), device(server, options=options), QUICK)


def test_a_device_without_python_or_runtime_is_named(server, tmp_path):
    with pytest.raises(MissingBackendError, match=r"no 'python4' on .*--device-python"):
        remote.profile_host(network(), device(server, python="python4"), QUICK)
    bare = tmp_path / "python-without-onnxruntime"
    hide = "import sys, runpy; sys.modules['onnxruntime'] = None; del sys.argv[0]; "
    bare.write_text(
        f'#!/bin/sh\nexec {sshd.PYTHON} -c "{hide}runpy.run_path(sys.argv[0], run_name=\'__main__\')" "$@"\n'
    )
    bare.chmod(0o755)
    with pytest.raises(MissingBackendError, match=r"no Python module onnxruntime.*pip install"):
        remote.profile_host(network(), device(server, python=str(bare)), QUICK)
    assert nothing_left(server)


@here
def test_another_device_than_the_target_is_refused(server):
    pi = target_by_name("raspberry-pi-5")
    with pytest.raises(UsageError, match=r"not a Raspberry Pi 5.*--allow-mismatch"):
        remote.profile_host(network(), device(server, target=pi), QUICK)


@pytest.mark.parametrize(
    ("code", "said", "error", "kind", "match"),
    [
        (5, "tar: x: Cannot write: No space left on device", None, EdgeCompressError, "disk is full.*rows so far"),
        (255, "ssh: Could not resolve hostname pi", None, ssh.DroppedError, "cannot be reached.*resolve"),
        (255, "Host key verification failed.", None, MissingBackendError, "Connect once by hand"),
        (255, "command-line: line 0: Bad configuration option: x", None, UsageError, "--ssh-option"),
        (1, "SyntaxError: invalid syntax", None, MissingBackendError, "older than Python 3.8"),
        (6, "", {"error": "The device throttles its clock.", "code": 6}, EdgeCompressError, "pi: The device throttles"),
        (4, "", {"error": "no onnxruntime", "code": 4}, MissingBackendError, "pi: no onnxruntime"),
        (9, "Killed", None, EdgeCompressError, "exit code 9: Killed"),
    ],
)
def test_every_failure_is_one_sentence(code, said, error, kind, match):
    found = ssh.failure(ssh.Host("pi"), code, said, error)
    assert type(found) is kind
    with pytest.raises(kind, match=match):
        raise found


def test_tries_are_bounded_and_rows_are_counted(tmp_path, monkeypatch):
    calls = []

    def lost(host, folder, on_record):
        calls.append(json.loads((folder / "job.json").read_text())["points"])
        if not calls[-1]:
            facts = agent.machine_facts()
            setting = {"device": "d", "runtime": "ONNX Runtime", "runtime_version": "1", "provider": "p", "threads": 1}
            on_record({"setting": setting, "machine": facts, "state": {}})
            return
        row = {"median_us": 5.0, "mad_us": 0.1, "p10_us": 5.0, "p90_us": 5.0, "n_runs": 9, "method": "node_time"}
        row |= {"actual_kernel": "Conv", "status": "ok", "measured_at": agent.now()}
        if len(calls) == 2:
            on_record({"id": calls[-1][0]["id"], **row})
        raise ssh.DroppedError("pi cannot be reached (lost).")

    monkeypatch.setattr(ssh, "run_job", lost)
    monkeypatch.setattr(remote, "PAUSE_S", 0.0)
    options = ProfileOptions(("fp32",), levels=2, out=tmp_path / "t.csv")
    notes = []
    what = remote.Device(ssh.Host("pi"), X86, notes.append, allow_mismatch=True)
    with pytest.raises(MissingBackendError, match=r"cannot be reached.*1 rows are kept in .*t\.csv"):
        remote.profile_host(network(), what, options)
    assert len(calls) == 1 + remote.TRIES and len(notes) == remote.TRIES - 1
    assert len(calls[2]) == len(calls[1]) - 1  # what came through is not asked for again
