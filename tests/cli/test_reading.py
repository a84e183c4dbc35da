"""`get`, `list`, `history`, `status`."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from tests.cli.conftest import Shell
from tests.support.etcd_servers import etcd
from tests.support.redis_servers import redis_server

Put = Callable[[str, Any], int]


def break_value(shell: Shell, key: str) -> None:
    """What another program might have stored."""
    with sqlite3.connect(shell.folder / "c.db") as db:
        db.execute("UPDATE versions SET value = ? WHERE key = ?", (b"{broken", key))
    db.close()


@pytest.mark.parametrize("value", [80, "blue", None, True, 1.5, "", [1, [2]], {"a": {"b": None}}, "ß…"])
def test_get_prints_the_value_as_json(shell: Shell, put: Put, value: Any) -> None:
    put("k", value)
    assert shell.run("get", "k").json == value
    assert shell.run("get", "k", "--json").json == {"key": "k", "value": value, "mod_revision": 1}


def test_get_raw_prints_strings_bare_and_all_else_as_json(shell: Shell, put: Put) -> None:
    put("text", "two words\nand a line")
    put("object", {"a": "b"})
    assert shell.ok("get", "--raw", "text") == "two words\nand a line"
    assert shell.ok("get", "--raw", "object") == '{"a":"b"}'


def test_get_reads_the_past(shell: Shell, put: Put) -> None:
    first = put("k", 1)
    put("k", 2)
    put("other", 1)
    assert shell.ok("get", "k", "--revision", str(first)) == "1"
    assert shell.run("get", "other", "--revision", str(first)).code == 1


def test_a_missing_key_and_a_revision_that_is_none_are_not_found(shell: Shell, put: Put) -> None:
    put("k", 1)
    for arguments, named in [
        (["get", "nope"], "'nope' does not exist"),
        (["get", "k", "--revision", "99"], "no revision 99"),
        (["list", "--revision", "99"], "no revision 99"),
        (["export", "--revision", "99"], "no revision 99"),
        (["history", "nope"], "'nope'"),
    ]:
        done = shell.run(*arguments)
        assert done.code == 1, arguments
        assert named in done.err
        assert done.out == ""


def test_list_shows_key_value_and_revision_parted_by_tabs(shell: Shell, put: Put) -> None:
    put("b/x", "a\tb")
    put("a", 1)
    assert shell.ok("list") == 'a\t1\t2\nb/x\t"a\\tb"\t1'
    assert shell.run("list", "--json").json == {
        "a": {"value": 1, "mod_revision": 2},
        "b/x": {"value": "a\tb", "mod_revision": 1},
    }
    assert shell.ok("list", "--keys") == "a\nb/x"
    assert shell.run("list", "--keys", "--json").json == ["a", "b/x"]
    assert shell.ok("list", "--revision", "1", "--keys") == "b/x"


def test_a_prefix_is_the_key_and_all_below_it_or_with_a_slash_only_what_is_below(shell: Shell, put: Put) -> None:
    for key in ("a", "a/b", "a/b/c", "ab"):
        put(key, 1)
    assert shell.ok("list", "--keys", "a").split() == ["a", "a/b", "a/b/c"]
    assert shell.ok("list", "--keys", "a/").split() == ["a/b", "a/b/c"]
    assert shell.ok("list", "--keys", "c") == ""
    assert shell.run("list", "c", "--json").json == {}


def test_list_says_what_it_leaves_out_because_it_is_no_json(shell: Shell, put: Put) -> None:
    put("bad", 1)
    put("good", 1)
    break_value(shell, "bad")
    done = shell.run("list", "--keys")
    assert (done.code, done.out) == (0, "good\n")
    assert "'bad'" in done.err
    assert "broken" not in done.err


def test_history_tells_who_wrote_what_and_why_newest_first(shell: Shell) -> None:
    shell.ok("put", "k", "1", "--author", "ben", "--reason", "a sale")
    shell.ok("put", "k", "2")
    shell.ok("delete", "k")
    versions = shell.run("history", "k", "--json").json
    assert [(one["revision"], one["deleted"], one.get("value"), one["author"]) for one in versions] == [
        (3, True, None, "ana"),
        (2, False, 2, "ana"),
        (1, False, 1, "ben"),
    ]
    assert versions[2]["reason"] == "a sale"
    assert "value" not in versions[0]
    lines = [line.split("\t") for line in shell.ok("history", "k").splitlines()]
    assert [(line[0], line[2], line[4]) for line in lines] == [
        ("3", "ana", "(deleted)"),
        ("2", "ana", "2"),
        ("1", "ben", "1"),
    ]
    assert shell.ok("history", "k", "--limit", "1").startswith("3\t")


def test_what_others_wrote_cannot_drive_a_terminal(shell: Shell) -> None:
    shell.ok("put", "k", '"\\u009b31m\\u202e"', "--author", "\x1b[31m", "--reason", "a\nb")
    line = shell.ok("history", "k")
    assert not any(char in line for char in "\x1b\x9b\u202e\n")
    assert shell.run("get", "k").json == "\x9b31m\u202e"


def test_status_tells_where_the_authority_stands(shell: Shell, put: Put) -> None:
    put("a", 1)
    put("bad", 1)
    break_value(shell, "bad")
    status = shell.run("status", "--json").json
    assert (status["ready"], status["revision"], status["entries"], status["namespace"]) == (True, 2, 2, "default")
    assert list(status["rejected"]) == ["bad"]
    assert len(status["incarnation"]) == 16
    (tier,) = status["tiers"]
    assert (tier["name"], tier["role"], tier["state"], tier["url"]) == ("sqlite", "authority", "reachable", shell.url)
    text = shell.ok("status")
    assert "reachable" in text
    assert shell.url in text


def test_status_of_a_store_that_nobody_wrote_yet_is_told_and_fails(shell: Shell) -> None:
    done = shell.run("status", "--json")
    assert done.code == 5
    assert done.json["ready"] is False
    assert done.json["tiers"][0]["state"] == "never written"
    assert done.error["type"] == "NeverWritten"
    assert "never written" in shell.run("status").out


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_a_table_that_fits_with_keys_whole_and_values_cut(shell: Shell, put: Put, width: int) -> None:
    put("checkout/a-key-that-is-rather-long/but-shown", {"text": "x" * 500})
    with shell.running("list", terminal=True, width=width) as listing:
        assert listing.code() == 0
        lines = listing.text.splitlines()
    assert all(len(line) <= width for line in lines)
    assert lines[0].split() == ["key", "value", "revision"]
    row = lines[2]
    assert row.startswith("checkout/a-key-that-is-rather-long/but-s")
    assert "…" in row
    assert row.rstrip().endswith("1")


def test_a_terminal_gets_values_in_lines(shell: Shell, put: Put) -> None:
    put("k", {"a": 1, "b": 2})
    with shell.running("get", "k", terminal=True) as getting:
        assert getting.code() == 0
        assert getting.text.splitlines() == ["{", '  "a": 1,', '  "b": 2', "}"]


def test_reading_starts_no_thread(shell: Shell, put: Put) -> None:
    put("k", 1)
    code = (
        "import sys, threading\n"
        "threading.Thread.start = lambda thread: sys.exit(f'started {thread.name}')\n"
        "from veltrix_mw.cli import main; main()"
    )
    for verb in (["get", "k"], ["list"], ["history", "k"], ["status"], ["export"], ["put", "k", "2"]):
        done = shell.process(*verb, command=("-c", code))
        assert done.code == 0, done


@pytest.mark.parametrize("verb", ["list", "watch", "export"])
def test_a_prefix_that_none_can_be_is_refused(shell: Shell, put: Put, verb: str) -> None:
    put("a", 1)
    done = shell.run(verb, "bad key")
    assert done.code == 4
    assert "is no prefix" in done.err


def mistyped(kind: str, shell: Shell, put: Put, stack: ExitStack) -> str:
    """A store of that kind, which answers, in a namespace that nobody wrote to."""
    match kind:
        case "etcd":
            ((host, port),) = stack.enter_context(etcd()).hosts
            return f"etcd://{host}:{port}/shpo"
        case "redis":
            return f"redis://127.0.0.1:{stack.enter_context(redis_server()).port}/0?namespace=shpo"
        case _:
            put("k", 1)  # in the namespace `default`
            return f"{shell.url}?namespace=shpo"


@pytest.mark.parametrize("kind", ["sqlite", "redis", "etcd"])
def test_a_namespace_that_nobody_wrote_to_is_told(shell: Shell, put: Put, kind: str) -> None:
    with ExitStack() as stack:
        shell.store = mistyped(kind, shell, put, stack)
        told_unwritten(shell, put)


def told_unwritten(shell: Shell, put: Put) -> None:
    asked = shell.run("get", "k")
    assert asked.code == 1
    assert "'k' does not exist; nothing was ever written to the namespace 'shpo' at " in asked.err
    assert asked.err.endswith("check the namespace; the first write creates it\n")
    done = shell.run("status", "--json")
    assert (done.code, done.json["ready"], done.json["incarnation"]) == (0, True, "")
    assert done.err == f"warning: {done.json['unwritten']}\n"
    put("other", 1)
    assert "veltrix list shows the keys there are" in shell.run("get", "k").err
    done = shell.run("status", "--json")
    assert (done.err, done.json["unwritten"]) == ("", "")


def break_newest(shell: Shell, key: str) -> None:
    """What another program might have stored last."""
    with sqlite3.connect(shell.folder / "c.db") as db:
        newest = "SELECT max(revision) FROM versions WHERE key = ?"
        db.execute(f"UPDATE versions SET value = ? WHERE key = ? AND revision = ({newest})", (b"{broken", key, key))
    db.close()


def test_get_of_a_value_that_is_none_says_what_workers_go_on_with(shell: Shell, put: Put) -> None:
    put("k", "good")
    put("k", 2)
    break_newest(shell, "k")
    done = shell.run("get", "k")
    assert (done.code, done.out) == (4, "")
    assert "workers go on with its value of revision 1 (veltrix get k --revision 1); write a good one" in done.err
    assert "good" not in done.err.replace("a good one", "")
    assert shell.run("get", "k", "--revision", "1").json == "good"
    with shell.client() as client:
        client.wait_ready(30)
        assert client.view()["k"] == "good"


@pytest.mark.parametrize(
    ("deleted", "said"),
    [(True, "workers go on without it, as it was deleted in revision 2"), (False, "one that never had a good value")],
)
def test_get_of_a_value_that_is_none_with_nothing_before_it(shell: Shell, put: Put, deleted: bool, said: str) -> None:
    if deleted:
        put("k", 1)
        shell.ok("delete", "k")
    put("k", 3)
    break_newest(shell, "k")
    assert said in shell.run("get", "k").err
    assert "workers" not in shell.run("get", "k", "--revision", "3" if deleted else "1").err
