"""Events in the log: fields, trace ids, no secrets, no more lines than help, and no lock held while they are logged."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from tests.support.forking import forked
from tests.support.waiting import wait_until
from veltrix_mw import ConfigClient, StoreUnavailable, events
from veltrix_mw.disk import LastKnownGood, Saved
from veltrix_mw.events import BURST, MOST_KEPT, WINDOW_S, Events, Limit, settle, told_after
from veltrix_mw.faults import without_credentials
from veltrix_mw.forking import around_forks
from veltrix_mw.keyspace import Keyspace
from veltrix_mw.lapses import Lapses
from veltrix_mw.protocols import Batch, Confirmation, Listing, Position, RawChange
from veltrix_mw.replica import Begun, Confirmed, Failed, Listed, Received, Replica, Slept, Watching
from veltrix_mw.snapshot import Snapshot
from veltrix_mw.stores.memory import MemoryStore
from veltrix_mw.subscriptions import Subscriptions
from veltrix_mw.validation import Schemas

WITHIN_S = 10.0
TRACE_ID, SPAN_ID = 0x5B8AA5A2D2C872E8321CF37308D69DF2, 0x051581BF3CB55C13


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Log(logging.Handler):
    """What was logged; `at_each` runs in the middle of it."""

    def __init__(self, at_each: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.at_each = at_each

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.at_each()

    @property
    def lines(self) -> list[str]:
        return [record.getMessage() for record in self.records]

    def take(self) -> list[str]:
        lines = self.lines
        self.records.clear()
        return lines

    def of(self, event: str) -> list[logging.LogRecord]:
        return [record for record in list(self.records) if record.__dict__["event"] == event]


@pytest.fixture
def log() -> Iterator[Log]:
    handler, logger = Log(), logging.getLogger("veltrix_mw")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told(clock: Clock, log: Log) -> Events:
    """Of a limit of its own, by the test's clock."""
    return Events(limit=Limit(clock))


def due(told: Events) -> None:
    events._settle(told._limit)


def fails(told: Events, **fields: Any) -> None:
    """A fault that is told each time again while it lasts."""
    told.tell("veltrix.fill_failed", logging.WARNING, **fields)


def begins(told: Events, reason: str = "away") -> None:
    """A fault that is told once, when it begins."""
    told.tell("veltrix.store_failed", logging.WARNING, once=True, reason=reason)


def ends(told: Events) -> None:
    told.tell("veltrix.store_answers", logging.INFO, once=True)


# A line


def test_a_line_is_the_event_its_fields_and_what_people_should_know(log: Log) -> None:
    told = Events(part="follower", namespace="shop", tier="redis")
    told.tell(
        "veltrix.store_failed", logging.WARNING, "see to it", about={"revision": 7}, reason="50% gone", error="Gone"
    )
    (record,) = log.records
    assert record.getMessage() == "veltrix.store_failed reason='50% gone' error=Gone: see to it"
    fields = {
        "event": "veltrix.store_failed",
        "part": "follower",
        "namespace": "shop",
        "tier": "redis",
        "revision": 7,
        "reason": "50% gone",
        "error": "Gone",
    }
    assert record.__dict__["veltrix"] == fields
    assert {name: record.__dict__[name] for name in fields} == fields
    assert (record.levelname, record.name, record.filename) == ("WARNING", "veltrix_mw", Path(__file__).name)
    assert record.funcName == "test_a_line_is_the_event_its_fields_and_what_people_should_know"
    assert not {"suppressed", "late_s", "trace_id", "span_id"} & record.__dict__.keys()


def test_lines_of_one_event_have_one_template(log: Log) -> None:
    Events().tell("veltrix.relist", logging.WARNING, reason="a gap")
    Events().tell("veltrix.relist", logging.WARNING, reason="100%s")
    assert [record.msg for record in log.records] == ["veltrix.relist%s"] * 2
    assert log.lines[1] == "veltrix.relist reason='100%s'"


def test_an_own_field_of_an_event_comes_before_what_it_is_told_about(log: Log) -> None:
    Events(revision=1).tell("veltrix.rejected", logging.WARNING, about={"revision": 2}, revision=3)
    assert log.records[0].__dict__["revision"] == 3


