"""`ConfigClient.list`: every entry, straight from the authority."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from veltrix_mw import Compacted, ConfigClient, StoreUnavailable


@pytest.fixture(params=["memory", "sqlite"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ConfigClient]:
    client = ConfigClient("memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/c.db")
    yield client
    client.close()


def test_it_lists_now_and_as_of_a_past_revision(client: ConfigClient) -> None:
    first = client.put("a", 1)
    client.put("b", {"c": [1]})
    client.delete("a")
    now, then = client.list(), client.list(first)
    assert (dict(now), now.revision) == ({"b": {"c": (1,)}}, 3)
    assert (dict(then), then.revision, then.entry("a").mod_revision) == ({"a": 1}, 1, 1)
    assert now.incarnation == then.incarnation != ""
    assert dict(client.list(0)) == {}


def test_it_starts_no_follower(client: ConfigClient) -> None:
    client.put("a", 1)
    before = threading.active_count()
    client.list()
    assert threading.active_count() == before
    assert not client.ready


def test_a_revision_that_is_none_is_told_from_one_that_is_gone(tmp_path: Path) -> None:
    client = ConfigClient(f"sqlite:///{tmp_path}/c.db?keep_revisions=1")
    with pytest.raises(StoreUnavailable):
        client.list()
    for number in range(3):
        client.put("a", number)
    with pytest.raises(ValueError, match="no revision 9"):
        client.list(9)
    with pytest.raises(Compacted):
        client.list(1)
    client.close()


def test_what_breaks_a_schema_is_rejected(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/c.db"
    plain = ConfigClient(url)
    plain.put("limit", "many")
    plain.put("other", 1)
    typed = ConfigClient(url, schemas={"limit": {"type": "integer"}})
    snapshot = typed.list()
    assert dict(snapshot) == {"other": 1}
    assert list(snapshot.rejected) == ["limit"]
    plain.close()
    typed.close()
