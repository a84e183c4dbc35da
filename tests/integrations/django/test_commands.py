"""Outside a server: the app starts nothing, and management commands and the shell read the project's client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command, execute_from_command_line
from django.core.management.base import BaseCommand, CommandError
from django.core.management.commands import runserver
from django.core.management.commands import test as test_command
from django.http import HttpResponse
from django.test import override_settings

from django_veltrix import config, get_client, override_config
from tests.support.serving import ROOT
from veltrix_mw import ConfigClient, KeyMissing, NoCurrentView


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, warnings being errors."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "integrations"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={**os.environ, "PYTHONPATH": paths, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


PROJECT = {"DJANGO_SETTINGS_MODULE": "tests.integrations.django.project.settings"}


class Reading(BaseCommand):
    """A project's command that reads config."""

    requires_system_checks = ()
    found: Any = None

    def handle(self, *args: Any, **options: Any) -> None:
        self.found = self.read()

    def read(self) -> Any:
        first = config["greeting"]
        get_client().wait_for(get_client().put("greeting", "changed"))
        return [first, config["greeting"], dict(config)["greeting"]]


def run(command: BaseCommand) -> Any:
    call_command(command)
    return command.found


def test_a_command_reads_a_fresh_view_each_time(site, put):
    put(site(lambda request: HttpResponse()), "greeting", "hello")
    assert run(Reading()) == ["hello", "changed", "changed"]
    with pytest.raises(NoCurrentView):
        config["greeting"]


def test_a_pinned_command_reads_one_view(site, put):
    class Pins(Reading):
        def read(self) -> Any:
            with get_client().pinned():
                return super().read()

    put(site(lambda request: HttpResponse()), "greeting", "hello")
    assert run(Pins()) == ["hello", "hello", "hello"]


def test_a_command_under_override_config_reads_the_other_keys_of_the_client(site, put):
    class ReadsBoth(Reading):
        def read(self) -> Any:
            return [config["greeting"], config["other"]]

    client = site(lambda request: HttpResponse())
    put(client, "other", "the store's")
    put(client, "greeting", "the store's")
    with override_config({"greeting": "overridden"}):
        assert run(ReadsBoth()) == ["overridden", "the store's"]
        with pytest.raises(KeyMissing):
            config["other"]


@pytest.mark.parametrize("runs_others_code", [test_command.Command, runserver.Command])
def test_commands_that_run_tests_or_a_server_let_code_meet_what_it_meets_in_production(site, runs_others_code):
    class Runs(runs_others_code):
        requires_system_checks = ()
        suppressed_base_arguments = frozenset()

        def handle(self, *args: Any, **options: Any) -> None:
            with pytest.raises(NoCurrentView):
                config["greeting"]
            assert run(Reading())[0] == "hello"  # a command that is called from there is one again

    client = site(lambda request: HttpResponse())
    client.wait_for(client.put("greeting", "hello"))
    call_command(Runs())


def test_the_shell_reads_the_projects_client(tmp_path: Path):
    url = f"sqlite:///{tmp_path}/config.db"
    with ConfigClient(url) as client:
        client.put("greeting", "hello")
    code = "from django_veltrix import config, get_client; print(config['greeting'], get_client().ready)"
    done = python("-m", "django", "shell", "-v", "0", "-c", code, TESTS_CONFIG_URL=url, **PROJECT)
    assert (done.stdout.split(), done.stderr, done.returncode) == (["hello", "True"], "", 0)


def test_a_project_without_a_url_has_a_doctor_that_says_so_and_other_commands_say_it_in_a_line():
    code = (
        "import sys; from django.conf import settings; settings.configure(INSTALLED_APPS=['django_veltrix']); "
        "from django.core.management import execute_from_command_line as run; run(['manage.py', *sys.argv[1:]])"
    )
    seen = python("-c", code, "veltrix", "doctor", "--json")
    first = json.loads(seen.stdout)["checks"][0]
    assert (seen.returncode, first["check"], first["state"]) == (1, "url", "fail")
    for verb in (["status"], ["get", "limit"]):
        told = python("-c", code, "veltrix", *verb)
        assert (told.returncode, told.stdout, told.stderr.count("\n")) == (2, "", 1)
        assert told.stderr.startswith("error: no config store is named: pass a URL or set VELTRIX_URL")


def test_importing_reads_no_settings_and_starts_nothing():
    code = "import threading, django_veltrix, django_veltrix.apps; print(threading.active_count())"
    done = python("-c", code)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_setting_django_up_starts_nothing():
    code = "import django, threading; django.setup(); print(threading.active_count())"
    done = python("-c", code, **PROJECT)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_the_app_needs_no_database_and_brings_no_models():
    from django.apps import apps

    assert list(apps.get_app_config("django_veltrix").get_models()) == []


def test_a_command_that_reads_no_config_starts_no_thread(site):
    client = site(lambda request: HttpResponse())
    client.close()
    before = set(threading.enumerate())
    call_command("check")
    assert set(threading.enumerate()) == before


# manage.py veltrix


