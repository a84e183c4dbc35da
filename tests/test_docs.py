"""The README and the docs: every snippet runs, and what the pages list is what there is.

A page is a story: its fenced blocks run from top to bottom, in one process and one empty folder. `console` blocks are
what a terminal shows (lines after `$` are commands, the others their output, `...` stands for anything); `python`
blocks share one module. A block that needs an app around it is marked `<!-- run: NAME -->`; what runs before and after
it is `AROUND[NAME]`. The page's process is this file, run as a program.

A page that says `<!-- servers: etcd redis -->` gets real ones of its own: wherever it names the hosts of `HOSTS`, those
are meant. There `etcdctl` and `redis-cli` run, too.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import importlib.metadata
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pytest

from tests.support.etcd_servers import etcd
from tests.support.redis_servers import redis_server

ROOT: Final = Path(__file__).resolve().parents[1]
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
URL: Final = "sqlite:///config.db"

RUN: Final = frozenset({"python", "console"})
SHOWN: Final = frozenset({"text", "html", "html+jinja", "html+django", "json", "ini", "toml"})  # nothing to run
# Commands of others: named here, so that a misspelt one of ours is not taken for one of theirs.
OTHERS: Final = frozenset(
    {"gunicorn", "uvicorn", "uwsgi", "granian", "curl", "chgrp", "chmod", "install", "sqlite3", "promtool", "wrk"}
)
STAY: Final = frozenset({"watch", "relay", "demo"})  # verbs that do not end by themselves

# How pages name their servers, the longest first; each is replaced by where the page's own server listens.
HOSTS: Final[Mapping[str, tuple[str, ...]]] = {
    "etcd": ("h1:2379,h2:2379,h3:2379", "127.0.0.1:2379"),
    "redis": ("h4:6379", "127.0.0.1:6379"),
}

# --- what is around a marked block ----------------------------------------------------------------------------------

_DJANGO_PROJECT = """
import django
from django.conf import settings
from django.core.management import call_command
from types import ModuleType

urls = sys.modules["urls"] = ModuleType("urls")
urls.urlpatterns = []
settings.configure(
    INSTALLED_APPS=INSTALLED_APPS,
    MIDDLEWARE=MIDDLEWARE,
    VELTRIX=globals().get("VELTRIX", {}),
    ROOT_URLCONF="urls",
    ALLOWED_HOSTS=["testserver"],
    SECRET_KEY="k",
    DATABASES={},
    LOGGING_CONFIG=None,
    TEMPLATES=[
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "OPTIONS": {"context_processors": ["django_veltrix.context_processors.config"]},
        }
    ],
)
django.setup()
with open(os.devnull, "w") as nowhere:
    call_command("check", fail_level="WARNING", stdout=nowhere)

from django.http import HttpResponse
from django.test import Client
from django.urls import path

def answer(view):
    urls.urlpatterns[:] = [path("", view)]
    django.urls.clear_url_caches()
    return Client().get("/").content.decode()

assert answer(lambda request: HttpResponse(str(request.config["checkout/max_items"]))) == "50"
"""

_STARLETTE_APP = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

def limit(request):
    return PlainTextResponse(str(request.state.config["checkout/max_items"]))

app = Starlette(routes=[Route("/limit", limit)])
"""

_FASTAPI_ANSWERS = """
from fastapi.testclient import TestClient
app.middleware_stack = None  # built at the first request; the page goes on adding to the app
with TestClient(app, raise_server_exceptions=False) as http:
    """

# The package has an environment of its own, where it is tested: here a client that has what it has.
_ETCD3 = """
import grpc
from types import ModuleType, SimpleNamespace

class Client(SimpleNamespace):
    def close(self):
        self.channel.close()

etcd3 = sys.modules["etcd3"] = ModuleType("etcd3")
etcd3.client = lambda host, port: Client(channel=grpc.insecure_channel(os.environ["DOCS_ETCD"]), metadata=None)
"""

# The exporter of spans to the terminal takes the one that there is as it is imported.
_PRINTED = """
import io
sys.modules.pop("opentelemetry.sdk.trace.export", None)
sys.stdout = io.StringIO()
"""

