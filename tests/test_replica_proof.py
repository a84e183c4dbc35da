"""When what is held counts as proved, while others write without a pause."""

from __future__ import annotations

import math
from random import Random

import pytest

from veltrix_mw import ConfigClient
from veltrix_mw.keyspace import Keyspace
from veltrix_mw.protocols import Batch, Confirmation, Lease, Listing, MirrorState, Position, RawChange
from veltrix_mw.relay import Append, Elected, Follow, Followed, Inspected, Prove, Relay, RelayDecision, Written
from veltrix_mw.replica import (
    Begun,
    Confirmed,
    Decision,
    Listed,
    Received,
    Replica,
    Slept,
    Step,
    Watching,
)
from veltrix_mw.replica import List as ListStep
from veltrix_mw.validation import Schemas

FIRST = Position("label", 1, "mark 1")
LEASE = Lease("me", 1)


def batch(revision: int, key: str = "a") -> Batch:
    position = Position("label", revision, f"mark {revision}")
    return Batch(position, revision - 1, (RawChange(key, str(revision).encode()),))


def following(*, max_age_s: float = math.inf) -> Replica:
    keyspace = Keyspace(Schemas({}, layers=(), defaults={}))
    replica = Replica(keyspace, origin="etcd", random=Random(1), max_age_s=max_age_s)
    replica.handle(Begun(0.0))
    replica.handle(Listed(0.0, 0.0, Listing(FIRST, [("a", b"1", 1)])))
    replica.handle(Watching(0.0))
    return replica


def confirmed(replica: Replica, revision: int, *, at_s: float, count: int = 1, age_s: float = 0.0) -> Decision:
    return replica.handle(Confirmed(at_s + 0.1, at_s, Confirmation("label", revision, count, age_s=age_s)))


def test_what_a_confirmation_knew_of_is_proved_as_of_its_sending_once_the_watch_has_brought_it() -> None:
    replica = following()
    confirmed(replica, 3, at_s=5.0)
    assert replica.snapshot._proof.at_s == 0.0
    replica.handle(Received(6.0, [batch(2)]))
    assert replica.snapshot._proof.at_s == 0.0
    replica.handle(Received(7.0, [batch(3), batch(4)]))
    assert (replica.snapshot.revision, replica.snapshot._proof.at_s) == (4, 5.0)


def test_what_a_mirror_knew_of_is_as_old_as_the_mirror_said() -> None:
    replica = following()
    confirmed(replica, 2, at_s=5.0, age_s=3.0)
    replica.handle(Received(6.0, [batch(2)]))
    assert replica.snapshot._proof.at_s == 2.0


def test_a_watch_that_left_something_out_is_found_out_also_while_writes_go_on() -> None:
    replica = following()
    confirmed(replica, 2, at_s=5.0, count=7)
    replica.handle(Received(6.0, [batch(2)]))
    assert isinstance(replica.handle(Slept(6.5)).step, ListStep)
    assert replica.snapshot._proof.at_s == 0.0


def test_what_became_stale_is_told_once_and_so_is_that_it_is_current_again() -> None:
    replica = following(max_age_s=15.0)

    def told(decision: Decision) -> list[tuple[str, str, dict[str, object]]]:
        return [(notice.event, notice.level, dict(notice.fields)) for notice in decision.notices]

    assert told(replica.handle(Received(15.0, []))) == []
    assert told(replica.handle(Received(15.1, []))) == [("veltrix.stale", "warning", {"age_s": 15.1, "revision": 1})]
    assert told(replica.handle(Received(16.0, []))) == []
    assert told(confirmed(replica, 1, at_s=17.0)) == [("veltrix.current", "info", {"revision": 1})]
    assert told(confirmed(replica, 1, at_s=18.0)) == []
    assert told(replica.handle(Received(40.0, []))) == [("veltrix.stale", "warning", {"age_s": 22.0, "revision": 1})]


def test_a_client_tells_what_became_older_than_its_max_age_s(caplog: pytest.LogCaptureFixture) -> None:
    with ConfigClient("memory://ageing?namespace=shop", max_age_s=1e-9) as client:
        client.wait_for(client.put("a", 1), timeout_s=10)
        client.wait_for(client.put("a", 2), timeout_s=10)
    assert "veltrix.stale" in {record.veltrix["event"] for record in caplog.records if hasattr(record, "veltrix")}


def test_a_relay_proves_its_mirror_while_writes_go_on() -> None:
    relay = Relay(random=Random(1))

    def take(decision: RelayDecision) -> Step:
        """Let the mirror take what is written, until the authority is asked."""
        while not isinstance(decision.step, Follow):
            written.append(decision.step)
            decision = relay.handle(Written(0.0))
        return decision.step.step

    written: list[object] = []
    held = MirrorState(FIRST, count=1)
    relay.handle(Elected(0.0, LEASE, "me", 5.0))
    take(relay.handle(Inspected(0.0, held, FIRST, {"a": 1})))
    take(relay.handle(Followed(Watching(0.0))))
    # The authority, asked at 500 of the mirror's clock, has revision 2, which is on its way.
    take(relay.handle(Followed(Confirmed(0.2, 0.1, Confirmation("label", 2, 1)), asked_at_us=500)))
    assert written == []
    take(relay.handle(Followed(Received(0.3, [batch(2)]))))
    appended, proved = written
    assert isinstance(appended, Append)
    assert proved == Prove(LEASE, batch(2).position, 500)
