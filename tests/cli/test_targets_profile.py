"""The commands ``targets`` and ``profile`` as a user calls them."""

import json

import pytest
from click.testing import CliRunner

from edgecompress.cli import profile as profile_cli
from edgecompress.cli import targets as targets_cli
from edgecompress.edges import with_edges
from edgecompress.errors import MissingBackendError, UnknownNameError, UsageError
from edgecompress.files import write_document
from edgecompress.graph import build_graph
from edgecompress.latency_tables import agent, series
from edgecompress.latency_tables.predict import TableModel, latency_model
from edgecompress.latency_tables.targets import all_targets, is_this_machine, target_by_name
from edgecompress.models import build_model
from edgecompress.trace import trace


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGECOMPRESS_CACHE", str(tmp_path / "cache"))
    # The table that ships is of one machine: what is said without a table is the same everywhere.
    monkeypatch.setattr("edgecompress.latency_tables.predict.shipped_tables", lambda: tmp_path / "none")


def call(command, *arguments):
    result = CliRunner().invoke(command, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_targets_lists_all_and_says_estimated():
    output = call(targets_cli.command).output
    assert all(name in output for name in all_targets()) and "estimated" in output and "measured" not in output


def test_targets_json_holds_every_fact():
    facts = json.loads(call(targets_cli.command, "--json").output)
    assert [item["name"] for item in facts] == list(all_targets())
    assert all(item["latency"].startswith("ESTIMATED") for item in facts)
    one = json.loads(call(targets_cli.command, "jetson", "--json").output)
    assert one["name"] == "jetson-orin-nano" and one["channel_divisor"]["int8"] == 32


def test_one_target_shows_its_sources():
    output = call(targets_cli.command, "jetson").output
    assert "sources" in output and "Ultralytics" in output and "estimate" in output.lower()
    with pytest.raises(UnknownNameError):
        call(targets_cli.command, "toaster")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((), UsageError, "--run RUN or --model NAME"),
        (("--model", "resnet8", "--target", "jetson"), MissingBackendError, "--bundle DIR"),
        (("--model", "resnet8", "--target", "raspberry-pi-5"), MissingBackendError, "no Raspberry Pi 5"),
        (("--model", "resnet8", "--precision", "int3"), UnknownNameError, "precision 'int3'"),
        (("--model", "resnet8", "--data-shape", "3x32"), UsageError, "3,32,32"),
    ],
)
def test_profile_refuses_what_it_cannot_measure(arguments, error, match):
    if not is_this_machine(target_by_name("x86")):
        pytest.skip("this machine is no x86")
    with pytest.raises(error, match=match):
        call(profile_cli.command, *arguments)


def test_profile_measures_resnet8_resumes_and_is_then_used(tmp_path, monkeypatch):
    if not is_this_machine(target_by_name("x86")):
        pytest.skip("this machine is no x86")
    monkeypatch.setattr(series, "ANCHOR_S", 0.005)
    monkeypatch.setattr(agent, "WARMUP_S", 0.001)
    monkeypatch.setattr(agent, "QUIET", 1e9)
    monkeypatch.setattr(agent, "DRIFT", 1e9)
    monkeypatch.setattr(series, "SWEEP", range(48, 52))
    monkeypatch.setattr("edgecompress.latency_tables.profile.CHECK_NETWORKS", 1)
    quick = ("--precision", "int8", "--time-cap", "0.003", "--levels", "2", "--json")
    first = json.loads(call(profile_cli.command, "--model", "resnet8", *quick).output)
    assert first["measured"] >= 10 and first["held_already"] == 0
    check = first["held_out"][0]
    assert check["precision"] == "int8" and min(check["predicted_us"], check["measured_us"]) > 0
    # The same layers from a run whose network cannot be built here: nothing is left to measure, and nothing is checked.
    model = build_model("resnet8", 10).eval()
    traced = trace(model, (3, 32, 32), "elsewhere:resnet8").network
    network = with_edges(traced, build_graph(model, (3, 32, 32), "resnet8"))
    write_document(tmp_path / "run" / "layers.json", network)
    again = json.loads(call(profile_cli.command, "--run", str(tmp_path / "run"), *quick).output)
    assert again["measured"] == 0 and again["held_already"] == first["measured"] and again["held_out"] == []
    found, description = latency_model(target_by_name("x86"), require_measured=True)
    assert isinstance(found, TableModel) and description.startswith("measured on")


def test_an_interrupt_keeps_what_was_measured_and_says_how_to_go_on(monkeypatch):
    if not is_this_machine(target_by_name("x86")):
        pytest.skip("this machine is no x86")

    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("edgecompress.latency_tables.profile.profile", interrupted)
    result = call(profile_cli.command, "--model", "resnet8", "--json")
    assert result.exit_code == 130 and "the same command goes on" in result.output