# What runs before and after a marked block. Most snippets show a part of an app; this is the rest of it.
AROUND: Final[dict[str, tuple[str, str]]] = {
    "etcd3": (_ETCD3, ""),
    "flask": (
        "from flask import Flask\napp = Flask('shop')",
        (
            "app.add_url_rule('/', view_func=lambda: str(config['checkout/max_items']), endpoint='limit')\n"
            "assert app.test_client().get('/').text == '50'"
        ),
    ),
    "flask-app": ("from flask import Flask\napp = Flask('shop')", ""),
    "flask-answers": (
        "",
        (
            "assert app.test_client().get('/checkout').text == 'At most 50 items'\n"
            "assert app.test_client().get('/in-a-thread').text == '50'\n"
            "assert app.test_client().get('/limits').text == '50\\n50\\n50\\n'\n"
            "pool.shutdown()"
        ),
    ),
    "flask-traced": (
        _PRINTED,
        (
            "assert app.test_client().get('/checkout').text == 'at most 50 items'\n"
            "from tests.support.waiting import wait_until\n"
            "wait_until(lambda: '\"veltrix.refresh\"' in sys.stdout.getvalue(), 20, reason='the first list is told')\n"
            "printed, sys.stdout = sys.stdout.getvalue(), sys.__stdout__\n"
            'assert \'"name": "GET /checkout"\' in printed, printed\n'
            "assert '\"veltrix.lookup.count\": 1' in printed, printed"
        ),
    ),
    "django": ("INSTALLED_APPS, MIDDLEWARE = [], []", _DJANGO_PROJECT),
    "django-view": ("", "assert answer(checkout) == 'at most 50 items, in EUR'"),
    "django-template": (
        "",
        (
            "from django.shortcuts import render\n"
            "from django.template import engines\n"
            "page = engines['django'].from_string(SHOWN)\n"
            "assert 'At most 50 items' in answer(lambda request: HttpResponse(page.render({}, request)))"
        ),
    ),
    "django-thread": ("", "assert answer(checkout_in_a_thread) == 'at most 50'"),
    "starlette": (
        _STARLETTE_APP,
        (
            "from starlette.testclient import TestClient\n"
            "with TestClient(app) as http: assert http.get('/limit').text == '50'"
        ),
    ),
    "fastapi": (
        "from fastapi import FastAPI\napp = FastAPI()",
        _FASTAPI_ANSWERS + "assert http.get('/checkout').json() == {'at most': 50}",
    ),
    "fastapi-fail": ("", _FASTAPI_ANSWERS + "assert http.get('/fail').json() == {'revision': 1}"),
    "fastapi-executor": ("", _FASTAPI_ANSWERS + "assert http.get('/executor').json() == 50"),
    "fastapi-websocket": (
        "",
        _FASTAPI_ANSWERS + "with http.websocket_connect('/limits') as socket:\n"
        "        socket.send_text('?')\n"
        "        assert socket.receive_json() == 50",
    ),
    "fastapi-sale": (
        "",
        _FASTAPI_ANSWERS + "assert http.post('/sale').json() == 80\n"
        "assert [each.kwargs['client'] for each in app.user_middleware] == [client]",
    ),
    "fastapi-layers": (
        "",
        _FASTAPI_ANSWERS + "assert http.get('/limit').json() == 80\n"
        "    assert http.get('/limit', headers={'X-Tenant': 'acme'}).json() == 500\n"
        "    assert http.get('/limit', headers={'X-Tenant': 'a/../b'}).status_code == 400",
    ),
    "fastapi-lazy": (
        "",
        _FASTAPI_ANSWERS + "assert http.get('/limit').json() == 50\n"
        "    assert http.get('/limit', headers={'X-Tenant': 'acme'}).json() == 500\n"
        "    assert http.get('/limit', headers={'X-Tenant': 'a/../b'}).status_code == 400\n"
        "    assert http.get('/zone').json() == 'eu'",
    ),
    "wsgi": (
        (
            "def app(environ, start_response):\n"
            "    start_response('200 OK', [('Content-Type', 'text/plain')])\n"
            "    return [str(environ['veltrix.view']['checkout/max_items']).encode()]"
        ),
        "from werkzeug.test import Client\nassert Client(app).get('/').text == '50'",
    ),
    "asgi": (
        (
            "async def app(scope, receive, send):\n"
            "    from starlette.responses import PlainTextResponse\n"
            "    limit = scope['state']['config']['checkout/max_items']\n"
            "    await PlainTextResponse(str(limit))(scope, receive, send)"
        ),
        "from starlette.testclient import TestClient\nassert TestClient(app).get('/').text == '50'",
    ),
    "example": (
        "",
        (
            "from fastapi.testclient import TestClient\n"
            "with TestClient(app) as http:\n"
            "    shown = http.get('/config').json()\n"
            "assert (shown['checkout/max_items'], shown['origin'] in {'etcd', 'redis'}) == (50, True)"
        ),
    ),
    "mirrored": (
        "",
        (
            "from tests.support.waiting import wait_until\n"
            "wait_until(lambda: client.mirror_state().position.revision == 4, 20, reason='the mirror has revision 4')"
        ),
    ),
    "tests": (
        "",
        "test_the_limit()\ntest_the_limit_again()\nTestTheLimit().test_of_the_class()\nTestTheLimit().test_of_its_own()",
    ),
    "fixtures": (
        "",
        (
            "import pathlib, pytest, shutil\n"
            "from veltrix_mw import ConfigClient\n"
            "here = pathlib.Path('test_page.py')\n"
            "here.write_text(SHOWN)\n"
            "assert pytest.main(['-q', '-p', 'no:cacheprovider', str(here)]) == 0"
        ),
    ),
}


