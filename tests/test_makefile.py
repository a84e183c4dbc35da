"""What a developer is promised by `make`, and the scripts behind it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Final

import pytest

from scripts.public_types import faults

ROOT: Final = Path(__file__).parent.parent


def _run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    # A make above us would hand its own flags down.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )


def test_make_alone_lists_every_target() -> None:
    alone, asked = _run("make"), _run("make", "help")
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout == asked.stdout
    listed = [line.split()[0] for line in alone.stdout.splitlines()[1:]]
    assert listed == ["demo", "test", "bench", "lint", "types", "docs", "fmt", "clean", "help"]


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "examples/demo.py"),
        ("test", "scripts/suite.sh"),
        ("test", "ruff format --check"),
        ("test", "mypy --strict"),
        ("test", "scripts/public_types.py"),
        ("bench", "-m benchmarks"),
        ("docs", "sphinx -W"),
    ],
)
def test_a_target_sets_up_the_environment_and_then_runs_its_command(target: str, command: str) -> None:
    plan = _run("make", "--dry-run", target)
    assert plan.returncode == 0, plan.stderr
    first, *rest = plan.stdout.splitlines()
    assert first.startswith("scripts/environment.sh .venv ")
    assert any(command in line for line in rest), plan.stdout


def test_a_target_names_a_dependency_group_that_exists() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    for target in ("demo", "test", "bench", "lint", "types", "docs", "fmt"):
        first = _run("make", "--dry-run", target).stdout.splitlines()[0]
        assert first.split()[-1] in groups


def test_a_failing_step_fails_the_target(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    _script(tmp_path / "scripts/environment.sh", "exit 0")
    _script(tmp_path / "scripts/suite.sh", "exit 0")
    _script(tmp_path / "scripts/servers.sh", "exit 0")
    for step in ("ruff check", "ruff format", "mypy", "pyright", "public_types"):
        _script(tmp_path / ".venv/bin/python", f'[[ "$*" != *"{step}"* ]]')
        failed = _run("make", "test", cwd=tmp_path)
        assert failed.returncode != 0, step
        assert step in failed.stdout.splitlines()[-1]
    _script(tmp_path / ".venv/bin/python", "exit 0")
    assert _run("make", "test", cwd=tmp_path).returncode == 0
    _script(tmp_path / "scripts/suite.sh", "exit 1")
    assert _run("make", "test", cwd=tmp_path).returncode != 0
    _script(tmp_path / "scripts/suite.sh", "exit 0")
    _script(tmp_path / "scripts/servers.sh", "exit 1")
    assert _run("make", "test", cwd=tmp_path).returncode != 0


def test_servers_that_are_there_are_not_installed(tmp_path: Path) -> None:
    for name in ("etcd", "redis-server"):
        _script(tmp_path / name, "exit 0")
    _script(tmp_path / "apt-get", f"touch {tmp_path}/called")
    done = _run("scripts/servers.sh", "etcd", "redis-server", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert (done.returncode, done.stdout) == (0, "")
    assert not (tmp_path / "called").exists()


def test_all_that_make_wants_installed_has_a_package() -> None:
    (line,) = (line for line in _run("make", "--dry-run", "servers").stdout.splitlines() if "servers.sh" in line)
    wanted = line.split()[1:]
    assert {"etcd", "redis-server", "promtool"} <= set(wanted)
    packages = dict(re.findall(r"\[([\w-]+)\]=([\w-]+)", (ROOT / "scripts/servers.sh").read_text()))
    assert [command for command in wanted if command not in packages] == []


def test_servers_that_cannot_be_installed_fail_and_say_what_lacks(tmp_path: Path) -> None:
    bash = _script(tmp_path / "bash", "")
    bash.unlink()
    bash.symlink_to("/bin/bash")
    done = _run("/bin/bash", "scripts/servers.sh", "etcd", "redis-server", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "etcd-server" in done.stderr
    assert "redis-server" in done.stderr


def test_continuous_integration_runs_what_a_developer_runs() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert lines[-1] == "make test"


def _script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The scripts, with an environment whose Python only notes what it is called for."""
    for name in ("scripts/environment.sh", "scripts/pythons.sh", "pyproject.toml"):
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
        copy.chmod(0o755)
    _script(tmp_path / ".venv/bin/python", f'[[ $1 == -c ]] || echo "$*" >>{tmp_path}/calls')
    return tmp_path


