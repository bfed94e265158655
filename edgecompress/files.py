"""Files that survive a kill, a full disk and a second process. Nothing here knows what the files mean."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from edgecompress.errors import BadFileError, EdgeCompressError, UsageError
from edgecompress.spec import SCHEMA_VERSION, Document

_Document = TypeVar("_Document", bound=Document)
_Model = TypeVar("_Model", bound=BaseModel)


def cache_folder() -> Path:
    """Where trained reference networks and measured tables are kept: ``EDGECOMPRESS_CACHE`` or the user's cache."""
    named = os.environ.get("EDGECOMPRESS_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgecompress"
    base.mkdir(parents=True, exist_ok=True)
    return base


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it takes the final name only when the block ends without an error.

    Raises:
        EdgeCompressError: the disk is full or the folder cannot be written; nothing is left under ``path``.
    """
    temporary = _place_beside(path)
    try:
        yield temporary
        _keep(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from error
    except Exception as error:
        # safetensors reports the system's refusal as its own error, with the number in the text.
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found.group(1))
        raise disk_error(path, OSError(number, os.strerror(number))) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write all of ``files`` or none: after an error every path holds what it held before.

    All are on the disk before the first takes its name, and they take their names in the given order.

    Raises:
        EdgeCompressError: the disk is full or a folder cannot be written.
    """
    new: dict[Path, Path] = {}
    old: dict[Path, Path] = {}
    done: list[Path] = []
    path = Path()
    try:
        for path, data in files.items():
            new[path] = _place_beside(path)
            new[path].write_bytes(data)
            _keep(new[path])
        for path in files:
            if path.exists():
                old[path] = _place_beside(path)
                shutil.copyfile(path, old[path])
        for path in files:
            os.replace(new[path], path)
            done.append(path)
    except BaseException as error:
        for written in done:
            if written in old:
                old[written].replace(written)
            else:
                written.unlink()
        if isinstance(error, OSError):
            raise disk_error(path, error) from error
        raise
    finally:
        for temporary in (*new.values(), *old.values()):
            temporary.unlink(missing_ok=True)


def _place_beside(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise disk_error(path, error) from error
    return Path(name)


def _keep(temporary: Path) -> None:
    """On the disk, and readable as a file that the user's own programs write."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.chmod(0o644)


def disk_error(path: Path, error: OSError) -> EdgeCompressError:
    """The clear sentence for an operating system's refusal to write ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return EdgeCompressError(f"The disk is full: cannot write {path}. Free some space, then go on with --resume.")
    if isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError):
        return UsageError(f"Cannot write {path}: {error.strerror}. Name a path whose parents are folders.")
    return UsageError(f"Cannot write {path}: {error.strerror or error}. Name a path that can be written.")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing."""
    with written_whole(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or nothing."""
    write_bytes(path, text.encode())


def write_document(path: Path, document: BaseModel) -> None:
    """Write a document as JSON that people can read and diff."""
    write_text(path, json.dumps(document.model_dump(mode="json"), indent=1) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Raises:
        BadFileError: it is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadFileError(f"There is no {what} at {path}. Check the path.") from error
    except (OSError, ValueError) as error:
        raise BadFileError(
            f"The {what} {path} is broken: {error}. Write it again with the command it came from."
        ) from error


def read_document(path: Path, kind: type[_Document], what: str) -> _Document:
    """Read and validate a document.

    Raises:
        BadFileError: it is missing, broken, or of another schema version.
    """
    data = read_json(path, what)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise BadFileError(
            f"The {what} {path} has schema version {version}; this edgecompress reads {SCHEMA_VERSION}. "
            "Use the edgecompress that wrote it, or write it again."
        )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadFileError(
            f"The {what} {path} is wrong at '{where}': {first['msg']}. Mend that field or write it again."
        ) from error


def append_line(path: Path, record: BaseModel) -> None:
    """Append one JSON line and push it to the disk, so that a kill loses at most the line being written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(record.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(path, error) from error


def read_lines(path: Path, kind: type[_Model], what: str) -> list[_Model]:
    """Read a JSON-lines file; a last line torn by a kill is cut off the file, any other broken line is an error."""
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole, _, torn = raw.rpartition(b"\n")
    records: list[_Model] = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            records.append(kind.model_validate_json(line))
        except ValidationError as error:
            raise BadFileError(
                f"Line {number} of the {what} {path} is broken. Delete that line, or start over with --overwrite."
            ) from error
    if torn:
        write_bytes(path, whole + b"\n" if whole else b"")
    return records


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process alone.

    Raises:
        UsageError: another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UsageError(f"Another process is working on {folder}. Wait for it, or choose another --name.") from error
    except OSError as error:
        raise disk_error(folder, error) from error
    try:
        yield
    finally:
        lock.release()
