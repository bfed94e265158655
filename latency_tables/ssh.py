"""One job on another machine through the system's ``ssh``: send the folder, read the agent's records, leave nothing.

One connection does all of it, so that there is nothing to multiplex and nothing to clean up later: the job travels as
a tar on standard input into a new folder, the agent's records come back on standard output, and the shell that made
the folder removes it however the agent ends. The agent ends by itself when standard input closes or falls silent.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgecompress.errors import EdgeCompressError, MissingBackendError, UsageError
from edgecompress.latency_tables import agent

BEAT_S = 5.0  # between signs of life; the agent ends after a minute without
CONNECT_S = 10
LOST = 255  # ssh's own exit code: the connection, not the command, failed
REMOTE = """
d=$(mktemp -d "${{TMPDIR:-/tmp}}/edgecompress.XXXXXX") || exit {full}
trap 'rm -rf "$d"' EXIT
trap 'exit 129' HUP INT TERM PIPE
head -c {size} | tar -xzf - -C "$d" || exit {full}
command -v {python} >/dev/null || {{ echo "{python}: not found" >&2; exit 127; }}
export TMPDIR="$d"
{python} "$d/agent.py" --tethered
"""


@dataclass(frozen=True)
class Host:
    """Where to measure: ``address`` as ssh takes it, ``options`` for its ``-o``, and the device's Python."""

    address: str
    options: tuple[str, ...] = ()
    python: str = "python3"


class DroppedError(Exception):
    """The connection broke, or the device could not be reached; another try may work. Its text is a whole sentence."""


@contextlib.contextmanager
def _packed(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "job.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            for item in sorted(folder.rglob("*")):
                if item.is_file():
                    archive.add(item, item.relative_to(folder).as_posix())
        yield path


def run_job(host: Host, folder: Path, on_record: Callable[[dict[str, Any]], None]) -> None:
    """Measure the job in ``folder`` on ``host``; ``on_record`` gets every record as it comes.

    Raises:
        DroppedError: the connection broke; what ``on_record`` got is all that came.
        MissingBackendError: the device refuses the key or has no Python or no runtime.
        EdgeCompressError: its disk is full, its clock is throttled, or it measures for somebody else.
    """
    with _packed(folder) as archive:
        script = REMOTE.format(size=archive.stat().st_size, python=shlex.quote(host.python), full=agent.DISK_FULL)
        command = [
            "ssh", "-T", *(f"-o{option}" for option in host.options), "-oBatchMode=yes", f"-oConnectTimeout={CONNECT_S}",
            "-oServerAliveInterval=5", "-oServerAliveCountMax=3", "--", host.address, f"exec sh -c {shlex.quote(script)}",
        ]  # fmt: skip
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except FileNotFoundError as error:
            raise MissingBackendError("There is no ssh program here. Install OpenSSH's client.") from error
        ended = threading.Event()
        said: list[str] = []
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        helpers = (
            threading.Thread(target=_feed, args=(process.stdin, archive, ended), daemon=True),
            threading.Thread(target=_listen, args=(process.stderr, said), daemon=True),
        )
        for helper in helpers:
            helper.start()
        refused: dict[str, Any] | None = None
        try:
            for line in process.stdout:
                record = _record(line)
                if record is not None and "error" in record:
                    refused = record
                elif record is not None:
                    on_record(record)
            process.wait()
        finally:
            ended.set()
            if process.poll() is None:
                process.terminate()
                process.wait()
            for helper in helpers:
                helper.join(BEAT_S)
            process.stdout.close()
            process.stderr.close()
    if process.returncode or refused is not None:
        raise failure(host, process.returncode, "".join(said), refused)


def _feed(stdin: IO[bytes], archive: Path, ended: threading.Event) -> None:
    """Send the archive, then a sign of life now and then."""
    with contextlib.suppress(OSError, ValueError):
        with archive.open("rb") as file:
            while piece := file.read(1 << 16):
                stdin.write(piece)
        stdin.flush()
        while not ended.wait(BEAT_S):
            stdin.write(b"\n")
            stdin.flush()
    with contextlib.suppress(OSError, ValueError):
        stdin.close()


def _listen(stderr: IO[bytes], said: list[str]) -> None:
    with contextlib.suppress(ValueError):
        for line in stderr:
            said.append(line.decode("utf-8", "replace"))
            del said[:-40]


def _record(line: bytes) -> dict[str, Any] | None:
    """One record; a login shell's greeting, or a line that the break of the connection tore, is none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def failure(host: Host, code: int, said: str, error: dict[str, Any] | None) -> Exception:
    """The one sentence for an agent's ``error`` record, or for ssh's exit ``code`` and what stood on stderr."""
    address = host.address
    if error is not None:
        text = f"{address}: {error['error']}"
        return MissingBackendError(text) if error["code"] == agent.NO_RUNTIME else EdgeCompressError(text)
    last = said.strip().splitlines()[-1].strip() if said.strip() else "no reason given"
    if code == agent.DISK_FULL or "No space left on device" in said:
        return EdgeCompressError(
            f"The job does not fit on {address}, its disk is full ({last}). Free some space there; rows so far are kept."
        )
    if code == LOST:
        if "Permission denied" in said:
            return MissingBackendError(
                f"{address} refuses the key ({last}). Give the right one with --ssh-option IdentityFile=FILE, or put "
                "your public key there with ssh-copy-id; passwords are not asked for."
            )
        if "Host key verification failed" in said:
            return MissingBackendError(
                f"The host key of {address} is unknown or has changed. Connect once by hand with ssh to accept it."
            )
        if "Bad configuration option" in said or "command-line" in said:
            return UsageError(f"ssh refuses an --ssh-option: {last}.")
        return DroppedError(f"{address} cannot be reached, or the connection broke ({last}).")
    if code == 127:
        return MissingBackendError(
            f"There is no '{host.python}' on {address}. Install Python 3.8 or later, or name it with --device-python."
        )
    if "SyntaxError" in said:
        return MissingBackendError(
            f"'{host.python}' on {address} is older than Python 3.8. Name a newer one with --device-python."
        )
    if "no Python module" in said:
        return MissingBackendError(f"{address}: {last}")
    if code in (1, 129):  # the agent lost this end, which a half-open line shows
        return DroppedError(f"The agent on {address} ended in the middle ({last}).")
    return EdgeCompressError(f"The agent on {address} failed with exit code {code}: {last}.")
