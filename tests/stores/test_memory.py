"""The in-memory store: the contract, and what is its own."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.stores.contract import Harness, StoreContract, entries, here, put
from veltrix_mw.errors import Compacted
from veltrix_mw.stores.memory import MemoryStore

_names = (f"test{number}" for number in itertools.count())


class MemoryHarness(Harness):
    """A named keyspace, kept alive by a store of its own."""

    processes = False

    def __init__(self) -> None:
        super().__init__()
        self._name = next(_names)

    def spec(self, **options: Any) -> dict[str, Any]:
        raise AssertionError("no other process can open it")

    def make(self, **options: Any) -> MemoryStore:
        return MemoryStore(name=self._name, namespace=self.namespace, **options)

    def forget(self, oldest: int) -> None:
        newest = here(self.open()).revision
        put(self.open(keep_revisions=newest - oldest + 2), "forgotten", b"1")


@pytest.fixture
def harness() -> Iterator[MemoryHarness]:
    harness = MemoryHarness()
    yield harness
    harness.close()


class TestMemoryStore(StoreContract):
    """The contract over `MemoryStore`."""


def test_a_store_without_a_name_is_private() -> None:
    one, other = MemoryStore(), MemoryStore()
    put(one, "a", b"1")
    assert entries(other) == {}


def test_a_named_keyspace_ends_with_its_last_store() -> None:
    name = next(_names)
    store = MemoryStore(name=name)
    put(store, "a", b"1")
    assert set(entries(MemoryStore(name=name))) == {"a"}
    del store
    gc.collect()
    assert entries(MemoryStore(name=name)) == {}


def test_history_is_bounded_by_revisions() -> None:
    store = MemoryStore(keep_revisions=3)
    made = [put(store, "a", b"%d" % turn) for turn in range(10)]
    assert [version.revision for version in store.history("a", limit=99, timeout_s=1)] == made[:-4:-1]
    with pytest.raises(Compacted):
        entries(store, made[-4])


def test_history_is_bounded_by_bytes() -> None:
    store = MemoryStore(keep_bytes=1000)
    made = [put(store, "a", b'"' + b"x" * 298 + b'"') for _ in range(10)]
    assert [version.revision for version in store.history("a", limit=99, timeout_s=1)] == made[:-4:-1]
    put(store, "a", b'"' + b"x" * 5000 + b'"')
    assert len(store.history("a", limit=99, timeout_s=1)) == 1


def test_its_url_names_it() -> None:
    assert (MemoryStore(name="shop").info.origin, MemoryStore(name="shop").info.url) == ("memory", "memory://shop")
