"""`put`, `delete`, `rollback`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.cli.conftest import Shell
from veltrix_mw import ConfigClient

Put = Callable[[str, Any], int]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("80", 80),
        ("-5", -5),
        ("-1.5e3", -1500.0),
        ("null", None),
        ('"blue"', "blue"),
        ('{"a": [1, 2]}', {"a": (1, 2)}),
    ],
)
def test_put_takes_json_and_prints_the_revision(shell: Shell, text: str, value: Any) -> None:
    assert shell.ok("put", "k", text) == "1"
    assert shell.run("put", "k", text, "--json").json == {"revision": 2}
    with shell.client() as client:
        assert client.read(["k"])["k"].value == value


@pytest.mark.parametrize("text", ["blue", "{a: 1}", "'x'", "", "1 2"])
def test_put_shows_how_to_quote_what_is_not_json_and_writes_nothing(shell: Shell, text: str) -> None:
    done = shell.run("put", "k", text)
    assert (done.code, done.out) == (4, "")
    assert "'\"blue\"'" in done.err
    assert "--text KEY" in done.err
    assert shell.run("get", "k").code == 5  # there is no file even


@pytest.mark.parametrize(("spelled", "meant"), [("True", "true"), ("False", "false"), ("None", "null")])
def test_what_python_calls_it_is_told_as_json_writes_it(shell: Shell, spelled: str, meant: str) -> None:
    done = shell.run("put", "k", spelled)
    assert done.code == 4
    assert done.err.endswith(f"in JSON it is written {meant}\n")
    assert "--text" not in done.err


@pytest.mark.parametrize("text", ["NaN", "-Infinity", '{"a":1,"a":2}', "1e999", '"\\ud800"', "[" * 100 + "]" * 100])
def test_put_refuses_what_a_store_would_not_give_back(shell: Shell, text: str) -> None:
    done = shell.run("put", "k", "--file", "-", stdin=text)
    assert done.code == 4, done
    assert len(done.err.splitlines()) == 1


def test_a_value_beyond_the_limit_is_refused(shell: Shell) -> None:
    done = shell.run("put", "k", "--text", "-", stdin="x" * (1024 * 1024 + 1))
    assert done.code == 4
    assert "1048576" in done.err


def test_text_is_taken_as_it_is(shell: Shell) -> None:
    for text in ("blue", "80", '{"a"', "two\nlines\n"):
        shell.ok("put", "--text", "k", text)
        assert shell.run("get", "k").json == text
    shell.ok("put", "--text", "k", "-", stdin="from stdin\n")
    assert shell.run("get", "k").json == "from stdin\n"
    assert shell.run("put", "--text", "k", "-", stdin=b"\xff").code == 4


def test_a_value_may_come_from_stdin_or_a_file(shell: Shell) -> None:
    shell.ok("put", "k", "-", stdin='{"a": 1}\n')
    assert shell.run("get", "k").json == {"a": 1}
    (shell.folder / "v.json").write_text("[1]")
    shell.ok("put", "k", "--file", str(shell.folder / "v.json"))
    assert shell.run("get", "k").json == [1]
    missing = shell.run("put", "k", "--file", str(shell.folder / "nope"))
    assert missing.code == 2
    assert "nope" in missing.err


@pytest.mark.parametrize("arguments", [["k"], ["k", "1", "--file", "x"], ["k", "1", "2"], ["k", "1", "--expcted", "3"]])
def test_a_value_is_given_once_and_options_are_known(shell: Shell, arguments: list[str]) -> None:
    assert shell.run("put", *arguments).code == 2


def test_expected_is_compare_and_set(shell: Shell) -> None:
    assert shell.ok("put", "k", "1", "--expected", "0") == "1"
    for stale in ("0", "7"):
        done = shell.run("put", "k", "2", "--expected", stale)
        assert done.code == 3
        assert "expecting 1" in done.err
    assert shell.run("delete", "k", "--expected", "7").code == 3
    assert shell.ok("put", "k", "2", "--expected", "1") == "2"
    assert shell.ok("delete", "k", "--expected", "2") == "3"


def test_delete_tells_an_absent_key_unless_it_may_be_missing(shell: Shell, put: Put) -> None:
    put("k", 1)
    assert shell.ok("delete", "k") == "2"
    assert shell.run("delete", "k").code == 1
    done = shell.run("delete", "k", "--missing-ok")
    assert (done.code, done.out) == (0, "")
    assert shell.run("delete", "k", "--missing-ok", "--json").json == {"revision": None}


def test_rollback_shows_what_changes_and_writes_a_new_revision(shell: Shell, put: Put) -> None:
    put("kept", 1)
    then = put("changed", 1)
    put("changed", 2)
    put("added", 1)
    with shell.client() as client:
        client.delete("kept")
    done = shell.run("rollback", str(then), "--yes")
    assert done.code == 0
    assert done.out.splitlines() == ["added\t1 → (absent)", "changed\t2 → 1", "kept\t(absent) → 1", "6"]
    assert shell.run("export").json == {"changed": 1, "kept": 1}
    again = shell.run("rollback", str(then), "--yes", "--json").json
    assert again == {"revision": 6, "changes": []}


def test_a_value_of_another_json_type_is_a_change_though_python_calls_it_equal(shell: Shell, put: Put) -> None:
    put("k", True)
    put("k", 1)
    done = shell.run("rollback", "1", "--yes", "--json")
    assert done.json["changes"] == [{"key": "k", "old": 1, "new": True}]


def test_rollback_without_a_terminal_wants_yes(shell: Shell, put: Put) -> None:
    put("k", 1)
    put("k", 2)
    done = shell.run("rollback", "1")
    assert done.code == 2
    assert "--yes" in done.err
    assert shell.ok("get", "k") == "2"


@pytest.mark.parametrize(("answer", "code", "value"), [("y\n", 0, "1"), ("n\n", 1, "2"), ("\n", 1, "2")])
def test_rollback_asks_on_a_terminal(shell: Shell, put: Put, answer: str, code: int, value: str) -> None:
    put("k", 1)
    put("k", 2)
    with shell.running("rollback", "1", terminal=True) as asking:
        asking.until("[y/N]")
        assert "k  2 → 1" in asking.text
        asking.type(answer)
        assert asking.code() == code
    assert shell.ok("get", "k") == value


def test_rollback_is_a_conflict_when_someone_wrote_while_the_question_stood(shell: Shell, put: Put) -> None:
    put("k", 1)
    put("k", 2)
    with shell.running("rollback", "1", terminal=True) as asking:
        asking.until("[y/N]")
        put("k", 3)
        asking.type("y\n")
        assert asking.code() == 3
    assert shell.ok("get", "k") == "3"


def test_a_revision_that_was_trimmed_is_not_found(shell: Shell) -> None:
    client = ConfigClient(f"{shell.url}?keep_revisions=2")
    for number in range(5):
        client.put("k", number)
    client.close()
    for verb in (["rollback", "1", "--yes"], ["get", "k", "--revision", "1"], ["export", "--revision", "1"]):
        done = shell.run(*verb)
        assert done.code == 1, verb
        assert "no longer kept" in done.err


def test_a_write_names_its_author_by_default_the_user(shell: Shell) -> None:
    shell.ok("put", "k", "1")
    shell.ok("put", "k", "2", "--author", "")
    with shell.client() as client:
        assert [version.author for version in client.history("k")] == ["", "ana"]
