"""How entries and records that etcd tells apart become whole revisions: `Assembly`, without a server."""

from __future__ import annotations

import pytest

from veltrix_mw.errors import StoreUnavailable
from veltrix_mw.protocols import ChangeRecord, Position
from veltrix_mw.stores.etcd_messages import Event, KeyValue, Watched
from veltrix_mw.stores.etcd_space import Change, Space
from veltrix_mw.stores.etcd_watch import CHANGE, ENTRIES, Assembly

SPACE = Space("shop", prefix=None, lazy=(), is_text=False)


def assembly() -> Assembly:
    return Assembly(SPACE, Position("label", 0), label="label", cluster_id="1")


def entry(revision: int) -> Watched:
    return Watched(watch_id=ENTRIES, events=[Event(kv=KeyValue(SPACE.name("k"), b"1", mod_revision=revision))])


def record(revision: int) -> Watched:
    value = Change.written(ChangeRecord(author="ada"))
    return Watched(watch_id=CHANGE, events=[Event(kv=KeyValue(SPACE.change, value, mod_revision=revision))])


def newest(revision: int) -> Change:
    return Change(revision, "r:mark", ChangeRecord())


def test_a_stream_of_writes_is_not_out_of_step_because_the_newest_record_is_always_on_its_way() -> None:
    made = assembly()
    for revision in range(1, 200):
        now_s = revision * 0.1
        made.take(entry(revision), now_s)
        made.resolve(revision, newest(revision), "label", now_s)
        made.take(record(revision), now_s)
        (batch,) = made.ready()
        assert (batch.position.revision, batch.previous) == (revision, revision - 1)


def test_a_record_that_never_comes_is_out_of_step_also_while_writes_go_on() -> None:
    made = assembly()
    with pytest.raises(StoreUnavailable, match="watch again"):
        for revision in range(1, 200):
            now_s = revision * 0.1
            made.take(entry(revision), now_s)
            made.resolve(revision, newest(revision), "label", now_s)
    assert revision < 20
    assert made.ready() == []