# --- fences ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fence:
    """One fenced block; `line` is its first line of text, counted from 1; `mark` what a comment before it says."""

    language: str
    line: int
    text: str
    mark: str


def fences(page: Path) -> Iterator[Fence]:
    """The fenced blocks of a page, in order. A fence that is never closed is an error."""
    lines = page.read_text().splitlines()
    opened: tuple[str, str, int, str] | None = None
    mark = ""
    for number, line in enumerate(lines, start=1):
        fence = re.match(r"(`{3,})\s*(\S*)", line)
        if opened is None and fence:
            opened = fence[1], fence[2], number + 1, mark
        elif opened is not None and line.strip() == opened[0]:
            yield Fence(opened[1], opened[2], "\n".join(lines[opened[2] - 1 : number - 1]) + "\n", opened[3])
            opened, mark = None, ""
        elif opened is None and line.strip():
            marked = re.fullmatch(r"<!-- run: (\S+) -->", line.strip())
            mark = marked[1] if marked else ""
    assert opened is None, f"{page.name}:{opened[2]}: this fence is never closed" if opened else ""


# --- the page's process ---------------------------------------------------------------------------------------------


class Wrong(Exception):
    """A snippet does not do what the page says."""


class Output(io.TextIOWrapper):
    """What a command prints; a terminal, where a person would see it, or not."""

    def __init__(self, *, terminal: bool) -> None:
        self._printed = io.BytesIO()
        super().__init__(self._printed, encoding="utf-8", write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", self._printed.getvalue().decode())


class Shell:
    """Runs the commands of console blocks: ours for real (in this process), others are only known by name."""

    def __init__(self) -> None:
        self.exit_code = 0

    def run(self, block: str) -> None:
        for command, expected in _commands(block):
            printed = self._run(command)
            fails = any(line.startswith(("error:", "fail ")) for line in expected.splitlines())
            if (self.exit_code != 0) != fails and not command.startswith("echo"):
                raise Wrong(f"$ {command}\nended with {self.exit_code}:\n{printed}")
            if expected and printed is not None and not _alike(expected, printed):
                raise Wrong(f"$ {command}\nthe page shows\n{expected}\nit printed\n{printed}")

    def _run(self, command: str) -> str | None:
        """What the command printed; None if it was only looked at."""
        if command.split()[0] in {"etcdctl", "redis-cli"}:
            return self._server_tool(shlex.split(command))
        assigned = re.fullmatch(r"(\w+)=\$\((.*)\)", command)
        if assigned:
            os.environ[assigned[1]] = (self._veltrix(shlex.split(assigned[2])[1:]) or "").strip()
            return None
        words = shlex.split(os.path.expandvars(command.replace("$?", str(self.exit_code))), comments=True)
        if words[0] == "echo":
            return " ".join(words[1:]) + "\n"
        for word in words:
            if word.startswith("examples/") and not (ROOT / word).exists():
                raise Wrong(f"$ {command}\nthere is no {word}")
        self.exit_code = 0
        match words:
            case ["export", assignment]:
                name, _, value = assignment.partition("=")
                os.environ[name] = value
            case ["veltrix", *arguments, ">", file]:
                Path(file).write_text(self._veltrix(arguments) or "")
            case ["veltrix", *arguments]:
                return self._veltrix(arguments, terminal=True)
            case ["flask", "--app", _, "veltrix", *arguments] | ["python", "manage.py", "veltrix", *arguments]:
                _check_verb(arguments)
            case ["flask", "--app", _, "run", *_] | ["python", "manage.py", "check" | "runserver", *_] | ["pytest", *_]:
                pass
            case ["make", target, *_]:
                if not re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
                    raise Wrong(f"make has no target {target!r}")
            case ["pip", "install", *packages] | ["python", "-m", "pip", "install", *packages]:
                for package in packages:
                    _check_package(package)
            case ["python", "-m", "benchmarks", *_]:
                pass
            case ["python", file, *_] if file.startswith("examples/"):
                pass
            case [name, *_] if name in OTHERS:
                pass
            case _:
                raise Wrong(f"$ {command}\nnobody checks this command; see OTHERS in {Path(__file__).name}")
        return None

    def _server_tool(self, words: list[str]) -> str:
        name, *arguments = words
        if name == "redis-cli":
            arguments = ["-p", os.environ["DOCS_REDIS"].rpartition(":")[2], *arguments]
        done = subprocess.run([name, *arguments], capture_output=True, text=True, timeout=30, check=False)
        self.exit_code = done.returncode
        return done.stdout + done.stderr

    def _veltrix(self, arguments: list[str], *, terminal: bool = False) -> str | None:
        from veltrix_mw.cli import main

        if STAY & {*arguments}:
            _check_verb(arguments)
            return None  # they stay
        out = Output(terminal=terminal)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                main(arguments, prog_name="veltrix")
        except SystemExit as ended:
            self.exit_code = int(ended.code or 0)
        return out.text


def _commands(block: str) -> Iterator[tuple[str, str]]:
    """Each command of a console block, and the output that is shown below it."""
    command, output = "", ""
    for line in block.replace("\\\n", " ").splitlines(keepends=True):
        if line.startswith("$ "):
            if command:
                yield command, output
            command, output = line[2:].strip(), ""
        elif not command:
            raise Wrong(f"a console block begins with '$ ', not with {line!r}")
        else:
            output += line
    yield command, output


def _alike(expected: str, printed: str) -> bool:
    """Whether it is the same, whatever the time of day and however wide a table came out."""

    def told(text: str) -> str:
        text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}", "TIME", text)
        return re.sub("─+", "─", text)

    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(told(expected), told(printed), flags)


