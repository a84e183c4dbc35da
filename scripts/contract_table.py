"""Runs the contract of stores on every store that has a harness, and writes what came of it to docs/contract.md.

Usage: python -m scripts.contract_table            run, then write the page; exits 1 and writes nothing where one fails
       python -m scripts.contract_table --check    run nothing: exits 1 where the page has other rows or counts

A row is a test class of tests/stores that derives from a contract, and where its harness has variants, one of them. A
column is a contract: a class whose name ends in `Contract`. A test that a contract overrides is that one's.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "docs" / "contract.md"

_ROW: Final = re.compile(r"^\| (?P<store>[^|]+?) +\|(?P<counts>[\d |]+)\|(?P<skipped>[^|]*)\|$", re.MULTILINE)

_HEAD: Final = """\
# The contract of stores

A store is what one test suite says that it is: `tests/stores/contract.py`. Each backend gives it a harness and derives
a class from it, so one store does what another does, and a new one is done when all of it passes.

This page is written by `python -m scripts.contract_table`, which runs the suite and writes nothing where a test fails.
Each number is of tests that passed; a test checks that the rows are the harnesses that there are, and that no test of
theirs is left out.

"""


@dataclass
class Row:
    """What came of one store's tests, by contract; without a run, how many there are."""

    counts: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


class Table:
    """A plugin of pytest that keeps the contract's tests alone, and counts them."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.contracts: dict[str, str] = {}  # a contract's words, by its class's name; the most general first
        self._of: dict[str, tuple[str, str]] = {}  # store and contract, by node

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = [item for item in items if self._take(item)]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self._of])
        items[:] = kept

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        store, contract = self._of[report.nodeid]
        if report.skipped:
            assert isinstance(report.longrepr, tuple)
            self.rows[store].skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
            self.rows[store].counts[contract] -= 1

    def _take(self, item: pytest.Item) -> bool:
        if not isinstance(item, pytest.Function) or item.cls is None:
            return False
        name = item.originalname
        contracts = [each for each in item.cls.__mro__ if each.__name__.endswith("Contract")]
        contract = next((each for each in contracts if name in vars(each)), None)
        if contract is None:
            return False
        for each in reversed(contracts):
            self.contracts.setdefault(each.__name__, (each.__doc__ or "").partition("\n")[0])
        store = _store(item)
        self.rows.setdefault(store, Row()).counts[contract.__name__] += 1
        self._of[item.nodeid] = store, contract.__name__
        return True

    def page(self) -> str:
        """The page, as Markdown."""
        width = max(map(len, self.rows))
        lines = [
            *(f"- `{name}`: {words}" for name, words in self.contracts.items()),
            "",
            f"| store | {' | '.join(f'`{name}`' for name in self.contracts)} | skipped |",
            f"|---|{'---|' * (len(self.contracts) + 1)}",
        ]
        for store, row in sorted(self.rows.items()):
            counts = " | ".join(str(row.counts[contract]) for contract in self.contracts)
            skipped = "; ".join(f"{number}: {reason}" for reason, number in sorted(row.skipped.items()))
            lines.append(f"| {store:<{width}} | {counts} | {skipped} |")
        return f"{_HEAD}{chr(10).join(lines)}\n\nRun with {', '.join(_versions())}.\n"


def _store(item: pytest.Function) -> str:
    """In words: `TestEtcdAndRedis` is `etcd and redis`; of a harness in variants, the variant too."""
    assert item.cls is not None
    words = re.findall(r"[A-Z][a-z0-9]*", item.cls.__name__.removeprefix("Test").removesuffix("Store"))
    variant = item.callspec.params.get("harness") if hasattr(item, "callspec") else None
    return " ".join(words).lower() + ("" if variant is None else f" ({variant})")


def _versions() -> Iterator[str]:
    yield f"Python {platform.python_version()}"
    for command in (["etcd", "--version"], ["redis-server", "--version"]):
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"\d+\.\d+\.\d+", said)
        yield f"{command[0]} {found[0] if found else '?'}"


def totals(page: str) -> dict[str, int]:
    """How many tests a page says that each store has, skipped ones with them."""
    found = {}
    for row in _ROW.finditer(page):
        skipped = sum(int(number) for number in re.findall(r"(?:^|; )(\d+):", row["skipped"].strip()))
        found[row["store"]] = sum(map(int, row["counts"].replace("|", " ").split())) + skipped
    return found


def differences(page: str, table: Table) -> list[str]:
    """What the page says otherwise than the harnesses that there are."""
    said, there = totals(page), {store: row.counts.total() for store, row in table.rows.items()}
    return [
        f"{store}: {said.get(store, 0)} tests on the page, {there.get(store, 0)} of its harness"
        for store in sorted(said.keys() | there.keys())
        if said.get(store, 0) != there.get(store, 0)
    ]


def main(arguments: list[str]) -> int:
    checks = arguments == ["--check"]
    table = Table()
    options = ["--collect-only", "-qq"] if checks else []
    status = pytest.main([str(ROOT / "tests" / "stores"), "--rootdir", str(ROOT), *options], plugins=[table])
    if status != pytest.ExitCode.OK:
        return int(status)
    if checks:
        found = differences(PAGE.read_text(encoding="utf-8"), table)
        for line in found:
            print(f"{line}; run: python -m scripts.contract_table", file=sys.stderr)
        return 1 if found else 0
    PAGE.write_text(table.page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
