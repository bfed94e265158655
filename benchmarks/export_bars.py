"""What the export matrix must show: the bars over its finished cells."""

from __future__ import annotations

from typing import Any

from harness import Benchmark

SAFE = "onnxruntime, 7-bit weights"
LARGEST = "vgg16_bn"  # 138 million parameters
LOADED = ("mixed", "w3a8")  # policies at which it is loaded
OPENVINO_SAFE = "openvino, 7-bit weights"
SPEED = {"resnet18": 3.0, "vgg16_bn": 3.5, "mobilenet_v2": 2.2, "resnet56": 2.0}
AVX2 = "AVX2 without VNNI: 32 products of 8 bits take three instructions, not one, and float takes four"
TIMED = {
    "float": "float",
    "fast": "8-bit",
    "precise": "8-bit, exact kernels",
    "safe": "7-bit weights",
    "theirs": "quantize_static",
    "openvino": "OpenVINO",
    "litert": "LiteRT",
    "executorch": "ExecuTorch",
    "ncnn": "ncnn (float)",
}
UNPACKING = (
    "look-up tables and scales beside small or 7-bit layers; a layer above 16 million weights keeps 7 bits as int8"
)


def judge(bench: Benchmark, every: list[str], found: dict[str, dict[str, Any]], loads: dict[str, Any]) -> None:
    """The bars over the finished cells; of ``every`` one, what was not run stands as owed."""
    built = {key: result for key, result in found.items() if "formats" in result}
    rows = {(key, name): row for key, result in built.items() for name, row in result["formats"].items()}
    failed = {f"{key} {name}": row["error"] for (key, name), row in rows.items() if "error" in row}
    missing = [key for key in every if key not in found]
    bar, unit = "artifacts that are not exported and verified", f"of {len(rows)}"
    if failed:
        bench.misses(bar, len(failed), 0, unit, "listed under 'failed'")
    else:
        bench.at_most(bar, 0, 0, unit)
    if missing and not bench.quick:
        bench.not_run(
            "cells of the matrix that were not run", 0, f"of {len(every)}", f"{len(missing)} of {len(every)} cells"
        )
    exactness(bench, rows)
    operators(bench, rows)
    refused = accepted_by_tensorrt(bench, rows)
    for name in SPEED:
        speed(bench, name, built.get(f"{name}:w8a8", {}).get("latency"))
    for key, result in built.items():
        if "theirs_us" in (times := result.get("latency", {})):
            bench.at_most(f"{key}: time against quantize_static", times["fast_us"] / times["theirs_us"], 1.02, "x")
    for key, result in built.items():
        sizes(bench, key, result, built.get(f"{key.split(':')[0]}:w8a8", {}).get("latency", {}).get("theirs_bytes"))
    for policy in LOADED if not bench.quick else ():
        if policy not in loads:
            bench.not_run(f"{LARGEST} {policy}: load time, best of 3", 3.0, "s", "not run")
    for policy, loaded in loads.items():
        bench.at_most(f"{LARGEST} {policy}: load time, best of 3", min(loaded["loads_s"]), 3.0, "s")
        peak = (loaded["memory"]["runtime_bytes"] + loaded["memory"]["run_peak_bytes"]) / 1e9
        bench.at_most(f"{LARGEST} {policy}: peak memory of a fresh process", peak, 1.5, "GB")
    bench.details["loading the largest network"] = loads
    bench.details["failed"] = failed
    bench.details["refused by TensorRT-RTX"] = refused
    bench.details["not built"] = {key: result["refused"] for key, result in found.items() if "refused" in result}
    bench.details["not run"] = missing
    bench.details["every artifact"] = [row for key, result in built.items() for row in artifacts(key, result)]
    bench.details["times, 1 thread"] = [
        latency(key, result["latency"]) for key, result in built.items() if "latency" in result
    ]
    bench.details["loading, 1 thread"] = [
        loading(key, result["latency"]) for key, result in built.items() if "latency" in result
    ]
    bench.details["floats allowed"] = {
        f"{key} {name}": row["floats_allowed"] for (key, name), row in rows.items() if "floats_allowed" in row
    }
    bench.records["cells"] = found


