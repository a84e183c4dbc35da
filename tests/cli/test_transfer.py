"""`export` and `import`."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cli.conftest import Shell
from tests.cli.test_reading import break_value
from veltrix_mw import ConfigClient, StoreUnavailable
from veltrix_mw.cli import transfer

Put = Callable[[str, Any], int]

KEYS = st.from_regex(r"[A-Za-z0-9_~:@-]{1,6}(/[A-Za-z0-9_~:@-]{1,6}){0,2}", fullmatch=True)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=6,
)


def test_import_creates_the_store_and_is_one_revision(shell: Shell) -> None:
    done = shell.run("import", "-", stdin='{"a": 1, "b/c": {"d": [true, null]}}')
    assert (done.code, done.out) == (0, "1\n")
    assert shell.run("export").json == {"a": 1, "b/c": {"d": [True, None]}}
    with shell.client() as client:
        assert client.history("a")[0].author == "ana"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=5))
def test_what_export_writes_import_takes_without_loss(tmp_path_factory: pytest.TempPathFactory, values: Any) -> None:
    one, other = Shell(tmp_path_factory.mktemp("one")), Shell(tmp_path_factory.mktemp("other"))
    one.ok("import", "-", stdin=json.dumps(values))
    other.ok("import", "-", stdin=one.ok("export"))
    assert other.ok("export") == one.ok("export")
    # As text: Python holds 1, 1.0 and true for equal.
    assert json.dumps(other.run("export").json, sort_keys=True) == json.dumps(values, sort_keys=True)


def test_import_writes_only_what_differs(shell: Shell, put: Put) -> None:
    put("same", {"a": 1, "b": 2})
    put("other", 1)
    done = shell.run("import", "-", "--json", stdin='{"same": {"b": 2, "a": 1}, "other": 1.0, "new": null}')
    assert done.json == {
        "revision": 3,
        "changes": [{"key": "new", "new": None}, {"key": "other", "old": 1, "new": 1.0}],
    }
    again = shell.run("import", "-", stdin='{"other": 1.0}')
    assert again.out == "3\n"
    assert "0 keys" in again.err


def test_a_dry_run_shows_what_would_change_and_writes_nothing(shell: Shell, put: Put) -> None:
    put("a", 1)
    put("b", 1)
    done = shell.run("import", "-", "--dry-run", "--replace", stdin='{"a": 2, "c": 3}')
    assert done.out.splitlines() == ["a\t1 → 2", "b\t1 → (absent)", "c\t(absent) → 3"]
    assert "nothing was written" in done.err
    assert shell.run("import", "-", "--dry-run", "--json", stdin='{"a": 2}').json["revision"] is None
    assert shell.run("status", "--json").json["revision"] == 2


def test_replace_deletes_what_the_file_does_not_have_below_the_prefix(shell: Shell, put: Put) -> None:
    for key in ("a/x", "a/y", "b"):
        put(key, 1)
    shell.ok("import", "-", "--replace", "--prefix", "a/", stdin='{"a/x": 2}')
    assert shell.run("export").json == {"a/x": 2, "b": 1}
    shell.ok("import", "-", "--replace", stdin='{"b": 1}')
    assert shell.run("export").json == {"b": 1}


def test_replace_deletes_what_cannot_be_read(shell: Shell, put: Put) -> None:
    put("bad", 1)
    put("worse", 1)
    break_value(shell, "bad")
    break_value(shell, "worse")
    assert shell.run("export").code == 4
    shell.ok("import", "-", "--replace", stdin='{"worse": 2}')
    assert shell.run("export").json == {"worse": 2}


def test_a_change_that_comes_between_is_a_conflict_and_nothing_is_written(
    shell: Shell, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("a", 1)
    listed = transfer.listed

    def then_someone_writes(client: ConfigClient) -> Any:
        snapshot = listed(client)
        put("a", 5)
        return snapshot

    monkeypatch.setattr(transfer, "listed", then_someone_writes)
    assert shell.run("import", "-", stdin='{"a": 2, "b": 1}').code == 3
    monkeypatch.undo()
    assert shell.run("export").json == {"a": 5}


def test_a_list_that_fails_for_a_moment_loses_nothing(shell: Shell, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put("a", 1)
    put("old", 1)
    listed = transfer.listed
    fails = [True]

    def at_second_try(client: ConfigClient, revision: int | None = None) -> Any:
        if fails and fails.pop():
            raise StoreUnavailable("for a moment")
        return listed(client, revision)

    monkeypatch.setattr(transfer, "listed", at_second_try)
    assert shell.run("import", "-", "--replace", stdin='{"b": 1}').code == 5
    assert shell.run("export").json == {"a": 1, "old": 1}
    assert shell.run("import", "-", "--replace", stdin='{"b": 1}').code == 0
    assert shell.run("export").json == {"b": 1}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[1]", 4),
        ("{", 4),
        ('{"a": 1, "a": 2}', 4),
        ('{"a": NaN}', 4),
        ('{"not a key": 1}', 4),
        ('{"a": 1, "": 2}', 4),
        ("\udcff", 4),
    ],
)
def test_what_is_no_object_of_keys_and_values_is_refused_whole(shell: Shell, text: str, code: int) -> None:
    done = shell.run("import", "-", stdin=text.encode(errors="surrogateescape"))
    assert (done.code, done.out) == (code, "")
    assert len(done.err.splitlines()) == 1
    assert not (shell.folder / "c.db").exists()


def test_a_key_beside_the_prefix_is_refused(shell: Shell) -> None:
    done = shell.run("import", "-", "--prefix", "a/", stdin='{"b": 1}')
    assert done.code == 4
    assert "'b'" in done.err


def test_export_takes_a_prefix_and_a_revision(shell: Shell, put: Put) -> None:
    put("a/x", 1)
    put("a/x", 2)
    put("b", 1)
    assert shell.run("export", "a/").json == {"a/x": 2}
    assert shell.run("export", "--revision", "1").json == {"a/x": 1}


def test_an_exported_file_is_whole_and_its_owners_alone(shell: Shell, put: Put) -> None:
    put("k", 1)
    path = shell.folder / "out.json"
    path.write_text("before")
    path.chmod(0o644)
    link = shell.folder / "link.json"
    link.symlink_to(path)
    done = shell.run("export", "--output", str(link))
    assert (done.code, done.out) == (0, "")
    assert link.is_symlink()
    assert json.loads(path.read_text()) == {"k": 1}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert shell.ok("import", str(path)) == "1"
    assert sorted(entry.name for entry in shell.folder.iterdir() if entry.suffix == ".json") == [
        "link.json",
        "out.json",
    ]


@pytest.mark.parametrize("target", ["/dev/null", "{folder}", "{folder}/no/such/folder.json"])
def test_what_is_no_file_is_not_replaced(shell: Shell, put: Put, target: str) -> None:
    put("k", 1)
    path = target.format(folder=shell.folder)
    before = Path(path).exists()
    assert shell.run("export", "--output", path).code == 2
    assert Path(path).exists() is before
