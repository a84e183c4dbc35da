"""What importing the package costs and shows: no driver, no framework, an honest `__all__`."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

import veltrix_mw
from tests.support.etcd_servers import etcd
from tests.support.redis_servers import redis_server
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient, errors

# Drivers, frameworks, and what is dear to load: asyncio and http.client alone cost as much as all the rest.
LATE: Final = frozenset(
    {
        *("sqlite3", "redis", "grpc", "urllib3", "msgspec", "jsonschema", "pydantic"),
        *("flask", "werkzeug", "jinja2", "django", "asgiref", "starlette", "fastapi", "click", "rich", "pytest"),
        *("asyncio", "http.client", "multiprocessing", "opentelemetry.sdk", "opentelemetry.metrics"),
        *("socket", "secrets", "hashlib", "random", "veltrix_mw.protocols", "veltrix_mw.replica", "veltrix_mw.stores"),
        *("veltrix_mw.validation", "veltrix_mw.coalesce.lease", "veltrix_mw.tier_status", "veltrix_mw.digest"),
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


LIFE: Final = """
import sys, threading
from veltrix_mw import ConfigClient, Conflict, KeyMissing, StoreUnavailable

found = []

def again(call):
    while True:  # a store that stalls is no matter here; each call waits for it as long as a call may
        try:
            return call()
        except (StoreUnavailable, Conflict):
            pass
        except KeyMissing:  # it was deleted, by a call whose answer did not come
            return None

class Finder:
    def find_spec(self, name, path=None, target=None):
        found.append(f"{threading.current_thread().name}: {name}")

url, mirror = sys.argv[1:]
client = ConfigClient(url, mirror=mirror or None, lazy=("tenants/",), schemas={"s": {"type": "number"}})
sys.meta_path.insert(0, Finder())

def live():
    client.start()
    client.wait_ready(30)
    client.wait_for(again(lambda: client.put("k", 2)), 30)
    client.wait_for(again(lambda: client.put("tenants/acme/limit", 5)), 30)
    with client.pinned(layers=["eu/"]) as view:
        assert view["k"] == 2
        assert view.section("x/") == {}
        assert again(lambda: view.fetch("tenants/acme/limit", timeout_s=30)) == 5
    client.status()
    again(lambda: client.history("k"))
    again(lambda: client.rollback(client.view().revision))
    again(lambda: client.delete("k"))

thread = threading.Thread(target=live)
thread.start()
thread.join()
assert client.status().revision
client.close()
print(*found, sep="\\n", end="")
"""


def _put(client: ConfigClient) -> int:
    try:
        return client.put("k", 1)
    except errors.StoreUnavailable:
        return 0


@pytest.mark.parametrize("url", ["sqlite", "etcd", "etcd over gRPC", "etcd and its mirror", "redis"])
def test_nothing_is_imported_once_a_client_is_made(url: str, tmp_path: Path) -> None:
    """A process that forks while a thread imports has children that wait for that module for ever."""
    with contextlib.ExitStack() as stack:
        mirror = ""
        if url == "sqlite":
            url = f"sqlite:///{tmp_path / 'config.db'}"
        elif url == "redis":
            url = f"{stack.enter_context(redis_server()).url}?namespace=shop"
        else:
            mirror = stack.enter_context(redis_server()).url if "mirror" in url else ""
            transport = "?transport=grpc" if "gRPC" in url else ""
            url = f"etcd://127.0.0.1:{stack.enter_context(etcd()).members[0].port}/shop{transport}"
        with ConfigClient(url, relay="never") as writer:
            wait_until(lambda: _put(writer), 60, reason="a first value")
        command = [sys.executable, "-c", LIFE, url, mirror]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Traceback" not in done.stderr