def artifacts(key: str, result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each file of a cell: its bytes and what was proven of it."""
    network, policy = key.split(":")
    whole = result["formats"].get("onnx", {}).get("bytes")
    rows = []
    for name, row in result["formats"].items():
        checks = row.get("checks", {})
        exact = checks.get("emulator_max_difference")
        proof = checks.get("operator_difference") or (None if exact is None else f"{exact:g} from the emulator")
        rows.append(
            {
                "network": network,
                "policy": policy,
                "weights": result["parameters"],
                "format": name,
                "bytes": row.get("bytes"),
                "of the float file": round(row["bytes"] / whole, 4) if whole and "bytes" in row else None,
                "proven": "refused, see below" if "error" in row else proof or "tolerance",
            }
        )
    return rows


def latency(key: str, times: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a cell's files for one image, in the same run."""
    network, policy = key.split(":")
    row: dict[str, Any] = {"network": network, "policy": policy}
    for name, words in TIMED.items():
        row[f"{words}, ms"] = round(times[f"{name}_us"] / 1e3, 2) if f"{name}_us" in times else None
    row["float / 8-bit"] = round(times["float_us"] / times["fast_us"], 2)
    return row


def loading(key: str, times: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds that a cell's files take to load, each the best of some turns."""
    network, policy = key.split(":")
    row: dict[str, Any] = {"network": network, "policy": policy}
    for name, words in TIMED.items():
        if name != "precise":
            row[f"{words}, ms"] = round(times["loads_s"][name] * 1e3, 1) if name in times["loads_s"] else None
    return row


def exactness(bench: Benchmark, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Integer files against the emulator, and kernels that should be integers."""
    for name in ("onnxruntime", SAFE):
        integer = {key: row["checks"] for (key, kind), row in rows.items() if kind == name and "checks" in row}
        if not integer:
            continue
        exact = [checks["emulator_max_difference"] for checks in integer.values() if checks["float_islands"] == "none"]
        islands = {key: checks["float_islands"] for key, checks in integer.items() if checks["float_islands"] != "none"}
        bench.at_most(
            f"{name}: difference to the integer emulator", max(exact, default=0.0), 0, f"of {len(exact)} files"
        )
        floats = sum(checks["float_conv_or_gemm"] for checks in integer.values())
        bench.at_most(f"{name}: layers that run in float", floats, 0, "")
        if islands:
            agreement = min(integer[key]["emulator_agreement"] for key in islands)
            bench.at_least(f"{name}: top-1 agreement of files with float islands", agreement, 0.995, "")
            worst = [said_difference(integer[key]["operator_difference"]) for key in islands]
            bar = f"{name}: difference of an operator to the emulator's in files with float islands"
            bench.at_most(bar, max(steps for steps, _ in worst), 1, f"steps, of {len(islands)} files")
            bar = f"{name}: share of an operator's values that differ"
            bench.at_most(bar, max(share for _, share in worst), 0.001, f"of {len(islands)} files")
        else:
            bench.at_most(f"{name}: files with float islands (there: 1 step at 0.1 % of the values)", 0, 0, "")
        bench.details[f"float islands, {name}"] = islands


def said_difference(text: str) -> tuple[float, float]:
    """Steps and share of values, as `operator_proof.Difference` says them."""
    steps, _, _, share, *_ = text.split()
    return float(steps), float(share)


def operators(bench: Benchmark, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Files of runtimes that round otherwise: each operator on its own inputs, as the export proved it."""
    if rows and not any(name == "openvino" for _, name in rows):
        bench.not_run("openvino: every operator right with 8-bit weights", 0, "files refused", AVX2)
    for name in ("openvino", OPENVINO_SAFE, "litert"):
        files = [row for (_, kind), row in rows.items() if kind == name]
        if files:
            wrong = sum("not what their operators make" in row.get("error", "") for row in files)
            bench.at_most(f"{name}: files with an operator that computes otherwise", wrong, 0, f"of {len(files)}")


def accepted_by_tensorrt(bench: Benchmark, rows: dict[tuple[str, str], dict[str, Any]]) -> dict[str, str]:
    """What TensorRT-RTX refused, by file and GPU generation; a refusal fails the export, whose error names reason and mend."""
    trt = {key: row["checks"] for (key, name), row in rows.items() if name == "tensorrt" and "checks" in row}
    refused = {
        f"{key} {sm}": str(checks[f"tensorrt_rtx_{sm}"])
        for key, checks in trt.items()
        for sm in ("SM86", "SM89")
        if checks.get(f"tensorrt_rtx_{sm}", "not tried") != "built"
    }
    refused |= {key: row["error"] for (key, _), row in rows.items() if "TensorRT-RTX refuses" in row.get("error", "")}
    bench.at_most("TensorRT-RTX builds (SM86, SM89) that were refused", len(refused), 0, f"of {2 * len(trt)}")
    return refused


def speed(bench: Benchmark, name: str, times: dict[str, Any] | None) -> None:
    """Times of the w8a8 files against float, each with the kernels of this CPU."""
    from edgecompress.exporters.runners import has_vnni

    limit, reason = SPEED[name], "" if has_vnni() else AVX2
    kinds = {"fast": "8-bit weights", "safe": "7-bit weights"} | (
        {} if has_vnni() else {"precise": "8-bit, exact kernels"}
    )
    for key, words in kinds.items():
        bar = f"{name} w8a8, {words}: speed against fp32, 1 thread"
        if times is None:
            bench.not_run(bar, limit, "x", "not timed")
        elif times["float_us"] / times[f"{key}_us"] >= limit:
            bench.at_least(bar, times["float_us"] / times[f"{key}_us"], limit, "x")
        else:
            bench.misses(bar, times["float_us"] / times[f"{key}_us"], limit, "x", reason)


def sizes(bench: Benchmark, key: str, result: dict[str, Any], theirs_bytes: int | None) -> None:
    """Bytes of one integer file, and of the largest network how it loads."""
    name, policy = key.split(":")
    row = result["formats"]["onnxruntime"]
    if policy in ("w4a8", "mixed") and theirs_bytes and "bytes" in row:
        bench.at_most(f"{key}: bytes against quantize_static", row["bytes"] / theirs_bytes, 0.999, "x")
    if "checks" in row:
        packed = row["checks"]["weight_bytes"] / row["checks"]["weight_bytes_exact"]
        if packed <= 1.02:
            bench.at_most(f"{key}: weight bytes / (weights x bits / 8)", packed, 1.02, "x")
        else:
            bench.misses(f"{key}: weight bytes / (weights x bits / 8)", packed, 1.02, "x", UNPACKING)
        bench.at_most(f"{key}: other bytes a node", row["checks"]["other_bytes_per_node"], 200, "B")
    if name == LARGEST and "latency" in result:
        bench.at_most(f"{key}: load time", result["latency"]["loads_s"]["fast"], 3.0, "s")
        memory = result["latency"]["memory"]
        peak = (memory["runtime_bytes"] + memory["run_peak_bytes"]) / 1e9
        bench.at_most(f"{key}: peak memory of a fresh process", peak, 1.5, "GB")