@contextlib.contextmanager
def span() -> Iterator[None]:
    told = SpanContext(TRACE_ID, SPAN_ID, is_remote=False, trace_flags=TraceFlags(1))
    token = otel_context.attach(trace.set_span_in_context(NonRecordingSpan(told)))
    try:
        yield
    finally:
        otel_context.detach(token)


def test_a_line_has_the_ids_of_the_span_that_is_current(log: Log) -> None:
    with span():
        Events().tell("veltrix.relist", logging.WARNING)
    (record,) = log.records
    assert record.__dict__["trace_id"] == "5b8aa5a2d2c872e8321cf37308d69df2"
    assert record.__dict__["span_id"] == "051581bf3cb55c13"


@contextlib.contextmanager
def records_with(**attributes: object) -> Iterator[None]:
    """An application's record factory, as OpenTelemetry's instrumentation of logging has one."""
    before = logging.getLogRecordFactory()

    def make(*args: Any, **options: Any) -> logging.LogRecord:
        record = before(*args, **options)
        record.__dict__.update(attributes)
        return record

    logging.setLogRecordFactory(make)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)


def test_the_ids_are_left_to_the_instrumentation_of_logging_where_it_has_them(log: Log) -> None:
    with span(), records_with(otelTraceID="5b8aa5a2d2c872e8321cf37308d69df2"):
        Events().tell("veltrix.relist", logging.WARNING)
    with span(), records_with(otelTraceID="0"):  # it found none where the line was logged later
        Events().tell("veltrix.relist", logging.WARNING)
    first, second = log.records
    assert "trace_id" not in first.__dict__
    assert second.__dict__["trace_id"] == "5b8aa5a2d2c872e8321cf37308d69df2"


def test_attributes_that_the_applications_records_have_stay_theirs(log: Log) -> None:
    with records_with(reason="theirs", event="theirs"):
        Events().tell("veltrix.relist", logging.WARNING, reason="ours")
    (record,) = log.records
    assert record.__dict__["reason"] == record.__dict__["event"] == "theirs"
    assert record.__dict__["veltrix"] == {"event": "veltrix.relist", "reason": "ours"}


def test_what_handlers_and_filters_raise_harms_nobody(log: Log) -> None:
    def fail(*_: object) -> bool:
        raise KeyError("theirs")

    log.at_each = fail
    Events().tell("veltrix.relist", logging.WARNING)
    logger = logging.getLogger("veltrix_mw")
    logger.addFilter(fail)
    try:
        Events().tell("veltrix.relist", logging.WARNING)
    finally:
        logger.removeFilter(fail)
    assert log.lines == ["veltrix.relist"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events.trace, "get_current_span", fail)
        Events().tell("veltrix.relist", logging.WARNING)


def test_what_nobody_wants_to_hear_costs_no_line_and_counts_as_none(told: Events, log: Log) -> None:
    logging.getLogger("veltrix_mw").setLevel(logging.ERROR)
    fails(told)
    fails(told)
    logging.getLogger("veltrix_mw").setLevel(logging.INFO)
    fails(told)
    assert log.lines == ["veltrix.fill_failed"]


# The limit


def test_the_first_is_told_at_once_and_the_next_line_counts_the_repeats(told: Events, clock: Clock, log: Log) -> None:
    for number in range(5):
        fails(told, units=number)
        clock.now_s += 1
    assert log.take() == ["veltrix.fill_failed units=0"]
    clock.now_s += WINDOW_S
    fails(told, units=5)
    (record,) = log.records
    assert record.getMessage() == "veltrix.fill_failed units=5 suppressed=4"
    assert record.__dict__["suppressed"] == record.__dict__["veltrix"]["suppressed"] == 4


def test_the_last_that_was_held_back_is_told_at_the_windows_end(told: Events, clock: Clock, log: Log) -> None:
    for number in range(4):
        fails(told, units=number)
        clock.now_s += 1
    log.take()
    clock.now_s += WINDOW_S - 5
    due(told)
    assert log.lines == []
    clock.now_s += 1.5
    due(told)
    due(told)
    assert log.take() == ["veltrix.fill_failed units=3 suppressed=2 late_s=57.5"]
    fails(told, units=4)  # that line was one like others
    assert log.lines == []


