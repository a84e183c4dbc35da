"""The wheel that users get: built from the sdist, installed alone, used without extras."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterable
from email import message_from_bytes
from importlib.metadata import distribution
from pathlib import Path
from typing import Final
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT: Final = Path(__file__).parent.parent
PACKAGES: Final = ("veltrix_mw", "flask_veltrix", "django_veltrix", "starlette_veltrix")

# A user's script: strictly typed, on both stores that need no server.
SCRIPT: Final = '''
"""Put, wait, read."""

from pathlib import Path
from tempfile import TemporaryDirectory

from veltrix_mw import ConfigClient, KeyMissing, Put, View, current_view


def limit(view: View) -> object:
    return view["checkout/max_items"]


def use(url: str) -> None:
    with ConfigClient(url) as client:
        # The first write creates the file: a read alone would wait for one.
        revision: int = client.write([Put("checkout/max_items", 80), Put("checkout/open", True)])
        client.wait_ready(timeout_s=5)
        client.wait_for(revision, timeout_s=5)
        with client.pinned() as view:
            assert limit(view) == 80
            assert current_view().revision == revision
            deleted = client.delete("checkout/max_items")
            assert deleted is not None
            client.wait_for(deleted, timeout_s=5)
            assert limit(view) == 80
        try:
            limit(client.view())
        except KeyMissing:
            print(url.partition("://")[0], client.snapshot.origin)


use("memory://")
with TemporaryDirectory() as folder:
    use(f"sqlite:///{Path(folder) / 'config.db'}")
'''


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from the unpacked sdist."""
    folder = tmp_path_factory.mktemp("built")
    # Without isolation: the backend is in the test group, so that no index is asked.
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that holds the wheel and what it requires without extras, nothing else."""
    folder = tmp_path_factory.mktemp("alone")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python3.*/site-packages")
    # What this environment has of them is copied, so that no index is asked.
    with ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        core = message_from_bytes(archive.read(metadata))
    for name in _required(core.get_all("Requires-Dist", [])):
        _copy(name, site)
    python = folder / "bin/python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    _run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=folder)
    _run(*pip, "check", cwd=folder)
    return python


def _required(lines: Iterable[str]) -> set[str]:
    """The names of all distributions that these requirements need without extras, with all that those need."""
    needed: set[str] = set()
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed |= {requirement.name, *_required(distribution(requirement.name).requires or [])}
    return needed


def _copy(name: str, site: Path) -> None:
    found = distribution(name)
    for file in found.files or []:
        if not file.parts[0].startswith("..") and "__pycache__" not in file.parts:
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(found.locate_file(file)), target)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_the_wheel_holds_the_core_and_the_integrations_each_typed_and_nothing_else(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    for package in PACKAGES:
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    tops = {name.split("/")[0] for name in names}
    (info,) = tops - set(PACKAGES)
    assert info.endswith(".dist-info")
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_holds_every_file_of_the_sources(wheel: Path) -> None:
    sources = {
        path.relative_to(root).as_posix()
        for root in (ROOT / "src", ROOT / "integrations")
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.endswith((".pyc", ".db"))
    }
    assert sources <= set(ZipFile(wheel).namelist())


def test_the_sdist_holds_what_a_packager_needs_to_run_the_tests(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert names >= {"Makefile", "LICENSE", "README.md", "CHANGELOG.md", "tests/test_wheel.py", "scripts/suite.sh"}
    assert not [name for name in names if name.startswith((".venv", ".git/", "dist"))]


def test_the_wheel_works_without_extras_on_memory_and_sqlite(alone: Path, script: Path) -> None:
    # -I: neither the working directory nor PYTHONPATH lends it a module.
    assert _run(alone, "-I", "-W", "error", script, cwd=script.parent) == "memory memory\nsqlite sqlite\n"


def test_the_environment_of_the_wheel_has_no_extra(alone: Path) -> None:
    show = (
        "from importlib.util import find_spec as f; print([n for n in ('flask', 'django', 'click', 'pytest') if f(n)])"
    )
    assert _run(alone, "-I", "-c", show, cwd=alone.parent) == "[]\n"


def test_a_strict_type_checker_reads_the_types_of_the_installed_wheel(alone: Path, script: Path) -> None:
    mypy = (
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--python-executable",
        alone,
        "--cache-dir",
        script.parent / "cache",
    )
    _run(*mypy, script, cwd=script.parent)
    script.write_text(f"{SCRIPT}\nlimit(80)\n")
    with pytest.raises(AssertionError, match='incompatible type "int"; expected "View"'):
        _run(*mypy, script, cwd=script.parent)
