"""The client on its embedded store: lifecycle, readiness, read your writes, forks, last-known-good."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import wait_until
from veltrix_mw import (
    MISSING,
    Change,
    ConfigClient,
    Conflict,
    Delete,
    Entry,
    InvalidKey,
    InvalidValue,
    KeyMissing,
    NotReady,
    Put,
    RevisionTimeout,
    SettingsError,
    Snapshot,
    StoreUnavailable,
    current_view,
)
from veltrix_mw.protocols import Confirmation, Listing, Position
from veltrix_mw.stores.memory import MemoryStore


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/config.db"


@pytest.fixture
def writer(url: str) -> Iterator[ConfigClient]:
    """A second client, as another process would have: it only writes."""
    client = ConfigClient(url, telemetry="off")
    client.put("first", 1)
    yield client
    client.close()


@pytest.fixture
def client(url: str, writer: ConfigClient) -> Iterator[ConfigClient]:
    with ConfigClient(url, telemetry="off") as made:
        made.wait_ready()
        yield made


def in_child(run: Any) -> Any:
    """What `run()` returns in a forked child, by way of JSON."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forks beside threads: that is the test
        pid = os.fork()
    if pid == 0:
        answer: Any = "the child failed"
        try:
            answer = run()
        except BaseException as exc:
            answer = repr(exc)
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = json.load(pipe)
    os.waitpid(pid, 0)
    return answer


def test_a_change_made_elsewhere_is_served(client: ConfigClient, writer: ConfigClient) -> None:
    revision = writer.write([Put("a", 1), Put("b/c", {"x": [1]})])
    client.wait_for(revision)
    view = client.view()
    assert view["a"] == 1
    assert view["b/c"] == {"x": (1,)}
    assert view.revision == revision
    assert view.origin == "sqlite"
    assert view.age_s < 60
    writer.delete("a")
    wait_until(lambda: "a" not in client.view(), 10, reason="the deletion to be served")


def test_constructing_and_importing_start_nothing(url: str, tmp_path: Path) -> None:
    threads = threading.active_count()
    client = ConfigClient(url, last_known_good=tmp_path / "lkg")
    assert threading.active_count() == threads
    assert not list(tmp_path.iterdir())
    client.close()


def test_reading_creates_no_file_and_the_error_shows_how_to_create_one(url: str, tmp_path: Path) -> None:
    with ConfigClient(url, start_timeout_s=0.1) as client:
        with pytest.raises(NotReady, match="put"):
            client.wait_ready(0.3)
        with pytest.raises(NotReady):
            client.view()["a"]
        with pytest.raises(StoreUnavailable):
            client.read(["a"])
        assert not list(tmp_path.iterdir())
        client.put("a", 1)
        client.wait_ready(10)
        wait_until(lambda: client.view().get("a") == 1, 10, reason="the file to be followed once it is there")


def test_requests_do_not_wait_for_what_waiting_does_not_mend(url: str, tmp_path: Path) -> None:
    """A database that nobody has written yet, and a file that is none: both would wait for an hour."""
    (tmp_path / "text.db").write_text("this is no database, and long enough to be read as one" * 20)
    for wrong in (url, f"sqlite:///{tmp_path}/text.db"):
        client = ConfigClient(wrong, start_timeout_s=3600, defaults={"limit": 5})
        with client.pinned() as view:
            assert view["limit"] == 5
            with pytest.raises(NotReady):
                view["other"]
        client.close()


def test_views_are_equal_if_they_are_pinned_alike(client: ConfigClient, writer: ConfigClient) -> None:
    view = client.view(layers=("t/",))
    assert view == client.view(layers=("t/",))
    assert view != client.view()
    assert client.view() == {"first": 1}
    client.wait_for(writer.put("unrelated", 1))
    assert view != client.view(layers=("t/",))


def test_the_first_view_starts_the_following(url: str, writer: ConfigClient) -> None:
    client = ConfigClient(url)
    try:
        client.view()
        client.wait_ready()
        assert client.view()["first"] == 1
        assert client.ready
    finally:
        client.close()


def test_close_is_quick_idempotent_and_leaves_views_readable(client: ConfigClient, writer: ConfigClient) -> None:
    view = client.view()
    follower = client._follower
    assert follower is not None
    client.close()
    client.close()
    wait_until(lambda: not follower.alive, 10, reason="the thread to end")
    assert view["first"] == 1
    assert client.status().tiers[0].state == "stopped"


