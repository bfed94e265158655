"""The doctor: healthy here, every disease named with its cure, and never itself a victim of what is missing."""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
from command_line import call, python

from edgecompress import doctor

REQUIRES = metadata.requires


@pytest.fixture(scope="module")
def found() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine().findings}


def test_this_machine_is_healthy_and_everything_was_looked_at(found):
    assert not [finding for finding in found.values() if finding.failed]
    assert not [finding for finding in found.values() if finding.name == "look"]
    names = ("edgecompress", "Python", "torch", "onnxruntime", "CPU", "integer instructions", "cores", "memory")
    names += ("GPU and driver", "ONNX Runtime", "TensorRT", "TensorRT-RTX", "onnx", "tensorrt", "TensorBoard", "timm")
    assert set(names) <= set(found) and {"cache", "free here"} <= set(found)
    import torch

    assert found["torch"].found == torch.__version__.partition("+")[0] or found["torch"].found == torch.__version__


def test_every_optional_part_that_is_missing_has_its_pip_command(found):
    for finding in found.values():
        if finding.group in ("runtimes", "extras") and finding.status == "missing":
            assert finding.fix.startswith("pip install 'edgecompress[") and not finding.required


def test_extras_that_are_named_exist():
    extras = set(metadata.metadata("edgecompress").get_all("Provides-Extra") or ())
    if "tensorboard" not in extras:
        pytest.skip("the installed metadata is older than pyproject.toml; install again")
    for look in (doctor._runtimes, doctor._extras):
        for finding in look():
            if finding.fix:
                assert finding.fix.partition("[")[2].partition("]")[0] in extras


def only(monkeypatch, *looks: str) -> None:
    monkeypatch.setattr(doctor, "LOOKS", {name: doctor.LOOKS[name] for name in looks})


def test_exit_code_is_0_when_only_optional_parts_are_missing(monkeypatch):
    only(monkeypatch, "extras", "gpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    called = call("doctor")
    assert called.code == 0 and "pip install 'edgecompress[timm]'" in " ".join(called.out.split())
    assert called.out.rstrip().endswith("Everything that is required is there.") and called.err == ""


@pytest.mark.parametrize(
    ("requirement", "status", "fix"),
    [
        ("no-such-package>=1.2", "missing", "pip install 'no-such-package>=1.2'"),
        ("numpy>=99", "problem", "pip install 'numpy>=99'"),
    ],
)
def test_exit_code_is_1_when_a_required_package_is_missing_or_old(monkeypatch, requirement, status, fix):
    only(monkeypatch, "python", "software")
    monkeypatch.setattr("importlib.metadata.requires", lambda name: [requirement, 'extra-one; extra == "x"'])
    called = call("doctor", "--json")
    assert called.code == 1 and called.err == ""
    result = json.loads(called.out)
    (bad,) = [finding for finding in result["findings"] if finding["status"] != "ok"]
    assert result["healthy"] is False and bad["status"] == status and bad["fix"] == fix and bad["required"]
    assert f"Cannot work: {bad['name']}." in call("doctor").out


def test_package_that_is_there_but_broken_is_found(monkeypatch):
    only(monkeypatch, "software")
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["numpy>=1"])
    monkeypatch.setattr(
        "importlib.import_module", lambda name: (_ for _ in ()).throw(OSError("libx.so: not found\nmore"))
    )
    (finding,) = doctor.examine().findings
    assert finding.failed and "cannot be imported: OSError: libx.so: not found" in finding.found
    assert finding.fix == "pip install --force-reinstall 'numpy>=1'"


def test_doctor_sees_a_machine_without_torch(tmp_path):
    code = (
        "import sys\nfor name in ('torch', 'onnxruntime'): sys.modules[name] = None\n"
        "from edgecompress.cli.main import main\nmain(['doctor', '--json'])"
    )
    done = python(code)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    result = json.loads(done.stdout)
    status = {finding["name"]: finding["status"] for finding in result["findings"]}
    assert status["torch"] == "problem" == status["onnxruntime"] and status["numpy"] == "ok"
    runtime = next(finding for finding in result["findings"] if finding["name"] == "ONNX Runtime")
    assert runtime["status"] == "missing" and runtime["fix"] == "pip install --force-reinstall onnxruntime"


