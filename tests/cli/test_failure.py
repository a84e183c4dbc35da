"""Exit codes, error lines, and what the command is where its extra is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import click
import pytest

from tests.cli.conftest import Shell
from veltrix_mw import (
    AuthFailed,
    Compacted,
    Conflict,
    Entry,
    InvalidKey,
    InvalidValue,
    KeyMissing,
    NotReady,
    Overloaded,
    SettingsError,
    StoreError,
    StoreUnavailable,
)
from veltrix_mw import cli as package
from veltrix_mw.cli import failure, main, session

Put = Callable[[str, Any], int]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyMissing("x"), 1),
        (Compacted("x"), 1),
        (SettingsError("x"), 2),
        (StoreError("x"), 2),
        (click.UsageError("x"), 2),
        (Conflict("x", key="k", current=Entry(None, 1)), 3),
        (InvalidKey("x"), 4),
        (InvalidValue("x"), 4),
        (StoreUnavailable("x"), 5),
        (Overloaded("x"), 5),
        (NotReady("x"), 5),
        (AuthFailed("x"), 6),
        (RuntimeError("x"), 70),
        (click.Abort(), 130),
    ],
)
def test_each_error_has_its_exit_code(error: Exception, code: int) -> None:
    assert failure.exit_code(error) == code


def test_the_help_and_the_docstring_name_the_exit_codes(shell: Shell) -> None:
    text = shell.ok("--help")
    assert shell.ok() == text
    assert package.__doc__ is not None
    for code in range(7):
        assert f"    {code}  " in text
        assert f" {code} " in package.__doc__


@pytest.mark.parametrize("verb", sorted(main.commands))
def test_every_verb_explains_itself_and_answers_in_json(shell: Shell, verb: str) -> None:
    assert "--json" in shell.ok(verb, "--help")


def test_the_verbs_are_those_that_were_promised() -> None:
    promised = "get put delete list watch history rollback import export status relay demo"
    assert set(promised.split()) <= set(main.commands)


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["get"], 2, "UsageError"),
        (["bogus"], 2, "UsageError"),
        (["get", "k", "--bogus"], 2, "UsageError"),
        (["get", "k", "--revision", "-1"], 2, "UsageError"),
        (["get", "nope"], 1, "KeyMissing"),
        (["get", "k", "--revision", "9"], 1, "NoSuchRevision"),
        (["get", "not a key"], 4, "InvalidKey"),
        (["put", "k", "blue"], 4, "InvalidValue"),
        (["put", "k", "1", "--expected", "9"], 3, "Conflict"),
        (["--url", "postgres://h", "get", "k"], 2, "SettingsError"),
        (["--url", "memory://", "get", "k"], 2, "SettingsError"),
        (["--url", "sqlite:////no/such/folder/c.db", "put", "k", "1"], 2, "StoreError"),
        (["--url", "sqlite:////no/such/folder/c.db", "get", "k"], 5, "NeverWritten"),
    ],
)
def test_an_error_is_one_line_or_one_object_on_stderr(
    shell: Shell, put: Put, arguments: list[str], code: int, kind: str
) -> None:
    put("k", 1)
    plain = shell.run(*arguments)
    assert (plain.code, plain.out) == (code, "")
    assert plain.err.startswith("error: ")
    assert len(plain.err.splitlines()) == 1
    told = shell.run(*arguments, "--json")
    assert (told.code, told.out) == (code, "")
    assert told.error["type"] == kind
    assert set(told.error) == {"type", "message"}


def test_a_file_that_is_no_database_is_told(shell: Shell) -> None:
    (shell.folder / "c.db").write_text("this is a text file, and no database at all; " * 100)
    done = shell.process("get", "k")
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1


def test_no_store_named_is_told_with_the_embedded_form(shell: Shell) -> None:
    shell.environ["VELTRIX_URL"] = ""
    done = shell.process("get", "k")
    assert done.code == 2
    assert "sqlite:///config.db" in done.err


def test_a_fault_of_ours_is_a_line_without_a_value(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("s3cret")

    monkeypatch.setattr(session, "ConfigClient", fail)
    done = shell.run("get", "k")
    assert done.code == 70
    assert "s3cret" not in done.err
    assert "RuntimeError at test_failure.py:" in done.err


def test_options_before_and_after_the_verb_count_and_the_later_wins(shell: Shell) -> None:
    shell.ok("--namespace", "one", "put", "k", "1")
    shell.ok("put", "k", "2", "--namespace", "two")
    assert shell.ok("--namespace", "two", "get", "k", "--namespace", "one") == "1"
    assert shell.run("--json", "--namespace", "two", "get", "k").json["value"] == 2
    elsewhere = f"sqlite:///{shell.folder}/other.db"
    shell.ok("put", "k", "3", "--url", elsewhere)
    assert shell.ok("--url", elsewhere, "get", "k") == "3"
    assert shell.ok("--url", shell.url, "get", "k", "--url", elsewhere) == "3"


def test_the_version_is_told(shell: Shell) -> None:
    assert shell.ok("--version").startswith("veltrix ")


def test_stdout_holds_the_answer_alone_and_stderr_the_rest(shell: Shell) -> None:
    assert shell.process("put", "k", '"ß"').out == "1\n"
    got = shell.process("get", "k")
    assert (got.code, got.out, got.err) == (0, '"ß"\n', "")
    failed = shell.process("get", "nope")
    assert (failed.code, failed.out) == (1, "")
    assert "Traceback" not in failed.err


def test_an_output_that_cannot_carry_a_letter_gets_its_escape(shell: Shell, put: Put) -> None:
    put("k", "ß…")
    shell.environ["PYTHONIOENCODING"] = "ascii"
    done = shell.process("get", "k")
    assert (done.code, json.loads(done.out)) == (0, "ß…")


def test_a_reader_that_goes_away_is_no_error_message(shell: Shell, put: Put) -> None:
    for key in "abcdefgh":
        put(key, "x" * 1_000_000)  # together more than any pipe holds
    process = subprocess.Popen(
        [sys.executable, "-m", "veltrix_mw.cli", "list"],
        env=shell.process_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(30), errors) == (141, b"")


@pytest.mark.parametrize("lacking", ["click", "rich"])
def test_without_the_extra_importing_works_and_running_says_what_to_install(shell: Shell, lacking: str) -> None:
    code = f"import sys; sys.modules[{lacking!r}] = None\nfrom veltrix_mw.cli import main; print('imported'); main()"
    done = shell.process("get", "k", command=("-c", code))
    assert (done.code, done.out) == (2, "imported\n")
    assert done.err == f'error: the command line needs {lacking}: pip install "veltrix-mw[cli]"\n'


def test_a_one_shot_verb_loads_neither_rich_nor_asyncio(shell: Shell, put: Put) -> None:
    put("k", 1)
    code = (
        "import sys\nfrom veltrix_mw.cli import main\n"
        "main(standalone_mode=False)\n"
        "late = {'rich.console', 'rich.table', 'asyncio', 'uvicorn', 'http.client'}\n"
        "sys.exit(','.join(sorted(late & {*sys.modules})))"
    )
    done = shell.process("get", "k", command=("-c", code))
    assert (done.out, done.err) == ("1\n", "\n")