def _check_verb(arguments: list[str]) -> None:
    """That the CLI takes these arguments, without running them."""
    import click

    from veltrix_mw.cli import main

    at = next((at for at, word in enumerate(arguments) if word in main.commands), None)
    if at is None:
        raise Wrong(f"veltrix {shlex.join(arguments)}: there is no such verb")
    try:
        main.commands[arguments[at]].make_context(arguments[at], arguments[at + 1 :])
    except click.exceptions.Exit:
        pass  # --help
    except click.ClickException as exc:
        raise Wrong(f"veltrix {shlex.join(arguments)}: {exc.format_message()}") from exc


def _check_package(package: str) -> None:
    if package.startswith("opentelemetry-"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as exc:
            raise Wrong(f"pip install {package}: what the pages name is installed here, and this is not") from exc
        return
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.fullmatch(r"([\w-]+)(?:\[([\w,]+)\])?", package)
    if not found or found[1] != project["name"]:
        raise Wrong(f"pip install {package}: only OpenTelemetry's and {project['name']} are installed by name")
    for extra in (found[2] or "").split(",") if found[2] else ():
        if extra not in project["optional-dependencies"]:
            raise Wrong(f"pip install {package}: there is no extra {extra!r}")


def servers_of(page: Path) -> list[str]:
    """Which servers the page asks for."""
    found = re.search(r"^<!-- servers: ([\w ]+) -->$", page.read_text(), re.MULTILINE)
    return found[1].split() if found else []


def _on_servers(text: str) -> str:
    for server, names in HOSTS.items():
        for name in names:
            text = text.replace(name, os.environ.get(f"DOCS_{server.upper()}", name))
    return text


def run_page(page: Path) -> None:
    """Run every snippet of the page in the working directory; raises at the first that fails."""
    shell = Shell()
    module = sys.modules["page"] = ModuleType("page")  # where models' annotations are looked up
    module.__dict__.update(sys=sys, os=os)

    def execute(code: str, line: int, name: str) -> None:
        exec(compile("\n" * (line - 1) + code, name, "exec"), module.__dict__)

    for written in fences(page):
        fence = replace(written, text=_on_servers(written.text))
        try:
            if fence.language == "console":
                shell.run(fence.text)
            elif fence.language == "python" or fence.mark:
                before, after = AROUND[fence.mark] if fence.mark else ("", "")
                module.__dict__["SHOWN"] = fence.text
                execute(before, 1, f"before {fence.mark}")
                if fence.language == "python":
                    execute(fence.text, fence.line, str(page))
                execute(after, 1, f"after {fence.mark}")
        except BaseException as exc:
            told = str(exc) if isinstance(exc, Wrong) else traceback.format_exc()
            sys.stderr.write(f"{page.relative_to(ROOT)}:{fence.line}:\n{told}\n")
            sys.stderr.flush()
            os._exit(1)


# --- the tests ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(servers: list[str]) -> Iterator[dict[str, str]]:
    """The servers for the length of the block, and what a page's process finds them by."""
    environ: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        if "etcd" in servers:
            member = stack.enter_context(etcd(options=["--bcrypt-cost", "4"])).members[0]
            environ["DOCS_ETCD"] = environ["ETCDCTL_ENDPOINTS"] = f"127.0.0.1:{member.port}"
            environ["ETCDCTL_API"] = "3"
        if "redis" in servers:
            environ["DOCS_REDIS"] = f"127.0.0.1:{stack.enter_context(redis_server()).port}"
        yield environ


RUNNABLE: Final = [page for page in PAGES if any(fence.language in RUN for fence in fences(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_every_snippet_of_the_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("VELTRIX_", "DJANGO_"))}
    environ |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "VELTRIX_URL": URL,
        "USER": "ada",
        "COLUMNS": "100",
        "TZ": "UTC",
    }
    with running(servers_of(page)) as of_servers:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "tests.test_docs", str(page)],
            cwd=tmp_path,
            env=environ | of_servers,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
    assert done.returncode == 0, done.stderr