def _calls(clone: Path) -> list[str]:
    calls = clone / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return lines


def test_an_environment_is_filled_once_and_again_when_the_project_file_changes(clone: Path) -> None:
    def setup() -> list[str]:
        done = _run("scripts/environment.sh", ".venv", "test", cwd=clone)
        assert done.returncode == 0, done.stderr
        return _calls(clone)

    first = setup()
    assert first[-1].endswith("--editable .[all] --group test")
    assert setup() == []
    with (clone / "pyproject.toml").open("a") as project:
        project.write("# changed\n")
    assert setup() == first
    assert setup() == []


def test_an_environment_that_could_not_be_filled_is_filled_the_next_time(clone: Path) -> None:
    python = clone / ".venv/bin/python"
    works = python.read_text()
    _script(python, "[[ $1 == -c ]]")
    assert _run("scripts/environment.sh", ".venv", "test", cwd=clone).returncode != 0
    _script(python, works)
    assert _run("scripts/environment.sh", ".venv", "test", cwd=clone).returncode == 0
    assert _calls(clone) != []


def test_an_environment_is_made_anew_when_its_python_is_gone(clone: Path) -> None:
    python = clone / ".venv/bin/python"
    python.unlink()
    python.symlink_to(clone / "gone")
    # The Python that makes it puts a noting one into it, as `python -m venv` puts a real one.
    noting = _script(clone / "noting", f'[[ $1 == -c ]] || echo "$*" >>{clone}/calls')
    maker = _script(clone / "maker", f'[[ $2 == venv ]] || exit 0\nmkdir -p "$3/bin"\ncp {noting} "$3/bin/python"')
    done = _run("scripts/environment.sh", ".venv", "test", maker, cwd=clone)
    assert done.returncode == 0, done.stderr
    assert _calls(clone)[-1].endswith("--group test")


