"""Subscriptions: who hears of what, on which thread, and that no last state is lost."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.waiting import wait_until
from veltrix_mw import subscriptions
from veltrix_mw.snapshot import Change, Entry, Rejection, Snapshot
from veltrix_mw.sorted_map import SortedMap
from veltrix_mw.subscriptions import Subscriptions, changes_between
from veltrix_mw.values import MISSING, Missing

WITHIN_S = 10.0
Model = dict[str, tuple[Any, int]]


def snapshot(entries: Mapping[str, tuple[Any, int]], revision: int = 1, **options: Any) -> Snapshot:
    items = [(key, *entries[key]) for key in sorted(entries)]
    options = {"origin": "memory", "incarnation": "i", **options}
    return Snapshot(SortedMap.from_sorted(items), revision=revision, **options)


EMPTY = snapshot({}, 0)


class Heard:
    """A callback that keeps what it heard; it waits in its first call until it may go on."""

    def __init__(self, *, waits: bool = False) -> None:
        self.calls: list[tuple[tuple[Change, ...], Snapshot]] = []
        self.threads: list[threading.Thread] = []
        self.entered = threading.Event()
        self.may_go_on = threading.Event()
        self._condition = threading.Condition()
        if not waits:
            self.may_go_on.set()

    def __call__(self, changes: tuple[Change, ...], snapshot: Snapshot) -> None:
        self.entered.set()
        assert self.may_go_on.wait(WITHIN_S)
        with self._condition:
            self.calls.append((changes, snapshot))
            self.threads.append(threading.current_thread())
            self._condition.notify_all()

    def wait_for_calls(self, count: int) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: len(self.calls) >= count, WITHIN_S), f"{len(self.calls)} calls"

    def wait_for_revision(self, revision: int) -> None:
        with self._condition:
            assert self._condition.wait_for(
                lambda: bool(self.calls) and self.calls[-1][1].revision >= revision, WITHIN_S
            ), f"heard of {[told.revision for _, told in self.calls]}"

    def states(self) -> dict[str, Entry | Missing]:
        """The last state of each key that it heard of; every change must begin where the one before ended."""
        last: dict[str, Entry | Missing] = {}
        for changes, _ in self.calls:
            for change in changes:
                assert last.get(change.key, change.old) == change.old
                assert change.old != change.new
                last[change.key] = change.new
        return last


def ended(heard: Heard) -> bool:
    return not any(thread.is_alive() for thread in heard.threads)


# What changed

MODELS = st.dictionaries(
    st.sampled_from(["a", "a/1", "a/2", "a/b/c", "a0", "b", "b/1", "ab"]),
    st.tuples(st.one_of(st.none(), st.integers(0, 2), st.just(True)), st.integers(1, 3)),
)


@given(MODELS, MODELS, st.sampled_from(["", "a/", "b/", "a/b/", "z/"]), st.booleans())
def test_the_changes_between_two_snapshots_are_what_differs_between_two_dicts(
    before: Model, after: Model, prefix: str, named: bool
) -> None:
    wanted = tuple(
        Change(
            key,
            Entry(*before[key]) if key in before else MISSING,
            Entry(*after[key]) if key in after else MISSING,
        )
        for key in sorted(before.keys() | after.keys())
        if key.startswith(prefix) and before.get(key) != after.get(key)
    )
    changed = before.keys() | after.keys() | {"never/there"} if named else None
    assert changes_between(snapshot(before), snapshot(after), prefix, changed) == wanted
    assert changes_between(snapshot(before), snapshot(before), prefix, changed) == ()


def test_only_named_keys_are_looked_at() -> None:
    before, after = snapshot({"a": (1, 1), "b": (1, 1)}), snapshot({"a": (2, 2), "b": (2, 2)})
    assert [change.key for change in changes_between(before, after, "", {"b"})] == ["b"]
    assert changes_between(before, after, "", set()) == ()


def test_the_same_value_written_again_is_a_change_of_its_revision() -> None:
    before, after = snapshot({"a": (1, 1)}), snapshot({"a": (1, 2)})
    for changed in (None, {"a"}):
        assert changes_between(before, after, "", changed) == (Change("a", Entry(1, 1), Entry(1, 2)),)


# Hearing


def test_a_callback_hears_of_changes_below_its_prefix_alone() -> None:
    told = Subscriptions()
    heard, everything = Heard(), Heard()
    told.add("pay/", heard, EMPTY)
    told.add("", everything, EMPTY)
    first = snapshot({"pay/a": (1, 1), "pay": (1, 1), "payload": (1, 1)}, 1)
    told.offer(first, frozenset({"pay/a", "pay", "payload"}))
    # Both: one whose thread has not run by the third change would rightly hear of nothing, as its key came and went.
    heard.wait_for_calls(1)
    everything.wait_for_calls(1)
    second = snapshot({"pay/a": (1, 1)}, 2)
    told.offer(second, frozenset({"pay", "payload"}))
    everything.wait_for_calls(2)
    third = snapshot({}, 3)
    told.offer(third, None)
    heard.wait_for_calls(2)
    everything.wait_for_calls(3)
    assert heard.calls == [
        ((Change("pay/a", MISSING, Entry(1, 1)),), first),
        ((Change("pay/a", Entry(1, 1), MISSING),), third),
    ]
    assert [[change.key for change in changes] for changes, _ in everything.calls] == [
        ["pay", "pay/a", "payload"],
        ["pay", "payload"],
        ["pay/a"],
    ]
    told.close()


def test_each_callback_has_a_thread_of_its_own_that_no_process_waits_for() -> None:
    told = Subscriptions()
    one, other = Heard(waits=True), Heard()
    told.add("", one, EMPTY)
    told.add("", other, EMPTY)
    told.offer(snapshot({"a": (1, 1)}), None)
    other.wait_for_calls(1)
    one.may_go_on.set()
    one.wait_for_calls(1)
    told.offer(snapshot({"a": (1, 2)}, 2), frozenset({"a"}))
    one.wait_for_calls(2)
    other.wait_for_calls(2)
    assert len({*one.threads, *other.threads}) == 2
    assert threading.current_thread() not in {*one.threads, *other.threads}
    assert all(thread.daemon for thread in (*one.threads, *other.threads))
    told.close()


def test_no_thread_is_started_before_there_is_something_to_tell() -> None:
    told, heard = Subscriptions(), Heard()
    before = threading.active_count()
    told.add("a/", heard, EMPTY)
    told.offer(snapshot({"b": (1, 1)}), frozenset({"b"}))
    told.offer(snapshot({"b": (1, 1)}, 2), frozenset())
    assert threading.active_count() == before
    assert heard.calls == []


def test_a_change_that_is_only_a_rejection_is_not_told() -> None:
    told, heard = Subscriptions(), Heard()
    told.add("", heard, EMPTY)
    told.offer(snapshot({}, 1, rejected={"a": Rejection(1, "wrong")}), frozenset())
    told.offer(snapshot({"b": (1, 2)}, 2, rejected={"a": Rejection(1, "wrong")}), frozenset({"b"}))
    heard.wait_for_calls(1)
    assert [change.key for change in heard.calls[0][0]] == ["b"]
    told.close()


def test_a_subscription_does_not_keep_old_snapshots_alive_while_others_change() -> None:
    told, heard = Subscriptions(), Heard()

    class Value:
        pass

    value = Value()
    reference = weakref.ref(value)
    told.add("a/", heard, snapshot({"b": (value, 1)}))
    del value
    told.offer(snapshot({"b": (2, 2)}, 2), frozenset({"b"}))
    gc.collect()
    assert reference() is None


# Slow callbacks


def test_a_slow_callback_skips_states_but_hears_the_last_one_of_every_key() -> None:
    told, heard = Subscriptions(), Heard(waits=True)
    told.add("", heard, EMPTY)
    model: Model = {"a": (0, 1)}
    told.offer(snapshot(model, 1), frozenset({"a"}))
    assert heard.entered.wait(WITHIN_S)
    for revision in range(2, 200):
        key = "abcd"[revision % 4]
        if revision % 7:
            model[key] = (revision, revision)
        else:
            model.pop(key, None)
        told.offer(snapshot(model, revision), frozenset({key}))
    heard.may_go_on.set()
    heard.wait_for_revision(199)
    assert len(heard.calls) == 2
    assert {key: state for key, state in heard.states().items() if state is not MISSING} == {
        key: Entry(*entry) for key, entry in model.items()
    }
    told.close()


def test_a_key_that_came_back_to_what_was_heard_is_not_told() -> None:
    told, heard = Subscriptions(), Heard(waits=True)
    told.add("", heard, EMPTY)
    told.offer(snapshot({"a": (1, 1)}, 1), None)
    assert heard.entered.wait(WITHIN_S)
    told.offer(snapshot({"a": (1, 1), "b": (1, 2)}, 2), frozenset({"b"}))
    told.offer(snapshot({"a": (1, 1), "c": (1, 3)}, 3), frozenset({"b", "c"}))
    heard.may_go_on.set()
    heard.wait_for_calls(2)
    assert [change.key for change in heard.calls[1][0]] == ["c"]
    told.close()


def test_beyond_so_many_changed_keys_whole_snapshots_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "_MANY", 3)
    told, heard = Subscriptions(), Heard(waits=True)
    told.add("a/", heard, EMPTY)
    model: Model = {"a/0": (0, 1)}
    told.offer(snapshot(model, 1), frozenset({"a/0"}))
    assert heard.entered.wait(WITHIN_S)
    for revision in range(2, 12):
        model[f"a/{revision}"] = model[f"b/{revision}"] = (0, revision)
        told.offer(snapshot(model, revision), frozenset({f"a/{revision}", f"b/{revision}"}))
    assert told._all[0]._changed is None
    heard.may_go_on.set()
    heard.wait_for_revision(11)
    assert told._all[0]._changed == set()
    told.offer(snapshot({**model, "a/z": (0, 12)}, 12), frozenset({"a/z"}))
    heard.wait_for_revision(12)
    assert sorted(heard.states()) == sorted([*(key for key in model if key.startswith("a/")), "a/z"])
    told.close()


def test_nothing_is_lost_between_one_who_changes_and_one_who_hears() -> None:
    told, heard = Subscriptions(), Heard()
    told.add("", heard, EMPTY)
    model: Model = {}
    for revision in range(1, 2000):
        key = f"k{revision % 13}"
        if revision % 5:
            model[key] = (revision, revision)
        else:
            model.pop(key, None)
        told.offer(snapshot(model, revision), None if revision % 11 == 0 else frozenset({key}))
    told.offer(snapshot({**model, "end": (1, 2000)}, 2000), frozenset({"end"}))
    heard.wait_for_revision(2000)
    assert {key: state for key, state in heard.states().items() if state is not MISSING} == {
        **{key: Entry(*entry) for key, entry in model.items()},
        "end": Entry(1, 2000),
    }
    told.close()


# Subscribing while changes come


def test_a_change_between_the_look_at_the_snapshot_and_the_subscription_is_told() -> None:
    for before in (snapshot({}, 1), Snapshot()):
        told, heard = Subscriptions(), Heard()
        told.offer(before, None)
        after = snapshot({"a": (1, 2)}, 2)
        told.offer(after, frozenset({"a"}))
        told.add("", heard, before)
        heard.wait_for_calls(1)
        assert heard.calls == [((Change("a", MISSING, Entry(1, 2)),), after)]
        told.close()


def test_a_snapshot_newer_than_what_was_told_so_far_is_where_a_subscription_begins() -> None:
    told, heard = Subscriptions(), Heard()
    told.offer(snapshot({}, 1), None)
    newer = snapshot({"a": (1, 2)}, 2)
    told.add("", heard, newer)
    told.offer(newer, frozenset({"a"}))
    told.offer(snapshot({"a": (1, 2), "b": (1, 3)}, 3), frozenset({"b"}))
    heard.wait_for_calls(1)
    assert [change.key for change in heard.calls[0][0]] == ["b"]
    told.close()


def test_what_cannot_be_ordered_is_compared_whole_at_the_next_change() -> None:
    """Two snapshots of one revision: history gave back a good value in between."""
    told, heard = Subscriptions(), Heard()
    before = snapshot({}, 2)
    told.offer(snapshot({"a": (1, 1)}, 2), frozenset({"a"}))
    told.add("", heard, before)
    told.offer(snapshot({"a": (1, 1)}, 3), frozenset())
    heard.wait_for_calls(1)
    assert [change.key for change in heard.calls[0][0]] == ["a"]
    told.close()


def test_subscriptions_of_many_threads_are_all_kept() -> None:
    told = Subscriptions()
    begin = threading.Barrier(8)
    kept: list[Heard] = []

    def subscribe() -> None:
        begin.wait(WITHIN_S)
        for _ in range(50):
            heard = Heard()
            kept.append(heard)
            end = told.add("", Heard(), EMPTY)
            told.add("never/", heard, EMPTY)
            end()

    threads = [threading.Thread(target=subscribe) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN_S)
    assert len(told._all) == len(kept) == 400


# Failing


def test_what_a_callback_raises_is_logged_and_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    told, heard = Subscriptions(), Heard()

    def failing(changes: tuple[Change, ...], now: Snapshot) -> None:
        heard(changes, now)
        if now.revision == 1:
            raise RuntimeError(f"cannot take {changes[0].new!r}") from ValueError("hunter0")

    told.add("a/", failing, EMPTY)
    with caplog.at_level(logging.ERROR, logger="veltrix_mw"):
        told.offer(snapshot({"a/k": ("hunter2", 1)}, 1), None)
        heard.wait_for_calls(1)
        told.offer(snapshot({"a/k": ("hunter3", 2)}, 2), None)
        heard.wait_for_calls(2)
    (record,) = caplog.records
    assert record.getMessage().startswith("veltrix.subscriber_failed prefix='a/' error=RuntimeError > ")
    assert f"{__file__}:" in record.getMessage()
    assert record.getMessage().endswith(" failing caused by ValueError")
    assert "hunter" not in caplog.text
    assert "cannot take" not in caplog.text
    told.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # threading itself says nothing
def test_a_callback_that_ends_its_thread_is_called_again_at_the_next_change() -> None:
    told, heard = Subscriptions(), Heard()

    def leaving(changes: tuple[Change, ...], now: Snapshot) -> None:
        heard(changes, now)
        raise SystemExit

    told.add("", leaving, EMPTY)
    for revision in (1, 2):
        told.offer(snapshot({"a": (1, revision)}, revision), frozenset({"a"}))
        heard.wait_for_calls(revision)
        wait_until(lambda: ended(heard), WITHIN_S, reason="SystemExit ends the thread")
    assert len(set(heard.threads)) == 2


def test_without_a_thread_to_be_had_the_follower_goes_on_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told, heard = Subscriptions(), Heard()
    told.add("", heard, EMPTY)

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        told.offer(snapshot({"a": (1, 1)}, 1), frozenset({"a"}))
    assert "veltrix.subscriber_not_started" in caplog.text
    told.offer(snapshot({"a": (1, 1), "b": (1, 2)}, 2), frozenset({"b"}))
    heard.wait_for_calls(1)
    assert [change.key for change in heard.calls[0][0]] == ["a", "b"]
    told.close()


# Ending


def test_an_ended_subscription_hears_nothing_and_its_thread_is_gone() -> None:
    told, heard, other = Subscriptions(), Heard(), Heard()
    end = told.add("", heard, EMPTY)
    told.add("", other, EMPTY)
    told.offer(snapshot({"a": (1, 1)}, 1), None)
    heard.wait_for_calls(1)
    end()
    end()
    wait_until(lambda: ended(heard), WITHIN_S, reason="the thread of an ended subscription ends")
    told.offer(snapshot({"a": (1, 2)}, 2), None)
    other.wait_for_calls(2)
    assert len(heard.calls) == 1
    told.close()


def test_a_subscription_that_was_ended_while_it_was_being_told_stays_ended() -> None:
    told, heard = Subscriptions(), Heard()
    end = told.add("", heard, EMPTY)
    subscription = told._all[0]
    end()
    subscription.offer(snapshot({"a": (1, 1)}, 1), None)
    assert not subscription._running
    assert heard.calls == []


def test_a_callback_can_end_its_own_subscription() -> None:
    told, heard, other = Subscriptions(), Heard(), Heard()
    ends: list[Any] = []

    def once(changes: tuple[Change, ...], now: Snapshot) -> None:
        ends[0]()
        heard(changes, now)

    ends.append(told.add("", once, EMPTY))
    told.add("", other, EMPTY)
    for revision in range(1, 4):
        told.offer(snapshot({"a": (1, revision)}, revision), None)
        other.wait_for_revision(revision)
    wait_until(lambda: heard.threads and ended(heard), WITHIN_S, reason="the thread of an ended subscription ends")
    assert len(heard.calls) == 1
    told.close()


def test_a_callback_can_subscribe_another() -> None:
    told, heard = Subscriptions(), Heard()

    def outer(_: tuple[Change, ...], now: Snapshot) -> None:
        if now.revision == 1:
            told.add("", heard, now)
            subscribed.set()

    subscribed = threading.Event()
    told.add("", outer, EMPTY)
    told.offer(snapshot({"a": (1, 1)}, 1), None)
    assert subscribed.wait(WITHIN_S)
    told.offer(snapshot({"a": (1, 2)}, 2), None)
    heard.wait_for_calls(1)
    assert heard.calls[0][0] == (Change("a", Entry(1, 1), Entry(1, 2)),)
    told.close()


def test_closing_ends_the_threads_and_a_later_change_brings_what_was_missed() -> None:
    told, heard = Subscriptions(), Heard()
    told.close()
    told.add("", heard, EMPTY)
    told.offer(snapshot({"a": (1, 1)}, 1), None)
    heard.wait_for_calls(1)
    told.close()
    told.close()
    wait_until(lambda: ended(heard), WITHIN_S, reason="the threads end with close")
    told.offer(snapshot({"a": (1, 1), "b": (1, 2)}, 2), frozenset({"b"}))
    heard.wait_for_calls(2)
    assert [change.key for change in heard.calls[1][0]] == ["b"]
    told.close()


def test_a_change_right_after_closing_is_told_once() -> None:
    told, heard = Subscriptions(), Heard()
    told.add("", heard, EMPTY)
    for revision in range(1, 300):
        told.offer(snapshot({"a": (1, revision)}, revision), frozenset({"a"}))
        told.close()
    told.offer(snapshot({"a": (1, 300)}, 300), frozenset({"a"}))
    heard.wait_for_revision(300)
    assert heard.states() == {"a": Entry(1, 300)}
    told.close()


def test_closing_in_the_midst_of_a_callback_does_not_wait_for_it_and_keeps_the_rest_for_later() -> None:
    told, heard = Subscriptions(), Heard(waits=True)
    told.add("", heard, EMPTY)
    told.offer(snapshot({"a": (1, 1)}, 1), None)
    assert heard.entered.wait(WITHIN_S)
    told.offer(snapshot({"a": (1, 1), "b": (1, 2)}, 2), frozenset({"b"}))
    told.close()
    heard.may_go_on.set()
    wait_until(lambda: heard.threads and ended(heard), WITHIN_S, reason="the thread ends after its call")
    assert len(heard.calls) == 1
    told.offer(snapshot({"a": (1, 1), "b": (1, 2), "c": (1, 3)}, 3), frozenset({"c"}))
    heard.wait_for_calls(2)
    assert [change.key for change in heard.calls[1][0]] == ["b", "c"]
    told.close()


# Forks


def test_a_fork_in_the_midst_of_an_offer_loses_nothing() -> None:
    told, heard = Subscriptions(), Heard()
    told.add("", heard, EMPTY)
    subscription = told._all[0]
    subscription._newest = snapshot({"a": (1, 1)}, 1)  # as far as the offer had come, in a thread that is gone
    told._after_fork()
    told.offer(snapshot({"a": (1, 1), "b": (1, 2)}, 2), frozenset({"b"}))
    heard.wait_for_calls(1)
    assert [change.key for change in heard.calls[0][0]] == ["a", "b"]
    told.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("when", ["idle", "in a callback", "never told", "while the locks are held"])
def test_a_forked_child_hears_of_changes_on_a_thread_of_its_own(when: str) -> None:
    told, heard = Subscriptions(), Heard(waits=when == "in a callback")
    end = told.add("", heard, EMPTY)
    entries: Model = {"a": (1, 1)}
    if when != "never told":
        told.offer(snapshot(entries, 1), frozenset({"a"}))
        if when == "in a callback":
            assert heard.entered.wait(WITHIN_S)
        else:
            heard.wait_for_calls(1)
    held, may_release = threading.Event(), threading.Event()

    def hold() -> None:
        with told._lock, told._all[0]._condition:
            held.set()
            may_release.wait(WITHIN_S)

    holder = threading.Thread(target=hold)
    if when == "while the locks are held":
        holder.start()
        assert held.wait(WITHIN_S)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(int(WITHIN_S))  # ends a child that waits for ever
            heard.__init__()  # type: ignore[misc]
            told.offer(snapshot({**entries, "b": (1, 2)}, 2), frozenset({"b"}))
            heard.wait_for_revision(2)
            told.offer(snapshot({**entries, "b": (1, 3)}, 3), frozenset({"b"}))
            heard.wait_for_revision(3)
            end()
            os.write(writer, b"b" if "b" in heard.states() else b"?")
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"b"
    os.waitpid(pid, 0)
    may_release.set()
    heard.may_go_on.set()
    # And the parent's goes on.
    told.offer(snapshot({**entries, "c": (1, 2)}, 2), frozenset({"c"}))
    heard.wait_for_revision(2)
    assert set(heard.states()) >= {"c"}
    end()