def test_every_fence_is_of_a_language_that_is_run_or_only_shown() -> None:
    for page in PAGES:
        for fence in fences(page):
            is_directive = fence.language.startswith("{")
            assert is_directive or fence.language in RUN | SHOWN, f"{page.name}:{fence.line}: {fence.language!r}"


def test_every_mark_has_its_pair_and_every_pair_its_mark() -> None:
    marks = {fence.mark for page in PAGES for fence in fences(page)} - {""}
    assert marks == AROUND.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()) + re.findall(
        r'src="([^"]+)"', page.read_text()
    ):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = {
        name.strip().rpartition("<")[2].rstrip(">")
        for fence in fences(ROOT / "docs" / "index.md")
        if fence.language == "{toctree}"
        for name in fence.text.splitlines()
        if name.strip() and not name.startswith(":")
    }
    assert listed == {page.stem for page in PAGES if page.parent.name == "docs"} - {"index"}


@pytest.mark.parametrize(
    "name",
    [
        "veltrix_mw",
        "veltrix_mw.asgi",
        "veltrix_mw.wsgi",
        "veltrix_mw.coalesce",
        "veltrix_mw.leases",
        "veltrix_mw.testing",
        "flask_veltrix",
        "django_veltrix",
        "starlette_veltrix",
        "veltrix_mw.diagnosis",
    ],
)
def test_the_api_page_names_every_public_name(name: str) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    module = importlib.import_module(name) if name != "django_veltrix" else None
    public: Any = module.__all__ if module else re.findall(r'"(\w+)"', _all_of("integrations/django_veltrix"))
    for public_name in public:
        assert re.search(rf"\b{re.escape(public_name)}\b", page), f"{name}.{public_name} is not in docs/api.md"


