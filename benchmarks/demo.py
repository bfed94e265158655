"""The main job, measured: python benchmarks/demo.py [--quick] [--no-clone]

Runs `edgecompress compress --target jetson` for three seeds, interrupts and resumes one of them, and times a fresh clone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import ROOT, Benchmark

COMMAND = [sys.executable, "-m", "edgecompress.cli.main", "compress", "--target", "jetson", "--quiet"]


def compress(folder: Path, name: str, *options: str) -> dict[str, Any]:
    """Run the job in a fresh process and return its report."""
    command = [*COMMAND, "--runs", str(folder), "--name", name, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {done.returncode}: {done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def policy(folder: Path, name: str) -> dict[str, Any]:
    """What a run chose."""
    data: dict[str, Any] = json.loads((folder / name / "policy.json").read_text())
    return data


def killed_and_resumed(folder: Path, *options: str) -> dict[str, Any]:
    """Kill -9 twice, once in each search, then resume to the end."""
    name = "killed"
    for lines in (6, 50):
        command = [*COMMAND, "--runs", str(folder), "--name", name, "--resume", *options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        journal = folder / name / "trials.jsonl"
        while process.poll() is None and (not journal.exists() or journal.read_text().count("\n") < lines):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    compress(folder, name, "--resume", *options)
    return policy(folder, name)


def reload_difference(run: Path) -> float:
    """Largest difference between the network that a fresh process rebuilds and the exported float file."""
    script = (
        "import sys, numpy as np, torch, edgecompress\n"
        "from edgecompress.exporters.runners import OnnxRuntimeRunner\n"
        "x = np.random.default_rng(0).standard_normal((32, 3, 32, 32)).astype(np.float32)\n"
        "with torch.no_grad(): y = edgecompress.load(sys.argv[1])(torch.from_numpy(x)).numpy()\n"
        "print(abs(OnnxRuntimeRunner(sys.argv[1] + '/exports/model.onnx').run(x) - y).max() / abs(y).max())\n"
    )
    out = subprocess.run([sys.executable, "-c", script, str(run)], capture_output=True, text=True, check=True)
    return float(out.stdout)


def help_seconds() -> float:
    """Median of five starts of --help."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "edgecompress.cli.main", "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def clone_to_demo_seconds() -> float:
    """From `git clone` to the end of `make demo`, with nothing but Python and make."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"} | {
            "EDGECOMPRESS_CACHE": f"{folder}/cache"
        }
        python = getattr(sys, "_base_executable", sys.executable)
        start = time.monotonic()
        subprocess.run(["git", "clone", "-q", str(ROOT), f"{folder}/clone"], check=True)
        done = subprocess.run(
            ["make", f"PYTHON={python}", "demo"],
            cwd=f"{folder}/clone",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"make demo failed in a fresh clone:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return time.monotonic() - start


def measure(bench: Benchmark, folder: Path, *, clone: bool) -> None:
    """All bars of the main job."""
    options = ["--episodes", "10", "--finetune-epochs", "2", "--qat-epochs", "1"] if bench.quick else []
    bench.at_most("edgecompress --help", help_seconds(), 0.4, "s")
    reports = []
    for seed in (0,) if bench.quick else (0, 1, 2):
        start = time.monotonic()
        reports.append(compress(folder, f"seed{seed}", "--seed", str(seed), *options))
        if seed == 0:
            bench.at_most("the job, reference network included", time.monotonic() - start, 180, "s")
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    bench.at_most("peak memory", peak_gb, 2.5, "GB")
    for seed, report in enumerate(reports):
        original, small = report["original"], report["compressed"]
        files = {row["format"]: row for row in report["artifacts"] if row["checks"]}
        integer, as_float = files["onnxruntime"], files["onnx"]
        label = f"seed {seed}"
        for name in ("onnxruntime", "tensorrt"):
            ratio = files[name]["size_bytes"] / original["cost"]["size_bytes"]
            bench.at_most(f"{label}: {name} file / original fp32 file", ratio, 0.125, "x")
        bench.at_most(
            f"{label}: float Conv or Gemm that ONNX Runtime runs", integer["checks"]["float_conv_or_gemm"], 0, "nodes"
        )
        bench.at_most(
            f"{label}: difference to the integer emulator", integer["checks"]["emulator_max_difference"], 0, ""
        )
        bench.at_least(
            f"{label}: speed against the original fp32 file",
            original["host_latency_us"] / small["host_latency_us"],
            1.3,
            "x",
        )
        bench.at_most(
            f"{label}: pruned float file / original", as_float["size_bytes"] / original["cost"]["size_bytes"], 0.99, "x"
        )
        bench.details[label] = {
            "accuracy_original": original["accuracy"],
            "accuracy_compressed": small["accuracy"],
            "original_us": original["host_latency_us"],
            "int8_alone_us": report["original_int8_us"],
            "int8_alone_speed": original["host_latency_us"] / report["original_int8_us"],
            "int8_alone_bytes": report["original_int8_bytes"],
            "compressed_us": small["host_latency_us"],
            "bytes": {name: row["size_bytes"] for name, row in files.items()}
            | {"original": original["cost"]["size_bytes"]},
            "macs": [original["cost"]["macs"], small["cost"]["macs"]],
            "params": [original["cost"]["params"], small["cost"]["params"]],
            "nonzeros": small["cost"]["nonzeros"],
            "average_weight_bits": small["average_weight_bits"],
            "found_by": report["found_by"],
            "seconds": report["seconds"],
        }
    drops = [100 * (report["original"]["accuracy"] - report["compressed"]["accuracy"]) for report in reports]
    bench.at_most(
        "accuracy lost on the test split, exported file (mean over seeds)", statistics.mean(drops), 1.0, "points"
    )
    bench.at_most(
        "a fresh process rebuilds the network: relative difference", reload_difference(folder / "seed0"), 1e-5, ""
    )
    if not bench.quick:
        compress(folder, "again", "--seed", "0", *options)
        same = policy(folder, "again") == policy(folder, "seed0")
        bench.at_most("policies that differ when the same seed runs again", float(not same), 0, "policies")
        same = killed_and_resumed(folder, "--seed", "0", *options) == policy(folder, "seed0")
        bench.at_most("policies that differ after kill -9 (twice) and --resume", float(not same), 0, "policies")
    if clone:
        bench.at_most("fresh clone to finished demo", clone_to_demo_seconds(), 360, "s")
    elif not bench.quick:
        bench.not_run("fresh clone to finished demo", 360, "s", "run without --no-clone")


def main() -> None:
    """Parse arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one tiny run, nothing is written")
    parser.add_argument(
        "--no-clone", action="store_true", help="leave out the fresh clone (it downloads the dependencies)"
    )
    arguments = parser.parse_args()
    bench = Benchmark("demo", arguments.quick)
    folder = Path(tempfile.mkdtemp())
    os.environ["EDGECOMPRESS_CACHE"] = str(folder / "cache")
    try:
        measure(bench, folder, clone=not (arguments.no_clone or arguments.quick))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    bench.write()


if __name__ == "__main__":
    main()
