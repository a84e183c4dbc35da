"""etcd's history is compacted or replaced while nobody looks, or one revision is huge: equal again in one swap."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.faults.checker import Publication
from tests.faults.rig import SLACK, Links, Rig, rig
from tests.support.stopping import stop
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

CONVERGED_S = 5.0
RAISED = ("--max-txn-ops=10000", "--max-request-bytes=33554432")


@pytest.fixture(scope="module", params=["direct", "mirrored"])
def made(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with rig(members=1, mirror=request.param == "mirrored", etcd_options=RAISED) as it:
        yield it


def _cut_off(made: Rig) -> None:
    """Nobody reaches etcd: whoever follows it finds its connection broken, and the next one refused."""
    groups: list[Links] = [made.links, *(relay.links for relay in made.relays)]
    for links in groups:
        for proxy in links.etcd.values():
            proxy.refuse()


def _counts(made: Rig) -> dict[int, int]:
    return {pid: len(published) for pid, published in made.publications().items()}


def _swaps(made: Rig, before: dict[int, int]) -> dict[int, list[Publication]]:
    return {pid: published[before[pid] :] for pid, published in made.publications().items()}


def _log(made: Rig) -> str:
    return made.served.log + "".join(relay.log for relay in made.relays)


@pytest.mark.parametrize("what", ["changes before it", "nothing but a deletion"])
def test_compaction_while_disconnected(made: Rig, what: str) -> None:
    """Also at the revision of the deletion itself, which etcd 3.4 then neither delivers nor calls compacted."""
    made.writer.write({"doomed": "1"})
    made.steady()
    told = _log(made).count("veltrix.relist")
    with made.writer.paused():
        made.equal_within(CONVERGED_S)
        before = _counts(made)
        old = {pid: published[-1] for pid, published in made.publications().items()}
        _cut_off(made)
        if what == "changes before it":
            for number in range(5):
                made.writer.write({"pair/left": f"{-number}", "pair/right": f"{-number}", "item/1": str(number)})
        deleted = made.writer.write({"doomed": None})
        made.cluster.compact(deleted.revision)
        made.heal()
        made.equal_within(CONVERGED_S if made.redis is None else 2 * CONVERGED_S)
        for pid, swaps in _swaps(made, before).items():
            # What a compacted deletion of someone else's leaves no trace of, a list cannot tell: its revision.
            assert len(swaps) == 1, f"{pid}: {swaps}"
            assert old[pid].revision <= swaps[0].revision <= deleted.revision
    assert _log(made).count("veltrix.relist") > told, made.told()


def test_a_transaction_of_more_than_four_megabytes_is_one_swap(made: Rig) -> None:
    with made.writer.paused():
        made.equal_within(CONVERGED_S)
        before = _counts(made)
        value = '"' + "x" * 90_000 + '"'
        written = made.writer.write({f"large/{number}": value for number in range(60)}, timeout_s=20)
        made.caught_up_s(written.revision, CONVERGED_S * SLACK)
        made.equal_within(CONVERGED_S)
        for pid, swaps in _swaps(made, before).items():
            assert [each.revision for each in swaps] == [written.revision], f"{pid}: {swaps}"
        made.writer.write({f"large/{number}": None for number in range(60)})
    made.steady()


@pytest.mark.parametrize("time_of", ["the first", "the second"])
def test_a_restored_backup_is_taken_whole_under_a_new_incarnation(made: Rig, time_of: str) -> None:
    """With the same token, so that etcd's ids are the same; the second time the backup's label is known."""
    backup = made.cluster.back_up()
    made.writer.first_after(time.monotonic() + 0.5)
    made.steady()
    with made.writer.paused():
        before = _counts(made)
        old = {pid: published[-1] for pid, published in made.publications().items()}
        made.checker.restores += 1
        made.cluster.restore(backup)
        begun_s = time.monotonic()
        made.equal_within(CONVERGED_S if made.redis is None else 2 * CONVERGED_S)
        _all_renamed(made, {each.incarnation for each in old.values()}, begun_s)
        for pid, swaps in _swaps(made, before).items():
            assert len(swaps) == 1, f"{pid}: {swaps}\n{made.told()}"
            assert swaps[0].revision < old[pid].revision
    _said(made, {each.incarnation for each in old.values()})
    made.steady()


def test_a_worker_that_was_frozen_while_a_backup_was_restored_is_not_fooled_by_a_higher_revision(made: Rig) -> None:
    backup = made.cluster.back_up()
    made.writer.first_after(time.monotonic() + 0.3)
    made.steady()
    frozen = next(iter(made.publications()))
    with made.writer.paused():
        made.equal_within(CONVERGED_S)
        old = {pid: published[-1] for pid, published in made.publications().items()}
        before = _counts(made)
        made.checker.restores += 1
        stop(frozen)
        try:
            made.cluster.restore(backup)
            # Past what the frozen one knows: its revision exists again, and is another one.
            while made.writer.write({"pair/left": "0", "pair/right": "0", "filler": "1"}).revision < (
                old[frozen].revision + 10
            ):
                pass
        finally:
            os.kill(frozen, signal.SIGCONT)
        begun_s = time.monotonic()
        made.equal_within(CONVERGED_S if made.redis is None else 2 * CONVERGED_S)
        _all_renamed(made, {each.incarnation for each in old.values()}, begun_s)
        swaps = _swaps(made, before)[frozen]
        # Several, where the mirror came to them one by one; but never one of the history that was lost.
        assert not {each.incarnation for each in swaps} & {each.incarnation for each in old.values()}, swaps
        revisions = [each.revision for each in swaps]
        assert revisions
        assert revisions == sorted(set(revisions)), swaps
    _said(made, {each.incarnation for each in old.values()})
    made.steady()


def _all_renamed(made: Rig, old: set[str], begun_s: float) -> None:
    """Every worker serves under one incarnation, which is not an old one."""

    def renamed() -> bool:
        now = {published[-1].incarnation for published in made.publications().values()}
        return len(now) == 1 and not now & old

    try:
        wait_until(renamed, CONVERGED_S * SLACK, reason="every worker serves the new incarnation")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{made.told()}") from None


def _said(made: Rig, old: set[str]) -> None:
    assert "veltrix.restored" in _log(made), made.told()
    for status in made.statuses().values():
        assert status["incarnation"] not in old