def test_another_event_has_the_due_lines_told_too(told: Events, clock: Clock, log: Log) -> None:
    fails(told)
    fails(told)
    clock.now_s += WINDOW_S
    told.tell("veltrix.relist", logging.WARNING)
    assert log.lines == ["veltrix.fill_failed", "veltrix.relist", "veltrix.fill_failed late_s=60.0"]


def test_an_end_is_told_at_once_with_the_count_and_what_fails_anew_is_too(told: Events, log: Log) -> None:
    for _ in range(3):
        fails(told)
    told.tell_end("veltrix.filled")
    fails(told)
    assert log.lines == [
        "veltrix.fill_failed",
        "veltrix.filled suppressed=2",
        "veltrix.fill_failed",
    ]


def test_an_end_that_is_only_told_after_its_fault_is_not_told_without(told: Events, log: Log) -> None:
    told.tell_end("veltrix.filled")
    assert log.lines == []
    fails(told)
    told.tell_end("veltrix.filled")
    told.tell_end("veltrix.filled")
    assert log.lines == ["veltrix.fill_failed", "veltrix.filled"]


def test_an_end_of_which_nothing_is_known_is_told(told: Events, log: Log) -> None:
    ends(told)
    ends(told)
    assert log.lines == ["veltrix.store_answers"] * 2


def test_one_end_may_be_that_of_several_faults(told: Events, log: Log) -> None:
    told.tell("veltrix.relay_deposed", logging.WARNING)
    told.tell("veltrix.relay_resigned", logging.WARNING)
    told.tell("veltrix.relay_resigned", logging.WARNING)
    log.take()
    told.tell("veltrix.relay_elected", logging.INFO, token=3)
    told.tell("veltrix.relay_deposed", logging.WARNING)
    told.tell("veltrix.relay_resigned", logging.WARNING)
    assert log.lines == [
        "veltrix.relay_elected token=3 suppressed=1",
        "veltrix.relay_deposed",
        "veltrix.relay_resigned",
    ]


def test_an_event_may_end_itself_by_its_level(told: Events, log: Log) -> None:
    for level in (logging.WARNING, logging.WARNING, logging.INFO, logging.WARNING):
        told.tell("veltrix.failover", level)
    assert [record.levelname for record in log.records] == ["WARNING", "INFO", "WARNING"]


def test_what_is_told_once_is_told_at_once_however_soon_it_comes_back(told: Events, log: Log) -> None:
    for _ in range(BURST):
        begins(told)
        ends(told)
    assert log.lines == ["veltrix.store_failed reason='away'", "veltrix.store_answers"] * BURST


def test_what_comes_and_goes_is_told_as_it_stands_once_a_line_is_free(told: Events, clock: Clock, log: Log) -> None:
    for _ in range(BURST + 3):
        clock.now_s += 1
        begins(told)
        ends(told)
    begins(told, "gone for good")
    assert len(log.take()) == 2 * BURST
    clock.now_s = 1001 + WINDOW_S
    due(told)
    assert log.take() == ["veltrix.store_failed reason='gone for good' suppressed=6 late_s=53.0"]
    ends(told)
    assert log.lines == ["veltrix.store_answers"]


def test_that_it_was_over_is_told_where_only_its_beginning_was_held_back(told: Events, clock: Clock, log: Log) -> None:
    for _ in range(BURST + 1):
        begins(told)
        ends(told)
    log.take()
    due(told)
    assert log.lines == []
    clock.now_s += WINDOW_S
    due(told)
    assert log.lines == ["veltrix.store_answers suppressed=1 late_s=60.0"]


def test_what_comes_and_goes_for_ever_fills_no_disk(told: Events, clock: Clock, log: Log) -> None:
    for _ in range(1800):
        clock.now_s += 1
        begins(told)
        clock.now_s += 1
        ends(told)
        due(told)
    hours = (clock.now_s - 1000) / 3600
    assert hours == 1
    assert BURST * 60 <= len(log.lines) <= 2 * BURST * 61