def test_exporter_without_its_runtime_is_not_usable_and_has_the_pip_command(monkeypatch):
    from edgecompress.exporters.formats import EXPORTERS

    assert {finding.status for finding in doctor._exporters()} == {"ok"}
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = doctor._exporters()
    assert [finding.name for finding in found] == list(EXPORTERS)
    assert all(f.status == "problem" and f.fix == "pip install --force-reinstall onnxruntime" for f in found)


def test_look_that_fails_is_a_finding(monkeypatch):
    def fail():
        raise ValueError("odd\nvery odd")

    monkeypatch.setattr(doctor, "LOOKS", {"hardware": fail})
    (finding,) = doctor.examine().findings
    assert (
        finding.status == "problem" and finding.found == "cannot be looked at (ValueError: odd)" and not finding.failed
    )


def test_gpu_and_driver_are_read_from_nvidia_smi(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "NVIDIA Test 9000, 580.1, 8192 MiB"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    (finding,) = doctor._gpu()
    assert finding.status == "ok" and finding.found == "NVIDIA Test 9000, 580.1, 8192 MiB"
    program.write_text("#!/bin/sh\nexit 9\n")
    (finding,) = doctor._gpu()
    assert finding.status == "missing" and "nvidia-smi fails" in finding.found


def test_cpu_features_are_named(monkeypatch):
    facts = {"cpu": "Cortex", "cores": "4", "governor": "ondemand", "flags": "asimd asimddp i8mm"}
    monkeypatch.setattr("edgecompress.latency_tables.agent.machine_facts", lambda: facts)
    named = {finding.name: finding.found for finding in doctor._hardware()}
    assert (
        named["integer instructions"] == "dot product, int8 matrix multiply" and "governor ondemand" in named["cores"]
    )
    monkeypatch.setattr("edgecompress.latency_tables.agent.machine_facts", lambda: facts | {"flags": "avx2"})
    named = {finding.name: finding.found for finding in doctor._hardware()}
    assert named["integer instructions"].startswith("none of VNNI")


def test_latency_table_matches_is_of_another_machine_or_is_missing(monkeypatch, tmp_path):
    from edgecompress.latency_tables import predict
    from edgecompress.latency_tables.targets import target_by_name

    x86 = target_by_name("x86")
    monkeypatch.setattr("edgecompress.latency_tables.targets.is_this_machine", lambda target: target is x86)
    monkeypatch.setattr(predict, "tables_folder", lambda: tmp_path)
    monkeypatch.setattr(predict, "shipped_tables", lambda: tmp_path)
    (finding,) = doctor._tables()
    assert finding.status == "missing" and finding.fix.startswith("edgecompress profile --target x86")
    (tmp_path / "x86--other-cpu--onnxruntime-1.0--t1.csv").touch()
    (finding,) = doctor._tables()
    assert finding.status == "problem" and "none of this CPU" in finding.found and finding.fix
    setting = SimpleNamespace(runtime_version="1.32.0")
    table = SimpleNamespace(usable={1: 2}, provenance=SimpleNamespace(setting=setting))
    monkeypatch.setattr(predict, "find_table", lambda target: table)
    (finding,) = doctor._tables()
    assert finding.status == "ok" and "1 kernels measured on this machine" in finding.found
    monkeypatch.setattr("edgecompress.latency_tables.targets.is_this_machine", lambda target: False)
    (finding,) = doctor._tables()
    assert finding.status == "info" and "none of the targets" in finding.found


def test_cache_that_cannot_be_written_is_exit_code_1(monkeypatch, tmp_path):
    only(monkeypatch, "disk")
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGECOMPRESS_CACHE", str(tmp_path / "file" / "cache"))
    called = call("doctor")
    assert called.code == 1 and "Cannot work: cache." in called.out and "EDGECOMPRESS_CACHE" in called.out


def test_full_disk_is_a_problem_that_fails_nothing(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**9))
    disk = doctor._disk()
    assert [finding.status for finding in disk] == ["ok", "problem", "problem"] and not any(f.failed for f in disk)


def test_python_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    assert [finding.name for finding in doctor._python() if finding.failed] == ["Python"]


def test_python_range_is_that_of_the_package():
    (first, last) = doctor.PYTHONS
    wanted = metadata.metadata("edgecompress")["Requires-Python"]
    assert set(wanted.split(",")) == {f">={first[0]}.{first[1]}", f"<{last[0]}.{last[1] + 1}"}