def test_a_closed_client_starts_again_where_it_left_off(client: ConfigClient, writer: ConfigClient) -> None:
    client.close()
    revision = writer.put("first", 2)
    client.start()
    client.wait_for(revision)
    assert client.view()["first"] == 2


def test_holders_keep_the_client_running_and_the_last_one_closes_it(url: str, writer: ConfigClient) -> None:
    client = ConfigClient(url)
    one, two = client.hold(), client.hold()
    client.wait_ready()
    one()
    one()
    assert client.status().tiers[0].state != "stopped"
    two()
    assert client.status().tiers[0].state == "stopped"
    client.start()
    client.hold()()
    assert client.status().tiers[0].state != "stopped"
    client.close()


def test_wait_for_gives_read_your_writes_and_times_out_with_a_reason(client: ConfigClient) -> None:
    for number in range(20):
        client.wait_for(client.put("n", number))
        assert client.view()["n"] == number
    with pytest.raises(RevisionTimeout, match=r"revision 9999 .* is at 21"):
        client.wait_for(9999, timeout_s=0.05)


def test_the_async_twins_do_the_same(client: ConfigClient) -> None:
    async def run() -> None:
        await client.await_ready()
        revision = await client.aput("n", 1)
        await client.await_for(revision)
        assert client.view()["n"] == 1
        assert await client.aread(["n"]) == {"n": Entry(1, revision)}
        revision = await client.awrite([Put("m", 2), Delete("n")])
        await client.await_for(revision)
        assert await client.adelete("n", missing_ok=True) is None
        with pytest.raises(KeyMissing):
            await client.adelete("n")
        with pytest.raises(RevisionTimeout):
            await client.await_for(9999, timeout_s=0.05)

    asyncio.run(run())


def test_compare_and_set_tells_what_is_there(client: ConfigClient) -> None:
    revision = client.put("n", 1, expected=0)
    assert client.put("n", 2, expected=revision) > revision
    with pytest.raises(Conflict) as raised:
        client.put("n", 3, expected=revision)
    assert raised.value.current.value == 2
    with pytest.raises(Conflict) as raised:
        client.delete("absent", expected=5)
    assert raised.value.current == Entry(MISSING, 0)


def test_history_and_rollback(client: ConfigClient) -> None:
    first = client.put("n", 1, author="ann", reason="begin")
    client.write([Put("n", 2), Put("extra", True)], author="bob")
    client.delete("n")
    versions = client.history("n")
    assert [(item.value, item.author) for item in versions] == [(MISSING, ""), (2, "bob"), (1, "ann")]
    assert versions[0].deleted
    assert versions[2].reason == "begin"
    revision = client.rollback(first)
    client.wait_for(revision)
    assert dict(client.view()) == {"first": 1, "n": 1}
    assert client.history("n")[0].reason == f"rollback to revision {first}"
    assert client.read(["n", "extra"], revision=first + 1).keys() == {"n", "extra"}


@dataclass(frozen=True)
class Payments:
    limit: int


def test_a_write_that_breaks_a_schema_is_refused_before_it_is_made(url: str, writer: ConfigClient) -> None:
    client = ConfigClient(url, schemas={"pay/": Payments})
    with pytest.raises(InvalidValue, match="pay/limit"):
        client.put("pay/limit", "many")
    client.put("pay/limit", 5)
    assert client.read(["pay/limit"])["pay/limit"].value == 5
    client.close()


def test_a_rejected_change_is_reported_and_the_last_good_value_stays(url: str, writer: ConfigClient) -> None:
    writer.put("pay/limit", 5)
    with ConfigClient(url, schemas={"pay/": Payments}) as client:
        client.wait_ready()
        revision = writer.put("pay/limit", "many")
        client.wait_for(revision)
        assert client.view()["pay/limit"] == 5
        assert client.view().bind(Payments, "pay/") == Payments(5)
        assert client.status().rejected["pay/limit"].revision == revision
        assert client._stats.rejections == 1
        client.wait_for(writer.put("other", 1))
        assert client.view()["other"] == 1
        client.wait_for(writer.put("pay/limit", 6))
        assert not client.snapshot.rejected


def test_a_fresh_worker_takes_the_last_good_value_from_history(url: str, writer: ConfigClient) -> None:
    writer.put("pay/limit", 5)
    writer.put("pay/limit", "many")
    with ConfigClient(url, schemas={"pay/": Payments}) as client:
        client.wait_ready()
        assert client.view()["pay/limit"] == 5
        assert set(client.snapshot.rejected) == {"pay/limit"}