def test_a_python_that_refuses_to_run_is_passed_over(tmp_path: Path) -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    # As the shims of version managers do for a version that is not selected.
    _script(tmp_path / "shims/python3.13", "exit 127")
    _script(tmp_path / "shims/python3.14", "exit 127")
    found = _run(
        "scripts/pythons.sh",
        PATH=f"{tmp_path}/shims:{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    assert found.returncode == 0, found.stderr
    pythons = dict(line.split(" ", 1) for line in found.stdout.splitlines())
    assert version in pythons
    assert not any(str(tmp_path) in path for path in pythons.values())
    for wanted, path in pythons.items():
        show = (
            "import sys, ensurepip, sqlite3, ssl; print('%d.%d' % sys.version_info[:2], sys.prefix == sys.base_prefix)"
        )
        assert _run(path, "-c", show).stdout == f"{wanted} True\n"


def test_supported_pythons_come_first_the_newest_before_the_older() -> None:
    found = _run("scripts/pythons.sh").stdout.split()[::2]
    order = ["3.13", "3.12", "3.11", "3.14", "3.15"]
    assert found == [version for version in order if version in found]
    assert found


def test_what_the_suite_is_run_on_is_what_the_package_declares() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    declared = [line.rpartition(" ")[2] for line in classifiers if "Python :: 3." in line]
    assert f"{' | '.join(declared)})" in (ROOT / "scripts/suite.sh").read_text()


def test_a_suite_that_fails_on_another_python_fails_and_the_summaries_come_last(tmp_path: Path) -> None:
    suite = _script(tmp_path / "scripts/suite.sh", "")
    suite.write_text((ROOT / "scripts/suite.sh").read_text())
    _script(tmp_path / "scripts/pythons.sh", "echo 3.13 /a; echo 3.12 /b; echo 3.11 /c; echo 3.14 /d")
    _script(tmp_path / "scripts/environment.sh", "exit 0")

    def python(folder: str, version: str, summary: str, exit_code: int = 0, takes_s: int = 0) -> None:
        _script(
            tmp_path / folder / "bin/python",
            f'if [[ "$2" == *platform* ]]; then echo "Python {version}"; '
            f'elif [[ $1 == -c ]]; then echo "{version}"; '
            f'else echo "run on {version}: $*"; echo "{summary}"; sleep {takes_s}; exit {exit_code}; fi',
        )

    python(".venv", "3.13", "7 passed in 1s")
    python(".venvs/3.12", "3.12", "6 passed in 1s")
    python(".venvs/3.11", "3.11", "5 passed in 1s")
    python(".venvs/etcd3", "3.13 with etcd3", "4 passed in 1s")
    passed = _run("scripts/suite.sh", cwd=tmp_path)
    assert passed.returncode == 0, passed.stderr
    assert passed.stdout.splitlines()[-7:] == [
        "== all passed",
        "Python 3.13: 7 passed in 1s",
        "Python 3.13: 7 passed in 1s",
        "Python 3.13: 7 passed in 1s",
        "Python 3.13 with etcd3: 4 passed in 1s",
        "Python 3.12: 6 passed in 1s",
        "Python 3.11: 5 passed in 1s",
    ]
    # What does not depend on the interpreter, and takes minutes, is run on the main one alone, as two parts.
    parts = [
        (line.removeprefix("run on ").partition(":")[0], line.partition(" -m pytest ")[2])
        for line in passed.stdout.splitlines()
        if line.startswith("run on ")
    ]
    faults = ["faults", "simulation", "cli/test_demo_cluster.py"]
    once = ["stores/test_mirrored.py", "stores/test_redis_topologies.py"]
    once += ["stores/test_etcd_over_grpc.py", "stores/test_etcd_handed_in.py"]
    once += ["cli/test_doctor.py", "cli/test_doctor_rights.py", "cli/test_doctor_topologies.py"]
    once += ["test_freshness_client.py", "test_herd.py", "test_lazy_mirror.py"]
    once += ["test_leases.py", "test_permissions.py", "telemetry"]
    without = " ".join(f"--ignore=tests/{left}" for left in faults + once)
    alone = [("3.13", " ".join(f"tests/{part}" for part in parts)) for parts in (faults, once)]
    beside = [("3.13 with etcd3", "tests/etcd3"), ("3.12", without), ("3.11", without)]
    assert sorted(parts) == sorted([("3.13", without), *alone, *beside])
    assert all((ROOT / "tests" / left).exists() for left in faults + once)
    assert "`faults` and `once` in `scripts/suite.sh`" in " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    for failing, other in (("3.12", "3.11"), ("3.11", "3.12")):
        python(f".venvs/{failing}", failing, "1 failed in 1s", exit_code=1)
        python(f".venvs/{other}", other, "5 passed in 1s")
        failed = _run("scripts/suite.sh", cwd=tmp_path)
        assert failed.returncode == 1
        assert f"Python {failing}: 1 failed in 1s" in failed.stdout.splitlines()[-2:]
        assert "== failed" in failed.stdout
    # No part is begun once one has failed: the fourth waits for one of three to end, and the main one's are the first.
    python(".venv", "3.13", "1 failed in 1s", exit_code=1)
    python(".venvs/3.12", "3.12", "6 passed in 1s", takes_s=2)
    failed = _run("scripts/suite.sh", cwd=tmp_path)
    assert failed.returncode == 1
    assert "run on 3.11" not in failed.stdout


def test_a_public_name_without_a_known_type_is_a_fault_and_a_private_one_is_not() -> None:
    def symbol(name: str, *, known: bool, alternate: str = "") -> dict[str, object]:
        return {
            "name": name,
            "isTypeKnown": known,
            "isTypeAmbiguous": False,
            "alternateNames": [alternate] if alternate else [],
            "diagnostics": [],
        }

    symbols = [
        symbol("core.View", known=True),
        symbol("core.view.View", known=True, alternate="core.View"),
        symbol("core.view.View.age_s", known=False),
        symbol("core.view.View.__init__", known=False),
        symbol("core.view.View._held", known=False),
        symbol("core.view.Cache", known=False),
    ]
    found = {"typeCompleteness": {"modules": [{"name": "core"}], "symbols": symbols}}
    assert [fault.partition(":")[0] for fault in faults(found, ("core", "core.asgi"))] == [
        "core.asgi",
        "core.view.View.age_s",
        "core.view.View.__init__",
    ]