@pytest.mark.parametrize("seed", range(20))
def test_the_logs_last_line_is_true_in_the_end_and_no_line_is_lost_uncounted(seed: int) -> None:
    random, clock, log = Random(seed), Clock(), Log()
    told, logger = Events("veltrix_mw.seeded", limit=Limit(clock)), logging.getLogger("veltrix_mw.seeded")
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        lasts, tellings = False, 0
        for _ in range(random.randrange(200)):
            clock.now_s += random.choice([0.0, 0.1, 5.0, 30.0])
            lasts = not lasts
            (begins if lasts else ends)(told)
            tellings += 1
            if random.random() < 0.3:
                due(told)
        clock.now_s += WINDOW_S
        due(told)
    finally:
        logger.removeHandler(log)
    if tellings:
        expected = "veltrix.store_failed" if lasts else "veltrix.store_answers"
        assert log.records[-1].__dict__["event"] == expected
    assert tellings == len(log.records) + sum(record.__dict__.get("suppressed", 0) for record in log.records)


def test_each_event_each_key_and_each_part_is_limited_by_itself(clock: Clock, log: Log) -> None:
    limit = Limit(clock)
    for told in (Events(limit=limit), Events(limit=limit)):
        for key in ("a", "b"):
            for _ in range(2):
                told.tell("veltrix.rejected", logging.WARNING, key=key)
        told.tell("veltrix.relist", logging.WARNING)
    assert log.lines == ["veltrix.rejected key='a'", "veltrix.rejected key='b'", "veltrix.relist"] * 2


def test_what_is_kept_is_bounded_and_so_is_what_is_logged(told: Events, clock: Clock, log: Log) -> None:
    for number in range(3 * MOST_KEPT):
        told.tell("veltrix.rejected", logging.WARNING, once=True, key=str(number))
    kept = told._limit._faults
    assert len(kept) == MOST_KEPT + 1
    assert len(log.records) == MOST_KEPT + BURST
    clock.now_s += WINDOW_S
    due(told)
    assert (
        log.lines[-1]
        == f"veltrix.rejected key='{3 * MOST_KEPT - 1}' suppressed={2 * MOST_KEPT - BURST - 1} late_s=60.0"
    )
    told.tell("veltrix.rejected", logging.WARNING, once=True, key="new")
    assert len(kept) <= 2  # what is over is forgotten once there is no room
    told.tell("veltrix.accepted", logging.INFO, key="1")
    assert log.lines[-1] == "veltrix.accepted key='1'"  # its end is told all the same


def test_what_is_forgotten_is_not_what_an_end_waits_for(clock: Clock, log: Log) -> None:
    limit = Limit(clock)
    told = Events(limit=limit)
    fails(told)
    clock.now_s += 2 * WINDOW_S
    for number in range(MOST_KEPT + 1):
        Events(limit=limit).tell("veltrix.rejected", logging.WARNING, once=True, key=str(number))
    log.take()
    told.tell_end("veltrix.filled")
    assert log.lines == ["veltrix.filled"]