def test_subscribers_hear_of_changes_below_their_prefix(client: ConfigClient, writer: ConfigClient) -> None:
    heard: list[tuple[tuple[Change, ...], Snapshot]] = []
    arrived = threading.Event()

    def note(changes: tuple[Change, ...], snapshot: Snapshot) -> None:
        heard.append((changes, snapshot))
        arrived.set()

    end = client.subscribe("pay/", note)
    writer.put("other", 1)
    revision = writer.put("pay/limit", 5)
    assert arrived.wait(10)
    changes, snapshot = heard[0]
    assert changes == (Change("pay/limit", MISSING, Entry(5, revision)),)
    assert snapshot.revision == revision
    end()
    client.wait_for(writer.put("pay/limit", 6))
    assert len(heard) == 1
    with pytest.raises(InvalidKey):
        client.subscribe("pay", note)


def test_pinned_makes_a_view_current_for_a_script(client: ConfigClient) -> None:
    with client.pinned(overrides={"k": 3}) as view:
        assert current_view() is view
        assert current_view()["k"] == 3


def test_a_forked_child_follows_by_itself_and_shares_no_connection(client: ConfigClient, writer: ConfigClient) -> None:
    def in_the_child() -> list[Any]:
        before = client.view()["first"]
        revision = writer.put("first", 2)
        client.wait_for(revision, timeout_s=10)
        after = client.view()["first"]
        client.close()
        return [before, after, client.ready]

    for _ in range(3):
        writer.put("first", 1)
        client.wait_for(writer.put("first", 1))
        assert in_child(in_the_child) == [1, 2, True]
        wait_until(lambda: client.view()["first"] == 2, 10, reason="the parent to follow on")


def test_a_child_forked_before_the_start_starts_by_itself(url: str, writer: ConfigClient) -> None:
    client = ConfigClient(url)

    def in_the_child() -> Any:
        with client.pinned() as view:
            return view["first"]

    assert in_child(in_the_child) == 1
    client.close()


def test_a_fork_while_locks_are_held_does_not_stop_the_child(client: ConfigClient, writer: ConfigClient) -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            client.view(layers=("t/",))
            client.subscribe("", lambda changes, snapshot: None)()

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            revision = writer.put("first", 1)

            def in_the_child(revision: int = revision) -> Any:
                client.wait_for(revision, timeout_s=10)
                return client.view(layers=("t/",))["first"]

            assert in_child(in_the_child) == 1
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)


def test_a_cold_start_without_the_store_serves_the_last_known_good(
    tmp_path: Path, writer: ConfigClient, url: str
) -> None:
    folder = tmp_path / "lkg"
    with ConfigClient(url, last_known_good=folder) as client:
        client.wait_ready()
        client.wait_for(writer.put("pay/limit", 5))
    with ConfigClient("sqlite:////nowhere/at/all.db", last_known_good=folder) as cold:
        cold.wait_ready()
        view = cold.view()
        assert view["pay/limit"] == 5
        assert view.origin == "disk"
        assert view.stale
        assert view.age_s == float("inf")
        wait_until(lambda: "/nowhere" in cold.status().tiers[0].error, 10, reason="the failure to be told")
        with pytest.raises(RevisionTimeout):
            cold.wait_for(1, timeout_s=0.05)


def test_a_database_put_back_from_a_backup_is_taken_whole_under_a_new_incarnation(
    tmp_path: Path, url: str, client: ConfigClient, writer: ConfigClient
) -> None:
    client.wait_for(writer.put("old", 1))
    writer.close()
    import sqlite3

    backup = tmp_path / "backup.db"
    with sqlite3.connect(tmp_path / "config.db") as source, sqlite3.connect(backup) as target:
        source.backup(target)
    target.close()
    source.close()
    client.wait_for(writer.put("new", 2))
    before = client.view()
    writer.close()
    with sqlite3.connect(backup) as source, sqlite3.connect(tmp_path / "config.db") as target:
        source.backup(target)
    target.close()
    source.close()
    wait_until(lambda: client.view().incarnation != before.incarnation, 20, reason="the restore to be noticed")
    view = client.view()
    assert dict(view) == {"first": 1, "old": 1}
    assert view.revision < before.revision
    client.wait_for(writer.put("after", 3))
    assert client.view()["after"] == 3
    assert client.view().incarnation == view.incarnation


