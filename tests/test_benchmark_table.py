"""The table of the benchmarks: the pages show the figures of the last run, and why an aim was missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Copies of the results and of the pages, on which the table works."""
    copies = {}
    for name in ("RESULTS", "README", "ALL", "TELEMETRY"):
        original: Path = getattr(table, name)
        copies[name] = tmp_path / original.name
        copies[name].write_text(original.read_text())
        monkeypatch.setattr(table, name, copies[name])
    return copies


def check(monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patched:
        patched.setattr("sys.argv", ["table", "--check"])
        return table.main()


def changed(pages: dict[str, Path], bench: str, name: str, **what: Any) -> None:
    results = json.loads(pages["RESULTS"].read_text())
    [figure] = [each for each in results["figures"] if (each["bench"], each["name"]) == (bench, name)]
    figure.update(what)
    pages["RESULTS"].write_text(json.dumps(results))


def test_the_pages_show_the_figures_of_the_last_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (check(monkeypatch), capsys.readouterr().err) == (0, "")
    results = json.loads(table.RESULTS.read_text())
    assert not results["quick"], "the pages are to show a full run"


def test_other_figures_are_found_and_written(
    pages: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(pages, "P1 hot read", "view[key]", ratio=2.25, spread=[2.0, 2.5])
    assert check(monkeypatch) == 1
    assert capsys.readouterr().err == (
        "README.md, decisions.md: not the figures of results.json; run python -m benchmarks.table\n"
    )
    before = pages["README"].read_text()
    monkeypatch.setattr("sys.argv", ["table"])
    assert table.main() == 0
    written = pages["README"].read_text()
    assert "subscript of a plain `dict` | 2.25 [2, 2.50] | 3: met |" in written
    assert len(before.splitlines()) == len(written.splitlines())
    assert check(monkeypatch) == 0


def test_a_page_without_a_place_for_them_is_told(pages: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pages["README"].write_text("# nothing\n")
    with pytest.raises(SystemExit, match=r"README.md has no place for the figures"):
        check(monkeypatch)


def test_an_aim_that_was_missed_is_explained(pages: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["table"])
    changed(pages, "P6 burst", "a view's follower", ratio=1.5, met=False)
    table.main()
    written = pages["README"].read_text()
    assert "| 1.25: **not met** |" in written
    reason = table.REASONS["P6 burst", "a view's follower"]
    assert f"{reason}.\n" in written
    changed(pages, "P1 hot read", "view[key]", ratio=3.5, met=False)
    with pytest.raises(SystemExit, match=r"say in REASONS of .*P1 hot read"):
        table.main()
