"""The agent alone: old Python, nothing of edgecompress, resumes, marks what disturbed it, and TensorRT on a fake."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_tensorrt import FakeCudaLibrary, fake_tensorrt
from sample_networks import two_layers
from sample_tables import conv_key

from edgecompress.errors import BadFileError, UsageError
from edgecompress.exporters import build_on_device
from edgecompress.exporters.check_tensorrt import check_builds
from edgecompress.latency_tables import agent, jobs
from edgecompress.latency_tables.jobs import Received
from edgecompress.latency_tables.onelayer import one_layer
from edgecompress.latency_tables.profile import ProfileOptions
from edgecompress.latency_tables.table import KernelKey, read_table
from edgecompress.latency_tables.targets import is_this_machine, target_by_name
from edgecompress.trace import trace

X86 = target_by_name("x86")
JETSON = target_by_name("jetson")
here = pytest.mark.skipif(not is_this_machine(X86), reason="this machine is no x86")
ROW = {"mad_us": 0.1, "p10_us": 1.0, "p90_us": 1.0, "n_runs": 9, "method": "node_time", "actual_kernel": "Conv"}


NETWORK = trace(two_layers(4).eval(), (3, 8, 8), "two").network


def write_job(folder, target, keys, **options):
    options = ProfileOptions(**{"time_cap_s": 0.001, **options})
    jobs.write_job(folder, [jobs.kernel_point(key, target) for key in keys], NETWORK, target, options)


def run_agent(folder):
    """``python3 agent.py`` in the job's folder, where no edgecompress and no torch can be imported."""
    hide = "import sys, runpy; sys.modules['edgecompress'] = sys.modules['torch'] = None; sys.argv = ['agent.py']; "
    code = f"{hide}runpy.run_path({str(folder / 'agent.py')!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def row(us, status="ok", mad=0.001):
    return {**ROW, "median_us": us, "mad_us": mad, "status": status, "measured_at": agent.now()}


