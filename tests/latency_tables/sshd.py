"""A real OpenSSH server on a free loopback port, with keys, configuration and a folder for temporary files of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONFIG = """
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PermitRootLogin prohibit-password
SetEnv TMPDIR={folder}/device
"""


@dataclass(frozen=True)
class Server:
    """How to reach it, and where everything that a login leaves behind would lie."""

    address: str
    options: tuple[str, ...]
    device: Path
    process: subprocess.Popen[bytes]
    key: Path
    wrong_key: Path

    def sessions(self) -> list[int]:
        """Process ids of the connections that it serves."""
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True)
        return [int(line) for line in listed.stdout.split()]

    def with_key(self, key: Path) -> tuple[str, ...]:
        return tuple(f"IdentityFile={key}" if option.startswith("IdentityFile=") else option for option in self.options)


def missing() -> str:
    """Why no server can be started here, or nothing."""
    for program in ("ssh", "ssh-keygen", "ps"):
        if shutil.which(program) is None:
            return f"there is no {program} here"
    if _sshd() is None:
        return "there is no sshd here (Debian: openssh-server)"
    if os.geteuid() == 0 and not Path("/run/sshd").is_dir():
        with contextlib.suppress(OSError):
            Path("/run/sshd").mkdir()
    return ""


def _sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Start a server in ``folder`` and end it with the block."""
    for name in ("host_key", "user_key", "wrong_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copyfile(folder / "user_key.pub", folder / "authorized_keys")
    (folder / "device").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(CONFIG.format(port=port, folder=folder))
    command = [str(_sshd()), "-D", "-e", "-f", str(folder / "sshd_config")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    options = (
        f"Port={port}", f"IdentityFile={folder / 'user_key'}", "IdentitiesOnly=yes",
        f"UserKnownHostsFile={folder / 'known_hosts'}", "StrictHostKeyChecking=accept-new", "LogLevel=ERROR",
    )  # fmt: skip
    try:
        end = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"sshd did not start: {(folder / 'log').read_text()}")
            time.sleep(0.05)
        yield Server("127.0.0.1", options, folder / "device", process, folder / "user_key", folder / "wrong_key")
    finally:
        process.terminate()
        process.wait()


PYTHON = sys.executable
