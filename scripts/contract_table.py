"""Runs the contract of stores on every store that has a harness, and writes what came of it to docs/contract.md.

Usage: python -m scripts.contract_table            run, then write the page; exits 1 and writes nothing where one fails
       python -m scripts.contract_table --check    run nothing: exits 1 where the page has other words or rows

A row is a test class of tests/stores that derives from a contract: in each module that has it, and where its harness
has variants, with each of them. A column is a contract: a class whose name ends in `Contract`. A test that a contract
overrides is that one's.
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

_ROW: Final = re.compile(r"^\| ([^|]+?) +\|[\d |]+\|[^|]*\|$", re.MULTILINE)

_HEAD: Final = """\
# The contract of stores

A store is what one test suite says that it is: `tests/stores/contract.py`. Each backend gives it a harness and derives
a class from it, so one store does what another does, and a new one is done when all of it passes.

This page is written by `python -m scripts.contract_table`, which runs the suite and writes nothing where a test fails.
Each number is of tests that passed when it was last run. A test checks these words, the
contracts, and that the rows are the harnesses that there are; it does not check the numbers.
Clients of the package `etcd3` pass what `etcd client handed in` passes, in their own environment: `tests/etcd3`.

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

    def head(self) -> str:
        """What the page begins with, up to its rows: all that takes no run."""
        lines = [
            *(f"- `{name}`: {words}" for name, words in self.contracts.items()),
            "",
            f"| store | {' | '.join(f'`{name}`' for name in self.contracts)} | skipped |",
            f"|---|{'---|' * (len(self.contracts) + 1)}",
        ]
        return f"{_HEAD}{chr(10).join(lines)}\n"

    def page(self) -> str:
        """The page, as Markdown."""
        width = max(map(len, self.rows))
        lines = list[str]()
        for store, row in sorted(self.rows.items()):
            counts = " | ".join(str(row.counts[contract]) for contract in self.contracts)
            skipped = "; ".join(f"{number}: {reason}" for reason, number in sorted(row.skipped.items()))
            lines.append(f"| {store:<{width}} | {counts} | {skipped} |")
        return f"{self.head()}{chr(10).join(lines)}\n\nRun with {', '.join(_versions())}.\n"


def _store(item: pytest.Function) -> str:
    """In words: `TestEtcdAndRedis` is `etcd and redis`, one taken over by `test_etcd_over_grpc` is `etcd over grpc`."""
    assert item.cls is not None
    here = item.module.__name__.rpartition(".")[2].removeprefix("test_")
    if here == item.cls.__module__.rpartition(".")[2].removeprefix("test_"):
        words = re.findall(r"[A-Z][a-z0-9]*", item.cls.__name__.removeprefix("Test").removesuffix("Store"))
    else:
        words = here.split("_")
    variant = item.callspec.params.get("harness") if hasattr(item, "callspec") else None
    return " ".join(words).lower() + ("" if variant is None else f" ({variant})")


def _versions() -> Iterator[str]:
    yield f"Python {platform.python_version()}"
    for command in (["etcd", "--version"], ["redis-server", "--version"]):
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"\d+\.\d+\.\d+", said)
        yield f"{command[0]} {found[0] if found else '?'}"


def differences(page: str, table: Table) -> list[str]:
    """The words and rows that the page lacks, and the rows that it has of harnesses that are gone."""
    head = table.head()
    told = page[: len(head)].splitlines()
    stale = [f"the page lacks the words {line!r}" for line in head.splitlines() if line and line not in told]
    if not (stale or page.startswith(head)):
        stale = ["the page begins with other words"]
    said, there = set(_ROW.findall(page)), table.rows.keys()
    lacking = stale + [f"the page lacks the row {store!r}" for store in sorted(there - said)]
    return lacking + [f"the page has a row {store!r}, and no harness is that" for store in sorted(said - there)]


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