def test_the_agent_is_old_python_and_imports_only_what_a_device_has():
    source = Path(agent.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert outside == {"numpy", "onnxruntime", "tensorrt", "build_on_device"}


@here
def test_a_bundle_is_measured_in_two_goes_and_collected_twice(tmp_path):
    folder = tmp_path / "job"
    write_job(folder, X86, [conv_key(8, 8), conv_key(8, 16), conv_key(16, 16, "fp32")])
    done = run_agent(folder)
    assert done.returncode == 0, done.stderr
    assert "3 of 3" in done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert records == jobs.read_records(folder / "rows.jsonl")
    # Keep one good row and a torn one, as after a power loss.
    good = next(record for record in records if record.get("id"))
    setting = next(record for record in records if "setting" in record)
    text = "".join(json.dumps(record) + "\n" for record in (setting, good | {"status": "ok"}))
    (folder / "rows.jsonl").write_text(text + '{"id": "torn')
    assert "2 of 2" in run_agent(folder).stderr
    again = jobs.read_records(folder / "rows.jsonl")
    assert again[1]["id"] == good["id"] and {r["id"] for r in again if "id" in r} == {
        r["id"] for r in records if "id" in r
    }
    options, notes = ProfileOptions(out=tmp_path / "t.csv"), []
    first = jobs.collect(folder, target_by_name, options, notes.append)
    assert {*first.table.usable} == {conv_key(8, 8), conv_key(8, 16), conv_key(16, 16, "fp32")}
    assert first.table.provenance.machine["architecture"] and first.table.provenance.sessions[0].anchors_us
    before = (tmp_path / "t.csv").read_bytes()
    jobs.collect(folder, target_by_name, options, notes.append)
    assert len((tmp_path / "t.csv").read_bytes()) >= len(before) and set(read_table(tmp_path / "t.csv").usable) == {
        *first.table.usable
    }


def test_a_job_that_was_never_measured_and_a_full_folder_are_refused(tmp_path):
    with pytest.raises(BadFileError, match="no latency job"):
        jobs.collect(tmp_path, target_by_name, ProfileOptions(), print)
    write_job(tmp_path, X86, [])
    with pytest.raises(BadFileError, match=r"Run 'python3 agent\.py'"):
        jobs.collect(tmp_path, target_by_name, ProfileOptions(), print)
    with pytest.raises(UsageError, match="not empty"):
        jobs.write_bundle(tmp_path, None, X86, ProfileOptions(), None)


def test_micro_models_pack_well_and_stay_below_the_targets_opset(tmp_path):
    import zlib

    import onnx

    nano = target_by_name("jetson-nano")
    large = KernelKey("conv", 256, 256, 3, 3, 1, 1, 1, 14, 14, 14, 14, "fp32", "fp32")
    data = jobs.device_model(one_layer(large), "fp32", nano)
    assert len(data) > 2_000_000 and len(zlib.compress(data, 1)) < len(data) / 20
    assert onnx.load_from_string(data).opset_import[0].version <= nano.max_opset
    integer = onnx.load_from_string(jobs.device_model(one_layer(conv_key(8, 8)), "int8", JETSON))
    assert {node.op_type for node in integer.graph.node} >= {"QuantizeLinear", "DequantizeLinear", "Conv"}


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_tensorrts_parser_and_builder_take_the_micro_models(dtype):
    add = KernelKey("add", 16, 16, 1, 1, 1, 1, 1, 14, 14, 14, 14, dtype, dtype)
    for key in (conv_key(16, 16, dtype), add):
        for model in jobs.kernel_point(key, JETSON).models():
            built = check_builds(model, capabilities=("SM86",))
            if built == {"tensorrt_rtx": "not installed"}:
                pytest.skip("TensorRT-RTX is not installed")
            assert built["SM86"] == "built"


def test_a_slow_anchor_measures_its_block_again_and_marks_it():
    written, anchors = [], iter([100.0, 200.0, 200.0, 100.0])
    measured = []

    def measure(name):
        measured.append(name)
        return row(10.0)

    def write(name, found):
        written.append((name, found["status"]))

    times = agent.measure_series(["a", "b"], measure, write, lambda: next(anchors), every=2)
    assert times == [100.0, 200.0, 200.0, 100.0]
    assert measured == ["a", "b", "a", "b", "a", "b"]  # again for the anchor, and once more at the end
    assert written[4:6] == [("a", "contended"), ("b", "contended")] and written[6:] == [("a", "ok"), ("b", "ok")]


def test_the_least_steady_points_are_measured_again_and_the_steadier_row_stays():
    rows = {name: iter([row(10.0, mad=1 + 0.01 * name), row(10.0, mad=1.301)]) for name in range(40)}
    last = {}
    agent.measure_series(list(rows), lambda n: next(rows[n]), lambda n, found: last.update({n: found}), lambda: 1.0)
    assert [n for n, found in last.items() if found["mad_us"] == 1.301] == [38, 39]
    assert last[37]["mad_us"] == pytest.approx(1.37)


def test_disturbed_and_refused_models_are_marked(tmp_path, monkeypatch):
    spec = jobs.kernel_point(conv_key(8, 8), X86).spec(X86, 1)
    fake = type("Fake", (agent.OnnxRuntime,), {"measure": lambda *_: row(5.0)})
    steal = iter([(0, 0), (50, 100), (50, 100), (50, 200)])
    monkeypatch.setattr(agent, "stolen", lambda: next(steal, (50, 300)))
    assert agent.measure_point(fake(), "", spec, 0.01)["status"] == "contended"  # a hypervisor gave the core to others
    assert agent.measure_point(fake(), "", spec, 0.01)["status"] == "ok"
    monkeypatch.setattr(agent, "throttled", lambda: True)
    assert agent.measure_point(fake(), "", spec, 0.01)["status"] == "throttled"
    missing = agent.measure_point(agent.OnnxRuntime(), str(tmp_path), spec, 0.01)
    assert missing["status"] == "failed" and missing["why"]


def test_a_throttled_device_is_waited_for_and_then_given_up(monkeypatch):
    said, rows = [], iter([row(9.0, "throttled"), row(5.0)])
    monkeypatch.setattr(agent, "COOLING_S", 0.01)
    assert agent._unthrottled(lambda: next(rows), None, said.append)["median_us"] == 5.0 and said
    with pytest.raises(agent.Problem, match=r"throttles its clock.*Cool it") as caught:
        agent._unthrottled(lambda: row(9.0, "throttled"), None, said.append)
    assert caught.value.code == agent.THROTTLED


def test_a_full_disk_on_the_device_is_named(capsys):
    with pytest.raises(agent.Problem, match="disk of the device is full") as caught:
        agent.Output("/dev/full")({"id": "x"})
    assert caught.value.code == agent.DISK_FULL and json.loads(capsys.readouterr().out) == {
        "id": "x"
    }  # sent all the same


def test_one_measurement_at_a_time_holds_the_device():
    with agent.hold_device(), pytest.raises(agent.Problem, match="Another measurement runs"):
        agent.hold_device(wait_s=0.0)


@pytest.mark.parametrize(("bits", "expected"), [("0x50000", False), ("0x50005", True), ("", False)])
def test_the_firmwares_throttle_bits(monkeypatch, bits, expected):
    monkeypatch.setattr(agent, "text_of", lambda path: bits)
    monkeypatch.setattr(agent.shutil, "which", lambda name: None)
    assert agent.throttled() is expected


@pytest.mark.parametrize(("version", "dtype", "flags"), [("8.6.1", "int8", ["int8", "fp16"]), ("10.3.0", "fp32", [])])
def test_tensorrt_builds_times_and_names_the_precision_that_runs(tmp_path, monkeypatch, version, dtype, flags):
    trt = fake_tensorrt(version)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "build_on_device", build_on_device)
    monkeypatch.setattr(build_on_device, "_load_cuda", FakeCudaLibrary)
    write_job(tmp_path, JETSON, [conv_key(32, 32, dtype)])
    assert (tmp_path / "build_on_device.py").exists()
    emit, said = agent.Output(str(tmp_path / "rows.jsonl")), []
    agent.run_job(str(tmp_path), emit, said.append)
    records = emit.held()
    first, measured = records[0], next(record for record in records if "id" in record)
    assert first["setting"]["runtime"] == "TensorRT" and first["setting"]["device"] == "fake-orin"
    assert first["machine"]["compute_capability"] == "8.7" and first["machine"]["nvpmodel"]
    assert any("jetson_clocks" in text for text in said)
    assert (measured["median_us"], measured["method"]) == (250.0, "engine")
    assert measured["actual_kernel"] == "conv INT8 -> FP16"
    assert trt.made.flags[-len(flags) or len(trt.made.flags) :] == flags
    table = jobs.table_for(JETSON, first, ProfileOptions(out=tmp_path / "t.csv"))
    made, into = jobs.kernel_point(conv_key(32, 32, dtype), JETSON), Received()
    for record in records:
        jobs.receive(record, {made.id: made}, NETWORK, table, into)
    assert set(read_table(table.path).usable) == {conv_key(32, 32, dtype)} and into.finished
    jobs.refuse_other_device(JETSON, first["machine"], "the desk")
    with pytest.raises(UsageError, match=r"compute capability 8\.7, a Jetson Nano.* has 5\.3"):
        jobs.refuse_other_device(target_by_name("jetson-nano"), first["machine"], "the desk")


def test_statistics_refine_the_median_of_whole_microseconds():
    assert 3.5 < agent.statistics(np.array([3, 3, 4, 4, 4, 4, 5, 90]))["median_us"] < 5