def test_concurrent_writers_and_readers_see_whole_revisions_in_order(client: ConfigClient, url: str) -> None:
    """Two keys that are always written together are always read equal, and revisions only grow."""
    stop, wrong = threading.Event(), []
    client.wait_for(client.write([Put("a", 0), Put("b", 0)]))

    def read() -> None:
        last = 0
        while not stop.is_set():
            view = client.view()
            if view["a"] != view["b"] or view.revision < last:
                wrong.append((view["a"], view["b"], view.revision, last))
            last = view.revision

    def write(number: int) -> None:
        other = ConfigClient(url, telemetry="off")
        for turn in range(20):
            other.write([Put("a", [number, turn]), Put("b", [number, turn])])
        other.close()

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in [*readers, *writers]:
        thread.start()
    for thread in writers:
        thread.join(60)
    stop.set()
    for thread in readers:
        thread.join(10)
    assert not wrong
    client.wait_for(client.put("end", 1))
    fresh = client.read(["a", "b"])
    assert client.view()["a"] == fresh["a"].value == fresh["b"].value


class BrittleStore(MemoryStore):
    """A store whose list raises what no store should."""

    calls = 0

    def list(self, *, timeout_s: float) -> Any:
        self.calls += 1
        if self.calls < 3:
            raise RuntimeError("a defect")
        return super().list(timeout_s=timeout_s)


def test_the_follower_survives_a_defect_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    store = BrittleStore()
    with ConfigClient(store, telemetry="off") as client:
        client.wait_ready(10)
        assert store.calls >= 3
        assert "follower_crashed" in caplog.text


class LyingStore(MemoryStore):
    """A store whose watch brings nothing while its confirmation knows better."""

    def confirm(self, position: Position, *, timeout_s: float) -> Confirmation:
        found = super().confirm(position, timeout_s=timeout_s)
        return Confirmation(found.incarnation, found.revision + 1, found.count)


def test_status_tells_each_tier_and_how_far_behind_it_is() -> None:
    with ConfigClient(LyingStore(name="", namespace="shop"), telemetry="off") as client:
        client.wait_ready()
        status = client.status()
        assert status.ready
        assert status.relay is None
        (tier,) = status.tiers
        assert (tier.name, tier.role, tier.error) == ("memory", "authority", "")
        assert "memory://" in tier.url
        wait_until(lambda: client.status().tiers[0].lag == 1, 20, reason="the confirmation to find it behind")


def test_status_tells_what_lazy_units_cost_and_what_is_held(
    url: str, writer: ConfigClient, client: ConfigClient
) -> None:
    assert client.status().lazy is None
    writer.write([Put("tenants/acme/limit", 5), Put("tenants/beta/limit", 6)])
    with ConfigClient(url, lazy=("tenants/",), lazy_max_bytes=1_000_000, telemetry="off") as lazy:
        lazy.wait_ready()
        before = lazy.status().lazy
        assert before is not None
        assert (sum(before.fetches.values()), before.held, before.bytes, before.max_bytes) == (0, 0, 0, 1_000_000)
        pinned = lazy.view()
        assert lazy.view().fetch_many(["tenants/acme/limit", "tenants/none/limit"]) == {"tenants/acme/limit": 5}
        assert lazy.view().fetch("tenants/acme/limit") == 5
        lazy.wait_for(writer.put("tenants/beta/limit", 7))
        assert pinned.fetch("tenants/beta/limit") == 6  # it has changed since: read from the history
        after = lazy.status().lazy
        assert after is not None
        assert after.fetches == {"hit": 1, "miss": 2, "absent": 0, "coalesced": 0, "error": 0}
        assert after.units_read == {"mirror": 0, "authority": 4, "wanted": 0}
        assert (after.filled, after.held) == (0, 3)
        assert 0 < after.bytes < after.max_bytes
        assert before.fetches["hit"] == 0, "what was given out stays as it was"
        assert json.loads(json.dumps(lazy.status().as_dict()))["lazy"]["held"] == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": None}, "sqlite:///config.db"),
        ({"url": "sqlite://x.db"}, "three slashes"),
        ({"url": "sqlit:///x.db"}, "did you mean sqlite"),
        ({"url": "sqlite:///x.db?timout_s=1"}, "did you mean timeout_s"),
        ({"url": 5}, "is a str"),
        ({"namespace": "a b"}, "namespace"),
        ({"layers": "env/"}, "sequence of prefixes"),
        ({"layers": ("env",)}, "must end with '/'"),
        ({"defaults": {"/x": 1}}, "not a key"),
        ({"defaults": {"x": float("nan")}}, "NaN"),
        ({"schemas": {"x y": int}}, "x y"),
        ({"schemas": {"x": object()}}, "model"),
        ({"telemetry": "loud"}, "requests"),
        ({"max_age_s": 0}, "max_age_s"),
        ({"max_age_s": "5"}, "max_age_s"),
        ({"start_timeout_s": -1}, "start_timeout_s"),
    ],
)
def test_a_wrong_setting_says_what_to_do(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        ConfigClient(**{"url": "memory://", **options})


def test_the_url_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, url: str, writer: ConfigClient) -> None:
    monkeypatch.setenv("VELTRIX_URL", url)
    with ConfigClient() as client:
        client.wait_ready()
        assert client.view()["first"] == 1