def _all_of(package: str) -> str:
    """`__all__` as written: importing Django's package here would read settings that are other tests'."""
    found = re.search(r"__all__ = (\[.*?\])", (ROOT / package / "__init__.py").read_text(), re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize("name", ["README.md", "docs/bare.md", "docs/layers.md", "docs/starlette.md"])
def test_a_client_that_a_snippet_makes_for_an_app_is_given_to_the_middleware(name: str) -> None:
    made = [fence.text for fence in fences(ROOT / name) if fence.mark and "ConfigClient(" in fence.text]
    assert made
    for text in made:
        assert "client=client" in text or "client=ConfigClient()" in text, text


@pytest.mark.parametrize("name", ["README.md", "docs/django.md", "docs/servers.md", "docs/starlette.md"])
def test_a_page_that_starts_a_server_says_that_no_extra_brings_one(name: str) -> None:
    assert re.search(r"(?i)no extra\b.{0,30}\sbrings", (ROOT / name).read_text())


def test_the_errors_page_says_what_to_do_about_each_error() -> None:
    from veltrix_mw import errors

    page = (ROOT / "docs" / "errors.md").read_text()
    for name in errors.__all__:
        assert f"| `{name}`" in page, f"docs/errors.md says nothing of {name}"


def _told_events() -> dict[str, tuple[set[str], set[str]]]:
    """Each event that the sources tell: the levels that are written there, and its fields."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for source in [*(ROOT / "src").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]:
        for call in ast.walk(ast.parse(source.read_text())):
            match call:
                case ast.Call(
                    func=ast.Attribute(attr="_notice" | "tell" | "tell_end" | "_report" as how),
                    args=[ast.Constant(value=str(event)), *more],
                ) if event.startswith("veltrix."):
                    levels, fields = found.setdefault(event, (set(), set()))
                    fields.update(word.arg for word in call.keywords if word.arg not in {None, "once", "about"})
                    if how == "tell_end":
                        levels.add("info")
                    elif how == "_report":  # of the last-known-good file, which has one way to say what is wrong
                        levels.add("warning")
                        fields.add("reason")
                    else:
                        levels.update(re.findall(r"\b(info|warning|error)\b", ast.unparse(more[0]).lower()))
    return found


def _table_of_events() -> dict[str, list[tuple[set[str], set[str], set[str]]]]:
    """Each event that docs/operations.md names: levels, fields and what it is over with, of each of its rows."""
    page = (ROOT / "docs" / "operations.md").read_text()
    found: dict[str, list[tuple[set[str], set[str], set[str]]]] = {}
    for row in re.findall(r"^\| `(veltrix\.\w+)` \| (.*?) \| (.*?) \| (.*?) \| ", page, re.MULTILINE):
        event, levels, fields, ends = row
        quoted = [set(re.findall(r"`([\w.]+)`", cell)) for cell in (fields, ends)]
        found.setdefault(event, []).append((set(levels.split(", ")), quoted[0], quoted[1]))
    return found


def test_the_operations_page_names_every_event_that_is_logged_with_its_levels_and_fields() -> None:
    told, table = _told_events(), _table_of_events()
    assert told.keys() == table.keys()
    for event, (levels, fields) in told.items():
        assert fields == set().union(*(row[1] for row in table[event])), event
        if event != "veltrix.failover":  # decided where it is told
            assert levels == set().union(*(row[0] for row in table[event])), event


def test_the_operations_page_says_which_event_ends_which() -> None:
    from veltrix_mw.events import ENDS

    told = {(end, event) for event, rows in _table_of_events().items() for _, _, ends in rows for end in ends}
    assert told == {(end, fault) for end, faults in ENDS.items() for fault in faults}


def test_every_event_is_told_by_the_one_module() -> None:
    own = {"events.py"}  # and the CLI has handlers to set up, for what it shows of the log
    for source in [*(ROOT / "src" / "veltrix_mw").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")]:
        if source.name not in own and "cli" not in source.parts:
            assert "getLogger" not in source.read_text(), source


def test_the_telemetry_page_names_every_span_and_metric() -> None:
    sources = [(ROOT / "src" / "veltrix_mw" / name).read_text() for name in ("telemetry.py", "instruments.py")]
    told = set(re.findall(r'"(veltrix\.[\w.]+)"', "".join(sources)))
    assert {"veltrix.fetch", "veltrix.lookup.duration", "veltrix.snapshot.age"} <= told
    page = (ROOT / "docs" / "telemetry.md").read_text()
    assert told - {name for name in told if f"`{name}`" in page} == set()


def test_the_writing_page_has_the_exit_codes_of_the_cli() -> None:
    from veltrix_mw.cli.failure import EXIT_CODES

    page = (ROOT / "docs" / "writing.md").read_text()
    in_help = {(code, text.strip()) for code, text in re.findall(r"^ +(\d+) +(.+)$", EXIT_CODES, re.MULTILINE)}
    in_page = set(re.findall(r"^\| (\d+) \| (.+?) \|$", page, re.MULTILINE))
    assert in_help <= in_page


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))
