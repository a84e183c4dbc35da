"""The compose file of the examples: valid by the Compose Specification's schema, and its commands do what they say.

The schema is the copy that comes with check-jsonschema: no network, no Docker. The commands run here, on the servers of
this machine; nobody pulls or builds the images.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.ports import free_port
from tests.support.serving import serve
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient, StoreUnavailable

ROOT: Final = Path(__file__).resolve().parents[2]
FILE: Final = ROOT / "examples" / "compose.yaml"
WITHIN_S: Final = 60.0


def checked(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def compose() -> Any:
    return importlib.import_module("ruamel.yaml").YAML(typ="safe").load(FILE)


def test_the_compose_file_is_one_by_the_specification_s_schema(tmp_path: Path) -> None:
    done = checked(FILE)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(FILE.read_text().replace("depends_on:", "depend_on:"))
    refused = checked(wrong)
    assert refused.returncode == 1
    assert "depend_on" in refused.stdout


def test_the_image_of_the_shop_is_built_from_what_there_is(compose: Any) -> None:
    recipe = compose["services"]["shop"]["build"]["dockerfile_inline"]
    assert (FILE.parent / compose["services"]["shop"]["build"]["context"]).resolve() == ROOT
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", recipe, re.MULTILINE) for name in line.split()]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r'"\.\[(.*)\]"', recipe)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()


@contextlib.contextmanager
def running(commands: Mapping[str, list[str]], folder: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def test_its_commands_serve_a_change_and_outlive_a_member_and_the_mirror(compose: Any, tmp_path: Path) -> None:
    services = compose["services"]
    shop = services["shop"]
    assert set(shop["depends_on"]) == services.keys() - {"shop"}
    assert all("healthcheck" in services[name] for name in shop["depends_on"])
    ports = {(name, port): free_port() for name in services for port in (2379, 2380, 6379)}

    def here(text: str, own: str = "") -> str:
        """With each name and port of the file replaced by where that is on this machine."""
        text = text.replace("0.0.0.0", own).replace("/data", str(tmp_path / own))
        for (name, port), mine in ports.items():
            text = text.replace(f"{name}:{port}", f"127.0.0.1:{mine}")
        return text

    commands = {name: [here(word, name) for word in services[name]["command"]] for name in shop["depends_on"]}
    commands["mirror"] += ["--bind", "127.0.0.1", "--port", str(ports["mirror", 6379])]
    environment = {name: here(value) for name, value in shop["environment"].items()}

    def is_healthy(name: str) -> bool:
        _, *command = services[name]["healthcheck"]["test"]
        mine = ["-p", str(ports[name, 6379])] if name == "mirror" else ["--endpoints", f"127.0.0.1:{ports[name, 2379]}"]
        program, *rest = command
        done = subprocess.run([program, *mine, *rest], capture_output=True, check=False)
        return done.returncode == 0

    with running(commands, tmp_path) as processes:
        for name, process in processes.items():
            wait_until(lambda: is_healthy(name), WITHIN_S, reason=f"{name} is healthy", interval_s=0.2)  # noqa: B023
            assert process.poll() is None
        app = shop["command"][1]
        client = ConfigClient(environment["VELTRIX_URL"], mirror="")
        with serve(app, server="uvicorn", asgi=True, env=environment) as served, client:

            def written(value: int) -> int:
                with contextlib.suppress(StoreUnavailable):  # as while a leader is elected
                    return client.put("checkout/max_items", value)
                return 0

            def came_by_the_mirror() -> bool:
                served.until_each_worker("revision", client.put("checkout/max_items", 80))
                return bool(served.get()["origin"] == "redis")

            wait_until(lambda: written(50), WITHIN_S, reason="the cluster takes writes")
            wait_until(came_by_the_mirror, WITHIN_S, reason="a change comes by the mirror")
            for name in ("etcd1", "mirror"):
                processes[name].kill()
            wait_until(lambda: written(90), WITHIN_S, reason="the other two elect a leader, if need be")
            served.until_each_worker("checkout/max_items", 90)