def test_namespaces_of_one_database_do_not_mix(url: str, writer: ConfigClient) -> None:
    with ConfigClient(url, namespace="other") as other:
        other.put("first", 9)
        other.wait_ready(10)
        wait_until(lambda: other.view().get("first") == 9, 10, reason="the namespace's own value")
        assert writer.read(["first"])["first"].value == 1


class SlowStore(MemoryStore):
    """A store whose first list takes as long as the test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go_on, self.lists = threading.Event(), threading.Event(), 0

    def list(self, *, timeout_s: float) -> Listing:
        listing = super().list(timeout_s=timeout_s)
        self.lists += 1
        if self.lists == 1:
            self.asked.set()
            assert self.go_on.wait(20)
        return listing


def test_a_follower_that_was_let_go_publishes_nothing_any_more(tmp_path: Path) -> None:
    """It may be held up in a call for longer than `close` waits; what it then brings is old."""
    store = SlowStore()
    client = ConfigClient(store, last_known_good=tmp_path / "kept")
    client.put("n", 1)
    client.start()
    assert store.asked.wait(10)
    old = client._follower
    assert old is not None
    client.close()
    revision = client.put("n", 2)
    client.start()
    client.wait_for(revision)
    store.go_on.set()
    wait_until(lambda: not old.alive, 10, reason="the old follower to end")
    assert client.view()["n"] == 2
    assert client.view().revision == revision
    client.close()


def test_starting_and_closing_at_once_from_many_threads_leaves_a_client_that_works(
    url: str, writer: ConfigClient
) -> None:
    client, stop, errors = ConfigClient(url), threading.Event(), []

    def churn(act: Any) -> None:
        while not stop.is_set():
            try:
                act()
            except Exception as exc:
                errors.append(exc)

    def hold_and_release() -> None:
        client.hold()()

    acts = [client.start, client.close, client.view, hold_and_release]
    threads = [threading.Thread(target=churn, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    stop.wait(1.5)
    stop.set()
    for thread in threads:
        thread.join(20)
    assert not errors
    client.start()
    client.wait_for(writer.put("first", 7), timeout_s=10)
    assert client.view()["first"] == 7
    client.close()


def test_a_follower_thread_that_dies_is_replaced(
    client: ConfigClient, writer: ConfigClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = client._follower
    assert dead is not None

    def die(*_: Any) -> None:
        raise SystemExit  # what no `except Exception` catches

    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # its death is the test's own doing
    monkeypatch.setattr(dead, "_told", die)
    revision = writer.put("first", 2)
    wait_until(lambda: not dead.alive, 10, reason="the thread to die")
    client.wait_for(revision, timeout_s=10)
    assert client.view()["first"] == 2


def test_a_thread_that_cannot_be_started_fails_no_request_and_is_tried_again(
    url: str, writer: ConfigClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = ConfigClient(url, start_timeout_s=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_threads)
        with client.pinned() as view, pytest.raises(NotReady):
            view["first"]
    client.wait_ready()
    assert client.view()["first"] == 1
    client.close()


def _no_threads(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_who_gives_up_waiting_is_forgotten(client: ConfigClient) -> None:
    async def give_up() -> None:
        for _ in range(20):
            with pytest.raises(RevisionTimeout):
                await client.await_for(10**9, timeout_s=0.001)

    asyncio.run(give_up())
    with pytest.raises(RevisionTimeout):
        client.wait_for(10**9, timeout_s=0.001)
    assert len(client._waiters) == 0


def test_a_closed_client_stays_closed_until_the_caller_starts_it(client: ConfigClient, writer: ConfigClient) -> None:
    client.close()
    writer.put("first", 2)
    for _ in range(40):
        assert client.view()["first"] == 1
    assert client.snapshot["first"] == 1
    with pytest.raises(RevisionTimeout, match="closed"):
        client.wait_for(99, timeout_s=0.01)
    assert client._follower is None
    client.wait_ready()
    wait_until(lambda: client.view()["first"] == 2, 10, reason="the change made meanwhile")


def test_a_forked_child_waits_for_its_own_first_list(url: str) -> None:
    """The parent found no store and gave up; the child is a life of its own."""
    client = ConfigClient(url, start_timeout_s=0.01)
    with client.pinned() as view, pytest.raises(NotReady):
        view["first"]
    client.start_timeout_s = 20  # enough for a slow machine; the parent's own time is over

    def in_the_child() -> Any:
        # Written here: what the parent's follower finds between a write and the fork, the child would begin with.
        other = ConfigClient(url)
        other.put("first", 1)
        other.close()
        with client.pinned() as view:
            return view["first"]

    assert in_child(in_the_child) == 1
    client.close()


def test_subscribers_hear_after_a_restart_what_came_while_they_were_busy(
    client: ConfigClient, writer: ConfigClient
) -> None:
    busy, go_on, heard = threading.Event(), threading.Event(), []

    def slow(changes: tuple[Change, ...], snapshot: Snapshot) -> None:
        heard.append(snapshot["first"])
        busy.set()
        assert go_on.wait(20)

    client.subscribe("", slow)
    client.wait_for(writer.put("first", 2))
    assert busy.wait(10)
    client.wait_for(writer.put("first", 3))
    client.close()
    go_on.set()
    client.start()
    wait_until(lambda: heard[-1] == 3, 10, reason="the last value to be heard")


def test_threads_that_fork_at_once_leave_every_follower_running(client: ConfigClient, writer: ConfigClient) -> None:
    def fork_some() -> None:
        for _ in range(6):
            in_child(lambda: 1)

    with ConfigClient("memory://") as other:
        other.wait_ready()
        threads = [threading.Thread(target=fork_some) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        client.wait_for(writer.put("first", 9), timeout_s=10)
        other.wait_for(other.put("k", 1), timeout_s=10)


@dataclass(frozen=True)
class Range:
    lo: int = 0
    hi: int = 10

    def __post_init__(self) -> None:
        if self.lo > self.hi:
            raise ValueError("lo is above hi")


def test_a_write_is_judged_with_the_one_that_this_process_made_just_before(url: str, writer: ConfigClient) -> None:
    with ConfigClient(url, schemas={"r/": Range}) as client:
        client.wait_ready()
        for number in range(10):
            client.write([Put("r/lo", 0), Put("r/hi", 10)])
            client.put("r/hi", 100 + number)
            client.put("r/lo", 50)


def test_with_a_last_known_good_requests_still_wait_for_the_store_that_answers(
    tmp_path: Path, url: str, writer: ConfigClient
) -> None:
    """A deploy must not serve yesterday's values once in each worker."""
    with ConfigClient(url, last_known_good=tmp_path / "kept") as client:
        client.wait_ready()
        client.wait_for(writer.put("first", 2))
    writer.put("first", 3)
    for _ in range(5):
        client = ConfigClient(url, last_known_good=tmp_path / "kept")
        with client.pinned() as view:
            assert (view["first"], view.origin) == (3, "sqlite")
        client.close()


