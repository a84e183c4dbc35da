"""What importing the package costs and shows: no driver, no framework, an honest `__all__`."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Final

import pytest

import veltrix_mw
from veltrix_mw import errors

# Drivers, frameworks, and what is dear to load: asyncio and http.client alone cost as much as all the rest.
LATE: Final = frozenset(
    {
        *("sqlite3", "redis", "grpc", "urllib3", "msgspec", "jsonschema", "pydantic"),
        *("flask", "werkzeug", "jinja2", "django", "asgiref", "starlette", "fastapi", "click", "rich", "pytest"),
        *("asyncio", "http.client", "multiprocessing", "opentelemetry.sdk", "opentelemetry.metrics"),
        *("socket", "secrets", "hashlib", "random", "veltrix_mw.protocols", "veltrix_mw.replica", "veltrix_mw.stores"),
        *("veltrix_mw.validation", "veltrix_mw.coalesce.lease", "veltrix_mw.tier_status"),
    }
)

# The contract: what other people's code imports from the package.
CONTRACT: Final = frozenset(
    {
        *("ConfigClient", "Snapshot", "View", "Entry", "Put", "Delete", "current_view", "override_config"),
        *errors.__all__,
    }
)


def _loaded_by(statement: str) -> frozenset[str]:
    show = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    return frozenset(done.stdout.split())


def test_importing_the_package_loads_no_driver_and_no_framework() -> None:
    loaded = _loaded_by("import veltrix_mw")
    # opentelemetry-api is the one dependency that is imported at once; what it loads is not ours to keep out.
    before = _loaded_by("import opentelemetry.trace")
    assert "veltrix_mw.errors" in loaded
    assert LATE & (loaded - before) == frozenset()


def test_the_list_of_late_modules_can_be_failed() -> None:
    assert "sqlite3" in LATE & _loaded_by("import sqlite3")


@pytest.mark.parametrize("name", veltrix_mw.__all__)
def test_each_exported_name_exists(name: str) -> None:
    assert getattr(veltrix_mw, name) is not None


def test_the_contract_is_exported_and_nothing_twice() -> None:
    assert frozenset(veltrix_mw.__all__) >= CONTRACT
    assert len(veltrix_mw.__all__) == len(set(veltrix_mw.__all__))


def test_no_public_name_is_left_out() -> None:
    public = {
        name
        for name in dir(veltrix_mw)
        if not name.startswith("_")
        and not isinstance(getattr(veltrix_mw, name), ModuleType)
        and name != "annotations"  # of `from __future__`
    }
    assert public <= set(veltrix_mw.__all__)