def test_repeats_of_many_threads_are_all_counted(told: Events, clock: Clock, log: Log) -> None:
    barrier = threading.Barrier(8)

    def tell() -> None:
        barrier.wait()
        for _ in range(100):
            fails(told)

    threads = [threading.Thread(target=tell) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clock.now_s += WINDOW_S
    fails(told)
    assert log.lines == ["veltrix.fill_failed", "veltrix.fill_failed suppressed=799"]


def test_a_finalizer_in_the_middle_may_tell_something_too(told: Events, log: Log) -> None:
    class Telling:
        def __del__(self) -> None:
            told.tell("veltrix.relist", logging.WARNING)

    with told._limit._lock:
        thing: Any = Telling()
        thing.itself = thing
        del thing
        gc.collect()
    assert log.lines == ["veltrix.relist"]


# Forks


def test_a_forked_child_tells_anew_whoever_held_the_lock(told: Events, clock: Clock, log: Log) -> None:
    fails(told)
    fails(told)  # the parent's to tell
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with told._limit._lock:
            held.set()
            go_on.wait(WITHIN_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(WITHIN_S)

    def child() -> bool:
        log.records.clear()
        clock.now_s += WINDOW_S
        told.tell_end("veltrix.filled")  # of the parent's fault
        due(told)
        fails(told, units=1)
        return log.lines == ["veltrix.fill_failed units=1"]

    try:
        assert forked(child)
    finally:
        go_on.set()
        thread.join()
    clock.now_s += WINDOW_S
    due(told)
    assert log.lines == ["veltrix.fill_failed", "veltrix.fill_failed late_s=60.0"]


def test_a_fork_hook_that_fails_is_told_when_the_fork_is_over(log: Log) -> None:
    from veltrix_mw import forking

    free: list[bool] = []
    log.at_each = lambda: free.append(is_free(forking._forking))

    def fail() -> None:
        raise RuntimeError("hunter2")

    before = list(forking._hooks)
    around_forks(0, before=fail, after_in_parent=fail, after_in_child=fail)
    try:

        def child() -> bool:
            (fault,) = events._limit._faults.values()
            return log.lines == ["veltrix.fork_hook_failed error=RuntimeError"] and fault.held == 0

        assert forked(child)
    finally:
        forking._hooks[:] = before
    assert log.lines == ["veltrix.fork_hook_failed error=RuntimeError"]
    assert free == [True]
    (fault,) = events._limit._faults.values()
    assert fault.held == 1  # of `before` and of after it


# Locks


def is_free(lock: Any) -> bool:
    """Whether another thread can have the lock now."""
    found: list[bool] = []

    def look() -> None:
        found.append(lock.acquire(blocking=False))
        if found[0]:
            lock.release()

    thread = _Thread(target=look)
    _start(thread)
    thread.join()
    return found[0]


_Thread, _start = threading.Thread, threading.Thread.start


def refuse(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def free_while_logging(log: Log, event: str, locks: Sequence[Any], tell: Callable[[], object]) -> list[bool]:
    """Of each lock, whether it was free as the event was logged; threads cannot be started meanwhile."""
    found: list[bool] = []

    def look() -> None:
        if log.records[-1].__dict__["event"] == event:
            found.extend(is_free(lock) for lock in locks)

    log.at_each = look
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        tell()
    return found


def test_lapses_hold_no_lock_while_they_log_and_tell_when_there_is_a_thread(log: Log, clock: Clock) -> None:
    lapses = Lapses(clock)
    assert free_while_logging(log, "veltrix.lapses_not_started", [lapses._changed], lapses.start) == [True]
    lapses.start()
    lapses.stop()
    assert log.lines == [f"veltrix.lapses_not_started: {events.NO_THREAD}", "veltrix.lapses_started"]


def test_the_last_known_good_holds_no_lock_while_it_logs(log: Log, tmp_path: Path) -> None:
    file = LastKnownGood(tmp_path, namespace="shop", origin_url="memory://")

    def offer() -> None:
        file.offer(lambda: Saved(Position("one", 1, ""), 0, 1.0, []))

    assert free_while_logging(log, "veltrix.last_known_good_unsaved", [file._changed], offer) == [True]
    offer()
    assert file.flush(WITHIN_S)
    file.close(WITHIN_S)
    wait_until(lambda: log.of("veltrix.last_known_good_saved"), WITHIN_S, reason="that it is saved again is told")
    assert log.records[0].name == "veltrix_mw.disk"
    assert log.records[0].__dict__["reason"] == f"{file.path} was not saved: {events.NO_THREAD}"


def test_a_disk_that_fails_again_for_the_same_reason_is_told_again(log: Log, tmp_path: Path) -> None:
    file = LastKnownGood(tmp_path / "f", namespace="shop", origin_url="memory://", min_interval_s=0.0)
    for revision in (1, 2):
        blocked = tmp_path / "f"
        if blocked.exists():
            blocked.rename(tmp_path / "aside")
        blocked.write_text("a file where the folder should be")
        file.offer(lambda at=revision: Saved(Position("one", at, ""), 0, 1.0, []))
        assert not file.flush(WITHIN_S)
        blocked.unlink()
        assert file.flush(WITHIN_S)
    file.close(WITHIN_S)
    assert [record.__dict__["event"] for record in log.records] == [
        "veltrix.last_known_good_unsaved",
        "veltrix.last_known_good_saved",
    ] * 2


def test_subscriptions_hold_no_lock_while_they_log(log: Log) -> None:
    heard = Subscriptions()
    heard.add("", lambda *_: None, Snapshot())
    (subscription,) = heard._all

    def offer() -> None:
        heard.offer(_snapshot(1), None)

    locks = [heard._lock, subscription._condition]
    assert free_while_logging(log, "veltrix.subscriber_not_started", locks, offer) == [True, True]
    offer()
    assert log.lines[-1] == "veltrix.subscriber_started prefix=''"


def test_a_callback_that_fails_at_each_change_is_told_once_and_when_it_works_again(log: Log) -> None:
    calls: list[int] = []

    def callback(_: object, now: Snapshot) -> None:
        calls.append(now.revision)
        if now.revision < 4:
            raise RuntimeError("hunter2")

    heard = Subscriptions()
    heard.add("", callback, Snapshot())
    for revision in (1, 2, 3, 4, 5):
        heard.offer(_snapshot(revision), None)
        wait_until(lambda at=revision: calls[-1:] == [at], WITHIN_S, reason="the callback hears of it")
    heard.close()
    wait_until(lambda: not heard._all[0]._running, WITHIN_S, reason="its thread ends")
    assert [line.split(" error")[0] for line in log.lines] == [
        "veltrix.subscriber_failed prefix=''",
        "veltrix.subscriber_recovered prefix='' suppressed=2",
    ]
    assert "hunter2" not in "".join(log.lines)


def _snapshot(revision: int) -> Snapshot:
    keyspace = Keyspace(Schemas({}, layers=(), defaults={}))
    at = Position("label", revision, "")
    keyspace.restore(Listing(at, [("a", b"1", revision)]), incarnation="label", origin="memory", proved_at_s=0.0)
    return keyspace.snapshot


def test_a_client_holds_no_lock_while_it_logs_and_tells_when_there_is_a_thread(log: Log) -> None:
    from veltrix_mw.client import _process_lock

    with ConfigClient("memory://events-locks?namespace=shop") as writer:
        writer.put("a", 1)
    client = ConfigClient("memory://events-locks?namespace=shop")
    locks = [_process_lock(), client._lock]
    assert free_while_logging(log, "veltrix.follower_not_started", locks, client.start) == [True, True]
    with client:
        client.wait_ready(WITHIN_S)
        assert len(log.of("veltrix.follower_started")) == 1


def test_what_is_told_around_a_lock_is_logged_after_it_by_the_outermost_block(log: Log) -> None:
    told = Events()
    with told_after():
        with told_after():
            told.tell("veltrix.relist", logging.WARNING)
        # Of a thread that inherits the context, as they do where Python has no global lock.
        inherited = contextvars.copy_context()
        thread = threading.Thread(target=inherited.run, args=(told.tell, "veltrix.watch_dead", logging.WARNING))
        thread.start()
        thread.join()
        assert log.lines == ["veltrix.watch_dead"]
    assert log.take() == ["veltrix.watch_dead", "veltrix.relist"]
    with pytest.raises(ZeroDivisionError), told_after():
        told.tell("veltrix.restored", logging.WARNING)
        raise ZeroDivisionError
    assert log.lines == ["veltrix.restored"]


# Secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://ops:hunter2@h:6379/0 is away", "redis://h:6379/0 is away"),
        ("'etcd://u:p@ss/w?rd:@h1,h2/shop'", "'etcd://h1,h2/shop'"),
        ("redis://:hun'ter2@h and redis://u:p@i", "redis://h and redis://i"),
        ("redis://h/0?password=hunter2&db=1", "redis://h/0?password=***&db=1"),
        ("sentinel_password=hunter2, PASSWORD=hunter2", "sentinel_password=***, PASSWORD=***"),
        ("give user and password: etcd://USER:PASSWORD@HOST", "give user and password: etcd://USER:PASSWORD@HOST"),
        ("?password_env=NAME or me@example.com", "?password_env=NAME or me@example.com"),
        ("http://example.com/ as ops@h", "http://example.com/ as ops@h"),
    ],
)
def test_credentials_are_cut_from_what_others_wrote(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_credentials_are_cut_from_every_part_of_a_line(log: Log) -> None:
    url = "redis://ops:hunter2@h/0"
    Events(url=url).tell("veltrix.relist", logging.WARNING, url, about={"tier": url}, reason=url)
    (record,) = log.records
    assert "hunter2" not in record.getMessage() + repr(record.__dict__)


@pytest.mark.parametrize(
    ("url", "mirror"),
    [
        ("redis://ops:hunter2@127.0.0.1:{port}/0?namespace=shop", ""),
        ("redis://127.0.0.1:{port}/0?namespace=shop&user=ops&password=hunter2", ""),
        ("rediss://ops:hunter2@127.0.0.1:{port}/0?namespace=shop", ""),
        ("redis+sentinel://ops:hunter2@127.0.0.1:{port}/m/0?namespace=shop&sentinel_password=hunter2", ""),
        ("redis+cluster://ops:hunter2@127.0.0.1:{port}?namespace=shop", ""),
        ("etcd://ops:hunter2@127.0.0.1:{port}/shop", "redis://ops:hunter2@127.0.0.1:{port}/0"),
        ("etcds://ops:hunter2@127.0.0.1:{port}/shop?transport=grpc", ""),
    ],
)
def test_no_password_of_a_url_comes_into_log_status_or_exception(
    url: str, mirror: str, free_port: int, log: Log
) -> None:
    client = ConfigClient(url.format(port=free_port), mirror=mirror.format(port=free_port))
    with client:
        with pytest.raises(StoreUnavailable) as raised:
            client.put("a", 1)
        wait_until(lambda: log.of("veltrix.store_failed"), WITHIN_S, reason="the store is away")
        shown = [*log.lines, *(repr(record.__dict__) for record in log.records), repr(client.status()), repr(client)]
    error: BaseException | None = raised.value
    while error is not None:
        shown.append(f"{error} {error!r}")
        error = error.__cause__ or error.__context__
    assert "hunter2" not in "\n".join(shown)


def test_no_value_comes_into_the_log_of_what_is_held_back(log: Log) -> None:
    writer = ConfigClient("memory://events-values?namespace=shop")
    worker = ConfigClient("memory://events-values?namespace=shop", schemas={"n": {"type": "integer"}})
    with writer, worker:
        worker.wait_ready(WITHIN_S)
        worker.wait_for(writer.put("n", "hunter2"), WITHIN_S)
        worker.wait_for(writer.put("n", {"hunter2": ["hunter2"]}), WITHIN_S)
        worker.wait_for(writer.put("n", 3), WITHIN_S)
        wait_until(lambda: log.of("veltrix.accepted"), WITHIN_S, reason="the key is held back no more")
    rejected = log.of("veltrix.rejected")
    assert [record.__dict__["revision"] for record in rejected] == [1, 2]
    assert all("integer" in record.__dict__["reason"] for record in rejected)
    assert "hunter2" not in "".join(log.lines) + repr([record.__dict__ for record in log.records])


# What tells the end of what


AT = Position("label", 1, "mark")


def following() -> Replica:
    replica = Replica(
        Keyspace(Schemas({"n": {"type": "integer"}}, layers=(), defaults={})), origin="etcd", random=Random(1)
    )
    replica.handle(Begun(0.0))
    replica.handle(Listed(0.0, 0.0, Listing(AT, [("n", b"1", 1)])))
    replica.handle(Watching(0.0))
    return replica


def names(decision: Any) -> list[str]:
    return [notice.event for notice in decision.notices]


def test_a_store_that_answers_again_is_told_once() -> None:
    replica = following()
    assert names(replica.handle(Failed(1.0, StoreUnavailable("away")))) == ["veltrix.store_failed"]
    replica.handle(Slept(1.1))
    assert names(replica.handle(Failed(1.2, StoreUnavailable("away")))) == []
    replica.handle(Slept(1.3))
    assert names(replica.handle(Watching(1.4))) == []  # it took the watch, and may fail it at once
    assert names(replica.handle(Received(1.5, []))) == ["veltrix.store_answers"]
    assert names(replica.handle(Received(1.6, []))) == []
    assert names(replica.handle(Failed(2.0, StoreUnavailable("away")))) == ["veltrix.store_failed"]


def test_a_first_list_that_comes_at_last_is_told() -> None:
    replica = Replica(Keyspace(Schemas({}, layers=(), defaults={})), origin="etcd", random=Random(1))
    replica.handle(Begun(0.0))
    assert names(replica.handle(Failed(1.0, StoreUnavailable("away")))) == ["veltrix.store_failed"]
    replica.handle(Slept(1.1))
    assert names(replica.handle(Listed(1.2, 1.1, Listing(AT, [])))) == ["veltrix.store_answers"]


def test_a_store_that_confirms_again_is_told_once() -> None:
    replica = following()
    replica.handle(Received(10.0, []))
    assert names(replica.handle(Failed(10.1, StoreUnavailable("no answer")))) == ["veltrix.confirm_failed"]
    replica.handle(Received(20.0, []))
    said = Confirmation("label", 1, 1)
    assert names(replica.handle(Confirmed(20.1, 20.0, said))) == ["veltrix.confirmed"]
    replica.handle(Received(30.0, []))
    assert names(replica.handle(Confirmed(30.1, 30.0, said))) == []


def _batch(revision: int, key: str, value: bytes) -> Batch:
    return Batch(Position("label", revision, f"mark-{revision}"), revision - 1, [RawChange(key, value)])


def test_a_key_that_is_held_back_no_more_is_told_whether_the_watch_or_a_list_brings_it() -> None:
    replica = following()
    assert names(replica.handle(Received(1.0, [_batch(2, "n", b'"x"')]))) == ["veltrix.rejected"]
    decision = replica.handle(Received(2.0, [_batch(3, "n", b"2")]))
    assert [(notice.event, dict(notice.fields)) for notice in decision.notices] == [("veltrix.accepted", {"key": "n"})]
    replica.handle(Received(3.0, [_batch(4, "n", b'"x"')]))
    replica.handle(Failed(4.0, StoreUnavailable("away")))
    listed = Listed(5.0, 4.9, Listing(Position("label", 5, "mark-5"), [("n", b"5", 5)]))
    assert names(replica.handle(listed)) == ["veltrix.accepted", "veltrix.store_answers"]


class Away(MemoryStore):
    """A store that is away until it is not."""

    is_away = True

    def list(self, *, timeout_s: float) -> Listing:
        if self.is_away:
            raise StoreUnavailable("away")
        return super().list(timeout_s=timeout_s)


def test_a_client_that_was_not_ready_tells_when_it_is_and_all_fields_say_whose_it_is(log: Log) -> None:
    store = Away()
    with ConfigClient(store, start_timeout_s=0.01) as client:
        client.wait_start()
        store.is_away = False
        client.wait_ready(WITHIN_S)
        wait_until(lambda: log.of("veltrix.ready"), WITHIN_S, reason="that it is ready is told")
        wait_until(lambda: log.of("veltrix.store_answers"), WITHIN_S, reason="that the store answers is told")
    assert [record.__dict__["event"] for record in log.records if record.__dict__["part"] == "client"] == [
        "veltrix.not_ready",
        "veltrix.ready",
    ]
    (failed,) = log.of("veltrix.store_failed")
    told = failed.__dict__
    assert (told["part"], told["namespace"], told["tier"]) == ("follower", store.info.namespace, "memory")
    assert (told["revision"], told["origin"], told["reason"], told["error"]) == (0, "none", "away", "StoreUnavailable")
    assert failed.getMessage() == "veltrix.store_failed reason='away' error=StoreUnavailable"


def test_the_first_write_to_an_unwritten_namespace_is_told(log: Log, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/config.db?namespace=shop"
    other = ConfigClient(f"sqlite:///{tmp_path}/config.db?namespace=other")
    other.put("a", 1)  # the file is there
    other.close()
    with ConfigClient(url) as client:
        client.wait_ready(WITHIN_S)
        wait_until(lambda: log.of("veltrix.unwritten"), WITHIN_S, reason="that nothing was written is told")
        client.wait_for(client.put("a", 1), WITHIN_S)
        wait_until(lambda: log.of("veltrix.written"), WITHIN_S, reason="the first write is told")
        client.wait_for(client.put("a", 2), WITHIN_S)
    assert len(log.of("veltrix.written")) == 1


def test_a_follower_has_the_due_lines_told_by_its_next_step(log: Log, clock: Clock, monkeypatch: Any) -> None:
    monkeypatch.setattr(events._limit, "clock", clock)
    told = Events()
    with ConfigClient("memory://events-due?namespace=shop") as client:
        client.wait_for(client.put("a", 1), WITHIN_S)
        fails(told)
        fails(told)
        clock.now_s += WINDOW_S
        client.wait_for(client.put("a", 2), WITHIN_S)
        wait_until(lambda: len(log.of("veltrix.fill_failed")) == 2, WITHIN_S, reason="what was held back is told")
    assert log.records[-1].__dict__["event"] == "veltrix.fill_failed"  # the follower itself had nothing to tell
    settle()
    assert len(log.of("veltrix.fill_failed")) == 2