def veltrix(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "django", "veltrix", *arguments, **{**PROJECT, **env})


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/config.db"
    with ConfigClient(url) as client:
        client.put("greeting", "hello")
    return url


def test_the_cli_works_on_the_projects_store(url):
    assert veltrix("put", "checkout/max_items", "80", TESTS_CONFIG_URL=url).returncode == 0
    done = veltrix("get", "checkout/max_items", TESTS_CONFIG_URL=url)
    assert (done.stdout, done.stderr, done.returncode) == ("80\n", "", 0)
    with ConfigClient(url) as client:
        assert client.read(["checkout/max_items"])["checkout/max_items"].value == 80


def test_the_clis_exit_codes_and_errors_are_its_own(url):
    done = veltrix("get", "no/such/key", TESTS_CONFIG_URL=url)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_url_on_the_command_line_comes_before_the_projects(url, tmp_path):
    other = f"sqlite:///{tmp_path}/other.db"
    assert veltrix("--url", other, "put", "greeting", '"other"', TESTS_CONFIG_URL=url).returncode == 0
    assert veltrix("get", "greeting", "--url", other, TESTS_CONFIG_URL=url).stdout == '"other"\n'
    assert veltrix("get", "greeting", TESTS_CONFIG_URL=url).stdout == '"hello"\n'


def test_djangos_own_options_do_not_reach_the_cli(url):
    settings = PROJECT["DJANGO_SETTINGS_MODULE"]
    done = python("-m", "django", "veltrix", "get", "greeting", f"--settings={settings}", TESTS_CONFIG_URL=url)
    assert (done.stdout, done.returncode) == ('"hello"\n', 0)


@pytest.mark.parametrize("arguments", [("help", "veltrix"), ("veltrix", "--help")])
def test_help_is_the_clis(arguments):
    done = python("-m", "django", *arguments, **PROJECT)
    assert done.returncode == 0
    assert "rollback" in done.stdout
    assert "Exit codes" in done.stdout


def test_the_namespace_is_the_projects(url, capsys):
    with ConfigClient(url, namespace="shop") as client:
        client.put("greeting", "of the shop")
    with override_settings(VELTRIX={"URL": url, "NAMESPACE": "shop"}):
        call_command("veltrix", "get", "greeting")
    assert capsys.readouterr().out == '"of the shop"\n'


def test_the_mirror_and_the_lazy_prefixes_are_the_projects(url, mirror, monkeypatch):
    out = StringIO()
    with override_settings(VELTRIX={"URL": url, "MIRROR_URL": mirror, "LAZY": ["tenants/"]}):
        call_command("veltrix", "status", "--json", stdout=out)
        assert [tier["url"] for tier in json.loads(out.getvalue())["tiers"]] == [url, mirror]
        given = []
        monkeypatch.setattr("veltrix_mw.cli.main", lambda args, **_: given.extend(args) or 0)
        call_command("veltrix", "relay")
    assert given == ["--url", url, "--mirror", mirror, "--lazy", "tenants/", "relay"]


def test_call_command_hands_out_what_is_printed_and_raises_what_went_wrong(url):
    out = StringIO()
    with override_settings(VELTRIX={"URL": url}):
        call_command("veltrix", "get", "greeting", "--json", stdout=out)
        with pytest.raises(CommandError) as raised:
            call_command("veltrix", "get", "no/such/key", stdout=out)
    assert json.loads(out.getvalue())["value"] == "hello"
    assert raised.value.returncode == 1


def test_in_debug_mode_it_works_on_the_embedded_file(tmp_path, capsys):
    with override_settings(VELTRIX={}, DEBUG=True, BASE_DIR=tmp_path):
        call_command("veltrix", "put", "greeting", '"hello"')
        call_command("veltrix", "get", "greeting")
    assert (tmp_path / "veltrix.db").exists()
    assert capsys.readouterr().out.splitlines()[-1] == '"hello"'


def test_which_file_that_is_is_said_on_stderr_once_unless_a_url_is_given(tmp_path, capsys):
    with override_settings(VELTRIX={}, DEBUG=True, BASE_DIR=tmp_path):
        call_command("veltrix", "put", "greeting", '"hello"')
        capsys.readouterr()
        call_command("veltrix", "get", "greeting", "--json")
        told = capsys.readouterr()
        call_command("veltrix", "get", "greeting", "--url", f"sqlite:///{tmp_path}/veltrix.db")
        other = capsys.readouterr()
    assert json.loads(told.out)["value"] == "hello"
    assert told.err == f"warning: VELTRIX names no URL and DEBUG is on: this is the store {tmp_path}/veltrix.db\n"
    assert other.err == ""


def test_wrong_settings_are_one_line_and_exit_code_2(capsys):
    with override_settings(VELTRIX={"URI": "memory://"}), pytest.raises(SystemExit) as ended:
        execute_from_command_line(["manage.py", "veltrix", "get", "greeting"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "did you mean 'URL'" in line
    with override_settings(VELTRIX={}), pytest.raises(SystemExit) as ended:
        execute_from_command_line(["manage.py", "veltrix", "get", "greeting"])
    assert ended.value.code == 2
    assert "VELTRIX_URL" in capsys.readouterr().err
