"""The tree is what the packaging says: real root folders, one import namespace, nothing heavy before it is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT_FOLDERS = ("exporters", "latency_tables", "cli")
COMMANDS = ("compress", "export", "eval", "profile", "tables", "report", "targets")


@pytest.fixture(scope="session")
def project(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text())


def in_fresh_python(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_package_is_listed_in_pyproject(repository, project):
    found = set()
    for root, name in [("edgecompress", "edgecompress"), *((f, f"edgecompress.{f}") for f in ROOT_FOLDERS)]:
        for folder in [repository / root, *(repository / root).rglob("*")]:
            inside_link = any(parent.is_symlink() for parent in [folder, *folder.parents])
            if not inside_link and any(folder.glob("*.py")):
                found.add(".".join([name, *folder.relative_to(repository / root).parts]))
    assert found == set(project["tool"]["setuptools"]["packages"])


def test_root_folders_are_mapped_and_linked(repository, project):
    mapping = project["tool"]["setuptools"]["package-dir"]
    for folder in ROOT_FOLDERS:
        assert mapping[f"edgecompress.{folder}"] == folder
        link = repository / "edgecompress" / folder
        assert link.is_symlink() and link.readlink() == Path("..") / folder


def test_namespaced_names_import_and_bare_names_do_not_exist(tmp_path):
    modules = in_fresh_python(
        "import edgecompress.exporters, edgecompress.latency_tables.targets, edgecompress.cli.main, sys\n"
        "print(*sys.modules)",
        tmp_path,
    ).split()
    assert {f"edgecompress.{folder}" for folder in ROOT_FOLDERS} <= set(modules)
    assert not set(ROOT_FOLDERS) & set(modules)


def test_import_and_help_of_every_command_leave_torch_alone(tmp_path):
    code = f"""
import sys, edgecompress
from edgecompress.cli.main import main
for arguments in ([], *([name] for name in {COMMANDS})):
    try:
        main([*arguments, "--help"])
    except SystemExit as done:
        assert not done.code, arguments
print("MODULES", *sys.modules)
"""
    output = in_fresh_python(code, tmp_path)
    assert output.count("Usage: edgecompress") == 1 + len(COMMANDS)
    heavy = {"torch", "torchvision", "onnxruntime", "stable_baselines3", "sklearn"}
    assert not heavy & set(output.partition("MODULES")[2].split())


def test_public_names_are_importable_and_no_others(tmp_path):
    import edgecompress

    assert all(getattr(edgecompress, name) is not None for name in edgecompress.__all__)
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = edgecompress.compres


@pytest.fixture(scope="session")
def wheel(repository, tmp_path_factory):
    """Names in a wheel that is built from a copy without links (a clone on a system that has none)."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", *ROOT_FOLDERS)
    shutil.copytree(repository / "edgecompress", folder / "edgecompress", ignore=ignored)
    for name in ROOT_FOLDERS:
        shutil.copytree(repository / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, folder / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "."]
    done = subprocess.run([*command, "-w", "out"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "out").glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_wheel_puts_only_edgecompress_into_site_packages(wheel):
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"edgecompress"}
    assert len(top) == 2


def test_wheel_holds_every_source_and_data_file(wheel, repository):
    wanted = {"edgecompress/py.typed"}
    for root, name in [("edgecompress", "edgecompress"), *((f, f"edgecompress/{f}") for f in ROOT_FOLDERS)]:
        for pattern in ("*.py", "targets/*.toml", "data/*.json", "data/*.csv", "templates/*"):
            wanted |= {f"{name}/{path.relative_to(repository / root)}" for path in (repository / root).glob(pattern)}
    assert any(name.endswith(".toml") for name in wanted) and any("/data/" in name for name in wanted)
    assert wanted <= set(wheel)


def repository_files(repository: Path) -> list[Path]:
    """Files that are, or would be, committed."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [repository / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_no_file_names_a_registry_or_a_path_of_one_machine(repository):
    hosts = ("py" + "pi.org", "python" + "hosted", "download." + "pytorch", "npm" + "js", "conda." + "anaconda")
    paths = (r"/ho" + r"me/\w", "/ro" + "ot/", "/Us" + r"ers/\w", "/wo" + "rk/(main|shared|venv)")
    forbidden = re.compile("|".join([*map(re.escape, hosts), *paths]))
    files = repository_files(repository)
    assert len(files) > 40
    names = {path.name for path in files}
    assert not names & {"uv.lock", "poetry.lock", "package-lock.json"}
    found = [f"{path}: {match[0]}" for path in files if (match := forbidden.search(path.read_text(errors="ignore")))]
    assert not found
