"""The table of the contract: it counts what ran, and its page has a row for each harness that there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from scripts.contract_table import Row, Table, differences

ROOT: Final = Path(__file__).resolve().parents[1]

SUITE: Final = """
import pytest

class ThingContract:
    \"\"\"What holds for every thing.

    And more.
    \"\"\"

    def test_a(self, harness): pass

    def test_b(self, harness): pass

    @pytest.mark.parametrize("n", [1, 2])
    def test_c(self, harness, n): pass

class SharedContract(ThingContract):
    \"\"\"What holds beside it.\"\"\"

    def test_b(self, harness): pass

    def test_d(self, harness): pytest.skip("it has no server")  # for the table, which is to give the reason

class TestOneThing(ThingContract):
    @pytest.fixture
    def harness(self): pass

    def test_of_its_own(self): pass

class TestGoodStore(SharedContract):
    @pytest.fixture(params=["plain", "safe"])
    def harness(self): pass

    def test_a(self, harness): pass

def test_beside_it(): pass
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_page_has_a_row_for_each_harness_and_no_other() -> None:
    done = run("-m", "scripts.contract_table", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_ran_is_counted_by_store_and_contract(tmp_path: Path) -> None:
    (tmp_path / "test_things.py").write_text(SUITE)
    (tmp_path / "test_thing_by_wire.py").write_text("from test_things import TestOneThing\n")
    options = [str(tmp_path), "--rootdir", str(tmp_path), "-c", "/dev/null", "-p", "no:cacheprovider"]
    code = (
        "import pytest; from scripts.contract_table import Table; table = Table(); "
        f"pytest.main({options!r}, plugins=[table]); print(table.page())"
    )
    done = run("-c", code)
    assert "16 passed, 2 skipped, 3 deselected" in done.stdout, done.stdout + done.stderr
    assert "- `ThingContract`: What holds for every thing.\n- `SharedContract`: What holds beside it." in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("| ")] == [
        "| store | `ThingContract` | `SharedContract` | skipped |",
        "| good (plain)  | 3 | 1 | 1: it has no server |",
        "| good (safe)   | 3 | 1 | 1: it has no server |",
        "| one thing     | 4 | 0 |  |",
        "| thing by wire | 4 | 0 |  |",
    ]


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("| etcd  | 3 |  |", []),
        ("| etcd  | 2 | 1: no server |", []),
        ("", ["the page lacks the row 'etcd'"]),
        ("| etcd | 4 |  |\n| gone | 1 |  |", ["the page has a row 'gone', and no harness is that"]),
    ],
)
def test_a_page_with_other_rows_is_told(page: str, said: list[str]) -> None:
    table = Table()
    table.rows["etcd"] = Row()
    table.contracts["ThingContract"] = "What holds for every thing."
    assert differences(table.head() + page, table) == said


def test_a_page_with_other_words_is_told() -> None:
    table = Table()
    table.contracts["ThingContract"] = "What holds for every thing."
    page = table.head()
    table.contracts["ThingContract"] = "What holds for each thing."
    assert differences(page, table) == ["the page lacks the words '- `ThingContract`: What holds for each thing.'"]
    assert differences("# Another page\n" + table.head(), table) != []
    table.contracts["SharedContract"] = "What holds beside it."
    assert "SharedContract" in "".join(differences(page, table))
    table = Table()
    assert differences(f"{table.head()[:40]}, more{table.head()[40:]}", table) != []