def test_a_store_that_is_not_the_one_the_file_was_saved_from_is_said(
    tmp_path: Path, url: str, writer: ConfigClient, caplog: pytest.LogCaptureFixture
) -> None:
    with ConfigClient(url, last_known_good=tmp_path / "kept") as client:
        client.wait_ready()
    other = ConfigClient(f"sqlite:///{tmp_path}/other.db")
    other.put("another", 1)
    other.close()
    with ConfigClient(f"sqlite:///{tmp_path}/other.db", last_known_good=tmp_path / "kept") as client:
        wait_until(lambda: client.view().origin == "sqlite", 10, reason="the first list")
    assert "veltrix.restored" in caplog.text


def test_the_status_can_be_sent_as_json_also_before_anything_is_known(url: str, writer: ConfigClient) -> None:
    writer.put("pay/limit", "many")
    client = ConfigClient(url, schemas={"pay/limit": int})
    assert json.loads(json.dumps(client.status().as_dict(), allow_nan=False))["age_s"] is None
    client.wait_ready()
    told = json.loads(json.dumps(client.status().as_dict(), allow_nan=False))
    assert told["age_s"] >= 0
    assert told["rejected"]["pay/limit"]["revision"] == 2
    assert told["tiers"][0]["name"] == "sqlite"
    assert told["lazy"] is None
    client.close()
