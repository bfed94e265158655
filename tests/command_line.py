"""Call the command line as a user does: inside this process, or in one of its own that may be killed."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MODEL = "sample_networks:residual"
BUDGET = "flops=0.6x,size=0.5x"
# A whole two-stage run in seconds: one epoch of everything, twelve policies a stage.
TINY = (
    "--model", MODEL, "--data", "digits", "--target", "jetson", "--budget", BUDGET, "--episodes", "12",
    "--finetune-epochs", "1", "--noise-epochs", "1", "--qat-epochs", "1", "--threads", "1", "--quiet",
)  # fmt: skip
# Latencies are measured for 20 ms and the reference network is trained for two epochs.
PREPARE = """
import edgecompress.original
from edgecompress.exporters.runners import measure_latency_us
edgecompress.original.REFERENCE_EPOCHS["digits"] = 2
measure_latency_us.__kwdefaults__.update(seconds=0.02, warmup_s=0.0)
"""
KILL = """
import os, signal
import edgecompress.scoring
append, count = edgecompress.scoring.append_line, 0
def append_and_die(path, record):
    global count
    append(path, record)
    count += 1
    if count == {after}:
        with open(path, "a") as file:
            file.write('{{"stage": "pru')
        os.kill(os.getpid(), signal.SIGKILL)
edgecompress.scoring.append_line = append_and_die
"""


@dataclass(frozen=True)
class Called:
    """How a call ended and what it said."""

    code: int
    out: str
    err: str


def call(*arguments: str | Path) -> Called:
    """``edgecompress ARGUMENTS`` inside this process."""
    from edgecompress.cli.main import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
    return Called(code, out.getvalue(), err.getvalue())


def python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh Python that finds `sample_networks`."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


def call_and_kill(after: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """``edgecompress ARGUMENTS`` in a process that dies by SIGKILL in the middle of the line behind trial ``after``."""
    main = "import sys\nfrom edgecompress.cli.main import main\nmain(sys.argv[1:])"
    return python(PREPARE + KILL.format(after=after) + main, *arguments)
